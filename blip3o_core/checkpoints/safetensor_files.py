"""Safetensors files: their headers without reading weights, and their tensors without a second copy."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import WrongCheckpointError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
# A converting read drops its file mapping after so many bytes, so that mapped pages do not add up to a second copy.
REMAP_BYTES = 128 * 2**20
MAX_HEADER_BYTES = 100 * 2**20


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies and what it is, as the file's header says.

    Attributes:
        dtype: torch.uint8 stands for a format that cannot be read, see `unreadable`.
        unreadable: the name of that format; None = it can be read.
    """

    path: Path
    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    nbytes: int
    unreadable: str | None = None

    def require_readable(self) -> None:
        """Raise WrongCheckpointError for a format that cannot be read: what nobody needs may have any."""
        if self.unreadable is not None:
            raise WrongCheckpointError(
                f'"{self.path.name}" holds the tensor "{self.key}" in the format {self.unreadable}, which cannot be read.\n'
                "Use the published bf16 files."
            )


def read_header(path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Tensors and metadata of a safetensors file; only its header is read.

    Raises:
        WrongCheckpointError: the file is cut short, a Git LFS pointer, or not a safetensors file.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        refuse_lfs_pointer(path, start)
        header_bytes = struct.unpack("<Q", start)[0] if len(start) == 8 else MAX_HEADER_BYTES + 1
        try:
            if header_bytes > MAX_HEADER_BYTES:
                raise ValueError("no header length")
            raw = file.read(header_bytes)
            if len(raw) < header_bytes:
                raise _cut_short(path, size, None)
            header = dict(json.loads(raw))
            metadata = header.pop("__metadata__", None) or {}
            entries = {
                key: (entry["dtype"], tuple(entry["shape"]), *entry["data_offsets"])
                for key, entry in header.items()
            }
        except (ValueError, TypeError, LookupError) as error:
            raise _unreadable(path) from error
    expected = 8 + header_bytes + max((end for _, _, _, end in entries.values()), default=0)
    if size < expected:
        raise _cut_short(path, size, expected)
    if size > expected:
        raise WrongCheckpointError(
            f'"{path.name}" in "{path.parent}" is damaged: it has {size - expected:,} bytes more than its header tells.\n'
            "Delete it and download it again."
        )
    tensors = {
        key: TensorInfo(
            path,
            key,
            DTYPES.get(dtype, torch.uint8),
            shape,
            end_byte - start_byte,
            None if dtype in DTYPES else str(dtype),
        )
        for key, (dtype, shape, start_byte, end_byte) in entries.items()
    }
    return tensors, metadata


def read_tensors(
    infos: dict[str, TensorInfo],
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) for each named place in a file.

    Tensors that need no conversion are views of the mapped file: nothing is copied, and the operating system reads
    their pages when they are first used. Floating-point tensors are converted to `dtype` when one is given.
    """
    device = torch.device(device)
    by_file: dict[Path, list[tuple[str, TensorInfo]]] = {}
    for name, info in infos.items():
        by_file.setdefault(info.path, []).append((name, info))
    for path, entries in by_file.items():
        handle, copied = None, 0
        for name, info in entries:
            if handle is None or copied > REMAP_BYTES:
                try:
                    handle, copied = safe_open(str(path), framework="pt", device="cpu"), 0
                except SafetensorError as error:
                    raise _unreadable(path) from error
            tensor = handle.get_tensor(info.key)
            target = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
            if target != tensor.dtype or device.type != "cpu":
                tensor = tensor.to(device=device, dtype=target)
                copied += info.nbytes
            yield name, tensor
            del tensor


def write_safetensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a file under a temporary name and rename it, so that no reader ever sees half of it."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    try:
        save_file(
            {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()},
            str(temporary),
            metadata={"format": "pt", **(metadata or {})},
        )
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def refuse_lfs_pointer(path: Path, start: bytes) -> None:
    """Raise WrongCheckpointError when a file's first 8 bytes are those of a Git LFS pointer."""
    if start == b"version ":
        raise WrongCheckpointError(
            f'"{path.name}" in "{path.parent}" is a Git LFS pointer of a few bytes, not the weights.\n'
            'Run "git lfs pull" in that folder, or download the file again.'
        )


def _unreadable(path: Path) -> WrongCheckpointError:
    return WrongCheckpointError(
        f'"{path.name}" in "{path.parent}" is not a readable safetensors file ({path.stat().st_size:,} bytes).\n'
        "Delete it and download it again."
    )


def _cut_short(path: Path, size: int, expected: int | None) -> WrongCheckpointError:
    missing = f" of {expected:,}" if expected else ""
    return WrongCheckpointError(
        f'"{path.name}" in "{path.parent}" is cut short: it has {size:,}{missing} bytes.\n'
        "The download stopped half way. Run the download again (it continues), or delete the file and download it anew."
    )
