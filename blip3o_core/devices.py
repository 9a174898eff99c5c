"""Devices and dtypes by name."""

from __future__ import annotations

import psutil
import torch

from .config import LARGEST_FLOAT32_BYTES
from .errors import BadInputError

DTYPE_NAMES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def pick_device(device: str | torch.device) -> torch.device:
    """The device of a name; "auto" = CUDA, else MPS, else CPU.

    Raises:
        BadInputError: not a device name, or this machine has no such device.
    """
    if device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise BadInputError(f'"{device}" is no device.\nUse auto, cpu, cuda or mps.') from error
    if (place.type == "cuda" and not torch.cuda.is_available()) or (
        place.type == "mps" and not torch.backends.mps.is_available()
    ):
        raise BadInputError(
            f'This PyTorch finds no "{place.type}" device.\nUse device auto or cpu, or install a PyTorch for it.'
        )
    return place


def pick_dtype(dtype: str | torch.dtype, device: torch.device, checkpoint_bytes: int) -> torch.dtype:
    """The dtype of a name, see load_pipeline."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        if device.type == "cpu":
            return torch.float32 if checkpoint_bytes <= LARGEST_FLOAT32_BYTES else torch.bfloat16
        if device.type == "cuda" and not torch.cuda.is_bf16_supported():
            return torch.float16
        return torch.bfloat16
    if dtype not in DTYPE_NAMES:
        raise BadInputError(f'"{dtype}" is no dtype; choose one of auto, {", ".join(DTYPE_NAMES)}.')
    return DTYPE_NAMES[dtype]


def free_memory(device: torch.device) -> int | None:
    """Bytes that are free where networks compute."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    # Apple's GPU shares the main memory.
    return psutil.virtual_memory().available if device.type in ("cpu", "mps") else None


def total_memory(device: torch.device) -> int:
    """Bytes of memory where networks compute, free or not."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return psutil.virtual_memory().total
