"""Shared by the stages: the package, timing in turn, what the machine can do at best, rows and tables."""

from __future__ import annotations

import importlib.util
import math
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parents[1]
if "comfyui_blip3o" not in sys.modules:  # as ComfyUI loads the checkout, without an install
    spec = importlib.util.spec_from_file_location("comfyui_blip3o", ROOT / "__init__.py")
    sys.modules["comfyui_blip3o"] = package = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(package)

COLUMNS = {
    "stage": "stage",
    "size": "size",
    "mode": "mode",
    "seconds": "seconds",
    "gain": "times as fast as plain",
    "limit_seconds": "limit, s",
    "difference": "difference",
    "peak_device_gb": "peak device, GB",
    "peak_host_gb": "peak host, GB",
    "read_gb": "read from disk, GB",
    "note": "note",
}


@dataclass
class Row:
    """One line of the table.

    Attributes:
        mode: what was done; the first mode of a stage is the plain one.
        seconds: median; None when it could not be done.
        gain: median over the rounds of plain / this, both timed in the same round.
        limit_seconds: what the machine needs at least for the bytes and the arithmetic of this mode.
        difference: from the plain result, in units of its spread; or as the note says.
        peak_device_gb, peak_host_gb: most memory while it ran; the host's is of the process so far.
        read_gb: bytes that came from the disk.
    """

    stage: str
    size: str
    mode: str
    seconds: float | None
    gain: float | None = None
    limit_seconds: float | None = None
    difference: float | None = None
    peak_device_gb: float | None = None
    peak_host_gb: float | None = None
    read_gb: float | None = None
    note: str = ""


@dataclass
class Mode:
    """One way to do a stage's work.

    Attributes:
        run: does it once and returns what it made.
        work: how many times the stage's unit of work one run does, e.g. pictures; times are per unit.
        flops, moved: arithmetic operations and bytes that one unit needs at least.
        note: for the table.
    """

    run: Callable[[], Any]
    work: int = 1
    flops: float = 0.0
    moved: float = 0.0
    note: str = ""
    is_comparable: bool = True


@dataclass(frozen=True)
class Limits:
    """What the device does at best: bytes read a second, and arithmetic operations a second in the run's dtype."""

    bandwidth: float
    flops: float


def measure_limits(device: torch.device, dtype: torch.dtype) -> Limits:
    """Read a large tensor and multiply large matrices."""
    large = torch.ones(2**28 if device.type == "cuda" else 2**25, device=device)
    bandwidth = large.nbytes / min(_seconds(large.sum, device) for _ in range(10))
    from comfyui_blip3o.blip3o_core.performance.linear import multiply

    side = 8192 if device.type == "cuda" else 1024
    with torch.no_grad():
        one, other = torch.randn(2, side, side, device=device, dtype=dtype)
        fastest = min(_seconds(lambda: multiply(one, other), device) for _ in range(10))
    return Limits(bandwidth, 2 * side**3 / fastest)


def _seconds(run: Callable[[], Any], device: torch.device) -> float:
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


@torch.no_grad()
def compare(
    stage: str, size: str, modes: dict[str, Mode], *, device: torch.device, rounds: int, limits: Limits
) -> list[Row]:
    """Run all modes in turn, `rounds` times after a warm-up; the first is the plain one."""
    plain = next(iter(modes))
    results = {name: mode.run() for name, mode in modes.items()}
    peaks: dict[str, float] = {}
    times: dict[str, list[float]] = {name: [] for name in modes}
    for _ in range(rounds):
        for name, mode in modes.items():
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            times[name].append(_seconds(mode.run, device) / mode.work)
            if device.type == "cuda":
                peaks[name] = torch.cuda.max_memory_allocated() / 1e9
    rows = []
    for name, mode in modes.items():
        ratios = [a / b for a, b in zip(times[plain], times[name], strict=True)]
        limit = max(mode.flops / limits.flops, mode.moved / limits.bandwidth)
        rows.append(
            Row(
                *(stage, size, name, statistics.median(times[name])),
                gain=statistics.median(ratios),
                limit_seconds=limit or None,
                difference=_difference(results[name], results[plain])
                if name != plain and mode.is_comparable
                else None,
                peak_device_gb=peaks.get(name),
                peak_host_gb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
                note=mode.note,
            )
        )
    return rows


def _difference(ours: Any, plain: Any) -> float | None:
    if isinstance(plain, Tensor):
        return ((ours.float() - plain.float()).abs().max() / plain.float().std()).item()
    return float(ours != plain)


def count_flops(run: Callable[[], Any]) -> float:
    """Arithmetic operations of PyTorch's products, convolutions and attentions in one run."""
    # The counter does not know oneDNN's products.
    with pytorch_products(), torch.no_grad(), FlopCounterMode(display=False) as counter:
        run()
    return float(counter.get_total_flops())


@contextmanager
def pytorch_products() -> Iterator[None]:
    """Linear layers multiply as PyTorch does, see models/linear.py."""
    from comfyui_blip3o.blip3o_core.performance import linear

    with mock.patch.object(linear, "WORTHWHILE_PRODUCTS", math.inf):
        yield


def weight_bytes(module: torch.nn.Module) -> int:
    return sum(parameter.nbytes for parameter in module.parameters())


def to_markdown(rows: list[Row]) -> str:
    """A table; columns that are empty in all rows are left out."""
    entries = [asdict(row) for row in rows]
    columns = [key for key in COLUMNS if any(entry[key] not in (None, "") for entry in entries)]
    lines = ["| " + " | ".join(COLUMNS[key] for key in columns) + " |", "|" + " --- |" * len(columns)]
    lines += ["| " + " | ".join(_cell(entry[key]) for key in columns) + " |" for entry in entries]
    return "\n".join(lines) + "\n"


def _cell(value: Any) -> str:
    if isinstance(value, float) and math.isfinite(value):
        return f"{value:.2g}" if abs(value) < 0.01 else f"{value:.3g}"
    return "" if value is None else str(value)
