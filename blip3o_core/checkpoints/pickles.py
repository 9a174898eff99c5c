"""Pickled state_dicts, as EVA-CLIP is published: only plain tensors are read from them."""

from __future__ import annotations

import pickle
from pathlib import Path

import torch
from torch import Tensor

from ..errors import WrongCheckpointError
from ..untrusted import brief, quote
from .safetensor_files import refuse_lfs_pointer

# Before it, weights_only did not keep a pickle from running code (CVE-2025-32434).
SAFE_TORCH = (2, 6)
# Keys under which trainers put the state_dict when they save more than that.
NESTS = ("state_dict", "model", "module")
# Tables of positions are saved with rows that repeat the same bytes; above this a few bytes pretend to be weights.
MAX_REPEATED_BYTES = 64 * 2**20


def read_pickle(path: Path) -> dict[str, Tensor]:
    """Tensors of a pickled state_dict, mapped from disk; other plain values in it are passed over.

    Raises:
        WrongCheckpointError: the file holds code, is damaged, or holds no table of tensors; or PyTorch is older than
            2.6 and could not keep such a file from running code.
    """
    refuse_unsafe_torch(path)
    with path.open("rb") as file:
        start = file.read(8)
    refuse_lfs_pointer(path, start)
    is_zip = start.startswith(b"PK")
    try:
        if not is_zip and not start.startswith(b"\x80"):
            raise ValueError("neither a zip file nor a pickle")
        # Pickles of the kind before PyTorch 1.6 cannot be mapped.
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        raise WrongCheckpointError(
            f'"{path.name}" in "{path.parent}" holds Python code besides tensors and was not opened.\n'
            "Do not use this file. Download pytorch_model.bin of jiuhai/eva_clip_vision_tower again, or a safetensors file."
        ) from error
    except Exception as error:  # a damaged pickle may end in anything, even inside weights_only
        raise WrongCheckpointError(
            f'"{path.name}" in "{path.parent}" cannot be read: it is cut short or no PyTorch file '
            f"({path.stat().st_size:,} bytes).\nDelete it and download it again. ({brief(error)})"
        ) from error
    for _ in NESTS:
        nested = next(
            (content[name] for name in NESTS if isinstance(content, dict) and name in content), None
        )
        if not isinstance(nested, dict):
            break
        content = nested
    items = content.items() if isinstance(content, dict) else ()
    tensors = {
        key: value
        for key, value in items
        if isinstance(key, str) and isinstance(value, Tensor) and _has_plain_values(value)
    }
    if not tensors:
        raise WrongCheckpointError(
            f'"{path.name}" in "{path.parent}" is not a table of tensors.\nUse the published file.'
        )
    for key, tensor in tensors.items():
        stored = tensor.untyped_storage().nbytes()
        if stored < tensor.nbytes > MAX_REPEATED_BYTES:
            raise WrongCheckpointError(
                f'"{path.name}" in "{path.parent}" cannot be used: its tensor {quote(key)} would take {tensor.nbytes:,} '
                f"bytes, but the file holds only {stored:,} of them.\nUse the published file."
            )
    return tensors


def refuse_unsafe_torch(path: Path) -> None:
    """Raise WrongCheckpointError when this PyTorch cannot open a pickle safely; `path` is named in it."""
    release = tuple(int(number) for number in torch.__version__.split(".")[:2])
    if release < SAFE_TORCH:
        raise WrongCheckpointError(
            f'"{path.name}" in "{path.parent}" is a pickle and was not opened: with PyTorch {torch.__version__} such a '
            "file could run code on this computer (CVE-2025-32434).\n"
            "Update PyTorch to 2.6 or newer, or use a safetensors file; "
            f'"blip3o convert {path.name} {path.stem}.safetensors" on another machine makes one.'
        )


def _has_plain_values(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided and not tensor.is_meta and not tensor.is_quantized
