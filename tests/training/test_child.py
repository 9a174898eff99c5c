"""Training in a process of its own, started by file path."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_models
import torch
from comfyui_blip3o.blip3o_core import load_pipeline
from comfyui_blip3o.blip3o_core.errors import BadInputError, Blip3oError
from comfyui_blip3o.lora_training.child import start_training
from comfyui_blip3o.lora_training.cli import main as lora
from comfyui_blip3o.lora_training.config import parse_config
from comfyui_blip3o.lora_training.records import Interrupted
from lora_runs import run_tree, write_run
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.write_checkpoint(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def test_a_child_learns_the_same_as_the_command_line_to_the_bit(model: Path, tmp_path: Path) -> None:
    with start_training(run_tree(tmp_path / "child", model)) as process:
        events = list(process.events())
        result = process.result()
    assert events[-1]["event"] == "done" and events[-1]["lora"] == str(result.lora)
    assert [event["step"] for event in events if event["event"] == "step"] == [1, 2, 3]
    assert lora(["run", str(write_run(tmp_path / "here", model)), "--quiet"]) == 0
    there, here = (
        load_file(tmp_path / place / "runs" / "it" / "final" / "it.safetensors")
        for place in ("child", "here")
    )
    assert there.keys() == here.keys() and all(torch.equal(there[key], here[key]) for key in here)
    assert result.scorecard["step"] == 3 and result.report.is_file()


def test_a_child_asked_to_stop_leaves_a_usable_lora(model: Path, tmp_path: Path) -> None:
    config = parse_config(run_tree(tmp_path, model, train__steps=5000))
    with start_training(config) as process:
        for event in process.events():
            if event["event"] == "step":
                process.stop()
        with pytest.raises(Interrupted, match="what it has learned is saved"):
            process.result()
    assert process.wait() == 3
    usable = config.folder / "final" / "it_interrupted.safetensors"
    load_pipeline(model, device="cpu", dtype="fp32").load_lora(usable)


def test_a_mistake_comes_back_with_its_own_words(model: Path, tmp_path: Path) -> None:
    tree = run_tree(tmp_path, model)
    shutil.rmtree(tmp_path / "pictures")
    with start_training(tree) as process, pytest.raises(Blip3oError, match="There is no training set"):
        process.result()
    with pytest.raises(BadInputError, match="unknown"):
        start_training({**tree, "training": {}})


def test_a_child_that_is_killed_is_told_of(model: Path, tmp_path: Path) -> None:
    with start_training(run_tree(tmp_path, model, train__steps=5000)) as process:
        next(event for event in process.events() if event["event"] == "step")
        process.kill()
        with pytest.raises(Blip3oError, match="ended without a word"):
            process.result()


def test_it_runs_from_a_folder_of_any_name_that_is_not_installed(model: Path, tmp_path: Path) -> None:
    pack = tmp_path / "My nodes (copy)"
    pack.mkdir()
    shutil.copy(ROOT / "__init__.py", pack)
    for name in ("blip3o_core", "lora_training"):
        shutil.copytree(ROOT / name, pack / name, ignore=shutil.ignore_patterns("__pycache__", "assets"))
    config = write_run(tmp_path / "run", model)
    done = subprocess.run(
        [
            sys.executable,
            "-W",
            "ignore",
            str(pack / "lora_training" / "child.py"),
            str(config),
            "--only",
            "check",
        ],
        cwd=tmp_path,
        env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    phases = [json.loads(line)["phase"] for line in done.stdout.splitlines() if '"phase"' in line]
    assert set(phases) == {"check"}
