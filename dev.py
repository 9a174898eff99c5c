"""One-command set-up for a fresh machine: makes .venv beside this file, then draws a picture or runs the tests.

    python dev.py picture ["a prompt"]      the embedded tiny model draws, on the CPU
    python dev.py test [pytest options]     ruff and the tests

Needs only Python 3.10 or newer. On a machine without an NVIDIA GPU it installs the CPU build of PyTorch.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
# The version the tests run with; ComfyUI users keep their own.
TORCH = "torch==2.13.0"
DEFAULT_PROMPT = "a red circle left of a blue square"


def main(arguments: list[str]) -> int:
    if sys.version_info < (3, 10):
        print("Python 3.10 or newer is needed.", file=sys.stderr)
        return 2
    if not arguments or arguments[0] not in ("picture", "test"):
        print(__doc__)
        return 2
    command, rest = arguments[0], arguments[1:]
    if command == "picture":
        install("cli")
        return run(
            [PYTHON, "-m", "comfyui_blip3o.cli", "generate", *(rest or [DEFAULT_PROMPT]), "-o", "picture.png"]
        )
    install("test")
    if run([PYTHON, "-m", "ruff", "check", "."]) or run([PYTHON, "-m", "ruff", "format", "--check", "."]):
        return 1
    return run([PYTHON, "-m", "pytest", *rest])


def install(extra: str) -> None:
    """Bring .venv up to date with an extra of pyproject.toml; does nothing when it already is."""
    stamp = VENV / f"installed-{extra}"
    wanted = (ROOT / "pyproject.toml").read_text("utf-8")
    if stamp.is_file() and stamp.read_text("utf-8") == wanted:
        return
    if not PYTHON.is_file():
        print("Making .venv ...", flush=True)
        venv.create(VENV, with_pip=True)
    if run([PYTHON, "-c", "import torch"], quiet=True):
        install_torch()
    print("Installing the project and what it needs ...", flush=True)
    must([PYTHON, "-m", "pip", "install", "--quiet", "--editable", f"{ROOT}[{extra}]"])
    stamp.write_text(wanted, "utf-8")


def install_torch() -> None:
    """PyTorch, without gigabytes of CUDA packages on a machine that has no NVIDIA GPU."""
    print("Installing PyTorch ...", flush=True)
    if has_nvidia_gpu() or not wants_cuda_packages():
        must([PYTHON, "-m", "pip", "install", "--quiet", TORCH])
        return
    # The plain Linux build brings CUDA along; uv knows where PyTorch keeps its CPU builds.
    must([PYTHON, "-m", "pip", "install", "--quiet", "uv"])
    must(
        [PYTHON, "-m", "uv", "pip", "install", "--quiet", "--python", PYTHON, "--torch-backend", "cpu", TORCH]
    )


def has_nvidia_gpu() -> bool:
    return shutil.which("nvidia-smi") is not None and run(["nvidia-smi"], quiet=True) == 0


def wants_cuda_packages() -> bool:
    """Whether pip's own plan for PyTorch holds CUDA packages."""
    plan = subprocess.run(
        [
            PYTHON,
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


def run(command: list[str | Path], quiet: bool = False) -> int:
    output = subprocess.DEVNULL if quiet else None
    return subprocess.run([str(part) for part in command], cwd=ROOT, stdout=output, stderr=output).returncode


def must(command: list[str | Path]) -> None:
    code = run(command)
    if code:
        raise SystemExit(code)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
