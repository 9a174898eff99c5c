"""The loop: from cached features and conditioning to learned weights that survive cancel, crash, NaN and little memory."""

from __future__ import annotations

import logging
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ...blip3o_core.devices import pick_device
from ...blip3o_core.drawing.flow import TRAIN_TIMESTEPS, mix, target_velocity
from ...blip3o_core.drawing.sampling import FeatureSettings, sample_features, to_grid, to_tokens
from ...blip3o_core.errors import TrainingDataError
from ...blip3o_core.language.prompts import TextTokenizer
from ...blip3o_core.lora.files import read_lora
from ...blip3o_core.models.backbone import Backbone
from ...blip3o_core.models.nextdit import NextDiT
from ...blip3o_core.performance.recording import can_compile
from ...blip3o_core.units import format_bytes
from ..config import LoraConfig
from ..memory import plan_step
from ..prompts import preservation_prompts
from ..records import Diverged, EventSink, Interrupted, OutOfMemory, StopCheck, TrainingData, Validation
from .adapters import Adapter, attach
from .base_dtype import set_base_dtype
from .objective import (
    Lesson,
    Row,
    draw_lessons,
    draw_noise,
    draw_rows,
    draw_sigmas,
    feature_side,
    preservation_loss,
    velocity_loss,
)
from .optimizers import MovingAverage, averaged, build_optimizer, rate_factor, set_rate, uses_schedule
from .pulse import Pulse
from .state import State, amend_state, newest_state, save_state

logger = logging.getLogger(__name__)

Validate = Callable[[Adapter, int], Validation]
DrawSamples = Callable[[Adapter, int], None]
BAD_STEPS, ROLL_BACKS = 3, 2
SPIKE = 20.0
RECENT_NORMS = 50
DRAWING_STEPS = 15


@dataclass
class FitResult:
    """What a fit ends with. Weights are under the keys of LoRA files, see Adapter.state_dict.

    Attributes:
        best: weights of the best validated step; the last ones where nothing was validated.
        last: weights after the last step (their average for the schedule-free optimiser).
        ema: averaged weights after the last step; None without averaging.
        best_step: step of `best`.
        best_validation: its numbers.
        losses: training loss of each step, NaN where it was skipped.
        stopped_because: "steps" or "patience"; of an unfinished run "interrupted".
        adapter: still attached, with `best` in it; None when read from disk.
    """

    best: dict[str, Tensor]
    last: dict[str, Tensor]
    ema: dict[str, Tensor] | None
    best_step: int
    best_validation: Validation | None
    steps: int
    losses: list[float]
    stopped_because: str
    adapter: Adapter | None = None


def fit(
    config: LoraConfig,
    data: TrainingData,
    dit: NextDiT,
    *,
    backbone: Backbone | None = None,
    tokenizer: TextTokenizer | None = None,
    folder: Path | None = None,
    on_event: EventSink = lambda event: None,
    should_stop: StopCheck = lambda: False,
    validate: Validate | None = None,
    sample: DrawSamples | None = None,
) -> FitResult:
    """Train an adapter on a DiT, from the newest state of the run's folder when it has one.

    The DiT moves to the configured device and dtype, is frozen and keeps the adapter; Adapter.remove takes it
    off. When this raises, it is already off.
    Several processes (torchrun, accelerate launch) share each batch and learn the same as one.

    Args:
        backbone, tokenizer: needed where config.needs_backbone.
        folder: of the run; its `state` folder is read and written. None = config.folder.
        validate: called with the averaged weights in place, where there are any; its result chooses the best step.
        sample: called every config.sample.every steps, likewise.

    Raises:
        Interrupted: should_stop became true; a state with a usable adapter is on disk, see load_result.
        Diverged: loss or gradient kept going non-finite; the best is on disk.
        OutOfMemory: not even one sample with gradient checkpointing fits.
        NoSpace: a state could not be written.
        TrainingDataError: there is no picture to train on, or its sizes are not the DiT's.
    """
    with torch.inference_mode(False), torch.enable_grad():
        run = _Fit(
            config,
            data,
            dit,
            backbone,
            tokenizer,
            folder or config.folder,
            on_event,
            should_stop,
            validate,
            sample,
        )
        try:
            return run.go()
        except BaseException:
            run.adapter.remove()
            raise
        finally:
            run.release()


def load_result(folder: Path) -> FitResult | None:
    """What an unfinished or finished run of a folder has reached, from its newest state; None = nothing yet."""
    state = newest_state(Path(folder) / "state")
    if state is None:
        return None
    best = _tensors_below(state.internals, "best/")
    ema = _tensors_below(state.internals, "ema/")
    best_validation = state.numbers["best"]
    return FitResult(
        best=best or ema or state.adapter,
        last=state.adapter,
        ema=ema or None,
        best_step=best_validation["step"] if best_validation else state.step,
        best_validation=_validation(best_validation),
        steps=state.step,
        losses=state.numbers["losses"],
        stopped_because=state.numbers["stopped_because"] or "interrupted",
    )


@dataclass
class _Progress:
    """Numbers of a run that a state keeps."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    rate_share: float = 1.0
    roll_backs: int = 0
    bad_steps: int = 0
    stale: int = 0
    best: dict[str, Any] | None = None
    stopped_because: str | None = None


class _Fit:
    def __init__(
        self,
        config: LoraConfig,
        data: TrainingData,
        dit: NextDiT,
        backbone: Backbone | None,
        tokenizer: TextTokenizer | None,
        folder: Path,
        on_event: EventSink,
        should_stop: StopCheck,
        validate: Validate | None,
        sample: DrawSamples | None,
    ) -> None:
        _check_data(data, dit)
        self.config, self.data, self.dit = config, data, dit
        self.processes = _Processes()
        self.device = self.processes.device or pick_device(config.model.device)
        self.states = Path(folder) / "state"
        self.on_event = on_event if self.processes.is_main else lambda event: None
        self.should_stop, self.validate, self.sample = should_stop, validate, sample
        self.batch = config.batch
        self.total = config.steps(len(data.train))
        set_base_dtype(dit, config.model.base_dtype, self.device)
        if config.needs_backbone and backbone is not None:
            # What reads pictures and writes words has no part in conditioning.
            backbone.text.to(self.device)
            if backbone.latent_queries.device != self.device:
                backbone.latent_queries.data = backbone.latent_queries.data.to(self.device)
        self.adapter = attach(
            dit, config.adapter, seed=config.run.seed, backbone=backbone, tokenizer=tokenizer
        )
        if config.adapter.start_from is not None:
            self.adapter.load_state_dict(read_lora(config.adapter.start_from).canonical)
        self.parameters = self.adapter.parameters()
        self.optimizer = build_optimizer(self.adapter.named_parameters(), config.train)
        decay = config.ema if uses_schedule(config.train.optimizer) else 0.0
        self.average = MovingAverage(self.adapter.named_parameters(), decay) if decay else None
        self.progress = _Progress()
        self.best: dict[str, Tensor] = {}
        self.step = 0
        self.kept_prompts = preservation_prompts(config)
        self.known: dict[str, tuple[Tensor, Tensor]] = {}
        self.saved_at = time.monotonic()
        train = config.train
        plan = plan_step(
            dit,
            sum(parameter.numel() for parameter in self.parameters),
            math.ceil(self.batch / self.processes.count) * (2 if config.uses_preservation else 1),
            features=data.train[0].features.shape[1],
            ema=self.average is not None,
            micro_batch=None if train.micro_batch == "auto" else train.micro_batch,
            grad_checkpoint=None if train.grad_checkpoint == "auto" else train.grad_checkpoint,
            device=self.device,
        )
        self.micro_batch = plan.micro_batch
        self.is_checkpointed = False
        logger.info("Memory plan: %s", plan.text())
        if plan.grad_checkpoint:
            self._checkpoint_blocks()
        is_compiled = config.model.compile and can_compile(self.device)
        self.network = torch.compile(dit) if is_compiled else dit
        self.pulse = Pulse(dit, self.on_event, is_counted=not is_compiled)

    def go(self) -> FitResult:
        self._resume()
        if self.step == 0:
            self._save()  # what a roll-back of the first steps goes back to
        if self.config.uses_preservation:
            with self.pulse.during("prompts", self.step, self.total):
                self.known = self._draw_prompts()
        started, first = time.monotonic(), self.step
        while self.step < self.total and self.progress.stopped_because is None:
            with self.pulse.during("step", self.step + 1, self.total):
                is_stopped = self._train_step(started, first)
            is_last = self.step == self.total
            with self.pulse.during("measuring", self.step, self.total):
                self._look(is_last)
            if is_stopped:
                self._save()
                raise Interrupted(
                    f"Stopped after step {self.step} of {self.total}, as asked; what it has learned is saved.\n"
                    "Run the same command again to go on."
                )
            is_due = time.monotonic() - self.saved_at >= self.config.save.every_seconds
            # Only a good state is one to come back to; the last step's is saved below.
            if is_due and not is_last and not self.progress.bad_steps:
                self._save()
        self.progress.stopped_because = self.progress.stopped_because or "steps"
        self._audit()
        self._save()
        self.processes.wait()
        return self._result()

    def release(self) -> None:
        """Undo what only training needs."""
        self.pulse.close()
        if self.is_checkpointed:
            for block in self.dit.layers:
                del block.forward  # the class's own shows again

    # One step

    def _train_step(self, started: float, first: int) -> bool:
        """One optimiser step; whether the user wants to stop after it."""
        config = self.config
        schedule = rate_factor(config.train.schedule, self.step, self.total)
        factor = (schedule if uses_schedule(config.train.optimizer) else 1.0) * self.progress.rate_share
        set_rate(self.optimizer, factor)
        self.optimizer.zero_grad(set_to_none=True)
        losses, is_stopped = self._gradients()
        grads = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        norm = torch.stack(torch._foreach_norm(grads)).norm().item() if grads else 0.0
        is_good = math.isfinite(losses["loss"]) and math.isfinite(norm)
        if is_good:
            if config.train.clip and norm > config.train.clip:
                torch._foreach_mul_(grads, config.train.clip / norm)
            self._watch_norm(norm)
            self.optimizer.step()
            self.progress.bad_steps = 0
        self.step += 1
        if is_good and self.average is not None:
            self.average.update(self.step)
        self.progress.losses.append(losses["loss"])
        seconds = (time.monotonic() - started) / max(1, self.step - first)
        self.on_event(
            {
                "event": "step",
                "step": self.step,
                "total": self.total,
                "rate": self.optimizer.param_groups[0]["lr"],
                "grad_norm": norm,
                "seconds_left": round(seconds * (self.total - self.step), 1),
                **losses,
            }
        )
        if not is_good:
            self._after_bad_step()
        return is_stopped

    def _gradients(self) -> tuple[dict[str, float], bool]:
        """Gradients of the whole batch, in as many network calls as memory asks for; mean losses; wish to stop."""
        config, seed = self.config, self.config.run.seed
        data = self.data
        rows = draw_rows(data.train, data.regularisation, seed, self.step, self.batch, config.train.cond_drop)
        sigmas = draw_sigmas(config.train.timesteps, seed, self.step, self.batch)
        lessons = []
        if config.uses_preservation:
            lessons = draw_lessons(rows, self.kept_prompts, self.known, seed, self.step, self.batch)
        mine: list[Row | Lesson] = [
            item for item in (*rows, *lessons) if item.index % self.processes.count == self.processes.index
        ]
        while True:
            is_out_of_memory = False
            sums = torch.zeros(2, device=self.device)
            count = math.ceil(len(mine) / self.micro_batch)
            try:
                for number in range(count):
                    items = mine[number * self.micro_batch :][: self.micro_batch]
                    # There and back, and once more for what a lesson teaches.
                    passes = 2 + any(isinstance(item, Lesson) for item in items)
                    self.pulse.begin(number + 1, count, passes)
                    sums += self._backward(items, sigmas)
            except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError
                if not is_memory_error(error):
                    raise
                is_out_of_memory, message = True, str(error)
            flags = self.processes.sum(torch.tensor([float(is_out_of_memory), float(self.should_stop())]))
            if not flags[0]:
                break
            self.optimizer.zero_grad(set_to_none=True)
            self._shrink(message if is_out_of_memory else "on another process")
        self.processes.sum_gradients(self.parameters)
        sums = self.processes.sum(sums)
        losses = dict(zip(("loss", "preservation"), sums.tolist(), strict=True))
        if not lessons:
            del losses["preservation"]
        return losses, bool(flags[1])

    def _backward(self, items: Sequence[Row | Lesson], sigmas: Tensor) -> Tensor:
        """Gradients of one network call; its share of the mean training and preservation loss, (2,)."""
        rows = [item for item in items if isinstance(item, Row)]
        lessons = [item for item in items if isinstance(item, Lesson)]
        places = [item.index for item in (*rows, *lessons)]
        features = self._stack([item.features for item in (*rows, *lessons)])
        cached = self._stack([item.conditioning for item in (*rows, *lessons)])
        unique = sorted(set(places))  # a lesson has the noise of the row beside it
        noise = draw_noise(self.config.run.seed, self.step, unique, features.shape[1:])
        noise = noise[[unique.index(place) for place in places]].to(self.device)
        given = (features, noise, sigmas[places])
        with torch.no_grad(), self.adapter.enabled(False):
            taught = slice(len(rows), None)
            teacher = self._velocity(*(tensor[taught] for tensor in (*given, cached))) if lessons else None
        conditioning = self._conditioning([item.prompt for item in (*rows, *lessons)], cached)
        predicted = self._velocity(*given, conditioning)
        losses = [predicted.new_zeros((), dtype=torch.float32)] * 2
        if rows:
            target = target_velocity(features, noise)[: len(rows)]
            each = velocity_loss(predicted[: len(rows)], target, self.config.train.loss, self._weights(rows))
            losses[0] = (each * each.new_tensor([row.sample.weight for row in rows])).sum() / self.batch
        if lessons:
            losses[1] = preservation_loss(predicted[taught], teacher).sum() / self.batch
        total = losses[0] + self.config.train.prior.weight * losses[1]
        if total.requires_grad:  # all-zero conditioning teaches nothing where only the backbone learns
            total.backward()
        return torch.stack(losses).detach()

    def _weights(self, rows: Sequence[Row]) -> Tensor | None:
        """How much each feature counts, (B, N); None where no picture has a mask."""
        if all(row.sample.weights is None for row in rows):
            return None
        whole = torch.ones(rows[0].features.shape[0])
        return self._stack(
            [whole if row.sample.weights is None else row.sample.weights[row.view] for row in rows]
        )

    def _velocity(self, features: Tensor, noise: Tensor, sigmas: Tensor, conditioning: Tensor) -> Tensor:
        """Velocity (B, N, C) at the mix of features and noise."""
        side = feature_side(features)
        grid = to_grid(mix(features, noise, sigmas), (side, side))
        timesteps = (sigmas * TRAIN_TIMESTEPS).round().to(self.device)
        with self.adapter.autocast():
            return to_tokens(self.network(grid, timesteps, conditioning))

    def _conditioning(self, prompts: Sequence[str | None], cached: Tensor) -> Tensor:
        """Conditioning (B, Q, D) of prompts, zeros for None: the cached one unless the backbone learns."""
        shown = [prompt for prompt in prompts if prompt is not None]
        if not self.adapter.changes_conditioning or not shown:
            return cached
        learned = iter(self.adapter.encode(shown).float())
        zeros = torch.zeros_like(cached[0])
        return torch.stack([zeros if prompt is None else next(learned) for prompt in prompts])

    def _stack(self, tensors: Sequence[Tensor]) -> Tensor:
        stacked = torch.stack(list(tensors))
        return (stacked.clone() if stacked.is_inference() else stacked).to(self.device, torch.float32)

    # What goes wrong

    def _after_bad_step(self) -> None:
        progress = self.progress
        progress.bad_steps += 1
        self._warn(f"Step {self.step}: the loss or its gradient is not finite; the step is skipped.")
        if progress.bad_steps < BAD_STEPS:
            return
        if progress.roll_backs == ROLL_BACKS:
            self._save()
            raise Diverged(
                f"Training went wrong for the third time, at step {self.step}: the loss is not finite.\n"
                "The best weights so far are saved. Lower train.optimizer.lr, or look for broken pictures."
            )
        share, roll_backs = progress.rate_share / 2, progress.roll_backs + 1
        state = newest_state(self.states)
        assert state is not None, "a run saves a state before its first step"
        if self.processes.is_main:
            amend_state(self.states, state.step, {"rate_share": share, "roll_backs": roll_backs})
        self.processes.wait()
        best = self.best, progress.best
        self._restore(state)
        self.progress.rate_share, self.progress.roll_backs, self.progress.bad_steps = share, roll_backs, 0
        self.best, self.progress.best = best  # may have been found after that state was saved
        self._warn(f"Back to step {self.step} with {share:g} of the learning rate.")

    def _watch_norm(self, norm: float) -> None:
        norms = self.progress.norms
        if len(norms) >= 10 and norm > SPIKE * statistics.median(norms):
            self._warn(
                f"Step {self.step + 1}: the gradient's norm is {norm:.3g}, {norm / statistics.median(norms):.0f} "
                "times the usual."
            )
        norms.append(norm)
        del norms[:-RECENT_NORMS]

    def _shrink(self, message: str) -> None:
        """The next smaller way to compute the same step."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        if self.micro_batch > 1:
            self.micro_batch = math.ceil(self.micro_batch / 2)
            self._warn(f"Out of memory: going on with micro batches of {self.micro_batch}.")
        elif not self.is_checkpointed:
            self._checkpoint_blocks()
            self._warn("Out of memory: going on with gradient checkpointing.")
        else:
            free = ""
            if self.device.type == "cuda":
                left, whole = torch.cuda.mem_get_info(self.device)
                free = f" {format_bytes(left)} of {format_bytes(whole)} are free."
            raise OutOfMemory(
                f"There is too little memory even for one sample with gradient checkpointing.{free}\n"
                f"Close other programs, or choose a smaller adapter.rank. ({message.splitlines()[0]})"
            )

    def _checkpoint_blocks(self) -> None:
        for block in self.dit.layers:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
        self.is_checkpointed = True

    def _warn(self, message: str) -> None:
        logger.warning(message)
        self.on_event({"event": "warning", "message": message})

    def _audit(self) -> None:
        problems = self.adapter.problems() if any(map(math.isfinite, self.progress.losses)) else []
        if problems:
            raise Diverged(
                f"The trained weights are not sound: {problems[0]} ({len(problems)} of {len(self.parameters)}).\n"
                "Train again with a lower train.optimizer.lr; if it happens again, report it with config.yaml."
            )

    # Looking

    def _look(self, is_last: bool) -> None:
        """Validation and sample pictures where they are due."""
        config = self.config
        is_due = is_last or (config.validate.every and self.step % config.validate.every == 0)
        is_drawn = is_last or (config.sample.every and self.step % config.sample.every == 0)
        if self.processes.is_main and ((is_due and self.validate) or (is_drawn and self.sample)):
            with self._shown_weights():
                if is_due and self.validate:
                    self._judge(self.validate(self.adapter, self.step))
                if is_drawn and self.sample:
                    self.sample(self.adapter, self.step)
        if self.processes.count > 1 and is_due:
            ends = self.processes.sum(torch.tensor([float(self.progress.stopped_because == "patience")]))
            if ends[0]:
                self.progress.stopped_because = "patience"

    def _judge(self, validation: Validation) -> None:
        progress = self.progress
        self.on_event({"event": "validation", **asdict(validation)})
        limit = self.config.validate.drift_max
        if is_better(validation, _validation(progress.best), limit):
            progress.best, progress.stale = asdict(validation), 0
            self.best = self.adapter.state_dict()
        else:
            progress.stale += 1
        if self.config.validate.patience and progress.stale >= self.config.validate.patience:
            progress.stopped_because = "patience"

    @contextmanager
    def _shown_weights(self) -> Iterator[None]:
        """The weights that will be handed out: averaged where there is an average."""
        with averaged(self.optimizer):
            if self.average is None:
                yield
                return
            kept = self.adapter.weights()
            self.adapter.set_weights(self.average.weights)
            try:
                yield
            finally:
                self.adapter.set_weights(kept)

    # Keeping

    def _save(self) -> None:
        self.saved_at = time.monotonic()
        if not self.processes.is_main or not torch.stack([p.isfinite().all() for p in self.parameters]).all():
            return
        with averaged(self.optimizer):
            adapter = self.adapter.state_dict()
        internals = _unlike("exact/", self.adapter.weights(), adapter)
        if self.average is not None:
            with self._shown_weights():
                averages = self.adapter.state_dict()
            internals |= {f"ema/{name}": tensor for name, tensor in averages.items()}
            internals |= _unlike("exact ema/", self.average.weights, averages)
        internals |= {f"best/{name}": tensor for name, tensor in self.best.items()}
        state = State(self.step, adapter, internals, self.optimizer.state_dict(), asdict(self.progress))
        path = save_state(self.states, state, keep=self.config.save.keep)
        self.on_event({"event": "saved", "step": self.step, "path": str(path)})

    def _resume(self) -> None:
        state = newest_state(self.states)
        if state is not None:
            self._restore(state)
            progress, patience = self.progress, self.config.validate.patience
            if self.step < self.total and not (patience and progress.stale >= patience):
                progress.stopped_because = None  # the settings ask for more than they did
            logger.info("Going on from step %d", self.step)

    def _restore(self, state: State) -> None:
        self.step = state.step
        self.progress = _Progress(**state.numbers)
        weights = state.adapter | _tensors_below(state.internals, "exact/")
        self.adapter.set_weights({name: weights[name] for name in self.adapter.named_parameters()})
        self.optimizer.load_state_dict(state.optimizer)
        self.best = _tensors_below(state.internals, "best/")
        if self.average is not None:
            averages = _tensors_below(state.internals, "ema/")
            averages |= _tensors_below(state.internals, "exact ema/")
            for name, tensor in self.average.weights.items():
                tensor.copy_(averages[name])

    def _result(self) -> FitResult:
        with averaged(self.optimizer):
            last = self.adapter.state_dict()
        ema = None
        if self.average is not None:
            with self._shown_weights():
                ema = self.adapter.state_dict()
        best = self.best or ema or last
        if hasattr(self.optimizer, "eval"):
            self.optimizer.eval()
        self.adapter.load_state_dict(best)
        progress = self.progress
        return FitResult(
            best=best,
            last=last,
            ema=ema,
            best_step=progress.best["step"] if progress.best else self.step,
            best_validation=_validation(progress.best),
            steps=self.step,
            losses=progress.losses,
            stopped_because=progress.stopped_because,
            adapter=self.adapter,
        )

    def _draw_prompts(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Conditioning of every prompt that must stay, and the features that the base model draws for it."""
        samples = self.data.train
        missing = [prompt for prompt in self.kept_prompts if prompt not in self.data.prompts]
        assert not missing, f"prompts to keep without conditioning: {missing}"
        conditioning = {prompt: self.data.prompts[prompt] for prompt in self.kept_prompts}
        for sample in samples:
            conditioning |= dict(zip(sample.class_prompts, _rows(sample.class_conditioning), strict=True))
        shape = samples[0].features.shape[1:]
        side = feature_side(samples[0].features)
        # As many levels and no guidance: the features of a prompt as training met them, at a quarter of the cost.
        settings = FeatureSettings(steps=DRAWING_STEPS, guidance_scale=1, sampler="ab2")
        known: dict[str, tuple[Tensor, Tensor]] = {}
        prompts = list(conditioning)
        count = math.ceil(len(prompts) / self.micro_batch)
        for number in range(count):
            start = number * self.micro_batch
            part = prompts[start : start + self.micro_batch]
            self.pulse.begin(number + 1, count, DRAWING_STEPS)
            given = self._stack([conditioning[prompt] for prompt in part])
            noise = [
                draw_noise(self.config.run.seed, 0, [index], (shape[1], side, side), stream="drawing")
                for index in range(start, start + len(part))
            ]
            with self.adapter.enabled(False), self.adapter.autocast():
                features = sample_features(
                    self.dit, given, noise=self._stack(noise).flatten(0, 1), settings=settings
                )
            known |= dict(zip(part, zip(given, features.float(), strict=True), strict=True))
        return known


def _rows(tensor: Tensor | None) -> Sequence[Tensor]:
    return [] if tensor is None else list(tensor)


def is_better(found: Validation, best: Validation | None, drift_max: float) -> bool:
    """Whether a later validation beats the best so far: more gain among those that drift little; ties to the earlier.

    A step that drifts too much beats only one that drifts more.
    """
    if best is None:
        return True
    keeps, kept = found.drift <= drift_max, best.drift <= drift_max
    if keeps != kept:
        return keeps
    return found.gain > best.gain if keeps else found.drift < best.drift


def is_memory_error(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, on a GPU or on the CPU."""
    is_known = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    return is_known or any(words in str(error) for words in ("out of memory", "can't allocate memory"))


class _Processes:
    """The processes of a run. Alone it is no more than constants: accelerate keeps process-wide state, which a
    program that trains in between other work must not get."""

    def __init__(self) -> None:
        self.accelerator: Any = None
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            from accelerate import Accelerator

            self.accelerator = Accelerator()
        self.index = self.accelerator.process_index if self.accelerator else 0
        self.count = self.accelerator.num_processes if self.accelerator else 1
        self.is_main = self.index == 0
        self.device = self.accelerator.device if self.accelerator else None

    def sum(self, values: Tensor) -> Tensor:
        """Sum of each process's values, the same everywhere."""
        if self.accelerator is None:
            return values
        return self.accelerator.reduce(values.to(self.accelerator.device), "sum").cpu()

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Add up the gradients of all processes: every loss is already divided by the whole batch."""
        if self.accelerator is None:
            return
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        flat = self.accelerator.reduce(torch.cat([grad.flatten() for grad in grads]), "sum")
        for parameter, grad in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            parameter.grad = grad.view_as(parameter).clone()

    def wait(self) -> None:
        """Until every process is here."""
        if self.accelerator is not None:
            self.accelerator.wait_for_everyone()


def _tensors_below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _unlike(prefix: str, weights: dict[str, Tensor], in_file: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights that a file's tensors do not give back exactly: DoRA's magnitudes, tuned queries, ..."""
    return {
        prefix + name: tensor
        for name, tensor in weights.items()
        if name not in in_file or not torch.equal(tensor.cpu(), in_file[name])
    }


def _validation(tree: dict[str, Any] | None) -> Validation | None:
    if tree is None:
        return None
    # JSON has text keys only.
    per_sigma = {float(sigma): tuple(pair) for sigma, pair in tree["per_sigma"].items()}
    return Validation(**{**tree, "per_sigma": per_sigma})


def _check_data(data: TrainingData, dit: NextDiT) -> None:
    if not data.train:
        raise TrainingDataError(
            "There is no picture to train on.\nPut pictures with captions into data.path, or lower data.holdout."
        )
    sizes = dit.config
    for item in (*data.train, *data.held_out, *data.regularisation):
        found = (item.features.shape[-1], item.conditioning.shape[-1])
        if found != (sizes.in_channels, sizes.conditioning_dim):
            raise TrainingDataError(
                f'"{item.name}" was encoded by another model: its features and conditioning are {found[0]} and '
                f"{found[1]} wide, this DiT needs {sizes.in_channels} and {sizes.conditioning_dim}.\n"
                "Delete the run's cache folder, so that it is made anew."
            )
