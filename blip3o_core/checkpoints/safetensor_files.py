"""Safetensors files: their headers without reading weights, their tensors read and written without a second copy."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import WrongCheckpointError
from ..files import replacing
from ..untrusted import MAX_HEADER_BYTES, parse_object

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
FILE_DTYPES = {dtype: name for name, dtype in DTYPES.items()}
# What is held at once of a tensor that is being written.
PIECE_BYTES = 32 * 2**20
# A converting read drops its file mapping after so many bytes, so that mapped pages do not add up to a second copy.
REMAP_BYTES = 128 * 2**20


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
            header = parse_object(raw)
            metadata = dict(header.pop("__metadata__", None) or {})
            entries = {key: _entry(**entry) for key, entry in header.items()}
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


def _entry(dtype: str, shape: list[int], data_offsets: list[int]) -> tuple[str, tuple[int, ...], int, int]:
    """What a header says about a tensor, in the types it must have."""
    start, end = data_offsets
    sizes = [*shape, start, end]
    if not isinstance(dtype, str) or not all(type(size) is int and size >= 0 for size in sizes):
        raise TypeError("a header entry of wrong types")
    return dtype, tuple(shape), start, end


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


@dataclass(frozen=True)
class TensorShape:
    """What a tensor to be written will be."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_safetensors(
    tensors: Mapping[str, Tensor],
    path: Path,
    metadata: Mapping[str, str] | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write a file piece after piece: beside the tensors themselves a few dozen megabytes are needed.

    Tensors that share memory are written one by one, each whole.

    Args:
        metadata: strings for the header.
        dtype: of the floating-point tensors in the file; None keeps each tensor's.

    Raises:
        WrongCheckpointError: a tensor is of a kind that these files do not hold, e.g. complex.
    """
    shapes = {key: shape_in_file(tensor, dtype) for key, tensor in tensors.items()}
    stream_safetensors(shapes, lambda key: pieces_of(tensors[key], shapes[key].dtype), path, metadata)


def shape_in_file(tensor: Tensor, dtype: torch.dtype | None = None) -> TensorShape:
    """What a tensor will be in a file whose floating-point tensors are of `dtype`; None keeps each tensor's."""
    if dtype is None or not tensor.is_floating_point():
        dtype = tensor.dtype
    return TensorShape(dtype, tuple(tensor.shape))


def pieces_of(tensor: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
    """A tensor in pieces of at most PIECE_BYTES, flat, on the CPU and in `dtype`."""
    size = PIECE_BYTES // max(dtype.itemsize, tensor.element_size())
    for piece in tensor.detach().reshape(-1).split(size):
        yield piece.to("cpu", dtype)


def stream_safetensors(
    shapes: Mapping[str, TensorShape],
    read: Callable[[str], Iterable[Tensor]],
    path: Path,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write tensors that are made while they are written; the file appears complete or not at all.

    Args:
        shapes: name -> what it will be, of all tensors.
        read: gives a tensor's values in flat pieces on the CPU, in its dtype; called once for each name.
        metadata: strings for the header.

    Raises:
        WrongCheckpointError: a tensor is of a kind that these files do not hold, e.g. complex.
    """
    # Wide numbers first, as safetensors itself does, so that every tensor begins at a multiple of its number's bytes.
    order = sorted(shapes, key=lambda key: (-shapes[key].dtype.itemsize, key))
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    offset = 0
    for key in order:
        dtype, shape = shapes[key].dtype, shapes[key].shape
        if dtype not in FILE_DTYPES:
            raise WrongCheckpointError(
                f'The tensor "{key}" cannot be written to "{path.name}": its numbers are {str(dtype).removeprefix("torch.")}.\n'
                "Use a file whose weights are floating-point numbers or integers."
            )
        end = offset + shapes[key].nbytes
        header[key] = {"dtype": FILE_DTYPES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    raw = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    raw += b" " * (-len(raw) % 8)
    with replacing(path) as temporary, temporary.open("wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        for key in order:
            written = 0
            for piece in read(key):
                assert piece.dtype == shapes[key].dtype, f"{key} is {piece.dtype}"
                written += file.write(piece.contiguous().view(-1).view(torch.uint8).numpy().data)
            assert written == shapes[key].nbytes, f"{key} has {written} bytes, not {shapes[key].nbytes}"


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
