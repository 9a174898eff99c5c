"""The stage load: weights from files into the networks, each time in a new process, against the disk's own speed."""

from __future__ import annotations

import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common  # makes the package known
import torch
from comfyui_blip3o.blip3o_core.checkpoints.layout import open_checkpoint
from comfyui_blip3o.blip3o_core.checkpoints.save import save_checkpoint
from comfyui_blip3o.blip3o_core.config import BUILT_IN_MODEL
from comfyui_blip3o.blip3o_core.devices import DTYPE_NAMES
from comfyui_blip3o.blip3o_core.models.backbone import Backbone
from comfyui_blip3o.blip3o_core.models.nextdit import NextDiT
from comfyui_blip3o.blip3o_core.pipeline import load_pipeline
from networks import DITS, HEADS, QUERIES, TEXTS, VOCABULARY

LARGE_LAYERS = 1
LARGE_FREE_BYTES = 12 * 10**9
PAGE_BYTES = 4096


@dataclass(frozen=True)
class Way:
    """One way to load.

    Attributes:
        dtype: of the networks; "bf16" is the large files' own.
        copied_as: make a whole copy in the files' dtype and one in this first, which programs often do on the way.
        is_cold: the files are not in the system's cache.
    """

    name: str
    dtype: str
    copied_as: str | None = None
    is_cold: bool = False
    note: str = ""


PLAIN = "with a whole copy and a converted one on the way (plain)"
COLD, WARM = "not in the system's cache", "in the system's cache"
WAYS = {
    "tiny": (Way(PLAIN, "auto", copied_as="fp32"), Way("ours", "auto")),
    "large": (
        Way(PLAIN, "bf16", "fp16", True, f"bf16 files to fp16, {COLD}"),
        Way("ours, converting", "fp16", None, True, f"bf16 files to fp16, {COLD}"),
        Way("ours, as stored", "bf16", None, True, f"bf16, {COLD}"),
        Way("ours, as stored, from the cache", "bf16", None, False, f"bf16, {WARM}"),
    ),
}


def load_stage(
    size: str, device: torch.device, rounds: int, checkpoint: Path | None = None
) -> list[common.Row]:
    """Load until every page of every weight was used.

    Args:
        size: "tiny" = the built-in checkpoint, from the system's cache. "large" = about 5 GB: the DiT of the published
            size, and the backbone in its full width with few layers; also cold.
        checkpoint: a folder to load as the large one.
    """
    if size == "tiny":
        return _measure(BUILT_IN_MODEL, size, device, rounds)
    if checkpoint is not None:
        return _measure(checkpoint, size, device, rounds)
    if shutil.disk_usage(tempfile.gettempdir()).free < LARGE_FREE_BYTES:
        print(f"load, large: left out, {tempfile.gettempdir()} has too little room", file=sys.stderr)
        return []
    with tempfile.TemporaryDirectory() as folder:
        _new_process({"write_to": folder})  # a process inherits the peak memory of the one that starts it
        return _measure(Path(folder), size, device, rounds)


def _write_large(folder: Path) -> None:
    """A checkpoint without decoder; its weights repeat one block of random numbers."""
    config = dict(open_checkpoint(BUILT_IN_MODEL).config) | TEXTS["full"]
    heads, kv_heads = HEADS["full"]
    config |= {
        "num_hidden_layers": LARGE_LAYERS,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "rope_scaling": {**config["rope_scaling"], "mrope_section": [16, 24, 24]},
        "vision_config": {**config["vision_config"], "out_hidden_size": config["hidden_size"]},
    }
    with torch.device("meta"):
        networks: dict[str, Any] = {
            "backbone": Backbone(config, vocab_size=VOCABULARY["full"], queries=QUERIES, tie_head=False),
            "dit": NextDiT(DITS["full"]),
        }
    block = torch.randn(2**24).to(torch.bfloat16)
    for network in networks.values():
        network.to(torch.bfloat16).to_empty(device="cpu")
        for parameter in network.parameters():
            for part in parameter.detach().view(-1).split(block.numel()):
                part.copy_(block[: part.numel()])
    save_checkpoint(folder, config, **networks)


def _measure(checkpoint: Path, size: str, device: torch.device, rounds: int) -> list[common.Row]:
    files = open_checkpoint(checkpoint)
    components = [name for name in ("backbone", "dit", "decoder") if files.has_component(name)]
    used = sum(files.component_bytes[name] for name in components)
    paths = sorted(checkpoint.rglob("*.safetensors"))
    found: dict[Way, list[dict[str, float]]] = {way: [] for way in WAYS[size]}
    speeds = []
    for _ in range(rounds):
        speeds.append(_disk_speed(paths, is_cold=any(way.is_cold for way in found)))
        for way, measured in found.items():
            if way.is_cold:
                forget(paths)
            task = {"checkpoint": str(checkpoint), "components": components, "device": str(device)}
            task |= {"dtype": way.dtype, "copied_as": way.copied_as, "paths": [str(path) for path in paths]}
            measured.append(json.loads(_new_process(task).splitlines()[-1]))
    plain = next(iter(found.values()))
    rows = []
    for way, measured in found.items():
        pairs = zip(plain, measured, strict=True)
        medians = {key: statistics.median(entry[key] for entry in measured) for key in measured[0]}
        rows.append(
            common.Row(
                *("load", size, way.name, medians["seconds"]),
                gain=statistics.median(a["seconds"] / b["seconds"] for a, b in pairs),
                limit_seconds=used / max(speeds),
                peak_host_gb=medians["host_bytes"] / 1e9,
                read_gb=medians["disk_bytes"] / 1e9,
                note="; ".join(filter(None, (way.note, "peak host: growth of the process"))),
            )
        )
    return rows


def _disk_speed(paths: list[Path], is_cold: bool) -> float:
    """Bytes a second of reading the files from beginning to end and keeping nothing.

    The limit is the fastest of the rounds; a mapped file may still beat it, because reading copies every byte once.
    """
    if is_cold:
        forget(paths)
    block = bytearray(8 * 2**20)
    start = time.perf_counter()
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while file.readinto(block):
                pass
    return sum(path.stat().st_size for path in paths) / (time.perf_counter() - start)


def forget(paths: list[Path]) -> None:
    """Take files out of the system's cache."""
    for path in paths:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _new_process(task: dict[str, Any]) -> str:
    """What this file prints when it is run with a task."""
    command = [sys.executable, "-W", "ignore", __file__, json.dumps(task)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def _load_once(task: dict[str, Any]) -> dict[str, float]:
    """Seconds until everything is loaded and used, growth of this process, and bytes that it made the disk read."""
    import accelerate  # noqa: F401 - imports are not what is timed
    import comfyui_blip3o.blip3o_core.models.decoder  # noqa: F401
    from safetensors.torch import load_file

    device, copied_as = torch.device(task["device"]), task["copied_as"]
    # The plain way's networks cost next to nothing: mapped files, never read.
    pipeline = load_pipeline(task["checkpoint"], device="cpu" if copied_as else device, dtype=task["dtype"])
    torch.zeros(1, device=device)
    host, disk = _peak_host(), _disk_bytes()
    start = time.perf_counter()
    if copied_as:
        whole = [load_file(path) for path in task["paths"]]
        copies = [
            {key: value.to(device, DTYPE_NAMES[copied_as]) for key, value in state.items()} for state in whole
        ]
        assert len(copies) == len(whole)  # both are still there
    pipeline.load(*task["components"])
    if not copied_as:
        for name in task["components"]:
            for parameter in getattr(pipeline, name).parameters():
                _use(parameter)
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "host_bytes": _peak_host() - host, "disk_bytes": _disk_bytes() - disk}


def _use(tensor: torch.Tensor) -> None:
    """Read one number of every page."""
    tensor.reshape(-1)[:: PAGE_BYTES // tensor.element_size()].sum()


def _peak_host() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _disk_bytes() -> int:
    """Bytes that the disk has read for this process, where the system tells (Linux), else 0."""
    path = Path("/proc/self/io")
    if not path.is_file():
        return 0
    return next(
        int(line.split()[1]) for line in path.read_text().splitlines() if line.startswith("read_bytes")
    )


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    if "write_to" in given:
        _write_large(Path(given["write_to"]))
    else:
        print(json.dumps(_load_once(given)))
