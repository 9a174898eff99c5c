"""Work that takes minutes shows that it goes on, and learns the same."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from comfyui_blip3o.cli import main
from comfyui_blip3o.lora_training.fit import pulse
from comfyui_blip3o.lora_training.fit.loop import fit
from comfyui_blip3o.lora_training.records import working_text
from lora_runs import write_run
from tiny_training import KEPT, lora_config, run_fit, training_data, validation

LAYERS = tiny_models.DEFAULT.dit.layers
PRESERVING = {"train__prior": {"dop": True, "weight": 1.0, "prompts": list(KEPT)}}


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Where a test collects events; every sign of life is told."""
    monkeypatch.setattr(pulse, "SIGN_SECONDS", 0.0)
    return []


def of_step(events: list[dict[str, Any]], step: int, what: str = "step") -> list[dict[str, Any]]:
    return [
        each for each in events if each["event"] == "working" and (each["what"], each["step"]) == (what, step)
    ]


def test_signs_come_within_and_between_the_micro_batches_of_a_step(
    tmp_path: Path, told: list[dict[str, Any]]
) -> None:
    run_fit(tmp_path, on_event=told.append, train__steps=2, train__micro_batch=1)
    kinds = [event["event"] for event in told]
    first, second = of_step(told, 1), of_step(told, 2)
    assert kinds.index("working") < kinds.index("step") and second[0]["total"] == 2
    # One at the beginning of each micro batch, one for each layer on the way there and on the way back.
    assert [event["micro_batch"] for event in first] == [
        number for number in (1, 2, 3, 4) for _ in range(1 + 2 * LAYERS)
    ]
    shares = [event["share"] for event in first]
    assert shares == sorted(shares) and shares[0] == 0 and shares[-1] == 1
    assert [event["is_first"] for event in first] == [True] * (1 + LAYERS) + [False] * (
        len(first) - 1 - LAYERS
    )
    assert not any(event["is_first"] for event in second)


def test_prompts_that_must_stay_and_measuring_show_signs_too(
    tmp_path: Path, told: list[dict[str, Any]]
) -> None:
    data = training_data()
    config = lora_config(tmp_path, train__steps=1, train__micro_batch=2, **PRESERVING)
    dit = tiny_models.build_dit(seed=1)

    def look(adapter: Any, step: int) -> Any:
        with torch.no_grad(), adapter.autocast():
            dit(torch.zeros(1, 16, 4, 4), torch.ones(1), torch.zeros(1, 16, 32))
        return validation(step)

    fit(config, data, dit, on_event=told.append, validate=look)
    drawn, measured = of_step(told, 0, "prompts"), of_step(told, 1, "measuring")
    assert drawn[0]["is_first"] and drawn[-1]["share"] == 1
    assert {event["micro_batch"] for event in drawn} == {1, 2}
    assert [event["share"] for event in measured] == [None] * LAYERS
    # Lessons pass three times: taught, there and back.
    assert of_step(told, 1)[-1]["share"] == 1
    assert not any(layer._forward_hooks for layer in dit.layers)


def test_quick_steps_need_no_signs_and_signs_change_nothing_that_is_learned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quiet: list[dict[str, Any]] = []
    plain = run_fit(tmp_path / "quiet", on_event=quiet.append, train__grad_checkpoint=True, **PRESERVING)
    assert not [event for event in quiet if event["event"] == "working"]
    monkeypatch.setattr(pulse, "SIGN_SECONDS", 0.0)
    watched: list[dict[str, Any]] = []
    same = run_fit(tmp_path / "watched", on_event=watched.append, train__grad_checkpoint=True, **PRESERVING)
    assert of_step(watched, 6)[-1]["share"] == 1  # recomputed layers do not count twice
    assert plain.losses == same.losses
    assert all(torch.equal(plain.last[key], value) for key, value in same.last.items())


def test_the_bar_shows_what_the_first_step_does_and_quiet_shows_nothing(
    tmp_path: Path, told: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_models.write_checkpoint(tmp_path / "tiny")
    config = str(write_run(tmp_path, model, train__steps=1, train__micro_batch=1))
    assert main(["lora", "run", config]) == 0
    shown = capsys.readouterr().err
    assert "reading the weights, micro batch 1 of" in shown and "step 1: micro batch 2 of" in shown
    kept = (tmp_path / "runs/it/events.jsonl").read_text("utf-8").splitlines()
    assert "working" not in {json.loads(line)["event"] for line in kept}
    assert main(["lora", "run", config, "--fresh", "--quiet"]) == 0
    assert "micro batch" not in capsys.readouterr().err


def test_signs_are_told_in_words() -> None:
    event = {"what": "step", "step": 3, "total": 9, "micro_batch": 2, "micro_batches": 8, "share": 0.183}
    assert working_text({**event, "is_first": False}) == "step 3: micro batch 2 of 8, 18%"
    event |= {"what": "measuring", "micro_batches": 1, "share": None, "is_first": False}
    assert working_text(event) == "measuring what was learned"
