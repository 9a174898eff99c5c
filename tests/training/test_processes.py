"""Two processes learn what one learns."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "support" / "forked_fits.py"


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(sys, "getdlopenflags"), reason="needs os.fork")
def test_two_processes_learn_what_one_does_and_stop_together(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, str(SCRIPT), "processes", str(tmp_path)], capture_output=True, text=True, timeout=600
    )
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.splitlines()[-1])
    assert found["statuses"] == [0] * 8, run.stderr
    assert max(found["differences"]) < 1e-5
    one, two = found["losses"]
    assert two == pytest.approx(one, rel=1e-5)
    assert found["patient"] == [3, "patience"]
