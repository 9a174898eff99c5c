"""Adapters of every kind with random weights, and what a model draws with them."""

from pathlib import Path

import torch
from comfyui_blip3o.blip3o_core.pipeline import Blip3oPipeline, load_pipeline
from comfyui_blip3o.lora_training.config import AdapterConfig
from comfyui_blip3o.lora_training.files.write import lora_tensors
from comfyui_blip3o.lora_training.fit.adapters import Adapter, attach
from torch import Tensor

PROMPT = "a red circle"
PATTERN = {r"attn2\.to_k": 2, r"feed_forward\.linear_2": 8}
KINDS = {
    "lora": AdapterConfig(rank=4, alpha=6),
    "rslora": AdapterConfig(rank=4, alpha=6, rslora=True),
    "dora": AdapterConfig(type="dora", rank=4, alpha=6),
    "lokr": AdapterConfig(type="lokr", rank=2, alpha=6),
    "lokr of whole matrices": AdapterConfig(type="lokr", rank=16, alpha=6),
    "rank pattern": AdapterConfig(rank=4, alpha=6, rank_pattern=PATTERN),
    "rslora with rank pattern": AdapterConfig(rank=4, alpha=6, rslora=True, rank_pattern=PATTERN),
    "full": AdapterConfig(type="full"),
    "queries": AdapterConfig(type="queries"),
    "backbone": AdapterConfig(type="none", backbone_rank=4, alpha=6),
    "lora, queries and backbone": AdapterConfig(rank=4, alpha=6, queries=True, backbone_rank=2),
}
# What has no whole weights in it, so that PEFT and diffusers have a place for it.
FACTORISED = [
    name for name in KINDS if not KINDS[name].queries and KINDS[name].type not in ("full", "queries")
]


def open_pipeline(folder: Path) -> Blip3oPipeline:
    return load_pipeline(folder, dtype="fp32", device="cpu")


def random_adapter(pipeline: Blip3oPipeline, kind: str, seed: int = 0) -> Adapter:
    """An adapter on a pipeline's networks that has learned something: noise."""
    config = KINDS[kind]
    needs_backbone = config.type == "queries" or config.queries or config.backbone_rank > 0
    parts = {"backbone": pipeline.backbone, "tokenizer": pipeline.tokenizer} if needs_backbone else {}
    adapter = attach(pipeline.dit, config, **parts)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapter.named_parameters().items():
            size = 0.3 if "lora_" in name or "lokr_" in name else 0.1
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return adapter


def trained(folder: Path, kind: str, seed: int = 0) -> tuple[dict[str, Tensor], Tensor]:
    """Tensors of a LoRA file, and the velocity that the trainer's own networks compute with it."""
    pipeline = open_pipeline(folder)
    adapter = random_adapter(pipeline, kind, seed)
    base = open_pipeline(folder).dit.state_dict()
    return lora_tensors(adapter.state_dict(), base), velocity(pipeline)


def velocity(pipeline: Blip3oPipeline) -> Tensor:
    """Of fixed noise at two noise levels, for a fixed prompt, (2, C, H, W)."""
    channels, height, width = pipeline.noise_shape
    grid = torch.randn(2, channels, height, width, generator=torch.Generator().manual_seed(7))
    conditioning = pipeline.encode_prompts([PROMPT, PROMPT])
    with torch.no_grad():
        return pipeline.dit(grid, torch.tensor([900.0, 100.0]), conditioning)
