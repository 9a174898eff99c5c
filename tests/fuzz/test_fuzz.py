"""A small run of the harness; `python -m tests.fuzz --cases 5000` is the large one."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="forks, and bounds memory as Linux can")
def test_spoilt_files_are_read_or_named() -> None:
    command = [sys.executable, "-m", "tests.fuzz", "--cases", "88", "--seed", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="forks, and bounds memory as Linux can")
@pytest.mark.parametrize(
    ("read", "kind"),
    [
        ("lambda folder: {}['x']", "raw"),
        ("lambda folder: __import__('time').sleep(60)", "hang"),
        ("lambda folder: bytearray(2**33)", "memory"),
        ("lambda folder: __import__('os').abort()", "killed"),
        ("lambda folder: (folder.parent / 'x').touch()", "outside"),
        ("lambda folder: (folder / 'EXECUTED').touch()", "executed"),
        ("lambda folder: (folder / 'x.part').touch()", "leftover"),
    ],
)
def test_the_harness_sees_what_must_not_happen(read: str, kind: str) -> None:
    code = (
        "import sys; sys.path[:0] = ['tests', 'tests/support']\n"
        "import conftest, pathlib, tempfile; sys.path.append('.')\n"
        "from tests.fuzz import harness\n"
        "harness.SECONDS = 3\n"
        f"target = harness.Target(None, lambda folder, random: None, {read})\n"
        "with tempfile.TemporaryDirectory() as original:\n"
        "    print(harness._run_case('x', target, pathlib.Path(original), 0, 0).kind)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == kind, done.stderr
