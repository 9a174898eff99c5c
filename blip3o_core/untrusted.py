"""What comes out of files that strangers share: read with bounds, and never leading out of its folder."""

from __future__ import annotations

import json
import reprlib
from pathlib import Path, PureWindowsPath
from typing import Any

from .errors import WrongCheckpointError

MAX_JSON_BYTES = 128 * 2**20
# The limit of safetensors itself.
MAX_HEADER_BYTES = 100 * 2**20
# Digits of a number, layers of a network, sides of a picture: whatever a file counts has fewer.
MAX_DIGITS = 9
# Names that mean a device on Windows, whatever ending they have.
DEVICES = frozenset(
    {"con", "prn", "aux", "nul", *(f"{port}{n}" for port in ("com", "lpt") for n in range(1, 10))}
)
_short = reprlib.Repr()
_short.maxstring = _short.maxother = 60
_short.maxlevel = 2


def quote(value: Any) -> str:
    """A value for a message, shortened whatever it holds."""
    return _short.repr(value)


def parse_json(data: bytes | str) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: it is no JSON, too long, or nested too deep to be read.
    """
    if len(data) > MAX_JSON_BYTES:
        raise ValueError(f"it is longer than {MAX_JSON_BYTES // 2**20} MB")
    try:
        return json.loads(data)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def parse_object(data: bytes | str) -> dict[str, Any]:
    """The value of a JSON text that is an object; see parse_json."""
    value = parse_json(data)
    if not isinstance(value, dict):
        raise ValueError("it holds no object")
    return value


def whole_number(text: str) -> int | None:
    """The number that a text of plain digits means; None for anything else."""
    return int(text) if text.isascii() and text.isdigit() and len(text) <= MAX_DIGITS else None


def is_inner_name(name: str) -> bool:
    """Whether a relative name stays in the folder it is looked up in, on every system.

    No drive, root or network share, no "..", no device of Windows, nothing that Windows would read as another name.
    """
    path = PureWindowsPath(name)  # knows both slashes
    return (
        bool(path.parts)
        and not path.anchor
        and not name.startswith(("/", "\\", "~"))
        and "\0" not in name
        and all(
            part != ".."
            and part.rstrip(". ") == part
            and ":" not in part
            and part.split(".")[0].strip().lower() not in DEVICES
            for part in path.parts
        )
    )


def inner_path(folder: Path, name: str) -> Path | None:
    """The path of a name inside a folder; None when the name, or a link on its way, leads out of it."""
    if not is_inner_name(name):
        return None
    path = folder / name
    return path if path.resolve().is_relative_to(folder.resolve()) else None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        WrongCheckpointError: it is not valid JSON.
    """
    try:
        value = parse_json(path.read_bytes())
    except ValueError as error:
        raise WrongCheckpointError(
            f'"{path.name}" in "{path.parent}" is not readable JSON.\nDelete it and download it again. ({error})'
        ) from error
    if not isinstance(value, dict):
        raise WrongCheckpointError(f'"{path}" holds no JSON object.\nDelete it and download it again.')
    return value
