"""Networks that are larger than the device: their layers visit it one after the other, the next is fetched meanwhile."""

from __future__ import annotations

import torch
from torch import nn

from .errors import Blip3oError


def stream_layers(network: nn.Module, device: torch.device) -> nn.Module:
    """Let each layer of a network that lies in main memory visit the device while it computes.

    On a GPU the next layer is copied while one computes. Nothing but the place of the weights changes.

    Raises:
        Blip3oError: the installed diffusers is too old for it.
    """
    try:
        from diffusers.hooks import apply_group_offloading
    except ImportError as error:
        raise Blip3oError(
            "Working layer by layer needs diffusers 0.33 or newer.\nUpdate it with: pip install -U diffusers"
        ) from error
    apply_group_offloading(
        network,
        onload_device=device,
        offload_device=torch.device("cpu"),
        offload_type="leaf_level",
        use_stream=device.type == "cuda",
    )
    return network
