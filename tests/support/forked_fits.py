"""Fits in forked children, which share one import of torch: killed at any moment, or as several processes.

Run as a script (autograd does not survive a fork of a process that has used it): forked_fits.py kills|processes FOLDER.
Prints one line of JSON.
"""

import importlib.util
import json
import logging
import os
import random
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[1]
SETTINGS: dict[str, Any] = {
    "adapter__targets": "cross",
    "adapter__rank": 2,
    "train__steps": 40,
    "train__batch": 2,
    "train__ema": 0.9,
    "save__every_seconds": 0,
    "save__keep": 2,
    "validate__every": 7,
}
# Calls at which a write can be cut off.
WRITES = ("fsync", "rename", "replace", "mkdir", "rmdir", "unlink")


def in_child(work: Callable[[], None], *, kill_after: float | None = None) -> int:
    """Exit status of a forked child that did the work; negative = the signal that ended it."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            if kill_after is not None:
                # The default action of the alarm would be a gentler signal: SIGKILL leaves no time for anything.
                signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
                signal.setitimer(signal.ITIMER_REAL, kill_after)
            work()
            code = 0
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill_at_write(number: int) -> None:
    """Make this process kill itself at its so-manieth write."""
    count = 0

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any, **named: Any) -> Any:
            nonlocal count
            count += 1
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*given, **named)

        return call

    for name in WRITES:
        setattr(os, name, counted(getattr(os, name)))


def run_killed(folder: Path, kills: int) -> dict[str, Any]:
    """A straight run and one killed so many times: what was lost at each kill, and whether both end equal."""
    from comfyui_blip3o.lora_training.fit.loop import load_result
    from comfyui_blip3o.lora_training.fit.state import newest_state
    from tiny_training import run_fit, same, validation

    def work(name: str) -> None:
        def judge(adapter: Any, step: int) -> Any:
            return validation(step, gain=-abs(step - 21))

        run_fit(folder / name, validate=judge, **SETTINGS)

    started = time.monotonic()
    assert in_child(lambda: work("straight")) == 0
    seconds = time.monotonic() - started
    choose = random.Random(0)
    states = folder / "killed" / "run" / "state"
    statuses, lost, step, restarts, deepest = [], 0, -1, 0, 0
    while len(statuses) < kills:
        at_write = choose.randint(1, 80) if choose.random() < 0.5 else None
        moment = seconds * choose.random()

        def doomed(at_write: int | None = at_write) -> None:
            if at_write:
                kill_at_write(at_write)
            work("killed")

        status = in_child(doomed, kill_after=None if at_write else moment)
        if status == 0:  # finished before its death: another run from the start
            shutil.rmtree(folder / "killed")
            step, restarts = -1, restarts + 1
            continue
        statuses.append(status)
        state = newest_state(states)
        found = -1 if state is None else state.step
        lost += found < step
        step, deepest = found, max(deepest, found)
    assert in_child(lambda: work("killed")) == 0
    straight, killed = (load_result(folder / name / "run") for name in ("straight", "killed"))
    return {
        "killed": statuses.count(-signal.SIGKILL),
        "others": [status for status in statuses if status != -signal.SIGKILL],
        "states_lost": lost,
        "restarts": restarts,
        "deepest": deepest,
        "equal": [same(getattr(straight, part), getattr(killed, part)) for part in ("best", "last", "ema")],
        "losses_equal": straight.losses == killed.losses,
        "best_steps": [straight.best_step, killed.best_step],
    }


def run_processes(folder: Path) -> dict[str, Any]:
    """The same fit in one and in two processes: the largest difference between what they learned."""
    from comfyui_blip3o.lora_training.fit.loop import load_result
    from tiny_training import run_fit, stop_after, validation

    options = {
        "train__prior": {"dop": True, "prompts": ["a red circle"]},
        "train__batch": 5,
        "train__steps": 6,
    }

    def fit_all(name: str, **more: Any) -> None:
        run_fit(folder / name, validate=lambda adapter, step: validation(step, gain=-step), **options, **more)

    def together(name: str, rank: int, port: int) -> None:
        os.environ |= {
            "WORLD_SIZE": "2",
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "ACCELERATE_USE_CPU": "true",
        }
        if name == "patient":
            fit_all(name, validate__every=1, validate__patience=2)
        elif name == "stopped":
            from comfyui_blip3o.lora_training.records import Interrupted

            try:
                fit_all(name, should_stop=stop_after(3) if rank == 1 else lambda: False)
            except Interrupted:
                return
            raise AssertionError("did not stop")
        else:
            fit_all(name)

    statuses = [in_child(lambda: fit_all("one"))]
    for name in ("two", "stopped", "patient"):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        children = []
        for rank in (0, 1):
            child = os.fork()
            if child == 0:
                code = 1
                try:
                    together(name, rank, port)
                    code = 0
                except BaseException:
                    import traceback

                    traceback.print_exc()
                finally:
                    os._exit(code)
            children.append(child)
        statuses += [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    statuses.append(in_child(lambda: fit_all("stopped")))
    results = {name: load_result(folder / name / "run") for name in ("one", "two", "stopped", "patient")}
    one = results["one"]

    def difference(name: str, part: str) -> float:
        ours, theirs = getattr(one, part), getattr(results[name], part)
        return max((ours[key] - theirs[key]).abs().max().item() for key in ours)

    return {
        "statuses": statuses,
        "differences": [
            difference(name, part) for name in ("two", "stopped") for part in ("last", "ema", "best")
        ],
        "losses": [one.losses, results["two"].losses],
        "patient": [results["patient"].steps, results["patient"].stopped_because],
    }


if __name__ == "__main__":
    spec = importlib.util.spec_from_file_location("conftest", TESTS / "conftest.py")
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    sys.path.insert(0, str(TESTS / "support"))
    import torch

    torch.set_num_threads(1)
    logging.disable()
    import peft  # noqa: F401 - once, before the children are made
    import tiny_training  # noqa: F401

    what, where = sys.argv[1:3]
    result = run_killed(Path(where), int(sys.argv[3])) if what == "kills" else run_processes(Path(where))
    print(json.dumps(result))  # noqa: T201 - the answer of this script
