"""The training loop every stage shares: batches by step number, EMA, checkpoints, exact resume, logs, many processes.

A stage is a torch module whose forward(batch) returns the loss and numbers to log. Its batch is a pure function of the
step number, so a resumed run continues exactly, and every process takes its slice of the same global batch, so that
many processes train what one would.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

Batch = dict[str, Tensor]


@dataclass
class LoopConfig:
    """How long and how fast a stage trains.

    Attributes:
        steps: optimiser steps of the whole run; the learning rate falls to `final_learning_rate` over them.
        batch_size: samples of one step over all processes.
        learning_rate: peak, after `warmup` steps.
        ema: decay of the averaged weights, 0 = none; it ramps up over the first steps.
        save_minutes: a checkpoint at least this often.
        log_every: steps between lines of the log.
        seed: of the weights and of every batch.
        compile: torch.compile the stage's network.
    """

    steps: int
    batch_size: int = 32
    learning_rate: float = 2e-3
    final_learning_rate: float = 2e-5
    warmup: int = 100
    weight_decay: float = 0.01
    clip: float = 1.0
    ema: float = 0.0
    save_minutes: float = 3.0
    log_every: int = 20
    seed: int = 0
    compile: bool = False

    def __post_init__(self) -> None:
        assert self.steps > 0, f"steps {self.steps} must be positive"
        assert self.batch_size > 0, f"batch_size {self.batch_size} must be positive"

    def rate(self, step: int) -> float:
        """Learning rate of a step: linear warm-up, then half a cosine."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        share = min(1.0, (step - self.warmup) / max(1, self.steps - self.warmup))
        fall = 0.5 * (1 + math.cos(math.pi * share))
        return self.final_learning_rate + (self.learning_rate - self.final_learning_rate) * fall


class Averaged:
    """Exponential moving average of the weights that learn."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.weights = {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, parameter in module.named_parameters():
            if name in self.weights:
                self.weights[name].lerp_(parameter.detach(), 1 - decay)


def train_stage(
    stage: nn.Module,
    batch_of: Callable[[int], Batch],
    config: LoopConfig,
    folder: Path,
    *,
    stop_at: int | None = None,
    is_local: bool = False,
    on_checkpoint: Callable[[int], None] | None = None,
) -> dict[str, float]:
    """Train a stage to its last step, from its checkpoint if the folder has one.

    Args:
        stage: module; parameters with requires_grad learn.
        batch_of: the global batch of a step, every tensor with the batch first.
        folder: gets state.pt, log.jsonl and TensorBoard events.
        is_local: batch_of gives this process's own share instead of the global batch.
        stop_at: leave earlier, with a checkpoint; the learning rate still follows `config.steps`.
        on_checkpoint: called after each checkpoint, for pictures and scores.

    Returns:
        The last logged numbers.
    """
    from accelerate import Accelerator
    from torch.utils.tensorboard import SummaryWriter
    from tqdm import tqdm

    accelerator = Accelerator()
    folder.mkdir(parents=True, exist_ok=True)
    learning = [p for p in stage.parameters() if p.requires_grad]
    decayed = [p for p in learning if p.ndim >= 2]
    plain = [p for p in learning if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}],
        lr=config.learning_rate,
        betas=(0.9, 0.98),
    )
    average = Averaged(stage, config.ema) if config.ema else None
    step = _load(folder / "state.pt", stage, optimizer, average)
    last_step = config.steps if stop_at is None else min(stop_at, config.steps)
    network = accelerator.prepare(stage)
    if config.compile:
        network = torch.compile(network)
    main = accelerator.is_main_process
    writer = SummaryWriter(str(folder / "tensorboard")) if main else None
    bar = tqdm(total=config.steps, initial=step, desc=folder.name, disable=not main, mininterval=5)
    sums: dict[str, float] = {}
    numbers: dict[str, float] = {}
    since_log, saved_at, started = 0, time.monotonic(), time.monotonic()
    stage.train()
    while step < last_step:
        for group in optimizer.param_groups:
            group["lr"] = config.rate(step)
        batch = batch_of(step)
        if not is_local:
            batch = _slice(batch, accelerator.process_index, accelerator.num_processes)
        batch = {name: value.to(accelerator.device) for name, value in batch.items()}
        loss, values = network(batch)
        accelerator.backward(loss)
        grad_norm = accelerator.clip_grad_norm_(learning, config.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        if average is not None:
            average.update(stage, step)
        for name, value in {"loss": loss, "grad_norm": grad_norm, **values}.items():
            mean = accelerator.reduce(torch.as_tensor(value).detach().float(), "mean")
            sums[name] = sums.get(name, 0.0) + mean.item()
        since_log += 1
        bar.update(1)
        if since_log == config.log_every or step == last_step:
            numbers = {name: value / since_log for name, value in sums.items()}
            seconds = (time.monotonic() - started) / since_log
            sums, since_log, started = {}, 0, time.monotonic()
            if main:
                _log(
                    folder, writer, step, {**numbers, "seconds_per_step": seconds, "rate": config.rate(step)}
                )
                bar.set_postfix(loss=f"{numbers['loss']:.4f}")
        if time.monotonic() - saved_at > 60 * config.save_minutes or step == last_step:
            if main:
                _save(folder / "state.pt", stage, optimizer, average, step)
                if on_checkpoint is not None:
                    stage.eval()
                    on_checkpoint(step)
                    stage.train()
            accelerator.wait_for_everyone()
            saved_at = time.monotonic()
    bar.close()
    if writer is not None:
        writer.close()
    return numbers


def load_trained(stage: nn.Module, folder: Path) -> int:
    """Put the trained (averaged, where there is an average) weights of a run into a stage; returns its step."""
    state = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
    _restore(stage, state["model"])
    if state["average"]:
        with torch.no_grad():
            parameters = dict(stage.named_parameters())
            for name, value in state["average"].items():
                parameters[name].copy_(value)
    return state["step"]


def _slice(batch: Batch, rank: int, world: int) -> Batch:
    return {name: value[rank::world] for name, value in batch.items()}


def _frozen(stage: nn.Module) -> set[str]:
    """Names of parameters that do not learn: they are not saved, whoever builds the stage brings them."""
    return {name for name, parameter in stage.named_parameters() if not parameter.requires_grad}


def _restore(stage: nn.Module, weights: dict[str, Tensor]) -> None:
    missing, unexpected = stage.load_state_dict(weights, strict=False)
    assert not unexpected and set(missing) <= _frozen(stage), (missing, unexpected)


def _save(
    path: Path, stage: nn.Module, optimizer: torch.optim.Optimizer, average: Averaged | None, step: int
) -> None:
    state: dict[str, Any] = {
        "model": {name: tensor for name, tensor in stage.state_dict().items() if name not in _frozen(stage)},
        "optimizer": optimizer.state_dict(),
        "average": average.weights if average else {},
        "step": step,
    }
    temporary = path.with_suffix(".new")
    torch.save(state, temporary)
    os.replace(temporary, path)


def _load(path: Path, stage: nn.Module, optimizer: torch.optim.Optimizer, average: Averaged | None) -> int:
    if not path.is_file():
        return 0
    state = torch.load(path, map_location="cpu", weights_only=True)
    _restore(stage, state["model"])
    optimizer.load_state_dict(state["optimizer"])
    if average is not None and state["average"]:
        average.weights = state["average"]
    return state["step"]


def _log(folder: Path, writer: Any, step: int, numbers: dict[str, float]) -> None:
    with (folder / "log.jsonl").open("a", encoding="utf-8") as file:
        file.write(
            json.dumps(
                {"step": step, "time": round(time.time(), 1), **{k: round(v, 6) for k, v in numbers.items()}}
            )
            + "\n"
        )
    for name, value in numbers.items():
        writer.add_scalar(name, value, step)
