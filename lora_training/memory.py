"""How much memory a fit needs, and the largest micro batch that fits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from ..blip3o_core.models.nextdit import NextDiT
from ..blip3o_core.units import format_bytes

# Saved activations of one sample, bytes per layer, feature and unit of width, by bytes of a value: counted at the
# published sizes (11.5 MiB a layer in bf16 beside float32 adapters). With block-level checkpointing a block keeps only
# its input.
SAVED_BYTES = {2: 105, 4: 141}
# Kernels, cuBLAS workspaces and fragments that no tensor accounts for.
OVERHEAD_BYTES = int(0.8 * 2**30)
# fp32 weight, gradient and two moments of what learns; a moving average is a fifth.
LEARNING_BYTES = 16


@dataclass(frozen=True)
class MemoryPlan:
    """How a step is cut so that it fits.

    Attributes:
        micro_batch: samples in one network call.
        grad_checkpoint: recompute each block in the backward pass.
        needed: bytes on the device.
        free: bytes that are there; None on the CPU.
    """

    micro_batch: int
    grad_checkpoint: bool
    needed: int
    free: int | None

    def text(self) -> str:
        """The plan in one line."""
        checkpointing = ", gradient checkpointing" if self.grad_checkpoint else ""
        free = "" if self.free is None else f" of {format_bytes(self.free)} free"
        return f"micro batch {self.micro_batch}{checkpointing}, about {format_bytes(self.needed)}{free}"


def needed_bytes(
    dit: NextDiT, learning: int, micro_batch: int, *, features: int, grad_checkpoint: bool, ema: bool
) -> int:
    """Estimated bytes of a fit on its device.

    Args:
        learning: number of parameters that learn.
        features: features of a picture.
    """
    weights = sum(tensor.nbytes for tensor in [*dit.parameters(), *dit.buffers()])
    value = 2 if _is_half(dit) else 4
    saved = SAVED_BYTES[value] * features * dit.config.dim
    block_inputs = features * dit.config.dim * value * dit.config.layers
    per_sample = saved + block_inputs if grad_checkpoint else saved * dit.config.layers
    return weights + learning * (LEARNING_BYTES + 4 * ema) + micro_batch * per_sample + _overhead(dit)


def plan_step(
    dit: NextDiT,
    learning: int,
    batch: int,
    *,
    features: int,
    ema: bool,
    micro_batch: int | None = None,
    grad_checkpoint: bool | None = None,
    device: torch.device,
    free: int | None = None,
) -> MemoryPlan:
    """The largest micro batch that fits, with gradient checkpointing only when one sample does not fit without.

    Args:
        micro_batch, grad_checkpoint: given by the user, else None.
        free: bytes for the whole fit; None = ask the device, counting what the DiT already occupies there.
    """
    if free is None and device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        free += sum(parameter.nbytes for parameter in dit.parameters() if parameter.device == device)
    checkpointing = [grad_checkpoint] if grad_checkpoint is not None else [False, True]
    sizes = [min(micro_batch, batch)] if micro_batch is not None else _halvings(batch)

    def needed(size: int, is_checkpointed: bool) -> int:
        return needed_bytes(dit, learning, size, features=features, grad_checkpoint=is_checkpointed, ema=ema)

    if free is None:
        return MemoryPlan(sizes[0], checkpointing[0], needed(sizes[0], checkpointing[0]), None)
    for is_checkpointed in checkpointing:
        for size in sizes:
            if needed(size, is_checkpointed) <= free:
                return MemoryPlan(size, is_checkpointed, needed(size, is_checkpointed), free)
    # An estimate must not refuse what may yet work: the run finds out, and then stops with numbers.
    return MemoryPlan(sizes[-1], checkpointing[-1], needed(sizes[-1], checkpointing[-1]), free)


def _halvings(batch: int) -> list[int]:
    sizes = [batch]
    while sizes[-1] > 1:
        sizes.append((sizes[-1] + 1) // 2)
    return sizes


def _is_half(network: nn.Module) -> bool:
    return next(network.parameters()).dtype in (torch.bfloat16, torch.float16)


def _overhead(network: nn.Module) -> int:
    return OVERHEAD_BYTES if next(network.parameters()).device.type == "cuda" else 0
