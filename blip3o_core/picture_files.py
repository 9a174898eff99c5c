"""What a picture file remembers of its making: prompt, seeds, settings and checkpoint, as JSON in a PNG text chunk."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from .drawing.presets import Generation
from .errors import BadInputError
from .files import replacing
from .untrusted import brief, parse_object

PNG_KEY = "blip3o"
FORMAT_VERSION = 1


def describe_picture(generation: Generation, index: int, checkpoint: str, fingerprint: str) -> dict[str, Any]:
    """Everything needed to draw picture `index` again, JSON-ready."""
    return {
        "version": FORMAT_VERSION,
        "prompt": generation.prompts[index],
        "seed": generation.seeds[index],
        "pixel_seed": generation.pixel_seeds[index],
        "checkpoint": checkpoint,
        "checkpoint_hash": fingerprint,
        **generation.settings,
    }


def save_png(picture: Image.Image, path: Path, description: dict[str, Any]) -> None:
    """Write a PNG with its description, under a temporary name first."""
    info = PngInfo()
    info.add_itxt(PNG_KEY, json.dumps(description, ensure_ascii=False))
    with replacing(path) as temporary:
        picture.save(temporary, format="PNG", pnginfo=info)


def read_note(path: str | Path) -> dict[str, Any]:
    """The note in a picture written by save_png: how it was made.

    Raises:
        BadInputError: no such picture, or one without a description that can be understood.
    """
    try:
        with Image.open(path) as image:
            text = image.info.get(PNG_KEY)
    except FileNotFoundError:
        raise BadInputError(f'There is no picture "{path}".\nCheck the path.') from None
    except (OSError, ValueError, SyntaxError) as error:
        raise BadInputError(f'"{path}" cannot be opened as a picture ({brief(error)}).') from error
    if text is None:
        raise BadInputError(
            f'"{path}" does not say how it was made.\n'
            "Only PNG files saved by this program do, as long as no other program has saved them again."
        )
    try:
        description = parse_object(text)
        is_newer = description.get("version", 0) > FORMAT_VERSION
    except (ValueError, TypeError) as error:
        raise BadInputError(
            f'The note in "{path}" on how it was made cannot be understood ({brief(error)}).\n'
            "Write prompt and settings yourself."
        ) from error
    if is_newer:
        raise BadInputError(f'"{path}" was made by a newer version of this program.\nUpdate ComfyUI-BLIP3o.')
    return description


def loras_of_note(path: str | Path, note: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What a picture's note says about the LoRAs it was drawn with: file, hash and strength of each.

    Raises:
        BadInputError: it says it in another way.
    """
    found = note.get("loras", [])
    if not isinstance(found, list) or not all(
        isinstance(used, dict)
        and isinstance(used.get("file"), str)
        and isinstance(used.get("strength"), (int, float))
        for used in found
    ):
        raise BadInputError(
            f'The note in "{path}" does not say clearly which LoRAs it was drawn with.\nName them, or leave them out: --lora none'
        )
    return [{"hash": None, **used} for used in found]
