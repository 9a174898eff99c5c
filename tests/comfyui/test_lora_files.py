"""LoRA files inside ComfyUI: its stock loader and our node compute what the trainer and the core do."""

import os
import subprocess
from pathlib import Path

import pytest
import tiny_models
import torch
from comfyui_blip3o.blip3o_core.lora.files import LoraFile
from comfyui_blip3o.lora_training.files.convert import save_as
from comfyui_blip3o.lora_training.files.write import save_lora
from comfyui_server import COMFYUI, ROOT, comfyui_python
from lora_files import KINDS, open_pipeline, trained, velocity
from safetensors.torch import load_file
from torch import Tensor

SCRIPT = Path(__file__).parent / "inside" / "loras.py"
# ComfyUI's own loader changes the DiT alone.
ON_THE_DIT = [
    kind for kind in KINDS if kind not in ("full", "queries", "backbone", "lora, queries and backbone")
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.write_checkpoint(tmp_path_factory.mktemp("tiny") / "tiny")


@pytest.fixture(scope="module")
def learned(folder: Path) -> dict[str, tuple[dict[str, Tensor], Tensor]]:
    return {kind: trained(folder, kind) for kind in KINDS}


@pytest.fixture(scope="module")
def computed(
    folder: Path,
    learned: dict[str, tuple[dict[str, Tensor], Tensor]],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Tensor]:
    """What ComfyUI computed with a file of each kind, in our naming and in kohya's."""
    loras, result = tmp_path_factory.mktemp("loras"), tmp_path_factory.mktemp("result") / "result.safetensors"
    for kind, (tensors, _) in learned.items():
        save_lora(loras / f"{kind}.safetensors", tensors, {}, "fp32")
        save_as(LoraFile(kind, tensors), loras / f"{kind} kohya.safetensors", "kohya", dtype="fp32")
    run = subprocess.run(
        [comfyui_python(), str(SCRIPT), *map(str, (COMFYUI, ROOT, folder, loras, result))],
        cwd=COMFYUI,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert result.is_file(), run.stderr[-4000:]
    return load_file(result)


def assert_same(found: Tensor, expected: Tensor, plain: Tensor) -> None:
    assert (expected - plain).abs().max() > 1e-2
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("naming", ["", " kohya"])
@pytest.mark.parametrize("kind", ON_THE_DIT)
def test_the_stock_loader_computes_what_the_trainer_did(learned, computed, kind: str, naming: str):
    assert_same(computed[f"stock 1.0 {kind}{naming}"], learned[kind][1], computed["none"])


@pytest.mark.parametrize("naming", ["", " kohya"])
def test_of_a_full_finetune_the_stock_loader_leaves_only_the_gates_out(
    folder: Path, learned, computed, naming: str
):
    # ComfyUI patches the weights of layers, and a gate is a parameter beside them.
    layers = {key: tensor for key, tensor in learned["full"][0].items() if ".gate." not in key}
    pipeline = open_pipeline(folder)
    pipeline.load_lora(LoraFile("full", layers))
    assert_same(computed[f"stock 1.0 full{naming}"], velocity(pipeline), computed["none"])


@pytest.mark.parametrize("naming", ["", " kohya"])
@pytest.mark.parametrize("kind", KINDS)
def test_our_node_computes_what_the_trainer_did(learned, computed, kind: str, naming: str):
    assert_same(computed[f"node 1.0 {kind}{naming}"], learned[kind][1], computed["none"])


@pytest.mark.parametrize("kind", KINDS)
def test_the_core_and_the_node_agree_at_half_strength(folder: Path, learned, computed, kind: str):
    pipeline = open_pipeline(folder)
    pipeline.load_lora(LoraFile(kind, learned[kind][0]), 0.5)
    assert_same(computed[f"node 0.5 {kind}"], velocity(pipeline), computed["none"])


def test_the_model_is_as_before_without_the_loras(computed):
    assert torch.equal(computed["none"], computed["none again"])
