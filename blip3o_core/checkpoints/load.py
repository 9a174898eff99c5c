"""Weight files -> networks: built on the meta device, tensors assigned as they are read, nothing missing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .layout import CheckpointFiles
from .match import Match, match_network, tell_left_out
from .safetensor_files import read_tensors

if TYPE_CHECKING:  # transformers and diffusers are imported only when their component is loaded
    from ..models.backbone import Backbone
    from ..models.decoder import Decoder
    from ..models.eva_clip import EvaClip
    from ..models.nextdit import NextDiT

Device = torch.device | str


def load_dit(
    files: CheckpointFiles, *, dtype: torch.dtype | None = None, device: Device = "cpu", ops: Any = nn
) -> NextDiT:
    """The NextDiT of a checkpoint, in eval mode, without gradients.

    Args:
        files: an opened checkpoint.
        dtype: of the weights; None keeps the file's.
        ops: namespace of layer classes, see NextDiT.

    Raises:
        MissingFilesError, WrongCheckpointError: see match.match_network.
    """
    return _load(files, "dit", match_network(files, "dit", ops=ops), dtype, device)


def load_image_encoder(
    files: CheckpointFiles, *, dtype: torch.dtype | None = None, device: Device = "cpu", ops: Any = nn
) -> EvaClip:
    """The EVA-CLIP image encoder, from the shards or from a separate file.

    A separate file may be a pickle; only plain tensors are read from it (weights_only).
    """
    return _load(files, "image_encoder", match_network(files, "image_encoder", ops=ops), dtype, device)


def load_backbone(
    files: CheckpointFiles, *, dtype: torch.dtype | None = None, device: Device = "cpu"
) -> Backbone:
    """Qwen2.5-VL with its vision tower, head and latent queries.

    Raises:
        Blip3oError: the installed transformers computes with it in another way, see cache_check.
    """
    from ..models.cache_check import require_working_cache

    require_working_cache()
    match = match_network(files, "backbone")
    backbone = _load(files, "backbone", match, dtype, device)
    if match.is_head_tied:
        backbone.lm_head.weight = backbone.text.embed_tokens.weight
    return backbone.to(device)


def load_decoder(
    files: CheckpointFiles, *, dtype: torch.dtype | None = None, device: Device = "cpu"
) -> Decoder:
    """UNet, VAE and noise schedule. The VAE is kept in float32 when `dtype` is float16, in which it overflows."""
    return _load(files, "decoder", match_network(files, "decoder"), dtype, device)


def _load(
    files: CheckpointFiles, component: str, match: Match, dtype: torch.dtype | None, device: Device
) -> Any:
    """Assign the tensors to the network and freeze it."""
    tell_left_out(files, component, match)
    match.network.load_state_dict(
        dict(_read(match, dtype, device)), strict=not match.is_head_tied, assign=True
    )
    return match.network.eval().requires_grad_(False)


def _read(match: Match, dtype: torch.dtype | None, device: Device) -> Iterator[tuple[str, Tensor]]:
    if match.in_memory is not None:
        for key in match.tensors:
            tensor = match.in_memory[key]
            yield key, tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else None)
        return
    overflowing = {key: info for key, info in match.tensors.items() if key.startswith("vae.")}
    others = {key: info for key, info in match.tensors.items() if key not in overflowing}
    yield from read_tensors(others, dtype=dtype, device=device)
    yield from read_tensors(
        overflowing, dtype=torch.float32 if dtype == torch.float16 else dtype, device=device
    )
