"""What travels between the phases of a run: cached samples, events, the results of a fit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..blip3o_core.errors import Blip3oError

# One line of events.jsonl: {"event": one of EVENTS, ...}. What each carries beside it:
EVENTS = {
    "phase": 'phase (name in PHASES, or "captions"), done, total',
    "caption": "name, caption",
    "step": "step, total, loss, rate, grad_norm, seconds_left; preservation when on",
    "working": "what (prompts = draws those that must stay, step, measuring), step (that is computed, from 1; 0 = before "
    "the first), total, micro_batch (from 1), micro_batches, share (of this work, 0 to 1; null = not known), is_first "
    "(reads the weights). Only where work takes longer than seconds; not kept in events.jsonl",
    "validation": "step and the numbers of a Validation",
    "sample": "step, prompt, path",
    "saved": "step, path",
    "warning": "message",
    "error": "message, code (exit code)",
    "done": "lora (path), scorecard, seconds",
}
# Events of the moment, which events.jsonl does not keep.
PASSING = frozenset({"working"})
PHASES = ("check", "features", "conditioning", "fit", "prove", "export")

EventSink = Callable[[dict[str, Any]], None]
StopCheck = Callable[[], bool]


def working_text(event: dict[str, Any]) -> str:
    """A "working" event in words, e.g. "step 1: reading the weights, micro batch 1 of 4, 6%"."""
    what, count = event["what"], event["micro_batches"]
    words = {"prompts": "drawing the prompts that must stay", "measuring": "measuring what was learned"}
    text = words.get(what) or f"step {event['step']}"
    details = ["reading the weights"] if event["is_first"] else []
    if count > 1:
        details.append(f"micro batch {event['micro_batch']} of {count}")
    if event["share"] is not None:
        details.append(f"{event['share']:.0%}")
    return f"{text}: {', '.join(details)}" if details else text


class Interrupted(Blip3oError):
    """The user stopped the run; everything reached so far is saved."""


class Diverged(Blip3oError):
    """Training went wrong for good; the best state is kept."""


class OutOfMemory(Blip3oError):
    """The device's memory is too small even for the smallest plan."""


@dataclass(frozen=True)
class Sample:
    """One picture, ready to train on.

    Attributes:
        features: (V, N, C), one row per view.
        conditioning: (K, Q, D), one row per caption.
        class_conditioning: the same captions with the class word for the trigger, or None.
        prompts, class_prompts: the texts behind them.
        weights: how much each feature counts, (V, N), or None for all equally; a view may count nothing at all.
        weight: factor on the loss of the whole picture.
    """

    name: str
    features: Tensor
    conditioning: Tensor
    class_conditioning: Tensor | None
    prompts: tuple[str, ...]
    class_prompts: tuple[str, ...]
    weights: Tensor | None = None
    repeats: int = 1
    weight: float = 1.0


@dataclass(frozen=True)
class TrainingData:
    """Everything a fit reads.

    Attributes:
        prompts: prompt -> conditioning (Q, D), of every prompt that is not a caption: samples, drift, preservation.
        fingerprint: names and hashes of what the caches were made with.
    """

    train: tuple[Sample, ...]
    held_out: tuple[Sample, ...] = ()
    regularisation: tuple[Sample, ...] = ()
    prompts: dict[str, Tensor] = field(default_factory=dict)
    fingerprint: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Validation:
    """How a step compares with the model without the adapter.

    Attributes:
        loss, base_loss: flow-matching loss on held-out pictures (on the training ones where none are held out), fixed
            noises and levels.
        gain: (base_loss - loss) / base_loss; above 0 = learned.
        train_gain: the same on training pictures; far above `gain` = learned by heart.
        per_sigma: noise level -> (base loss, loss).
        concept: cosine of sampled features to the pictures' mean, minus the base model's.
        drift: 1 - cosine between base and adapter on the drift prompts.
        zero_drift: the same on all-zero conditioning.
        leak: like concept, for the class word without the trigger.
        copy: largest cosine of a sampled picture to one training picture; near 1 = memorised.
    """

    step: int
    loss: float
    base_loss: float
    gain: float
    train_gain: float
    per_sigma: dict[float, tuple[float, float]]
    concept: float
    drift: float
    zero_drift: float
    leak: float
    copy: float
