"""Networks -> a folder in the published layout, readable by the same code that reads the published ones."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..files import replacing
from .keys import to_published_key
from .layout import DECODER_FOLDER, DECODER_WEIGHTS, INDEX_NAME
from .safetensor_files import (
    TensorShape,
    pieces_of,
    shape_in_file,
    stream_safetensors,
    write_safetensors,
)

if TYPE_CHECKING:
    from ..models.backbone import Backbone
    from ..models.decoder import Decoder
    from ..models.eva_clip import EvaClip
    from ..models.nextdit import NextDiT

MAX_SHARD_BYTES = 5 * 10**9
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.json",
    "preprocessor_config.json",
    "generation_config.json",
)


def save_checkpoint(
    folder: str | Path,
    config: dict[str, Any],
    *,
    backbone: Backbone | None = None,
    dit: NextDiT | None = None,
    image_encoder: EvaClip | None = None,
    decoder: Decoder | None = None,
    tokenizer_from: str | Path | None = None,
    dtype: torch.dtype | None = torch.bfloat16,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    metadata: dict[str, str] | None = None,
) -> Path:
    """Write components under their published names; each file appears complete or not at all.

    Tensors go to the files piece by piece, also where their dtype changes: no second copy of them is held.

    Args:
        config: config.json; `gen_vision_config`, `gen_hidden_size` and `n_query` are set from the networks.
        tokenizer_from: folder whose tokenizer and preprocessor files are copied.
        dtype: of the floating-point tensors in the files; None keeps each tensor's.
        max_shard_bytes: a new shard begins before a file grows beyond this.
        metadata: strings for the headers of the main weight files.

    Returns:
        The folder.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    is_head_tied = backbone is not None and backbone.is_head_tied
    for component, network in (("backbone", backbone), ("dit", dit), ("image_encoder", image_encoder)):
        if network is None:
            continue
        for key, tensor in network.state_dict().items():
            if component == "backbone" and key == "lm_head.weight" and is_head_tied:
                continue
            tensors[to_published_key(component, key)] = tensor
    config = {"model_type": "blip3o_qwen", **config}
    if backbone is not None:
        config["n_query"] = backbone.latent_queries.shape[1]
    if image_encoder is not None:
        config |= image_encoder_fields(image_encoder)
    shapes = {key: shape_in_file(tensors[key], dtype) for key in sorted(tensors)}
    _write_shards(
        folder,
        shapes,
        lambda key: pieces_of(tensors[key], shapes[key].dtype),
        max_shard_bytes=max_shard_bytes,
        metadata=metadata,
    )
    write_json(folder / "config.json", config)
    if tokenizer_from is not None and Path(tokenizer_from).resolve() != folder.resolve():
        for name in TOKENIZER_FILES:
            if (Path(tokenizer_from) / name).is_file():
                shutil.copyfile(Path(tokenizer_from) / name, folder / name)
    if decoder is not None:
        save_decoder(folder / DECODER_FOLDER, decoder, dtype)
    return folder


def image_encoder_fields(image_encoder: EvaClip) -> dict[str, Any]:
    """The fields of config.json that describe an image encoder."""
    sizes = image_encoder.config
    return {
        "gen_hidden_size": sizes.width,
        "gen_pooling": f"early_pool2d_{sizes.pool}",
        "gen_vision_config": {
            "width": sizes.width,
            "layers": sizes.layers,
            "head_width": sizes.head_width,
            "mlp_ratio": sizes.mlp_dim / sizes.width,
            "image_size": sizes.image_size,
            "patch_size": sizes.patch_size,
        },
    }


def save_decoder(folder: Path, decoder: Decoder, dtype: torch.dtype | None) -> None:
    """Write the published `diffusion-decoder` folder."""
    for name, network in (("unet", decoder.unet), ("vae", decoder.vae)):
        # Only variant bf16 is published; another dtype takes the plain name.
        weights = DECODER_WEIGHTS[0] if dtype == torch.bfloat16 else DECODER_WEIGHTS[1]
        write_safetensors(network.state_dict(), folder / name / weights, dtype=dtype)
        # Two files of one network would leave it to chance which is read.
        for other in set(DECODER_WEIGHTS) - {weights}:
            (folder / name / other).unlink(missing_ok=True)
        write_json(folder / name / "config.json", network_config(network))
    write_decoder_index(folder, decoder.scheduler_config)


def network_config(network: Any) -> dict[str, Any]:
    """The config.json of a network of diffusers."""
    config = {key: value for key, value in network.config.items() if key != "_use_default_values"}
    return {"_class_name": type(network).__name__, **config}


def write_decoder_index(folder: Path, scheduler_config: dict[str, Any]) -> None:
    """Write what a `diffusion-decoder` folder holds beside its two networks."""
    write_json(folder / "scheduler" / "scheduler_config.json", scheduler_config)
    write_json(
        folder / "model_index.json",
        {
            "_class_name": "EmuVisualGenerationPipeline",
            "scheduler": ["diffusers", "EulerDiscreteScheduler"],
            "unet": ["diffusers", "UNet2DConditionModel"],
            "vae": ["diffusers", "AutoencoderKL"],
        },
    )


def write_json(path: Path, value: Any) -> None:
    """Write JSON under a temporary name and rename it."""
    write_text(path, json.dumps(value, indent=2, default=list) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text under a temporary name and rename it."""
    with replacing(path) as temporary:
        temporary.write_text(text, "utf-8")


def plan_shards(
    shapes: Mapping[str, TensorShape], max_shard_bytes: int = MAX_SHARD_BYTES
) -> dict[str, dict[str, TensorShape]]:
    """Shard's file name -> what lies in it, filled in the order given."""
    shards: list[dict[str, TensorShape]] = [{}]
    size = 0
    for key, shape in shapes.items():
        if shards[-1] and size + shape.nbytes > max_shard_bytes:
            shards.append({})
            size = 0
        shards[-1][key] = shape
        size += shape.nbytes
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": shard for i, shard in enumerate(shards, 1)}


def shard_index(shards: Mapping[str, Mapping[str, TensorShape]]) -> dict[str, Any]:
    """The index of shards: model.safetensors.index.json."""
    total = sum(shape.nbytes for shard in shards.values() for shape in shard.values())
    weight_map = {key: name for name, shard in shards.items() for key in shard}
    return {"metadata": {"total_size": total}, "weight_map": weight_map}


def _write_shards(
    folder: Path,
    shapes: Mapping[str, TensorShape],
    read: Callable[[str], Iterable[Tensor]],
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write the main weights and their index, tensor after tensor; no tensor is held whole.

    Args:
        shapes: published name -> what it will be in the file, in the order in which the shards take them.
        read: gives a tensor's values in pieces, see stream_safetensors.
        max_shard_bytes: a new shard begins before a file grows beyond this.
        metadata: strings for the headers.
    """
    shards = plan_shards(shapes, max_shard_bytes)
    for name, shard in shards.items():
        stream_safetensors(shard, read, folder / name, metadata)
    write_json(folder / INDEX_NAME, shard_index(shards))
