"""Which part of a picture the image encoder sees, and how much each feature of it counts.

The grid has g x g cells, one for each image feature.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ...blip3o_core.images import to_rgb
from ..config import CropConfig, DataConfig
from .dataset import Item, open_upright

# Raise when views of the same picture and settings come out differently than before: cached features are then made anew.
VERSION = 1
SMALLEST_VIEW = 0.8
# Side to which a picture is reduced to find its detail, pixels.
DETAIL_SIDE = 256
# How much detail at the very edge counts against detail in the middle, so that a tie is cut evenly.
EDGE_DETAIL = 0.8


@dataclass(frozen=True)
class View:
    """A square of an upright picture, in its pixels; beyond the picture lies background.

    Attributes:
        box: left, top, right, bottom.
    """

    box: tuple[float, float, float, float]
    is_flipped: bool = False


def describe_transform(config: DataConfig) -> str:
    """JSON of every setting that changes the pixels which the image encoder gets."""
    crop = asdict(config.crop)
    if config.crop.mode != "views":
        del crop["views"]
    guide = config.mask if config.crop.mode == "smart" else "none"
    return json.dumps({"version": VERSION, **crop, "background": config.background, "guide": guide})


def choose_views(
    item: Item, picture: Image.Image, config: DataConfig, mask: Image.Image | None
) -> list[View]:
    """The views of a picture; mirrored ones follow the others.

    Args:
        picture: upright.
        mask: what counts, (L); a smart crop follows it.
    """
    width, height = picture.size
    crop: CropConfig = config.crop
    if crop.mode == "letterbox":
        side = max(width, height)
        left, top = -((side - width) // 2), -((side - height) // 2)
        views = [View((float(left), float(top), float(left + side), float(top + side)))]
    elif crop.mode == "views":
        # Of the content alone, so that a renamed picture keeps its views.
        random = np.random.default_rng(int(item.digest, 16))
        views = [_random_view(random, width, height) for _ in range(crop.views)]
    elif crop.mode == "smart":
        views = [_smart_view(to_rgb(picture, config.background), mask)]
    else:
        views = [_centre_view(width, height)]
    if crop.flip:
        views += [View(view.box, is_flipped=True) for view in views]
    return views


def cut(picture: Image.Image, view: View, config: DataConfig) -> Image.Image:
    """The RGB picture of a view.

    A centre crop is left to images.preprocess_for_image_encoder, so that its features are those of the published
    preprocessing to the bit.
    """
    picture = to_rgb(picture, config.background)
    if config.crop.mode == "letterbox":
        left, top, right, _ = (round(edge) for edge in view.box)
        square = Image.new("RGB", (right - left, right - left), config.background)
        square.paste(picture, (-left, -top))
        picture = square
    elif config.crop.mode != "centre":
        left, top, right, bottom = (round(edge) for edge in view.box)
        picture = picture.crop((left, top, right, bottom))
    return picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if view.is_flipped else picture


def read_mask(item: Item, picture: Image.Image, config: DataConfig) -> Image.Image | None:
    """What counts in a picture, (L) in its size, 255 = fully; None = everything.

    Raises:
        TrainingDataError: its mask file is damaged.
    """
    if config.mask == "alpha" and item.has_alpha:
        return picture.convert("RGBA").getchannel("A")
    if config.mask == "files" and item.mask is not None:
        mask = open_mask(item)
        return mask if mask.size == picture.size else mask.resize(picture.size, Image.Resampling.BOX)
    return None


def open_mask(item: Item) -> Image.Image:
    """A picture's mask file as shades (L); transparent parts do not count.

    Raises:
        TrainingDataError: it is damaged.
    """
    return to_rgb(open_upright(item.mask.read(), f"mask of {item.name}"), "black").convert("L")


def grid_weights(view: View, size: tuple[int, int], mask: Image.Image | None, side: int) -> Tensor:
    """How much of each cell of the grid counts, (side x side,), float32 in [0, 1].

    The mask is averaged over each cell's area. Bars of a letterbox do not count: a LoRA should not learn to draw them.

    Args:
        size: width and height of the picture.
        mask: of that size; None = all of the picture counts.
    """
    left, top, right, bottom = view.box
    counted = np.full((size[1], size[0]), 255, np.uint8) if mask is None else np.asarray(mask)
    # Exact areas: each cell is the sum of pixels times the share of each pixel inside it, over the cell's area.
    columns = _overlaps(left, right, side, size[0])
    rows = _overlaps(top, bottom, side, size[1])
    weights = rows @ (counted.astype(np.float64) / 255) @ columns.T
    weights /= ((right - left) / side) * ((bottom - top) / side)
    if view.is_flipped:
        weights = weights[:, ::-1]
    return torch.from_numpy(np.ascontiguousarray(weights)).flatten().float().clamp(0, 1)


def share_cut_away(item: Item, config: CropConfig) -> float:
    """Share of the picture's area that no view in the middle shows, 0 to 1."""
    if config.mode == "letterbox":
        return 0.0
    return 1 - min(item.width, item.height) / max(item.width, item.height)


def _centre_view(width: int, height: int) -> View:
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    return View((left, top, left + side, top + side))


def _random_view(random: np.random.Generator, width: int, height: int) -> View:
    side = max(1, round(min(width, height) * random.uniform(SMALLEST_VIEW, 1)))
    left, top = random.integers(width - side + 1), random.integers(height - side + 1)
    return View((float(left), float(top), float(left + side), float(top + side)))


def _smart_view(picture: Image.Image, mask: Image.Image | None) -> View:
    """The full-height (or full-width) square with the most detail in it, or the most of the mask."""
    width, height = picture.size
    side = min(width, height)
    if width == height:
        return View((0.0, 0.0, float(side), float(side)))
    scale = min(1.0, DETAIL_SIDE / side)
    small = (max(1, round(width * scale)), max(1, round(height * scale)))
    if mask is not None:
        detail = np.asarray(mask.resize(small, Image.Resampling.BOX), np.float64)
    else:
        shades = np.asarray(picture.resize(small, Image.Resampling.BOX), np.float64)
        detail = np.zeros(shades.shape[:2])
        detail[:, 1:] += np.abs(np.diff(shades, axis=1)).sum(axis=2)
        detail[1:] += np.abs(np.diff(shades, axis=0)).sum(axis=2)
    along = detail.sum(axis=0 if width > height else 1)
    window = min(small)
    sums = np.convolve(along, np.ones(window), "valid")
    centre = (len(sums) - 1) / 2
    distance = np.abs(np.arange(len(sums)) - centre) / max(1, centre)
    # Rounded, so that a flat picture is cut in the middle and not by rounding errors.
    scores = np.round(sums, 3) * (1 - (1 - EDGE_DETAIL) * distance) - 1e-6 * distance
    offset = round(int(scores.argmax()) / max(1, len(sums) - 1) * abs(width - height))
    left, top = (offset, 0) if width > height else (0, offset)
    return View((float(left), float(top), float(left + side), float(top + side)))


def _overlaps(start: float, end: float, cells: int, pixels: int) -> np.ndarray:
    """Length of each pixel inside each cell along one axis, (cells, pixels)."""
    edges = np.linspace(start, end, cells + 1)
    places = np.arange(pixels)
    return np.clip(np.minimum(edges[1:, None], places + 1) - np.maximum(edges[:-1, None], places), 0, None)
