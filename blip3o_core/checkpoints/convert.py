"""Conversions of weight files: pickled EVA-CLIP to safetensors, and whole folders to another dtype."""

from __future__ import annotations

from pathlib import Path

import torch

from ..errors import BadInputError
from .layout import CheckpointFiles
from .load import load_backbone, load_decoder, load_dit, load_image_encoder
from .pickles import read_pickle
from .safetensor_files import write_safetensors
from .save import save_checkpoint


def convert_pickle(source: Path, target: Path, dtype: torch.dtype | None = None) -> Path:
    """Write the tensors of a pickled state_dict as safetensors; code in the pickle is refused, never run.

    Args:
        dtype: of the floating-point tensors in the file; None keeps each tensor's.
    """
    if target.suffix != ".safetensors":
        target = target / "model.safetensors"
    # The pickle is mapped and written piece by piece: files larger than the memory can be converted.
    write_safetensors(read_pickle(source), target, dtype=dtype)
    return target


def convert_folder(files: CheckpointFiles, target: Path, dtype: torch.dtype) -> Path:
    """Write a checkpoint folder again, in the published layout, with the image encoder inside when there is one.

    Raises:
        BadInputError: source and target are the same folder.
    """
    if files.folder.resolve() == target.resolve():
        raise BadInputError(f'Source and target are the same folder "{target}".\nName another target folder.')
    return save_checkpoint(
        target,
        files.config,
        backbone=load_backbone(files),
        dit=load_dit(files),
        image_encoder=load_image_encoder(files) if files.has_component("image_encoder") else None,
        decoder=load_decoder(files) if files.has_component("decoder") else None,
        tokenizer_from=files.folder,
        dtype=dtype,
    )
