"""States on disk: whole or not there."""

import errno
import json
import logging
from pathlib import Path

import pytest
import torch
from comfyui_blip3o.lora_training.fit import state as module
from comfyui_blip3o.lora_training.fit.state import (
    NoSpace,
    State,
    amend_state,
    newest_state,
    pack_tree,
    read_state,
    save_state,
    unpack_tree,
)
from safetensors.torch import load_file
from torch import nn


def state_of(step: int) -> State:
    weight = nn.Parameter(torch.full((3, 2), float(step)))
    optimizer = torch.optim.AdamW([weight], lr=0.1)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    return State(
        step,
        {"layer.lora_A.weight": weight.detach()},
        {"ema/x": torch.tensor([0.5], dtype=torch.float64)},
        optimizer.state_dict(),
        {"losses": [0.1 + 0.2, float("nan")], "best": None},
    )


def test_a_state_comes_back_to_the_bit_without_pickles(tmp_path: Path) -> None:
    state = state_of(7)
    path = save_state(tmp_path, state, keep=2)
    assert sorted(file.name for file in path.iterdir()) == [
        "adapter.safetensors",
        "optimizer.safetensors",
        "state.json",
    ]
    found = read_state(path)
    assert found.step == 7
    assert torch.equal(found.adapter["layer.lora_A.weight"], state.adapter["layer.lora_A.weight"])
    assert torch.equal(found.internals["ema/x"], state.internals["ema/x"])
    assert (
        found.numbers["losses"][0] == 0.1 + 0.2 and found.numbers["losses"][1] != found.numbers["losses"][1]
    )
    moments, expected = found.optimizer["state"][0], state.optimizer["state"][0]
    assert moments.keys() == expected.keys()
    assert all(torch.equal(moments[name], expected[name]) for name in expected)
    assert found.optimizer["param_groups"][0]["params"] == [0]
    assert list(load_file(path / "adapter.safetensors")) == ["layer.lora_A.weight"]


def test_only_the_newest_states_stay(tmp_path: Path) -> None:
    for step in (1, 2, 10, 100):
        save_state(tmp_path, state_of(step), keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_000010", "step_000100"]
    assert newest_state(tmp_path).step == 100


@pytest.mark.parametrize("name", ["adapter.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["cut", "flip", "gone"])
def test_a_damaged_state_is_skipped_with_a_warning(
    tmp_path: Path, name: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    save_state(tmp_path, state_of(1), keep=3)
    file = save_state(tmp_path, state_of(2), keep=3) / name
    data = file.read_bytes()
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(data[:-5] if damage == "cut" else bytes([data[0] ^ 1]) + data[1:])
    with caplog.at_level(logging.WARNING):
        assert newest_state(tmp_path).step == 1
    assert "step_000002" in caplog.text
    assert save_state(tmp_path, state_of(2), keep=3).name == "step_000002"
    assert newest_state(tmp_path).step == 2


def test_a_leftover_of_a_crash_is_not_read_and_goes_with_the_next_state(tmp_path: Path) -> None:
    (tmp_path / ".step_000009.part").mkdir()
    (tmp_path / ".step_000009.part" / "adapter.safetensors").write_bytes(b"half")
    assert newest_state(tmp_path) is None
    save_state(tmp_path, state_of(1), keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step_000001"]


@pytest.mark.parametrize(("function", "call"), [("fsync", 0), ("fsync", 1), ("fsync", 2), ("rename", 0)])
def test_a_full_disk_is_told_and_the_older_state_stays(
    tmp_path: Path, function: str, call: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_state(tmp_path, state_of(1), keep=1)
    real, calls = getattr(module.os, function), []

    def full(*given: object) -> None:
        calls.append(given)
        if len(calls) > call:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(*given)

    monkeypatch.setattr(module.os, function, full)
    with pytest.raises(NoSpace, match="step 2 could not be written.*No space left on device(?s:.*)intact"):
        save_state(tmp_path, state_of(2), keep=1)
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["step_000001"]
    assert newest_state(tmp_path).step == 1


def test_saving_the_same_step_again_renews_its_numbers_alone(tmp_path: Path) -> None:
    path = save_state(tmp_path, state_of(3), keep=2)
    before = (path / "optimizer.safetensors").stat().st_mtime_ns
    again = state_of(3)
    again.numbers["stopped_because"] = "steps"
    save_state(tmp_path, again, keep=2)
    assert (path / "optimizer.safetensors").stat().st_mtime_ns == before
    assert newest_state(tmp_path).numbers["stopped_because"] == "steps"


def test_numbers_can_be_amended(tmp_path: Path) -> None:
    save_state(tmp_path, state_of(3), keep=2)
    amend_state(tmp_path, 3, {"roll_backs": 1})
    found = newest_state(tmp_path)
    assert found.numbers["roll_backs"] == 1 and found.numbers["best"] is None
    assert torch.equal(found.adapter["layer.lora_A.weight"], state_of(3).adapter["layer.lora_A.weight"])


def test_trees_of_any_optimizer_become_json_and_come_back() -> None:
    tree = {
        0: {"step": torch.tensor(2.0), "d": 1e-6},
        "groups": [{"betas": (0.9, 0.99), "decay": None, "on": True}],
    }
    tensors: dict[str, torch.Tensor] = {}
    packed = json.loads(json.dumps(pack_tree(tree, tensors, "optimizer")))
    assert unpack_tree(packed, tensors) == {
        **tree,
        "groups": [{"betas": [0.9, 0.99], "decay": None, "on": True}],
    }


@pytest.mark.parametrize(
    "change",
    [
        {"files": {"/dev/zero": "x"}},
        {"files": {"../adapter.safetensors": "x", "optimizer.safetensors": "y"}},
        {"files": []},
        {"step": "7"},
        {"numbers": 5},
        {"optimizer": {"keys": 5}},
        {"optimizer": {"__tensor__": []}},
        {"schema": None},
    ],
    ids=str,
)
def test_a_state_that_names_other_files_or_kinds_is_passed_over(tmp_path: Path, change: dict, caplog) -> None:
    save_state(tmp_path, state_of(3), keep=5)
    path = save_state(tmp_path, state_of(7), keep=5) / "state.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | change), "utf-8")
    with caplog.at_level(logging.WARNING):
        assert newest_state(tmp_path).step == 3
    assert "damaged" in caplog.text


@pytest.mark.parametrize("text", ["[" * 100_000, "5", "", '{"schema": 1}', '{"schema": ' + "9" * 5000 + "}"])
def test_a_state_of_nonsense_is_passed_over(tmp_path: Path, text: str) -> None:
    save_state(tmp_path, state_of(3), keep=5)
    (save_state(tmp_path, state_of(7), keep=5) / "state.json").write_text(text, "utf-8")
    assert newest_state(tmp_path).step == 3


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="this system has no endless file")
def test_a_state_whose_file_is_a_link_to_an_endless_one_is_passed_over(tmp_path: Path) -> None:
    save_state(tmp_path, state_of(3), keep=5)
    file = save_state(tmp_path, state_of(7), keep=5) / "adapter.safetensors"
    file.unlink()
    file.symlink_to("/dev/zero")
    assert newest_state(tmp_path).step == 3
