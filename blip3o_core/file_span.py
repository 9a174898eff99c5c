"""Part of a file: how a member of a tar is read without unpacking it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class FileSpan:
    """Bytes of a file: `size` of them from `start`; None = to the end."""

    path: Path
    start: int = 0
    size: int | None = None

    def read(self) -> bytes:
        with self.path.open("rb") as file:
            file.seek(self.start)
            return file.read(-1 if self.size is None else self.size)
