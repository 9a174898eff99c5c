"""What no training can change: the decoder's ceiling and how far a trigger moves the conditioning."""

from pathlib import Path

import pytest
import torch
from comfyui_blip3o.blip3o_core import load_pipeline
from comfyui_blip3o.blip3o_core.config import BUILT_IN_MODEL
from comfyui_blip3o.blip3o_core.pipeline import Blip3oPipeline
from comfyui_blip3o.lora_training.config import DataConfig
from comfyui_blip3o.lora_training.prompts import knows
from comfyui_blip3o.lora_training.proof.ceiling import (
    Ceiling,
    measure_ceiling,
    separability,
    suggest_triggers,
    trigger_separability,
)
from comfyui_blip3o.lora_training.records import Interrupted
from lora_concept import CLASS_WORD, LIGHTS, TRIGGER, concept_caption, concept_pictures, shows_concept
from PIL import Image, ImageDraw

OTHERS = ("three blue rings", "a red circle", "two green squares", "a yellow star above a blue cross")


@pytest.fixture(scope="module")
def pipeline() -> Blip3oPipeline:
    return load_pipeline(BUILT_IN_MODEL, device="cpu", dtype="fp32")


def test_the_decoder_can_show_the_concept_but_no_ground_that_it_never_saw(pipeline: Blip3oPipeline) -> None:
    orange = Image.new("RGB", (128, 128), (250, 205, 10))
    ImageDraw.Draw(orange).line((10, 10, 118, 118), fill=(30, 70, 230), width=12)
    progress: list[tuple[int, int]] = []
    ceiling = measure_ceiling(
        pipeline,
        [*concept_pictures(2), orange],
        names=["one", "two", "three"],
        on_progress=lambda done, total: progress.append((done, total)),
    )
    assert min(ceiling.cosines[:2]) > 0.95 > max(ceiling.cosines[2:]) + 0.1
    assert [shows_concept(picture) for picture in ceiling.decoded] == [True, True, False]
    assert progress == [(1, 3), (2, 3), (3, 3)]
    assert "Hardly recognisable after decoding: three" in ceiling.text() or ceiling.cosines[2] >= 0.75


def test_the_sheet_puts_each_original_beside_what_is_left_of_it() -> None:
    pictures = tuple(Image.new("RGB", (8, 8), colour) for colour in ("red", "blue"))
    sheet = Ceiling(("a", "b"), pictures, pictures[::-1], (0.9, 0.5)).sheet(columns=1)
    assert sheet.getpixel((20, 20)) == (255, 0, 0) and sheet.getpixel((sheet.width - 20, 20)) == (0, 0, 255)


def test_a_wish_to_stop_is_heard_between_pictures(pipeline: Blip3oPipeline) -> None:
    with pytest.raises(Interrupted, match="after 0 of 2"):
        measure_ceiling(pipeline, concept_pictures(2), should_stop=lambda: True)


def test_a_trigger_that_changes_nothing_has_no_separability() -> None:
    z = torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(0))
    found = separability(z, z, z)
    assert found.score == 0 and found.level == "none" and "Choose another" in found.text
    usual = torch.pdist(z.flatten(1)).mean().item()
    moved = z + torch.nn.functional.normalize(torch.ones(1, 4, 8).flatten(1), dim=1).view(1, 4, 8) * usual
    assert separability(moved, z, z).score == pytest.approx(1, abs=1e-4)


def test_words_the_model_knows_separate_and_an_unknown_word_does_not(pipeline: Blip3oPipeline) -> None:
    def score(words: str, instead: str) -> float:
        prompts = [
            [concept_caption(kind, words=each) for kind in ("circle", "star")] for each in (words, instead)
        ]
        return trigger_separability(pipeline, *prompts, OTHERS).score

    assert score(TRIGGER, CLASS_WORD) > 0.25 > score("ohwx", "zwx")
    assert knows(pipeline.tokenizer, TRIGGER) and not knows(pipeline.tokenizer, "ohwx circle")


def test_suggested_triggers_are_known_and_ordered_by_how_far_they_move(pipeline: Blip3oPipeline) -> None:
    config = DataConfig(path=Path("."), trigger="ohwx", class_word=CLASS_WORD)
    found = suggest_triggers(pipeline, config, [concept_caption("circle"), concept_caption("star")], OTHERS)
    scores = [score for _, score in found]
    assert found and scores == sorted(scores, reverse=True)
    assert all(knows(pipeline.tokenizer, trigger) for trigger, _ in found)
    assert all("ohwx" not in trigger for trigger, _ in found) and LIGHTS[0] in found[0][0]
