"""What comes out of files that strangers share: read with bounds, and never leading out of its folder."""

from __future__ import annotations

import json
import os
import reprlib
from pathlib import Path, PureWindowsPath
from typing import Any

from .errors import WrongCheckpointError

MAX_JSON_BYTES = 128 * 2**20
MAX_YAML_CHARACTERS = 2**20
MAX_YAML_DEPTH = 32
# The limit of safetensors itself.
MAX_HEADER_BYTES = 100 * 2**20
# Digits of a number, layers of a network, sides of a picture: whatever a file counts has fewer.
MAX_DIGITS = 9
MAX_QUOTED = 120
MAX_WORDS = 300
# Systems allow 255 bytes a part; numbers and endings are added.
MAX_NAME_BYTES = 200
MAX_NAME_PARTS = 20
# Names that mean a device on Windows, whatever ending they have.
DEVICES = frozenset(
    {"con", "prn", "aux", "nul", *(f"{port}{n}" for port in ("com", "lpt") for n in range(1, 10))}
)
_short = reprlib.Repr()
_short.maxstring = _short.maxother = 60
_short.maxlevel = 2


def quote(value: Any) -> str:
    """A value for a message, shortened whatever it holds."""
    try:
        text = f'"{value}"' if isinstance(value, str) else _short.repr(value)
    except ValueError:  # Python prints no number of more than some thousand digits
        text = "a number of thousands of digits"
    return brief(text, MAX_QUOTED)


def brief(words: object, most: int = MAX_WORDS) -> str:
    """What a library says of a file, for a message: it may repeat any length of the file."""
    text = str(words)
    return text if len(text) <= most else f"{text[: most - 3]}..."


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


def is_new_name(name: str) -> bool:
    """Whether a relative name can be given to a new file on every system, with an ending added to it."""
    try:
        parts = [part.encode() for part in name.replace("\\", "/").split("/")]
    except UnicodeEncodeError:
        return False
    return (
        parts[-1] != b""
        and not parts[-1].startswith(b".")
        and is_inner_name(name)
        and name.isprintable()
        and not set(name) & set('*?"<>|')
        and max(map(len, parts)) <= MAX_NAME_BYTES
        and len(parts) <= MAX_NAME_PARTS
    )


def is_inner_name(name: object) -> bool:
    """Whether a relative name stays in the folder it is looked up in, on every system.

    No text at all is no name either. No drive, root or network share, no "..", no device of Windows, nothing that Windows would read as another name.
    """
    if not isinstance(name, str):
        return False
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
    # Path.resolve raises at links that lead in a circle.
    return path if Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder)) else None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        WrongCheckpointError: it is not valid JSON.
    """
    try:
        value = parse_json(path.read_bytes())
    except ValueError as error:
        raise WrongCheckpointError(
            f'"{path.name}" in "{path.parent}" is not readable JSON.\nDelete it and download it again. ({brief(error)})'
        ) from error
    if not isinstance(value, dict):
        raise WrongCheckpointError(f'"{path}" holds no JSON object.\nDelete it and download it again.')
    return value


def parse_yaml(text: str) -> Any:
    """The value of a YAML text of plain values.

    Raises:
        ValueError: it is no YAML, too long, nested too deep, or refers to itself: a few lines can then stand for gigabytes.
    """
    import yaml

    if len(text) > MAX_YAML_CHARACTERS:
        raise ValueError(f"it is longer than {MAX_YAML_CHARACTERS:,} characters")

    class Loader(yaml.SafeLoader):
        depth = 0

        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                raise ValueError("it refers to another place in the text (*name), which is not read")
            self.depth += 1
            if self.depth > MAX_YAML_DEPTH:
                raise ValueError("it is nested too deep")
            try:
                return super().compose_node(parent, index)
            finally:
                self.depth -= 1

    try:
        return yaml.load(text, Loader)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"line {mark.line + 1}: " if mark else ""
        raise ValueError(f"{place}{error.problem or error.context}") from error
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error
    except (TypeError, AttributeError, LookupError, OverflowError) as error:
        # What its own reading of dates, numbers and keys raises on nonsense.
        raise ValueError(f"it holds a value that cannot be read: {error}") from error
