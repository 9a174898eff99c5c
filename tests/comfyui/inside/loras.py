"""Runs inside ComfyUI's interpreter: velocities with LoRA files, through ComfyUI's stock loader and through our node.

Usage: loras.py COMFYUI_FOLDER REPOSITORY CHECKPOINT FOLDER_OF_LORAS RESULT.safetensors
"""

import importlib.util
import sys
from pathlib import Path

COMFYUI, REPOSITORY, CHECKPOINT, LORAS, RESULT = map(Path, sys.argv[1:6])
sys.argv = ["main.py", "--cpu"]
sys.path.insert(0, str(COMFYUI))
import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()
import folder_paths  # noqa: E402
import nodes  # noqa: E402 - ComfyUI's own, before ours can be
import torch  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

spec = importlib.util.spec_from_file_location("comfyui_blip3o", REPOSITORY / "__init__.py")
sys.modules["comfyui_blip3o"] = package = importlib.util.module_from_spec(spec)
spec.loader.exec_module(package)
from comfyui_blip3o.nodes import load  # noqa: E402
from comfyui_blip3o.nodes.native import dit as native_dit
from comfyui_blip3o.nodes.native import drawing, lora

torch.set_num_threads(1)
folder_paths.folder_names_and_paths["loras"] = ([str(LORAS)], {".safetensors"})
STRENGTHS = (1.0, 0.5)
result: dict[str, torch.Tensor] = {}


def velocity(patcher: object, handle: load.BackboneHandle) -> torch.Tensor:
    """The same call as in tests/support/lora_files.py."""
    prompt, _, _ = drawing.encode_prompt(handle, "a red circle", "", None)
    network = patcher.model.diffusion_model
    channels, side = network.config.in_channels, round(prompt.shape[1] ** 0.5)
    grid = torch.randn(2, channels, side, side, generator=torch.Generator().manual_seed(7))
    patcher.patch_model(torch.device("cpu"))
    found = network(grid, torch.tensor([900.0, 100.0]), prompt.expand(2, -1, -1))
    patcher.unpatch_model(torch.device("cpu"))
    return found.contiguous()


with torch.inference_mode():
    dit = native_dit.load_dit_patcher(str(CHECKPOINT), "fp32")
    backbone = load.load_backbone_handle(CHECKPOINT, "fp32")
    result["none"] = velocity(dit, backbone)
    for path in sorted(LORAS.glob("*.safetensors")):
        for strength in STRENGTHS:
            stock = nodes.LoraLoaderModelOnly().load_lora_model_only(dit, path.name, strength)[0]
            result[f"stock {strength} {path.stem}"] = velocity(stock, backbone)
            ours, tuned, _ = lora.apply_lora(path.name, dit, backbone, strength, strength)
            result[f"node {strength} {path.stem}"] = velocity(ours, tuned)
    result["none again"] = velocity(dit, backbone)
save_file(result, str(RESULT))
