"""Files that appear complete or not at all."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A path beside `path` to write a file at, which takes the place of `path` when the block ends well.

    Until then, and after an error, whatever lay at `path` stays as it was. The folder is made when it is not there.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # A name of its own for each writer: two that write the same file at once do not write into each other. The file is
    # made by the block itself, so it gets the permissions of any new file; those of `tempfile` are the owner's alone.
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
