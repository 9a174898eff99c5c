"""Training on pictures with captions: the published recipe on a checkpoint, resumed exactly, everything else frozen."""

import numpy as np
import pytest
import torch
from comfyui_blip3o.blip3o_core.config import BUILT_IN_MODEL
from comfyui_blip3o.blip3o_core.pipeline import load_pipeline
from comfyui_blip3o.pretraining.cli import main
from comfyui_blip3o.pretraining.data_sources import SampleStream
from comfyui_blip3o.pretraining.stages.image_text import ImageTextBatches, ImageTextStage
from PIL import Image


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for n, colour in enumerate(("red", "green", "blue", "white")):
        Image.new("RGB", (64 + 8 * n, 80), colour).save(folder / f"{n}.png")
        (folder / f"{n}.txt").write_text(f"a picture that is {colour}")
    return folder


def train(run, pictures, *more):
    arguments = ["pretrain", "image-text", "--run", str(run), "--data", str(pictures), "--batch-size", "2"]
    assert main([*arguments, "--steps", "4", "--learning-rate", "1e-3", *more]) == 0
    return torch.load(run / "image-text" / "state.pt", weights_only=True)


def test_a_resumed_run_equals_a_whole_one_and_its_checkpoint_differs_only_where_it_learns(tmp_path, pictures):
    whole = train(tmp_path / "whole", pictures)
    train(tmp_path / "parts", pictures, "--stop-at", "2")
    parts = train(tmp_path / "parts", pictures)
    assert whole["model"].keys() == parts["model"].keys()
    for name, tensor in whole["model"].items():
        torch.testing.assert_close(tensor, parts["model"][name], rtol=0, atol=1e-6)
    before = load_pipeline(BUILT_IN_MODEL, device="cpu")
    after = load_pipeline(tmp_path / "whole" / "checkpoint", device="cpu")
    for part in ("backbone", "image_encoder", "decoder", "dit"):
        old, new = getattr(before, part).state_dict(), getattr(after, part).state_dict()
        changed = {name for name in old if not torch.equal(old[name], new[name])}
        if part == "dit":
            assert len(changed) > 10
        else:
            assert changed <= {"latent_queries"}


def test_only_latent_queries_and_dit_learn(pictures):
    pipeline = load_pipeline(BUILT_IN_MODEL, device="cpu")
    stage = ImageTextStage(pipeline)
    learning = {name.split(".")[0] for name, p in stage.named_parameters() if p.requires_grad}
    assert learning == {"backbone", "dit"}
    assert [n for n, p in stage.backbone.named_parameters() if p.requires_grad] == ["latent_queries"]


def batches(pipeline, pictures):
    return ImageTextBatches(
        SampleStream(pictures, seed=0),
        pipeline.tokenizer,
        image_size=pipeline.image_encoder.config.image_size,
        noise_shape=pipeline.noise_shape,
        batch_size=3,
        drop=0.1,
        seed=0,
    )


def test_a_stream_that_skips_ahead_gives_the_batch_of_that_step(pictures):
    pipeline = load_pipeline(BUILT_IN_MODEL, device="cpu")
    steady = batches(pipeline, pictures)
    for step in range(3):
        expected = steady(step)
    skipped = batches(pipeline, pictures)(2)
    for name in expected:
        assert torch.equal(expected[name], skipped[name])


def test_both_objectives_give_a_loss_and_they_differ(pictures):
    pipeline = load_pipeline(BUILT_IN_MODEL, device="cpu")
    batch = batches(pipeline, pictures)(0)
    losses = [ImageTextStage(pipeline, objective)(batch)[0].item() for objective in ("flow", "mse")]
    assert np.isfinite(losses).all() and losses[0] != losses[1]


def test_missing_data_is_said_before_anything_is_loaded(tmp_path, capsys):
    assert main(["pretrain", "image-text", "--run", str(tmp_path)]) == 2
    assert "--data" in capsys.readouterr().err
