"""torch.compile where it works: the networks that draw, with CUDA graphs on a GPU."""

from __future__ import annotations

import logging
from functools import cache

import torch
from torch import nn

logger = logging.getLogger(__name__)


@cache
def can_compile(device: torch.device) -> bool:
    """Whether torch.compile works here; it needs a C++ compiler on the CPU and Triton on a GPU."""
    try:
        torch.compile(_increment)(torch.zeros(4, device=device))
    except Exception as error:  # every missing part has an error class of its own
        reason = str(error).strip().splitlines()
        logger.warning("torch.compile does not work here, going on without it: %s", *reason[:1] or [error])
        return False
    return True


def compile_network(network: nn.Module, device: torch.device) -> bool:
    """Compile a network in place; whether that was possible. Its first call takes a minute, each later one is faster.

    Names of weights and numbers stay as they are, the latter up to rounding.
    """
    if not can_compile(device):
        return False
    # With "reduce-overhead" one call replays a recorded CUDA graph: no launches of single kernels.
    network.compile(mode="reduce-overhead" if device.type == "cuda" else None)
    return True


def begin_step(network: nn.Module) -> None:
    """Call before each call of a network that may be compiled: results of earlier calls may then be written over."""
    # Asked of compiled networks alone, because this imports the whole compiler.
    if getattr(network, "_compiled_call_impl", None) is not None:
        torch.compiler.cudagraph_mark_step_begin()


def _increment(values: torch.Tensor) -> torch.Tensor:
    return values + 1
