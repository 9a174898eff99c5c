"""How much memory each phase of a run takes, from the sizes of the weight files alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..blip3o_core.checkpoints.layout import CheckpointFiles, open_checkpoint
from ..blip3o_core.checkpoints.match import match_network, needed_tensors
from ..blip3o_core.config import EvaClipConfig
from ..blip3o_core.devices import pick_dtype
from ..blip3o_core.models.nextdit import NextDiT
from . import memory
from .config import LoraConfig
from .memory import OVERHEAD_BYTES

# Bytes of a weight of the DiT while fitting.
BASE_BYTES = {"fp32": 4.0, "bf16": 2.0, "fp8": 1.0, "nf4": 0.55}


@dataclass(frozen=True)
class PhaseMemory:
    """What a phase of a run takes.

    Attributes:
        phase: a name in records.PHASES.
        bytes: at its peak, estimated from the sizes of the files.
        what: what lies in memory then.
    """

    phase: str
    bytes: int
    what: str


def plan_phases(
    config: LoraConfig,
    files: CheckpointFiles,
    encoder: EvaClipConfig,
    device: torch.device,
    free: int | None = None,
) -> tuple[PhaseMemory, ...]:
    """Estimated peaks of the phases, from the sizes of the weight files.

    Args:
        free: bytes into which the fit is planned, see memory.plan_step; None = with its whole batch in one call.
    """
    dtype = pick_dtype("auto", device, sum(files.component_bytes.values()))
    name = config.model.base_dtype
    encoding = {"fp32": 4.0, "bf16": 2.0}.get(name, float(dtype.itemsize))
    base = BASE_BYTES.get(name, 4.0 if device.type == "cpu" else 2.0)
    patches = encoder.patch_grid**2 + 1
    looking = encoding * patches * (encoder.mlp_dim + 8 * encoder.width)
    features = encoding * parameters_of(files, "image_encoder") + looking
    backbone = encoding * parameters_of(files, "backbone")
    fit, how = _plan_fit(config, files, encoder.feature_grid**2, base, device, free)
    plan = [
        PhaseMemory("features", int(features) + OVERHEAD_BYTES, "image encoder"),
        PhaseMemory("conditioning", int(backbone) + OVERHEAD_BYTES, "backbone"),
        PhaseMemory("fit", fit, how),
    ]
    if "decoder" in files.component_bytes:
        drawing = base * parameters_of(files, "dit"), encoding * parameters_of(files, "decoder")
        plan.append(PhaseMemory("prove", int(max(drawing)) + OVERHEAD_BYTES, "DiT, then decoder"))
    return tuple(plan)


def _plan_fit(
    config: LoraConfig,
    files: CheckpointFiles,
    features: int,
    base_bytes: float,
    device: torch.device,
    free: int | None,
) -> tuple[int, str]:
    """Bytes of the fit and what lies in memory then, with a DiT that has no weights."""
    dtype = torch.float32 if base_bytes == BASE_BYTES["fp32"] else torch.bfloat16
    dit = dit_without_weights(files).to(dtype)
    # What the plan does not know of: reduced weights are smaller, the backbone stays when something in it learns.
    other = OVERHEAD_BYTES
    if base_bytes < BASE_BYTES["bf16"]:
        other -= int((BASE_BYTES["bf16"] - base_bytes) * parameters_of(files, "dit"))
    if config.needs_backbone:
        other += int(max(base_bytes, BASE_BYTES["bf16"]) * parameters_of(files, "backbone"))
    train = config.train
    plan = memory.plan_step(
        dit,
        learning_parameters(config, dit),
        config.batch,
        features=features,
        ema=config.ema > 0,
        micro_batch=None if train.micro_batch == "auto" else train.micro_batch,
        grad_checkpoint=None if train.grad_checkpoint == "auto" else train.grad_checkpoint,
        device=device,
        free=None if free is None else max(0, free - other),
    )
    networks = "DiT, backbone and adapter" if config.needs_backbone else "DiT and adapter"
    checkpointing = ", gradient checkpointing" if plan.grad_checkpoint else ""
    return plan.needed + other, f"{networks}, {plan.micro_batch} to a call{checkpointing}"


def open_base(config: LoraConfig) -> CheckpointFiles:
    """The files of a run's model, with the parts that its configuration takes from elsewhere."""
    model = config.model
    return open_checkpoint(config.checkpoint, image_encoder=model.image_encoder, decoder=model.decoder)


def dit_without_weights(files: CheckpointFiles) -> NextDiT:
    """A checkpoint's DiT on the meta device: it has sizes, but takes no memory."""
    return match_network(files, "dit").network


def learning_parameters(config: LoraConfig, dit: NextDiT) -> int:
    """Parameters that learn in the DiT; of a custom choice of layers as if it were all that can."""
    adapter = config.adapter
    if adapter.type == "full":
        return sum(parameter.numel() for parameter in dit.parameters())
    if adapter.type in ("queries", "none"):
        return 0
    parts = {
        "cross": (".attn2.",),
        "attn": (".attn1.", ".attn2."),
        "attn_ffn": (".attn1.", ".attn2.", ".feed_forward."),
    }.get(adapter.targets, (".attn1.", ".attn2.", ".feed_forward.", "caption_projection."))
    chosen = [
        weight.shape
        for name, weight in dit.named_parameters()
        if weight.ndim == 2 and any(part in name for part in parts)
    ]
    return adapter.rank * sum(rows + columns for rows, columns in chosen)


def parameters_of(files: CheckpointFiles, component: str) -> int:
    """Numbers in a network."""
    return sum(info.nbytes // info.dtype.itemsize for info in needed_tensors(files, component).values())
