"""What a step trains on and how far off it is: the published flow-matching loss, and the base model as teacher.

Every random number is a function of (seed, stream, step, row), so neither micro batches, nor processes, nor the device,
nor a resume change it.

Letters: B rows of a step over all processes, N features of a picture, C their width, Q queries, D conditioning width.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from ...blip3o_core.drawing.flow import TRAIN_TIMESTEPS, training_sigma
from ..config import LossConfig, TimestepConfig
from ..records import Sample

# Share of preservation rows on all-zero conditioning: as often as guidance training shows it to the base.
ZERO_EVERY = 10


@dataclass(frozen=True)
class Row:
    """One row of a step's batch: a view of a picture with one of its captions.

    Attributes:
        index: place in the step's whole batch.
        is_dropped: trained with all-zero conditioning.
    """

    index: int
    sample: Sample
    view: int
    caption: int
    is_dropped: bool

    @property
    def features(self) -> Tensor:
        """(N, C)."""
        return self.sample.features[self.view]

    @property
    def conditioning(self) -> Tensor:
        """(Q, D); zeros when dropped."""
        conditioning = self.sample.conditioning[self.caption]
        return torch.zeros_like(conditioning) if self.is_dropped else conditioning

    @property
    def prompt(self) -> str | None:
        """The text behind the conditioning; None when dropped."""
        return None if self.is_dropped else self.sample.prompts[self.caption]


@dataclass(frozen=True)
class Lesson:
    """One row of preservation: what the base model says here must stay.

    Attributes:
        index: place in the step's whole batch; noise and sigma are those of the training row there.
        features: (N, C) that are noised: what the base model draws for the prompt, because that is where the adapted
            model will be asked. (On the training picture's own features the teacher hardly protects other prompts.)
        conditioning: (Q, D).
        prompt: the text behind it; None = all-zero conditioning.
    """

    index: int
    features: Tensor
    conditioning: Tensor
    prompt: str | None


@lru_cache(maxsize=64)
def _stream_key(stream: str) -> int:
    return int.from_bytes(hashlib.sha256(stream.encode()).digest()[:8], "little")


def random_stream(seed: int, stream: str, step: int = 0, row: int = 0) -> np.random.Generator:
    """Counter-based (Philox) random numbers of one purpose at one step and row."""
    key = np.array([seed, _stream_key(stream)], dtype=np.uint64)
    counter = np.array([0, 0, row, step], dtype=np.uint64)  # the lowest word counts the numbers drawn
    return np.random.Generator(np.random.Philox(counter=counter, key=key))


def draw_sigmas(config: TimestepConfig, seed: int, step: int, batch: int) -> Tensor:
    """Noise levels (batch,) of a step, each one of the 1000 that the base was trained on.

    Uniform draws give index floor(1000 u) as published. `stratified` draws one from each of `batch` equally likely
    ranges, in random order. `shift` moves sigma to shift sigma / (1 + (shift - 1) sigma); `min` and `max` then squeeze
    the levels into their range.

    Source: BLIP3o@4689ec3 blip3o_qwen.py, forward.
    """
    generator = random_stream(seed, "sigma", step)
    uniform = generator.random(batch)
    if config.stratified:
        uniform = (generator.permutation(batch) + uniform) / batch
    if config.dist == "logit_normal":
        normal = torch.special.ndtri(torch.from_numpy(uniform).clamp(1e-12, 1 - 1e-12)).numpy()
        # sigma is the logistic of a normal, as in SD3; the index counts down from pure noise.
        uniform = 1 - 1 / (1 + np.exp(-(config.mean + config.std * normal)))
    if config.shift != 1:
        sigma = 1 - uniform
        uniform = 1 - config.shift * sigma / (1 + (config.shift - 1) * sigma)
    if (config.min, config.max) != (0.0, 1.0):
        uniform = (1 - config.max) + (config.max - config.min) * uniform
    # 1 - 0.7 is a little more than 0.3 in binary: a level that lies on the grid must not fall below it.
    index = np.floor(np.round(uniform * TRAIN_TIMESTEPS, 6)).clip(0, TRAIN_TIMESTEPS - 1)
    return training_sigma(torch.from_numpy(index).long())


def draw_noise(
    seed: int, step: int, rows: Sequence[int], shape: Sequence[int], *, stream: str = "noise"
) -> Tensor:
    """Standard normal noise (len(rows), *shape), float32 on the CPU; each row depends on its number alone."""
    each = [
        random_stream(seed, stream, step, row).standard_normal(tuple(shape), dtype=np.float32) for row in rows
    ]
    return torch.from_numpy(np.stack(each))


def draw_rows(
    train: Sequence[Sample],
    regularisation: Sequence[Sample],
    seed: int,
    step: int,
    batch: int,
    cond_drop: float,
) -> list[Row]:
    """The rows of a step: every picture once (or `repeats` times) an epoch, in an order of its own each epoch.

    With regularisation pictures every other row is one of them.
    """
    rows = []
    for index in range(batch):
        place = step * batch + index
        pool, stream = train, "order"
        if regularisation:
            place, is_regularisation = divmod(place, 2)
            if is_regularisation:
                pool, stream = regularisation, "order of regularisation"
        sample = _in_turn(pool, seed, stream, place)
        draw = random_stream(seed, "row", step, index).random(3)
        rows.append(
            Row(
                index,
                sample,
                view=int(draw[0] * sample.features.shape[0]),
                caption=int(draw[1] * sample.conditioning.shape[0]),
                is_dropped=bool(draw[2] < cond_drop),
            )
        )
    return rows


def _in_turn(samples: Sequence[Sample], seed: int, stream: str, place: int) -> Sample:
    turns = [index for index, sample in enumerate(samples) for _ in range(sample.repeats)]
    epoch, position = divmod(place, len(turns))
    return samples[turns[_epoch_order(seed, stream, epoch, len(turns))[position]]]


@lru_cache(maxsize=8)
def _epoch_order(seed: int, stream: str, epoch: int, count: int) -> tuple[int, ...]:
    return tuple(random_stream(seed, stream, epoch).permutation(count).tolist())


def draw_lessons(
    rows: Sequence[Row],
    prompts: Sequence[str],
    known: Mapping[str, tuple[Tensor, Tensor]],
    seed: int,
    step: int,
    batch: int,
) -> list[Lesson]:
    """One preservation row beside each training row: its class prompt, another prompt, now and then none at all.

    Args:
        rows: the training rows, all or some of the step's.
        prompts: what must stay beside the class prompts.
        known: prompt -> (conditioning (Q, D), features (N, C) that the base model draws for it).
    """
    lessons = []
    for row in rows:
        place = step * batch + row.index
        class_prompt = row.sample.class_prompts[row.caption] if row.sample.class_prompts else None
        pick = random_stream(seed, "lesson", step, row.index).integers(max(1, len(prompts)))
        other = prompts[pick] if prompts else None
        prompt = class_prompt if class_prompt and (place % 2 or not other) else other
        if prompt is None:  # a regularisation picture, and no other prompts
            conditioning, features = torch.zeros_like(row.sample.conditioning[0]), row.features
        else:
            conditioning, features = known[prompt]
        if place % ZERO_EVERY == 0:
            prompt, conditioning = None, torch.zeros_like(conditioning)
        lessons.append(Lesson(row.index, features, conditioning, prompt))
    return lessons


def velocity_loss(
    predicted: Tensor, target: Tensor, config: LossConfig, weights: Tensor | None = None
) -> Tensor:
    """Distance (B,) between velocities (B, N, C), in float32.

    Args:
        weights: how much each feature counts, (B, N); a row's weights are brought to mean 1.
    """
    difference = predicted.float() - target.float()
    if config.type == "huber":
        size = difference.abs()
        # Twice the usual Huber, so that it equals the square below delta.
        error = torch.where(size <= config.delta, difference**2, config.delta * (2 * size - config.delta))
    else:
        error = difference**2
    error = error.mean(dim=-1)
    if weights is None:
        return error.mean(dim=-1)
    weights = weights.to(error)
    return (error * weights).sum(dim=-1) / weights.sum(dim=-1).clamp(min=1e-8)


def preservation_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared distance (B,) between the velocities (B, N, C) of adapter and base, in float32."""
    return velocity_loss(student, teacher.detach(), LossConfig())


def feature_side(features: Tensor) -> int:
    """Features along one side of the square picture that (..., N, C) describes."""
    side = math.isqrt(features.shape[-2])
    assert side * side == features.shape[-2], f"{features.shape[-2]} features are no square"
    return side
