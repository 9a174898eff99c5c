"""Curves as a picture, drawn with Pillow alone: ComfyUI's Python has nothing else for it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

COLOURS = ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#17becf")
WIDTH, PANEL_HEIGHT = 990, 350
LEFT, RIGHT, TOP, BOTTOM = 70, 20, 34, 30
FONT = 14
TICKS = 5
TEXT, GRID, BACKGROUND = "#222222", "#dddddd", "#ffffff"
# Length of drawn and left-out pieces, pixels; None = a whole line.
DASHES = {"-": None, "--": (9, 6), ":": (3, 4), "-.": (12, 9)}


@dataclass(frozen=True)
class Curve:
    """Values over steps; what is not finite is left out.

    Attributes:
        label: in the legend; empty = not there.
        style: a name in DASHES.
    """

    steps: Sequence[float]
    values: Sequence[float]
    colour: str
    label: str = ""
    style: str = "-"
    width: int = 2
    has_dots: bool = False


@dataclass(frozen=True)
class Panel:
    """One pair of axes."""

    title: str
    curves: Sequence[Curve]


def draw_panels(panels: Sequence[Panel]) -> Image.Image:
    """Panels below each other, over the same steps."""
    picture = Image.new("RGB", (WIDTH, PANEL_HEIGHT * len(panels)), BACKGROUND)
    steps = [step for panel in panels for curve in panel.curves for step in curve.steps]
    last = max([*steps, 1])
    for number, panel in enumerate(panels):
        _draw_panel(picture, panel, number * PANEL_HEIGHT, last)
    return picture


def ticks(low: float, high: float) -> list[float]:
    """About five round numbers from low to high."""
    raw = (high - low) / TICKS
    power = 10 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [number * step for number in range(first, math.floor(high / step + 1e-9) + 1)]


def _draw_panel(picture: Image.Image, panel: Panel, top: int, last: float) -> None:
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(FONT)
    values = [value for curve in panel.curves for value in curve.values if math.isfinite(value)]
    low, high = min([*values, 0.0]), max([*values, 0.0])
    if high - low < 1e-9:
        high = low + 1.0
    inner = PANEL_HEIGHT - TOP - BOTTOM

    def place(step: float, value: float) -> tuple[float, float]:
        return (
            LEFT + step / last * (WIDTH - LEFT - RIGHT),
            top + TOP + inner * (1 - (value - low) / (high - low)),
        )

    for value in ticks(low, high):
        draw.line((place(0, value), place(last, value)), fill=GRID)
        draw.text((LEFT - 8, place(0, value)[1]), f"{value:g}", font=font, fill=TEXT, anchor="rm")
    for step in ticks(0, last):
        draw.line((place(step, low), place(step, high)), fill=GRID)
        draw.text(
            (place(step, low)[0], top + PANEL_HEIGHT - 6), f"{step:g}", font=font, fill=TEXT, anchor="ms"
        )
    for curve in panel.curves:
        _draw_curve(draw, curve, [place(step, value) for step, value in _finite(curve)])
    draw.text((LEFT, top + 16), panel.title, font=font, fill=TEXT, anchor="lm")
    right = WIDTH - RIGHT
    for curve in reversed([curve for curve in panel.curves if curve.label]):
        draw.text((right, top + 16), curve.label, font=font, fill=curve.colour, anchor="rm")
        right -= draw.textlength(curve.label, font=font) + 8
        _draw_line(draw, (right - 28, top + 16), (right, top + 16), curve)
        right -= 28 + 18


def _finite(curve: Curve) -> list[tuple[float, float]]:
    pairs = zip(curve.steps, curve.values, strict=True)
    return [(step, value) for step, value in pairs if math.isfinite(value)]


def _draw_curve(draw: ImageDraw.ImageDraw, curve: Curve, points: Sequence[tuple[float, float]]) -> None:
    for start, end in zip(points, points[1:], strict=False):
        _draw_line(draw, start, end, curve)
    if curve.has_dots or len(points) == 1:
        for x, y in points:
            draw.ellipse((x - 3, y - 3, x + 3, y + 3), fill=curve.colour)


def _draw_line(
    draw: ImageDraw.ImageDraw, start: tuple[float, float], end: tuple[float, float], curve: Curve
) -> None:
    dashes = DASHES[curve.style]
    if dashes is None:
        draw.line((start, end), fill=curve.colour, width=curve.width)
        return
    drawn, left_out = dashes
    length = math.dist(start, end)
    position = 0.0
    while position < length:
        ends = [min(1.0, share / length) for share in (position, position + drawn)]
        piece = [
            (start[0] + share * (end[0] - start[0]), start[1] + share * (end[1] - start[1])) for share in ends
        ]
        draw.line((*piece,), fill=curve.colour, width=curve.width)
        position += drawn + left_out
