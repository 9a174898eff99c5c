"""Weights in fewer bits: linear layers that keep fp8, int8 or nf4 and multiply in the dtype of their input.

Only weights shrink, what flows between layers does not. Embeddings, norms, convolutions and the head stay as they are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import BadInputError

if TYPE_CHECKING:  # a network is only needed to look through it
    from collections.abc import Iterator

# Bytes for each weight, scales included.
FORMATS = {"fp8": 1.0, "int8": 1.0, "nf4": 0.5 + 2 / 64}
FP8_LARGEST = 448.0
NF4_BLOCK = 64
# Quantiles of a normal distribution, scaled to [-1, 1], with an exact zero.
# Source: QLoRA (arXiv 2305.14314), appendix E.
NF4_LEVELS = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
# Layers smaller than this gain nothing worth their error.
SMALLEST_WEIGHTS = 2**14
SKIPPED = ("lm_head",)


class QuantizedLinear(nn.Module):
    """A frozen linear layer whose weight is kept in one of FORMATS.

    Args:
        linear: the layer to take the place of; left as it is.
        weight_format: a name in FORMATS.
        device: where to keep the weight; the work is done there too.
    """

    def __init__(self, linear: nn.Linear, weight_format: str, device: torch.device) -> None:
        super().__init__()
        self.weight_format = weight_format
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = linear.weight.detach().to(device)
        self.dtype = weight.dtype
        quantized, scales = quantize(weight.float(), weight_format)
        self.register_buffer("quantized", quantized)
        self.register_buffer("scales", scales)
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach().to(device), False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        weight = dequantize(
            self.quantized, self.scales, self.weight_format, hidden_states.dtype, self.in_features
        )
        return F.linear(hidden_states, weight, self.bias)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.weight_format}"


def quantize(weight: Tensor, weight_format: str) -> tuple[Tensor, Tensor]:
    """A weight (out, in), float32, in few bits, and its scales: one per output row, for nf4 one per 64 weights."""
    if weight_format == "nf4":
        padded = F.pad(weight, (0, -weight.shape[1] % NF4_BLOCK)).reshape(-1, NF4_BLOCK)
        scales = padded.abs().amax(1, keepdim=True).clamp(min=1e-12)
        levels = torch.tensor(NF4_LEVELS, device=weight.device)
        middles = (levels[1:] + levels[:-1]) / 2
        codes = torch.bucketize(padded / scales, middles).to(torch.uint8)
        return (codes[:, ::2] << 4) | codes[:, 1::2], scales.to(torch.bfloat16)
    largest = FP8_LARGEST if weight_format == "fp8" else 127.0
    scales = weight.abs().amax(1, keepdim=True).clamp(min=1e-12) / largest
    if weight_format == "fp8":
        return (weight / scales).clamp(-largest, largest).to(torch.float8_e4m3fn), scales
    return (weight / scales).round().to(torch.int8), scales


def dequantize(
    quantized: Tensor, scales: Tensor, weight_format: str, dtype: torch.dtype, columns: int
) -> Tensor:
    """The weight (out, columns) again, up to what the format lost."""
    if weight_format != "nf4":
        return quantized.to(dtype) * scales.to(dtype)
    levels = torch.tensor(NF4_LEVELS, device=quantized.device, dtype=dtype)
    codes = torch.stack([quantized >> 4, quantized & 15], dim=-1).flatten(1)
    values = levels[codes.int()] * scales.to(dtype)
    return values.reshape(-1, columns + -columns % NF4_BLOCK)[:, :columns]


def check_format(weight_format: str) -> None:
    """Raise BadInputError unless the name is one of FORMATS."""
    if weight_format not in FORMATS:
        raise BadInputError(
            f'"{weight_format}" is no format for weights; choose one of {", ".join(FORMATS)}.'
        )


def quantize_network(network: nn.Module, weight_format: str, device: torch.device) -> nn.Module:
    """Exchange the large linear layers of a frozen network, one by one, and bring the rest to the device.

    A network whose weights are mapped from its files never exists in full width in memory.

    Raises:
        BadInputError: unknown format.
    """
    check_format(weight_format)
    for parent, name, linear in list(quantizable_layers(network)):
        setattr(parent, name, QuantizedLinear(linear, weight_format, device))
    return network.to(device)


def quantizable_layers(network: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    """(parent, name in it, layer) of each layer that quantize_network exchanges."""
    for parent in network.modules():
        for name, child in parent.named_children():
            is_large = type(child) is nn.Linear and child.weight.numel() >= SMALLEST_WEIGHTS
            if is_large and name not in SKIPPED:
                yield parent, name, child
