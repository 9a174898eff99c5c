"""The benchmark of the published sizes: what it writes is the published layout, what it measures is right."""

import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from comfyui_blip3o.blip3o_core.checkpoints.keys import to_published_key
from comfyui_blip3o.blip3o_core.checkpoints.layout import open_checkpoint
from comfyui_blip3o.blip3o_core.checkpoints.load import (
    load_backbone,
    load_decoder,
    load_dit,
    load_image_encoder,
)
from published_shapes import published_networks
from safetensors import safe_open
from safetensors.torch import load_file

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
DECODER_FILE = "diffusion_pytorch_model.bf16.safetensors"
needs_linux = pytest.mark.skipif(
    not Path("/proc/self/io").exists(), reason="reads Linux's account of processes"
)


@pytest.fixture(scope="module")
def synthetic() -> Iterator[ModuleType]:
    yield from benchmark_module("synthetic")


@pytest.fixture(scope="module")
def processes() -> Iterator[ModuleType]:
    yield from benchmark_module("processes")


@pytest.fixture(scope="module")
def true_size() -> Iterator[ModuleType]:
    yield from benchmark_module("true_size")


def benchmark_module(name: str) -> Iterator[ModuleType]:
    """A file of benchmarks/, which is no package; its neighbours are importable while a test runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield __import__(name)


@pytest.fixture
def written(synthetic: ModuleType, tmp_path: Path) -> Path:
    """The tiny checkpoint with leftovers."""
    synthetic.write_checkpoint(synthetic.plan_checkpoint("tiny"), tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def shards_of(plan: Any) -> dict[str, Any]:
    """Name -> shape of everything in the main shards of a plan."""
    return {
        key: shape
        for name, shapes in plan.weights.items()
        if "/" not in name
        for key, shape in shapes.items()
    }


def test_the_8b_holds_what_the_published_one_does_and_the_leftovers(synthetic: ModuleType) -> None:
    plan = synthetic.plan_checkpoint("8b")
    networks = published_networks()
    decoder = networks.pop("decoder")
    expected = {
        to_published_key(component, key): tuple(tensor.shape)
        for component, network in networks.items()
        for key, tensor in network.state_dict().items()
    }
    found = shards_of(plan)
    leftovers = [key for key in found if key.startswith("model.vae.")]
    assert {key: found[key].shape for key in expected} == expected and "lm_head.weight" in expected
    assert set(found) - set(expected) == {*leftovers, "model.layers.0.self_attn.rotary_emb.inv_freq"}
    # FLUX.1's VAE: https://huggingface.co/black-forest-labs/FLUX.1-dev has 244 tensors of 83.8 M values.
    assert len(leftovers) == 244 and plan.parameters["leftovers"] == 83_819_683
    assert plan.parameters["unet"] == 2_525_520_644
    assert plan.parameters["vae"] == sum(tensor.numel() for tensor in decoder.vae.parameters())
    assert 33.3e9 < plan.nbytes < 33.5e9
    files = [name for name in plan.weights if "/" not in name]
    assert files == [f"model-{i:05d}-of-00006.safetensors" for i in range(1, 7)]
    assert all(sum(s.nbytes for s in plan.weights[name].values()) <= 5e9 for name in files)
    assert set(plan.texts["model.safetensors.index.json"]["weight_map"]) == set(found)


def test_the_4b_has_no_head_of_its_own_and_may_come_without_leftovers(synthetic: ModuleType) -> None:
    plan = synthetic.plan_checkpoint("4b", leftovers=False)
    found = shards_of(plan)
    assert "lm_head.weight" not in found and plan.texts["config.json"]["tie_word_embeddings"] is True
    assert not [key for key in found if "vae" in key or "inv_freq" in key]
    assert found["model.embed_tokens.weight"].shape == (151668, 2048)
    # Qwen2.5-VL-3B has 3,754,622,976 parameters with 151,936 rows of tokens; here there are 268 fewer and 64 queries.
    assert plan.parameters["backbone"] == 3_754_622_976 - (151_936 - 151_668) * 2048 + 64 * 2048


def test_the_tiny_one_is_read_as_a_published_checkpoint_is(synthetic: ModuleType, written: Path) -> None:
    index = json.loads((written / "model.safetensors.index.json").read_text("utf-8"))
    shards = sorted(path.name for path in written.glob("*.safetensors"))
    assert shards == [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    assert len(shards) > 2
    held: dict[str, str] = {}
    values = 0
    for name in shards:
        with safe_open(str(written / name), "pt") as file:
            for key in file.keys():
                tensor = file.get_tensor(key)
                held[key] = name
                values += tensor.nbytes
                assert tensor.isfinite().all() and tensor.dtype == (
                    torch.float32 if "inv_freq" in key else torch.bfloat16
                )
    assert index == {"metadata": {"total_size": values}, "weight_map": held}
    assert {"model.vae.encoder.conv_in.weight", "model.layers.0.self_attn.rotary_emb.inv_freq"} < set(held)
    assert all((written / "diffusion-decoder" / name / DECODER_FILE).is_file() for name in ("unet", "vae"))
    files = open_checkpoint(written)
    for load in (load_backbone, load_dit, load_image_encoder, load_decoder):
        load(files)
    weights = load_file(str(written / held["model.layers.1.mlp.up_proj.weight"]))
    product = weights["model.layers.1.mlp.up_proj.weight"].float()
    assert 0.95 < product.std().item() * product.shape[1] ** 0.5 < 1.05
    assert len(product.unique(dim=0)) == len(product)


def test_what_is_there_is_used_again_and_only_what_is_damaged_is_written(
    synthetic: ModuleType, written: Path
) -> None:
    plan = synthetic.plan_checkpoint("tiny")
    first, *others = sorted(written.rglob("*.safetensors"))
    before = {path: path.stat().st_mtime_ns for path in others}
    content = first.read_bytes()
    first.write_bytes(content[:-1])
    assert [written / name for name in plan.missing(written)] == [first]
    synthetic.write_checkpoint(plan, written)
    assert first.read_bytes() == content
    assert {path: path.stat().st_mtime_ns for path in others} == before
    plain = synthetic.plan_checkpoint("tiny", leftovers=False)
    synthetic.write_checkpoint(plain, written)
    assert {path.relative_to(written).as_posix() for path in written.rglob("*.safetensors")} == set(
        plain.weights
    )


def test_a_full_disk_and_a_folder_of_others_are_told_before_anything_is_written(
    synthetic: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = synthetic.plan_checkpoint("tiny")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "model.safetensors").write_bytes(b"mine")
    with pytest.raises(SystemExit, match="has not written"):
        synthetic.write_checkpoint(plan, tmp_path / "mine")
    assert (tmp_path / "mine" / "model.safetensors").read_bytes() == b"mine"
    usage = shutil.disk_usage(tmp_path)._replace(free=5 * 10**8)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(SystemExit, match="needs 1.0 GB .* 0.5 GB are free"):
        synthetic.write_checkpoint(plan, tmp_path / "full")
    assert not list((tmp_path / "full").iterdir())


@pytest.mark.slow
@needs_linux
def test_writing_holds_pieces_and_not_tensors(processes: ModuleType, tmp_path: Path) -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(BENCHMARKS)!r})\n"
        "import torch; from pathlib import Path; from synthetic import TensorShape, Values, stream_safetensors\n"
        "values, shape = Values(), TensorShape(torch.bfloat16, (int(sys.argv[1]), 1000))\n"
        "stream_safetensors({'a': shape}, lambda key: values.pieces(key, shape), Path('a.safetensors'))\n"
    )
    own = []
    for rows in ("1", "300000"):
        command = [sys.executable, "-W", "ignore", "-c", code, rows]
        measured = processes.measure(command, cwd=tmp_path, threads=1)
        assert measured.exit_code == 0, measured.stderr
        own.append(measured.own_bytes)
    assert (tmp_path / "a.safetensors").stat().st_size > 600_000_000
    assert own[1] - own[0] < 100_000_000


@needs_linux
def test_memory_of_a_command_and_its_children_is_counted(processes: ModuleType, tmp_path: Path) -> None:
    hold = "import time; held = bytearray(b'1') * 10**8; time.sleep(1)"
    both = f"import subprocess, sys; held = bytearray(b'1') * 10**8; subprocess.run([sys.executable, '-c', {hold!r}])"
    one = processes.measure([sys.executable, "-c", hold], cwd=tmp_path, threads=1)
    two = processes.measure(
        [sys.executable, "-c", both + "; print('é'); sys.exit(3)"], cwd=tmp_path, threads=1
    )
    assert 100e6 < one.own_bytes < 140e6 < 200e6 < two.own_bytes < 250e6
    assert one.own_bytes < one.mapped_bytes < 160e6
    assert (one.exit_code, two.exit_code, two.stdout) == (0, 3, "é\n") and 1 < one.seconds < 10


@needs_linux
def test_bytes_that_the_disk_read_are_known_after_a_short_command(
    processes: ModuleType, tmp_path: Path
) -> None:
    path = tmp_path / "cold"
    path.write_bytes(os.urandom(3 * 10**7))
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    command = [sys.executable, "-S", "-c", f"open({str(path)!r}, 'rb').read()"]
    read = processes.measure(command, cwd=tmp_path, threads=1).read_bytes
    if read == 0:
        pytest.skip("the temporary folder lies in memory")
    assert 3e7 <= read < 6e7


@needs_linux
def test_a_command_that_takes_too_long_is_ended_with_its_children(
    processes: ModuleType, tmp_path: Path
) -> None:
    code = (
        "import pathlib, subprocess, sys\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "pathlib.Path('pid').write_text(str(child.pid)); child.wait()"
    )
    measured = processes.measure([sys.executable, "-c", code], cwd=tmp_path, threads=1, limit_seconds=1.0)
    assert measured.is_out_of_time and measured.exit_code != 0 and measured.seconds < 30
    status = Path("/proc") / (tmp_path / "pid").read_text() / "status"
    assert not status.exists() or "State:\tZ" in status.read_text()


def test_a_command_that_fails_is_in_the_table_and_earlier_rows_stay(
    true_size: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(true_size, "RESULTS", tmp_path / "results")
    options = [str(tmp_path / "scratch"), "--size", "tiny", "--name", "here", "--threads", "1"]
    assert true_size.main([*options, "--only", "info", "--keep"]) == 0
    # Nothing has written the configuration that this one reads.
    assert true_size.main([*options, "--only", "lora_check"]) == 1
    entry = json.loads((tmp_path / "results" / "here_true_size.json").read_text("utf-8"))
    rows = entry["results"]["tiny"]["rows"]
    assert list(rows) == ["info", "lora_check"] and rows["info"]["is_right"]
    assert rows["lora_check"]["exit_code"] == 2 and "two_steps.yaml" in rows["lora_check"]["note"]
    shown = (tmp_path / "results" / "here_true_size.md").read_text("utf-8")
    assert "| lora check | 2 |" in shown and "| info | 0 |" in shown and str(tmp_path) not in shown
    assert not list((tmp_path / "scratch").iterdir())


def test_a_picture_of_one_colour_counts_as_a_failure(true_size: ModuleType, tmp_path: Path) -> None:
    from PIL import Image

    Image.new("RGB", (8, 8), "grey").save(tmp_path / "flat.png")
    with pytest.raises(ValueError, match="one colour"):
        true_size.picture_words(tmp_path / "flat.png")


@pytest.mark.slow
def test_every_command_runs_on_a_checkpoint_with_leftovers(
    true_size: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(true_size, "RESULTS", tmp_path / "results")
    options = ["--size", "tiny", "--name", "here", "--threads", "1"]
    code = true_size.main([str(tmp_path / "scratch"), *options])
    entry = json.loads((tmp_path / "results" / "here_true_size.json").read_text("utf-8"))
    rows = entry["results"]["tiny"]["rows"]
    assert code == 0, {name: row["note"] for name, row in rows.items()}
    assert list(rows) == list(true_size.steps_of("tiny", "cpu"))
    assert all(row["exit_code"] == 0 and row["seconds"] > 0 for row in rows.values())
    assert "the same picture" in rows["draw_streamed"]["note"] and "losses" in rows["lora_fit"]["note"]
    if sys.platform == "linux":
        assert all(0.05 < row["own_gb"] < row["mapped_gb"] for row in rows.values())
