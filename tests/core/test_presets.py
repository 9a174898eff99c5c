"""The fast preset against the published way, on the built-in model."""

import pytest
import torch
from comfyui_blip3o.blip3o_core.config import BUILT_IN_MODEL
from comfyui_blip3o.blip3o_core.drawing.presets import PRESETS
from comfyui_blip3o.blip3o_core.images import to_pil
from comfyui_blip3o.blip3o_core.pipeline import load_pipeline

PROMPTS = ["a red circle left of a blue square", "two green triangles"]


@pytest.mark.slow
def test_fast_pictures_are_the_published_ones_at_a_third_of_the_work() -> None:
    pipeline = load_pipeline(BUILT_IN_MODEL, device="cpu")
    features = pipeline.sample_features(pipeline.encode_prompts(PROMPTS), [0, 1])
    calls: list[int] = []
    pipeline.decoder.unet.register_forward_hook(lambda *unused: calls.append(1))
    encoded, counts = {}, {}
    for name in ("published", "fast"):
        calls.clear()
        pictures = pipeline.decode(features, [0, 1], settings=PRESETS[name].pixels)
        encoded[name], counts[name] = pipeline.encode_images(to_pil(pictures)), len(calls)
    assert counts["published"] >= 3 * counts["fast"]
    cosine = torch.nn.functional.cosine_similarity(encoded["fast"], encoded["published"], dim=-1)
    assert cosine.mean() >= 0.98
    others = torch.nn.functional.cosine_similarity(*encoded["published"], dim=-1)
    assert others.mean() < 0.95  # different pictures are told apart
