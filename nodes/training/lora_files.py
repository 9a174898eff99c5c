"""LoRAs on ComfyUI's socket LORA_MODEL: opened, merged, converted, written, with what they say about themselves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Literal

import folder_paths
from torch import Tensor

from ...blip3o_core.checkpoints.layout import open_checkpoint
from ...blip3o_core.errors import BadInputError
from ...blip3o_core.lora.files import LoraFile, read_lora
from ..native import host
from ..native.lora import NO_LORA, find_lora
from ..native.sockets import LoraModel
from ..native.widgets import parse_weights
from .folders import check_name, publish_lora

if TYPE_CHECKING:
    from ...lora_training.files.convert import Weights

UNNAMED = "LoRA"
TITLE_KEY, TRIGGER_KEY = "modelspec.title", "modelspec.trigger_phrase"


def as_lora_file(lora: Mapping[str, Tensor]) -> LoraFile:
    """A LORA_MODEL of ours or of ComfyUI's own trainer as the core reads files."""
    metadata = lora.metadata if isinstance(lora, LoraModel) else {}
    return LoraFile(metadata.get(TITLE_KEY) or UNNAMED, dict(lora), metadata)


def as_lora_model(file: LoraFile) -> LoraModel:
    """A file as a LORA_MODEL, under the names that ComfyUI's own nodes understand."""
    return LoraModel(file.canonical, file.metadata)


def open_lora(name: str) -> tuple[LoraModel, str]:
    """A LoRA of models/loras, and what is in it, in words.

    Raises:
        BadInputError: none is chosen.
        MissingFilesError, WrongAdapterError: see blip3o_core.lora.read_lora.
    """
    from ...lora_training.files.write import describe, inspect_lora

    if name == NO_LORA:
        raise BadInputError("No LoRA is chosen.\nChoose a file from the list; press R after adding one.")
    path = find_lora(name)
    return as_lora_model(read_lora(path)), describe(inspect_lora(path))


def convert_lora(
    lora: Mapping[str, Tensor], format: str, *, rank: int, dtype: str, filename_prefix: str, checkpoint: str
) -> str:
    """Write a LoRA for another program into the output folder; its path below that folder.

    Args:
        rank: 0 = as it is.
        checkpoint: the model it was trained on; read only for a DoRA.

    Raises:
        WrongAdapterError: the format has no place for a part of it.
    """
    from ...lora_training.files.convert import save_as
    from ...lora_training.files.merge import resize_lora

    file, base = as_lora_file(lora), _base(checkpoint)
    if rank:
        file, _ = resize_lora(file, rank=rank, base=base)
    target = host.save_path(filename_prefix, "peft" if format == "peft" else ".safetensors")
    save_as(file, target, format, base=base, dtype=dtype)
    return target.relative_to(folder_paths.get_output_directory()).as_posix()


def save_lora(lora: Mapping[str, Tensor], name: str, *, dtype: str, trigger: str) -> str:
    """Write a LoRA into models/loras; its name there. Another file of that name is kept.

    Raises:
        BadInputError: the name cannot be one of a file.
    """
    from ...lora_training.files.convert import save_as

    name = check_name(name)
    file = as_lora_file(lora)
    said = {TITLE_KEY: name, **({TRIGGER_KEY: trigger.strip()} if trigger.strip() else {})}
    file = replace(file, metadata={**file.metadata, **said})
    with TemporaryDirectory() as folder:
        return publish_lora(save_as(file, Path(folder) / f"{name}.safetensors", "comfy", dtype=dtype), name)


def merge_loras(
    loras: Sequence[Mapping[str, Tensor]],
    weights: str,
    method: Literal["concat", "svd"],
    rank: int,
    checkpoint: str,
) -> LoraModel:
    """One LoRA of several.

    Args:
        weights: as for widgets.parse_weights.
        rank: for svd; 0 = as the largest of them.
        checkpoint: the model they were trained on; read only for a DoRA.

    Raises:
        BadInputError: the weights.
        WrongAdapterError: they belong to different models, or cannot be merged this way.
    """
    from ...lora_training.files.merge import merge_loras as merge

    files = [as_lora_file(lora) for lora in loras]
    ranks = [change.rank for file in files for change in file.changes.values() if change.rank]
    merged = merge(
        list(zip(files, parse_weights(weights, len(files), "LoRA"), strict=True)),
        mode=method,
        rank=(rank or max(ranks, default=1)) if method == "svd" else None,
        base=_base(checkpoint),
    )
    return as_lora_model(merged)


def _base(checkpoint: str) -> Weights:
    from ...lora_training.files.convert import base_weights

    return base_weights(open_checkpoint(host.find_checkpoint(checkpoint)))
