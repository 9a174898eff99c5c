"""Exchange of plain layers for ComfyUI's own, so that any network can be offloaded, loaded in part, patched and cast.

A network is built and filled by blip3o_core with torch's, transformers' and diffusers' layers; afterwards each layer
object gets the ComfyUI class that computes the same. Weights, names and numbers stay as they are.
"""

from __future__ import annotations

from typing import Any

import comfy.ops
import torch
from torch import Tensor, nn

COUNTERPARTS: dict[type[nn.Module], str] = {
    nn.Linear: "Linear",
    nn.Conv2d: "Conv2d",
    nn.Conv3d: "Conv3d",
    nn.Embedding: "Embedding",
    nn.LayerNorm: "LayerNorm",
    nn.GroupNorm: "GroupNorm",
    nn.RMSNorm: "RMSNorm",
}


class FloatRMSNorm(nn.Module, comfy.ops.CastWeightBiasOp):
    """RMSNorm of the Qwen family: normalised in float32, scaled in the input's dtype. Stands in for transformers' class."""

    weight: Tensor
    variance_epsilon: float

    def forward(self, hidden_states: Tensor) -> Tensor:
        comfy.ops.run_every_op()
        variance = hidden_states.float().pow(2).mean(-1, keepdim=True)
        normed = (hidden_states.float() * torch.rsqrt(variance + self.variance_epsilon)).to(
            hidden_states.dtype
        )
        with comfy.ops.CastBiasWeightContext(self, hidden_states, offloadable=True) as (weight, _):
            return weight * normed


def exchange_layers(network: nn.Module, *, is_cast: bool) -> None:
    """Give every layer of a network that holds weights its ComfyUI class, in place.

    Args:
        is_cast: weights are kept in another dtype than they are computed in, and cast at each use.
    """
    ops: Any = comfy.ops.manual_cast if is_cast else comfy.ops.disable_weight_init
    for name, layer in network.named_modules():
        if isinstance(layer, comfy.ops.CastWeightBiasOp):
            continue
        if type(layer) in COUNTERPARTS:
            layer.__class__ = getattr(ops, COUNTERPARTS[type(layer)])
        elif hasattr(layer, "variance_epsilon") and list(dict(layer.named_parameters())) == ["weight"]:
            layer.__class__ = FloatRMSNorm
            layer.comfy_cast_weights = is_cast
        else:
            # Only weights that their own module casts at use may stay: those of modules that have layers inside.
            is_plain = any(True for _ in layer.parameters()) and not any(True for _ in layer.children())
            assert not is_plain, f"no ComfyUI layer for {type(layer).__name__} at {name}"
            continue
        if not hasattr(layer, "bias"):
            layer.bias = None  # ComfyUI's casting reads it of every layer


def store_linear_weights(network: nn.Module, dtype: torch.dtype) -> None:
    """Keep the weights of linear layers in a smaller dtype; norms, biases, embeddings and convolutions stay as they are."""
    for layer in network.modules():
        if isinstance(layer, nn.Linear):
            layer.weight = nn.Parameter(layer.weight.to(dtype), requires_grad=False)


def prepare(network: nn.Module, storage: torch.dtype, compute: torch.dtype) -> nn.Module:
    """Exchange the layers of a network that was loaded in its compute dtype, and shrink it when storage is smaller."""
    if storage.itemsize == 1:
        store_linear_weights(network, storage)
    exchange_layers(network, is_cast=storage != compute)
    return network
