"""What a network needs of a checkpoint's files: built without weights, its tensors found, extras left out, absences told.

Loading, `info`, checks and plans all ask here, so that none of them calls fine what another refuses.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..drawing.decoding import PIXEL_SAMPLERS
from ..errors import Blip3oError, WrongCheckpointError
from ..units import format_bytes
from ..untrusted import quote
from .infer import Shapes, check_backbone_sizes, check_decoder_sizes, infer_eva_clip, infer_nextdit
from .keys import inner_key
from .layout import CheckpointFiles, LeftOut, beginning, group_left_out, unneeded_error
from .pickles import read_pickle
from .safetensor_files import TensorInfo, read_header

logger = logging.getLogger(__name__)

HEAD = "lm_head.weight"
EMBEDDING = "text.embed_tokens.weight"
_told: set[tuple[str, str]] = set()


@dataclass(frozen=True)
class Match:
    """A network without weights, and the tensors that fill it.

    Attributes:
        network: on the meta device; the backbone's tables are real.
        tensors: our key -> where it lies, exactly those that the network needs and in the shapes it needs.
        left_out: what the files hold under this network's names beyond that.
        is_head_tied: the backbone's head is its token embedding, and has no tensor of its own.
        in_memory: the tensors themselves where they come from a pickle, mapped from disk.
    """

    network: nn.Module
    tensors: dict[str, TensorInfo]
    left_out: dict[str, TensorInfo]
    is_head_tied: bool = False
    in_memory: dict[str, Tensor] | None = None


def match_network(files: CheckpointFiles, component: str, *, ops: Any = nn) -> Match:
    """Build a component on the meta device and find its tensors.

    Args:
        component: one of keys.COMPONENTS.
        ops: namespace of layer classes for the DiT and the image encoder, see NextDiT.

    Raises:
        MissingFilesError: a file is missing.
        WrongCheckpointError: a tensor that the network needs is missing or does not fit; with files.is_strict, one is left over.
    """
    return _MATCHERS[component](files, ops)


def needed_tensors(files: CheckpointFiles, component: str) -> dict[str, TensorInfo]:
    """The tensors of a component by our key, as match_network finds them; the decoder's begin with `unet.` and `vae.`."""
    return _examine(files, component)[0]


def left_out_tensors(files: CheckpointFiles, component: str) -> tuple[LeftOut, ...]:
    """What the files hold under a component's names beyond what it needs."""
    return _extras(component, _examine(files, component)[1])


@lru_cache(maxsize=16)
def _examine(files: CheckpointFiles, component: str) -> tuple[dict[str, TensorInfo], dict[str, TensorInfo]]:
    """A match without its network; plans ask for the same one again and again."""
    match = match_network(files, component)
    return match.tensors, match.left_out


def tell_left_out(files: CheckpointFiles, component: str, match: Match) -> None:
    """Log what is left out of a checkpoint's files and of a component's tensors, each once per folder and process."""
    groups = (*files.left_out, *_extras(component, match.left_out))
    new = [group for group in groups if (str(files.folder), group.name) not in _told]
    _told.update((str(files.folder), group.name) for group in new)
    if known := [group for group in new if group.is_known]:
        logger.info(
            'Checkpoint "%s": left out, as nothing here needs it: %s.', files.name, describe_left_out(known)
        )
    if unknown := [group for group in new if not group.is_known]:
        logger.warning(
            'Checkpoint "%s": left out, as this program does not know it: %s. All that it needs is there.',
            files.name,
            describe_left_out(unknown),
        )


def describe_left_out(groups: Sequence[LeftOut]) -> str:
    """In words, e.g. "244 tensors of model.vae, 160.2 MB"."""
    return "; ".join(
        f"{group.tensors} tensor{'' if group.tensors == 1 else 's'} of {group.name}, {format_bytes(group.bytes)}"
        for group in groups
    )


def _extras(component: str, tensors: dict[str, TensorInfo]) -> tuple[LeftOut, ...]:
    words = component.replace("_", " ")
    return group_left_out((f"{words}: {beginning(key)}", False, info) for key, info in tensors.items())


def _match_dit(files: CheckpointFiles, ops: Any) -> Match:
    from ..models.nextdit import NextDiT

    tensors = files.component_tensors("dit")
    config = infer_nextdit(tensors, files.name)
    with torch.device("meta"):
        network = NextDiT(config, ops)
    return _match(files, "dit", network, tensors)


def _match_image_encoder(files: CheckpointFiles, ops: Any) -> Match:
    from ..models.eva_clip import EvaClip

    separate, in_memory, label = files.image_encoder_file(), None, files.name
    if separate is None:
        tensors = files.component_tensors("image_encoder")
    elif separate.suffix == ".safetensors":
        label = separate.name
        tensors = {inner_key(key): info for key, info in read_header(separate)[0].items()}
    else:
        label = separate.name
        in_memory = {inner_key(key): tensor for key, tensor in read_pickle(separate).items()}
        tensors = {
            key: TensorInfo(separate, key, tensor.dtype, tuple(tensor.shape), tensor.nbytes)
            for key, tensor in in_memory.items()
        }
    config = infer_eva_clip(tensors, files.config, label)
    with torch.device("meta"):
        network = EvaClip(config, ops)
    return _match(files, "image_encoder", network, tensors, in_memory=in_memory)


def _match_backbone(files: CheckpointFiles, ops: Any) -> Match:
    from accelerate import init_empty_weights

    from ..models.backbone import Backbone

    tensors = files.component_tensors("backbone")
    if "latent_queries" not in tensors:
        raise WrongCheckpointError(
            f'Checkpoint "{files.name}" has no latent_queries: it is a plain language model, or a finetune that was saved '
            f'without them.\nThe tensor "model.latent_queries" can be taken from {files.published_repo}.'
        )
    shape = Shapes(tensors, files.name, "language model")
    vocab_size, _ = shape(EMBEDDING, 2)
    _, queries, _ = shape("latent_queries", 3)
    is_tied = HEAD not in tensors
    if is_tied:
        _require_tied_head(files)
    check_backbone_sizes(tensors, files.config, files.name)
    # Buffers stay real: rotary tables made on the meta device would be garbage.
    with _built_from(files.folder / "config.json"), init_empty_weights(include_buffers=False):
        network = Backbone(files.config, vocab_size=vocab_size, queries=queries, tie_head=is_tied)
    return _match(files, "backbone", network, tensors, is_head_tied=is_tied)


def _require_tied_head(files: CheckpointFiles) -> None:
    """Raise WrongCheckpointError where the head has weights of its own and they are not in the files."""
    text = files.config.get("text_config")
    said = [
        part["tie_word_embeddings"]
        for part in (files.config, text if isinstance(text, dict) else {})
        if isinstance(part.get("tie_word_embeddings"), bool)
    ]
    if said and not any(said):
        raise WrongCheckpointError(
            f'Checkpoint "{files.name}" lacks its language head "{HEAD}", and config.json says that the head is not the token '
            f"embedding (tie_word_embeddings is false): its answers would be nonsense.\n"
            f'The tensor "{HEAD}" can be taken from {files.published_repo}, or from the model it was finetuned from.'
        )


def _match_decoder(files: CheckpointFiles, ops: Any) -> Match:
    from ..models.decoder import Decoder

    unet, vae, scheduler = (files.decoder_config(part) for part in ("unet", "vae", "scheduler"))
    tensors = files.component_tensors("decoder")
    for part, config in (("unet", unet), ("vae", vae)):
        check_decoder_sizes(config, len(tensors), files.decoder_folder / part / "config.json")
    with _built_from(files.decoder_folder / "*" / "config.json"), torch.device("meta"):
        network = Decoder(unet, vae, scheduler)
    with _built_from(files.decoder_folder / "scheduler" / "scheduler_config.json"):
        for sampler in PIXEL_SAMPLERS:
            network.scheduler(sampler).set_timesteps(2)
    return _match(files, "decoder", network, tensors)


@contextmanager
def _built_from(path: Path) -> Iterator[None]:
    """Name the file whose values a library or a network of ours could not be built with.

    Wraps constructors alone, each of which reports what it cannot use by an error class of its own.
    """
    try:
        yield
    except Blip3oError:
        raise
    except Exception as error:
        reason = quote(str(error).strip().splitlines()[-1:] or type(error).__name__)
        raise WrongCheckpointError(
            f'A network cannot be built from "{path.parent.name}/{path.name}" in "{path.parent.parent}": a value in it is missing or '
            f"impossible.\nDownload that file again. ({type(error).__name__}: {reason})"
        ) from error


def _match(
    files: CheckpointFiles,
    component: str,
    network: nn.Module,
    tensors: dict[str, TensorInfo],
    *,
    is_head_tied: bool = False,
    in_memory: dict[str, Tensor] | None = None,
) -> Match:
    shapes = {key: tuple(value.shape) for key, value in network.state_dict().items()}
    if is_head_tied:
        del shapes[HEAD]
    missing = [key for key in shapes if key not in tensors]
    if missing:
        raise WrongCheckpointError(
            f'Checkpoint "{files.name}" lacks {len(missing)} of the {len(shapes)} tensors that its '
            f'{component.replace("_", " ")} needs, e.g. "{missing[0]}".\n'
            f"The files come from different versions or downloads. Download the checkpoint again. {files.remedy(component)}"
        )
    for key, shape in shapes.items():
        info = tensors[key]
        if info.shape != shape:
            raise WrongCheckpointError(
                f'Tensor "{key}" of checkpoint "{files.name}" has the wrong size in {info.path.name}: '
                f"{info.shape}, expected {shape}.\n"
                "config.json and the weight files belong to different models. Download the checkpoint again."
            )
        info.require_readable()
    left_out = {key: info for key, info in tensors.items() if key not in shapes}
    if left_out and files.is_strict:
        raise unneeded_error(files.name, list(left_out), left_out)
    return Match(network, {key: tensors[key] for key in shapes}, left_out, is_head_tied, in_memory)


_MATCHERS = {
    "backbone": _match_backbone,
    "dit": _match_dit,
    "image_encoder": _match_image_encoder,
    "decoder": _match_decoder,
}
