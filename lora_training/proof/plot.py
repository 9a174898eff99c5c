"""What a run wrote down, as numbers and as a picture."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ...blip3o_core.checkpoints.save import write_text
from ...blip3o_core.errors import MissingFilesError
from .chart import COLOURS, DASHES, Curve, Panel, draw_panels

EVENTS_NAME, METRICS_NAME, PLOT_NAME = "events.jsonl", "metrics.csv", "loss.png"
SMOOTHING = 0.9
SCORES = ("gain", "concept", "drift", "leak")


@dataclass
class History:
    """Events of a run; of a step that was repeated after a resume, the last.

    Attributes:
        steps: step -> its "step" event.
        validations: step -> its "validation" event.
        samples: (step, prompt, path) of sample pictures.
        warnings: messages.
    """

    name: str
    steps: dict[int, dict[str, Any]] = field(default_factory=dict)
    validations: dict[int, dict[str, Any]] = field(default_factory=dict)
    samples: list[tuple[int, str, str]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def read_history(folder: str | Path) -> History:
    """What the events of a run's folder tell; a line cut short by a kill is passed over.

    Raises:
        MissingFilesError: there are no events.
    """
    path = Path(folder) / EVENTS_NAME
    if not path.is_file():
        raise MissingFilesError(f'"{folder}" is no run: it has no {EVENTS_NAME}.\nName the folder of a run.')
    history = History(Path(folder).name)
    for line in path.read_text("utf-8", errors="replace").splitlines():
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if event.get("event") == "step":
            _forget_after(history.steps, event["step"])
            history.steps[event["step"]] = event
        elif event.get("event") == "validation":
            _forget_after(history.validations, event["step"])
            history.validations[event["step"]] = event
        elif event.get("event") == "sample":
            history.samples.append((event["step"], event["prompt"], event["path"]))
        elif event.get("event") == "warning":
            history.warnings.append(event["message"])
    return history


def write_metrics(folder: Path) -> None:
    """metrics.csv of a run: one line a step, the validation's numbers where there was one."""
    history = read_history(folder)
    columns = ("step", "loss", "preservation", "rate", "grad_norm")
    numbers = (
        "held_out_loss",
        "base_loss",
        "gain",
        "train_gain",
        "concept",
        "drift",
        "zero_drift",
        "leak",
        "copy",
    )
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*columns, *numbers])
    for step, event in sorted(history.steps.items()):
        found = dict(history.validations.get(step, {}))
        found["held_out_loss"] = found.get("loss", "")
        writer.writerow([event.get(name, "") for name in columns] + [found.get(name, "") for name in numbers])
    write_text(Path(folder) / METRICS_NAME, text.getvalue())


def plot_runs(folders: Sequence[str | Path]) -> Image.Image:
    """Loss and scores of runs over their steps, one colour a run.

    Raises:
        MissingFilesError: a folder is no run, or a run has not done a step yet.
    """
    histories = [read_history(folder) for folder in folders]
    empty = [history.name for history in histories if not history.steps]
    if empty:
        raise MissingFilesError(
            f'There is nothing to draw yet: the run "{empty[0]}" has not done a step.\nTrain it first.'
        )
    loss_curves, score_curves = [], []
    for number, history in enumerate(histories):
        colour = COLOURS[number % len(COLOURS)]
        steps = sorted(history.steps)
        losses = [_number(history.steps[step].get("loss")) for step in steps]
        loss_curves.append(Curve(steps, losses, _pale(colour), width=1))
        loss_curves.append(Curve(steps, _smooth(losses), colour, history.name))
        looked = sorted(history.validations)
        held_out = [_number(history.validations[step]["loss"]) for step in looked]
        label = "validation" if number == 0 and looked else ""
        loss_curves.append(Curve(looked, held_out, colour, label, "--", has_dots=True))
        for name, style in zip(SCORES, DASHES, strict=True):
            values = [_number(history.validations[step][name]) for step in looked]
            label = name if number == 0 and looked else ""
            score_curves.append(Curve(looked, values, colour, label, style, has_dots=True))
    return draw_panels([Panel("loss", loss_curves), Panel("against the model without LoRA", score_curves)])


def write_plot(folder: Path) -> Path:
    """loss.png of a run. Raises: as plot_runs."""
    path = Path(folder) / PLOT_NAME
    temporary = path.with_name(path.name + ".part")
    plot_runs([folder]).save(temporary, format="PNG")
    os.replace(temporary, path)
    return path


def _forget_after(events: dict[int, Any], step: int) -> None:
    """A run that went back to an earlier state repeats its steps: what it had seen of them counts no more."""
    for later in [known for known in events if known >= step]:
        del events[later]


def _number(value: Any) -> float:
    return float("nan") if value is None else float(value)


def _pale(colour: str) -> str:
    """A colour mixed with white."""
    return "#" + "".join(f"{(int(colour[place : place + 2], 16) + 3 * 255) // 4:02x}" for place in (1, 3, 5))


def _smooth(values: Sequence[float]) -> list[float]:
    """Exponential average that leaves out what is not finite."""
    smoothed, average = [], float("nan")
    for value in values:
        if np.isfinite(value):
            average = value if not np.isfinite(average) else SMOOTHING * average + (1 - SMOOTHING) * value
        smoothed.append(average)
    return smoothed
