"""Frozen weights in 8 or 4 bits: the DiT's big layers keep codes and widen them whenever they compute.

The codes never learn; adapters beside them do. Both passes widen anew, so that no wide weight outlives its use.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..blip3o_core.errors import BadInputError
from ..blip3o_core.models.nextdit import NextDiT

FP8_MAX = 448.0
NF4_BLOCK = 64
# Quantiles of the standard normal, brought to [-1, 1]. Source: Dettmers et al., QLoRA (2023), appendix E.
NF4_LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


class QuantisedLinear(nn.Linear):
    """A frozen linear layer whose weight is kept as codes and scales.

    Args:
        linear: the layer to take over.
        kind: "fp8" (e4m3, one scale per row) or "nf4" (one scale per 64 weights).
    """

    def __init__(self, linear: nn.Linear, kind: str) -> None:
        nn.Module.__init__(self)  # nn.Linear's own would make the wide weight that this class avoids
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.kind, self.dtype = kind, linear.weight.dtype
        weight = linear.weight.detach().float()
        if kind == "fp8":
            scales = (weight.abs().amax(dim=1, keepdim=True) / FP8_MAX).clamp(min=1e-12)
            # As bytes: a later .to(dtype) of the whole network must not widen them.
            codes = (weight / scales).to(torch.float8_e4m3fn).view(torch.uint8)
        else:
            flat = F.pad(weight.flatten(), (0, -weight.numel() % (2 * NF4_BLOCK))).view(-1, NF4_BLOCK)
            scales = flat.abs().amax(dim=1, keepdim=True).clamp(min=1e-12)
            levels = torch.tensor(NF4_LEVELS, device=flat.device)
            middles = (levels[1:] + levels[:-1]) / 2
            nibbles = torch.bucketize(flat / scales, middles).to(torch.uint8).flatten()
            codes = nibbles[::2] * 16 + nibbles[1::2]
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)
        self.bias = linear.bias

    @property
    def weight(self) -> Tensor:
        """The widened weight (out, in), made anew at each call."""
        if self.kind == "fp8":
            wide = self.codes.view(torch.float8_e4m3fn).float() * self.scales
        else:
            levels = torch.tensor(NF4_LEVELS, device=self.codes.device)
            nibbles = torch.stack([self.codes >> 4, self.codes & 15], dim=1).view(-1, NF4_BLOCK)
            wide = levels[nibbles.int()] * self.scales
            wide = wide.flatten()[: self.out_features * self.in_features]
            wide = wide.view(self.out_features, self.in_features)
        return wide.to(self.dtype)

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
        return hidden_states @ layer.weight.to(hidden_states.dtype).T

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient @ ctx.layer.weight.to(gradient.dtype), None


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
    if base_dtype in ("auto", "fp8", "nf4"):
        wide = torch.float32
        if device.type == "cuda":
            # Not float16: its gradients would need scaling.
            wide = torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
        elif device.type == "mps":
            wide = torch.bfloat16
    else:
        wide = {"fp32": torch.float32, "bf16": torch.bfloat16}[base_dtype]
    if base_dtype not in ("fp8", "nf4"):
        dit.to(device, wide)
        return
    dit.to(wide)
    for block in dit.layers:
        for name, module in list(block.named_modules()):
            if isinstance(module, nn.Linear) and not isinstance(module, QuantisedLinear):
                parent, _, child = name.rpartition(".")
                owner = block.get_submodule(parent)
                # A ModuleList's members are reached by number.
                owner._modules[child] = QuantisedLinear(module.to(device), base_dtype)
    dit.to(device)
