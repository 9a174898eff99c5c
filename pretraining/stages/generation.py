"""Stage d: the DiT learns to carry noise to image features, reading a frozen backbone's states at the latent queries.

Letters: B rows, Q = 64 latent queries, C backbone width, T = 64 features, W feature width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ...blip3o_core.flow import TRAIN_TIMESTEPS, mix, target_velocity, training_sigma
from ...blip3o_core.models.nextdit import NextDiT
from ...blip3o_core.sampling import to_grid
from ..pool import ScenePool, save_array
from ..trainer import Batch
from ..vocabulary import WordIds
from .encoder import GRID
from .understanding import UnderstandingStage, draw_prompt, prompt_rows


class GenerationStage(nn.Module):
    """Flow matching on image features: MSE to the velocity at a random noise level."""

    def __init__(self, dit: NextDiT) -> None:
        super().__init__()
        self.dit = dit

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        features = to_grid(batch["features"], (GRID, GRID))
        noise = to_grid(batch["noise"], (GRID, GRID))
        sigma = training_sigma(batch["index"])
        guess = self.dit(
            mix(features, noise, sigma), sigma * TRAIN_TIMESTEPS, batch["conditioning"] * batch["keep"]
        )
        error = (guess - target_velocity(features, noise)).square().mean(dim=(1, 2, 3))
        early = sigma > 0.7
        return error.mean(), {"early": (error * early).sum() / early.sum().clamp(min=1)}


def initialise(dit: NextDiT) -> None:
    """Start values: quiet modulation, half-open cross attention, zero output."""
    for module in dit.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=1 / math.sqrt(module.in_features))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for layer in dit.layers:
        nn.init.normal_(layer.norm1.linear.weight, std=0.02)
        with torch.no_grad():
            layer.norm1.linear.bias.zero_()
            # Gates a third open: branches contribute, and learn, from the first step.
            dim = dit.config.dim
            layer.norm1.linear.bias[dim : 2 * dim] = 0.3
            layer.norm1.linear.bias[3 * dim :] = 0.3
            layer.gate.fill_(0.5)
    nn.init.zeros_(dit.norm_out.linear_2.weight)
    nn.init.normal_(dit.norm_out.linear_1.weight, std=0.02)


@torch.no_grad()
def encode_prompts(stage: UnderstandingStage, vocabulary: WordIds, prompts: list[str]) -> Tensor:
    """Conditioning of prompts in the published template, (B, Q, C)."""
    queries = stage.latent_queries.shape[1]
    batch = prompt_rows(vocabulary, prompts, [None] * len(prompts), queries).tensors("prompt")
    hidden_states = stage.prompt_states(batch)
    at_queries = (batch["prompt_ids"] == stage.query_token)[..., None]
    return hidden_states.masked_select(at_queries).view(len(prompts), queries, -1)


@torch.no_grad()
def encode_bare_prompt(stage: UnderstandingStage, vocabulary: WordIds) -> Tensor:
    """Conditioning of a prompt of one space without the chat template: `[IMG]` and the queries alone, (Q, C)."""
    queries = stage.latent_queries.shape[1]
    ids = torch.tensor([[vocabulary.ids["[IMG]"]] + [stage.query_token] * queries])
    positions = torch.arange(queries + 1).expand(1, 3, -1)
    batch = {"prompt_ids": ids, "prompt_positions": positions, "prompt_branch": torch.zeros_like(ids)}
    return stage.prompt_states(batch)[0, 1:]


def encode_pool_prompts(
    stage: UnderstandingStage,
    vocabulary: WordIds,
    pool: ScenePool,
    path: Path,
    seed: int,
    colourless: float = 0.15,
) -> np.ndarray:
    """Conditioning of one training prompt per scene, (N, Q, C) float16, kept at `path`."""
    if not path.is_file():
        parts = []
        for start in range(0, len(pool), 100):
            rng = np.random.default_rng((seed, start, 4))
            scenes = pool.scenes.take(slice(start, start + 100))
            prompts = [draw_prompt(scenes, n, rng, colourless=colourless)[0] for n in range(len(scenes))]
            parts.append(encode_prompts(stage, vocabulary, prompts).half().numpy())
        save_array(path, np.concatenate(parts))
    return np.load(path, mmap_mode="r")


def generation_batches(
    features: np.ndarray,
    conditioning: np.ndarray,
    batch_size: int,
    seed: int,
    drop: float,
    *,
    bare: np.ndarray | None = None,
    bare_share: float = 0.03,
    singles: tuple[np.ndarray, np.ndarray] | None = None,
    singles_share: float = 0.35,
) -> Callable[[int], Batch]:
    """Features with the conditioning of their prompts, noise, stratified levels and dropped conditioning.

    Args:
        bare: conditioning (Q, C) of a prompt that asks for nothing. The published code steers the decoder away from
            what the DiT draws for it; here that is taught to be all zeros, the features the decoder's own dropped rows
            had, so that published guidance is plain classifier-free guidance.
        singles: more features and conditionings, of single objects, which fill `singles_share` of each batch: their
            sizes and their open colours are seen too rarely otherwise.
    """

    def batch_of(step: int) -> Batch:
        rng = np.random.default_rng((seed, step, 6))
        rows = rng.integers(len(features), size=batch_size)
        place = (rng.permutation(batch_size) + rng.random(batch_size)) / batch_size
        clean = features[rows].astype(np.float32)
        prompts = conditioning[rows].astype(np.float32)
        if singles is not None:
            number = round(singles_share * batch_size)
            rows = rng.integers(len(singles[0]), size=number)
            clean[:number], prompts[:number] = singles[0][rows], singles[1][rows]
        keep = rng.random((batch_size, 1, 1)) >= drop
        if bare is not None:
            empty = rng.random(batch_size) < bare_share
            clean[empty], prompts[empty] = 0.0, bare
            # Half of them without conditioning: guidance extrapolates from a branch that knows zeros too.
            keep[empty] = rng.random((int(empty.sum()), 1, 1)) >= 0.5
        return {
            "features": torch.from_numpy(clean),
            "conditioning": torch.from_numpy(prompts),
            "noise": torch.from_numpy(rng.standard_normal(clean.shape, np.float32)),
            "index": torch.from_numpy((place * TRAIN_TIMESTEPS).astype(np.int64)),
            "keep": torch.from_numpy(keep.astype(np.float32)),
        }

    return batch_of
