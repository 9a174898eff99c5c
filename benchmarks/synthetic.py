"""A checkpoint of the published sizes in the published layout, with random weights, written tensor after tensor."""

from __future__ import annotations

import json
import math
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import common  # noqa: F401 - makes the package known
import torch
from comfyui_blip3o.blip3o_core.checkpoints.infer import infer_eva_clip, infer_nextdit
from comfyui_blip3o.blip3o_core.checkpoints.keys import to_published_key
from comfyui_blip3o.blip3o_core.checkpoints.layout import (
    DECODER_FOLDER,
    DECODER_WEIGHTS,
    INDEX_NAME,
    open_checkpoint,
)
from comfyui_blip3o.blip3o_core.checkpoints.safetensor_files import (
    TensorShape,
    read_header,
    stream_safetensors,
)
from comfyui_blip3o.blip3o_core.checkpoints.save import (
    MAX_SHARD_BYTES,
    TOKENIZER_FILES,
    network_config,
    plan_shards,
    shard_index,
    write_decoder_index,
    write_json,
    write_text,
)
from comfyui_blip3o.blip3o_core.config import BUILT_IN_MODEL, EvaClipConfig
from comfyui_blip3o.blip3o_core.errors import WrongCheckpointError
from comfyui_blip3o.blip3o_core.models.backbone import Backbone
from comfyui_blip3o.blip3o_core.models.decoder import Decoder
from comfyui_blip3o.blip3o_core.models.eva_clip import EvaClip
from comfyui_blip3o.blip3o_core.models.nextdit import NextDiT
from diffusers import AutoencoderKL
from networks import DITS, PUBLISHED_4B, QUERIES, VOCABULARY, backbone_config, decoder_configs
from torch import nn

SIZES = ("4b", "8b", "tiny")
TINY_SHARD_BYTES = 2 * 10**6
# Beside what is written.
SPARE_BYTES = 10**9
MARK = "synthetic.json"
# Of FLUX.1: the program that trained the published checkpoints held it, and so it lies in their shards.
LEFTOVER_VAE = "model.vae."
LEFTOVER_VAE_WIDTHS = {"tiny": [32, 32], "4b": [128, 256, 512, 512], "8b": [128, 256, 512, 512]}
LEFTOVER_TABLE = "model.layers.0.self_attn.rotary_emb.inv_freq"
# Tokens of Qwen2.5-VL beyond vocab.json, and those that BLIP3-o added, in the order of their ids.
FIRST_ADDED = 151643
ADDED_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>", "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>",
    "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>", "[IMG]", "[/IMG]", "<image>",
)  # fmt: skip
PUBLISHED_FIELDS = {
    "model_type": "blip3o_qwen",
    "architectures": ["blip3oQwenForCausalLM"],
    "vocab_size": VOCABULARY["full"],
    "max_position_embeddings": 128000,
    "torch_dtype": "bfloat16",
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "image_token_id": 151655,
    "video_token_id": 151656,
    "gen_vision_tower": "eva-clip-E-14-plus",
    "gen_pooling": "early_pool2d_4",
    "gen_hidden_size": 1792,
    "n_query": QUERIES,
}
PREPROCESSOR = {
    "image_processor_type": "Qwen2VLImageProcessor",
    "patch_size": 14,
    "merge_size": 2,
    "temporal_patch_size": 2,
    "min_pixels": 3136,
    "max_pixels": 12845056,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
# A prime: rows of a matrix, and layers, do not repeat.
NOISE_VALUES = 2**22 - 3
# Of vectors that are neither norm nor bias, such as the DiT's gates.
SMALL_INPUTS = 4


@dataclass(frozen=True)
class Plan:
    """A checkpoint folder that is to be written.

    Attributes:
        weights: path in the folder -> the tensors of that file.
        texts: path in the folder -> JSON.
        parameters: network -> its parameters; "leftovers" = what no network of BLIP3-o needs.
        scheduler: configuration of the decoder's scheduler.
    """

    size: str
    weights: dict[str, dict[str, TensorShape]]
    texts: dict[str, Any]
    parameters: dict[str, int]
    scheduler: dict[str, Any]

    @property
    def nbytes(self) -> int:
        return sum(map(_file_bytes, self.weights.values()))

    def missing(self, folder: Path) -> list[str]:
        """Weight files that are not in the folder, or hold something else."""
        return [name for name, shapes in self.weights.items() if not _fits(folder / name, shapes)]

    def summary(self) -> dict[str, Any]:
        """What a table says of it, JSON-ready."""
        return {
            "size": self.size,
            "gigabytes": round(self.nbytes / 1e9, 2),
            "files": {name: len(shapes) for name, shapes in self.weights.items()},
            "parameters": self.parameters,
        }


def plan_checkpoint(size: str, leftovers: bool = True, has_words: bool = False) -> Plan:
    """Names and shapes of every file, from the networks' own classes on the device "meta".

    Args:
        size: one of SIZES; "tiny" has the sizes of the built-in model.
        has_words: the tokenizer is Qwen2.5's, so "tiny" needs rows for its tokens too.
        leftovers: with the tensors that no network of BLIP3-o needs but the published shards hold.
    """
    built_in = open_checkpoint(BUILT_IN_MODEL)
    scheduler = built_in.decoder_config("scheduler")
    if size == "tiny":
        config = {**built_in.config}
        if has_words:
            config["vocab_size"] = VOCABULARY["full"]
        dit_sizes = infer_nextdit(built_in.component_tensors("dit"), built_in.name)
        tower_sizes = infer_eva_clip(built_in.component_tensors("image_encoder"), config, built_in.name)
        decoder_sizes = (built_in.decoder_config("unet"), built_in.decoder_config("vae"), scheduler)
        is_tied = False
    else:
        is_tied, key = size == "4b", PUBLISHED_4B if size == "4b" else "full"
        config = {**backbone_config(key), **PUBLISHED_FIELDS, "tie_word_embeddings": is_tied}
        dit_sizes = replace(DITS["full"], conditioning_dim=config["hidden_size"])
        tower_sizes, decoder_sizes = EvaClipConfig(), decoder_configs("full", scheduler)
    with torch.device("meta"):
        networks: dict[str, nn.Module] = {
            "backbone": Backbone(config, vocab_size=config["vocab_size"], queries=QUERIES, tie_head=is_tied),
            "image_encoder": EvaClip(tower_sizes),
            "dit": NextDiT(dit_sizes),
        }
        decoder, vae = Decoder(*decoder_sizes), _leftover_vae(size)
    shards: dict[str, TensorShape] = {}
    for component, network in networks.items():
        for key, tensor in network.state_dict().items():
            if not (is_tied and key == "lm_head.weight"):
                shards[to_published_key(component, key)] = _half(tensor)
    parameters = {name: _count(network) for name, network in networks.items()}
    parameters |= {"unet": _count(decoder.unet), "vae": _count(decoder.vae)}
    if leftovers:
        shards |= {LEFTOVER_VAE + key: _half(tensor) for key, tensor in vae.state_dict().items()}
        head_width = config["hidden_size"] // config["num_attention_heads"]
        shards[LEFTOVER_TABLE] = TensorShape(torch.float32, (head_width // 2,))
        parameters["leftovers"] = _count(vae)
    files = plan_shards(shards, TINY_SHARD_BYTES if size == "tiny" else MAX_SHARD_BYTES)
    texts = {"config.json": config, INDEX_NAME: shard_index(files)}
    weights = dict(files)
    for name, network in (("unet", decoder.unet), ("vae", decoder.vae)):
        place = f"{DECODER_FOLDER}/{name}"
        weights[f"{place}/{DECODER_WEIGHTS[0]}"] = {
            key: _half(tensor) for key, tensor in network.state_dict().items()
        }
        texts[f"{place}/config.json"] = network_config(network)
    return Plan(size, weights, texts, parameters, decoder_sizes[2])


def write_checkpoint(plan: Plan, folder: Path, tokenizer: Path | None = None) -> None:
    """Write what is missing of a planned checkpoint; a file that is there and fits stays.

    Args:
        tokenizer: folder of Qwen2.5's vocab.json and merges.txt; None = the built-in model's tokenizer.

    Raises:
        SystemExit: the folder holds something else, or the disk has too little room; it says so.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()) and not (folder / MARK).is_file():
        raise SystemExit(f"{folder} holds files that this benchmark has not written. Name another folder.")
    missing = plan.missing(folder)
    needed = sum(_file_bytes(plan.weights[name]) for name in missing)
    free = shutil.disk_usage(folder).free
    if missing and free < needed + SPARE_BYTES:
        raise SystemExit(
            f"The checkpoint needs {(needed + SPARE_BYTES) / 1e9:.1f} GB in {folder}, and {free / 1e9:.1f} GB are free. "
            "Free some, or name a folder on another disk."
        )
    write_json(folder / MARK, plan.summary())
    for stale in set(folder.rglob("*.safetensors")) - {folder / name for name in plan.weights}:
        stale.unlink()  # of another plan
    values = Values()
    for name in missing:
        shapes = plan.weights[name]
        stream_safetensors(shapes, lambda key, shapes=shapes: values.pieces(key, shapes[key]), folder / name)
    for name, content in plan.texts.items():
        write_json(folder / name, content)
    write_decoder_index(folder / DECODER_FOLDER, plan.scheduler)
    _write_tokenizer(folder, plan.size, tokenizer)


class Values:
    """Weights that keep every network's numbers in bounds: one block of random numbers over and over, scaled."""

    def __init__(self) -> None:
        self._noise = torch.randn(NOISE_VALUES, generator=torch.Generator().manual_seed(0))

    def pieces(self, key: str, shape: TensorShape) -> Iterator[torch.Tensor]:
        """A tensor's values in flat pieces: norms are 1, biases 0, the others 1 / sqrt(inputs) times normal."""
        left = math.prod(shape.shape)
        is_vector = len(shape.shape) == 1
        inputs = SMALL_INPUTS if is_vector else left // shape.shape[0]
        place = zlib.crc32(key.encode()) % NOISE_VALUES
        while left > 0:
            piece = self._noise[place : place + left]
            left, place = left - piece.numel(), 0
            if is_vector and key.endswith((".weight", ".bias", ".inv_freq")):
                yield torch.full_like(piece, float(not key.endswith(".bias")), dtype=shape.dtype)
            else:
                yield (piece / inputs**0.5).to(shape.dtype)


def _leftover_vae(size: str) -> AutoencoderKL:
    widths = LEFTOVER_VAE_WIDTHS[size]
    return AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * len(widths),
        up_block_types=["UpDecoderBlock2D"] * len(widths),
        block_out_channels=widths,
        layers_per_block=2,
        latent_channels=16,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def _write_tokenizer(folder: Path, size: str, source: Path | None) -> None:
    if source is None:
        for name in TOKENIZER_FILES:
            if (BUILT_IN_MODEL / name).is_file():
                shutil.copyfile(BUILT_IN_MODEL / name, folder / name)
    else:
        write_text(folder / "tokenizer.json", qwen_tokenizer(source))
        write_json(folder / "tokenizer_config.json", {"tokenizer_class": "Qwen2Tokenizer"})
    if size != "tiny":
        write_json(folder / "preprocessor_config.json", PREPROCESSOR)


def qwen_tokenizer(source: Path) -> str:
    """The published tokenizer.json from Qwen2.5's vocabulary.

    Raises:
        SystemExit: the folder holds no such vocabulary; it says so.
    """
    from transformers import Qwen2TokenizerFast

    with tempfile.TemporaryDirectory() as plain:  # without the special tokens that the source may name
        for name in ("vocab.json", "merges.txt"):
            if not (source / name).is_file():
                raise SystemExit(
                    f"{source} has no {name}. Name a folder with Qwen2.5's vocab.json and merges.txt."
                )
            shutil.copyfile(source / name, Path(plain) / name)
        tokenizer = Qwen2TokenizerFast.from_pretrained(plain).backend_tokenizer
    tokenizer.add_special_tokens(list(ADDED_TOKENS))
    ids = [tokenizer.token_to_id(token) for token in ADDED_TOKENS]
    if ids != list(range(FIRST_ADDED, FIRST_ADDED + len(ADDED_TOKENS))):
        raise SystemExit(f"{source} is not Qwen2.5's vocabulary: its tokens do not end at {FIRST_ADDED - 1}.")
    return json.dumps(json.loads(tokenizer.to_str()), ensure_ascii=False)


def _half(tensor: torch.Tensor) -> TensorShape:
    return TensorShape(torch.bfloat16, tuple(tensor.shape))


def _count(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def _file_bytes(shapes: dict[str, TensorShape]) -> int:
    return sum(shape.nbytes for shape in shapes.values())


def _fits(path: Path, shapes: dict[str, TensorShape]) -> bool:
    if not path.is_file():
        return False
    try:
        found = read_header(path)[0]
    except WrongCheckpointError:
        return False
    return {key: TensorShape(info.dtype, info.shape) for key, info in found.items()} == shapes
