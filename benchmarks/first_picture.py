"""Time to the first picture from a cold start, imports included, and to each further one; the built-in model on the CPU.

    python benchmarks/first_picture.py [--rounds 3] [--preset standard] [--threads 2]

Each round is a new process. Quoted are medians.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FURTHER = 3
CHILD = """
import importlib.util, json, sys, time
spec = importlib.util.spec_from_file_location("comfyui_blip3o", {init!r})
sys.modules["comfyui_blip3o"] = package = importlib.util.module_from_spec(spec)
spec.loader.exec_module(package)
from comfyui_blip3o.blip3o_core import load_pipeline
from comfyui_blip3o.blip3o_core.config import BUILT_IN_MODEL
pipeline = load_pipeline(BUILT_IN_MODEL, device="cpu")
times = []
for seed in range(1 + {further}):
    pipeline.generate("a red circle left of a blue square", seed=seed, preset={preset!r}).pictures
    times.append(time.time())
print(json.dumps(times))
"""


def measure(preset: str, threads: int) -> tuple[float, list[float]]:
    """Seconds from starting Python to the first picture, and of each further one."""
    code = CHILD.format(init=str(ROOT / "__init__.py"), further=FURTHER, preset=preset)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    start = time.time()
    answer = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env=environment,
        check=True,
        capture_output=True,
        text=True,
    )
    times = json.loads(answer.stdout.splitlines()[-1])
    return times[0] - start, [after - before for before, after in zip(times[:-1], times[1:], strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--preset", default="standard")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    arguments = parser.parse_args()
    rounds = [measure(arguments.preset, arguments.threads) for _ in range(arguments.rounds)]
    first = statistics.median(first for first, _ in rounds)
    further = statistics.median(seconds for _, each in rounds for seconds in each)
    print("| preset | threads | first picture, s | further picture, s |\n| --- | --- | --- | --- |")
    print(f"| {arguments.preset} | {arguments.threads} | {first:.1f} | {further:.1f} |")


if __name__ == "__main__":
    main()
