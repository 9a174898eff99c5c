"""Fetches a published checkpoint from the model hub: first a plan with sizes, then resumable, verified downloads.

Nothing here runs unless a person asks for it.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import WeakFileLock, validate_repo_id
from tqdm import tqdm

from .checkpoints.keys import to_component_key
from .checkpoints.layout import (
    DECODER_FOLDER,
    DECODER_NETWORKS,
    DECODER_WEIGHTS,
    IMAGE_ENCODER_FILES,
    IMAGE_ENCODER_FOLDERS,
    INDEX_NAME,
)
from .errors import BadInputError, Blip3oError, MissingFilesError, WrongCheckpointError
from .hub import ConnectionTrouble, Hub, Listing, RemoteFile

logger = logging.getLogger(__name__)

# (file, bytes done, bytes of that file); raise in it to stop, what has arrived stays for the next run.
ProgressCallback = Callable[[str, int, int], None]

ALIASES = {"8b": "BLIP3o/BLIP3o-Model-8B", "4b": "BLIP3o/BLIP3o-Model-4B"}
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
MAX_HEADER_BYTES = 100 * 2**20
HASH_CHUNK_BYTES = 4 * 2**20
DISK_MARGIN_BYTES = 64 * 2**20
LOCK_NAME = ".blip3o-download.lock"
LOCK_SECONDS = 0.2


@dataclass(frozen=True)
class PlannedFile:
    """One file of a download.

    Attributes:
        remote: where it comes from, its size and checksum.
        path: path inside the target folder, with forward slashes.
        is_present: already in the folder with the right checksum.
        is_replaced: a file of that name is there with other content; it is replaced once the new one is complete.
        partial_bytes: bytes of an earlier, interrupted download that will be continued.
    """

    remote: RemoteFile
    path: str
    is_present: bool = False
    is_replaced: bool = False
    partial_bytes: int = 0

    @property
    def size(self) -> int:
        assert self.remote.size is not None, "a planned file has a size"
        return self.remote.size

    @property
    def state(self) -> str:
        """What will happen to the file, in words."""
        if self.is_present:
            return "already there, checked"
        words = f"continues at {format_bytes(self.partial_bytes)}" if self.partial_bytes else "to fetch"
        return f"{words}, replaces another version" if self.is_replaced else words


@dataclass(frozen=True)
class DownloadPlan:
    """What a download would fetch; str() is a table for people, the total size first.

    Attributes:
        repo: hub repository.
        folder: where the files go.
        use: "generate" or "encode".
        endpoint: address of the hub or mirror.
        files: all files needed, also those that are already there.
        left_out: weight files that this use does not need.
    """

    repo: str
    folder: Path
    use: str
    endpoint: str
    files: tuple[PlannedFile, ...]
    left_out: tuple[RemoteFile, ...] = ()

    @property
    def total_bytes(self) -> int:
        return sum(file.size for file in self.files)

    @property
    def present_bytes(self) -> int:
        """Bytes of files that are complete and checked."""
        return sum(file.size for file in self.files if file.is_present)

    @property
    def partial_bytes(self) -> int:
        """Bytes of interrupted files that will be continued."""
        return sum(file.partial_bytes for file in self.files)

    @property
    def missing_bytes(self) -> int:
        """Bytes still to fetch."""
        return self.total_bytes - self.present_bytes - self.partial_bytes

    def __str__(self) -> str:
        width = max(len(file.path) for file in self.files)
        lines = [
            f"{format_bytes(self.total_bytes)} in {len(self.files)} files: {self.repo}, for {USE_WORDS[self.use]}",
            f"{format_bytes(self.missing_bytes)} to fetch from {self.endpoint}"
            f" ({format_bytes(self.total_bytes - self.missing_bytes)} already there)",
            f'into "{self.folder}" ({format_bytes(_free_bytes(self.folder))} free)',
            "",
            *(
                f"{format_bytes(file.size):>9}  {file.path:<{width}}  {file.state}"
                for file in sorted(self.files, key=lambda file: -file.size)
            ),
        ]
        if self.left_out:
            size = format_bytes(sum(file.size or 0 for file in self.left_out))
            lines += [
                "",
                f'Left out: {size} of the EVA-CLIP image encoder, needed to encode or vary images (use "encode").',
            ]
        return "\n".join(lines)


def plan_download(
    repo: str,
    folder: str | Path,
    *,
    use: str = "generate",
    revision: str | None = None,
    endpoint: str | None = None,
    on_check: ProgressCallback | None = None,
) -> DownloadPlan:
    """Ask the hub which files a checkpoint needs, how large they are and which of them are already in the folder.

    Nothing is written. Read are the list of files and, to learn which file holds what, the small index of the weights.

    Args:
        repo: "8b", "4b" or any "owner/name" of the hub.
        folder: target folder, need not exist yet.
        use: "generate" = text-to-image and understanding; "encode" = image encoding as well.
        revision: branch, tag or commit; None = the newest.
        endpoint: address of the hub or a mirror; None = HF_ENDPOINT, else the public hub.
        on_check: called as on_check(file, bytes_read, size) while files that are already there are checksummed.

    Raises:
        BadInputError: repo, revision, use, folder or endpoint is not usable.
        MissingFilesError: offline mode, no network, no access.
        WrongCheckpointError: the repository is not a BLIP3-o checkpoint, or the folder holds another one.
    """
    repo = resolve_repo(repo)
    if use not in USES:
        raise BadInputError(
            f'Use "{use}" is not known.\nChoose "generate" ({USE_WORDS["generate"]}) or "encode" ({USE_WORDS["encode"]}).'
        )
    folder = Path(folder).expanduser()
    if folder.exists() and not folder.is_dir():
        raise BadInputError(f'"{folder}" is a file, but a folder is needed.\nGive the name of a folder.')
    hub = Hub(endpoint)
    listing = hub.listing(repo, revision)
    _refuse_foreign_weights(folder, listing)
    tensors = _tensor_names(hub, listing, folder)
    encoder_shards = [shard for shard, keys in tensors.items() if all(map(_is_image_encoder, keys))]
    left_out = encoder_shards if use == "generate" else []
    names = [*_needed_small_files(listing), *_needed_decoder_weights(listing)]
    names += sorted(shard for shard in tensors if shard not in left_out)
    sources = {name: listing.files[name] for name in names}
    if use == "encode" and not any(_is_image_encoder(key) for keys in tensors.values() for key in keys):
        sources |= _separate_image_encoder(hub, folder)
    for path in sources:
        _refuse_unsafe_path(repo, path)
    return DownloadPlan(
        repo,
        folder,
        use,
        hub.endpoint,
        tuple(_look_on_disk(folder, path, hub.complete(file), on_check) for path, file in sources.items()),
        tuple(hub.complete(listing.files[shard]) for shard in left_out),
    )


def run_download(
    plan: DownloadPlan, *, on_progress: ProgressCallback | None = None, verify: bool = True
) -> Path:
    """Fetch what a plan misses. A cut connection is continued, in this run or in the next one.

    Args:
        plan: from plan_download.
        on_progress: called as on_progress(file, bytes_done, size) when a file starts and after every piece; raise in it
            to stop. The unfinished file stays as "*.part" and is continued by the next run.
        verify: compare every file with the hub's checksum before it takes its name; False checks only the size.

    Returns:
        The folder.

    Raises:
        MissingFilesError: offline mode, no network, no access, or a file arrives damaged twice in a row.
        Blip3oError: the disk is full or not writable, or another download into the folder is running.
    """
    if verify:
        _require_checksums(plan.files)
    todo = [file for file in plan.files if not _is_complete(plan.folder, file, verify)]
    if not todo:
        return plan.folder
    hub = Hub(plan.endpoint)
    with _disk_errors(plan.folder):
        plan.folder.mkdir(parents=True, exist_ok=True)
    with _only_one_download(plan.folder):
        _require_disk_space(plan.folder, todo)
        for file in todo:
            _fetch_file(hub, file, plan.folder, on_progress, verify)
    return plan.folder


@contextlib.contextmanager
def progress_bars(plan: DownloadPlan | None = None) -> Iterator[ProgressCallback]:
    """Bars on the terminal, as a callback for run_download(on_progress=...) or plan_download(on_check=...).

    One bar for the current file and, with a plan, one for the whole download.
    """
    options = {"unit": "B", "unit_scale": True, "dynamic_ncols": True}
    with contextlib.ExitStack() as stack:
        overall = None
        if plan:
            start = plan.total_bytes - plan.missing_bytes
            overall = stack.enter_context(
                tqdm(total=plan.total_bytes, initial=start, desc="all files", **options)
            )
        bar = stack.enter_context(tqdm(position=1 if plan else 0, leave=False, **options))
        done = {file.path: file.partial_bytes for file in plan.files} if plan else {}
        current = None

        def show(file: str, bytes_done: int, size: int) -> None:
            nonlocal current
            if file != current:
                current = file
                bar.reset(size)
                bar.set_description(file, refresh=False)
            bar.update(bytes_done - bar.n)
            if overall is not None:
                overall.update(bytes_done - done.get(file, 0))
                done[file] = bytes_done

        yield show


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
            f'"{name}" is not a model that can be downloaded.\n'
            f"Write {' or '.join(ALIASES)} for the published models, or the name of a hub repository "
            f'such as "{ALIASES["8b"]}".'
        )
    return name


def format_bytes(count: int) -> str:
    """Bytes for people, in powers of 1000 as hub and disks count: 512 B, 3.4 MB, 16.6 GB."""
    if count < 1000:
        return f"{count} B"
    value, unit = count / 1e12, "TB"
    for value, unit in ((count / 1e3, "KB"), (count / 1e6, "MB"), (count / 1e9, "GB"), (count / 1e12, "TB")):
        if value < 999.95:
            break
    return f"{value:.1f} {unit}"


# What a checkpoint needs


def _needed_small_files(listing: Listing) -> list[str]:
    missing = [name for name in ("config.json", *DECODER_CONFIGS) if name not in listing.files]
    if "tokenizer.json" not in listing.files and not {"vocab.json", "merges.txt"} <= listing.files.keys():
        missing.append("tokenizer.json")
    if missing:
        raise _not_blip3o(listing.repo, missing)
    return [name for name in (*SMALL_FILES, *DECODER_CONFIGS, INDEX_NAME) if name in listing.files]


def _needed_decoder_weights(listing: Listing) -> list[str]:
    needed = []
    for network in DECODER_NETWORKS:
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
    if _matches(local, index, INDEX_NAME):
        return local.read_bytes()
    for _ in range(2):
        data = hub.read(index)
        if index.has_content([data]):
            return data
    raise _damaged(index)


def _parse_index(repo: str, data: bytes) -> dict[str, list[str]]:
    shards: dict[str, list[str]] = {}
    try:
        for tensor, shard in json.loads(data)["weight_map"].items():
            shards.setdefault(str(shard), []).append(tensor)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _unreadable(repo, INDEX_NAME) from error
    return shards


def _read_header_names(hub: Hub, file: RemoteFile) -> list[str]:
    def has_header(data: bytes) -> bool:
        end = 8 + int.from_bytes(data[:8], "little") if len(data) >= 8 else MAX_HEADER_BYTES
        return len(data) >= min(end, MAX_HEADER_BYTES)

    data = hub.read(file, has_header)
    try:
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        return [name for name in header.keys() if name != "__metadata__"]
    except (ValueError, AttributeError) as error:
        raise _unreadable(file.repo, file.source) from error


def _is_image_encoder(key: str) -> bool:
    mapped = to_component_key(key)
    return mapped is not None and mapped[0] == "image_encoder"


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


def _refuse_foreign_weights(folder: Path, listing: Listing) -> None:
    """Two checkpoints in one folder cannot be told apart later."""
    foreign = sorted(path.name for path in folder.glob("*.safetensors") if path.name not in listing.files)
    if foreign:
        raise WrongCheckpointError(
            f'"{folder}" already holds weights that are not part of {listing.repo}: {", ".join(foreign[:3])}'
            f"{' ...' if len(foreign) > 3 else ''}.\n"
            "Choose another folder, or move these files away first."
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


# The folder


def _look_on_disk(
    folder: Path, path: str, remote: RemoteFile, on_check: ProgressCallback | None
) -> PlannedFile:
    target, part = folder / path, _part_path(folder, path, remote)
    is_present = _matches(target, remote, path, on_check)
    partial_bytes = part.stat().st_size if not is_present and part.is_file() else 0
    return PlannedFile(
        remote,
        path,
        is_present,
        not is_present and target.is_file(),
        partial_bytes if partial_bytes <= (remote.size or 0) else 0,
    )


def _part_path(folder: Path, path: str, remote: RemoteFile) -> Path:
    """Where an unfinished download lies; another version of the file gets another name and is never continued by it."""
    version = remote.checksum or hashlib.sha256(f"{remote.commit} {remote.size}".encode()).hexdigest()
    target = folder / path
    return target.with_name(f"{target.name}.{version[:12]}.part")


def _is_complete(folder: Path, file: PlannedFile, verify: bool) -> bool:
    """A file that the plan has checked needs no second look, unless it changed its size or went away since."""
    target = folder / file.path
    if file.is_present or not verify:
        return target.is_file() and target.stat().st_size == file.size
    return _matches(target, file.remote, file.path)


def _fetch_file(
    hub: Hub, file: PlannedFile, folder: Path, on_progress: ProgressCallback | None, verify: bool
) -> None:
    target, part = folder / file.path, _part_path(folder, file.path, file.remote)
    with _disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        for stale in target.parent.glob(f"{target.name}.????????????.part"):
            if stale != part:
                stale.unlink()
    for _ in range(2):
        _fetch_part(hub, file, part, on_progress)
        if not verify or _matches(part, file.remote, file.path):
            with _disk_errors(target):
                os.replace(part, target)
            return
        part.unlink()
        logger.warning("%s arrived damaged and was deleted.", file.path)
    raise _damaged(file.remote)


def _fetch_part(hub: Hub, file: PlannedFile, part: Path, on_progress: ProgressCallback | None) -> None:
    """Bring an unfinished file to its full size, continuing what is there."""
    with _disk_errors(part):
        if part.is_file() and part.stat().st_size > file.size:
            part.unlink()
        # Unbuffered: a full disk shows at the write, and what a stopped run has received is all on the disk.
        out = part.open("ab", buffering=0)
    with out:
        done, failures = out.seek(0, os.SEEK_END), 0
        if on_progress:
            on_progress(file.path, done, file.size)
        while done < file.size:
            try:
                with contextlib.closing(hub.chunks(file.remote, done)) as chunks:
                    for position, chunk in chunks:
                        _write_at(out, position, chunk, part)
                        done, failures = position + len(chunk), 0
                        if on_progress:
                            on_progress(file.path, done, file.size)
            except ConnectionTrouble as trouble:
                failures += 1
                hub.wait_or_raise(trouble, file.remote, failures)


def _write_at(out: BinaryIO, position: int, chunk: bytes, part: Path) -> None:
    rest = memoryview(chunk)
    with _disk_errors(part):
        if position != out.tell():  # the server could not continue and starts anew
            out.truncate(position)
            out.seek(position)
        while rest:
            rest = rest[out.write(rest) :]


def _matches(path: Path, remote: RemoteFile, name: str, on_check: ProgressCallback | None = None) -> bool:
    """Whether a file on the disk has the size and, where the hub states one, the checksum."""
    if not path.is_file() or path.stat().st_size != remote.size:
        return False

    def pieces() -> Iterator[bytes]:
        done = 0
        with path.open("rb") as data:
            while piece := data.read(HASH_CHUNK_BYTES):
                yield piece
                done += len(piece)
                if on_check:
                    on_check(name, done, remote.size)

    return remote.has_content(pieces())


def _require_checksums(files: Iterable[PlannedFile]) -> None:
    for file in files:
        if file.remote.checksum:
            continue
        if file.path.endswith((".safetensors", ".bin")):
            raise MissingFilesError(
                f'The hub states no checksum for "{file.path}", so a damaged download could not be noticed.\n'
                "Use another mirror (HF_ENDPOINT), or download without verification if you trust this one."
            )
        logger.warning("The hub states no checksum for %s; only its size is checked.", file.path)


def _require_disk_space(folder: Path, files: list[PlannedFile]) -> None:
    needed = sum(file.size - file.partial_bytes for file in files)
    free = _free_bytes(folder)
    if free < needed + DISK_MARGIN_BYTES:
        raise Blip3oError(
            f'Not enough room for the download in "{folder}": {format_bytes(needed)} are needed, '
            f"{format_bytes(free)} are free.\nFree some space on that disk, or choose a folder on another one."
        )


def _free_bytes(folder: Path) -> int:
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(existing).free


@contextlib.contextmanager
def _only_one_download(folder: Path) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        try:
            with _disk_errors(folder):
                stack.enter_context(WeakFileLock(folder / LOCK_NAME, timeout=LOCK_SECONDS))
        except TimeoutError as error:
            raise Blip3oError(
                f'Another download into "{folder}" is running.\nWait for it to end, or stop it first.'
            ) from error
        yield


@contextlib.contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    """Around work on local files only: says what the system's error means for the person."""
    try:
        yield
    except TimeoutError:
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise Blip3oError(
                f'The disk is full: "{path}" could not be written.\n'
                "Free some space and run the download again; it continues where it stopped."
            ) from error
        raise Blip3oError(
            f'"{path}" could not be written.\n'
            f"Choose a folder that you may write to, or change its permissions. ({error.strerror or error})"
        ) from error


def _damaged(file: RemoteFile) -> MissingFilesError:
    return MissingFilesError(
        f'"{file.source}" of {file.repo} arrived damaged twice: its checksum is not the one the hub states. '
        "The damaged file was deleted.\n"
        "Run the download again. If it happens again, something on the way changes the data: try another network or disk, "
        f"or another mirror (HF_ENDPOINT). (expected {file.checksum})"
    )
