"""Scores: a painter that does as told gets everything, one that does not gets nothing, and files hold what was measured."""

import json
from types import SimpleNamespace

import numpy as np
from comfyui_blip3o.pretraining.evaluation.geneval import CATEGORIES, category_prompts, score_prompts, summary
from comfyui_blip3o.pretraining.evaluation.scores import evaluate
from comfyui_blip3o.pretraining.world.captions import OPENINGS
from comfyui_blip3o.pretraining.world.scenes import (
    BACKGROUNDS,
    COLOURS,
    KINDS,
    RELATIONS,
    SIZES,
    draw_scenes,
    place,
    render,
)
from PIL import Image

PROMPTS = {
    prompt.text: prompt.request for category in CATEGORIES for prompt in category_prompts(category, 4, seed=0)
}


def paint(request, seed):
    """A picture of what a request asks for."""
    scene = draw_scenes(1, 0)
    things = [thing for thing in request.things for _ in range(thing.number)]
    scene.kind[:], scene.colour[:] = -1, -1
    for k, thing in enumerate(things):
        scene.kind[0, k] = KINDS.index(thing.kind)
        scene.colour[0, k] = COLOURS.index(thing.colour or "blue")
    scene.group[0] = 0 if len(things) == 1 else 1 if len(request.things) == 2 else 2
    scene.relation[0] = RELATIONS.index(request.relation or "left of") if scene.group[0] == 1 else -1
    scene.size[0] = SIZES.index(request.size or "medium")
    scene.background[0] = BACKGROUNDS.index(request.background or "white")
    place(scene, np.random.default_rng(seed))
    return Image.fromarray(render(scene)[0])


class Painter:
    """Stands where a pipeline does: paints what is asked, or an empty sheet on chosen seeds."""

    files = SimpleNamespace(name="painter")

    def __init__(self, fails=lambda seed: False):
        self.fails = fails

    def generate(self, prompts, *, images_per_prompt, seed, preset, batch_size):
        texts = [text for text in prompts for _ in range(images_per_prompt)]
        seeds = [seed + n for n in range(len(texts))]
        empty = Image.new("RGB", (128, 128), "white")
        pictures = [
            empty if self.fails(s) else paint(PROMPTS[t], s) for t, s in zip(texts, seeds, strict=True)
        ]
        return SimpleNamespace(pictures=pictures, seeds=seeds)

    def score(self, pictures, statement):
        assert not statement.startswith([opening for opening in OPENINGS if opening.startswith("there")][0])
        return [float(np.asarray(picture).min() < 255) for picture in pictures]

    def ask(self, questions, pictures, *, settings):
        return ["yes"] * len(questions)

    def vary(self, pictures, *, seed, preset):
        return SimpleNamespace(pictures=[picture.copy() for picture in pictures])


def prompts():
    return [prompt for category in CATEGORIES for prompt in category_prompts(category, 4, seed=0)]


def test_a_perfect_painter_scores_one_in_every_category_and_an_empty_sheet_nothing():
    table = summary(score_prompts(Painter(), prompts(), seed=0))
    assert {name: entry["correct"] for name, entry in table["categories"].items()} == dict.fromkeys(
        CATEGORIES, 1.0
    )
    assert table["overall"]["correct"] == 1.0
    nothing = summary(score_prompts(Painter(lambda seed: True), prompts(), seed=0))
    assert nothing["overall"]["correct"] == 0.0


def test_the_best_of_two_by_the_models_own_score_beats_the_first():
    rows = score_prompts(Painter(lambda seed: seed % 2 == 0), prompts(), seed=0, best_of=2)
    table = summary(rows)
    assert table["overall"] == {"correct": 1.0, "single": 0.0}
    assert all(row["seed"] % 2 == 1 for row in rows)


def test_an_evaluation_writes_json_tables_and_grids(tmp_path):
    result = evaluate(Painter(), tmp_path, prompts=4, scenes=12)
    assert json.loads((tmp_path / "scores.json").read_text())["prompts"]["overall"]["correct"] == 1.0
    table = (tmp_path / "scores.md").read_text()
    assert "| counting | 4 | 1.000 |" in table and "| **overall** | | **1.000** |" in table
    assert Image.open(tmp_path / "prompts.png").width > 4 * 128
    assert result["reconstruction"]["overall"] == 1.0
    types = result["questions"]["types"]
    assert types["background"]["correct"] == 0.0  # "yes" is no colour
    assert 0.0 < types["match"]["correct"] < 1.0
