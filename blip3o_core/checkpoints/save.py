"""Networks -> a folder in the published layout, readable by the same code that reads the published ones."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .keys import to_published_key
from .layout import DECODER_FOLDER, DECODER_WEIGHTS, INDEX_NAME
from .safetensor_files import write_safetensors

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
    for component, network in (("backbone", backbone), ("dit", dit), ("image_encoder", image_encoder)):
        if network is None:
            continue
        for key, tensor in network.state_dict().items():
            if component == "backbone" and key == "lm_head.weight" and backbone.is_head_tied:
                continue
            tensors[to_published_key(component, key)] = tensor
    config = {"model_type": "blip3o_qwen", **config}
    if backbone is not None:
        config["n_query"] = backbone.latent_queries.shape[1]
    if image_encoder is not None:
        config |= image_encoder_fields(image_encoder)
    _write_shards(folder, tensors, dtype, max_shard_bytes, metadata)
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
        state_dict = {key: _cast(tensor, dtype) for key, tensor in network.state_dict().items()}
        write_safetensors(state_dict, folder / name / weights)
        # Two files of one network would leave it to chance which is read.
        for other in set(DECODER_WEIGHTS) - {weights}:
            (folder / name / other).unlink(missing_ok=True)
        config = {key: value for key, value in network.config.items() if key != "_use_default_values"}
        write_json(folder / name / "config.json", {"_class_name": type(network).__name__, **config})
    write_json(folder / "scheduler" / "scheduler_config.json", decoder.scheduler_config)
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
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    try:
        temporary.write_text(text, "utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _write_shards(
    folder: Path,
    tensors: dict[str, Tensor],
    dtype: torch.dtype | None,
    max_shard_bytes: int,
    metadata: dict[str, str] | None,
) -> None:
    shards: list[dict[str, Tensor]] = [{}]
    total, size = 0, 0
    for key in sorted(tensors):
        tensor = tensors[key]
        nbytes = tensor.numel() * (dtype or tensor.dtype).itemsize
        if shards[-1] and size + nbytes > max_shard_bytes:
            shards.append({})
            size = 0
        shards[-1][key] = tensor
        size += nbytes
        total += nbytes
    names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards, strict=True):
        write_safetensors(
            {key: _cast(tensor, dtype) for key, tensor in shard.items()}, folder / name, metadata
        )
    weight_map = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
    write_json(folder / INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _cast(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor
