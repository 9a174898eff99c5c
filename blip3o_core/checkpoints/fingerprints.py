"""Hashes that tell checkpoints and their networks apart, read from the ends of files and tensors."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from ..lora.files import dit_fingerprint
from .layout import CheckpointFiles
from .match import needed_tensors
from .safetensor_files import read_tensors

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


def _hash_ends(digest: Any, path: Path) -> None:
    size = path.stat().st_size
    digest.update(f"{path.name}:{size}:".encode())
    with path.open("rb") as file:
        digest.update(file.read(SAMPLED_BYTES))
        file.seek(max(0, size - SAMPLED_BYTES))
        digest.update(file.read(SAMPLED_BYTES))
