"""Versions of Python and the libraries beside the range that the tests ran with. Imports none of them."""

from __future__ import annotations

import json
import platform
import re
from dataclasses import dataclass
from functools import lru_cache
from importlib import metadata
from pathlib import Path

# A folder in ComfyUI's custom_nodes is not installed, so nothing else could tell it; a test keeps it equal to pyproject.toml.
PROJECT_VERSION = "0.2.0"
TESTED_FILE = Path(__file__).resolve().parent / "assets" / "tested_versions.json"


@dataclass(frozen=True)
class VersionCheck:
    """One library beside the range that was tested.

    Attributes:
        installed: None = not there.
        verdict: "fine", "missing", "older than supported" or "newer than tested".
    """

    name: str
    installed: str | None
    oldest: str
    newest: str
    verdict: str

    @property
    def is_wrong(self) -> bool:
        """Newer versions mostly work; older and missing ones do not."""
        return self.verdict in ("missing", "older than supported")

    @property
    def remedy(self) -> str:
        """What to do; empty when nothing has to be."""
        if self.verdict == "newer than tested":
            return f"Mostly that works. Should something fail, try {self.name} {self.newest}."
        if not self.is_wrong:
            return ""
        if self.name == "python":
            return f"Install Python {self.newest} and set the program up with it again."
        if self.name == "torch":
            return (
                f"Install PyTorch {self.oldest} or newer in the build for your device: pytorch.org, Get Started, "
                "tells the command."
            )
        name, oldest = self.name, self.oldest
        if name == "tokenizers":  # each transformers needs its own: it brings the one that fits
            name, oldest = "transformers", tested_versions()["transformers"]["oldest"]
        return (
            f'With the Python that runs this program: python -m pip install --upgrade "{name}>={oldest}". '
            "In ComfyUI: ComfyUI-Manager, Try fix on this node pack."
        )


@lru_cache(maxsize=1)
def tested_versions() -> dict[str, dict[str, str]]:
    """Library -> its oldest supported and newest tested version."""
    return json.loads(TESTED_FILE.read_text("utf-8"))


def check_versions() -> list[VersionCheck]:
    """Every library that the project needs, Python first."""
    return [
        check_version(name, _installed(name), tested["oldest"], tested["newest"])
        for name, tested in tested_versions().items()
    ]


def check_version(name: str, installed: str | None, oldest: str, newest: str) -> VersionCheck:
    """The verdict on one library. A newer bug fix of the newest tested release counts as tested."""
    if installed is None:
        verdict = "missing"
    elif release(installed) < release(oldest):
        verdict = "older than supported"
    elif release(installed)[:2] > release(newest)[:2]:
        verdict = "newer than tested"
    else:
        verdict = "fine"
    return VersionCheck(name, installed, oldest, newest, verdict)


def release(version: str) -> tuple[int, ...]:
    """The numbers of a version, at least three: "2.13.0+cpu" -> (2, 13, 0), "5.25.0.dev0" -> (5, 25, 0)."""
    found = re.match(r"\d+(?:\.\d+)*", version)
    numbers = [int(part) for part in found[0].split(".")] if found else []
    return tuple(numbers + [0] * (3 - len(numbers)))


def _installed(name: str) -> str | None:
    if name == "python":
        return platform.python_version()
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
