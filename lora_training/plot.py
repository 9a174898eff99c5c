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

from ..blip3o_core.checkpoints.save import write_text
from ..blip3o_core.errors import MissingFilesError

EVENTS_NAME, METRICS_NAME, PLOT_NAME = "events.jsonl", "metrics.csv", "loss.png"
SMOOTHING = 0.9
SCORES = ("gain", "concept", "drift", "leak")
FIGURE_SIZE, RESOLUTION = (9.0, 6.5), 110


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
        MissingFilesError: a folder is no run, or matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingFilesError(
            "A plot needs matplotlib, which is not installed.\nInstall it with: pip install matplotlib"
        ) from error
    histories = [read_history(folder) for folder in folders]
    figure = Figure(figsize=FIGURE_SIZE, dpi=RESOLUTION, layout="constrained")
    loss_axes, score_axes = figure.subplots(2, 1, sharex=True)
    for number, history in enumerate(histories):
        colour = f"C{number}"
        steps = sorted(history.steps)
        losses = [_number(history.steps[step].get("loss")) for step in steps]
        loss_axes.plot(steps, losses, color=colour, alpha=0.25, linewidth=0.8)
        loss_axes.plot(steps, _smooth(losses), color=colour, label=history.name)
        looked = sorted(history.validations)
        for name, style in zip(SCORES, ("-", "--", ":", "-."), strict=True):
            values = [history.validations[step][name] for step in looked]
            label = name if number == 0 else None
            score_axes.plot(looked, values, style, marker=".", color=f"C{number}", label=label)
        if looked:
            held_out = [history.validations[step]["loss"] for step in looked]
            loss_axes.plot(looked, held_out, "k.--" if len(histories) == 1 else ".--", label="validation")
    loss_axes.set_ylabel("loss")
    loss_axes.legend()
    score_axes.axhline(0, color="grey", linewidth=0.6)
    score_axes.set_ylabel("against the model without LoRA")
    score_axes.set_xlabel("step")
    score_axes.legend()
    for axes in (loss_axes, score_axes):
        axes.grid(alpha=0.3)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


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


def _smooth(values: Sequence[float]) -> list[float]:
    """Exponential average that leaves out what is not finite."""
    smoothed, average = [], float("nan")
    for value in values:
        if np.isfinite(value):
            average = value if not np.isfinite(average) else SMOOTHING * average + (1 - SMOOTHING) * value
        smoothed.append(average)
    return smoothed
