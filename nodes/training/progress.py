"""A training on its node: bar and time left, live chart, preview pictures; cancel stops it and keeps what was learned."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import comfy.model_management as memory
import comfy.utils
from PIL import Image

from ...blip3o_core.images import load_image
from ...lora_training.proof.plot import History
from ...lora_training.records import working_text
from ..native import host

EVENT = "blip3o.training"
POLL_SECONDS = 0.2
# How long a training may take to end after a cancel, and after its time is over, when its result is still wanted.
CANCEL_SECONDS = 20
TIME_UP_SECONDS = 120
SEND_SECONDS = 0.4
CHART_POINTS = 200
# Weight of the newest loss in the drawn curve; single steps jump too much to be looked at.
SMOOTHING = 0.1
PHASE_WORDS = {
    "check": "Looking at the pictures and captions",
    "features": "Encoding the pictures",
    "conditioning": "Reading the captions",
    "fit": "Training",
    "prove": "Measuring what was learned",
    "export": "Writing the LoRA",
}
SCORES = ("gain", "train_gain", "concept", "drift")


class Training(Protocol):
    """A training that runs elsewhere."""

    def events(self) -> Iterator[dict[str, Any]]: ...

    def stop(self) -> None: ...

    def kill(self) -> None: ...


@dataclass
class Chart:
    """What the chart on the node shows.

    Attributes:
        loss: (step, smoothed loss).
        scores: one entry per validation, with its step.
    """

    loss: list[tuple[int, float]] = field(default_factory=list)
    scores: list[dict[str, float]] = field(default_factory=list)
    total: int = 0

    @classmethod
    def of_history(cls, history: History) -> Chart:
        """The chart of a whole run."""
        chart = cls()
        for event in sorted(
            [*history.steps.values(), *history.validations.values()], key=lambda event: event["step"]
        ):
            chart.add(event)
        return chart

    def add(self, event: dict[str, Any]) -> None:
        """Take in a step or a validation; a run that goes on from an earlier state repeats some."""
        step = event.get("step", 0)
        if event["event"] == "validation":
            self.scores = [score for score in self.scores if score["step"] < step]
            self.scores.append({"step": step, **{name: event[name] or 0.0 for name in SCORES}})
        elif event["event"] == "step" and event["loss"] is not None:
            self.total = event["total"]
            while self.loss and self.loss[-1][0] >= step:
                self.loss.pop()
            last = self.loss[-1][1] if self.loss else event["loss"]
            self.loss.append((step, last + SMOOTHING * (event["loss"] - last)))

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready, thinned to what a few hundred pixels can show."""
        every = -(-len(self.loss) // CHART_POINTS) or 1
        points = self.loss[::-1][::every][::-1]
        return {
            "total": self.total,
            "loss": [[step, round(loss, 5)] for step, loss in points],
            "scores": [{name: round(value, 5) for name, value in score.items()} for score in self.scores],
        }


class TrainingWatcher:
    """Shows a training's events on the node that runs it."""

    def __init__(self, node_id: str | None) -> None:
        self.node_id = node_id
        self.chart = Chart()
        self.bar: comfy.utils.ProgressBar | None = None
        self.bar_total = 0
        self.text = ""
        self.sent = 0.0

    def __call__(self, event: dict[str, Any]) -> None:
        """Show one event; raises ComfyUI's interrupt when the user pressed cancel."""
        kind = event["event"]
        self.chart.add(event)
        if kind == "phase":
            self._show_phase(event["phase"], event.get("done", 0), event.get("total", 0))
        elif kind == "step":
            self._advance(event["step"], event["total"])
            loss = "not a number" if event["loss"] is None else f"{event['loss']:.3f}"
            left = format_seconds(event["seconds_left"])
            self._say(f"Training: step {event['step']} of {event['total']}, {left} left, loss {loss}")
        elif kind == "working":
            self._advance(max(0, event["step"] - 1), event["total"])
            self._say(f"Training: {working_text(event)}")
        elif kind == "sample":
            self._advance(
                self.chart.loss[-1][0] if self.chart.loss else 0, self.bar_total or 1, Path(event["path"])
            )
        elif kind == "warning":
            self._say(event["message"], at_once=True)
        host.raise_if_interrupted()

    def _show_phase(self, phase: str, done: int, total: int) -> None:
        if total:
            self._advance(done, total)
        count = f" {done} of {total}" if total > 1 else ""
        self._say(f"{PHASE_WORDS.get(phase, phase)}{count}")

    def _advance(self, done: int, total: int, picture: Path | None = None) -> None:
        if self.bar is None or total != self.bar_total:
            self.bar, self.bar_total = comfy.utils.ProgressBar(total), total
        preview = None if picture is None else ("JPEG", _preview(picture), host.PREVIEW_SIDE)
        self.bar.update_absolute(min(done, total), total, preview)

    def _say(self, text: str, at_once: bool = False) -> None:
        self.text = text
        if at_once or time.monotonic() - self.sent >= SEND_SECONDS:
            self.send()

    def send(self) -> None:
        """Bring text and chart to the page."""
        from server import PromptServer

        self.sent = time.monotonic()
        host.show_text(self.text, self.node_id)
        if self.node_id is not None and PromptServer.instance is not None:
            PromptServer.instance.send_sync(EVENT, {"node": self.node_id, "chart": self.chart.as_dict()})

    def say(self, text: str) -> None:
        """Write text on the node now."""
        self._say(text, at_once=True)


@dataclass(frozen=True)
class Outcome:
    """How a watched training ended.

    Attributes:
        last: event name -> its last event.
        is_interrupted: the user pressed cancel.
        is_out_of_time: the time limit was reached.
    """

    last: dict[str, dict[str, Any]]
    is_interrupted: bool
    is_out_of_time: bool


def watch(training: Training, watcher: TrainingWatcher, seconds: float | None = None) -> Outcome:
    """Follow a training to its end. Cancel, or the end of `seconds`, asks it to stop and waits until all is saved.

    A training that does not answer is ended for good: by a second cancel, or when its patience is over. Its saved states
    are whole at any moment.
    """
    last: dict[str, dict[str, Any]] = {}
    is_interrupted = is_out_of_time = False
    started = time.monotonic()
    deadline = 0.0
    for event in _poll(training):
        if event is not None:
            last[event["event"]] = event
        if is_interrupted or is_out_of_time:
            try:
                host.raise_if_interrupted()
                is_over = time.monotonic() > deadline
            except memory.InterruptProcessingException:
                is_interrupted = is_over = True
            if is_over:
                watcher.say("The training does not answer and is ended; what it had saved stays.")
                training.kill()
                break
            continue
        try:
            if event is not None:
                watcher(event)
            host.raise_if_interrupted()
        except memory.InterruptProcessingException:
            is_interrupted = True
        if seconds is not None and time.monotonic() - started > seconds:
            is_out_of_time = not is_interrupted
        if is_interrupted or is_out_of_time:
            watcher.say("Stopping: what was learned so far is being saved ...")
            training.stop()
            deadline = time.monotonic() + (CANCEL_SECONDS if is_interrupted else TIME_UP_SECONDS)
    return Outcome(last, is_interrupted, is_out_of_time)


def _poll(training: Training) -> Iterator[dict[str, Any] | None]:
    """The events as they come, and None whenever none came for a moment; ends with the training."""
    arrived: queue.Queue[dict[str, Any] | BaseException | None] = queue.Queue()

    def read() -> None:
        try:
            for event in training.events():
                arrived.put(event)
            arrived.put(None)
        except BaseException as error:  # handed to the node's thread, which raises it
            arrived.put(error)

    threading.Thread(target=read, daemon=True).start()
    while True:
        try:
            event = arrived.get(timeout=POLL_SECONDS)
        except queue.Empty:
            yield None
            continue
        if event is None:
            return
        if isinstance(event, BaseException):
            raise event
        yield event


def _preview(path: Path) -> Image.Image:
    picture = load_image(path)
    scale = max(1, host.PREVIEW_SIDE // max(picture.size))
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.BICUBIC)


def format_seconds(seconds: float) -> str:
    """A duration for people: "45 s", "3 min", "1 h 20 min"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"
