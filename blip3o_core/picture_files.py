"""What a picture file remembers of its making: prompt, seeds, settings and checkpoint, as JSON in a PNG text chunk."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from .checkpoints.layout import CheckpointFiles
from .checkpoints.match import needed_tensors
from .checkpoints.safetensor_files import read_tensors
from .drawing.presets import Generation
from .errors import BadInputError
from .files import replacing
from .lora.files import dit_fingerprint
from .untrusted import parse_object

PNG_KEY = "blip3o"
FORMAT_VERSION = 1
SAMPLED_BYTES = 65536
# What a backbone computes with beside its weights.
TOKENIZER_NAMES = ("tokenizer.json", "vocab.json", "merges.txt")
BACKBONE_SETTINGS = (
    "hidden_act",
    "num_attention_heads",
    "num_key_value_heads",
    "rms_norm_eps",
    "rope_theta",
    "rope_scaling",
)


def checkpoint_fingerprint(files: CheckpointFiles) -> str:
    """Hash of a checkpoint, 16 hex digits: names, sizes and both ends of its weight files.

    Reads a fraction of a second's worth of bytes, so it tells versions apart but proves no integrity.
    """
    paths = {info.path for info in files.tensors.values()}
    paths |= set(files.decoder_folder.glob("*/*.safetensors"))
    digest = hashlib.sha256()
    for path in sorted(paths):
        _hash_ends(digest, path)
    return digest.hexdigest()[:16]


def component_fingerprint(files: CheckpointFiles, component: str) -> str:
    """Hash of one network of a checkpoint, 16 hex digits: names, shapes and both ends of each of its tensors.

    Of the DiT it is lora.dit_fingerprint. For the others, whose outputs are kept on disk, the numbers in which they are
    stored count too, and for the backbone its tokenizer and settings. Other networks of the checkpoint do not change
    it, nor does the way tensors are spread over files. It tells versions apart but proves no integrity.

    Args:
        component: backbone, dit or image_encoder.
    """
    digest = hashlib.sha256()
    separate = files.image_encoder_file() if component == "image_encoder" else None
    if separate is not None and separate.suffix != ".safetensors":
        _hash_ends(digest, separate)
        return digest.hexdigest()[:16]
    tensors = needed_tensors(files, component)
    # The tensors are mapped, not read: just the pages with their ends are touched.
    of_tensors = dit_fingerprint(dict(read_tensors(tensors)))
    if component == "dit":
        return of_tensors
    digest.update(of_tensors.encode())
    digest.update("".join(sorted({str(info.dtype) for info in tensors.values()})).encode())
    if component == "backbone":
        for name in TOKENIZER_NAMES:
            if (files.folder / name).is_file():
                digest.update((files.folder / name).read_bytes())
        text = files.config.get("text_config") or files.config
        digest.update(json.dumps([text.get(name) for name in BACKBONE_SETTINGS]).encode())
    return digest.hexdigest()[:16]


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
        raise BadInputError(f'"{path}" cannot be opened as a picture ({error}).') from error
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
            f'The note in "{path}" on how it was made cannot be understood ({error}).\n'
            "Write prompt and settings yourself."
        ) from error
    if is_newer:
        raise BadInputError(f'"{path}" was made by a newer version of this program.\nUpdate ComfyUI-BLIP3o.')
    return description


def loras_of_note(path: str | Path, note: dict[str, Any]) -> list[dict[str, Any]]:
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


def _hash_ends(digest: Any, path: Path) -> None:
    size = path.stat().st_size
    digest.update(f"{path.name}:{size}:".encode())
    with path.open("rb") as file:
        digest.update(file.read(SAMPLED_BYTES))
        file.seek(max(0, size - SAMPLED_BYTES))
        digest.update(file.read(SAMPLED_BYTES))
