"""The stage load: weights from files into the networks, each time in a new process."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from comfyui_blip3o.blip3o_core.checkpoints.layout import open_checkpoint
from common import ROOT, Row

LOAD_CHILD = """
import json, resource, sys, time
sys.path.insert(0, {folder!r})
import accelerate, common, torch
from comfyui_blip3o.blip3o_core.pipeline import load_pipeline
from comfyui_blip3o.blip3o_core.checkpoints.layout import open_checkpoint
import comfyui_blip3o.blip3o_core.models.backbone, comfyui_blip3o.blip3o_core.models.decoder
from safetensors.torch import load_file
pipeline = load_pipeline({checkpoint!r}, device={device!r})
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
start = time.perf_counter()
if {is_plain!r}:
    # A whole copy in the files' dtype and one in the run's, which programs often make on the way.
    states = [load_file(path) for path in {paths!r}]
    states = [{{key: value.to(pipeline.device, pipeline.dtype) for key, value in state.items()}} for state in states]
pipeline.load()
if pipeline.device.type == "cuda":
    torch.cuda.synchronize()
print(json.dumps([time.perf_counter() - start, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024]))
"""


def load_stage(checkpoint: Path, size: str, device: torch.device, rounds: int) -> list[Row]:
    """Weights from files that the system has in its cache, in a new process each time."""
    files = open_checkpoint(checkpoint)
    used = sum(files.component_bytes[name] for name in ("backbone", "dit", "decoder"))
    paths = [str(path) for path in sorted(checkpoint.rglob("*.safetensors"))]
    disk = _disk_speed(Path(paths[0]))
    found: dict[bool, list[list[float]]] = {True: [], False: []}
    for _ in range(rounds):
        for is_plain, measured in found.items():
            code = LOAD_CHILD.format(
                folder=str(Path(__file__).parent),
                checkpoint=str(checkpoint),
                device=str(device),
                is_plain=is_plain,
                paths=paths,
            )
            measured.append(json.loads(_python(code).splitlines()[-1]))
    rows = []
    for is_plain, name in (
        (True, "with a whole copy and a converted one on the way (plain)"),
        (False, "ours"),
    ):
        seconds, host = (statistics.median(values) for values in zip(*found[is_plain], strict=True))
        pairs = zip(found[True], found[is_plain], strict=True)
        read = sum(Path(path).stat().st_size for path in paths) if is_plain else used
        rows.append(
            Row(
                *("load", size, name, seconds),
                gain=statistics.median(plain[0] / ours[0] for plain, ours in pairs),
                limit_seconds=used / disk,
                peak_host_gb=host / 1e9,
                read_gb=read / 1e9,
                note="peak host: growth of the process",
            )
        )
    return rows


def _disk_speed(path: Path) -> float:
    start = time.perf_counter()
    size = len(path.read_bytes())
    return size / (time.perf_counter() - start)


def _python(code: str) -> str:
    """What a new process prints."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=ROOT.parent,
        env=os.environ,
        check=True,
        capture_output=True,
        text=True,
    )
    return done.stdout
