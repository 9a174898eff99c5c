"""The stage comfyui: the DiT under ComfyUI's own sampler. Run by run.py in ComfyUI's interpreter; prints the rows as JSON.

python benchmarks/comfyui.py COMFYUI_FOLDER SIZE DEVICE ROUNDS THREADS
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from unittest import mock

COMFYUI, SIZE, DEVICE, ROUNDS, THREADS = Path(sys.argv[1]), *sys.argv[2:4], *map(int, sys.argv[4:6])
sys.argv = ["main.py", *(["--cpu"] if DEVICE == "cpu" else [])]
sys.path[:0] = [str(COMFYUI)]
import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()
import comfy.model_patcher  # noqa: E402
import comfy.sample  # noqa: E402
import common  # noqa: E402 - makes the package known
import nodes  # noqa: E402, F401 - ComfyUI's own, before ours can be
import torch  # noqa: E402
from comfy_api.torch_helpers import set_torch_compile_wrapper  # noqa: E402
from comfy_extras.nodes_torch_compile import skip_torch_compile_dict  # noqa: E402
from comfyui_blip3o.blip3o_core.config import BUILT_IN_MODEL  # noqa: E402
from comfyui_blip3o.blip3o_core.models.nextdit import NextDiT  # noqa: E402
from comfyui_blip3o.blip3o_core.performance.recording import can_compile  # noqa: E402
from comfyui_blip3o.nodes.native import dit as native_dit
from comfyui_blip3o.nodes.native import layers, preview  # noqa: E402
from common import Limits, Mode, compare, count_flops, weight_bytes  # noqa: E402
from networks import DITS, QUERIES  # noqa: E402
from torch import Tensor  # noqa: E402

STEPS, GUIDANCE = 30, 3.0


def make_patcher() -> comfy.model_patcher.ModelPatcher:
    """The built-in DiT, or one of another size with random weights, as our loader hands it to ComfyUI."""
    if SIZE == "tiny":
        return native_dit.load_dit_patcher(str(BUILT_IN_MODEL), "auto")
    dtype = torch.float32 if DEVICE == "cpu" else torch.bfloat16
    torch.manual_seed(0)
    dit = NextDiT(DITS[SIZE]).to(dtype).requires_grad_(False).eval()
    for layer in dit.layers:
        torch.nn.init.normal_(layer.gate)  # off zero, so that every branch counts
    layers.prepare(dit, dtype, dtype)
    dit.__class__, dit.dtype = native_dit.SamplerDiT, dtype
    colours = preview.RgbFactors([[0.0] * 3] * dit.config.in_channels, [0.0] * 3)
    form = native_dit.FeatureFormat(dit.config.in_channels, colours)
    model = native_dit.FeatureFlow(native_dit.FeatureFlowConfig(form, dtype, dtype), dit, "")
    memory = comfy.model_management
    return comfy.model_patcher.ModelPatcher(model, memory.get_torch_device(), memory.unet_offload_device())


def main() -> None:
    torch.set_num_threads(THREADS)
    patcher = make_patcher()
    dit = patcher.model.diffusion_model
    side = round(QUERIES**0.5)
    generator = torch.Generator().manual_seed(0)
    conditioning = torch.randn(1, QUERIES, dit.config.conditioning_dim, generator=generator)
    noise = torch.randn(1, dit.config.in_channels, side, side, generator=generator)

    def draw(model: comfy.model_patcher.ModelPatcher = patcher) -> Tensor:
        conds = [[[conditioning, {}]], [[torch.zeros_like(conditioning), {}]]]
        options = {"seed": 0, "disable_pbar": True}
        start = torch.zeros_like(noise)
        return comfy.sample.sample(
            *(model, noise, STEPS, GUIDANCE, "euler", "simple", *conds, start), **options
        )

    def plain() -> Tensor:
        with mock.patch.object(native_dit, "PromptCond", comfy.conds.CONDRegular):
            return kept()

    def kept() -> Tensor:
        with common.pytorch_products():
            return draw()

    device = comfy.model_management.get_torch_device()
    moved = STEPS * weight_bytes(dit)
    modes = {
        "KSampler, prompt encoded at every step (plain)": Mode(plain, 1, 0, moved),
        "KSampler, prompt encoded once": Mode(kept, 1, 0, moved),
    }
    if DEVICE == "cpu":
        modes["KSampler, and oneDNN (what is used)"] = Mode(draw, 1, count_flops(draw), moved)
    if can_compile(device):
        compiled = patcher.clone()
        options = {"guard_filter_fn": skip_torch_compile_dict}
        set_torch_compile_wrapper(model=compiled, backend="inductor", options=options)
        modes["KSampler, core's node TorchCompileModel"] = Mode(lambda: draw(compiled), 1, 0, moved)
    limits = Limits(float("inf"), float("inf"))
    rows = compare("ComfyUI: DiT sampling", SIZE, modes, device=device, rounds=ROUNDS, limits=limits)
    print("ROWS " + json.dumps([asdict(row) for row in rows]))


with torch.inference_mode():
    main()
