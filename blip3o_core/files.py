"""Files that appear complete or not at all."""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

# Unfinished files carry the process that writes them, so that a later one can tell what was left behind.
UNFINISHED = re.compile(r".+\.(\d{1,9})-[0-9a-f]{8}\.part")
# The longest name that systems allow is 255 bytes; the temporary one keeps as much as always fits.
KEPT_LETTERS = 50
_tidied: set[Path] = set()


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A path beside `path` to write a file at, which takes the place of `path` when the block ends well.

    Until then, and after an error, whatever lay at `path` stays as it was. The folder is made when it is not there; what
    a killed process left unfinished in it is removed.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _tidy(path.parent)
    # A name of its own for each writer: two that write the same file at once do not write into each other. The file is
    # made by the block itself, so it gets the permissions of any new file; those of `tempfile` are the owner's alone.
    temporary = path.with_name(f"{path.name[:KEPT_LETTERS]}.{os.getpid()}-{secrets.token_hex(4)}.part")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _tidy(folder: Path) -> None:
    """Remove unfinished files of processes that are gone; once per process and folder, as caches hold thousands."""
    folder = folder.resolve()
    if folder in _tidied:
        return
    _tidied.add(folder)
    for entry in os.scandir(folder):
        found = UNFINISHED.fullmatch(entry.name)
        if found and not psutil.pid_exists(int(found[1])):
            with suppress(OSError):  # another process tidies too, or the folder is read-only
                os.unlink(entry.path)
