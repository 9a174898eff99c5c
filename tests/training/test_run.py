"""Runs from pictures to a proven file, on a tiny random checkpoint."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from comfyui_blip3o.blip3o_core import load_pipeline
from comfyui_blip3o.blip3o_core.drawing.sampling import FeatureSettings
from comfyui_blip3o.blip3o_core.errors import (
    BadInputError,
    MissingFilesError,
    TrainingDataError,
    WrongAdapterError,
)
from comfyui_blip3o.lora_training import run as run_module
from comfyui_blip3o.lora_training.config import parse_config, read_config
from comfyui_blip3o.lora_training.records import PHASES, Diverged, Interrupted, OutOfMemory
from comfyui_blip3o.lora_training.run import exit_code, train_lora
from lora_runs import TRIGGER, run_tree
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.write_checkpoint(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def finished(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, list[dict[str, Any]], Any]:
    """(config, events, result) of one whole run."""
    config = parse_config(run_tree(tmp_path_factory.mktemp("run"), model))
    events: list[dict[str, Any]] = []
    return config, events, train_lora(config, on_event=events.append)


def stop_at(step: int, events: list[dict[str, Any]]) -> Callable[[], bool]:
    return lambda: (
        sum(event["event"] == "step" for event in events) >= step - 1
        and any(event["event"] == "saved" for event in events)
    )


def test_a_run_leaves_the_files_that_its_contract_names(finished: Any) -> None:
    config, _, result = finished
    for name in ("config.yaml", "events.jsonl", "metrics.csv", "loss.png", "report.md", "scorecard.json"):
        assert (config.folder / name).stat().st_size > 0, name
    assert result.lora == config.folder / "final" / "it.safetensors"
    assert result.lora.is_file() and result.last.is_file()
    assert (config.folder / "samples" / "step_000003_0.png").is_file()
    assert read_config(config.folder / "config.yaml") == config


def test_events_name_every_phase_in_order_and_end_with_done(finished: Any) -> None:
    config, events, result = finished
    seen = list(dict.fromkeys(event["phase"] for event in events if event["event"] == "phase"))
    assert seen == [phase for phase in PHASES if phase != "fit"]
    assert [event["step"] for event in events if event["event"] == "step"] == [1, 2, 3]
    assert events[-1]["event"] == "done" and events[-1]["lora"] == str(result.lora)
    written = [json.loads(line) for line in (config.folder / "events.jsonl").read_text("utf-8").splitlines()]
    assert [event["event"] for event in written] == [event["event"] for event in events]


def test_the_scorecard_travels_inside_the_file(finished: Any) -> None:
    config, _, result = finished
    with safe_open(str(result.lora), framework="pt") as file:
        metadata = file.metadata()
    assert json.loads(metadata["blip3o.scorecard"]) == result.scorecard
    assert metadata["modelspec.trigger_phrase"] == TRIGGER
    assert json.loads((config.folder / "scorecard.json").read_text("utf-8")) == result.scorecard
    assert str(config.folder.parent) not in json.dumps(metadata)


def test_a_sample_picture_is_what_inference_draws_with_the_finished_file(finished: Any, model: Path) -> None:
    config, events, result = finished
    (event,) = [event for event in events if event["event"] == "sample"]
    pipeline = load_pipeline(model, device="cpu", dtype="fp32")
    pipeline.load_lora(result.lora)
    drawn = pipeline.generate(
        event["prompt"],
        seed=config.sample.seed,
        features=FeatureSettings(steps=config.sample.steps, guidance_scale=config.sample.cfg),
    ).pictures[0]
    shown = np.asarray(Image.open(event["path"])).astype(int)
    assert np.abs(np.asarray(drawn).astype(int) - shown).max() <= 1
    pipeline.unload_loras()
    plain = pipeline.generate(
        event["prompt"], seed=config.sample.seed, features=FeatureSettings(steps=config.sample.steps)
    ).pictures[0]
    assert np.abs(np.asarray(plain).astype(int) - shown).max() > 1


def test_a_stopped_run_leaves_a_usable_lora_and_ends_as_if_it_had_never_stopped(
    finished: Any, model: Path, tmp_path: Path
) -> None:
    config = parse_config(run_tree(tmp_path, model))
    events: list[dict[str, Any]] = []
    with pytest.raises(Interrupted, match="Run the same command again"):
        train_lora(config, on_event=events.append, should_stop=stop_at(2, events))
    assert events[-1]["event"] == "error" and events[-1]["code"] == 3
    usable = config.folder / "final" / "it_interrupted.safetensors"
    load_pipeline(model, device="cpu", dtype="fp32").load_lora(usable)
    result = train_lora(config)
    assert not usable.exists()
    straight, resumed = load_file(finished[2].lora), load_file(result.lora)
    assert straight.keys() == resumed.keys()
    assert all(torch.equal(straight[key], resumed[key]) for key in straight)


def test_a_stop_while_it_is_measured_also_leaves_a_file_that_can_be_used(model: Path, tmp_path: Path) -> None:
    config = parse_config(run_tree(tmp_path, model))
    events: list[dict[str, Any]] = []
    with pytest.raises(Interrupted):
        train_lora(
            config,
            on_event=events.append,
            should_stop=lambda: any(event.get("phase") == "prove" for event in events),
        )
    left = load_file(str(config.folder / "final" / "it_interrupted.safetensors"))
    finished = load_file(str(train_lora(config).lora))
    assert left.keys() == finished.keys()
    assert all(torch.equal(left[key], finished[key]) for key in left)


def test_large_networks_are_in_memory_one_at_a_time(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from comfyui_blip3o.blip3o_core.networks import Networks

    together: set[frozenset[str]] = set()
    load = Networks.get

    def watch(self: Networks, name: str) -> Any:
        network = load(self, name)
        together.add(frozenset(self.loaded))
        return network

    monkeypatch.setattr(Networks, "get", watch)
    train_lora(parse_config(run_tree(tmp_path, model)))
    assert {frozenset({name}) for name in ("image_encoder", "backbone", "dit")} <= together
    # While it trains, the DiT waits in host memory for the decoder to draw its samples.
    assert together - {frozenset({name}) for name in ("image_encoder", "backbone", "dit", "decoder")} <= {
        frozenset({"dit", "decoder"})
    }


def test_everything_wrong_with_the_pictures_is_told_at_once_before_anything_is_encoded(
    model: Path, tmp_path: Path
) -> None:
    config = parse_config(run_tree(tmp_path, model))
    (tmp_path / "pictures" / "picture_0.png").write_bytes(b"no picture")
    (tmp_path / "pictures" / "picture_1.txt").unlink()
    with pytest.raises(TrainingDataError) as told:
        train_lora(config)
    assert "picture_0.png" in str(told.value) and "picture_1.png" in str(told.value)
    assert not (tmp_path / "runs" / "cache").exists()


def test_other_settings_do_not_mix_with_what_a_run_has_learned(model: Path, tmp_path: Path) -> None:
    train_lora(parse_config(run_tree(tmp_path, model)), only=["check", "features", "conditioning", "fit"])
    other = parse_config(run_tree(tmp_path, model, adapter__rank=4))
    with pytest.raises(BadInputError, match=r"adapter\.rank"):
        train_lora(other)
    assert train_lora(other, fresh=True).steps == 3
    (tmp_path / "pictures" / "picture_1.txt").write_text("a [trigger] bird", "utf-8")
    with pytest.raises(BadInputError, match="dataset"):
        train_lora(other)


def test_more_steps_go_on_from_what_is_learned(model: Path, tmp_path: Path) -> None:
    train_lora(parse_config(run_tree(tmp_path, model)))
    events: list[dict[str, Any]] = []
    train_lora(parse_config(run_tree(tmp_path, model, train__steps=5)), on_event=events.append)
    assert [event["step"] for event in events if event["event"] == "step"] == [4, 5]


def test_a_phase_alone_says_what_it_lacks(model: Path, tmp_path: Path) -> None:
    config = parse_config(run_tree(tmp_path, model))
    with pytest.raises(MissingFilesError, match="blip3o lora cache"):
        train_lora(config, only=["fit"])
    with pytest.raises(BadInputError, match='"polish"'):
        train_lora(config, only=["polish"])
    train_lora(config, only=["features", "conditioning"])
    with pytest.raises(MissingFilesError, match="learned nothing yet"):
        train_lora(config, only=["prove"])
    train_lora(config, only=["fit"])
    assert not (config.folder / "final").exists()
    assert train_lora(config, only=["prove", "export"]).lora.is_file()


def test_a_file_that_does_not_do_what_the_trainer_did_is_no_success(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = run_module.save_lora

    def with_wrong_strength(path: Path, tensors: dict[str, torch.Tensor], *rest: Any) -> Path:
        wrong = {key: tensor * 3 if key.endswith(".alpha") else tensor for key, tensor in tensors.items()}
        return write(path, wrong, *rest)

    monkeypatch.setattr(run_module, "save_lora", with_wrong_strength)
    with pytest.raises(WrongAdapterError, match="does not do what the trainer did"):
        train_lora(parse_config(run_tree(tmp_path, model)))


@pytest.mark.parametrize(
    "settings",
    [
        {"adapter__type": "queries"},
        {"adapter__backbone_rank": 2},
        {"adapter__type": "dora"},
        {"adapter__type": "lokr"},
        {"adapter__type": "full", "train__optimizer__lr": 1e-4},
        {"save__formats": ["peft", "kohya", "diffusers"], "save__dtype": "bf16"},
    ],
    ids=["queries", "backbone", "dora", "lokr", "full", "formats"],
)
def test_every_kind_of_adapter_is_proven_and_its_file_does_the_same(
    settings: dict[str, Any], model: Path, tmp_path: Path
) -> None:
    config = parse_config(run_tree(tmp_path, model, **settings))
    result = train_lora(config)
    assert result.lora.is_file() and result.scorecard["drift"] != 0
    for kind in config.save.formats:
        assert list((config.folder / "final" / kind).rglob("*.safetensors"))


def test_exit_codes_tell_how_a_run_ended() -> None:
    errors = (Interrupted("x"), Diverged("x"), OutOfMemory("x"), BadInputError("x"))
    assert [exit_code(error) for error in errors] == [3, 4, 5, 2]


def test_tensorboard_gets_the_losses(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = parse_config(run_tree(tmp_path, model, monitor__tensorboard=True))
    events: list[dict[str, Any]] = []
    train_lora(config, on_event=events.append)
    board = EventAccumulator(str(config.folder / "tensorboard"))
    board.Reload()
    losses = [event["loss"] for event in events if event["event"] == "step"]
    assert [scalar.value for scalar in board.Scalars("step/loss")] == pytest.approx(losses)
