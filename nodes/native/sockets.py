"""What travels between our nodes besides ComfyUI's own types: the backbone, the image encoder, a chat, image features."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io
from torch import Tensor
from typing_extensions import Self

from ...blip3o_core.checkpoints.layout import CheckpointFiles
from ...blip3o_core.errors import BadInputError
from ...blip3o_core.networks import NetworkLender
from ...blip3o_core.pipeline import Blip3oPipeline
from ...lora_training.config import DataConfig
from . import host

BackboneType = io.Custom("BLIP3O")
ImageEncoderType = io.Custom("BLIP3O_IMAGE_ENCODER")
ChatType = io.Custom("BLIP3O_CHAT")
DatasetType = io.Custom("BLIP3O_DATASET")
TrainingSettingsType = io.Custom("BLIP3O_TRAINING_SETTINGS")
RunType = io.Custom("BLIP3O_RUN")

# Marks a LATENT as image features; ComfyUI's own nodes carry it along.
FEATURES_TYPE = "blip3o_features"
# What a prompt with pictures needs besides the weights: attention and logits of some 2000 tokens in a 7B model.
ACTIVATION_BYTES = 1536 * 2**20


class HostNetworks(NetworkLender):
    """Networks that ComfyUI holds and moves.

    Args:
        files: the opened checkpoint.
        patchers: component name -> its patcher.
        dtype: the networks compute in.
    """

    # A chat's keys and values wait in main memory: ComfyUI does not know of them.
    leave_device = True

    def __init__(self, files: CheckpointFiles, patchers: dict[str, ModelPatcher], dtype: torch.dtype) -> None:
        super().__init__(files, dtype, next(iter(patchers.values())).load_device)
        self.patchers = patchers

    def get(self, name: str) -> Any:
        return self.patchers[name].model

    @contextmanager
    def use(self, name: str) -> Iterator[Any]:
        host.load_to_device(self.patchers[name], ACTIVATION_BYTES)
        yield self.patchers[name].model

    def unload(self, *names: str) -> None:
        """Nothing: ComfyUI decides where its networks lie."""


class PipelineHandle:
    """A network on a socket of ours. ComfyUI's memory management looks for `patcher`, `get_models` and `is_dynamic`."""

    component: str

    def __init__(self, patcher: ModelPatcher, files: CheckpointFiles, dtype: torch.dtype) -> None:
        self.patcher = patcher
        self.files = files
        self.dtype = dtype
        self.pipeline = Blip3oPipeline(HostNetworks(files, {self.component: patcher}, dtype))

    def get_models(self) -> list[ModelPatcher]:
        return [self.patcher]

    def is_dynamic(self) -> bool:
        return self.patcher.is_dynamic()

    def with_patcher(self, patcher: ModelPatcher) -> Self:
        """A copy that uses another patcher, e.g. one with a LoRA."""
        return type(self)(patcher, self.files, self.dtype)

    def __repr__(self) -> str:
        return f"BLIP3-o {self.component.replace('_', ' ')} of {self.files.name}"


class BackboneHandle(PipelineHandle):
    """Socket BLIP3O: Qwen2.5-VL with its latent queries, and the checkpoint's tokenizer."""

    component = "backbone"


class ImageEncoderHandle(PipelineHandle):
    """Socket BLIP3O_IMAGE_ENCODER: EVA-CLIP."""

    component = "image_encoder"


@dataclass(frozen=True)
class Chat:
    """Socket BLIP3O_CHAT: what was said so far. Never changed in place: each turn makes a new one.

    Attributes:
        turns: (role, text, number of images before the text).
        images: all images of the conversation in order, each (H, W, 3) in [0, 1].
    """

    turns: tuple[tuple[str, str, int], ...] = ()
    images: tuple[Tensor, ...] = field(default=())

    def with_turn(self, role: str, text: str, images: tuple[Tensor, ...] = ()) -> Chat:
        return replace(self, turns=(*self.turns, (role, text, len(images))), images=(*self.images, *images))

    def __repr__(self) -> str:
        return f"BLIP3-o chat of {len(self.turns)} turns and {len(self.images)} images"


@dataclass(frozen=True)
class TrainingPictures:
    """Socket BLIP3O_DATASET: which pictures a LoRA learns from and how they are read; the pictures stay in their folder.

    Attributes:
        name: as in the folder picker.
        config: section `data` of a training configuration.
    """

    name: str
    config: DataConfig

    def __repr__(self) -> str:
        return f'BLIP3-o dataset "{self.name}"'


@dataclass(frozen=True)
class TrainingRun:
    """Socket BLIP3O_RUN: the folder that a training kept its records in."""

    folder: Path

    def __repr__(self) -> str:
        return f'BLIP3-o run "{self.folder.name}"'


class LoraModel(dict[str, Tensor]):
    """Socket LORA_MODEL: ComfyUI's flat dictionary of tensors, with what the file says about itself.

    Attributes:
        metadata: as in a safetensors file.
    """

    def __init__(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
        super().__init__(tensors)
        self.metadata = dict(metadata or {})


def features_latent(grid: Tensor) -> dict[str, Any]:
    """A LATENT of image features (B, channels, H, W)."""
    return {"samples": grid, "type": FEATURES_TYPE}


def feature_grid(latent: dict[str, Any], channels: int | None = None) -> Tensor:
    """The feature grid (B, channels, H, W) inside a LATENT.

    Args:
        channels: of the model that will read them; None = any that is not a VAE's.

    Raises:
        BadInputError: it holds latents of a VAE, or features of another model, or something that is no picture grid.
    """
    grid = latent["samples"]
    found = grid.shape[1]
    if grid.ndim != 4 or (channels is None and latent.get("type") != FEATURES_TYPE and found <= 32):
        raise BadInputError(
            "These are latents of a VAE or another model, not BLIP3-o image features.\n"
            'Connect the output "image_features" of "Sample Image Features", "Encode Image" or "Load Features". '
            f"(shape {tuple(grid.shape)})"
        )
    if channels is not None and found != channels:
        raise BadInputError(
            "These image features do not belong to the loaded model.\n"
            'Connect the output "image_features" of a node that works with the same "Load BLIP3-o". '
            f"({found} channels, expected {channels})"
        )
    if not grid.isfinite().all():
        raise BadInputError(
            "The image features hold values that are not numbers (NaN or infinity).\n"
            "Look at the node that made them; a dtype of fp16 for the DiT is a common cause: use auto or bf16."
        )
    return grid
