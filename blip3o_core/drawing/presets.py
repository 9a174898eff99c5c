"""Named ways to draw, and what a drawing yields."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from PIL import Image
from torch import Tensor

from ..images import to_pil
from .decoding import PixelSettings
from .sampling import FeatureSettings


@dataclass(frozen=True)
class Preset:
    """A named way to draw.

    Attributes:
        features, pixels: settings of the two stages.
        is_published: draw all noise of a picture from one generator in the published order: features, then (once per
            pipeline) the decoder's negative features, then latents.
    """

    features: FeatureSettings
    pixels: PixelSettings
    is_published: bool = False


PRESETS = {
    "standard": Preset(FeatureSettings(), PixelSettings()),
    "published": Preset(FeatureSettings(), PixelSettings(), is_published=True),
    # Chosen by benchmarks/quality.py: pictures keep 0.999 of the features' cosine at less than a third of the calls.
    "fast": Preset(FeatureSettings(steps=20, sampler="ab2"), PixelSettings(steps=14, sampler="dpmpp_2m")),
}


@dataclass(frozen=True)
class Generation:
    """Pictures and how they came about.

    Attributes:
        images: (B, H, W, 3), float32 in [0, 1].
        image_features: (B, N, channels), float32.
        prompts: prompt of each picture.
        seeds, pixel_seeds: seed of each picture's features and latents.
        settings: everything needed to draw them again, as JSON-ready values.
    """

    images: Tensor
    image_features: Tensor
    prompts: list[str]
    seeds: list[int]
    pixel_seeds: list[int]
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def pictures(self) -> list[Image.Image]:
        return to_pil(self.images)
