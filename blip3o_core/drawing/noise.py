"""Where the noise of a batch of pictures comes from; always drawn on the CPU, never from the global generator."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def seeded_noise(seeds: Sequence[int], shape: Sequence[int]) -> Tensor:
    """Standard normal noise (len(seeds), *shape), float32 on the CPU; row i depends on seeds[i] alone."""
    return torch.stack([torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


class SeededNoise:
    """Noise of each picture from its own seeds, whatever else is in the batch; features and latents have a seed each."""

    def __init__(self, seeds: Sequence[int], pixel_seeds: Sequence[int]) -> None:
        self._seeds, self._pixel_seeds = seeds, pixel_seeds

    def features(self, rows: slice, shape: Sequence[int]) -> Tensor:
        return seeded_noise(self._seeds[rows], shape)

    def latents(self, rows: slice, shape: Sequence[int]) -> Tensor:
        return seeded_noise(self._pixel_seeds[rows], shape)


class PublishedNoise:
    """Noise of each picture from one generator in the published order: features, negative features, latents.

    As published, the negative features are drawn with whatever noise comes next and then kept: the first picture of a
    pipeline differs from the same picture drawn later.
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def features(self, rows: slice, shape: Sequence[int]) -> Tensor:
        return self._draw(rows, shape)

    def negative(self, shape: Sequence[int]) -> Tensor:
        return self._draw(slice(0, 1), shape)

    def latents(self, rows: slice, shape: Sequence[int]) -> Tensor:
        return self._draw(rows, shape)

    def _draw(self, rows: slice, shape: Sequence[int]) -> Tensor:
        return torch.stack([torch.randn(*shape, generator=generator) for generator in self._generators[rows]])
