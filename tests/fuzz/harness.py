"""Runs cases, each in a process of its own with bounds of time and memory, and says how each ended."""

from __future__ import annotations

import collections
import json
import logging
import os
import resource
import select
import shutil
import signal
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
from comfyui_blip3o.blip3o_core.errors import Blip3oError

from .targets import TARGETS, Target

# The most that a small file may cost.
SECONDS = 10.0
BYTES_BEYOND = 2**30 + 2**28
MAX_MESSAGE = 4000
WELL = ("read", "named")
SENTINEL = "EXECUTED"


@dataclass(frozen=True)
class Outcome:
    """How a case ended.

    Attributes:
        kind: read, named (an error of the program's own), raw (any other), hang, memory, killed, outside,
            executed or leftover.
        detail: the message, or the last lines of the traceback.
    """

    target: str
    case: int
    kind: str
    detail: str
    seconds: float


def run_cases(cases: int, seed: int = 0, first: int = 0, only: str | None = None) -> Iterator[Outcome]:
    """Outcomes of `cases` cases from number `first` on, the targets in turn; the same numbers give the same files."""
    torch.set_num_threads(1)
    names = [name for name in TARGETS if only in (None, name)]
    with tempfile.TemporaryDirectory() as place:
        originals = {}
        for number, name in enumerate(names):
            originals[name] = Path(place) / str(number)
            originals[name].mkdir()
            TARGETS[name].prepare(originals[name])
            sound = _in_a_process(TARGETS[name], _copy(originals[name], Path(place) / f"{number} sound"))
            assert sound[0] == "read", f"{name} is not even read when it is sound: {sound}"
        for case in range(first, first + cases):
            name = names[case % len(names)]
            yield _run_case(name, TARGETS[name], originals[name], seed, case)


def _run_case(name: str, target: Target, original: Path, seed: int, case: int) -> Outcome:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "inside" / "folder"
        _copy(original, folder)
        target.spoil(folder, Random(f"{seed}:{name}:{case}"))
        started = time.monotonic()
        kind, detail = _in_a_process(target, folder)
        seconds = time.monotonic() - started
        around = {path.name for path in (*Path(place).iterdir(), *(Path(place) / "inside").iterdir())}
        if list(Path(place).rglob(SENTINEL)):
            kind = "executed"
        elif around - {"inside", "folder"}:
            kind, detail = "outside", str(around)
        elif list(folder.rglob("*.part")):
            kind, detail = "leftover", str(list(folder.rglob("*.part")))
        return Outcome(name, case, kind, detail, seconds)


def _copy(original: Path, folder: Path) -> Path:
    """Links, as the files are large; a spoilt one takes the place of its link."""
    return Path(shutil.copytree(original, folder, copy_function=os.link))


def _in_a_process(target: Target, folder: Path) -> tuple[str, str]:
    reading, writing = os.pipe()
    process = os.fork()
    if not process:
        os.close(reading)
        os.write(writing, json.dumps(_outcome(target, folder)).encode()[:60_000])
        os._exit(0)
    os.close(writing)
    try:
        ready, _, _ = select.select([reading], [], [], SECONDS)
        if not ready:
            os.kill(process, signal.SIGKILL)
        _, status = os.waitpid(process, 0)
        if not ready:
            return "hang", f"more than {SECONDS:.0f} s"
        with os.fdopen(os.dup(reading), "rb") as file:
            told = file.read()
        if not told:
            return "killed", f"by signal {os.WTERMSIG(status)}"
        kind, detail = json.loads(told)
        return kind, detail
    finally:
        os.close(reading)


def _outcome(target: Target, folder: Path) -> tuple[str, str]:
    logging.disable()
    warnings.simplefilter("ignore")
    os.chdir(folder)
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (in_use + BYTES_BEYOND,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        target.read(folder)
        return "read", ""
    except Blip3oError as error:
        message = str(error)
        return (
            ("named", message)
            if 10 < len(message) < MAX_MESSAGE
            else ("raw", f"a message of {len(message)} letters")
        )
    except MemoryError:
        return "memory", traceback.format_exc()[-1500:]
    except BaseException as error:
        kind = "memory" if "allocate" in str(error) else "raw"
        return kind, traceback.format_exc()[-1500:]


def table(outcomes: list[Outcome]) -> str:
    """Targets and how their cases ended, as Markdown."""
    counts = collections.Counter((outcome.target, outcome.kind) for outcome in outcomes)
    kinds = [*WELL, *sorted({outcome.kind for outcome in outcomes} - set(WELL))]
    slowest = {outcome.target: 0.0 for outcome in outcomes}
    for outcome in outcomes:
        slowest[outcome.target] = max(slowest[outcome.target], outcome.seconds)
    rows = [f"| spoilt | {' | '.join(kinds)} | slowest |", f"|---|{'---:|' * (len(kinds) + 1)}"]
    for name, seconds in slowest.items():
        rows.append(f"| {name} | {' | '.join(str(counts[name, kind]) for kind in kinds)} | {seconds:.1f} s |")
    sums = [str(sum(counts[name, kind] for name in slowest)) for kind in kinds]
    return "\n".join([*rows, f"| all {len(outcomes)} | {' | '.join(sums)} | {max(slowest.values()):.1f} s |"])
