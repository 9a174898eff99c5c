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
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from huggingface_hub.utils import WeakFileLock
from tqdm import tqdm

from ..errors import BadInputError, Blip3oError, MissingFilesError, WrongCheckpointError
from ..units import format_bytes
from ..untrusted import parse_object, quote
from .client import ConnectionTrouble, Hub, RemoteFile
from .needed_files import (
    ALIASES,
    USE_WORDS,
    USES,
    has_decoder,
    needed_files,
    refuse_foreign_weights,
    resolve_repo,
)

__all__ = [
    "ALIASES",
    "USES",
    "DownloadPlan",
    "PlannedFile",
    "ProgressCallback",
    "plan_download",
    "progress_bars",
    "resolve_repo",
    "run_download",
]

logger = logging.getLogger(__name__)

# (file, bytes done, bytes of that file); raise in it to stop, what has arrived stays for the next run.
ProgressCallback = Callable[[str, int, int], None]

DISK_MARGIN_BYTES = 64 * 2**20
LOCK_NAME = ".blip3o-download.lock"
LOCK_SECONDS = 0.2
# What a folder remembers of where its files come from.
ORIGIN_NAME = ".blip3o-origin.json"
WEIGHT_ENDINGS = (".safetensors", ".bin")


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
            words = f"Left out: {size} of weight files that this use does not need"
            if self.use == "generate":
                words += ' (the EVA-CLIP image encoder: with use "encode" images can be encoded and varied)'
            lines += ["", f"{words}."]
        if not has_decoder(file.path for file in self.files):
            lines += [
                "",
                f"{self.repo} holds no decoder: it answers, but draws only with the decoder of a published checkpoint "
                f"({' or '.join(ALIASES.values())}; all have the same). Name it when drawing: --decoder FOLDER.",
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
    replace: bool = False,
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
        replace: put the files in place of another repository's, which the folder holds.

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
    refuse_foreign_weights(folder, listing)
    files, left_out = needed_files(hub, listing, folder, use)
    planned = tuple(_look_on_disk(folder, path, hub.complete(file), on_check) for path, file in files.items())
    if not replace:
        _refuse_another_owner(repo, folder, planned)
    return DownloadPlan(repo, folder, use, hub.endpoint, planned, tuple(map(hub.complete, left_out)))


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
        _write_origin(plan, todo[0].remote.commit)
        for file in todo:
            _fetch_file(hub, file, plan.folder, on_progress, verify)
    return plan.folder


def _write_origin(plan: DownloadPlan, commit: str) -> None:
    temporary = plan.folder / f"{ORIGIN_NAME}.part"
    temporary.write_text(json.dumps({"repository": plan.repo, "commit": commit}) + "\n", "utf-8")
    os.replace(temporary, plan.folder / ORIGIN_NAME)


def _refuse_another_owner(repo: str, folder: Path, planned: Sequence[PlannedFile]) -> None:
    """A name alone must not put a stranger's files in place of a model that somebody trusts."""
    remedy = "Choose another folder. Only if you want the other files gone: blip3o download with --replace."
    try:
        origin = parse_object((folder / ORIGIN_NAME).read_bytes()).get("repository")
    except (OSError, ValueError):
        origin = None
    if origin is not None and origin != repo:
        raise WrongCheckpointError(f'"{folder}" holds files of {quote(origin)}, not of "{repo}".\n{remedy}')
    weights = [file.path for file in planned if file.is_replaced and file.path.endswith(WEIGHT_ENDINGS)]
    if origin is None and weights:
        raise WrongCheckpointError(
            f'"{folder}" holds other weights than "{repo}" under the same names, e.g. "{weights[0]}".\n{remedy}'
        )


@contextlib.contextmanager
def progress_bars(plan: DownloadPlan | None = None) -> Iterator[ProgressCallback]:
    """Bars on the terminal, as a callback for run_download(on_progress=...) or plan_download(on_check=...).

    One bar for the current file and, with a plan, one for the whole download.
    """
    options: dict[str, Any] = {"unit": "B", "unit_scale": True, "unit_divisor": 1024, "dynamic_ncols": True}
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


def _look_on_disk(
    folder: Path, path: str, remote: RemoteFile, on_check: ProgressCallback | None
) -> PlannedFile:
    def on_piece(done: int) -> None:
        if on_check:
            on_check(path, done, remote.size or 0)

    target, part = folder / path, _part_path(folder, path, remote)
    with _disk_errors(target):
        is_present = remote.is_at(target, on_piece)
        partial_bytes = part.stat().st_size if part.is_file() else 0
    if is_present or partial_bytes > (remote.size or 0):
        partial_bytes = 0
    is_replaced = not is_present and target.is_file()
    return PlannedFile(remote, path, is_present, is_replaced, partial_bytes)


def _part_path(folder: Path, path: str, remote: RemoteFile) -> Path:
    """Where an unfinished download lies; another version of the file gets another name and is never continued by it."""
    version = remote.checksum or hashlib.sha256(f"{remote.commit} {remote.size}".encode()).hexdigest()
    target = folder / path
    return target.with_name(f"{target.name}.{version[:12]}.part")


def _is_complete(folder: Path, file: PlannedFile, verify: bool) -> bool:
    """A file that the plan has checked needs no second look, unless it changed its size or went away since."""
    target = folder / file.path
    if file.is_present or not verify:
        return target.is_file() and target.stat().st_size == file.size and not file.is_replaced
    return file.remote.is_at(target)


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
        if not verify or file.remote.is_at(part):
            with _disk_errors(target):
                os.replace(part, target)
            return
        part.unlink()
        logger.warning("%s arrived damaged and was deleted.", file.path)
    raise file.remote.damaged()


def _fetch_part(hub: Hub, file: PlannedFile, part: Path, on_progress: ProgressCallback | None) -> None:
    """Bring an unfinished file to its full size, continuing what is there."""
    with _disk_errors(part):
        if part.is_file() and part.stat().st_size > file.size:
            part.unlink()
        # Unbuffered: a full disk shows at the write, and what a stopped run has received is all on the disk.
        out = part.open("ab", buffering=0)
    with out:
        done = farthest = out.seek(0, os.SEEK_END)
        failures = 0
        if on_progress:
            on_progress(file.path, done, file.size)
        while done < file.size:
            try:
                with contextlib.closing(hub.chunks(file.remote, done)) as chunks:
                    for position, chunk in chunks:
                        _write_at(out, position, chunk, part)
                        done = position + len(chunk)
                        if done > farthest:
                            farthest, failures = done, 0
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
            f'"{path}" could not be read or written.\n'
            f"Choose a folder that you may write to, or change its permissions. ({error.strerror or error})"
        ) from error
