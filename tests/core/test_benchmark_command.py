"""The benchmark command runs, and its modes make the same things."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

RUN = Path(__file__).resolve().parents[2] / "benchmarks" / "run.py"


def run_child(stage: str) -> dict:
    command = [sys.executable, "-W", "ignore", str(RUN), "--rounds", "1", "--threads", "1"]
    done = subprocess.run(
        [*command, "--child", stage, "tiny"], capture_output=True, text=True, check=True, cwd=RUN.parents[1]
    )
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_every_mode_is_timed_and_makes_what_the_plain_one_makes() -> None:
    found = run_child("encode")
    assert found["limits"]["flops"] > 1e9
    assert len(found["rows"]) == 3
    for row in found["rows"]:
        assert row["seconds"] > 0
        assert row["gain"] > 0
        assert row["difference"] is None or row["difference"] < 1e-4


@pytest.mark.slow
def test_formats_are_ranked_by_their_bits() -> None:
    cosines = {
        row["format"]: row["cosine"]
        for row in run_child("formats")["formats"]
        if "conditioning" in row["what"]
    }
    assert cosines["nf4"] < cosines["fp8"] < cosines["int8"] < 1


@pytest.mark.slow
def test_ways_to_keep_networks_that_lose_nothing_draw_the_same_picture() -> None:
    rows = {row["mode"]: row for row in run_child("memory")["rows"] if "draw" in row["stage"]}
    exact = [row for mode, row in rows.items() if "plain" not in mode and "quantize" not in mode]
    assert len(exact) == 3
    assert all(row["difference"] == 0 for row in exact)
    assert all("plan: " in row["note"] for row in rows.values())
