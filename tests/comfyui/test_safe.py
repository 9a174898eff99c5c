"""A shared workflow in a real ComfyUI leads nowhere outside, and a training that hangs is ended by a cancel."""

import os
import time
from pathlib import Path

import psutil
import pytest
from api_graphs import BUILT_IN, node
from comfyui_server import Server, error_of
from training_graphs import training


def files_below(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "setting",
    [
        "run.dir={outside}", "run.name=evil", "data.path={outside}", "model.root={outside}", "model.image_encoder=/etc/passwd",
        "model.decoder={outside}", "model.device=cpu", "adapter.start_from=/etc/passwd", "train.prior.reg_path={outside}",
        "run={{dir: {outside}}}", "data={{path: {outside}}}", "model={{root: {outside}}}", " run . dir = {outside}",
        "run.dir=\\\\\\\\host\\\\share", "a: &x [*x]", "train.ema=[1", "adapter.targets=(([a-z_.])+)+!",
        "train.ema={{a: &a [1, 1], b: &b [*a, *a], c: [*b, *b]}}",
    ],
    ids=str,
)  # fmt: skip
def test_the_settings_text_leads_nowhere(server: Server, base: Path, tmp_path: Path, setting: str) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    before = files_below(base / "output")
    entry = server.wait(server.queue(training("evil", steps=1, more=setting.format(outside=outside))))
    assert entry["status"]["status_str"] == "error"
    message = error_of(entry)
    assert "Traceback" not in message and message.strip()
    assert not files_below(outside)
    assert files_below(base / "output") == before


def children(server: Server) -> list[psutil.Process]:
    return [
        child
        for child in psutil.Process(server.process.pid).children(recursive=True)
        if "child.py" in " ".join(child.cmdline())
    ]


@pytest.mark.skipif(os.name == "nt", reason="stops a process as only POSIX can")
def test_a_training_that_hangs_is_gone_soon_after_a_cancel_and_the_next_prompt_runs(server: Server) -> None:
    import signal

    prompt = server.queue(training("stuck", steps=500))
    deadline = time.monotonic() + 120
    while not (found := children(server)):
        assert time.monotonic() < deadline, "no training began"
        time.sleep(0.2)
    found[0].send_signal(signal.SIGSTOP)  # it answers nothing any more, like one on a disk that is gone
    started = time.monotonic()
    server.post("/interrupt", {})
    server.wait(prompt)
    assert time.monotonic() - started < 30
    assert not children(server)
    graph = {
        "1": node("BLIP3oLoad", checkpoint=BUILT_IN, dtype="auto"),
        "2": node("BLIP3oEncodePrompt", backbone=["1", 0], prompt="a red circle", negative_prompt=""),
        "3": node("PreviewAny", source=["2", 0]),
    }
    assert server.run(graph)["3"]["text"]
