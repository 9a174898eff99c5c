"""Linear layers of frozen networks that oneDNN multiplies on the CPU, with the weights as they lie in memory.

PyTorch's own float32 products go to MKL, which takes about twice as long on processors of other makers. What is packed
for a whole run multiplies faster still (linear.py), but is a second copy of the weights.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .linear import can_pack

# Below so many products the call itself takes longer than it saves.
WORTHWHILE_PRODUCTS = 2**21


def multiply(hidden_states: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear without gradients, up to rounding; (..., in), (out, in) -> (..., out)."""
    if torch.compiler.is_compiling():  # it knows no such products with weights that may change
        return F.linear(hidden_states, weight, bias)
    # In bfloat16 PyTorch itself goes to oneDNN.
    is_faster = weight.dtype == hidden_states.dtype == torch.float32 and can_pack(weight)
    if not is_faster or hidden_states.numel() * weight.shape[0] < WORTHWHILE_PRODUCTS:
        return F.linear(hidden_states, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(hidden_states, weight, bias, "none", [], "")


class OneDNNLinear(nn.Linear):
    """nn.Linear that computes with `multiply` where no gradients are wanted."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
            return super().forward(hidden_states)
        return multiply(hidden_states, self.weight, self.bias)


def use_onednn(network: nn.Module) -> None:
    """Give every plain linear layer of a network on the CPU the class that multiplies faster there; weights stay."""
    for layer in network.modules():
        if type(layer) is nn.Linear and can_pack(layer.weight):
            layer.__class__ = OneDNNLinear
