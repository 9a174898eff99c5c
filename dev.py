"""One-command set-up for a fresh machine: makes .venv beside this file, then draws a picture or runs the tests.

    python dev.py picture ["a prompt"]               the embedded tiny model draws, on the CPU
    python dev.py test [pytest options]              ruff, mypy and the tests, with the versions of locks/tested.txt
    python dev.py test --latest [pytest options]     the tests with the newest releases, in .venv-latest
    python dev.py test --oldest [pytest options]     the tests with the oldest releases allowed, in .venv-oldest
    python dev.py lock                               writes the files in locks/ from pyproject.toml

Needs only Python 3.10 or newer. On a machine without an NVIDIA GPU it installs the CPU build of PyTorch.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent
# The version the tests run with, the oldest releases included: no older one has a CPU build for every system.
# ComfyUI users keep their own.
TORCH = "torch==2.13.0"
PACKAGES = ("blip3o_core", "cli", "lora_training", "nodes", "pretraining")
DEFAULT_PROMPT = "a red circle left of a blue square"


class Environment(NamedTuple):
    """A virtual environment beside this file and the constraints pip keeps to in it; None: the newest releases."""

    folder: Path
    constraints: Path | None

    @property
    def python(self) -> Path:
        return self.folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


TESTED = Environment(ROOT / ".venv", ROOT / "locks" / "tested.txt")
OLDEST = Environment(ROOT / ".venv-oldest", ROOT / "locks" / "oldest.txt")
LATEST = Environment(ROOT / ".venv-latest", None)


def main(arguments: list[str]) -> int:
    if sys.version_info < (3, 10):
        print("Python 3.10 or newer is needed.", file=sys.stderr)
        return 2
    command, rest = (arguments or [""])[0], arguments[1:]
    if command == "picture":
        install(TESTED, "cli")
        return run(
            [
                TESTED.python,
                "-m",
                "comfyui_blip3o.cli",
                "generate",
                *(rest or [DEFAULT_PROMPT]),
                "-o",
                "picture.png",
            ]
        )
    if command == "test":
        return test(rest)
    if command == "lock" and not rest:
        return lock()
    print(__doc__)
    return 2


def test(arguments: list[str]) -> int:
    """ruff and mypy, with the locked versions only (others judge differently), then pytest."""
    chosen = [name for name in ("--latest", "--oldest") if name in arguments]
    if len(chosen) > 1:
        print("Choose one of --latest and --oldest.", file=sys.stderr)
        return 2
    if "--oldest" in chosen and sys.version_info >= (3, 12):
        print(
            "The oldest versions have no builds for this Python: use 3.10 or 3.11 for --oldest.",
            file=sys.stderr,
        )
        return 2
    rest = [argument for argument in arguments if argument not in chosen]
    environment = {"--latest": LATEST, "--oldest": OLDEST}[chosen[0]] if chosen else TESTED
    python = environment.python
    install(environment, "test")
    if environment == TESTED and (
        run([python, "-m", "ruff", "check", "."])
        or run([python, "-m", "ruff", "format", "--check", "."])
        or check_types(environment)
    ):
        return 1
    return run([python, "-m", "pytest", *rest])


def check_types(environment: Environment) -> int:
    """mypy over the program; it prints paths below a copy, since a checkout rarely has the package's name."""
    folder = environment.folder / "types"
    package = folder / "comfyui_blip3o"
    shutil.rmtree(package, ignore_errors=True)
    for source in [*ROOT.glob("*.py"), *(path for name in PACKAGES for path in (ROOT / name).rglob("*.py"))]:
        target = package / source.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source, target)  # with its date, by which mypy knows what it has checked before
    return run([environment.python, "-m", "mypy", "--config-file", ROOT / "pyproject.toml"], folder=folder)


def install(environment: Environment, extra: str) -> None:
    """Bring an environment up to date with an extra of pyproject.toml and its lock; does nothing when it already is."""
    stamp = environment.folder / f"installed-{extra}"
    wanted = wanted_state(environment)
    # Newer releases leave no trace in our files, so the newest are asked for each time.
    if environment.constraints and stamp.is_file() and stamp.read_text("utf-8") == wanted:
        return
    make(environment)
    pip = [environment.python, "-m", "pip", "install", "--quiet", *constraint_options(environment)]
    if not environment.constraints:
        pip += ["--upgrade", "--upgrade-strategy", "eager"]
    if not has_torch(environment):
        install_torch(environment)
    print("Installing the project and what it needs ...", flush=True)
    # What builds the project is locked like the rest: no newest setuptools in a place of its own.
    must([*pip, "setuptools"])
    must([*pip, "--no-build-isolation", "--editable", f"{ROOT}[{extra}]", TORCH])
    stamp.write_text(wanted, "utf-8")


def wanted_state(environment: Environment) -> str:
    """Everything in our files that decides what is installed."""
    files = [ROOT / "pyproject.toml", *([environment.constraints] if environment.constraints else [])]
    return "\n".join([TORCH, *(file.read_text("utf-8") for file in files)])


def make(environment: Environment) -> None:
    if not environment.python.is_file():
        print(f"Making {environment.folder.name} ...", flush=True)
        venv.create(environment.folder, with_pip=True)


def constraint_options(environment: Environment) -> list[str | Path]:
    return ["--constraint", environment.constraints] if environment.constraints else []


def lock() -> int:
    """Write both lock files: the newest releases that fit together, for every Python and system, and the floors.

    They hold versions and markers alone. What decides between the CPU and the CUDA build of PyTorch stays in this file.
    """
    with tempfile.TemporaryDirectory() as folder:
        # Not in .venv, which holds what the lock says and nothing else.
        tools = Environment(Path(folder) / "environment for the lock", None)
        make(tools)
        must([tools.python, "-m", "pip", "install", "--quiet", "uv"])
        compile_command: list[str | Path] = [
            tools.python,
            "-m",
            "uv",
            "pip",
            "compile",
            "--quiet",
            "--universal",
        ]
        compile_command += ["--python-version", "3.10", "--all-extras", "--no-annotate"]
        compile_command += ["--custom-compile-command", "python dev.py lock", ROOT / "pyproject.toml", "-"]
        compiled = {
            TESTED: capture(compile_command, f"{TORCH}\nuv\n"),
            OLDEST: capture([*compile_command, "--resolution", "lowest-direct", "--no-deps"], f"{TORCH}\n"),
        }
    for environment, text in compiled.items():
        path = environment.constraints
        assert path is not None
        path.parent.mkdir(exist_ok=True)
        part = path.with_name(f"{path.name}.part")
        part.write_text(text, "utf-8", newline="\n")
        part.replace(path)
        print(f"Wrote {path.relative_to(ROOT).as_posix()}.")
    return 0


def has_torch(environment: Environment) -> bool:
    """Whether the wanted version of PyTorch is there, in whichever build."""
    code = f"import torch; assert torch.__version__.partition('+')[0] == {TORCH.partition('==')[2]!r}"
    return run([environment.python, "-c", code], quiet=True) == 0


def install_torch(environment: Environment) -> None:
    """PyTorch, without gigabytes of CUDA packages on a machine that has no NVIDIA GPU."""
    print("Installing PyTorch ...", flush=True)
    python, constraints = environment.python, constraint_options(environment)
    if has_nvidia_gpu() or not wants_cuda_packages(python):
        must([python, "-m", "pip", "install", "--quiet", *constraints, TORCH])
        return
    # The plain Linux build brings CUDA along; uv knows where PyTorch keeps its CPU builds.
    must([python, "-m", "pip", "install", "--quiet", *constraints, "uv"])
    uv = [python, "-m", "uv", "pip", "install", "--quiet", "--python", python, *constraints]
    must([*uv, "--torch-backend", "cpu", TORCH])


def has_nvidia_gpu() -> bool:
    return shutil.which("nvidia-smi") is not None and run(["nvidia-smi"], quiet=True) == 0


def wants_cuda_packages(python: Path) -> bool:
    """Whether pip's own plan for PyTorch holds CUDA packages."""
    plan = subprocess.run(
        [
            python,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--dry-run",
            "--ignore-installed",
            "--report",
            "-",
            TORCH,
        ],
        capture_output=True,
        text=True,
    )
    if plan.returncode:
        raise SystemExit(f"pip cannot find {TORCH}:\n{plan.stderr}")
    names = [item["metadata"]["name"].lower() for item in json.loads(plan.stdout)["install"]]
    return any(name.startswith(("nvidia", "cuda")) for name in names)


def run(command: list[str | Path], quiet: bool = False, folder: Path = ROOT) -> int:
    output = subprocess.DEVNULL if quiet else None
    return subprocess.run(
        [str(part) for part in command], cwd=folder, stdout=output, stderr=output
    ).returncode


def capture(command: list[str | Path], given: str) -> str:
    """What a command prints when it reads `given`; ends this program when it fails."""
    done = subprocess.run(
        [str(part) for part in command], cwd=ROOT, input=given, stdout=subprocess.PIPE, encoding="utf-8"
    )
    if done.returncode:
        raise SystemExit(done.returncode)
    return done.stdout


def must(command: list[str | Path]) -> None:
    code = run(command)
    if code:
        raise SystemExit(code)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
