"""Long lists of prompts and pictures: the first pictures do not wait for what only the last ones need."""

from typing import Any

import pytest
import tiny_models
import torch
from comfyui_blip3o.blip3o_core.drawing.decoding import PixelSettings
from comfyui_blip3o.blip3o_core.drawing.request import DrawRequest
from comfyui_blip3o.blip3o_core.drawing.sampling import FeatureSettings
from comfyui_blip3o.blip3o_core.pipeline import Blip3oPipeline, load_pipeline

WORDS = ("red", "blue", "green", "two dogs", "a cat")
QUICK = {
    "features": FeatureSettings(steps=2),
    "pixels": PixelSettings(steps=2),
    "pixel_negative": None,
}


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """What is encoded, and how many in one call."""
    calls: list[tuple[str, int]] = []

    def watch(name: str) -> None:
        original = getattr(Blip3oPipeline, name)

        def watched(self: Blip3oPipeline, things: Any, *rest: Any, **options: Any) -> Any:
            calls.append((name, len(things)))
            return original(self, things, *rest, **options)

        monkeypatch.setattr(Blip3oPipeline, name, watched)

    watch("encode_prompts")
    watch("encode_images")
    return calls


def test_a_prompt_is_encoded_when_its_batch_comes(
    pipeline: Blip3oPipeline, told: list[tuple[str, int]]
) -> None:
    drawn = pipeline.draw(DrawRequest(WORDS, batch_size=2, **QUICK))
    seen = [len(told) for _ in drawn]
    assert seen == [1, 2, 3]
    assert [count for _, count in told] == [2, 2, 1]


def test_a_prompt_of_many_pictures_is_encoded_once(
    pipeline: Blip3oPipeline, told: list[tuple[str, int]]
) -> None:
    list(pipeline.draw(DrawRequest(WORDS[:2], images_per_prompt=5, batch_size=2, **QUICK)))
    assert sum(count for _, count in told) == 2


def test_pictures_to_start_from_are_encoded_when_their_batch_comes(
    pipeline: Blip3oPipeline, told: list[tuple[str, int]]
) -> None:
    pictures = tuple(tiny_models.picture(seed=seed) for seed in range(3))
    drawn = pipeline.draw(DrawRequest(("",) * 3, start_pictures=pictures, batch_size=1, **QUICK))
    assert [len(told) for _ in drawn] == [1, 2, 3]


def test_with_offload_the_backbone_comes_once_for_several_batches(
    tiny_folder: Any, told: list[tuple[str, int]]
) -> None:
    offloading = load_pipeline(tiny_folder, dtype="fp32", device="cpu", offload=True)
    drawn = offloading.draw(DrawRequest(WORDS * 4, batch_size=2, **QUICK))
    next(drawn)
    assert told == [("encode_prompts", 16)]
    assert len(list(drawn)) == 9
    assert told[1:] == [("encode_prompts", 4)]


@pytest.mark.parametrize("offload", [False, True])
def test_every_picture_of_a_long_list_equals_the_one_drawn_alone(tiny_folder: Any, offload: bool) -> None:
    pipeline = load_pipeline(tiny_folder, dtype="fp32", device="cpu", offload=offload)
    together = pipeline.generate(WORDS, images_per_prompt=3, batch_size=4, seed=11, **QUICK)
    pictures = tuple(tiny_models.picture(seed=seed) for seed in range(3))
    varied = pipeline.vary(pictures, prompt="red", strength=0.5, count=3, batch_size=2, seed=11, **QUICK)
    for place in range(15):
        alone = pipeline.generate(WORDS[place // 3], seed=11 + place, **QUICK)
        torch.testing.assert_close(alone.images[0], together.images[place], atol=1e-4, rtol=0)
    for place in range(9):
        alone = pipeline.vary([pictures[place // 3]], prompt="red", strength=0.5, seed=11 + place, **QUICK)
        torch.testing.assert_close(alone.images[0], varied.images[place], atol=1e-4, rtol=0)
