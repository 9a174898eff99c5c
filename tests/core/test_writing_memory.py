"""Own memory while weights are written and converted, measured in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# What a process may need beside what it writes: a few pieces of PIECE_BYTES, in two dtypes.
ALLOWED = 150 * 10**6
# Runs the lines given on the command line, then prints how far the process's own memory grew, in bytes.
MEASURE = """
import importlib.util, re, sys, threading
from pathlib import Path
root, folder = Path(sys.argv[1]), Path(sys.argv[2])
spec = importlib.util.spec_from_file_location("comfyui_blip3o", root / "__init__.py")
sys.modules["comfyui_blip3o"] = package = importlib.util.module_from_spec(spec)
spec.loader.exec_module(package)
import torch
from comfyui_blip3o.blip3o_core.checkpoints.save import save_checkpoint
from comfyui_blip3o.blip3o_core.config import NextDiTConfig
from comfyui_blip3o.blip3o_core.checkpoints.convert import convert_pickle
from comfyui_blip3o.blip3o_core.models.nextdit import NextDiT

def own():
    return int(re.search(r"RssAnon:\\s+(\\d+) kB", Path("/proc/self/status").read_text()).group(1)) * 1024

exec(sys.argv[3])
before, peak, is_over = own(), 0, threading.Event()

def sample():
    global peak
    while not is_over.wait(0.002):
        peak = max(peak, own())

thread = threading.Thread(target=sample)
thread.start()
exec(sys.argv[4])
is_over.set()
thread.join()
print(peak - before)
"""
PICKLED = """
values = torch.arange(8 * 2**20, dtype=torch.float32).reshape(2**12, -1)
torch.save({f"block {i}": values[: 2**11] + i for i in range(13)} | {"one": values[:2]}, folder / "tower.bin")
del values
"""
CONVERTED = """
target = convert_pickle(folder / "tower.bin", folder / "tower.safetensors", torch.bfloat16)
"""
NETWORK = """
with torch.device("meta"):
    dit = NextDiT(NextDiTConfig(layers=3)).bfloat16()
dit.to_empty(device="cpu")
for parameter in dit.parameters():
    parameter.data.fill_(0.5)
"""
SAVED = """
save_checkpoint(folder, {}, dit=dit, dtype=torch.float32)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's account of memory")
@pytest.mark.parametrize(
    ("prepare", "work", "smallest"),
    [(PICKLED, CONVERTED, 100 * 10**6), (NETWORK, SAVED, 600 * 10**6)],
    ids=["a pickle", "a checkpoint"],
)
def test_writing_in_another_dtype_holds_no_second_copy(
    tmp_path: Path, prepare: str, work: str, smallest: int
) -> None:
    measured = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", MEASURE, str(ROOT), str(tmp_path), prepare, work],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert measured.returncode == 0, measured.stderr
    written = next(tmp_path.glob("*.safetensors")).stat().st_size
    assert written > smallest
    assert 0 < int(measured.stdout.split()[-1]) < ALLOWED
