"""The rule-based judge: looks at the pixels of a picture and says which objects it shows, knowing nothing of its maker.

Ground colour from the border, connected components of what differs from it, palette colour of each, shape by overlap
with templates drawn independently of the renderer, then counts and relations of what was found.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image, ImageDraw

from .captions import Request
from .scenes import BACKGROUND_RGB, BACKGROUNDS, COLOUR_RGB, COLOURS, KINDS, RADII, RELATIONS, SIZES, Scenes

TEMPLATE = 48
MIN_PIXELS = 40
MIN_OVERLAP = 0.72  # of mask and template; a clean shape reaches 0.9
MIN_PURITY = 0.75  # share of a component's inner pixels near its own colour
MAX_COLOUR_DISTANCE = 90.0  # of 442, from a component's middle colour to the palette
FOREGROUND = 60.0
ASPECT = (0.7, 1.4)
APART = 12.0  # pixels between centres that make a relation


@dataclass(frozen=True)
class Found:
    """One object seen in a picture; kind and colour are None where no rule is met."""

    kind: str | None
    colour: str | None
    x: float
    y: float
    reach: float  # half of the larger side, pixels
    overlap: float


@dataclass(frozen=True)
class Report:
    """What a picture shows."""

    background: str
    objects: tuple[Found, ...]


def look(image: np.ndarray) -> Report:
    """Find the objects of a picture (128, 128, 3), uint8."""
    pixels = image.astype(np.float32)
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    ground = np.median(border, axis=0)
    distance = np.linalg.norm(pixels - ground, axis=-1)
    objects = []
    for component in components(distance > FOREGROUND):
        if component.sum() >= MIN_PIXELS:
            objects.append(_describe(pixels, distance, component))
    background = BACKGROUNDS[int(np.linalg.norm(BACKGROUND_RGB - ground, axis=1).argmin())]
    return Report(background, tuple(objects))


def check_prompt(image: np.ndarray, request: Request) -> bool:
    """Whether a picture shows exactly what a caption asks for: every object, no other, colours, count, relation."""
    return check_report(look(image), request)


def check_report(report: Report, request: Request) -> bool:
    """check_prompt on a finished report."""
    if request.background is not None and report.background != request.background:
        return False
    wanted = [thing for thing in request.things for _ in range(thing.number)]
    if len(report.objects) != len(wanted):
        return False
    if len(request.things) == 1:
        thing = request.things[0]
        colours = {found.colour for found in report.objects}
        same_colour = len(colours) == 1 and None not in colours
        right_size = request.size is None or size_name(report.objects[0]) == request.size
        return same_colour and right_size and all(_fits(found, thing) for found in report.objects)
    orders = ((0, 1), (1, 0))
    return any(
        all(_fits(report.objects[k], thing) for k, thing in zip(order, request.things, strict=True))
        and (
            request.relation is None
            or holds(report.objects[order[0]], request.relation, report.objects[order[1]])
        )
        for order in orders
    )


def holds(first: Found, relation: str, second: Found) -> bool:
    """Whether a relation holds between two found objects: the right side, and more along its axis than across."""
    dx, dy = first.x - second.x, first.y - second.y
    along, across = (dx, dy) if relation in ("left of", "right of") else (dy, dx)
    if relation in ("left of", "above"):
        along = -along
    return along > APART and along > abs(across)


def size_name(found: Found) -> str:
    """small, medium or large, by the nearest radius."""
    scale = {"square": 0.88, "triangle": 1.0, "star": 1.12}.get(found.kind or "", 1.0)
    return SIZES[int(np.abs(np.array(RADII) * scale - found.reach).argmin())]


def matches_scene(report: Report, scenes: Scenes, n: int) -> bool:
    """Whether a picture shows scene n: ground, objects with colours, and their relation. For reconstructions."""
    if report.background != BACKGROUNDS[scenes.background[n]] or len(report.objects) != scenes.count[n]:
        return False
    left = list(range(int(scenes.count[n])))
    for found in report.objects:
        near = [k for k in left if math.hypot(scenes.x[n, k] - found.x, scenes.y[n, k] - found.y) < 10]
        if not near:
            return False
        if (found.kind, found.colour) != (KINDS[scenes.kind[n, near[0]]], COLOURS[scenes.colour[n, near[0]]]):
            return False
        left.remove(near[0])
    return True


def loose_report(image: np.ndarray, request: Request) -> dict[str, bool]:
    """Parts of the verdict, for pictures that are not exact: number of objects, kinds, colours, axis of the relation."""
    report = look(image)
    wanted = [thing for thing in request.things for _ in range(thing.number)]
    kinds = sorted(thing.kind for thing in wanted)
    colours = sorted(str(thing.colour) for thing in wanted if thing.colour)
    loose = {
        "ground": request.background in (None, report.background),
        "number": len(report.objects) == len(wanted),
        "kinds": sorted(str(found.kind) for found in report.objects) == kinds,
        "colours": not colours or sorted(str(found.colour) for found in report.objects) == colours,
    }
    if request.relation is not None and len(report.objects) == 2:
        first, second = report.objects
        flat = abs(first.x - second.x) > abs(first.y - second.y)
        loose["axis"] = flat == (RELATIONS.index(request.relation) < 2)
    return loose


def components(mask: np.ndarray) -> list[np.ndarray]:
    """Connected regions (8 neighbours) of a mask, each as a mask, by merging the runs of its rows."""
    parent: list[int] = []
    runs: list[tuple[int, int, int]] = []  # row, first column, column after the last

    def root(k: int) -> int:
        while parent[k] != k:
            parent[k] = parent[parent[k]]
            k = parent[k]
        return k

    above: list[int] = []
    for row, line in enumerate(mask):
        edges = np.flatnonzero(np.diff(np.concatenate([[0], line.astype(np.int8), [0]])))
        current = []
        for start, end in zip(edges[::2], edges[1::2], strict=True):
            runs.append((row, int(start), int(end)))
            index = len(parent)
            parent.append(index)
            for other in above:
                _, other_start, other_end = runs[other]
                if other_start <= end and start <= other_end:
                    parent[root(other)] = root(index)
            current.append(index)
        above = current
    regions: dict[int, np.ndarray] = {}
    for index, (row, start, end) in enumerate(runs):
        regions.setdefault(root(index), np.zeros_like(mask))[row, start:end] = True
    return list(regions.values())


def _describe(pixels: np.ndarray, distance: np.ndarray, component: np.ndarray) -> Found:
    """Colour from the component's inside, then shape from the pixels nearer to that colour than to the ground."""
    reach = np.median(distance[component])
    inside = component & (distance > 0.5 * reach)
    core = component & (distance > 0.8 * reach)
    colour = np.median(pixels[core], axis=0)
    gaps = np.linalg.norm(COLOUR_RGB - colour, axis=1)
    purity = (np.linalg.norm(pixels[core] - colour, axis=1) < 60).mean()
    named = gaps.min() <= MAX_COLOUR_DISTANCE and purity >= MIN_PURITY
    rows, columns = np.flatnonzero(inside.any(axis=1)), np.flatnonzero(inside.any(axis=0))
    top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    crop = Image.fromarray((255 * inside[top:bottom, left:right]).astype(np.uint8))
    mask = np.asarray(crop.resize((TEMPLATE, TEMPLATE), Image.Resampling.BILINEAR)) > 127
    overlaps = [(mask & shape).sum() / (mask | shape).sum() for shape in _templates()]
    best = int(np.argmax(overlaps))
    upright = ASPECT[0] <= (right - left) / (bottom - top) <= ASPECT[1]
    return Found(
        kind=KINDS[best] if overlaps[best] >= MIN_OVERLAP and upright else None,
        colour=COLOURS[int(gaps.argmin())] if named else None,
        x=float(left + right) / 2,
        y=float(top + bottom) / 2,
        reach=max(right - left, bottom - top) / 2,
        overlap=float(overlaps[best]),
    )


def _fits(found: Found, thing: object) -> bool:
    return found.kind == thing.kind and thing.colour in (None, found.colour)


@cache
def _templates() -> tuple[np.ndarray, ...]:
    """Masks of every kind that fill their box, (TEMPLATE, TEMPLATE)."""
    return tuple(_template(kind) for kind in KINDS)


def _template(kind: str) -> np.ndarray:
    scale = 8
    side = TEMPLATE * scale
    image = Image.new("L", (side, side), 0)
    draw = ImageDraw.Draw(image)
    last = side - 1
    if kind == "square":
        draw.rectangle((0, 0, last, last), fill=255)
    elif kind == "triangle":
        draw.polygon([(last / 2, 0), (0, last), (last, last)], fill=255)
    elif kind == "cross":
        thin, thick = 0.34 * last, 0.66 * last
        draw.rectangle((thin, 0, thick, last), fill=255)
        draw.rectangle((0, thin, last, thick), fill=255)
    elif kind == "star":
        tips = []
        for k in range(10):
            angle, length = math.pi * k / 5, (1.0 if k % 2 == 0 else 0.42)
            tips.append((length * math.sin(angle), -length * math.cos(angle)))
        xs, ys = [x for x, _ in tips], [y for _, y in tips]
        width, height = max(xs) - min(xs), max(ys) - min(ys)
        draw.polygon(
            [((x - min(xs)) / width * last, (y - min(ys)) / height * last) for x, y in tips], fill=255
        )
    else:
        draw.ellipse((0, 0, last, last), fill=255)
        if kind == "ring":
            hole = 0.275 * last
            draw.ellipse((hole, hole, last - hole, last - hole), fill=0)
    return np.asarray(image.resize((TEMPLATE, TEMPLATE), Image.Resampling.BOX)) > 127
