"""Weights in fewer bits: linear layers that keep fp8, int8 or nf4 and multiply in the dtype of their input.

Only weights shrink, what flows between layers does not. Embeddings, norms, convolutions and the head stay as they are.
int8 is the most exact; fp8 is no smaller, and on a CPU slower. nf4 is half as large and slower than whole weights there.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import BadInputError
from .linear import PLAIN_LINEARS, multiply

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
FP8_IN_HALF = -(2**15) + 0x3F80  # bits of float16 that fp8 can set: the sign and seven more, as an int16
# Weights widened at a time on the CPU: 4 MB in float32, measured best between 0.5 and 8.
WIDENED_AT_ONCE = 2**20
# Rows of input up to which PyTorch's own product with int8 is faster than widening.
PACKED_PRODUCT_ROWS = 4
# Layers smaller than this gain nothing worth their error.
SMALLEST_WEIGHTS = 2**14
SKIPPED = ("lm_head",)
# Trainings on other devices do without.
AUTOCAST_DEVICES = ("cpu", "cuda")


class QuantizedLinear(nn.Linear):
    """A frozen linear layer whose weight is kept in one of FORMATS; still an nn.Linear, which is what PEFT adapts.

    The wide weight never outlives its use, in neither pass; gradients flow to the input alone.

    Args:
        linear: the layer to take the place of; left as it is.
        weight_format: a name in FORMATS.
        device: where to keep the weight; the work is done there too. None = where it lies.
    """

    codes: Tensor
    scales: Tensor

    def __init__(self, linear: nn.Linear, weight_format: str, device: torch.device | None = None) -> None:
        nn.Module.__init__(self)  # nn.Linear's own would make the wide weight that this class avoids
        self.weight_format = weight_format
        self.in_features, self.out_features = linear.in_features, linear.out_features
        device = linear.weight.device if device is None else device
        weight = linear.weight.detach().to(device)
        self.dtype = weight.dtype
        codes, scales = quantize(weight.float(), weight_format)
        self._code_dtype = codes.dtype
        # As bytes: a later .to(dtype) of the whole network must not widen them.
        self.register_buffer("codes", codes.view(torch.uint8))
        self.register_buffer("scales", scales)
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach().to(device), False)

    def widened(self, dtype: torch.dtype) -> Tensor:
        """The weight (out, in), made anew at each call."""
        return dequantize(*self._packed, dtype, self.in_features)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]  # what nn.Linear keeps is made here when it is read
        """The widened weight, for what reads a layer's weight: DoRA's norms, shapes, devices."""
        return self.widened(self.dtype)

    @property
    def _packed(self) -> tuple[Tensor, Tensor, str]:
        return self.codes.view(self._code_dtype), self.scales, self.weight_format

    def forward(self, hidden_states: Tensor) -> Tensor:
        kind = hidden_states.device.type
        if kind in AUTOCAST_DEVICES and torch.is_autocast_enabled(kind):
            hidden_states = hidden_states.to(torch.get_autocast_dtype(kind))
        if torch.is_grad_enabled() and hidden_states.requires_grad:
            result = _FrozenProduct.apply(hidden_states, self)
        else:
            result = multiply_quantized(hidden_states, *self._packed)
        return result if self.bias is None else result + self.bias.to(result.dtype)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.weight_format}"


class _FrozenProduct(torch.autograd.Function):
    """x W' that keeps neither x nor W for the backward pass."""

    @staticmethod
    def forward(ctx: Any, hidden_states: Tensor, layer: QuantizedLinear) -> Tensor:
        ctx.layer = layer
        return multiply_quantized(hidden_states, *layer._packed)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient @ ctx.layer.widened(gradient.dtype), None


def multiply_quantized(hidden_states: Tensor, codes: Tensor, scales: Tensor, weight_format: str) -> Tensor:
    """F.linear with the weight that `quantize` packed; (..., in) -> (..., out), in the dtype of the input, up to rounding."""
    dtype, columns = hidden_states.dtype, hidden_states.shape[-1]
    if hidden_states.device.type != "cpu":
        if weight_format == "nf4" or dtype == torch.float16:  # sums before the scales overflow in float16
            return F.linear(hidden_states, dequantize(codes, scales, weight_format, dtype, columns))
        return F.linear(hidden_states, codes.to(dtype)).mul_(scales.T)
    rows = hidden_states.numel() // columns
    is_whole = columns % 64 == 0 and codes.shape[0] % 32 == 0  # it reads past the end of other shapes
    is_few = dtype == torch.bfloat16 and rows <= PACKED_PRODUCT_ROWS
    if weight_format == "int8" and is_few and is_whole and can_multiply_int8():
        product = torch.ops.aten._weight_int8pack_mm(
            hidden_states.reshape(rows, columns), codes, scales.flatten().to(dtype)
        )
        return product.view(*hidden_states.shape[:-1], -1)
    # A part of the weight at a time, wide only in the processor's cache.
    if dtype == torch.float16:
        hidden_states = hidden_states.float()
    # Codes and scales have so many lines for each row of the weight.
    lines = 1 if weight_format != "nf4" else -(-columns // NF4_BLOCK)
    step = lines * max(1, WIDENED_AT_ONCE // columns)
    parts = [
        _multiply_part(hidden_states, *part, weight_format)
        for part in zip(codes.split(step), scales.split(step), strict=True)
    ]
    return (parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)).to(dtype)


def _multiply_part(hidden_states: Tensor, codes: Tensor, scales: Tensor, weight_format: str) -> Tensor:
    dtype = hidden_states.dtype
    if weight_format == "nf4":
        columns = hidden_states.shape[-1]
        return multiply(hidden_states, dequantize(codes, scales, weight_format, dtype, columns))
    return multiply(hidden_states, _unscaled(codes, dtype)).mul_(scales.T)


@cache
def can_multiply_int8() -> bool:
    """Whether this PyTorch multiplies bfloat16 with int8 as it is on the CPU."""
    try:
        inputs = torch.ones(1, 64, dtype=torch.bfloat16)
        weight, scales = torch.ones(64, 64, dtype=torch.int8), torch.full((64,), 0.5, dtype=torch.bfloat16)
        return bool((torch.ops.aten._weight_int8pack_mm(inputs, weight, scales) == 32).all())
    except (AttributeError, RuntimeError):
        return False


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


def dequantize(codes: Tensor, scales: Tensor, weight_format: str, dtype: torch.dtype, columns: int) -> Tensor:
    """The weight (out, columns) again, up to what the format lost."""
    if weight_format != "nf4":
        return _unscaled(codes, dtype) * scales.to(dtype)
    # One look-up for the two weights of a byte.
    pairs = _nf4_pairs(codes.device, dtype)
    values = pairs.index_select(0, codes.flatten().int()).view(dtype).view(-1, NF4_BLOCK) * scales.to(dtype)
    return values.view(-1, columns + -columns % NF4_BLOCK)[:, :columns]


def _unscaled(codes: Tensor, dtype: torch.dtype) -> Tensor:
    if codes.dtype != torch.float8_e4m3fn or codes.device.type != "cpu":
        return codes.to(dtype)
    # PyTorch's own cast takes the weights one by one. Here sign, exponent and mantissa go to where float16 has them,
    # which counts exponents from 8 lower.
    halves = codes.view(torch.int8).to(torch.int16).bitwise_left_shift_(7).bitwise_and_(FP8_IN_HALF)
    return halves.view(torch.float16).float().mul_(2**8).to(dtype)


@cache
def _nf4_pairs(device: torch.device, dtype: torch.dtype) -> Tensor:
    """The two levels of each byte, as one number of twice the width, (256,)."""
    levels = torch.tensor(NF4_LEVELS, device=device, dtype=dtype)
    pairs = torch.stack([levels.repeat_interleave(16), levels.repeat(16)], dim=1)
    return pairs.view(torch.int64 if dtype.itemsize == 4 else torch.int32).flatten()


def check_format(weight_format: str) -> None:
    """Raise BadInputError unless the name is one of FORMATS."""
    if weight_format not in FORMATS:
        raise BadInputError(
            f'"{weight_format}" is no format for weights; choose one of {", ".join(FORMATS)}.'
        )


def quantize_network(
    network: nn.Module, weight_format: str, device: torch.device, *, at_least: int = SMALLEST_WEIGHTS
) -> nn.Module:
    """Exchange the large linear layers of a frozen network, one by one, and bring the rest to the device.

    A network whose weights are mapped from its files never exists in full width in memory.

    Args:
        at_least: weights of the smallest layer to exchange.

    Raises:
        BadInputError: unknown format.
    """
    check_format(weight_format)
    for parent, name, linear in list(quantizable_layers(network, at_least)):
        setattr(parent, name, QuantizedLinear(linear, weight_format, device))
    return network.to(device)


def quantizable_layers(
    network: nn.Module, at_least: int = SMALLEST_WEIGHTS
) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    """(parent, name in it, layer) of each layer that quantize_network exchanges."""
    for parent in network.modules():
        for name, child in parent.named_children():
            if not isinstance(child, nn.Linear) or type(child) not in PLAIN_LINEARS or name in SKIPPED:
                continue
            if child.weight.numel() >= at_least:
                yield parent, name, child
