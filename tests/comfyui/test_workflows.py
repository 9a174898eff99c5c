"""Every shipped graph on the built-in model: pictures judged by the rule-based checker, answers by their words."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from api_graphs import QUICK_TRAINING
from comfyui_server import ROOT, Server
from PIL import Image

API = ROOT / "tests" / "workflows" / "api"
WORKFLOWS = sorted(path.stem for path in API.glob("*.json"))
# Graph -> (node title or class, shape, colour) of pictures with one object; None = any.
PICTURES = {
    "text_to_image": [("SaveImage", "circle", "red")],
    "text_to_image_ksampler": [("SaveImage", "circle", "red")],
    "batch_and_seeds": [("SaveImage", "square", "blue"), ("PreviewImage", "square", "blue")],
    "ask_about_image": [("PreviewImage", "triangle", "green")],
    "caption_folder": [("PreviewImage", "square", "yellow")],
    "chat": [("PreviewImage", "circle", "red")],
    "image_variation": [("BLIP3o/variation", "circle", "red"), ("BLIP3o/variation_prompt", "circle", "blue")],
    "blend_two_images": [("BLIP3o/blend", None, None), ("BLIP3o/collage", None, None)],
    "instruction_edit": [("SaveImage", "circle", "blue")],
    "best_of_n": [("SaveImage", "circle", "red")],
    "prompt_rewrite": [("SaveImage", "circle", "red")],
    "hires_fix": [("SaveImage", "circle", "red")],
    "lora_generate": [("SaveImage", "circle", "red")],
    "lora_train_with_core_nodes": [("SaveImage", None, None)],
    "train_lora": [("SaveImage", None, None)],
    "compare_strengths": [("SaveImage", None, None)],
    "merge_loras": [("SaveImage", None, None)],
}
# Values that make a training graph short; what it learns is judged elsewhere.
SHORT = {
    "BLIP3oTrainLora": {"steps": 4},
    "BLIP3oTrainingSettings": {
        "rank": 4,
        "sample_every": 0,
        "more": QUICK_TRAINING,
    },
    "BLIP3oCheckDataset": {"pictures": 1, "steps": 5},
    "BLIP3oCompareStrengths": {"feature_steps": 10, "pixel_steps": 10},
}
ANSWERS = {
    "ask_about_image": {"BLIP3oAsk": ["triangle"], "BLIP3oChoose": ["yes"]},
    "caption_folder": {"BLIP3oCaption": ["yellow square"]},
    "chat": {"BLIP3oChat": ["circle", "red"]},
    "prompt_rewrite": {"BLIP3oRewritePrompt": ["red circle"]},
    "best_of_n": {"BLIP3oBestOf": ["sure"]},
}
SECONDS = 60


@pytest.fixture(scope="module")
def runs(server: Server, checkpoint: str) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """Graph and outputs of every workflow; each must succeed."""
    if checkpoint != "built-in: tiny":
        pytest.skip("THE BUILT-IN MODEL IS MISSING: the workflows' pictures were NOT checked")
    found = {}
    for name in WORKFLOWS:
        graph = json.loads((API / f"{name}.json").read_text("utf-8"))
        for node in graph.values():
            node["inputs"] |= SHORT.get(node["class_type"], {})
        found[name] = graph, server.run(graph)
    return found


def pictures(server: Server, graph: dict[str, Any], outputs: dict[str, Any], what: str) -> list[np.ndarray]:
    """Pictures of the nodes of a class, or that save under a prefix."""
    found = []
    for identifier, node in graph.items():
        if what in (node["class_type"], node["inputs"].get("filename_prefix")):
            for reference in outputs[identifier]["images"]:
                image = Image.open(io.BytesIO(server.image(reference))).convert("RGB")
                found.append(np.asarray(image.resize((128, 128), Image.Resampling.LANCZOS)))
    return found


def test_every_workflow_is_judged():
    assert set(PICTURES) == set(WORKFLOWS)


@pytest.mark.parametrize("name", WORKFLOWS)
def test_the_pictures_show_what_was_asked_for(server: Server, runs: dict[str, Any], name: str):
    from comfyui_blip3o.pretraining.world.checker import look

    for what, kind, colour in PICTURES[name]:
        found = pictures(server, *runs[name], what)
        assert found
        for picture in found:
            report = look(picture)
            assert len(report.objects) >= 1
            if kind is not None:
                assert [(seen.kind, seen.colour) for seen in report.objects] == [(kind, colour)]


def test_core_teaches_the_example_with_our_training_set(server: Server, runs: dict[str, Any]):
    from lora_concept import shows_concept

    before, after = (
        pictures(server, *runs["lora_train_with_core_nodes"], what)[0]
        for what in ("PreviewImage", "SaveImage")
    )
    assert shows_concept(Image.fromarray(after), "circle", "white")
    assert not shows_concept(Image.fromarray(before))


@pytest.mark.parametrize("name", ANSWERS)
def test_the_answers_are_right(runs: dict[str, Any], name: str):
    graph, outputs = runs[name]
    for class_type, words in ANSWERS[name].items():
        identifiers = sorted((i for i, node in graph.items() if node["class_type"] == class_type), key=int)
        text = " ".join("".join(outputs[identifier]["text"]) for identifier in identifiers)
        for word in words:
            assert word in text


def test_captions_are_saved_beside_the_pictures(runs: dict[str, Any], base: Path):
    assert runs
    folder = base / "output" / "BLIP3o_captions"
    captions = sorted(folder.glob("*.txt"))
    assert len(captions) == 3
    for caption in captions:
        assert caption.with_suffix(".png").is_file() and "yellow square" in caption.read_text("utf-8")


def test_a_seed_gives_the_same_picture_in_and_out_of_a_batch(server: Server, runs: dict[str, Any]):
    batch = pictures(server, *runs["batch_and_seeds"], "SaveImage")
    (alone,) = pictures(server, *runs["batch_and_seeds"], "PreviewImage")
    assert np.abs(batch[2].astype(int) - alone.astype(int)).max() <= 2
    assert np.abs(batch[1].astype(int) - alone.astype(int)).max() > 2
