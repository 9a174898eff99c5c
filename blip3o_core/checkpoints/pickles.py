"""Pickled state_dicts, as EVA-CLIP is published: only plain tensors are read from them."""

from __future__ import annotations

import pickle
from pathlib import Path

import torch
from torch import Tensor

from ..errors import WrongCheckpointError
from .safetensor_files import refuse_lfs_pointer

# Keys under which trainers put the state_dict when they save more than that.
NESTS = ("state_dict", "model", "module")


def read_pickle(path: Path) -> dict[str, Tensor]:
    """Tensors of a pickled state_dict, mapped from disk; other plain values in it are passed over.

    Raises:
        WrongCheckpointError: the file holds code, is damaged, or holds no table of tensors.
    """
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
    except (RuntimeError, EOFError, OSError, ValueError, LookupError) as error:
        raise WrongCheckpointError(
            f'"{path.name}" in "{path.parent}" cannot be read: it is cut short or no PyTorch file '
            f"({path.stat().st_size:,} bytes).\nDelete it and download it again. ({error})"
        ) from error
    for _ in NESTS:
        nested = next(
            (content[name] for name in NESTS if isinstance(content, dict) and name in content), None
        )
        if not isinstance(nested, dict):
            break
        content = nested
    items = content.items() if isinstance(content, dict) else ()
    tensors = {key: value for key, value in items if isinstance(key, str) and isinstance(value, Tensor)}
    if not tensors:
        raise WrongCheckpointError(
            f'"{path.name}" in "{path.parent}" is not a table of tensors.\nUse the published file.'
        )
    return tensors
