"""Linear layers of frozen networks in the form that this machine multiplies fastest."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Below so many products the call itself takes longer than it saves.
WORTHWHILE_PRODUCTS = 2**21
# Where one product of several times the width keeps more of the device busy.
JOINING_DEVICES = ("cuda",)


def has_onednn(weight: Tensor) -> bool:
    """Whether oneDNN multiplies with this weight sooner than PyTorch: float32 on a CPU, a PyTorch built with it.

    PyTorch's own float32 products go to MKL, which leaves the wide registers of other makers' processors unused. In
    bfloat16 it goes to oneDNN by itself.
    """
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.float32
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def multiply(hidden_states: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear without gradients, up to rounding; (..., in), (out, in) -> (..., out)."""
    if (
        torch.compiler.is_compiling()  # it knows no such products with weights that may change
        or hidden_states.dtype != weight.dtype
        or hidden_states.numel() * weight.shape[0] < WORTHWHILE_PRODUCTS
        or not has_onednn(weight)
    ):
        return F.linear(hidden_states, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(hidden_states, weight, bias, "none", [], "")


class OneDNNLinear(nn.Linear):
    """nn.Linear that computes with `multiply` where no gradients are wanted."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
            return super().forward(hidden_states)
        return multiply(hidden_states, self.weight, self.bias)


# Classes whose weights may be read, joined or exchanged: what they compute is known.
PLAIN_LINEARS = (nn.Linear, OneDNNLinear)


def use_onednn(network: nn.Module) -> None:
    """Give every plain linear layer of a network on the CPU the class that multiplies faster there; weights stay."""
    for layer in network.modules():
        if type(layer) is nn.Linear and has_onednn(layer.weight):
            layer.__class__ = OneDNNLinear


def join(linears: Sequence[nn.Linear]) -> Tensor:
    """The weights of several layers as one (sum of out, in) tensor, of which they become parts: no second copy stays."""
    weights = [linear.weight for linear in linears]
    first = weights[0]
    place = first.data_ptr()
    for weight in weights:
        is_beside = weight.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        if not is_beside or weight.data_ptr() != place:
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
    """Linear layers without biases, hooks or gradients that read the same input."""

    def __init__(self, *linears: nn.Linear) -> None:
        self.linears = linears
        self.sizes = [linear.out_features for linear in linears]
        is_joined = linears[0].weight.device.type in JOINING_DEVICES
        self.joined = join(linears) if is_joined else None

    def __call__(self, hidden_states: Tensor) -> Sequence[Tensor]:
        """The output of each layer."""
        if self.joined is not None:
            return F.linear(hidden_states, self.joined).split(self.sizes, dim=-1)
        return [multiply(hidden_states, linear.weight) for linear in self.linears]
