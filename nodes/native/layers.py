"""Exchange of plain layers for ComfyUI's own, so that any network can be offloaded, loaded in part, patched and cast.

A network is built and filled by blip3o_core with torch's, transformers' and diffusers' layers; afterwards each layer
object gets the ComfyUI class that computes the same. Weights, names and numbers stay as they are.
"""

from __future__ import annotations

from typing import Any

import comfy.model_management
import comfy.ops
import torch
from torch import Tensor, nn

from ...blip3o_core.performance.linear import OneDNNLinear

COUNTERPARTS: dict[type[nn.Module], str] = {
    nn.Linear: "Linear",
    nn.Conv2d: "Conv2d",
    nn.Conv3d: "Conv3d",
    nn.Embedding: "Embedding",
    nn.LayerNorm: "LayerNorm",
    nn.GroupNorm: "GroupNorm",
    nn.RMSNorm: "RMSNorm",
}


class CpuLinear(comfy.ops.disable_weight_init.Linear, OneDNNLinear):
    """ComfyUI's linear layer; where it neither casts nor patches, the core's layer for the CPU computes."""


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
    is_on_cpu = comfy.model_management.get_torch_device().type == "cpu"
    for name, layer in network.named_modules():
        if isinstance(layer, comfy.ops.CastWeightBiasOp):
            continue
        if type(layer) in COUNTERPARTS:
            is_faster = is_on_cpu and not is_cast and type(layer) is nn.Linear
            layer.__class__ = CpuLinear if is_faster else getattr(ops, COUNTERPARTS[type(layer)])
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


def set_dtypes(network: nn.Module, storage: torch.dtype, compute: torch.dtype) -> None:
    """Keep the weights of linear layers in one dtype and everything else (norms, biases, embeddings) in the other.

    Tensors that already have their dtype stay as they are, backed by the checkpoint file.
    """
    # A head that shares the token embedding's weights counts as an embedding, and stays shared.
    shared = {layer.weight for layer in network.modules() if isinstance(layer, nn.Embedding)}
    linear = {layer.weight for layer in network.modules() if isinstance(layer, nn.Linear)} - shared
    converted: dict[nn.Parameter, nn.Parameter] = {}
    for module in list(network.modules()):
        for name, parameter in list(module.named_parameters(recurse=False)):
            dtype = storage if parameter in linear else compute
            if parameter.dtype != dtype:
                if parameter not in converted:
                    converted[parameter] = nn.Parameter(parameter.to(dtype), requires_grad=False)
                setattr(module, name, converted[parameter])


def file_dtype(storage: torch.dtype) -> torch.dtype | None:
    """What to read weights as before set_dtypes: None, as in the file, when they shrink to one byte afterwards."""
    return None if storage.itemsize == 1 else storage


def prepare(network: nn.Module, storage: torch.dtype, compute: torch.dtype) -> nn.Module:
    """Make a network that was read in file_dtype(storage) ready for ComfyUI's memory management."""
    set_dtypes(network, storage, compute)
    exchange_layers(network, is_cast=storage != compute)
    return network
