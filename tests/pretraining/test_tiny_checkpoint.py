"""The embedded checkpoint: small, complete, and able to draw, answer and reconstruct."""

import json

import numpy as np
import pytest
from comfyui_blip3o.blip3o_core.pipeline import load_pipeline
from comfyui_blip3o.pretraining.cli import BUILT_IN_MODEL
from comfyui_blip3o.pretraining.world.captions import Request, Thing
from comfyui_blip3o.pretraining.world.checker import check_prompt, look, matches_scene
from comfyui_blip3o.pretraining.world.scenes import draw_scenes, render
from PIL import Image

ASKED = {
    "a red circle": Request((Thing("circle", "red"),), background="white"),
    "three cyan squares on a black background": Request((Thing("square", "cyan", 3),), background="black"),
    "a yellow star above a blue ring": Request(
        (Thing("star", "yellow"), Thing("ring", "blue")), "above", "white"
    ),
    "a green triangle and a purple square": Request((Thing("triangle", "green"), Thing("square", "purple"))),
}


@pytest.fixture(scope="module")
def pipeline():
    return load_pipeline(BUILT_IN_MODEL, device="cpu")


def test_all_files_together_stay_below_sixteen_megabytes():
    assert sum(path.stat().st_size for path in BUILT_IN_MODEL.rglob("*") if path.is_file()) <= 16_000_000


def test_it_draws_what_prompts_ask_for(pipeline):
    pictures = pipeline.generate(list(ASKED), seed=7, preset="fast").pictures
    right = [
        check_prompt(np.asarray(p), request) for p, request in zip(pictures, ASKED.values(), strict=True)
    ]
    assert sum(right) >= 3, right


def test_another_prompt_gives_another_picture(pipeline):
    pictures = pipeline.generate(["a red circle", "a blue star"], seed=7, preset="fast").pictures
    assert not check_prompt(np.asarray(pictures[1]), ASKED["a red circle"])


def test_it_answers_questions_about_pictures(pipeline):
    scenes = draw_scenes(200, 51, held_out=True)
    n = int(np.flatnonzero((scenes.group == 2) & (scenes.count == 3))[0])
    picture = Image.fromarray(render(scenes)[n])
    assert pipeline.ask("How many objects are there?", [[picture]]) == ["three"]
    assert pipeline.ask("What colour is the background?", [[picture]]) == [
        ("white", "black")[scenes.background[n]]
    ]


def test_its_own_score_prefers_the_picture_that_fits(pipeline):
    scenes = draw_scenes(60, 52)
    images = render(scenes)
    single = np.flatnonzero(scenes.group == 0)
    first, second = (Image.fromarray(images[n]) for n in (single[0], single[1]))
    caption = pipeline.caption([first])[0]
    fits, other = pipeline.score([first, second], caption)
    assert fits > 0.5 > other


def test_it_gives_pictures_back(pipeline):
    scenes = draw_scenes(6, 53, held_out=True)
    drawn = pipeline.vary([Image.fromarray(image) for image in render(scenes)], preset="fast").pictures
    same = [matches_scene(look(np.asarray(picture)), scenes, n) for n, picture in enumerate(drawn)]
    assert sum(same) >= 5, same


def test_its_card_holds_the_measured_scores():
    scores = json.loads((BUILT_IN_MODEL / "scores.json").read_text("utf-8"))
    card = (BUILT_IN_MODEL / "README.md").read_text("utf-8")
    assert f"**{scores['prompts']['overall']['correct']:.3f}**" in card
    assert f"**{scores['questions']['overall']:.3f}**" in card
