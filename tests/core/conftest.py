"""Folders and pipelines that many core tests read and none changes."""

from pathlib import Path

import pytest
import tiny_models
import torch
from reference_set import build_reference

# One thread: the networks are tiny, and two threads that wait for each other are slower than one.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The published reference folder; read only."""
    return build_reference(tmp_path_factory.mktemp("published") / "reference")


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint of the default sizes; read only."""
    return tiny_models.write_checkpoint(tmp_path_factory.mktemp("tiny") / "tiny")


@pytest.fixture(scope="session")
def pipeline(tiny_folder: Path):
    """A loaded pipeline of the tiny checkpoint in float32 on the CPU; tests leave it as they find it."""
    from comfyui_blip3o.blip3o_core.pipeline import load_pipeline

    return load_pipeline(tiny_folder, dtype="fp32", device="cpu")


@pytest.fixture
def model(tiny_folder: Path) -> list[str]:
    """Options of the command line that name the tiny checkpoint."""
    return ["--model", str(tiny_folder), "--dtype", "fp32", "--device", "cpu"]


@pytest.fixture
def picture(tmp_path: Path) -> str:
    """Path of a picture to give to the command line."""
    path = tmp_path / "given.png"
    tiny_models.picture().save(path)
    return str(path)


@pytest.fixture
def nothing_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails a test that reads a network."""
    from comfyui_blip3o.blip3o_core.networks import Networks

    monkeypatch.setattr(Networks, "get", lambda self, name: pytest.fail(f"{name} was read"))
