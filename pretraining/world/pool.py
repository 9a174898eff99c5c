"""Rendered scenes kept on disk and mapped into memory, so that every stage and process shares one copy."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ...blip3o_core.errors import BadInputError
from .scenes import GROUPS, SIZES, Scenes, coverage_maps, draw_scenes, render

CHUNK = 2000


@dataclass
class ScenePool:
    """Scenes with their pictures (N, 128, 128, 3) uint8 and coverage (N, 32, 32) uint8, 255 = covered."""

    scenes: Scenes
    images: np.ndarray
    coverage: np.ndarray

    def __len__(self) -> int:
        return len(self.scenes)

    def pixels(self, rows: np.ndarray) -> Tensor:
        """Pictures as (B, 3, 128, 128) float in [0, 1]."""
        return torch.from_numpy(self.images[rows]).permute(0, 3, 1, 2).float() / 255


def load_pool(number: int, seed: int, folder: Path) -> ScenePool:
    """The training scenes of a seed; drawn once, then read from `folder`."""
    scenes = draw_scenes(number, seed, held_out=False)
    paths = [folder / f"{name}_{number}_{seed}.npy" for name in ("images", "coverage")]
    if not all(path.is_file() for path in paths):
        folder.mkdir(parents=True, exist_ok=True)
        parts = [scenes.take(slice(start, start + CHUNK)) for start in range(0, number, CHUNK)]
        images = np.concatenate([render(part) for part in parts])
        cover = np.concatenate([np.rint(255 * coverage_maps(part, 32)).astype(np.uint8) for part in parts])
        for path, array in zip(paths, (images, cover), strict=True):
            save_array(path, array)
    images, cover = (np.load(path, mmap_mode="r") for path in paths)
    return ScenePool(scenes, images, cover)


def save_array(path: Path, array: np.ndarray) -> None:
    """Write an array so that it appears complete or not at all, whichever process is first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.npy")
    np.save(temporary, array)
    os.replace(temporary, path)


def draw_singles(number: int, seed: int, small_share: float | None = None) -> ScenePool:
    """The scenes with one object among `number` drawn.

    Args:
        small_share: share of small objects among them, reached by leaving out others; None = as the world has them.

    Raises:
        BadInputError: so few scenes that none is left.
    """
    scenes = draw_scenes(number, seed, held_out=False)
    rows = np.flatnonzero(scenes.group == GROUPS.index("single"))
    if small_share is not None:
        is_small = scenes.size[rows] == SIZES.index("small")
        others = np.flatnonzero(~is_small)
        kept = round(is_small.sum() * (1 - small_share) / small_share)
        rows = rows[np.sort(np.concatenate([np.flatnonzero(is_small), others[:kept]]))]
    if len(rows) == 0:
        raise BadInputError(
            f"Among {number} scenes there is no single object to add (extra_singles).\nAsk for some hundreds, or leave it out."
        )
    scenes = scenes.take(rows)
    return ScenePool(scenes, render(scenes), np.rint(255 * coverage_maps(scenes, 32)).astype(np.uint8))


def rows_of_step(total: int, batch_size: int, seed: int, step: int) -> np.ndarray:
    """Which samples a step trains on; the same for the same step, whatever ran before."""
    return np.random.default_rng((seed, step)).integers(total, size=batch_size)
