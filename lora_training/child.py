"""Training in a process of its own, so that all of its memory comes back: started by file path, spoken to in JSON lines.

This file is a module and a script. As a script it must run from a folder of any name that is not installed, so nothing
of the package is imported before the package is loaded.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import LoraConfig
    from .run import RunResult

STOP = "stop"
ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "comfyui_blip3o"
KEPT_LINES = 40
# As a shell counts a process that was killed.
EXIT_KILLED = 137
# How long a child may take to end: after it was left, after it was killed, and after its parent has died.
LEFT_SECONDS, KILLED_SECONDS, ORPHAN_SECONDS = 120, 10, 60


class TrainingProcess:
    """A run in a child process. Leaving its `with` block stops it.

    Args:
        config: of the run.
        only: phases to do; None = all.
        fresh: forget what an earlier run of this name has learned.
    """

    def __init__(self, config: LoraConfig, *, only: Sequence[str] | None = None, fresh: bool = False) -> None:
        from .config import parse_config, to_tree, to_yaml

        # The child reads the file elsewhere: relative paths count from here.
        self.config = config = parse_config(to_tree(config), base=Path.cwd())
        self._folder = tempfile.TemporaryDirectory(prefix="blip3o-lora-")
        path = Path(self._folder.name) / "run.yaml"
        path.write_text(to_yaml(config), "utf-8")
        command = [sys.executable, str(Path(__file__).resolve()), str(path), "--events", "-"]
        if only is not None:
            command += ["--only", *only]
        if fresh:
            command.append("--fresh")
        self._done: dict[str, Any] | None = None
        self._error: dict[str, Any] | None = None
        self._said: list[str] = []
        self._is_killed = False
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True, encoding="utf-8", errors="replace",
        )  # fmt: skip
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    def __enter__(self) -> TrainingProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        impatience = threading.Timer(LEFT_SECONDS, self.kill)
        impatience.start()
        try:
            self.wait()
        finally:
            impatience.cancel()

    def events(self) -> Iterator[dict[str, Any]]:
        """The run's events as they happen; the last is "done" or "error", unless the process was killed."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            try:
                event = json.loads(line)
            except ValueError:
                continue
            if event.get("event") == "done":
                self._done = event
            elif event.get("event") == "error":
                self._error = event
            yield event

    def stop(self) -> None:
        """Ask to finish the step, save and end. A second call changes nothing; kill ends it at once."""
        pipe = self._process.stdin
        if self._process.poll() is None and pipe is not None and not pipe.closed:
            try:
                pipe.write(f"{STOP}\n")
                pipe.close()
            except OSError:
                pass  # it has just ended

    def kill(self) -> None:
        """End it at once; the newest saved state stays."""
        self._is_killed = True
        self._process.kill()

    def wait(self) -> int:
        """Read what is left of its events and give its exit code, see run.exit_code."""
        if self._is_killed:
            try:
                code = self._process.wait(timeout=KILLED_SECONDS)
            except subprocess.TimeoutExpired:
                # It hangs inside the system, on a disk that is gone: nobody can end it, and nobody waits for it.
                return EXIT_KILLED
        else:
            for _ in self.events():
                pass
            code = self._process.wait()
        self._listener.join(timeout=5)
        if self._process.stdin is not None and not self._process.stdin.closed:
            self._process.stdin.close()
        self._folder.cleanup()
        return code

    def result(self) -> RunResult:
        """What the run ended with.

        Raises:
            Interrupted, Diverged, OutOfMemory, Blip3oError: as train_lora, with the child's words.
        """
        from ..blip3o_core.errors import Blip3oError
        from .records import Diverged, Interrupted, OutOfMemory
        from .run import EXIT_DIVERGED, EXIT_DONE, EXIT_INTERRUPTED, EXIT_MEMORY, read_result

        code = self.wait()
        if code == EXIT_DONE:
            return read_result(self.config, (self._done or {}).get("seconds", 0.0))
        kinds = {EXIT_INTERRUPTED: Interrupted, EXIT_DIVERGED: Diverged, EXIT_MEMORY: OutOfMemory}
        if self._error is not None:
            raise kinds.get(code, Blip3oError)(self._error["message"])
        said = "\n".join(self._said)
        raise Blip3oError(
            f"The training process ended without a word (code {code}); the newest saved state is kept.\n"
            f"Run it again to go on. Its last words:\n{said}"
        )

    def _listen(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self._said.append(line.rstrip())
            del self._said[:-KEPT_LINES]


def start_training(
    config: LoraConfig | Mapping[str, Any], *, only: Sequence[str] | None = None, fresh: bool = False
) -> TrainingProcess:
    """Begin a run in a child process.

    Args:
        config: a configuration, or plain values for parse_config.

    Raises:
        BadInputError: see parse_config.
    """
    from .config import LoraConfig, parse_config

    return TrainingProcess(
        config if isinstance(config, LoraConfig) else parse_config(config), only=only, fresh=fresh
    )


def main(argv: Sequence[str] | None = None) -> int:
    """The child's side: train as the configuration says, write events, give the exit code."""
    from ..blip3o_core.errors import Blip3oError
    from .config import read_config
    from .run import EXIT_DONE, exit_code, train_lora

    parser = argparse.ArgumentParser(description="Train a LoRA as a child process.")
    parser.add_argument("config", type=Path)
    parser.add_argument("--events", default="-", choices=["-"], help="JSON lines to standard output")
    parser.add_argument("--only", nargs="+", metavar="PHASE")
    parser.add_argument("--fresh", action="store_true")
    arguments = parser.parse_args(argv)
    out = sys.stdout
    # Whatever else prints must not get between the events.
    sys.stdout = sys.stderr
    is_stopped = threading.Event()
    threading.Thread(target=_wait_for_stop, args=(is_stopped,), daemon=True).start()

    def tell(event: dict[str, Any]) -> None:
        print(json.dumps(event, ensure_ascii=True, default=str), file=out, flush=True)

    try:
        train_lora(
            read_config(arguments.config),
            on_event=tell,
            should_stop=is_stopped.is_set,
            only=arguments.only,
            fresh=arguments.fresh,
        )
    except Blip3oError as error:
        # train_lora has told of it.
        return exit_code(error)
    return EXIT_DONE


def _wait_for_stop(is_stopped: threading.Event) -> None:
    """A line "stop", or the end of standard input because the parent has died: then nobody else can end a stuck training."""
    for line in sys.stdin:
        if line.strip() == STOP:
            is_stopped.set()
            return
    is_stopped.set()
    time.sleep(ORPHAN_SECONDS)
    os._exit(EXIT_KILLED)


def _load_package() -> Any:
    """The package that this file is part of, under its own name whatever its folder is called."""
    sys.path[:] = [
        entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent
    ]
    spec = importlib.util.spec_from_file_location(
        PACKAGE, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    assert spec is not None and spec.loader is not None
    sys.modules[PACKAGE] = package = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(package)
    return importlib.import_module(f"{PACKAGE}.lora_training.child")


if __name__ == "__main__":
    sys.exit(_load_package().main())
