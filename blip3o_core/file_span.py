"""Part of a file: how a member of a tar is read without unpacking it."""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class FileSpan:
    """Bytes of a file: `size` of them from `start`; None = to the end."""

    path: Path
    start: int = 0
    size: int | None = None

    def read(self) -> bytes:
        """The bytes.

        Raises:
            OSError: the file cannot be read, ends before the part does, or is a device that may never end.
        """
        if not self.path.is_file():
            code = errno.EINVAL if self.path.exists() else errno.ENOENT
            raise OSError(code, "it is no regular file" if code == errno.EINVAL else os.strerror(code))
        with self.path.open("rb") as file:
            there = os.fstat(file.fileno()).st_size - self.start
            if self.size is not None and self.size > there:
                raise OSError(errno.EINVAL, "the archive ends before they do")
            file.seek(self.start)
            return file.read(there if self.size is None else self.size)
