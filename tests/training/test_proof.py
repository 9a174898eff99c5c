"""The built-in model learns a thing it was never shown; pixels are the judge, and pictures without sense teach nothing."""

from pathlib import Path

import pytest
from comfyui_blip3o.blip3o_core import load_pipeline
from comfyui_blip3o.blip3o_core.config import BUILT_IN_MODEL
from comfyui_blip3o.blip3o_core.pipeline import Blip3oPipeline
from comfyui_blip3o.lora_training.config import parse_config
from comfyui_blip3o.lora_training.run import train_lora
from comfyui_blip3o.pretraining.world.scenes import COLOURS, KINDS
from lora_concept import (
    LIGHTS,
    TRIGGER,
    concept_caption,
    concept_pictures,
    concept_tree,
    probe_set,
    shows_concept,
    train_probe,
    write_concept,
)

ENOUGH = ("check", "features", "conditioning", "fit", "export")
SHORT = {
    "train__steps": 25,
    "train__prior__dop": False,
    "train__ema": 0,
    "validate__every": 0,
    "sample__prompts": [],
}


@pytest.fixture(scope="module")
def pipeline() -> Blip3oPipeline:
    return load_pipeline(BUILT_IN_MODEL, device="cpu", dtype="fp32")


def recognised(pipeline: Blip3oPipeline, lora: Path | None = None) -> int:
    """Of one trigger prompt for each of the six kinds."""
    pipeline.unload_loras()
    if lora is not None:
        pipeline.load_lora(lora)
    prompts = [concept_caption(kind, words=TRIGGER) for kind in KINDS]
    drawn = pipeline.generate(prompts, seed=5, preset="fast").pictures
    pipeline.unload_loras()
    return sum(shows_concept(picture, kind, "white") for picture, kind in zip(drawn, KINDS, strict=True))


def trained(folder: Path, *, shuffled: bool) -> Path:
    data = write_concept(folder / "pictures", shuffled=shuffled)
    return train_lora(parse_config(concept_tree(data, folder / "runs", **SHORT)), only=ENOUGH).lora


@pytest.mark.slow
def test_a_short_training_teaches_the_concept_that_the_model_did_not_know(
    pipeline: Blip3oPipeline, tmp_path: Path
) -> None:
    assert recognised(pipeline) == 0
    assert recognised(pipeline, trained(tmp_path, shuffled=False)) >= 5


@pytest.mark.slow
def test_scrambled_pictures_teach_nothing(pipeline: Blip3oPipeline, tmp_path: Path) -> None:
    assert recognised(pipeline, trained(tmp_path, shuffled=True)) == 0


def test_the_judge_wants_every_light_at_its_place() -> None:
    assert all(shows_concept(picture) for picture in concept_pictures(12, seed=3))
    for colours in (LIGHTS[::-1], ("red", "yellow", "blue"), ("red", "red", "red")):
        assert not any(shows_concept(picture) for picture in concept_pictures(6, colours=colours))
    assert not shows_concept(concept_pictures(1)[0], kind="star")
    assert not shows_concept(concept_pictures(1)[0], ground="black")
    assert set(LIGHTS) <= set(COLOURS)


def test_the_probe_tells_the_concept_from_known_scenes_and_mostly_from_its_nearest_kin(
    pipeline: Blip3oPipeline,
) -> None:
    probe = train_probe(*probe_set(pipeline.encode_images, 120, 0))
    features, _ = probe_set(pipeline.encode_images, 60, 9000)  # renderings that it never saw
    concept, kin, known = (probe(features) > 0).float().chunk(3)
    assert concept.mean() >= 0.95
    assert known.mean() <= 0.1
    assert kin.mean() <= 0.45
