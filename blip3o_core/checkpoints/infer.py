"""Sizes of the networks as their tensors tell them; config.json is asked only for what no tensor shows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..config import EvaClipConfig, NextDiTConfig
from ..errors import WrongCheckpointError
from ..untrusted import quote, whole_number
from .safetensor_files import TensorInfo

DEFAULT_POOL = 4
MOST_CHANNELS = 100_000


def infer_nextdit(tensors: dict[str, TensorInfo], name: str) -> NextDiTConfig:
    """Configuration of the DiT.

    Args:
        tensors: our key -> tensor, of the component `dit`.
        name: checkpoint name, for messages.

    Raises:
        WrongCheckpointError: a tensor that tells a size is missing or has an impossible shape.
    """
    shape = Shapes(tensors, name, "DiT")
    dim, in_channels = shape("patch_embedder.proj.weight", 2)
    heads = shape("layers.0.gate", 1)[0]
    out_channels = shape("norm_out.linear_2.weight", 2)[0]
    if out_channels != in_channels:
        raise WrongCheckpointError(
            f'The DiT of checkpoint "{name}" reads {in_channels} channels but writes {out_channels}; BLIP3-o\'s are equal.\n'
            "It is another network of the Lumina family; use BLIP3o-Model-8B or -4B."
        )
    if not heads or dim % heads:
        raise WrongCheckpointError(
            f'The DiT of checkpoint "{name}" has impossible sizes: {heads} heads in a width of {dim}.\n'
            "Download the checkpoint again."
        )
    try:
        return NextDiTConfig(
            dim=dim,
            layers=_count(tensors, "layers."),
            heads=heads,
            kv_heads=shape("layers.0.attn1.to_k.weight", 2)[0] // (dim // heads),
            in_channels=in_channels,
            conditioning_dim=shape("caption_projection.linear_1.weight", 2)[1],
            ffn_dim=shape("layers.0.feed_forward.linear_1.weight", 2)[0],
            time_dim=shape("time_caption_embed.timestep_embedder.linear_1.weight", 2)[0],
        )
    except AssertionError as error:
        raise WrongCheckpointError(
            f'The DiT of checkpoint "{name}" has impossible sizes: {error}.'
        ) from error


def infer_eva_clip(tensors: dict[str, TensorInfo], config: dict[str, Any], name: str) -> EvaClipConfig:
    """Configuration of the image encoder.

    Args:
        tensors: our key -> tensor, of the component `image_encoder`.
        config: config.json, for the head width (no tensor tells it) and the pooling.
        name: checkpoint name, for messages.
    """
    shape = Shapes(tensors, name, "EVA-CLIP image encoder")
    width = shape("cls_token", 3)[-1]
    patch_size = shape("patch_embed.proj.weight", 4)[-1]
    side = round((shape("pos_embed", 3)[1] - 1) ** 0.5)
    pooling = str(config.get("gen_pooling", ""))
    pool = whole_number(pooling.rsplit("_", 1)[-1]) or DEFAULT_POOL
    described = config.get("gen_vision_config")
    described = described if isinstance(described, dict) else {}
    head_width = described.get("head_width", EvaClipConfig.head_width)
    if isinstance(head_width, bool) or not isinstance(head_width, int) or head_width < 1:
        raise WrongCheckpointError(
            f'config.json of checkpoint "{name}" gives {quote(head_width)} as head_width of gen_vision_config.\n'
            "Download config.json again."
        )
    try:
        return EvaClipConfig(
            width=width,
            layers=_count(tensors, "blocks."),
            head_width=head_width,
            mlp_dim=shape("blocks.0.mlp.fc1.weight", 2)[0],
            image_size=side * patch_size,
            patch_size=patch_size,
            pool=pool,
        )
    except AssertionError as error:
        raise WrongCheckpointError(
            f'The image encoder of checkpoint "{name}" has sizes that do not fit together: {error}.\n'
            "For a tower other than EVA-CLIP-E/14+, config.json needs gen_vision_config with its head_width."
        ) from error


def check_backbone_sizes(tensors: dict[str, TensorInfo], config: dict[str, Any], name: str) -> None:
    """Hold config.json against the tensors before anything of its sizes is built.

    Raises:
        WrongCheckpointError: a size that the tensors tell is another one in config.json, or a section is not there.
    """
    shape = Shapes(tensors, name, "language model")
    nested = config.get("text_config")
    sections: dict[str, Any] = {
        "text": nested if nested is not None else config,
        "vision": config.get("vision_config"),
    }
    for section, its in sections.items():
        if not isinstance(its, dict):
            raise WrongCheckpointError(
                f'config.json of checkpoint "{name}" has no section "{section}_config" of settings (it is {quote(its)}).\n'
                "Download config.json again."
            )
    width = shape("text.embed_tokens.weight", 2)[1]
    patch = shape("visual.patch_embed.proj.weight", 5)
    told = {
        ("text", "hidden_size"): width,
        ("text", "num_hidden_layers"): _count(tensors, "text.layers."),
        ("text", "intermediate_size"): shape("text.layers.0.mlp.gate_proj.weight", 2)[0],
        ("vision", "hidden_size"): patch[0],
        ("vision", "depth"): _count(tensors, "visual.blocks."),
        ("vision", "intermediate_size"): shape("visual.blocks.0.mlp.gate_proj.weight", 2)[0],
        ("vision", "patch_size"): patch[-1],
        ("vision", "out_hidden_size"): width,
    }
    for (section, field), expected in told.items():
        found = sections[section].get(field)
        if found is not None and (isinstance(found, bool) or found != expected):
            raise WrongCheckpointError(
                f'config.json of checkpoint "{name}" says that {field} of its {section} model is {quote(found)}, but its weights '
                f"have {expected}.\nDownload config.json again: it belongs to another model."
            )


def check_decoder_sizes(config: dict[str, Any], tensors: int, path: Path) -> None:
    """Refuse sizes of a UNet or VAE that no decoder has, before anything of them is built.

    Args:
        tensors: that its files hold: it has no more layers than that.

    Raises:
        WrongCheckpointError: a size is above what the files can hold.
    """
    for field, value in config.items():
        most = tensors if "layers" in field else MOST_CHANNELS
        for number in _numbers(value):
            if not -MOST_CHANNELS <= number <= most:
                raise WrongCheckpointError(
                    f'"{field}" in "{path.parent.name}/{path.name}" of "{path.parent.parent}" is {quote(value)}, more than any '
                    "decoder has.\nDownload that file again."
                )


def _numbers(value: Any) -> Iterator[float]:
    if isinstance(value, list):
        for item in value:
            yield from _numbers(item)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield value


def _count(tensors: dict[str, TensorInfo], prefix: str) -> int:
    """Blocks of a network; 0 when it has none, so that what is missing is told by name."""
    words = {key[len(prefix) :].split(".", 1)[0] for key in tensors if key.startswith(prefix)}
    numbers = {number for word in words if (number := whole_number(word)) is not None}
    # As many as there are from 0 on without a gap: a single tensor of a high number makes no million layers.
    return next(count for count in range(len(numbers) + 1) if count not in numbers)


class Shapes:
    """Shapes of a network's tensors by key; an absent or oddly shaped one is told by name.

    Args:
        tensors: our key -> tensor.
        name: checkpoint name, for messages.
        what: the network, in words.
    """

    def __init__(self, tensors: dict[str, TensorInfo], name: str, what: str) -> None:
        self._tensors, self._name, self._what = tensors, name, what

    def __call__(self, key: str, dimensions: int) -> tuple[int, ...]:
        if key not in self._tensors:
            raise WrongCheckpointError(
                f'Checkpoint "{self._name}" is damaged: its {self._what} lacks the tensor "{key}".\n'
                "Delete the weight files and download them again."
            )
        shape = self._tensors[key].shape
        if len(shape) != dimensions:
            raise WrongCheckpointError(
                f'Checkpoint "{self._name}" is damaged: the tensor "{key}" of its {self._what} has {len(shape)} dimensions, '
                f"expected {dimensions}.\nDelete the weight files and download them again."
            )
        return shape
