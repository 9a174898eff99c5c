"""`blip3o doctor`: is everything well, and what to do about what is not."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from .options import command

EXIT_WRONG = 1


def add_doctor(commands: Any) -> None:
    """Add the command to the parsers of `blip3o`."""
    parser = command(
        commands,
        "doctor",
        run_doctor,
        "Is everything well? Versions, device and memory, checkpoints, a self-test; and what to do.",
    )
    parser.epilog = "Exit code 0: all is well. 1: something is wrong. --json names no folder, user or computer: paste it into a bug report."
    parser.add_argument(
        "folder",
        type=Path,
        nargs="*",
        help="checkpoint folders, or folders that hold some (default: models/blip3o of the ComfyUI in whose custom_nodes this project "
        "lies, or in whose folder you are); the built-in model is always looked at",
    )
    parser.add_argument(
        "--no-self-test", action="store_true", help="do not compute on the built-in model (takes seconds)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON for scripts and bug reports")


def run_doctor(arguments: argparse.Namespace) -> int:
    """Print the diagnosis; returns the exit code."""
    from ..blip3o_core.doctor import comfyui_models, diagnose

    diagnosis = diagnose(arguments.folder or comfyui_models(), self_test=not arguments.no_self_test)
    print(json.dumps(diagnosis.to_json(), indent=2) if arguments.json else diagnosis)
    return 0 if diagnosis.is_well else EXIT_WRONG
