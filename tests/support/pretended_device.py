"""PyTorch's "meta" device in place of a GPU: shapes without numbers, at any size, on any machine.

What waits for a GPU by reading a number from it raises here, and so does what mixes devices.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from comfyui_blip3o.blip3o_core.models import nextdit
from comfyui_blip3o.blip3o_core.performance import linear
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

DEVICE = torch.device("meta")


class Watch(TorchDispatchMode):
    """Counts bytes on the device, and the operations that compute there rather than change a view.

    Args:
        network: lies there already.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.bytes = self.peak = self.operations = 0
        self._known: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        for tensor in (*network.parameters(), *network.buffers()):
            self._count(tensor)
        self.weights = self.bytes

    @property
    def working_bytes(self) -> int:
        """Most bytes at a time beside the network's weights."""
        return self.peak - self.weights

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        places = [leaf for leaf in tree_leaves(made) if isinstance(leaf, Tensor) and leaf.device == DEVICE]
        is_new = [self._count(tensor) for tensor in places]
        self.operations += any(is_new) or (bool(places) and function._schema.is_mutable)
        return made

    def _count(self, tensor: Tensor) -> bool:
        storage = tensor.untyped_storage()
        if storage in self._known:
            return False
        self._known[storage] = storage.nbytes()
        self.bytes += storage.nbytes()
        self.peak = max(self.peak, self.bytes)
        weakref.finalize(storage, self._free, storage.nbytes())
        return True

    def _free(self, size: int) -> None:
        self.bytes -= size


@contextmanager
def like_a_gpu() -> Iterator[None]:
    """Attention and RMSNorm in one piece, and joined projections, as on a GPU."""

    def fused_attention(query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any) -> Tensor:
        return torch.empty_like(query[..., : value.shape[-1]])

    def fused_rms_norm(hidden_states: Tensor, *args: Any, **options: Any) -> Tensor:
        return torch.empty_like(hidden_states)

    with (
        patch.object(F, "rms_norm", fused_rms_norm),
        # Old transformers switch it off around the rotary tables; it knows no such device.
        patch.object(torch, "autocast", lambda *args, **options: nullcontext()),
        patch.object(F, "scaled_dot_product_attention", fused_attention),
        patch.object(linear, "JOINING_DEVICES", ("meta",)),
        patch.object(nextdit, "COMPLEX_DEVICES", ("meta", "cpu")),
        torch.no_grad(),
    ):
        yield
