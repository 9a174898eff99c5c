"""A picture of a run's loss."""

from __future__ import annotations

import json
from pathlib import Path


def plot_log(log: Path, path: Path) -> None:
    """Draw the loss of every logged step, on a logarithmic axis, into a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lines = [json.loads(line) for line in log.read_text("utf-8").splitlines()]
    figure = Figure(figsize=(8, 4.5), dpi=110)
    axes = figure.add_subplot()
    axes.plot([line["step"] for line in lines], [line["loss"] for line in lines])
    axes.set_yscale("log")
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.set_title(log.parent.name)
    axes.grid(alpha=0.3)
    FigureCanvasAgg(figure).print_png(str(path))
