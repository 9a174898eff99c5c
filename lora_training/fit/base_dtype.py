"""The dtype of the weights under an adapter, which training leaves as they are."""

from __future__ import annotations

import torch

from ...blip3o_core.errors import BadInputError
from ...blip3o_core.models.nextdit import NextDiT
from ...blip3o_core.performance.quantize import quantize_network


def set_base_dtype(dit: NextDiT, base_dtype: str, device: torch.device) -> None:
    """Bring a DiT's frozen weights to the dtype of `model.base_dtype`, on its device.

    fp8 and nf4 quantise the linear layers of the blocks; embedders and the output stay in bf16 (fp32 on the CPU).

    Raises:
        BadInputError: the device cannot hold such weights.
    """
    if base_dtype == "fp8" and device.type == "mps":
        raise BadInputError(
            'model.base_dtype "fp8" needs a device that knows 8-bit floats; Apple\'s GPUs do not.\n'
            "Set model.base_dtype to bf16."
        )
    wide = torch.float32
    if base_dtype == "bf16" or (base_dtype != "fp32" and device.type == "mps"):
        wide = torch.bfloat16
    elif base_dtype != "fp32" and device.type == "cuda" and torch.cuda.is_bf16_supported():
        wide = torch.bfloat16  # else float32: float16's gradients would need scaling
    if base_dtype not in ("fp8", "nf4"):
        dit.to(device, wide)
        return
    dit.to(wide)
    for block in dit.layers:
        quantize_network(block, base_dtype, device, at_least=0)
    dit.to(device)
