"""What faster settings cost: pictures of the built-in model against its 50 Euler steps."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from comfyui_blip3o.blip3o_core.drawing.decoding import PixelSettings
from comfyui_blip3o.blip3o_core.drawing.presets import PRESETS
from comfyui_blip3o.blip3o_core.drawing.sampling import FeatureSettings
from comfyui_blip3o.blip3o_core.images import to_pil
from comfyui_blip3o.blip3o_core.pipeline import Blip3oPipeline
from comfyui_blip3o.pretraining.evaluation.geneval import CATEGORIES, category_prompts
from comfyui_blip3o.pretraining.world.checker import check_prompt

PUBLISHED = PixelSettings()
PIXELS = {
    "euler, 50 steps (published)": PUBLISHED,
    "euler, 30 steps": PixelSettings(steps=30),
    "euler, 20 steps": PixelSettings(steps=20),
    "dpmpp_2m, 25 steps": PixelSettings(steps=25, sampler="dpmpp_2m"),
    "dpmpp_2m, 20 steps": PixelSettings(steps=20, sampler="dpmpp_2m"),
    "dpmpp_2m, 15 steps": PixelSettings(steps=15, sampler="dpmpp_2m"),
    "dpmpp_2m, 14 steps (fast preset)": PRESETS["fast"].pixels,
    "dpmpp_2m, 12 steps": PixelSettings(steps=12, sampler="dpmpp_2m"),
    "dpmpp_2m, 10 steps": PixelSettings(steps=10, sampler="dpmpp_2m"),
    "dpmpp_2m, 20 steps, guidance above 0.4": PixelSettings(
        steps=20, sampler="dpmpp_2m", guidance_interval=(0.4, 1)
    ),
    "dpmpp_2m, 20 steps, guidance above 0.2": PixelSettings(
        steps=20, sampler="dpmpp_2m", guidance_interval=(0.2, 1)
    ),
    "dpmpp_2m, 20 steps, guidance below 0.8": PixelSettings(
        steps=20, sampler="dpmpp_2m", guidance_interval=(0, 0.8)
    ),
    "dpmpp_2m, 15 steps, guidance above 0.2": PixelSettings(
        steps=15, sampler="dpmpp_2m", guidance_interval=(0.2, 1)
    ),
}
FEATURES = {
    "euler, 30 steps (published)": FeatureSettings(),
    "ab2, 20 steps (fast preset)": PRESETS["fast"].features,
    "ab2, 15 steps": FeatureSettings(steps=15, sampler="ab2"),
    "ab2, 12 steps": FeatureSettings(steps=12, sampler="ab2"),
    "heun, 10 steps": FeatureSettings(steps=10, sampler="heun"),
    "ab2, 20 steps, guidance below 0.8": FeatureSettings(steps=20, sampler="ab2", guidance_interval=(0, 0.8)),
}


@dataclass
class QualityRow:
    """One setting.

    Attributes:
        calls: network calls for one picture, guided ones counted twice.
        gain: seconds of the published setting / of this one, network alone (the VAE included for pixels).
        cosine: mean cosine between EVA-CLIP features of its pictures and of the published ones, feature by feature.
        lowest: the lowest picture's.
        correct: share of prompts whose picture the checker finds right.
    """

    setting: str
    calls: int
    gain: float
    cosine: float
    lowest: float
    correct: float


@torch.no_grad()
def measure_quality(pipeline: Blip3oPipeline, per_category: int = 8) -> dict[str, list[QualityRow]]:
    """Tables of pixel settings (same image features) and of feature settings (same decoder)."""
    prompts = [each for category in CATEGORIES for each in category_prompts(category, per_category)]
    seeds = list(range(len(prompts)))
    conditioning = pipeline.encode_prompts([prompt.text for prompt in prompts])
    features = pipeline.sample_features(conditioning, seeds)
    away = pipeline.negative_features()

    def decode(image_features: torch.Tensor, settings: PixelSettings) -> torch.Tensor:
        return pipeline.decode(image_features, seeds, settings=settings, negative_features=away)

    def row(
        name: str, calls: int, gain: float, pictures: torch.Tensor, published: torch.Tensor
    ) -> QualityRow:
        encoded = pipeline.encode_images(to_pil(pictures))
        cosine = F.cosine_similarity(encoded, published, dim=-1).mean(1)
        right = [
            check_prompt(np.asarray(picture), prompt.request)
            for picture, prompt in zip(to_pil(pictures), prompts, strict=True)
        ]
        return QualityRow(name, calls, gain, cosine.mean().item(), cosine.min().item(), float(np.mean(right)))

    reference = decode(features, PUBLISHED)
    published = pipeline.encode_images(to_pil(reference))
    few = slice(0, 8)  # enough for times
    pixel_rows, feature_rows = [], []
    for name, settings in PIXELS.items():
        seconds = _paired(
            lambda: pipeline.decode(features[few], seeds[few], settings=PUBLISHED, negative_features=away),
            lambda settings=settings: pipeline.decode(
                features[few], seeds[few], settings=settings, negative_features=away
            ),
        )
        pixel_rows.append(row(name, _calls(settings), seconds, decode(features, settings), published))
    fast = PRESETS["fast"].pixels
    for name, settings in FEATURES.items():
        gain = _paired(
            lambda: pipeline.sample_features(conditioning[few], seeds[few]),
            lambda settings=settings: pipeline.sample_features(
                conditioning[few], seeds[few], settings=settings
            ),
        )
        sampled = pipeline.sample_features(conditioning, seeds, settings=settings)
        feature_rows.append(row(name, _calls(settings), gain, decode(sampled, fast), published))
    return {"pixels": pixel_rows, "features, painted by the fast preset's decoder": feature_rows}


def _paired(plain: Any, ours: Any, rounds: int = 3) -> float:
    ratios = []
    for _ in range(rounds):
        start = time.perf_counter()
        plain()
        middle = time.perf_counter()
        ours()
        ratios.append((middle - start) / (time.perf_counter() - middle))
    return sorted(ratios)[rounds // 2]


def _calls(settings: PixelSettings | FeatureSettings) -> int:
    low, high = settings.guidance_interval
    steps = settings.steps
    positions = [1 - step / steps for step in range(steps)]
    calls = steps + sum(low <= position <= high for position in positions)
    return calls * (2 if settings.sampler == "heun" else 1)


def quality_markdown(tables: dict[str, list[QualityRow]]) -> str:
    """One table after the other."""
    parts = []
    for title, rows in tables.items():
        parts.append(f"### {title[0].upper()}{title[1:]}\n\n")
        parts.append("| setting | network calls | times as fast | cosine | lowest | checker finds right |\n")
        parts.append("|" + " --- |" * 6 + "\n")
        for row in rows:
            parts.append(
                f"| {row.setting} | {row.calls} | {row.gain:.2f} | {row.cosine:.4f} | {row.lowest:.4f} | {row.correct:.3f} |\n"
            )
        parts.append("\n")
    return "".join(parts)


def quality_json(tables: dict[str, list[QualityRow]]) -> dict[str, Any]:
    return {title: [asdict(replace(row)) for row in rows] for title, rows in tables.items()}
