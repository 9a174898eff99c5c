"""Weight files -> networks: built on the meta device, tensors assigned as they are read, nothing missing or left over."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..config import EvaClipConfig
from ..errors import WrongCheckpointError
from .infer import infer_eva_clip, infer_nextdit
from .layout import CheckpointFiles
from .safetensor_files import TensorInfo, read_header, read_tensors, refuse_lfs_pointer

if TYPE_CHECKING:  # transformers and diffusers are imported only when their component is loaded
    from ..models.backbone import Backbone
    from ..models.decoder import Decoder
    from ..models.eva_clip import EvaClip
    from ..models.nextdit import NextDiT

Device = torch.device | str


def load_dit(
    files: CheckpointFiles,
    *,
    dtype: torch.dtype | None = None,
    device: Device = "cpu",
    ops: Any = nn,
    allow_unknown: bool = False,
) -> NextDiT:
    """The NextDiT of a checkpoint, in eval mode, without gradients.

    Args:
        files: an opened checkpoint.
        dtype: of the weights; None keeps the file's.
        ops: namespace of layer classes, see NextDiT.
        allow_unknown: leave tensors of unknown name out instead of refusing the checkpoint.

    Raises:
        MissingFilesError, WrongCheckpointError: see checkpoints/layout.py.
    """
    from ..models.nextdit import NextDiT

    tensors = files.component_tensors("dit", allow_unknown=allow_unknown)
    config = infer_nextdit(tensors, files.name)
    with torch.device("meta"):
        dit = NextDiT(config, ops)
    return _fill(dit, tensors, files.name, dtype, device)


def load_image_encoder(
    files: CheckpointFiles,
    *,
    path: Path | None = None,
    dtype: torch.dtype | None = None,
    device: Device = "cpu",
    ops: Any = nn,
    allow_unknown: bool = False,
) -> EvaClip:
    """The EVA-CLIP image encoder, from the shards or from a separate file (`path`, or beside the checkpoint).

    A separate file may be a pickle; only plain tensors are read from it (weights_only).
    """
    from ..models.eva_clip import EvaClip

    separate = files.image_encoder_file(path)

    def build(config: EvaClipConfig) -> EvaClip:
        with torch.device("meta"):
            return EvaClip(config, ops)

    if separate is None:
        tensors = files.component_tensors("image_encoder", allow_unknown=allow_unknown)
        encoder = build(infer_eva_clip(tensors, files.config, files.name))
        return _fill(encoder, tensors, files.name, dtype, device)
    if separate.suffix == ".safetensors":
        tensors = read_header(separate)[0]
        encoder = build(infer_eva_clip(tensors, files.config, separate.name))
        return _fill(encoder, tensors, separate.name, dtype, device)
    state_dict = read_pickle(separate)
    infos = {
        key: TensorInfo(separate, key, tensor.dtype, tuple(tensor.shape), tensor.nbytes)
        for key, tensor in state_dict.items()
    }
    encoder = build(infer_eva_clip(infos, files.config, separate.name))

    def read() -> Any:
        return (
            (key, state_dict[key].to(device=device, dtype=dtype or state_dict[key].dtype)) for key in infos
        )

    return _fill(encoder, infos, separate.name, dtype, device, read=read)


def load_backbone(
    files: CheckpointFiles,
    *,
    dtype: torch.dtype | None = None,
    device: Device = "cpu",
    allow_unknown: bool = False,
) -> Backbone:
    """Qwen2.5-VL with its vision tower, head and latent queries."""
    from accelerate import init_empty_weights

    from ..models.backbone import Backbone

    tensors = files.component_tensors("backbone", allow_unknown=allow_unknown)
    for key in ("latent_queries", "text.embed_tokens.weight"):
        if key not in tensors:
            raise WrongCheckpointError(
                f'Checkpoint "{files.name}" has no {key.replace("text.embed_tokens.weight", "token embedding")}: it is a '
                "plain language model or a partial file.\nDownload BLIP3o-Model-8B or -4B."
            )
    tie_head = "lm_head.weight" not in tensors
    # Buffers stay real: rotary tables made on the meta device would be garbage.
    with init_empty_weights(include_buffers=False):
        backbone = Backbone(
            files.config,
            vocab_size=tensors["text.embed_tokens.weight"].shape[0],
            queries=tensors["latent_queries"].shape[1],
            tie_head=tie_head,
        )
    _fill(backbone, tensors, files.name, dtype, device, tied=("lm_head.weight",) if tie_head else ())
    if tie_head:
        backbone.lm_head.weight = backbone.text.embed_tokens.weight
    return backbone.to(device)


def load_decoder(
    files: CheckpointFiles, *, dtype: torch.dtype | None = None, device: Device = "cpu"
) -> Decoder:
    """UNet, VAE and noise schedule. The VAE is kept in float32 when `dtype` is float16, in which it overflows."""
    from ..models.decoder import Decoder

    configs = [files.decoder_config(part) for part in ("unet", "vae", "scheduler")]
    with torch.device("meta"):
        decoder = Decoder(*configs)
    vae_dtype = torch.float32 if dtype == torch.float16 else dtype
    for network, network_dtype in ((decoder.unet, dtype), (decoder.vae, vae_dtype)):
        path = files.decoder_file("unet" if network is decoder.unet else "vae")
        label = f"{files.name}/{path.parent.name}"
        _fill(network, read_header(path)[0], label, network_dtype, device)
    return decoder.eval().requires_grad_(False)


def read_pickle(path: Path) -> dict[str, Tensor]:
    """Tensors of a pickled state_dict, mapped from disk; anything but plain tensors is refused.

    Raises:
        WrongCheckpointError: the file holds code, is damaged, or is no flat table of tensors.
    """
    with path.open("rb") as file:
        start = file.read(8)
    refuse_lfs_pointer(path, start)
    is_zip = start.startswith(b"PK")
    try:
        if not is_zip and not start.startswith(b"\x80"):
            raise ValueError("neither a zip file nor a pickle")
        # Pickles of the kind before PyTorch 1.6 cannot be mapped.
        state_dict = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        raise WrongCheckpointError(
            f'"{path.name}" in "{path.parent}" holds Python code besides tensors and was not opened.\n'
            "Do not use this file. Download pytorch_model.bin of jiuhai/eva_clip_vision_tower again, or a safetensors file."
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, LookupError) as error:
        raise WrongCheckpointError(
            f'"{path.name}" in "{path.parent}" cannot be read: it is cut short or no PyTorch file '
            f"({path.stat().st_size:,} bytes).\nDelete it and download it again. ({error})"
        ) from error
    if not isinstance(state_dict, dict) or not all(
        isinstance(value, Tensor) for value in state_dict.values()
    ):
        raise WrongCheckpointError(
            f'"{path.name}" in "{path.parent}" is not a plain table of tensors.\nUse the published file.'
        )
    return state_dict


def _fill(
    module: nn.Module,
    tensors: dict[str, TensorInfo],
    name: str,
    dtype: torch.dtype | None,
    device: Device,
    *,
    tied: tuple[str, ...] = (),
    read: Callable[[], Any] | None = None,
) -> Any:
    """Assign the tensors to the module, strictly, and freeze it."""
    expected = {key: tuple(value.shape) for key, value in module.state_dict().items() if key not in tied}
    missing = [key for key in expected if key not in tensors]
    unexpected = [key for key in tensors if key not in expected]
    if missing or unexpected:
        what, key = ("lacks", missing[0]) if missing else ("has the unknown tensor", unexpected[0])
        where = "" if missing else f" in {tensors[key].path.name}"
        raise WrongCheckpointError(
            f'Checkpoint "{name}" does not fit this program: it {what} "{key}"{where} '
            f"({len(missing)} missing, {len(unexpected)} unknown of {len(expected)}).\n"
            "The files come from different versions or downloads. Download the checkpoint again."
        )
    for key, shape in expected.items():
        if tensors[key].shape != shape:
            raise WrongCheckpointError(
                f'Tensor "{key}" of checkpoint "{name}" has the wrong size in {tensors[key].path.name}: '
                f"{tensors[key].shape}, expected {shape}.\n"
                "config.json and the weight files belong to different models. Download the checkpoint again."
            )
    entries = read() if read else read_tensors(tensors, dtype=dtype, device=device)
    module.load_state_dict(dict(entries), strict=not tied, assign=True)
    return module.eval().requires_grad_(False)
