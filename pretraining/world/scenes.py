"""The scene world: 128 x 128 pictures of one to three plain shapes, drawn from a seed without any other input.

N = scenes, K = objects per scene at most (3), S = picture side in pixels (128). Object 0 is the one a caption names
first. Positions and radii are in pixels, x to the right and y downwards.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import numpy as np

SIDE = 128
MAX_OBJECTS = 3
KINDS = ("circle", "square", "triangle", "cross", "ring", "star")
COLOURS = ("red", "yellow", "green", "blue", "purple", "cyan")
BACKGROUNDS = ("white", "black")
SIZES = ("small", "medium", "large")
GROUPS = ("single", "pair", "count")
RELATIONS = ("left of", "right of", "above", "below")
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}

COLOUR_RGB = np.array(
    [(225, 30, 40), (250, 205, 10), (20, 160, 60), (30, 70, 230), (170, 40, 190), (0, 200, 225)],
    dtype=np.float32,
)
BACKGROUND_RGB = np.array([(255, 255, 255), (0, 0, 0)], dtype=np.float32)
RADII = (13.0, 19.0, 27.0)

CENTRE = (64.0, 64.0)
HORIZONTAL_SLOTS = ((36.0, 64.0), (92.0, 64.0))
VERTICAL_SLOTS = ((64.0, 36.0), (64.0, 92.0))
COUNT_SLOTS = {2: HORIZONTAL_SLOTS, 3: ((64.0, 36.0), (36.0, 92.0), (92.0, 92.0))}
JITTER = 3.0
RADIUS_JITTER = 1.0
WINDOW = 72  # pixels; the largest shape with its jitter fits


@dataclass
class Scenes:
    """N scenes as arrays, so that tens of thousands stay cheap. Unused object rows hold kind -1."""

    group: np.ndarray  # (N,) index into GROUPS
    background: np.ndarray  # (N,) index into BACKGROUNDS
    relation: np.ndarray  # (N,) index into RELATIONS of object 0 to object 1; -1 unless a pair
    size: np.ndarray  # (N,) index into SIZES
    kind: np.ndarray  # (N, K) index into KINDS, -1 = no such object
    colour: np.ndarray  # (N, K) index into COLOURS, -1 = no such object
    x: np.ndarray  # (N, K) centres
    y: np.ndarray  # (N, K)
    radius: np.ndarray  # (N, K)

    def __len__(self) -> int:
        return len(self.group)

    def take(self, rows: np.ndarray | slice) -> Scenes:
        """The scenes of these rows."""
        return Scenes(**{f.name: getattr(self, f.name)[rows] for f in fields(self)})

    @property
    def count(self) -> np.ndarray:
        """Objects per scene, (N,)."""
        return (self.kind >= 0).sum(axis=1)


def pair_is_held_out(kind: np.ndarray, colour: np.ndarray) -> np.ndarray:
    """Which object pairs (N, 2) training never shows, in either order: about one pair in eight."""
    objects = kind.astype(np.int64) * len(COLOURS) + colour
    low, high = objects.min(axis=1), objects.max(axis=1)
    return ((low * 40503 + high * 9973 + 77) % 97) < 12


def draw_scenes(number: int, seed: int, *, held_out: bool | None = False) -> Scenes:
    """Draw scenes: 30 % one object, 50 % two with a relation, 20 % two or three of one kind.

    Args:
        number: how many.
        seed: the same seed gives the same scenes.
        held_out: False = pairs that training may show, True = only the pairs it never shows, None = any.
    """
    rng = np.random.default_rng(seed)
    group = rng.choice(3, size=number, p=(0.3, 0.5, 0.2))
    kind = np.full((number, MAX_OBJECTS), -1)
    colour = np.full((number, MAX_OBJECTS), -1)
    kind[:, 0] = rng.integers(len(KINDS), size=number)
    colour[:, 0] = rng.integers(len(COLOURS), size=number)

    pair = np.flatnonzero(group == 1)
    while len(todo := pair[~_pair_is_right(kind[pair, :2], colour[pair, :2], held_out)]):
        kind[todo, :2] = rng.integers(len(KINDS), size=(len(todo), 2))
        colour[todo, :2] = rng.integers(len(COLOURS), size=(len(todo), 2))

    counted = np.flatnonzero(group == 2)
    several = rng.integers(2, 4, size=number)
    for k in (1, 2):
        rows = counted[several[counted] > k]
        kind[rows, k], colour[rows, k] = kind[rows, 0], colour[rows, 0]

    relation = np.where(group == 1, rng.integers(len(RELATIONS), size=number), -1)
    size = np.where(group == 0, rng.choice(3, size=number, p=(0.3, 0.4, 0.3)), 1)
    scenes = Scenes(
        group=group,
        background=rng.integers(len(BACKGROUNDS), size=number),
        relation=relation,
        size=size,
        kind=kind,
        colour=colour,
        x=np.zeros((number, MAX_OBJECTS)),
        y=np.zeros((number, MAX_OBJECTS)),
        radius=np.zeros((number, MAX_OBJECTS)),
    )
    place(scenes, rng)
    return scenes


def place(scenes: Scenes, rng: np.random.Generator) -> None:
    """Put the objects into the slots of their group, a few pixels off, in place."""
    number = len(scenes)
    count = scenes.count
    slots = np.zeros((number, MAX_OBJECTS, 2))
    slots[:, 0] = CENTRE
    for index, relation in enumerate(RELATIONS):
        first, second = HORIZONTAL_SLOTS if relation in ("left of", "right of") else VERTICAL_SLOTS
        if relation in ("right of", "below"):
            first, second = second, first
        slots[scenes.relation == index, :2] = (first, second)
    for several, places in COUNT_SLOTS.items():
        slots[(scenes.group == 2) & (count == several), :several] = places
    shift = rng.uniform(-JITTER, JITTER, size=slots.shape)
    exists = scenes.kind >= 0
    scenes.x[:] = np.where(exists, slots[..., 0] + shift[..., 0], 0.0)
    scenes.y[:] = np.where(exists, slots[..., 1] + shift[..., 1], 0.0)
    radius = np.array(RADII)[scenes.size][:, None] + rng.uniform(
        -RADIUS_JITTER, RADIUS_JITTER, size=exists.shape
    )
    scenes.radius[:] = np.where(exists, radius, 0.0)


def render(scenes: Scenes) -> np.ndarray:
    """Draw the scenes, antialiased: (N, 128, 128, 3) uint8."""
    images = np.empty((len(scenes), SIDE, SIDE, 3), dtype=np.uint8)
    images[:] = BACKGROUND_RGB[scenes.background][:, None, None].astype(np.uint8)
    ground = BACKGROUND_RGB[scenes.background]
    for kind in range(len(KINDS)):
        rows, columns = np.nonzero(scenes.kind == kind)
        for start in range(0, len(rows), 256):
            row, column = rows[start : start + 256], columns[start : start + 256]
            left = np.floor(scenes.x[row, column]).astype(int) - WINDOW // 2
            top = np.floor(scenes.y[row, column]).astype(int) - WINDOW // 2
            cover = _coverage(
                kind, scenes.x[row, column] - left, scenes.y[row, column] - top, scenes.radius[row, column]
            )
            ink = COLOUR_RGB[scenes.colour[row, column]]
            base = ground[row]
            for n in range(len(row)):
                y0, y1 = max(top[n], 0), min(top[n] + WINDOW, SIDE)
                x0, x1 = max(left[n], 0), min(left[n] + WINDOW, SIDE)
                part = cover[n, y0 - top[n] : y1 - top[n], x0 - left[n] : x1 - left[n], None]
                region = images[row[n], y0:y1, x0:x1]
                drawn = np.rint(base[n] + part * (ink[n] - base[n])).astype(np.uint8)
                np.copyto(region, drawn, where=part > 0)
    return images


def coverage_maps(scenes: Scenes, cells: int) -> np.ndarray:
    """Colour-free share of each cell that objects cover, (N, cells, cells) float32 in [0, 1]."""
    step = SIDE // cells
    total = np.zeros((len(scenes), SIDE + 2 * WINDOW, SIDE + 2 * WINDOW), dtype=np.float32)
    for kind in range(len(KINDS)):
        rows, columns = np.nonzero(scenes.kind == kind)
        for start in range(0, len(rows), 256):
            row, column = rows[start : start + 256], columns[start : start + 256]
            left = np.floor(scenes.x[row, column]).astype(int) - WINDOW // 2
            top = np.floor(scenes.y[row, column]).astype(int) - WINDOW // 2
            cover = _coverage(
                kind, scenes.x[row, column] - left, scenes.y[row, column] - top, scenes.radius[row, column]
            )
            for n in range(len(row)):
                y0, x0 = top[n] + WINDOW, left[n] + WINDOW
                total[row[n], y0 : y0 + WINDOW, x0 : x0 + WINDOW] += cover[n]
    inner = total[:, WINDOW : WINDOW + SIDE, WINDOW : WINDOW + SIDE]
    return inner.reshape(len(scenes), cells, step, cells, step).mean(axis=(2, 4))


def _pair_is_right(kind: np.ndarray, colour: np.ndarray, held_out: bool | None) -> np.ndarray:
    """Pairs (N, 2) of two different objects on the wanted side of the held-out line."""
    drawn = kind[:, 1] >= 0
    different = (kind[:, 0] != kind[:, 1]) | (colour[:, 0] != colour[:, 1])
    if held_out is None:
        return drawn & different
    return drawn & different & (pair_is_held_out(kind, colour) == held_out)


def _coverage(kind: int, x: np.ndarray, y: np.ndarray, radius: np.ndarray) -> np.ndarray:
    """Antialiased masks (M, WINDOW, WINDOW) of shapes centred at (x, y) in their windows."""
    axis = np.arange(WINDOW, dtype=np.float32) + 0.5
    dx = axis[None, None, :] - x[:, None, None].astype(np.float32)
    dy = axis[None, :, None] - y[:, None, None].astype(np.float32)
    return np.clip(0.5 - _distance(KINDS[kind], dx, dy, radius[:, None, None].astype(np.float32)), 0.0, 1.0)


def _distance(kind: str, dx: np.ndarray, dy: np.ndarray, radius: np.ndarray) -> np.ndarray:
    """Signed distance in pixels to the outline, negative inside."""
    if kind == "circle":
        return np.hypot(dx, dy) - radius
    if kind == "square":
        return np.maximum(abs(dx), abs(dy)) - 0.88 * radius
    if kind == "triangle":
        side = abs(dx) * math.cos(math.pi / 6) - dy * math.sin(math.pi / 6)
        return np.maximum(side - 0.58 * radius, dy - 0.75 * radius)
    if kind == "cross":
        upright = np.maximum(abs(dx) - 0.32 * radius, abs(dy) - radius)
        lying = np.maximum(abs(dy) - 0.32 * radius, abs(dx) - radius)
        return np.minimum(upright, lying)
    if kind == "ring":
        return abs(np.hypot(dx, dy) - 0.74 * radius) - 0.28 * radius
    return _star_distance(dx, dy, 1.12 * radius)


def _star_distance(dx: np.ndarray, dy: np.ndarray, radius: np.ndarray) -> np.ndarray:
    """Five-pointed star, one tip up; each point of the plane is folded onto half a tip first."""
    angle = np.arctan2(dx, -dy)
    sector = 2 * math.pi / 5
    folded = abs((angle + sector / 2) % sector - sector / 2)
    reach = np.hypot(dx, dy)
    along, across = reach * np.cos(folded), reach * np.sin(folded)
    inner = 0.42
    notch_along, notch_across = inner * math.cos(sector / 2), inner * math.sin(sector / 2)
    length = math.hypot(1 - notch_along, notch_across)
    return ((along - radius) * notch_across + across * (1 - notch_along)) / length
