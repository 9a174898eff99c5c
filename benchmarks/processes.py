"""One command in a process of its own: time, memory and bytes from the disk, as the system counts them."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

SAMPLE_SECONDS = 0.1
PROC = Path("/proc")


@dataclass(frozen=True)
class Measured:
    """What a command did.

    Attributes:
        exit_code: negative = ended by that signal.
        own_bytes: most memory of its own (RssAnon), of the command and its children together; None where the system
            does not tell.
        mapped_bytes: most memory including the mapped pages of files, likewise.
        read_bytes: what the disk read for it; None where the system does not tell.
        is_out_of_time: it was ended because it took too long.
    """

    exit_code: int
    seconds: float
    own_bytes: int | None
    mapped_bytes: int
    read_bytes: int | None
    stdout: str
    stderr: str
    is_out_of_time: bool


def measure(
    command: Sequence[str], *, cwd: Path, threads: int, limit_seconds: float | None = None
) -> Measured:
    """Run a command to its end, or end it after limit_seconds."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONIOENCODING": "utf-8"}
    with tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
        start = time.perf_counter()
        process = subprocess.Popen(
            command, cwd=cwd, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr, env=environment
        )
        sampler = _Sampler(process.pid)
        is_out_of_time = False
        try:
            sampler.start()
            try:
                _wait(process, limit_seconds)
            except subprocess.TimeoutExpired:
                is_out_of_time = True
            seconds = time.perf_counter() - start
            sampler.stop()
        finally:
            _end(process)
        texts = []
        for file in (stdout, stderr):
            file.seek(0)
            texts.append(file.read().decode("utf-8", "replace"))
    return Measured(
        process.returncode,
        seconds,
        sampler.own_bytes if sampler.is_detailed else None,
        sampler.mapped_bytes,
        sum(sampler.read_bytes.values()) if sampler.is_detailed else None,
        *texts,
        is_out_of_time,
    )


class _Sampler(threading.Thread):
    """Looks at a process and its children until it is stopped, and once more then."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.pid = pid
        self.is_detailed = (PROC / str(os.getpid()) / "io").is_file()
        self.own_bytes = self.mapped_bytes = 0
        self.read_bytes: dict[int, int] = {}
        self._is_over = threading.Event()

    def run(self) -> None:
        while not self._is_over.wait(SAMPLE_SECONDS):
            self._look()

    def stop(self) -> None:
        self._is_over.set()
        self.join()
        self._look()

    def _look(self) -> None:
        own = mapped = 0
        for process in _tree(self.pid):
            try:
                if not self.is_detailed:
                    mapped += process.memory_info().rss
                    continue
                # What the disk read is kept after the end, until the parent asks for the exit code; memory is not.
                self.read_bytes[process.pid] = _number(process.pid, "io", r"^read_bytes: (\d+)")
                own += _number(process.pid, "status", r"^RssAnon:\s+(\d+) kB") * 1024
                mapped += _number(process.pid, "status", r"^VmRSS:\s+(\d+) kB") * 1024
            except (OSError, psutil.Error):
                continue  # it has just ended
        self.own_bytes, self.mapped_bytes = max(self.own_bytes, own), max(self.mapped_bytes, mapped)


def _tree(pid: int) -> list[psutil.Process]:
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.Error:
        return []


def _number(pid: int, name: str, pattern: str) -> int:
    found = re.search(pattern, (PROC / str(pid) / name).read_text("utf-8"), re.MULTILINE)
    return int(found.group(1)) if found else 0


def _wait(process: subprocess.Popen, limit_seconds: float | None) -> None:
    """Until the process has ended, whose account stays readable where the system can do that."""
    if not hasattr(os, "waitid"):
        process.wait(limit_seconds)
        return
    end = None if limit_seconds is None else time.monotonic() + limit_seconds
    while not os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG):
        if end is not None and time.monotonic() > end:
            raise subprocess.TimeoutExpired(process.args, limit_seconds or 0)
        time.sleep(SAMPLE_SECONDS / 5)


def _end(process: subprocess.Popen) -> None:
    """End what still runs of a command, its children too."""
    running = _tree(process.pid)
    for each in running:
        try:
            each.kill()
        except psutil.Error:
            continue
    process.wait()
    psutil.wait_procs(running, timeout=10)  # the next command has the memory to itself
