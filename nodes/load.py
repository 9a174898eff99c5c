"""Nodes that load: the checkpoint's parts, the image encoder, LoRA files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import comfy.model_management as memory
import comfy.model_patcher
import torch
from comfy_api.latest import io
from torch import nn

from ..blip3o_core.checkpoints.layout import CheckpointFiles, open_checkpoint
from ..blip3o_core.checkpoints.load import load_backbone, load_image_encoder
from ..blip3o_core.checkpoints.match import describe_left_out, needed_tensors
from ..blip3o_core.checkpoints.memory_plan import USES, largest_file, measure_disk, network_bytes
from ..blip3o_core.errors import Blip3oError
from ..blip3o_core.units import format_bytes
from .native import host, layers, lora
from .native.decoder import load_decoder_patcher, load_vae
from .native.dit import load_dit_patcher
from .native.sockets import BackboneHandle, BackboneType, ImageEncoderHandle, ImageEncoderType

CATEGORY = "BLIP3-o/load"
OWN_DECODER = "of the checkpoint"
SUPPORTED_DTYPES = (torch.bfloat16, torch.float32)
LOADERS: dict[str, Callable[..., nn.Module]] = {
    "backbone": load_backbone,
    "image_encoder": load_image_encoder,
}
# What a network needs on the device besides its weights, the driver's share included.
WORKING_BYTES = 2560 * 2**20


def network_dtypes(files: CheckpointFiles, component: str, choice: str) -> tuple[torch.dtype, torch.dtype]:
    """Storage and compute dtype of the backbone or the image encoder, which overflow in fp16."""
    size = files.component_bytes.get(component, 0)
    return host.storage_and_compute_dtype(choice, SUPPORTED_DTYPES, size)


def load_patcher(
    component: str, folder: str, dtype: str, disable_dynamic: bool = False
) -> comfy.model_patcher.ModelPatcher:
    """The backbone of a checkpoint folder, or its EVA-CLIP, which may lie beside it. Arguments as load_dit_patcher.

    Args:
        component: a name in LOADERS.
    """
    files = open_checkpoint(Path(folder))
    storage, compute = network_dtypes(files, component, dtype)
    network = LOADERS[component](files, dtype=layers.file_dtype(storage))
    layers.prepare(network, storage, compute)
    memory.archive_model_dtypes(network)
    return host.make_patcher(
        network, load_patcher, (component, folder, dtype), disable_dynamic=disable_dynamic
    )


def load_backbone_handle(folder: Path, dtype: str) -> BackboneHandle:
    """What the socket BLIP3O carries."""
    return BackboneHandle(*_load("backbone", folder, dtype))


def load_image_encoder_handle(folder: Path, dtype: str) -> ImageEncoderHandle:
    """What the socket BLIP3O_IMAGE_ENCODER carries."""
    return ImageEncoderHandle(*_load("image_encoder", folder, dtype))


def _load(
    component: str, folder: Path, dtype: str
) -> tuple[comfy.model_patcher.ModelPatcher, CheckpointFiles, torch.dtype]:
    files = open_checkpoint(folder)
    return load_patcher(component, str(folder), dtype), files, network_dtypes(files, component, dtype)[1]


def memory_text(files: CheckpointFiles, choice: str, device_bytes: int) -> str:
    """What the networks of a checkpoint take, how a device of that size copes, and how long reading them takes.

    Args:
        choice: of the dtype widget.
    """
    lines, largest, read = [], 0, 0
    for component in USES["draw"]:
        storage, _ = network_dtypes(files, component, choice)
        tensors = needed_tensors(files, component)
        size = network_bytes(tensors, "fp8") if storage.itemsize == 1 else network_bytes(tensors)
        size = size * 2 if storage == torch.float32 else size
        lines.append(f"{component}: {format_bytes(size)} in {str(storage).removeprefix('torch.')}")
        largest = max(largest, size)
        read += sum(info.nbytes for info in tensors.values())
    room = device_bytes - WORKING_BYTES
    if largest > room:
        verdict = "the largest visits it layer by layer, which is slower; dtype fp8 halves it"
    else:
        verdict = "each network fits and is brought there while it works"
    lines.append(f"{memory.get_torch_device().type} with {format_bytes(device_bytes)}: {verdict}")
    seconds = read / measure_disk(largest_file(files))
    lines.append(f"first use reads {format_bytes(read)}, about {seconds:.0f} s from this disk")
    if files.left_out:
        lines.append(f"left out: {describe_left_out(files.left_out)}")
    return "\n".join(lines)


def checkpoint_input() -> io.Combo.Input:
    return io.Combo.Input(
        "checkpoint",
        options=host.list_checkpoints(),
        default=host.BUILT_IN,
        tooltip="Folder in models/blip3o. The built-in tiny model draws and names simple shapes on any computer; "
        "the 8B and 4B models are downloaded with the node Download BLIP3-o.",
    )


def dtype_input() -> io.Combo.Input:
    return io.Combo.Input(
        "dtype",
        options=list(host.DTYPES),
        default="auto",
        tooltip="How weights are kept in memory. auto is nearly always right. fp8 halves memory and loses a little detail; "
        "fp32 is exact and twice as large.",
    )


def decoder_folder(name: str) -> str | None:
    """Folder of a choice of the decoder widget; None = the checkpoint's own."""
    return None if name == OWN_DECODER else str(host.find_checkpoint(name))


def validate_checkpoint(name: str, decoder: str = OWN_DECODER) -> bool | str:
    """True, or the sentence that ComfyUI shows on the node before anything runs."""
    try:
        open_checkpoint(host.find_checkpoint(name), decoder=decoder_folder(decoder))
    except Blip3oError as error:
        return str(error)
    return True


class LoadBlip3o(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="BLIP3oLoad",
            display_name="Load BLIP3-o",
            category=CATEGORY,
            description="Load the parts of a BLIP3-o checkpoint. Connect backbone to Encode Prompt or Ask, dit to "
            "Sample Image Features, decoder and vae to Decode Image Features.",
            search_aliases=["blip3o", "blip 3", "load model", "checkpoint loader", "unified model"],
            inputs=[
                checkpoint_input(),
                dtype_input(),
                io.Combo.Input(
                    "decoder",
                    options=[OWN_DECODER, *host.list_decoders()],
                    default=OWN_DECODER,
                    optional=True,
                    advanced=True,
                    tooltip="Where the decoder is taken from. A finetune is often saved without one: choose a checkpoint that "
                    "has it, all published ones have the same.",
                ),
            ],
            outputs=[
                BackboneType.Output(
                    "backbone", tooltip="Qwen2.5-VL with latent queries: reads prompts, answers questions."
                ),
                io.Model.Output(
                    "dit",
                    tooltip="Draws image features from a prompt. Works with every sampler and LoRA loader.",
                ),
                io.Model.Output(
                    "decoder",
                    tooltip="SDXL-shaped UNet that paints image features. Works with every sampler.",
                ),
                io.Vae.Output("vae", tooltip="Turns the decoder's latents into pixels."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, checkpoint: str, decoder: str = OWN_DECODER) -> bool | str:
        return validate_checkpoint(checkpoint, decoder)

    @classmethod
    def fingerprint_inputs(cls, checkpoint: str, decoder: str = OWN_DECODER, **unused: Any) -> str:
        names = [checkpoint] if decoder == OWN_DECODER else [checkpoint, decoder]
        return " ".join(map(host.checkpoint_fingerprint, names))

    @classmethod
    def execute(cls, checkpoint: str, dtype: str, decoder: str = OWN_DECODER) -> io.NodeOutput:
        folder = host.find_checkpoint(checkpoint)
        painter = decoder_folder(decoder)
        text = memory_text(open_checkpoint(folder, decoder=painter), dtype, memory.get_total_memory())
        host.show_text(text, cls.hidden.unique_id)
        return io.NodeOutput(
            load_backbone_handle(folder, dtype),
            load_dit_patcher(str(folder), dtype),
            load_decoder_patcher(str(folder), dtype, painter),
            load_vae(str(folder), painter),
        )


class LoadImageEncoder(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="BLIP3oLoadImageEncoder",
            display_name="Load Image Encoder (BLIP3-o)",
            category=CATEGORY,
            description="Load EVA-CLIP, which turns pictures into image features. Connect it to Encode Image; "
            "drawing from a prompt does not need it.",
            search_aliases=["blip3o", "eva clip", "clip vision", "image features"],
            inputs=[checkpoint_input(), dtype_input()],
            outputs=[ImageEncoderType.Output("image_encoder", tooltip="Turns pictures into image features.")],
        )

    @classmethod
    def validate_inputs(cls, checkpoint: str) -> bool | str:
        return validate_checkpoint(checkpoint)

    @classmethod
    def fingerprint_inputs(cls, checkpoint: str, **unused: Any) -> str:
        return host.checkpoint_fingerprint(checkpoint)

    @classmethod
    def execute(cls, checkpoint: str, dtype: str) -> io.NodeOutput:
        folder = host.find_checkpoint(checkpoint)
        return io.NodeOutput(load_image_encoder_handle(folder, dtype))


class LoadLora(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        strength = {"default": 1.0, "min": -10.0, "max": 10.0, "step": 0.05}
        return io.Schema(
            node_id="BLIP3oLoadLora",
            display_name="Load LoRA (BLIP3-o)",
            category=CATEGORY,
            description="Apply a LoRA to the DiT and, if it has such weights, to the backbone. "
            "Connect several one after another to stack them.",
            search_aliases=["blip3o", "lora", "adapter", "style", "peft"],
            inputs=[
                io.Combo.Input(
                    "lora",
                    options=lora.list_loras(),
                    default=lora.NO_LORA,
                    tooltip="File in models/loras, or a PEFT folder there with adapter_config.json. none changes nothing.",
                ),
                io.Float.Input(
                    "strength",
                    **strength,
                    tooltip="How strongly the LoRA acts on the DiT. 1 is as trained, 0 is off, 0.5-1.2 is usual.",
                ),
                io.Float.Input(
                    "backbone_strength",
                    **strength,
                    tooltip="How strongly it acts on the backbone and the latent queries, if it was trained on them.",
                ),
                io.Model.Input("dit", optional=True, tooltip="The output dit of Load BLIP3-o."),
                BackboneType.Input("backbone", optional=True, tooltip="The output backbone of Load BLIP3-o."),
            ],
            outputs=[
                io.Model.Output("dit", tooltip="The DiT with the LoRA."),
                BackboneType.Output("backbone", tooltip="The backbone with the LoRA."),
                io.String.Output(
                    "report",
                    tooltip="How many weights of the file were matched, and what it was trained for.",
                ),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, lora: str, **unused: Any) -> str:
        return lora_fingerprint(lora)

    @classmethod
    def execute(
        cls,
        lora: str,
        strength: float,
        backbone_strength: float,
        dit: comfy.model_patcher.ModelPatcher | None = None,
        backbone: BackboneHandle | None = None,
    ) -> io.NodeOutput:
        dit, backbone, report = apply_lora(lora, dit, backbone, strength, backbone_strength)
        return io.NodeOutput(dit, backbone, report)


apply_lora, lora_fingerprint = lora.apply_lora, lora.fingerprint
NODES = [LoadBlip3o, LoadImageEncoder, LoadLora]
