"""Linear layers of frozen networks in the form that this machine multiplies fastest."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PACKED_DTYPES = (torch.float32, torch.bfloat16)
# Where one product of several times the width keeps more of the device busy.
JOINING_DEVICES = ("cuda",)


def can_pack(weight: Tensor) -> bool:
    """Whether oneDNN multiplies with this weight: a CPU, float32 or bfloat16, a PyTorch built with it.

    PyTorch's float32 products go to MKL, which leaves the wide registers of other makers' processors unused; oneDNN does not.
    """
    return (
        weight.device.type == "cpu"
        and weight.dtype in PACKED_DTYPES
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
    )


def pack(weight: Tensor, rows: int) -> Tensor:
    """A copy of a (out, in) weight in oneDNN's layout; `rows` of input are expected at a time, any number works."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach(), rows)


def join(linears: Sequence[nn.Linear]) -> Tensor:
    """The weights of several layers as one (sum of out, in) tensor, of which they become parts: no second copy stays."""
    weights = [linear.weight for linear in linears]
    first = weights[0]
    place = first.data_ptr()
    for weight in weights:
        if (
            weight.untyped_storage().data_ptr() != first.untyped_storage().data_ptr()
            or weight.data_ptr() != place
        ):
            break
        place += weight.nbytes
    else:  # joined by an earlier run
        rows = sum(weight.shape[0] for weight in weights)
        return first.detach().as_strided((rows, first.shape[1]), first.stride())
    joined = torch.cat([weight.detach() for weight in weights])
    for weight, part in zip(weights, joined.split([weight.shape[0] for weight in weights]), strict=True):
        weight.data = part
    return joined


class ParallelLinears:
    """Linear layers that read the same input.

    Args:
        linears: without hooks or gradients, and without biases when there are several.
        rows: rows of input to expect.
    """

    def __init__(self, linears: Sequence[nn.Linear], rows: int) -> None:
        self.linears = linears
        weight = linears[0].weight
        self.packed = [pack(linear.weight, rows) for linear in linears] if can_pack(weight) else None
        self.joined: Tensor | None = None
        if weight.device.type in JOINING_DEVICES and len(linears) > 1:
            self.joined = join(linears)
        self.sizes = [linear.out_features for linear in linears]

    def __call__(self, hidden_states: Tensor) -> Sequence[Tensor]:
        """The output of each layer."""
        if self.packed is not None:
            return [
                torch.ops.mkldnn._linear_pointwise(hidden_states, weight, linear.bias, "none", [], "")
                for weight, linear in zip(self.packed, self.linears, strict=True)
            ]
        if self.joined is not None:
            return F.linear(hidden_states, self.joined).split(self.sizes, dim=-1)
        return [linear(hidden_states) for linear in self.linears]


class GatedLinears:
    """silu(gate(x)) * up(x), the inner half of a SwiGLU."""

    def __init__(self, gate: nn.Linear, up: nn.Linear, rows: int) -> None:
        self.both = ParallelLinears([gate, up], rows)

    def __call__(self, hidden_states: Tensor) -> Tensor:
        if self.both.packed is None:
            gate, up = self.both(hidden_states)
            return F.silu(gate) * up
        gate_weight, up_weight = self.both.packed
        gate = torch.ops.mkldnn._linear_pointwise(hidden_states, gate_weight, None, "swish", [], "")
        return torch.ops.mkldnn._linear_pointwise.binary(hidden_states, gate, up_weight, None, "mul")
