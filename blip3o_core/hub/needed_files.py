"""Which files of a hub repository a checkpoint folder needs for a given use, and which it never gets."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..checkpoints.keys import to_component_key
from ..checkpoints.layout import (
    DECODER_FOLDER,
    DECODER_NETWORKS,
    DECODER_WEIGHTS,
    IMAGE_ENCODER_FILES,
    IMAGE_ENCODER_FOLDERS,
    INDEX_NAME,
)
from ..config import PUBLISHED_REPOS, PUBLISHED_SIZES
from ..errors import BadInputError, MissingFilesError, WrongCheckpointError
from ..untrusted import MAX_HEADER_BYTES, MAX_JSON_BYTES, parse_object, quote
from .client import Hub, Listing, RemoteFile

ALIASES = {PUBLISHED_SIZES[width].lower(): repo for width, repo in PUBLISHED_REPOS.items()}
USES = ("generate", "encode")
USE_WORDS = {
    "generate": "text-to-image and understanding",
    "encode": "text-to-image, understanding and image encoding",
}
IMAGE_ENCODER_REPO = "jiuhai/eva_clip_vision_tower"

SINGLE_WEIGHTS = "model.safetensors"
# Fetched where a repository has them. Everything not named here (code, pickles, leftovers) is never fetched.
SMALL_FILES = (
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "chat_template.json",
    "chat_template.jinja",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    f"{DECODER_FOLDER}/model_index.json",
)
DECODER_CONFIGS = (
    f"{DECODER_FOLDER}/scheduler/scheduler_config.json",
    *(f"{DECODER_FOLDER}/{network}/config.json" for network in DECODER_NETWORKS),
)
SAFE_PART = re.compile(r"[\w-][\w.-]*", re.ASCII)


def resolve_repo(name: str) -> str:
    """Hub repository of an alias ("8b", "4b"), or the name itself when it is an "owner/name".

    Raises:
        BadInputError: it is neither.
    """
    alias = ALIASES.get(name.strip().lower())
    if alias:
        return alias
    try:
        validate_repo_id(name)
        is_repo = name.count("/") == 1
    except HFValidationError:
        is_repo = False
    if not is_repo:
        raise BadInputError(
            f"{quote(name)} is no repository name, and no short one of a published model.\n"
            f"Write {' or '.join(ALIASES)} for the published models, or the name of a hub repository "
            f'such as "{ALIASES["8b"]}".'
        )
    return name


def needed_files(
    hub: Hub, listing: Listing, folder: Path, use: str
) -> tuple[dict[str, RemoteFile], list[RemoteFile]]:
    """Path in the target folder -> file to fetch, and the weight files that this use leaves out.

    Args:
        listing: of the checkpoint's repository.
        folder: target folder; an index or a separate image encoder that already lies there is not fetched again.
        use: one of USES.

    Raises:
        MissingFilesError: the hub could not be read.
        WrongCheckpointError: the repository is not a complete BLIP3-o checkpoint, or names files outside the folder.
    """
    tensors = _tensor_names(hub, listing, folder)
    left_out = [shard for shard, keys in tensors.items() if not any(_is_needed(key, use) for key in keys)]
    names = [*_small_files(listing), *_decoder_weights(listing)]
    names += sorted(shard for shard in tensors if shard not in left_out)
    files = {name: listing.files[name] for name in names}
    if use == "encode" and not any(_is_image_encoder(key) for keys in tensors.values() for key in keys):
        files |= _separate_image_encoder(hub, folder)
    for path in files:
        _refuse_unsafe_path(listing.repo, path)
    return files, [listing.files[shard] for shard in left_out]


def refuse_foreign_weights(folder: Path, listing: Listing) -> None:
    """Two checkpoints in one folder cannot be told apart later.

    Raises:
        WrongCheckpointError: the folder holds weight files that the repository does not have.
    """
    foreign = sorted(path.name for path in folder.glob("*.safetensors") if path.name not in listing.files)
    if foreign:
        raise WrongCheckpointError(
            f'"{folder}" already holds weights that are not part of {listing.repo}: {", ".join(foreign[:3])}'
            f"{' ...' if len(foreign) > 3 else ''}.\n"
            "Choose another folder, or move these files away first."
        )


def has_decoder(paths: Iterable[str]) -> bool:
    """Whether any of these files belongs to a decoder; finetunes are often saved without one."""
    return any(path.startswith(f"{DECODER_FOLDER}/") for path in paths)


def _small_files(listing: Listing) -> list[str]:
    needed = ("config.json", *(DECODER_CONFIGS if has_decoder(listing.files) else ()))
    missing = [name for name in needed if name not in listing.files]
    if "tokenizer.json" not in listing.files and not {"vocab.json", "merges.txt"} <= listing.files.keys():
        missing.append("tokenizer.json")
    if missing:
        raise _not_blip3o(listing.repo, missing)
    return [name for name in (*SMALL_FILES, *DECODER_CONFIGS, INDEX_NAME) if name in listing.files]


def _decoder_weights(listing: Listing) -> list[str]:
    needed: list[str] = []
    for network in DECODER_NETWORKS if has_decoder(listing.files) else ():
        names = [f"{DECODER_FOLDER}/{network}/{name}" for name in DECODER_WEIGHTS]
        listed = [name for name in names if name in listing.files]
        if not listed:
            raise _not_blip3o(listing.repo, names[:1])
        needed.append(listed[0])
    return needed


def _tensor_names(hub: Hub, listing: Listing, folder: Path) -> dict[str, list[str]]:
    """Weight file -> names of its tensors, from the index, or from the header of a single file."""
    if INDEX_NAME in listing.files:
        shards = _parse_index(listing.repo, _read_index(hub, listing, folder))
        unlisted = sorted(shards.keys() - listing.files.keys())
        if unlisted:
            raise _not_blip3o(listing.repo, unlisted)
        return shards
    if SINGLE_WEIGHTS not in listing.files:
        raise _not_blip3o(listing.repo, [INDEX_NAME])
    return {SINGLE_WEIGHTS: _read_header_names(hub, hub.complete(listing.files[SINGLE_WEIGHTS]))}


def _read_index(hub: Hub, listing: Listing, folder: Path) -> bytes:
    index, local = hub.complete(listing.files[INDEX_NAME]), folder / INDEX_NAME
    assert index.size is not None, "complete gives a size"
    if index.size > MAX_JSON_BYTES:
        raise _unreadable(listing.repo, INDEX_NAME)
    if index.is_at(local):
        return local.read_bytes()
    for _ in range(2):
        data = hub.read(index)
        if index.has_content([data]):
            return data
    raise index.damaged()


def _parse_index(repo: str, data: bytes) -> dict[str, list[str]]:
    shards: dict[str, list[str]] = {}
    try:
        for tensor, shard in parse_object(data)["weight_map"].items():
            if not shard.endswith(".safetensors"):
                raise ValueError(f"{shard} is no safetensors file")
            shards.setdefault(shard, []).append(tensor)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _unreadable(repo, INDEX_NAME) from error
    return shards


def _read_header_names(hub: Hub, file: RemoteFile) -> list[str]:
    def has_header(data: bytearray) -> bool:
        end = 8 + int.from_bytes(data[:8], "little") if len(data) >= 8 else MAX_HEADER_BYTES
        return len(data) >= min(end, MAX_HEADER_BYTES)

    data = hub.read(file, has_header)
    try:
        header = parse_object(data[8 : 8 + int.from_bytes(data[:8], "little")])
    except ValueError as error:
        raise _unreadable(file.repo, file.source) from error
    return [name for name in header if name != "__metadata__"]


def _is_needed(key: str, use: str) -> bool:
    place = to_component_key(key)
    components = ("backbone", "dit") if use == "generate" else ("backbone", "dit", "image_encoder")
    return place is not None and place.component in components


def _is_image_encoder(key: str) -> bool:
    place = to_component_key(key)
    return place is not None and place.component == "image_encoder"


def _separate_image_encoder(hub: Hub, folder: Path) -> dict[str, RemoteFile]:
    """EVA-CLIP from its own repository, unless another copy (say, a converted one) lies where loading looks for it."""
    listing = hub.listing(IMAGE_ENCODER_REPO)
    listed = [name for name in IMAGE_ENCODER_FILES if name in listing.files]
    if not listed:
        raise MissingFilesError(
            f'Repository "{IMAGE_ENCODER_REPO}" does not hold the EVA-CLIP image encoder '
            f"({' or '.join(IMAGE_ENCODER_FILES)}).\n"
            f'Put such a file into "{folder / IMAGE_ENCODER_FOLDERS[0]}" yourself, or download for use "generate".'
        )
    target = f"{IMAGE_ENCODER_FOLDERS[0]}/{listed[0]}"
    copies = [folder / sub / name for sub in IMAGE_ENCODER_FOLDERS for name in IMAGE_ENCODER_FILES]
    if any(copy.is_file() for copy in copies if copy != folder / target):
        return {}
    return {target: listing.files[listed[0]]}


def _refuse_unsafe_path(repo: str, path: str) -> None:
    """File names come from the server; none may lead out of the target folder, on any system."""
    if not all(SAFE_PART.fullmatch(part) for part in path.split("/")):
        raise WrongCheckpointError(
            f'Repository "{repo}" names a file that could land outside the target folder: "{path}".\n'
            f"Nothing was downloaded. Use a published repository ({', '.join(ALIASES.values())})."
        )


def _not_blip3o(repo: str, missing: list[str]) -> WrongCheckpointError:
    return WrongCheckpointError(
        f'Repository "{repo}" is not a complete BLIP3-o checkpoint: it has no {", ".join(missing[:3])}.\n'
        f"Nothing was downloaded. The published ones are {' and '.join(ALIASES.values())}."
    )


def _unreadable(repo: str, name: str) -> WrongCheckpointError:
    return WrongCheckpointError(
        f'"{name}" of {repo} does not say which weights it holds.\n'
        f"Nothing was downloaded. Use a published repository ({', '.join(ALIASES.values())})."
    )
