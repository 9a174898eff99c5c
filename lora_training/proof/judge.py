"""Whether a LoRA learned, and what else it changed: every number is relative to the same model without it.

Letters: B rows, N features of a picture, C their width, Q queries, D width of the conditioning.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...blip3o_core.drawing.flow import TRAIN_TIMESTEPS, mix, target_velocity
from ...blip3o_core.drawing.noise import seeded_noise
from ...blip3o_core.drawing.sampling import FeatureSettings, sample_features, to_grid, to_tokens
from ..config import LoraConfig
from ..data.dataset import fill_in
from ..fit.adapters import Adapter
from ..fit.objective import draw_noise, feature_side, velocity_loss
from ..prompts import drift_prompts, preservation_prompts
from ..records import Sample, TrainingData, Validation

# Validation runs often, so it samples with a second-order method: half the steps of Euler's come out alike.
QUICK_STEPS, FINAL_SHARE = 8, 0.5
# Most rows of each measurement: a validation must stay a small part of the run.
LOSS_PICTURES, SHOWN_PROMPTS, BATCH = 2, 4, 16
FINAL_LOSS_PICTURES = 8
LEARNED_GAIN = 0.02
# Held-out gain below this share of the gain on training pictures = learned by heart.
BY_HEART = 0.3


def sample_prompts(config: LoraConfig) -> tuple[str, ...]:
    """The prompts of sample pictures, with the run's words in them; those whose word is not set are left out."""
    words = {"{trigger}": config.data.trigger.strip(), "{class}": config.data.class_word.strip()}
    found = []
    for prompt in config.sample.prompts:
        if any(place in prompt and not word for place, word in words.items()):
            continue
        found.append(fill_in(prompt, config.data))
    return tuple(dict.fromkeys(found))


def extra_prompts(config: LoraConfig) -> tuple[str, ...]:
    """Every prompt of a run that is no caption: samples, preservation, drift."""
    prompts = (*sample_prompts(config), *preservation_prompts(config), *drift_prompts(config))
    return tuple(dict.fromkeys(prompts))


@dataclass(frozen=True)
class Scorecard:
    """What a finished LoRA is worth.

    Attributes:
        numbers: of the exported step.
        steps: of the whole run.
        held_out: pictures behind `gain`; 0 = it was measured on the training pictures.
        verdicts: the numbers in words.
        ceiling: mean cosine of the training pictures to what the frozen decoder makes of them, or None.
        separability: how far the trigger moves the conditioning, see ceiling.trigger_separability, or None.
    """

    numbers: Validation
    steps: int
    held_out: int
    verdicts: tuple[str, ...]
    ceiling: float | None = None
    separability: float | None = None

    def to_tree(self) -> dict[str, Any]:
        """JSON-ready, flat but for `per_sigma` and `verdicts`."""
        numbers = asdict(self.numbers)
        per_sigma = {f"{sigma:g}": list(pair) for sigma, pair in numbers.pop("per_sigma").items()}
        rest = {key: value for key, value in asdict(self).items() if key != "numbers"}
        return {**numbers, "per_sigma": per_sigma, **rest, "verdicts": list(self.verdicts)}


class Judge:
    """Measures an adapter against its base on fixed noise, prompts and pictures.

    Args:
        data: from the cache; its prompts must hold extra_prompts(config).
        is_final: sample more finely and look at more pictures.
    """

    def __init__(self, config: LoraConfig, data: TrainingData, *, is_final: bool = False) -> None:
        self.config, self.data = config, data
        steps = max(1, round(config.sample.steps * FINAL_SHARE))
        self.settings = FeatureSettings(
            steps=steps if is_final else min(QUICK_STEPS, steps),
            guidance_scale=config.sample.cfg,
            sampler="ab2",
        )
        self._loss_pictures = FINAL_LOSS_PICTURES if is_final else LOSS_PICTURES
        self._known = known_conditioning(data)
        self._base: dict[str, Any] = {}
        pictures = (*data.held_out, *data.train)
        self._mean = torch.stack([sample.features.mean(dim=0) for sample in pictures]).mean(dim=0)
        captions = {sample.prompts[0]: (sample.class_prompts or ("",))[0] for sample in pictures}
        self._captions = list(captions)[:SHOWN_PROMPTS]
        self._classes = list(dict.fromkeys(text for text in captions.values() if text))[:SHOWN_PROMPTS]
        self._drift = [prompt for prompt in drift_prompts(config) if prompt in self._known]

    @torch.no_grad()
    def validate(self, adapter: Adapter, step: int) -> Validation:
        """How the adapter as it is now compares with its base."""
        if not self._base:
            with adapter.enabled(False):
                self._base = self._measure(adapter)
        base, now = self._base, self._measure(adapter)
        train_gain = _gain(base["train"], now["train"])
        held_out = "held_out" if self.data.held_out else "train"
        return Validation(
            step=step,
            loss=_mean(now[held_out].values()),
            base_loss=_mean(base[held_out].values()),
            gain=_gain(base[held_out], now[held_out]),
            train_gain=train_gain,
            per_sigma={sigma: (base[held_out][sigma], now[held_out][sigma]) for sigma in now[held_out]},
            concept=_likeness(now["concept"], self._mean) - _likeness(base["concept"], self._mean),
            drift=_drift(base["drift"], now["drift"]),
            zero_drift=_drift(base["zero"], now["zero"]),
            leak=_likeness(now["class"], self._mean) - _likeness(base["class"], self._mean),
            copy=self._copy(now["concept"]),
        )

    def _measure(self, adapter: Adapter) -> dict[str, Any]:
        found: dict[str, Any] = {
            "train": self._losses(adapter, self.data.train[: self._loss_pictures]),
            "concept": self._sampled(adapter, self._captions),
            "class": self._sampled(adapter, self._classes),
            "drift": self._sampled(adapter, self._drift),
            "zero": self._sampled(adapter, [None, None]),
        }
        if self.data.held_out:
            found["held_out"] = self._losses(adapter, self.data.held_out[: self._loss_pictures])
        return found

    def _losses(self, adapter: Adapter, samples: Sequence[Sample]) -> dict[float, float]:
        """Flow-matching loss at each sigma, over pictures and fixed noises."""
        validate, seed = self.config.validate, self.config.run.seed
        sums = dict.fromkeys(validate.sigmas, 0.0)
        for number, sample in enumerate(samples):
            conditioning = self._conditioning(adapter, [sample.prompts[0]])
            for place, sigma in enumerate(validate.sigmas):
                rows = [
                    (number * len(validate.sigmas) + place) * validate.noise_seeds + seed_number
                    for seed_number in range(validate.noise_seeds)
                ]
                # A step that no training has: its noise is never one of theirs.
                noise = draw_noise(seed, 2**63, rows, sample.features.shape[1:])
                features = sample.features[:1].expand_as(noise)
                sums[sigma] += self._loss(adapter, features, noise, sigma, conditioning)
        return {sigma: total / len(samples) for sigma, total in sums.items()}

    def _loss(
        self, adapter: Adapter, features: Tensor, noise: Tensor, sigma: float, conditioning: Tensor
    ) -> float:
        place = conditioning.device
        features, noise = features.to(place), noise.to(place)
        sigmas = torch.full((len(noise),), sigma, device=place)
        side = feature_side(features)
        grid = to_grid(mix(features, noise, sigmas), (side, side))
        timesteps = (sigmas * TRAIN_TIMESTEPS).round()
        with adapter.autocast():
            predicted = to_tokens(adapter.dit(grid, timesteps, conditioning.expand(len(noise), -1, -1)))
        target = target_velocity(features, noise)
        return velocity_loss(predicted, target, self.config.train.loss).mean().item()

    def _sampled(self, adapter: Adapter, prompts: Sequence[str | None]) -> Tensor:
        """Features (B, N, C) of prompts, each on a noise of its own; None = all-zero conditioning, unguided."""
        if not prompts:
            return torch.zeros(0, *self._mean.shape)
        seeds = range(self.config.sample.seed, self.config.sample.seed + len(prompts))
        return draw_features(adapter, self._conditioning(adapter, prompts), seeds, self.settings)

    def _conditioning(self, adapter: Adapter, prompts: Sequence[str | None]) -> Tensor:
        return conditioning_of(adapter, prompts, self._known)

    def _copy(self, sampled: Tensor) -> float:
        views = torch.cat([sample.features for sample in self.data.train]).flatten(1)
        return F.cosine_similarity(sampled.flatten(1)[:, None], views[None], dim=-1).max().item()


def known_conditioning(data: TrainingData) -> dict[str, Tensor]:
    """Prompt -> conditioning (Q, D) of everything that the cache gave."""
    known = dict(data.prompts)
    for sample in (*data.train, *data.held_out):
        known |= dict(zip(sample.prompts, sample.conditioning, strict=True))
        if sample.class_conditioning is not None:
            known |= dict(zip(sample.class_prompts, sample.class_conditioning, strict=True))
    return known


def conditioning_of(adapter: Adapter, prompts: Sequence[str | None], known: Mapping[str, Tensor]) -> Tensor:
    """Conditioning (B, Q, D) on the DiT's device: cached, or with what the backbone learned; None = zeros."""
    place = next(adapter.dit.parameters()).device
    zeros = torch.zeros_like(next(iter(known.values())))
    cached = [zeros if prompt is None else known[prompt] for prompt in prompts]
    if adapter.changes_conditioning and any(prompt is not None for prompt in prompts):
        learned = iter(adapter.encode([prompt for prompt in prompts if prompt is not None]).float())
        cached = [zeros if prompt is None else next(learned).cpu() for prompt in prompts]
    return torch.stack(cached).to(place, torch.float32)


@torch.no_grad()
def draw_features(
    adapter: Adapter, conditioning: Tensor, seeds: Iterable[int], settings: FeatureSettings
) -> Tensor:
    """Image features (B, N, C), float32 on the CPU, drawn by the DiT as it is; row i from the noise of seed i.

    Rows of all-zero conditioning are drawn without guidance: there is nothing to be guided away from.
    """
    side = math.isqrt(conditioning.shape[1])
    noise = seeded_noise(list(seeds), (adapter.dit.config.in_channels, side, side)).to(conditioning.device)
    is_zero = not conditioning.any()
    if is_zero:
        settings = FeatureSettings(steps=settings.steps, guidance_scale=1.0, sampler=settings.sampler)
    dtype = next(adapter.dit.parameters()).dtype
    rows = []
    with adapter.autocast():
        for start in range(0, len(noise), BATCH):
            part = slice(start, start + BATCH)
            rows.append(
                sample_features(
                    adapter.dit, conditioning[part].to(dtype), noise=noise[part], settings=settings
                )
            )
    return torch.cat(rows).float().cpu()


def verdicts(numbers: Validation, config: LoraConfig, *, has_held_out: bool) -> tuple[str, ...]:
    """The numbers in words, the most important first."""
    words = []
    if numbers.gain >= LEARNED_GAIN and numbers.concept > 0:
        words.append(f"It learned: the loss on {_pictures(has_held_out)} fell by {numbers.gain:.0%}.")
    else:
        words.append(
            f"It did not learn: the loss on {_pictures(has_held_out)} changed by {-numbers.gain:+.1%}. "
            "Train longer or with a higher train.optimizer.lr, and look at captions and ceiling."
        )
    if numbers.drift > config.validate.drift_max:
        words.append(
            f"It changes other prompts by {numbers.drift:.2f}, more than validate.drift_max "
            f"({config.validate.drift_max:g}). Use it at a lower strength, or train with preservation "
            "(data.class_word), fewer steps or the preset light."
        )
    else:
        words.append(f"Other prompts stay: they change by {numbers.drift:.2f}.")
    if numbers.leak > max(0.02, numbers.concept / 2):
        words.append("It leaks: the class word alone now draws the concept. Train with preservation.")
    if has_held_out and numbers.train_gain > 0.05 and numbers.gain < BY_HEART * numbers.train_gain:
        words.append("It learns its pictures by heart: fewer steps, a lower rank or more pictures help.")
    return tuple(words)


def _pictures(has_held_out: bool) -> str:
    return "pictures it never saw" if has_held_out else "its own pictures (too few to hold one out)"


def _gain(base: Mapping[float, float], now: Mapping[float, float]) -> float:
    before, after = _mean(base.values()), _mean(now.values())
    return (before - after) / max(before, 1e-12)


def _likeness(sampled: Tensor, mean: Tensor) -> float:
    """Mean cosine of features (B, N, C) to (N, C); 0 where nothing is sampled."""
    if not len(sampled):
        return 0.0
    return F.cosine_similarity(sampled.flatten(1), mean.flatten()[None], dim=-1).mean().item()


def _drift(base: Tensor, now: Tensor) -> float:
    if not len(base):
        return 0.0
    return 1 - F.cosine_similarity(base.flatten(1), now.flatten(1), dim=-1).mean().item()


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values)
