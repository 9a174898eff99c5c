"""What fewer bits cost: cosines between what a network computes with whole and with quantized weights."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from comfyui_blip3o.blip3o_core.devices import DTYPE_NAMES
from comfyui_blip3o.blip3o_core.language.conditioning import encode_prompts
from comfyui_blip3o.blip3o_core.performance.quantize import FORMATS, quantize_network
from networks import SizedPipeline
from torch import Tensor, nn

NAMES = ("bf16", "fp16", *FORMATS)
PROMPTS = ["a red circle left of a blue square", "two green triangles", "a yellow star", "a photo of a cat"]


@torch.no_grad()
def measure_formats(networks: SizedPipeline) -> list[dict[str, Any]]:
    """Tiny: conditioning and image features of the trained model. Full: one random layer of each network at a time."""
    if networks.size == "tiny":
        return _whole(networks)
    return _layers(networks.device)


def _whole(networks: SizedPipeline) -> list[dict[str, Any]]:
    backbone = networks.backbone
    seeds = list(range(len(PROMPTS)))
    conditioning = networks.encode_prompts(PROMPTS)
    features = networks.sample_features(conditioning, seeds)
    rows = []
    for name in NAMES:
        smaller = _in_format(copy.deepcopy(backbone), name, networks.device)
        ours = encode_prompts(smaller, networks.tokenizer, PROMPTS, device=networks.device).to(networks.dtype)
        sampled = networks.sample_features(ours, seeds)
        rows += [
            _row("tiny, trained", "backbone: conditioning", name, ours, conditioning),
            _row("tiny, trained", "backbone: image features drawn with it", name, sampled, features),
        ]
    return rows


def _layers(device: torch.device) -> list[dict[str, Any]]:
    """Feed-forwards of the published widths, weights random normal, input normal with a few large channels."""
    generator = torch.Generator().manual_seed(0)
    widths = {"backbone layer": (3584, 18944), "EVA-CLIP layer": (1792, 15360), "DiT layer": (1792, 4864)}
    rows = []
    for label, (width, inner) in widths.items():
        torch.manual_seed(0)
        with device:
            layer = nn.Sequential(nn.Linear(width, inner, False), nn.SiLU(), nn.Linear(inner, width, False))
        for linear in (layer[0], layer[2]):
            nn.init.normal_(linear.weight, std=0.02)
        inputs = torch.randn(128, width, generator=generator)
        inputs[:, ::97] *= 20  # language models have such channels
        inputs = inputs.to(device)
        expected = layer(inputs)
        for name in NAMES:
            ours = _in_format(copy.deepcopy(layer), name, device)
            dtype = DTYPE_NAMES.get(name, torch.float32)
            rows.append(
                _row("full width, random", f"{label}: output", name, ours(inputs.to(dtype)), expected)
            )
    return rows


def _in_format(network: nn.Module, name: str, device: torch.device) -> nn.Module:
    if name in DTYPE_NAMES:
        return network.to(DTYPE_NAMES[name])
    return quantize_network(network.requires_grad_(False), name, device)


def _row(size: str, what: str, name: str, ours: Tensor, expected: Tensor) -> dict[str, Any]:
    cosine = F.cosine_similarity(ours.float(), expected.float(), dim=-1)
    return {
        "size": size,
        "what": what,
        "format": name,
        "cosine": cosine.mean().item(),
        "lowest": cosine.min().item(),
    }


def formats_markdown(rows: list[dict[str, Any]]) -> str:
    """A table with one line for each format."""
    lines = ["| size | what | format | mean cosine | lowest |", "|" + " --- |" * 5]
    lines += [
        f"| {row['size']} | {row['what']} | {row['format']} | {row['cosine']:.5f} | {row['lowest']:.5f} |"
        for row in rows
    ]
    return "\n".join(lines) + "\n\n"
