"""The doctor: finds what is wrong, says what to do, tells nobody's name; and its self-test finds wrong computations."""

from __future__ import annotations

import getpass
import json
import os
import platform
import re
import shutil
import stat
import struct
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import psutil
import pytest
import torch
from comfyui_blip3o.blip3o_core import doctor, self_test, versions
from comfyui_blip3o.blip3o_core.config import BUILT_IN_MODEL
from comfyui_blip3o.blip3o_core.devices import pick_device
from comfyui_blip3o.blip3o_core.doctor import Diagnosis, anonymous, diagnose, start_up_report
from comfyui_blip3o.blip3o_core.models.backbone import Backbone
from comfyui_blip3o.blip3o_core.models.cache_check import require_working_cache
from comfyui_blip3o.blip3o_core.pipeline import Blip3oPipeline
from comfyui_blip3o.blip3o_core.versions import check_version, release
from comfyui_blip3o.cli import main
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """A folder of checkpoints: one whole, one without its weights, one without a decoder."""
    folder = tmp_path / "our models"
    for name in ("whole", "half", "bare"):
        shutil.copytree(BUILT_IN_MODEL, folder / name)
    (folder / "half" / "model-00001-of-00001.safetensors").unlink()
    shutil.rmtree(folder / "bare" / "diffusion-decoder")
    return folder


def wrong(diagnosis: Diagnosis) -> str:
    return "\n".join(str(finding) for finding in diagnosis.findings if finding.is_wrong)


# --- versions --------------------------------------------------------------------------------------------------------


def test_the_oldest_versions_are_those_of_the_project() -> None:
    tomllib = pytest.importorskip("tomllib", reason="needs Python 3.11")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    asked = [*project["dependencies"], *project["optional-dependencies"]["cli"]]
    oldest = dict(requirement.split(">=") for requirement in asked)
    oldest["python"] = project["requires-python"].removeprefix(">=")
    # Not asked for by the project, but by each transformers in a range of its own.
    oldest["tokenizers"] = versions.tested_versions()["tokenizers"]["oldest"]
    assert {name: tested["oldest"] for name, tested in versions.tested_versions().items()} == oldest
    assert project["version"] == versions.PROJECT_VERSION


def test_no_version_is_called_tested_that_the_tests_did_not_meet() -> None:
    installed = {name: metadata.version(name) for name in versions.tested_versions() if name != "python"}
    floor = versions.tested_versions()["transformers"]["oldest"]
    if release(installed["transformers"])[:2] == release(floor)[:2]:
        pytest.skip("the oldest supported versions are installed")
    for name, version in installed.items():
        assert release(versions.tested_versions()[name]["newest"])[:2] <= release(version)[:2], name


def test_the_newest_tested_versions_are_those_that_the_lock_has_for_the_newest_tested_python() -> None:
    newest = {name: tested["newest"] for name, tested in versions.tested_versions().items()}
    python = newest.pop("python")
    place = {"python_version": python, "python_full_version": f"{python}.9"}
    lines = (ROOT / "locks" / "tested.txt").read_text("utf-8").splitlines()
    locked = [Requirement(line) for line in lines if not line.startswith("#")]
    here = {each.name: each for each in locked if each.marker is None or each.marker.evaluate(place)}
    for name, version in newest.items():
        (exactly,) = here[name].specifier
        assert release(exactly.version)[:2] == release(version)[:2], name


def test_the_oldest_tokenizers_is_not_newer_than_what_the_installed_transformers_takes() -> None:
    asked = next(text for text in metadata.requires("transformers") if text.startswith("tokenizers"))
    floor = re.search(r">=([\d.]+)", asked)[1]
    assert release(versions.tested_versions()["tokenizers"]["oldest"]) <= release(floor)


def test_wrong_tokenizers_are_mended_through_transformers_which_knows_the_one_it_needs() -> None:
    remedy = check_version("tokenizers", "0.19.1", "0.22", "0.23").remedy
    assert '"transformers>=' in remedy and "tokenizers" not in remedy


@pytest.mark.parametrize(
    ("installed", "verdict"),
    [
        (None, "missing"),
        ("2.3.1", "older than supported"),
        ("2.4", "fine"),
        ("2.13.9+cu130", "fine"),
        ("2.14.0", "newer than tested"),
        ("3.0.0.dev20270101", "newer than tested"),
    ],
)
def test_a_version_is_judged_by_its_numbers(installed: str | None, verdict: str) -> None:
    check = check_version("torch", installed, "2.4", "2.13")
    assert check.verdict == verdict
    assert bool(check.remedy) == (verdict != "fine")
    assert check.is_wrong == (verdict in ("missing", "older than supported"))


def test_an_old_and_a_missing_library_are_told_with_the_command_that_mends_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = versions.metadata.version

    def version(name: str) -> str:
        if name == "peft":
            raise metadata.PackageNotFoundError(name)
        return "4.40.2" if name == "transformers" else real(name)

    monkeypatch.setattr(versions.metadata, "version", version)
    found = diagnose(self_test=False)
    assert not found.is_well
    assert "transformers 4.40.2 is older than supported." in wrong(found)
    oldest = {name: tested["oldest"] for name, tested in versions.tested_versions().items()}
    assert f'"transformers>={oldest["transformers"]}"' in wrong(found)
    assert "peft is not installed." in wrong(found) and f'"peft>={oldest["peft"]}"' in wrong(found)


def test_a_newer_library_is_a_note_and_not_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    real = versions.metadata.version
    monkeypatch.setattr(versions.metadata, "version", lambda name: "99.0" if name == "tqdm" else real(name))
    found = diagnose(self_test=False)
    assert "tqdm" not in wrong(found)
    assert any("tqdm 99.0 is newer than tested" in finding.what for finding in found.findings)


# --- device ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver program that knows a GPU; PyTorch is what it is here."""
    if os.name == "nt":
        pytest.skip("writes a shell script")
    program = tmp_path / "bin" / "nvidia-smi"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\necho 'NVIDIA GeForce RTX 4070, 11000, 12282'\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_a_gpu_without_a_cuda_build_is_wrong(driver: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    found = diagnose(self_test=False)
    assert found.machine.gpus == (doctor.Gpu("NVIDIA GeForce RTX 4070", 11000 * 2**20, 12282 * 2**20, False),)
    assert "RTX 4070" in wrong(found) and "CUDA build" in wrong(found)
    assert "10.74 GB of 11.99 GB memory free, not used" in str(found)
    assert "PyTorch for: CPU only" in str(found)


def test_a_gpu_that_a_cuda_build_cannot_use_needs_its_driver(
    driver: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert "Update the NVIDIA driver" in wrong(diagnose(self_test=False))


def test_a_hidden_gpu_is_no_fault(driver: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    found = diagnose(self_test=False)
    assert found.is_well and "CUDA_VISIBLE_DEVICES hides it" in str(found)


class Properties:
    """What PyTorch tells about a GPU."""

    name, major, minor, total_memory, gcnArchName = "A GPU", 12, 0, 16 * 2**30, "gfx1100:sramecc-"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU as PyTorch tells of it; what the self-test computes on it, it computes on the CPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Properties)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (12 * 2**30, 16 * 2**30))
    load = self_test.load_pipeline
    monkeypatch.setattr(
        self_test, "load_pipeline", lambda model, dtype, device: load(model, dtype=dtype, device="cpu")
    )


@pytest.mark.parametrize(
    ("hip", "build", "capability"), [(None, "CUDA 13.0", "12.0"), ("6.4", "ROCm 6.4", "gfx1100")]
)
def test_a_gpu_is_told_with_its_memory_and_what_it_can_do(
    gpu: None, monkeypatch: pytest.MonkeyPatch, hip: str | None, build: str, capability: str
) -> None:
    monkeypatch.setattr(torch.version, "cuda", None if hip else "13.0")
    monkeypatch.setattr(torch.version, "hip", hip)
    found = diagnose(self_test=False)
    assert found.is_well
    assert f"PyTorch for: {build}" in str(found)
    assert f"GPU: A GPU, compute capability {capability}, 12.00 GB of 16.00 GB memory free\n" in str(found)


def test_a_gpu_that_does_not_answer_is_wrong(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(index: int) -> None:
        raise RuntimeError(
            "CUDA error: unspecified launch failure\nCUDA kernel errors might be reported later"
        )

    monkeypatch.setattr(torch.cuda, "mem_get_info", lost)
    found = diagnose(self_test=False)
    assert "A GPU does not answer: CUDA error: unspecified launch failure\n" in wrong(found)
    assert "GPU: A GPU, compute capability 12.0, 16.00 GB memory, not used" in str(found)


def test_the_gpu_is_held_against_the_cpu(gpu: None) -> None:
    found = diagnose()
    assert found.is_well, str(found)
    assert [test.what for test in found.tests if test.is_on_gpu] == [
        "features of a drawing on the GPU, beside the CPU's"
    ]


def test_a_gpu_that_computes_something_else_is_told_apart_from_a_wrong_computer(
    gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    features = self_test._features

    def wrong_on_gpu(pipeline: Blip3oPipeline) -> torch.Tensor:
        calls.append(pipeline)
        return features(pipeline) * (1.1 if len(calls) > 1 else 1)

    monkeypatch.setattr(self_test, "_features", wrong_on_gpu)
    found = diagnose()
    assert len(failed(found)) == 1
    assert "The GPU computes something else than the CPU" in wrong(found) and "--device cpu" in wrong(found)


def test_a_gpu_that_has_no_code_leaves_the_other_checks_alone(
    gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = self_test.load_pipeline

    def no_code(model: Path, dtype: str, device: str | torch.device) -> Blip3oPipeline:
        if torch.device(device).type == "cuda":
            raise RuntimeError("CUDA error: no kernel image is available for execution on the device\nmore")
        return load(model, dtype=dtype, device=device)

    monkeypatch.setattr(self_test, "load_pipeline", no_code)
    found = diagnose()
    assert len(failed(found)) == 1 and len(found.tests) == len(self_test.WORDS) + 2
    assert "stopped with: CUDA error: no kernel image is available for execution on the device." in wrong(
        found
    )
    assert "in a build for this GPU" in wrong(found)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_real_gpu_computes_what_the_cpu_computes() -> None:
    found = diagnose()
    assert found.is_well, str(found)
    assert sum(test.is_on_gpu for test in found.tests) == 1
    assert all(gpu.is_used and 0 < gpu.free_bytes <= gpu.total_bytes for gpu in found.machine.gpus)


def test_memory_and_cores_are_those_of_this_computer() -> None:
    machine = diagnose(self_test=False).machine
    assert machine.total_bytes == psutil.virtual_memory().total
    assert machine.cpu_cores == os.cpu_count()


# --- checkpoints -----------------------------------------------------------------------------------------------------


def test_each_checkpoint_says_what_it_can_do(models: Path) -> None:
    found = diagnose([models], self_test=False)
    can = {each.name: [use for use, able in each.can.items() if able] for each in found.checkpoints}
    assert can == {
        doctor.BUILT_IN_NAME: ["draw", "answer", "vary"],
        "bare": ["answer"],
        "half": [],
        "whole": ["draw", "answer", "vary"],
    }
    assert '"half" is not complete: 1 of 1 weight files are missing' in wrong(found)
    assert '"bare" has no decoder unet' in wrong(found) and "--decoder FOLDER" in wrong(found)
    assert "2 things are wrong." in str(found)
    assert all(each.disk_free_bytes > 0 for each in found.checkpoints)


def test_a_checkpoint_without_eva_clip_is_a_note(models: Path) -> None:
    import safetensors.torch

    folder = models / "whole"
    index = folder / "model.safetensors.index.json"
    weights = folder / "model-00001-of-00001.safetensors"
    kept = {
        key: tensor
        for key, tensor in safetensors.torch.load_file(weights).items()
        if "gen_vision_tower" not in key
    }
    safetensors.torch.save_file(kept, weights)
    index.write_text(json.dumps({"weight_map": dict.fromkeys(kept, weights.name)}))
    found = diagnose([folder], self_test=False)
    assert found.is_well
    assert found.checkpoints[-1].can == {"draw": True, "answer": True, "vary": False}
    assert any("EVA-CLIP" in finding.what for finding in found.findings)


def test_a_folder_that_is_not_there_is_wrong(tmp_path: Path) -> None:
    found = diagnose([tmp_path / "nothing"], self_test=False)
    assert "There is no checkpoint folder" in wrong(found)


def test_each_checkpoint_says_where_it_lies(models: Path) -> None:
    lines = str(diagnose([models], self_test=False)).splitlines()
    for name in ("whole", "half", "bare"):
        assert any(f"in {models / name}, " in line and "free on its disk" in line for line in lines), name


def test_a_person_without_checkpoints_is_told_where_to_get_one(models: Path) -> None:
    found = diagnose(self_test=False)
    assert found.is_well and "blip3o download 8b" in str(found)
    assert "blip3o download" not in str(diagnose([models / "whole"], self_test=False))


def test_the_models_of_the_comfyui_around_are_looked_at(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    comfyui = tmp_path / "ComfyUI"
    (comfyui / "custom_nodes" / "pack").mkdir(parents=True)
    monkeypatch.chdir(comfyui / "custom_nodes" / "pack")
    (comfyui / "models" / "blip3o").mkdir(parents=True)
    assert comfyui / "models" / "blip3o" not in doctor.comfyui_models()
    shutil.copytree(models / "half", comfyui / "models" / "blip3o" / "8B")
    assert comfyui / "models" / "blip3o" in doctor.comfyui_models()
    assert main(["doctor", "--no-self-test"]) == 1
    assert '"8B" is not complete' in capsys.readouterr().out


@pytest.mark.parametrize("names", [["tokenizer.json"], []])
def test_a_checkpoint_without_a_readable_tokenizer_can_do_nothing(models: Path, names: list[str]) -> None:
    folder = models / "whole"
    (folder / "tokenizer.json").unlink()
    for name in names:
        (folder / name).write_text("{")
    found = diagnose([folder], self_test=False)
    assert found.checkpoints[-1].can == {"draw": False, "answer": False, "vary": False}
    assert "tokenizer" in wrong(found)


def edit_header(weights: Path, field: str, value: object) -> None:
    """Put a value that makes no sense into the first tensor's entry."""
    raw = weights.read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + size])
    next(entry for name, entry in header.items() if name != "__metadata__")[field] = value
    text = json.dumps(header).encode()
    weights.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + size :])


@pytest.mark.parametrize(("field", "value"), [("data_offsets", "x"), ("dtype", ["BF16"]), ("shape", 5)])
def test_a_damaged_header_is_a_finding_and_keeps_no_nodes_from_loading(
    models: Path, field: str, value: object
) -> None:
    edit_header(models / "whole" / "model-00001-of-00001.safetensors", field, value)
    line, warnings = start_up_report({"whole": models / "whole"})
    assert "whole (not usable)" in line and len(warnings) == 1
    found = diagnose([models / "whole"], self_test=False)
    assert not found.is_well and not any(found.checkpoints[-1].can.values())


@pytest.mark.parametrize(
    ("field", "value"), [("hidden_size", "x"), ("text_config", "x"), ("vision_config", [1])]
)
def test_a_configuration_of_wrong_types_is_a_finding(models: Path, field: str, value: object) -> None:
    path = models / "whole" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), field: value}))
    found = diagnose([models / "whole"], self_test=False)
    assert not found.is_well and "Download config.json again" in wrong(found)


def test_a_folder_that_may_not_be_read_is_a_finding(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("stat", "is_file", "is_dir"):
        asked = getattr(Path, name)

        def refuse(path: Path, *given: object, asked=asked, **options: object) -> object:
            if path.is_relative_to(models):
                raise PermissionError(13, "Permission denied", str(path))
            return asked(path, *given, **options)

        monkeypatch.setattr(Path, name, refuse)
    found = diagnose([models], self_test=False)
    assert "Permission denied" in wrong(found) and "Check the folder, its permissions" in wrong(found)


def test_the_home_of_nobody_is_a_folder_that_is_not_there() -> None:
    assert "There is no checkpoint folder" in wrong(diagnose(["~nobody-is-called-so/x"], self_test=False))


def test_two_checkpoints_of_one_name_are_both_told(models: Path, tmp_path: Path) -> None:
    other = shutil.copytree(models / "whole", tmp_path / "elsewhere" / "whole")
    found = diagnose([models / "whole", other], self_test=False)
    assert [each.name for each in found.checkpoints[1:]] == ["whole", "whole (2)"]


# --- self-test -------------------------------------------------------------------------------------------------------


def test_the_self_test_passes_within_seconds_and_leaves_the_threads_alone() -> None:
    threads = torch.get_num_threads()
    found = diagnose()
    assert found.is_well, str(found)
    assert len(found.tests) == len(self_test.WORDS) + 1 + (pick_device("auto").type != "cpu")
    assert found.test_seconds < 10
    assert torch.get_num_threads() == threads


def test_two_threads_compute_the_same_as_one() -> None:
    threads = torch.get_num_threads()
    recorded = json.loads(self_test.RECORDED.read_text("utf-8"))
    pipeline = self_test.load_pipeline(BUILT_IN_MODEL, dtype="fp32", device="cpu")
    try:
        torch.set_num_threads(2)
        with torch.no_grad():
            found = self_test.compute(pipeline)
    finally:
        torch.set_num_threads(threads)
    for name in ("features", "picture", "image_encoder"):
        ours, theirs = torch.tensor(found[name]), torch.tensor(recorded[name])
        assert (ours - theirs).abs().max() < self_test.TOLERANCE / 10 * theirs.std(), name


def failed(diagnosis: Diagnosis) -> set[str]:
    return {test.what for test in diagnosis.tests if test.problem}


def ignore_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = Backbone.forward

    def ignore(self: Backbone, embeddings, positions, mask=None, cache=None):
        if mask is not None:
            mask = mask[:, -embeddings.shape[1] :]
        return forward(self, embeddings, positions, mask, None)

    monkeypatch.setattr(Backbone, "forward", ignore)


def test_a_cache_that_is_not_read_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    require_working_cache()  # asked once in a process: the self-test has to find by itself what breaks later
    ignore_cache(monkeypatch)
    found = diagnose()
    assert not found.is_well
    assert {"words of an answer", "next word with and without kept keys and values"} <= failed(found)
    assert "Pictures and answers cannot be trusted" in wrong(found)
    assert "WRONG: " in str(found)


def test_a_cache_that_no_network_is_loaded_with_is_told_with_what_to_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    require_working_cache.cache_clear()
    ignore_cache(monkeypatch)
    found = diagnose()
    assert found.tests is None
    assert "does not treat what it has read as this program expects" in wrong(found)
    assert "Install a version that it was tested with" in wrong(found)


def test_an_attention_that_looks_ahead_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    require_working_cache()
    attention = torch.nn.functional.scaled_dot_product_attention

    def look_ahead(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, **options):
        return attention(query, key, value, None, dropout_p, False, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", look_ahead)
    assert "features of a drawing" in failed(diagnose())


def test_numbers_that_are_none_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    sample = Blip3oPipeline.sample_features
    monkeypatch.setattr(
        Blip3oPipeline, "sample_features", lambda *given, **options: sample(*given, **options) * float("nan")
    )
    found = diagnose()
    assert "features of a drawing" in failed(found)
    json.dumps(found.to_json(), allow_nan=False)


def test_a_library_that_breaks_is_a_finding_with_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*given: object, **options: object) -> None:
        raise TypeError("forward() got an unexpected keyword argument 'past_key_values'")

    monkeypatch.setattr(Backbone, "forward", broken)
    found = diagnose()
    assert found.tests is None
    assert "stopped with TypeError in test_doctor.py, line" in wrong(found)
    assert "past_key_values" in wrong(found)


def test_a_bug_of_ours_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def bug(*given: object, **options: object) -> None:
        raise AssertionError("ours")

    monkeypatch.setattr(Backbone, "forward", bug)
    with pytest.raises(AssertionError, match="ours"):
        diagnose()


def test_recording_again_writes_the_same_numbers(tmp_path: Path) -> None:
    self_test.record(tmp_path / "recorded.json")
    again = json.loads((tmp_path / "recorded.json").read_text("utf-8"))
    recorded = json.loads(self_test.RECORDED.read_text("utf-8"))
    assert again.keys() == recorded.keys() == self_test.WORDS.keys()
    assert (again["answer"], again["chat"]) == (recorded["answer"], recorded["chat"])
    assert again["features"] == pytest.approx(recorded["features"], abs=1e-3)
    assert [path.name for path in tmp_path.iterdir()] == ["recorded.json"]


# --- for bug reports -------------------------------------------------------------------------------------------------


@pytest.fixture
def alice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The home of somebody whose name, computer and folders must not be told."""
    home = tmp_path / "alice.wonder"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("USERPROFILE", str(home))
    monkeypatch.setattr(getpass, "getuser", lambda: "alice.wonder")
    monkeypatch.setattr(platform, "node", lambda: "rabbit-hole.example.org")
    yield home


def test_the_json_names_no_folder_user_or_computer(
    alice: Path, models: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = alice / "my pictures" / "models of rabbit-hole"
    shutil.copytree(models, folder)
    (folder / "half" / "config.json").write_text("{")
    (folder / "bare").rename(folder / "alice.wonder style")
    monkeypatch.chdir(alice)
    assert main(["doctor", str(folder), str(alice / "secret place"), "half", "--no-self-test", "--json"]) == 1
    text = capsys.readouterr().out
    found = json.loads(text)
    assert not found["is_well"] and len(found["checkpoints"]) == 5
    for secret in (
        "alice",
        "wonder",
        "rabbit",
        "my pictures",
        str(alice.parent),
        str(Path(__file__).parents[2]),
    ):
        assert secret not in text, secret
    assert "has no decoder unet" in text and "config.json" in text


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('no file "/mnt/Big Disk/of bob/x.json" there', 'no file ".../x.json" there'),
        ("cannot open /var/lib/bob/lib.so: no such file", "cannot open .../lib.so: no such file"),
        (r"cannot open C:\Users\bob\lib.dll here", "cannot open .../lib.dll here"),
        (r'in "D:\My Models\x"', 'in ".../x"'),
        (
            "see https://pytorch.org/get-started/ and draw/answer",
            "see https://pytorch.org/get-started/ and draw/answer",
        ),
        ("BLIP3o/BLIP3o-Model-8B", "BLIP3o/BLIP3o-Model-8B"),
    ],
)
def test_paths_keep_their_last_part_and_nothing_else_changes(text: str, words: str) -> None:
    assert anonymous({"a": [text]}) == {"a": [words]}


def test_the_exit_code_tells_whether_all_is_well(
    models: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "comfyui_models", list)
    assert main(["doctor", "--no-self-test"]) == 0
    assert capsys.readouterr().out.endswith("All is well.\n")
    assert main(["doctor", str(models / "half"), "--no-self-test"]) == 1
    assert capsys.readouterr().out.endswith("1 thing is wrong.\n")


# --- the line at start-up --------------------------------------------------------------------------------------------


def test_the_line_at_start_up_names_every_checkpoint(models: Path) -> None:
    line, warnings = start_up_report({name: models / name for name in ("bare", "half", "whole")})
    assert line == (
        f"BLIP3-o {versions.PROJECT_VERSION}: ready. Checkpoints: bare (no decoder: answers only), "
        "half (1 of 1 weight files missing), whole (complete)."
    )
    assert len(warnings) == 2 and all("\n" in warning for warning in warnings)


def test_all_is_well_in_one_line(models: Path) -> None:
    assert start_up_report({"whole": models / "whole"})[1] == []
    line, warnings = start_up_report({})
    assert (line, warnings) == (
        f"BLIP3-o {versions.PROJECT_VERSION}: ready. Checkpoints: the built-in tiny model.",
        [],
    )
    assert start_up_report({}, "cuda, 24.00 GB")[0].endswith(" Device: cuda, 24.00 GB.")


def test_a_missing_tokenizer_and_a_decoder_that_is_cut_short_are_told_at_start_up(models: Path) -> None:
    decoder = models / "whole" / "diffusion-decoder" / "unet" / "diffusion_pytorch_model.bf16.safetensors"
    decoder.write_bytes(decoder.read_bytes()[:-100])
    line, warnings = start_up_report({"whole": models / "whole"})
    assert "whole (no decoder: answers only)" in line and "cut short" in warnings[0]
    (models / "whole" / "tokenizer.json").unlink()
    line, warnings = start_up_report({"whole": models / "whole"})
    assert "whole (no tokenizer)" in line and "no tokenizer: neither" in warnings[0]


def test_a_missing_shard_of_eva_clip_alone_is_not_missed(models: Path) -> None:
    index = models / "whole" / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text("utf-8"))["weight_map"]
    for key in weight_map:
        if "gen_vision_tower" in key:
            weight_map[key] = "model-00002-of-00002.safetensors"
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert "whole (complete)" in start_up_report({"whole": models / "whole"})[0]


@pytest.mark.parametrize(
    "file", ["config.json", "model.safetensors.index.json", "model-00001-of-00001.safetensors"]
)
def test_a_damaged_file_is_told_at_start_up(models: Path, file: str) -> None:
    (models / "whole" / file).write_bytes(b"damaged")
    line, warnings = start_up_report({"whole": models / "whole"})
    assert "whole (not usable)" in line
    assert len(warnings) == 1 and re.search("whole|" + re.escape(file), warnings[0])


def test_the_line_at_start_up_imports_no_network_library(models: Path) -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT / 'tests')!r}); import conftest; from pathlib import Path;"
        "from comfyui_blip3o.blip3o_core.doctor import start_up_report;"
        f"line, _ = start_up_report({{'whole': Path({str(models / 'whole')!r})}}); print(line);"
        "print([m for m in ('transformers', 'diffusers', 'peft', 'accelerate') if m in sys.modules])"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    line, imported = answer.stdout.splitlines()
    assert line.endswith("whole (complete).") and imported == "[]"


@pytest.mark.parametrize("library", ["torch", "transformers", "diffusers", "safetensors", "psutil"])
def test_a_library_that_cannot_be_loaded_is_told_once(library: str, models: Path) -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT / 'tests')!r}); import conftest; sys.modules[{library!r}] = None;"
        "from comfyui_blip3o.cli import main;"
        f"print(main(['doctor', '--no-self-test', {str(models / 'whole')!r}, {str(models / 'bare')!r}]))"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    *report, exit_code = answer.stdout.splitlines()
    told = [line for line in report if "is needed cannot be loaded" in line and library in line]
    if library == "psutil":
        assert exit_code == "1" and "memory not known" in answer.stdout  # "bare" has no decoder
    else:
        assert exit_code == "1" and len(told) == 1
        assert sum("not usable" in line for line in report) == 3
