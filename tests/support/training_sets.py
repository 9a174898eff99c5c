"""Small training sets on disk, sound and broken."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from comfyui_blip3o.lora_training.config import LoraConfig, parse_config
from PIL import Image, ImageDraw

# Words that the built-in model knows.
ADDED = ("zero", "one", "two", "three", "big", "small", "medium", "large", "top", "bottom", "white", "black")
COLOURS = ("red", "blue", "green", "purple", "cyan", "yellow")


def drawing(index: int, size: tuple[int, int] = (128, 128)) -> Image.Image:
    """A disc on white, of another place and colour for each index."""
    picture = Image.new("RGB", size, "white")
    left, top = 7 * (index % 5), 11 * (index % 4)
    ImageDraw.Draw(picture).ellipse((left, top, left + 60, top + 50), fill=COLOURS[index % len(COLOURS)])
    return picture


def caption(index: int) -> str:
    """The caption of a drawing, another for each index."""
    return f"a {COLOURS[index % len(COLOURS)]} circle, {ADDED[index % 12]} {ADDED[index // 12]}"


def write_set(folder: Path, count: int = 3, *, captions: bool = True) -> Path:
    """`count` drawings, p00.png ..., each with its caption."""
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        drawing(index).save(folder / f"p{index:02}.png")
        if captions:
            (folder / f"p{index:02}.txt").write_text(caption(index) + "\n", "utf-8")
    return folder


def config_of(folder: Path, *overrides: str, **data: Any) -> LoraConfig:
    """A run on a training set; its runs lie beside the set. `data` are settings of that section."""
    tree = {
        "run": {"name": "test", "dir": str(folder.parent / "runs")},
        "data": {"path": str(folder), **data},
        "model": {"device": "cpu"},
    }
    return parse_config(tree, overrides)


# File names and what is wrong with them: kind of the problem -> name -> how to write it.
FAULTS: dict[str, Callable[[Path], None]] = {
    "truncated.jpg": lambda path: _truncated(path, "JPEG"),
    "truncated.png": lambda path: _truncated(path, "PNG"),
    "truncated.webp": lambda path: _truncated(path, "WEBP"),
    "empty.png": lambda path: path.write_bytes(b""),
    "text.jpg": lambda path: path.write_text("<html>not found</html>", "utf-8"),
}


def _truncated(path: Path, kind: str) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (200, 200, 3), np.uint8)
    Image.fromarray(noise).save(path, kind)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
