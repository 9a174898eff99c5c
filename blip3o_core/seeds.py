"""Seeds of batches. Imports no torch."""

from __future__ import annotations

from .errors import check_range

MAX_SEED = 2**64 - 1


def item_seeds(seed: int, count: int) -> list[int]:
    """Seeds of a batch: item i comes out exactly as it would alone with seed + i; after the last seed comes 0."""
    check_range("seed", seed, 0, MAX_SEED)
    return [(seed + item) % (MAX_SEED + 1) for item in range(count)]
