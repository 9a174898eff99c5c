"""Networks that do not stay on the device: they visit it, as a whole or layer by layer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import Blip3oError


@contextmanager
def visit(network: nn.Module, device: torch.device) -> Iterator[None]:
    """Let copies of a network's weights be on the device for a while; the weights themselves stay in main memory.

    Nothing is copied back, and what is mapped from a file stays so.
    """
    homes: list[tuple[dict[str, Any], str, Tensor, Tensor]] = [
        (owner, name, tensor, tensor.data)
        for module in network.modules()
        for owner in (module._parameters, module._buffers)
        for name, tensor in owner.items()
        if tensor is not None
    ]
    try:
        network.to(device)
        yield
    finally:
        # Moving gives a parameter other data, and for some devices a layer another parameter.
        for owner, name, tensor, data in homes:
            tensor.data = data
            owner[name] = tensor


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
