"""Histories of runs: what a folder's events tell, as numbers and as a picture."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from comfyui_blip3o.blip3o_core.errors import MissingFilesError
from comfyui_blip3o.lora_training.proof.plot import plot_runs, read_history, write_metrics, write_plot


def write_events(folder: Path, losses: list[float | None], *, more: list[dict] = ()) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    events = [
        {"event": "step", "step": step, "total": 9, "loss": loss, "rate": 0.1, "grad_norm": 1.0}
        for step, loss in enumerate(losses, start=1)
    ]
    text = "\n".join(json.dumps(event) for event in [*events, *more])
    (folder / "events.jsonl").write_text(text + "\n", "utf-8")
    return folder


def looked(step: int, gain: float) -> dict:
    scores = dict.fromkeys(("train_gain", "concept", "drift", "zero_drift", "leak", "copy"), 0.25)
    return {"event": "validation", "step": step, "loss": 0.5, "base_loss": 1.0, "gain": gain, **scores}


def test_a_line_cut_short_by_a_kill_is_passed_over(tmp_path: Path) -> None:
    folder = write_events(tmp_path / "run", [3.0, 2.0])
    with (folder / "events.jsonl").open("a") as file:
        file.write('{"event": "step", "st')
    assert [event["loss"] for event in read_history(folder).steps.values()] == [3.0, 2.0]


def test_steps_that_are_repeated_after_a_resume_replace_those_before(tmp_path: Path) -> None:
    again = [{"event": "step", "step": 2, "total": 9, "loss": 7.0}]
    folder = write_events(tmp_path / "run", [3.0, 2.0, 1.0], more=[looked(3, 0.5), *again])
    history = read_history(folder)
    assert {step: event["loss"] for step, event in history.steps.items()} == {1: 3.0, 2: 7.0}


def test_metrics_hold_every_step_and_the_scores_where_there_are_some(tmp_path: Path) -> None:
    folder = write_events(tmp_path / "run", [3.0, None, 1.0], more=[looked(3, 0.5)])
    write_metrics(folder)
    rows = list(csv.DictReader((folder / "metrics.csv").open()))
    assert [row["step"] for row in rows] == ["1", "2", "3"]
    assert [row["loss"] for row in rows] == ["3.0", "", "1.0"]
    assert [row["gain"] for row in rows] == ["", "", "0.5"] and rows[2]["held_out_loss"] == "0.5"


def test_a_plot_shows_every_run_even_with_losses_that_are_no_numbers(tmp_path: Path) -> None:
    one = write_events(tmp_path / "one", [3.0, None, 1.0], more=[looked(3, 0.5)])
    two = write_events(tmp_path / "two", [2.0, 2.0, 2.0])
    single, both = (np.asarray(plot_runs(folders)) for folders in ([one], [one, two]))
    assert single.shape == both.shape and (single != both).any()
    assert write_plot(one).stat().st_size > 0


def test_a_folder_that_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(MissingFilesError, match="is no run"):
        read_history(tmp_path)
