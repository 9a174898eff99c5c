"""A training child ends in the end, whether it answers or not."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
from comfyui_blip3o.lora_training import child
from comfyui_blip3o.lora_training.child import TrainingProcess
from training_sets import config_of

DEAF = 'import time; print(\'{"event": "phase", "phase": "fit"}\', flush=True); time.sleep(600)'


@pytest.fixture
def deaf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TrainingProcess:
    """A child that never looks at what it is told."""
    real = subprocess.Popen
    monkeypatch.setattr(
        subprocess, "Popen", lambda command, **options: real([sys.executable, "-c", DEAF], **options)
    )
    return TrainingProcess(config_of(tmp_path))


def test_a_killed_child_is_gone_and_waited_for(deaf: TrainingProcess) -> None:
    next(deaf.events())
    deaf.stop()
    assert deaf._process.poll() is None
    deaf.kill()
    assert deaf.wait() != 0
    assert deaf._process.poll() is not None


def test_a_child_that_is_left_without_an_answer_is_ended(
    deaf: TrainingProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(child, "LEFT_SECONDS", 0.2)
    with deaf:
        next(deaf.events())
    assert deaf._process.poll() is not None


def test_a_child_whose_parent_has_died_ends_by_itself() -> None:
    code = (
        "import sys, threading, time\n"
        f"sys.path.insert(0, {str(Path(__file__).resolve().parents[1])!r})\n"
        "import conftest\n"
        "from comfyui_blip3o.lora_training import child\n"
        "child.ORPHAN_SECONDS = 0.2\n"
        "threading.Thread(target=child._wait_for_stop, args=(threading.Event(),), daemon=True).start()\n"
        "time.sleep(600)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE)
    assert process.stdin is not None
    process.stdin.close()
    assert process.wait(timeout=60) == child.EXIT_KILLED


def test_a_child_that_was_told_to_stop_is_not_hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    import io
    import threading

    monkeypatch.setattr(child, "ORPHAN_SECONDS", 0)
    monkeypatch.setattr(sys, "stdin", io.StringIO("stop\n"))
    stopped = threading.Event()
    child._wait_for_stop(stopped)
    time.sleep(0.05)
    assert stopped.is_set()
