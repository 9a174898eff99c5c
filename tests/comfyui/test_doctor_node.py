"""What ComfyUI's console says at start-up, and the node that looks thoroughly."""

import re
import shutil
from pathlib import Path

from api_graphs import node
from comfyui_blip3o.blip3o_core.config import BUILT_IN_MODEL
from comfyui_server import Server, make_base_folder


def test_one_line_at_start_up_when_all_is_well(server: Server):
    lines = [line for line in server.log().splitlines() if "BLIP3-o" in line and "custom_nodes" not in line]
    ready = [line for line in lines if re.search(r"BLIP3-o [\d.]+: ready\. Checkpoints: reference \(", line)]
    assert len(ready) == 1 and "reference (complete)" in ready[0]
    assert not [line for line in lines if "BLIP3-o: " in line]


def test_the_node_shows_the_report_and_runs_again_each_time(server: Server):
    graph = {"1": node("BLIP3oDoctor", self_test=True)}
    for _ in range(2):
        (text,) = server.run(graph)["1"]["text"]
        assert re.search(r"reference +can draw, answer, vary", text), text
        assert "Self-test on the built-in model" in text and "as recorded" in text
        assert text.endswith("All is well.")


def test_what_is_wrong_is_told_with_its_remedy(tmp_path: Path):
    base = make_base_folder(tmp_path)
    half = shutil.copytree(BUILT_IN_MODEL, base / "models" / "blip3o" / "half")
    (half / "model-00001-of-00001.safetensors").unlink()
    running = Server(base)
    try:
        log = running.log()
        (text,) = running.run({"1": node("BLIP3oDoctor", self_test=False)})["1"]["text"]
    finally:
        running.stop()
    assert "half (1 of 1 weight files missing)" in log
    assert "run the download again" in log and "run the download again" in text
    assert text.endswith("1 thing is wrong.") and "Self-test" not in text
