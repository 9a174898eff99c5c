"""What the nodes need of ComfyUI itself: devices, folders, progress, interrupts, text on a node, the version check."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path

import comfy.model_management as memory
import comfy.model_patcher
import comfy.utils
import folder_paths
import torch
from comfyui_version import __version__ as comfyui_version
from PIL import Image
from torch import Tensor, nn

from ...blip3o_core.checkpoints.layout import DECODER_FOLDER, is_checkpoint_folder
from ...blip3o_core.config import BUILT_IN_MODEL, LARGEST_FLOAT32_BYTES
from ...blip3o_core.devices import DTYPE_NAMES
from ...blip3o_core.errors import BadInputError, Blip3oError, MissingFilesError
from ...blip3o_core.units import format_bytes
from ...blip3o_core.untrusted import is_inner_name, is_new_name, quote

NEEDED_COMFYUI = "0.33.0"
MODEL_FOLDER = "blip3o"
BUILT_IN = "built-in: tiny"
DTYPES = {"auto": None, **DTYPE_NAMES, "fp8": torch.float8_e4m3fn}
PREVIEW_SIDE = 512


def require_comfyui() -> None:
    """Refuse a ComfyUI older than the one these nodes were written for, and say what to do."""

    def numbers(version: str) -> list[int]:
        return [int(part) for part in re.findall(r"\d+", version)[:3]]

    if numbers(comfyui_version) < numbers(NEEDED_COMFYUI):
        raise Blip3oError(
            f"ComfyUI-BLIP3o needs ComfyUI {NEEDED_COMFYUI} or newer, but this is {comfyui_version}.\n"
            "Update ComfyUI (in ComfyUI-Manager: Update ComfyUI; with git: git pull) and start it again."
        )


# --- folders ---------------------------------------------------------------------------------------------------------


def register_model_folder() -> None:
    """Make models/blip3o known to ComfyUI, besides what extra_model_paths.yaml already says about it."""
    default = str(Path(folder_paths.models_dir) / MODEL_FOLDER)
    configured, _ = folder_paths.folder_names_and_paths.get(MODEL_FOLDER, ([], set()))
    folders = [*configured] if default in configured else [*configured, default]
    folder_paths.folder_names_and_paths[MODEL_FOLDER] = (folders, {".safetensors"})


def list_checkpoints() -> list[str]:
    """Names for the loader's widget: the built-in model, then every BLIP3-o folder at most two levels down."""
    found = set()
    for root in map(Path, folder_paths.get_folder_paths(MODEL_FOLDER)):
        for config in (*root.glob("*/config.json"), *root.glob("*/*/config.json")):
            if is_checkpoint_folder(config.parent):
                found.add(config.parent.relative_to(root).as_posix())
    return [BUILT_IN, *sorted(found)]


def list_decoders() -> list[str]:
    """Names of the folders that hold a decoder: checkpoints, and decoder folders that lie there alone."""
    found = set()
    for root in map(Path, folder_paths.get_folder_paths(MODEL_FOLDER)):
        for depth in ("*", "*/*"):
            for config in root.glob(f"{depth}/unet/config.json"):
                folder = config.parent.parent
                is_inside = folder.name == DECODER_FOLDER and is_checkpoint_folder(folder.parent)
                found.add((folder.parent if is_inside else folder).relative_to(root).as_posix())
    return [BUILT_IN, *sorted(found)]


def find_checkpoint(name: str) -> Path:
    """Folder of a name from list_checkpoints or list_decoders.

    Raises:
        MissingFilesError: no registered folder holds it.
        BadInputError: the name leads out of the registered folders.
    """
    if name == BUILT_IN:
        return BUILT_IN_MODEL
    roots = folder_paths.get_folder_paths(MODEL_FOLDER)
    # Judged by its words, not by where it resolves to: people link big model folders to other disks.
    if not is_inner_name(name):
        raise BadInputError(
            f"The checkpoint {quote(name)} leads out of ComfyUI's model folders.\n"
            f'Put it into "{roots[-1]}" and choose it from the list.'
        )
    for root in roots:
        if os.path.isdir(Path(root) / name):
            return Path(root) / name
    raise MissingFilesError(
        f'There is no BLIP3-o checkpoint "{name}" in {" or ".join(roots)}.\n'
        'Download it with the node "Download BLIP3-o", or choose another one from the list '
        '(press "R" to refresh it).'
    )


def files_fingerprint(paths: Iterable[Path]) -> str:
    """Changes whenever one of the files does; ComfyUI reruns a node whose fingerprint changed."""
    stats = [(str(path), path.stat()) for path in sorted(paths) if path.is_file()]
    return repr([(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats])


def checkpoint_fingerprint(name: str) -> str:
    """Fingerprint of the weights and configurations of a checkpoint folder."""
    folder = find_checkpoint(name)
    return files_fingerprint([*folder.rglob("*.json"), *folder.rglob("*.safetensors")])


def save_path(filename_prefix: str, suffix: str) -> Path:
    """Next free numbered file for a prefix in the output folder; the prefix may name subfolders, never leave the folder.

    Raises:
        BadInputError: the prefix cannot begin the name of a file.
    """
    # A number follows, so that any ending of the words themselves is fine.
    if not is_inner_name(f"{filename_prefix}_"):
        raise BadInputError(
            f"{quote(filename_prefix)} would lie outside the output folder, or is a name that some system cannot have.\n"
            "Write a name, or folder/name, below ComfyUI's output folder."
        )
    if not is_new_name(f"{filename_prefix}_") or not filename_prefix.strip() or filename_prefix[-1] in "/\\":
        raise BadInputError(
            f"{quote(filename_prefix)} cannot begin the name of a file.\n"
            "Write a name, or folder/name, below ComfyUI's output folder."
        )
    output = folder_paths.get_output_directory()
    folder, name, counter, _, _ = folder_paths.get_save_image_path(filename_prefix, output)
    while (path := Path(folder) / f"{name}_{counter:05}_{suffix}").exists():
        counter += 1
    return path


def user_file(annotated_name: str) -> Path:
    """File in input, output or temp by ComfyUI's annotated name, e.g. "x.png [output]".

    Raises:
        BadInputError: the name leads out of these folders.
        MissingFilesError: there is no such file.
    """
    name, folder = folder_paths.annotated_filepath(annotated_name)
    folder = folder or folder_paths.get_input_directory()
    path = Path(folder) / name
    if not folder_paths.is_within_directory(folder, str(path)):
        raise BadInputError(
            f'"{annotated_name}" leads out of ComfyUI\'s folders.\nChoose a file from the list of the widget.'
        )
    if not os.path.isfile(path):
        raise MissingFilesError(
            f'There is no file "{annotated_name}".\nPress "R" to refresh the list and choose one that exists.'
        )
    return path


# --- devices and patchers --------------------------------------------------------------------------------------------


def device_words() -> str:
    """What ComfyUI computes on and its whole memory, e.g. "cuda, 23.99 GB"."""
    device = memory.get_torch_device()
    return f"{device.type}, {format_bytes(memory.get_total_memory(device))}"


def storage_and_compute_dtype(
    choice: str, supported: tuple[torch.dtype, ...], file_bytes: int
) -> tuple[torch.dtype, torch.dtype]:
    """How weights are kept and what they are computed in, for a choice of the dtype widget on this device.

    "auto" leaves the decision to ComfyUI (its --bf16-unet, --fp32-unet ... options included), but keeps large networks
    in the file's bf16 where it would compute in fp32.

    Args:
        supported: dtypes the network computes well in, best first.
        file_bytes: size of the network on disk.
    """
    device = memory.get_torch_device()
    storage = DTYPES[choice]
    if storage is None:
        storage = memory.unet_dtype(device, supported_dtypes=list(supported), weight_dtype=torch.bfloat16)
        if storage == torch.float32 and file_bytes > LARGEST_FLOAT32_BYTES and not memory.args.fp32_unet:
            storage = torch.bfloat16
    return storage, memory.unet_manual_cast(storage, device, list(supported)) or storage


def make_patcher(
    model: nn.Module,
    factory: Callable[..., comfy.model_patcher.ModelPatcher],
    arguments: tuple,
    *,
    disable_dynamic: bool,
) -> comfy.model_patcher.ModelPatcher:
    """Hand a network to ComfyUI's memory management.

    Args:
        factory: makes the same patcher again when called as factory(*arguments, disable_dynamic=True); ComfyUI uses it
            where it needs an untouched copy (training, hooks, several GPUs).
    """
    # Looked up at call time: ComfyUI rebinds CoreModelPatcher when dynamic memory is on.
    kind = comfy.model_patcher.ModelPatcher if disable_dynamic else comfy.model_patcher.CoreModelPatcher
    patcher = kind(model, load_device=memory.get_torch_device(), offload_device=memory.unet_offload_device())
    patcher.cached_patcher_init = (factory, arguments)
    return patcher


def load_to_device(patcher: comfy.model_patcher.ModelPatcher, activation_bytes: int) -> torch.device:
    """Bring a network to its device, whole or in part, with room for activations; return the device."""
    memory.load_models_gpu([patcher], memory_required=activation_bytes)
    # ComfyUI moves layers with weights; rotary tables lie in modules without any and stay behind in a partial load.
    for module in patcher.model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.device != patcher.load_device:
                setattr(module, name, buffer.to(patcher.load_device))
    return patcher.load_device


def to_intermediate(tensor: Tensor) -> Tensor:
    """Where and in what dtype ComfyUI keeps tensors between nodes."""
    return tensor.to(device=memory.intermediate_device(), dtype=memory.intermediate_dtype())


# --- progress --------------------------------------------------------------------------------------------------------


def raise_if_interrupted() -> None:
    """Stop here when the user pressed cancel."""
    memory.throw_exception_if_processing_interrupted()


class StepProgress:
    """A progress bar on the running node that is also its interrupt check and, with rgb, its live preview.

    Args:
        total: steps.
        to_picture: makes a (H, W, 3) picture in [0, 1] of the prediction; None = no preview.
    """

    def __init__(self, total: int, to_picture: Callable[[Tensor], Tensor] | None = None) -> None:
        self.bar = comfy.utils.ProgressBar(total)
        self.total = total
        self.to_picture = to_picture

    def __call__(self, step: int, predicted: Tensor | None = None) -> None:
        """Report that `step` steps (1 ... total) are done; `predicted` is the current guess at the result."""
        raise_if_interrupted()
        preview = None
        if predicted is not None and self.to_picture is not None:
            preview = ("JPEG", to_preview_image(self.to_picture(predicted)), PREVIEW_SIDE)
        self.bar.update_absolute(step, self.total, preview)


def to_preview_image(picture: Tensor) -> Image.Image:
    """Small (H, W, 3) picture in [0, 1] as a Pillow image of a size one can see."""
    pixels = (picture.detach().float().clamp(0, 1) * 255).round().to("cpu", torch.uint8).numpy()
    image = Image.fromarray(pixels)
    scale = max(1, PREVIEW_SIDE // max(image.size))
    return image.resize((image.width * scale, image.height * scale), Image.Resampling.BICUBIC)


def show_text(text: str, node_id: str | None) -> None:
    """Write text on a node while it runs."""
    from server import PromptServer

    if node_id is not None and PromptServer.instance is not None:
        PromptServer.instance.send_progress_text(text, node_id)
