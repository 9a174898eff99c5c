"""Sizes of the networks as their tensors tell them; config.json is asked only for what no tensor shows."""

from __future__ import annotations

from typing import Any

from ..config import EvaClipConfig, NextDiTConfig
from ..errors import WrongCheckpointError
from ..untrusted import whole_number
from .safetensor_files import TensorInfo

DEFAULT_POOL = 4


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
    pool = int(pooling.rsplit("_", 1)[-1]) if pooling.rsplit("_", 1)[-1].isdigit() else DEFAULT_POOL
    head_width = (config.get("gen_vision_config") or {}).get("head_width", EvaClipConfig.head_width)
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
