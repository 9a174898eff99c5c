"""Optimisers, learning rates over time, and the moving average of what learns."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from typing import Any

import torch
from torch import Tensor, nn

from ...blip3o_core.errors import MissingFilesError
from ..config import OptimizerConfig, ScheduleConfig, TrainConfig


def build_optimizer(parameters: Mapping[str, nn.Parameter], config: TrainConfig) -> torch.optim.Optimizer:
    """The optimiser of named parameters; `base_lr` in each group is its rate before schedule and roll-backs.

    LoRA+ gives the halves that start at zero a rate of their own. Weights of one dimension are not decayed.

    Raises:
        MissingFilesError: Prodigy's or schedule-free's package is not installed.
    """
    settings = config.optimizer
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        is_fast = settings.loraplus != 1 and name.endswith(".lora_B.weight")
        groups.setdefault((is_fast, parameter.ndim > 1), []).append(parameter)
    split = []
    for (is_fast, is_decayed), members in groups.items():
        rate = settings.lr * (settings.loraplus if is_fast else 1)
        decay = settings.weight_decay if is_decayed else 0.0
        split.append({"params": members, "lr": rate, "base_lr": rate, "weight_decay": decay})
    return _build(split, settings, config.schedule)


def _build(
    groups: list[dict[str, Any]], settings: OptimizerConfig, schedule: ScheduleConfig
) -> torch.optim.Optimizer:
    if settings.name == "adamw":
        return torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas)
    if settings.name == "prodigy":
        try:
            from prodigyopt import Prodigy
        except ImportError as error:
            raise _missing("prodigy", "prodigyopt") from error
        with redirect_stdout(io.StringIO()):  # it prints, where events may be read
            return Prodigy(
                groups,
                lr=settings.lr,
                betas=settings.betas,
                weight_decay=settings.weight_decay,
                safeguard_warmup=schedule.warmup > 0,
                use_bias_correction=True,
            )
    try:
        from schedulefree import AdamWScheduleFree
    except ImportError as error:
        raise _missing("schedule_free", "schedulefree") from error
    optimizer = AdamWScheduleFree(groups, lr=settings.lr, betas=settings.betas, warmup_steps=schedule.warmup)
    optimizer.train()
    return optimizer


def _missing(name: str, package: str) -> MissingFilesError:
    return MissingFilesError(
        f'The optimizer "{name}" needs the package {package}, which is not installed.\n'
        f"Install it with: pip install {package}\nOr set train.optimizer.name to adamw."
    )


def rate_factor(config: ScheduleConfig, step: int, total: int) -> float:
    """Share of the learning rate at a step (from 0): linear rise over `warmup`, then the fall to `floor`."""
    if step < config.warmup:
        return (step + 1) / (config.warmup + 1)
    if config.type == "constant":
        return 1.0
    share = min(1.0, (step - config.warmup) / max(1, total - 1 - config.warmup))
    left = 1 - share if config.type == "linear" else 0.5 * (1 + math.cos(math.pi * share))
    return config.floor + (1 - config.floor) * left


def set_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Every group's rate as a share of its own."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor


def uses_schedule(config: OptimizerConfig) -> bool:
    """Schedule-free averages instead: it has neither a schedule nor use for a moving average beside its own."""
    return config.name != "schedule_free"


@contextmanager
def averaged(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Within it a schedule-free optimiser's parameters are its averages; afterwards they are back to the bit."""
    if not hasattr(optimizer, "eval"):
        yield
        return
    members = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    kept = [parameter.detach().clone() for parameter in members]
    optimizer.eval()
    try:
        yield
    finally:
        optimizer.train()
        with torch.no_grad():
            for parameter, value in zip(members, kept, strict=True):
                parameter.copy_(value)


class MovingAverage:
    """Exponential moving average of named parameters; its decay rises as min(decay, (1 + s) / (10 + s))."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        self.decay = decay
        self._parameters = list(parameters.values())
        self.weights: dict[str, Tensor] = {name: p.detach().clone() for name, p in parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after step `step` (from 1)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.weights.values()), [p.detach() for p in self._parameters], 1 - decay)
