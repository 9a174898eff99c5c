"""Stage d: the DiT learns to carry noise to image features, reading the backbone's states at the latent queries.

Letters: B rows, Q = 64 latent queries, C backbone width, T = 64 tokens of the grid, W their width, c latent channels.

What the paper compares is chosen by `GenerationOptions`: image features or VAE latents as the target, flow matching or
plain regression, and which parts learn beside the DiT.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ...blip3o_core.drawing.flow import TRAIN_TIMESTEPS, mix, target_velocity, training_sigma
from ...blip3o_core.drawing.sampling import to_grid
from ...blip3o_core.errors import BadInputError, check_choice, check_range
from ...blip3o_core.models.nextdit import NextDiT
from ..trainer import Batch
from ..world.pool import ScenePool, rows_of_step, save_array
from ..world.scenes import Scenes
from ..world.vocabulary import WordIds
from .encoder import GRID
from .understanding import UnderstandingStage, draw_prompt, picture_batch, prompt_rows

OBJECTIVES = ("flow", "mse")
TARGETS = ("features", "latents")
LEARNERS = ("dit", "queries", "backbone")
OPEN_COLOURS = 0.4  # of the prompts of extra single objects
LATENT_SQUARE = 2  # latents whose sides are twice the grid's become tokens of four times the channels


@dataclass(frozen=True)
class GenerationOptions:
    """What the generation stage learns; the defaults are the embedded model's.

    Attributes:
        target: "features" of the image encoder (the paper's choice) or the VAE's "latents", which need no UNet.
        objective: "flow" (the paper's choice) or "mse": regress the target from pure noise, in one step.
        learn: "dit" alone; "queries": the latent queries too, as published; "backbone": all that reads a prompt.
        questions: with "backbone", pictures with questions in each batch beside the prompts: joint training.

    Raises:
        BadInputError: an unknown choice, or questions for a backbone that does not learn.
    """

    target: str = "features"
    objective: str = "flow"
    learn: str = "dit"
    questions: int = 0

    def __post_init__(self) -> None:
        check_choice("target", self.target, TARGETS)
        check_choice("objective", self.objective, OBJECTIVES)
        check_choice("learn", self.learn, LEARNERS)
        check_range("questions", self.questions, 0, 10_000)
        if self.questions and self.learn != "backbone":
            raise BadInputError(
                f'questions is {self.questions} while learn is "{self.learn}": only a backbone that learns is asked.\n'
                "Set learn: backbone, or questions: 0."
            )


class GenerationStage(nn.Module):
    """MSE to the velocity at a random noise level, and of answers where understanding is trained jointly.

    Args:
        understanding: backbone and latent queries, where any of them learns; without them the batches bring ready
            conditioning.
    """

    def __init__(
        self,
        dit: NextDiT,
        options: GenerationOptions | None = None,
        understanding: UnderstandingStage | None = None,
    ) -> None:
        super().__init__()
        self.dit = dit
        self.options = options or GenerationOptions()
        assert (understanding is None) == (self.options.learn == "dit"), self.options
        self.understanding = understanding
        if understanding is not None:
            understanding.requires_grad_(False)
            understanding.latent_queries.requires_grad_(True)
            if self.options.questions:
                understanding.requires_grad_(True)
                understanding.layout_head.requires_grad_(False)
            elif self.options.learn == "backbone":
                understanding.backbone.model.language_model.requires_grad_(True)

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        if self.understanding is None:
            conditioning = batch["conditioning"]
        else:
            conditioning = self.understanding.at_queries(self.understanding.prompt_states(batch), batch)
        clean, noise = (to_grid(batch[name], (GRID, GRID)) for name in ("clean", "noise"))
        error, sigma = velocity_error(
            self.dit, clean, noise, batch["index"], conditioning * batch["keep"], self.options.objective
        )
        early = sigma > 0.7
        numbers = {"drawing": error.mean(), "early": (error * early).sum() / early.sum().clamp(min=1)}
        if not self.options.questions:
            return error.mean(), numbers
        understood, more = self.understanding.picture_loss(batch)
        return error.mean() + understood, {**numbers, **more}


def velocity_error(
    dit: NextDiT, clean: Tensor, noise: Tensor, index: Tensor, conditioning: Tensor, objective: str
) -> tuple[Tensor, Tensor]:
    """Squared error of the velocity per sample (B,), in float32, and its sigma (B,).

    Args:
        clean, noise: (B, W, H, W).
        index: training timesteps (B,), 0 = pure noise.
        objective: "flow", or "mse": at pure noise, where the error of the velocity is the error of what one step
            without guidance draws.
    """
    sigma = training_sigma(index)
    if objective == "mse":
        sigma = torch.ones_like(sigma)
    guess = dit(mix(clean, noise, sigma), sigma * TRAIN_TIMESTEPS, conditioning)
    return (guess - target_velocity(clean, noise)).float().square().mean(dim=(1, 2, 3)), sigma


def latent_tokens(latents: np.ndarray) -> np.ndarray:
    """VAE latents (N, c, 16, 16) as tokens of the DiT's grid, row major: (N, T, 4 c)."""
    number, channels = latents.shape[:2]
    squares = latents.reshape(number, channels, GRID, LATENT_SQUARE, GRID, LATENT_SQUARE)
    return squares.transpose(0, 2, 4, 1, 3, 5).reshape(number, GRID * GRID, channels * LATENT_SQUARE**2)


def tokens_to_latents(tokens: Tensor) -> Tensor:
    """Back from latent_tokens: (B, T, 4 c) -> (B, c, 16, 16)."""
    return torch.nn.functional.pixel_shuffle(to_grid(tokens, (GRID, GRID)), LATENT_SQUARE)


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
def encode_prompts(stage: UnderstandingStage, vocabulary: WordIds, prompts: Sequence[str | None]) -> Tensor:
    """Conditioning of prompts in the published template, (B, Q, C); None = no prompt: `[IMG]` and the queries alone."""
    queries = stage.latent_queries.shape[1]
    batch = prompt_rows(vocabulary, prompts, [None] * len(prompts), queries).tensors("prompt")
    return stage.at_queries(stage.prompt_states(batch), batch)


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
    targets: np.ndarray,
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
    """Targets with the conditioning of their prompts, noise, stratified levels and dropped conditioning.

    Args:
        targets: image features, or latents as tokens, (N, T, W).
        bare: conditioning (Q, C) of a prompt that asks for nothing. The published code steers the decoder away from
            what the DiT draws for it; here that is taught to be all zeros, the features the decoder's own dropped rows
            had, so that published guidance is plain classifier-free guidance.
        singles: more targets and conditionings, of single objects, which fill `singles_share` of each batch: their
            sizes and their open colours are seen too rarely otherwise.
    """

    def batch_of(step: int) -> Batch:
        rng = np.random.default_rng((seed, step, 6))
        rows = rng.integers(len(targets), size=batch_size)
        place = _levels(rng, batch_size)
        clean = targets[rows].astype(np.float32)
        prompts = conditioning[rows].astype(np.float32)
        if singles is not None:
            number = round(singles_share * batch_size)
            rows = rng.integers(len(singles[0]), size=number)
            clean[:number], prompts[:number] = singles[0][rows], singles[1][rows]
        keep = rng.random((batch_size, 1, 1)) >= drop
        if bare is not None:
            empty = _bare_rows(rng, clean, keep, bare_share)
            prompts[empty] = bare
        return {
            "clean": torch.from_numpy(clean),
            "conditioning": torch.from_numpy(prompts),
            "noise": torch.from_numpy(rng.standard_normal(clean.shape, np.float32)),
            "index": place,
            "keep": torch.from_numpy(keep.astype(np.float32)),
        }

    return batch_of


def worded_batches(
    targets: np.ndarray,
    pool: ScenePool,
    vocabulary: WordIds,
    queries: int,
    batch_size: int,
    seed: int,
    drop: float,
    *,
    bare_share: float = 0.03,
    singles: tuple[np.ndarray, Scenes] | None = None,
    singles_share: float = 0.35,
    open_colours: float = OPEN_COLOURS,
    questions: int = 0,
) -> Callable[[int], Batch]:
    """generation_batches for a backbone or latent queries that learn: prompts as words, a new wording each time.

    Args:
        bare_share: rows with the bare prompt, 0 = none.
        singles: more targets with their scenes.
        open_colours: share of their prompts that leave the colour open.
        questions: pictures with questions beside the prompts.
    """

    def batch_of(step: int) -> Batch:
        rng = np.random.default_rng((seed, step, 8))
        rows = rng.integers(len(targets), size=batch_size)
        place = _levels(rng, batch_size)
        clean = targets[rows].astype(np.float32)
        prompts: list[str | None] = [draw_prompt(pool.scenes, n, rng)[0] for n in rows]
        if singles is not None:
            number = round(singles_share * batch_size)
            rows = rng.integers(len(singles[0]), size=number)
            clean[:number] = singles[0][rows]
            prompts[:number] = [draw_prompt(singles[1], n, rng, colourless=open_colours)[0] for n in rows]
        keep = rng.random((batch_size, 1, 1)) >= drop
        if bare_share:
            for n in np.flatnonzero(_bare_rows(rng, clean, keep, bare_share)):
                prompts[n] = None
        batch = {
            "clean": torch.from_numpy(clean),
            "noise": torch.from_numpy(rng.standard_normal(clean.shape, np.float32)),
            "index": place,
            "keep": torch.from_numpy(keep.astype(np.float32)),
            **prompt_rows(vocabulary, prompts, [None] * batch_size, queries).tensors("prompt"),
        }
        if questions:
            batch.update(picture_batch(pool, rows_of_step(len(pool), questions, seed, step), vocabulary, rng))
        return batch

    return batch_of


def _levels(rng: np.random.Generator, batch_size: int) -> Tensor:
    """Training timesteps (B,), one from each of B equal parts of the path."""
    place = (rng.permutation(batch_size) + rng.random(batch_size)) / batch_size
    return torch.from_numpy((place * TRAIN_TIMESTEPS).astype(np.int64))


def _bare_rows(rng: np.random.Generator, clean: np.ndarray, keep: np.ndarray, share: float) -> np.ndarray:
    """Choose rows (B,) for the bare prompt, and make their targets zero in place."""
    empty = rng.random(len(clean)) < share
    clean[empty] = 0.0
    # Half of them without conditioning: guidance extrapolates from a branch that knows zeros too.
    keep[empty] = rng.random((int(empty.sum()), 1, 1)) >= 0.5
    return empty
