"""Frozen weights in 8 or 4 bits under an adapter: widened anew in both passes, so that no wide weight outlives its use."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..blip3o_core.errors import BadInputError
from ..blip3o_core.models.nextdit import NextDiT
from ..blip3o_core.quantize import dequantize, quantize


class QuantisedLinear(nn.Linear):
    """A frozen linear layer whose weight is kept in few bits; still an nn.Linear, which is what PEFT adapts.

    Args:
        linear: the layer to take over.
        weight_format: "fp8" or "nf4", see quantize.
    """

    def __init__(self, linear: nn.Linear, weight_format: str) -> None:
        nn.Module.__init__(self)  # nn.Linear's own would make the wide weight that this class avoids
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight_format, self.dtype = weight_format, linear.weight.dtype
        codes, scales = quantize(linear.weight.detach().float(), weight_format)
        self._code_dtype = codes.dtype
        # As bytes: a later .to(dtype) of the whole network must not widen them.
        self.register_buffer("codes", codes.view(torch.uint8))
        self.register_buffer("scales", scales)
        self.bias = linear.bias

    def widened(self, dtype: torch.dtype) -> Tensor:
        """The weight (out, in), made anew at each call."""
        codes = self.codes.view(self._code_dtype)
        return dequantize(codes, self.scales, self.weight_format, dtype, self.in_features)

    @property
    def weight(self) -> Tensor:
        """The widened weight, for what reads a layer's weight: DoRA's norms, shapes, devices."""
        return self.widened(self.dtype)

    def forward(self, hidden_states: Tensor) -> Tensor:
        dtype = hidden_states.dtype
        if torch.is_autocast_enabled(hidden_states.device.type):
            dtype = torch.get_autocast_dtype(hidden_states.device.type)
        result = _FrozenLinear.apply(hidden_states.to(dtype), self)
        return result if self.bias is None else result + self.bias.to(dtype)


class _FrozenLinear(torch.autograd.Function):
    """x W' that keeps neither x nor W for the backward pass."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, hidden_states: Tensor, layer: QuantisedLinear
    ) -> Tensor:
        ctx.layer = layer
        return hidden_states @ layer.widened(hidden_states.dtype).T

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient @ ctx.layer.widened(gradient.dtype), None


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
        for parent in list(block.modules()):
            for name, child in list(parent.named_children()):
                if type(child) is nn.Linear:
                    # Not setattr: a ModuleList's members are named by number.
                    parent._modules[name] = QuantisedLinear(child.to(device), base_dtype)
    dit.to(device)
