"""What the published sizes ask of a GPU, counted without one: bytes besides the weights, and kernels launched.

SizedPipeline lie on PyTorch's "meta" device, where tensors have shapes but no numbers; attention and RMSNorm count as one
kernel, as on a GPU. Libraries' own workspaces are not counted.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from comfyui_blip3o.blip3o_core.checkpoints.memory_plan import PROMPT_TOKENS, QUESTION_TOKENS
from comfyui_blip3o.blip3o_core.drawing.decoding import PixelSettings, decode_features
from comfyui_blip3o.blip3o_core.drawing.presets import PRESETS
from comfyui_blip3o.blip3o_core.drawing.sampling import FeatureSettings, sample_features
from comfyui_blip3o.blip3o_core.performance.fused_dit import PreparedRuns
from common import ROOT
from networks import QUERIES, SizedPipeline
from stages import plain_loop
from torch import Tensor, nn
from transformers import DynamicCache

sys.path.append(str(ROOT / "tests" / "support"))
from pretended_device import DEVICE, Watch, like_a_gpu  # noqa: E402


@dataclass(frozen=True)
class Count:
    """One line of the table.

    Attributes:
        weights_gb: of the network that works.
        working_mb: most at a time beside them.
        launches: kernels started, in eager mode.
    """

    work: str
    weights_gb: float
    working_mb: float
    launches: int


def measure_counts() -> list[dict[str, Any]]:
    """The rows, for JSON."""
    networks = SizedPipeline("full", DEVICE, torch.bfloat16)
    dit, decoder, backbone = networks.dit, networks.decoder, networks.backbone
    decoder.to(memory_format=torch.channels_last)
    channels, width = dit.config.in_channels, dit.config.conditioning_dim
    conditioning, features = _empty(1, QUERIES, width), _empty(1, QUERIES, channels)
    noise, latents = (
        _empty(1, channels, 8, 8).float(),
        _empty(1, *networks.latent_shape(PixelSettings())).float(),
    )
    settings, fast = FeatureSettings(), PRESETS["fast"].pixels

    def called() -> Tensor:
        return sample_features(dit, conditioning, noise=noise, settings=settings)

    def prepared() -> Tensor:
        return sample_features(dit, conditioning, noise=noise, settings=settings, prepare=PreparedRuns())

    def read(tokens: int, cache: DynamicCache | None) -> Tensor:
        positions = torch.empty(3, 1, tokens, dtype=torch.long, device=DEVICE)
        return backbone.lm_head(backbone(_empty(1, tokens, width), positions, None, cache)[:, -1]).float()

    def paint(settings: PixelSettings) -> Tensor:
        return decode_features(decoder, features, noise=latents, settings=settings)

    sampled = "30 steps of features"
    with like_a_gpu():
        prepared()  # joins weights, once
        rows = [
            _count(f"{sampled}, published loop", dit, lambda: plain_loop(dit, conditioning, noise, settings)),
            _count(f"{sampled}, context kept, guidance in one call", dit, called),
            _count(f"{sampled}, prepared run", dit, prepared),
            _count("a picture of 1024 pixels, published 50 steps", decoder, lambda: paint(PixelSettings())),
            _count("a picture of 1024 pixels, preset fast", decoder, lambda: paint(fast)),
            _count(
                "the same, tiled",
                decoder,
                lambda: paint(PixelSettings(fast.steps, sampler=fast.sampler, tiled=True)),
            ),
            _count(f"a prompt of {PROMPT_TOKENS} tokens", backbone, lambda: read(PROMPT_TOKENS, None)),
            _count(
                f"a question of {QUESTION_TOKENS} tokens",
                backbone,
                lambda: read(QUESTION_TOKENS, DynamicCache()),
            ),
        ]
    return [asdict(row) for row in rows]


def counts_markdown(rows: list[dict[str, Any]]) -> str:
    """The table."""
    lines = [
        "## Counted at the published sizes, without a GPU\n",
        "bf16, batch 1. Kernels are those of eager mode; a recorded run launches one graph a step.\n",
        "| work | weights, GB | beside them at most, MB | kernels launched |",
        "| --- | --- | --- | --- |",
    ]
    lines += [
        f"| {row['work']} | {row['weights_gb']:.2f} | {row['working_mb']:.0f} | {row['launches']:,} |"
        for row in rows
    ]
    return "\n".join(lines) + "\n\n"


def _count(work: str, network: nn.Module, run: Callable[[], Tensor]) -> Count:
    watch = Watch(network)
    with watch:
        run()
    return Count(work, watch.weights / 1e9, watch.working_bytes / 1e6, watch.operations)


def _empty(*shape: int) -> Tensor:
    return torch.empty(*shape, dtype=torch.bfloat16, device=DEVICE)
