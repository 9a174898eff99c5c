"""Real pictures with captions: webdataset tars and folders, as a stream without end or as a pool at hand by number.

A shard is a .tar file or a single picture of a folder. An entry says where the bytes of one sample lie; they are read
and decoded only by the process that uses the sample, so passing by entries (other processes' samples, a resumed run)
costs the headers of a tar and no more.

Which stages can use what:
- SampleStream: training of latent queries and DiT on real data (picture -> features, caption -> prompt).
- CaptionPool: wherever a stage reads nothing but `len(pool)` and `pool.pixels(rows)`: the VAE, and the encoding of
  features and latents for the decoder and the DiT, whose prompts are then `pool.captions`. The image encoder's dense
  term and the understanding stage ask for the scene behind each picture and train on the scene world alone.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ..blip3o_core.config import PICTURE_SUFFIXES
from ..blip3o_core.errors import MissingFilesError, TrainingDataError
from ..blip3o_core.file_span import FileSpan
from ..blip3o_core.images import fit_size, to_rgb

logger = logging.getLogger(__name__)

CAPTION_SUFFIXES = (".txt", ".caption")
BUFFER_SIZE = 1000
ON_BAD = ("stop", "skip")
SHOWN_NAMES = 5
TAR_BLOCK = 512
# webdataset's rule: the key ends at the first dot of the file name, so that "a.b/7.seg.png" is file "seg.png" of "a.b/7".
MEMBER_NAME = re.compile(r"^((?:.*/)?[^./]+)\.([^/]*)$")


@dataclass(frozen=True)
class Sample:
    """One RGB picture with its caption; `key` says where it came from."""

    key: str
    picture: Image.Image
    caption: str


@dataclass(frozen=True)
class Entry:
    """A sample not read yet; None = that part is missing."""

    key: str
    picture: FileSpan | None
    caption: FileSpan | None


@dataclass(frozen=True)
class Position:
    """Where a stream stands, for a checkpoint: Position(**saved) goes on exactly there.

    Attributes:
        epoch: passes completed.
        index: entries of this epoch that are behind.
        skip: entries after those that other processes of the same round already have.
    """

    epoch: int = 0
    index: int = 0
    skip: int = 0

    def as_dict(self) -> dict[str, int]:
        """JSON-ready values."""
        return asdict(self)


def find_shards(paths: Path | Sequence[Path]) -> list[Path]:
    """Tars and pictures named, or found in the folders named and their subfolders; sorted within each folder.

    Raises:
        MissingFilesError: a path that does not exist.
        TrainingDataError: nothing found, a named file of another kind, or the same file twice.
    """
    shards: list[Path] = []
    paths = [paths] if isinstance(paths, Path) else list(paths)
    for path in paths:
        if not path.exists():
            raise MissingFilesError(
                f'There is no training data at "{path}".\nGive .tar files, or a folder with tars or pictures.'
            )
        if path.is_dir():
            # Dot files are what file managers leave behind ("._cat.jpg"), not pictures.
            found = (child for child in path.rglob("*") if child.is_file() and not child.name.startswith("."))
            shards += sorted(child for child in found if child.suffix.lower() in (".tar", *PICTURE_SUFFIXES))
        elif path.suffix.lower() in (".tar", *PICTURE_SUFFIXES):
            shards.append(path)
        else:
            raise TrainingDataError(
                f'"{path.name}" is neither a tar nor a picture.\n'
                f"Give .tar files (not compressed), or pictures ending in {', '.join(PICTURE_SUFFIXES)}."
            )
    if not shards:
        raise TrainingDataError(
            f"There are no tars and no pictures in {', '.join(map(str, paths))}.\n"
            f"Put .tar files there, or pictures ({', '.join(PICTURE_SUFFIXES)}) with a text file of the same name each."
        )
    seen: set[Path] = set()
    for path in (shard.resolve() for shard in shards):
        if path in seen:
            raise TrainingDataError(
                f'"{path}" is named twice.\nName each file and folder once, and no folder inside another.'
            )
        seen.add(path)
    return shards


def entries_of(shard: Path) -> Iterator[Entry]:
    """The samples of a shard in its own order.

    Raises:
        TrainingDataError: a tar that is damaged, compressed, or without any picture.
    """
    if shard.suffix.lower() == ".tar":
        yield from _tar_entries(shard)
        return
    # with_name keeps names with several dots whole: "cat.v2.jpg" belongs to "cat.v2.txt".
    beside = (shard.with_name(shard.stem + suffix) for suffix in CAPTION_SUFFIXES)
    caption = next((FileSpan(path) for path in beside if path.is_file()), None)
    yield Entry(str(shard), FileSpan(shard), caption)


def read_sample(entry: Entry) -> Sample:
    """Read and decode a sample; pictures are turned upright, transparency is laid on white.

    Raises:
        TrainingDataError: no picture, one that cannot be decoded, or no caption.
    """
    if entry.picture is None:
        raise TrainingDataError(
            f'"{entry.key}" has a caption but no picture.\nAdd the picture or remove the text.'
        )
    caption = "" if entry.caption is None else _decode_text(entry.caption.read(), entry.key)
    if not caption:
        raise TrainingDataError(
            f'"{entry.key}" has no caption.\nPut a text file of the same name ({", ".join(CAPTION_SUFFIXES)}) beside it.'
        )
    try:
        with Image.open(io.BytesIO(entry.picture.read())) as picture:
            return Sample(entry.key, to_rgb(ImageOps.exif_transpose(picture)), caption)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise TrainingDataError(
            f'"{entry.key}" cannot be opened as a picture.\nReplace or remove it. ({error})'
        ) from error


class SampleStream:
    """Samples in an order drawn anew for each epoch, dealt to processes one by one; iterate to read.

    The order depends on `seed` and `buffer_size` alone. Of every `world_size` consecutive entries each process takes
    one, across the ends of epochs too: every sample is used by exactly one process in each epoch, and what all
    processes use in a number of steps is what one process would use in as many times more steps.

    Args:
        paths: see find_shards.
        rank, world_size: this process and the number of processes.
        start: the `position` of an earlier stream; any process's serves all, with any number of processes to come.
        buffer_size: entries of tars drawn from at random; 1 = file order within a tar. Tars, and the pictures of a
            folder, are always permuted as a whole.
        epochs: passes to make in all; None = without end.
        on_bad: what a sample without caption or readable picture does. "stop" raises; "skip" names it once in the log,
            keeps it in `bad` and takes this process's next one. After skipping, save the position of every process:
            they no longer walk in step.

    Attributes:
        position: after the sample last given; save it with a checkpoint.
        bad: reason for each sample that was passed over, by its key.
    """

    def __init__(
        self,
        paths: Path | Sequence[Path],
        *,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        start: Position | None = None,
        buffer_size: int = BUFFER_SIZE,
        epochs: int | None = None,
        on_bad: str = "stop",
    ) -> None:
        assert 0 <= rank < world_size, f"rank {rank} of {world_size} processes"
        assert buffer_size >= 1, f"buffer_size {buffer_size} must be positive"
        assert on_bad in ON_BAD, f"on_bad {on_bad!r} must be one of {ON_BAD}"
        self.shards = find_shards(paths)
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.buffer_size = buffer_size
        self.epochs = epochs
        self.on_bad = on_bad
        self.position = start or Position()
        self.bad: dict[str, str] = {}
        self._unread = 0

    def skip(self, samples: int) -> None:
        """Pass by this process's next samples without reading them: the way back to a step whose position is unknown.

        Exact as long as none of them is bad; `start` is exact always.
        """
        self._unread += samples

    def __iter__(self) -> Iterator[Sample]:
        start = self.position
        # Entries since the start of this round of processes; those to skip belong to the round before.
        turn = -start.skip
        epoch, behind = start.epoch, start.index
        bad_in_a_row = 0
        while self.epochs is None or epoch < self.epochs:
            count = 0
            for index, entry in enumerate(self.order(epoch)):
                count += 1
                if index < behind:
                    continue
                is_mine = turn >= 0 and turn % self.world_size == self.rank
                turn += 1
                if not is_mine:
                    continue
                if self._unread:
                    self._unread -= 1
                    continue
                sample = self._read(entry)
                if sample is None:
                    bad_in_a_row += 1
                    continue
                bad_in_a_row = 0
                self.position = Position(epoch, index + 1, -turn % self.world_size)
                yield sample
            if bad_in_a_row >= count:
                raise TrainingDataError(
                    f"None of the samples can be used; {len(self.bad)} are bad, e.g. {self._bad_names()}.\n"
                    "Look at the files and their captions."
                )
            epoch, behind = epoch + 1, 0

    def order(self, epoch: int) -> Iterator[Entry]:
        """All entries of an epoch, whatever process uses them."""
        rng = np.random.default_rng((self.seed, epoch))
        shards = [self.shards[n] for n in rng.permutation(len(self.shards))]
        return _shuffled((entry for shard in shards for entry in entries_of(shard)), rng, self.buffer_size)

    def _read(self, entry: Entry) -> Sample | None:
        try:
            return read_sample(entry)
        except TrainingDataError as error:
            if self.on_bad == "stop":
                raise
            if entry.key not in self.bad:
                self.bad[entry.key] = str(error)
                logger.warning("Sample %d passed over: %s", len(self.bad), str(error).splitlines()[0])
            return None

    def _bad_names(self) -> str:
        return ", ".join(f'"{key}"' for key in list(self.bad)[:SHOWN_NAMES])


@dataclass(frozen=True)
class CaptionPool:
    """Real pictures kept on disk at one size, with ScenePool's way of asking for pixels.

    Attributes:
        images: (N, side, side, 3) uint8.
        texts: caption of each.
        keys: where each came from.
    """

    images: np.ndarray
    texts: list[str]
    keys: list[str]

    def __len__(self) -> int:
        return len(self.texts)

    def pixels(self, rows: np.ndarray) -> Tensor:
        """Pictures as (B, 3, side, side) float in [0, 1]."""
        return torch.from_numpy(self.images[rows]).permute(0, 3, 1, 2).float() / 255

    def captions(self, rows: np.ndarray) -> list[str]:
        """Captions of rows."""
        return [self.texts[row] for row in rows]


def load_caption_pool(
    paths: Path | Sequence[Path], side: int, folder: Path, *, on_bad: str = "stop"
) -> CaptionPool:
    """All samples of tars and folders, cropped to squares; decoded once, then read from `folder`.

    Args:
        side: of the pictures, pixels; the short side is scaled to it and the middle is kept.
        on_bad: see SampleStream; samples passed over are named in the log and in the pool's .json file.

    Raises:
        TrainingDataError: see SampleStream.
    """
    assert on_bad in ON_BAD, f"on_bad {on_bad!r} must be one of {ON_BAD}"
    shards = find_shards(paths)
    name = f"captions_{side}_{_fingerprint(shards)}"
    pictures, index = folder / f"{name}.u8", folder / f"{name}.json"
    if not (pictures.is_file() and index.is_file()):
        folder.mkdir(parents=True, exist_ok=True)
        bad, texts, keys = {}, [], []
        temporary = pictures.with_suffix(f".{os.getpid()}.new")
        with temporary.open("wb") as file:
            for entry in (entry for shard in shards for entry in entries_of(shard)):
                try:
                    sample = read_sample(entry)
                except TrainingDataError as error:
                    if on_bad == "stop":
                        temporary.unlink()
                        raise
                    bad[entry.key] = str(error)
                    continue
                file.write(np.asarray(fit_size(sample.picture, side, side)).tobytes())
                texts.append(sample.caption)
                keys.append(sample.key)
        os.replace(temporary, pictures)
        temporary.write_text(
            json.dumps({"texts": texts, "keys": keys, "bad": bad}, ensure_ascii=False), "utf-8"
        )
        os.replace(temporary, index)
    stored = json.loads(index.read_text("utf-8"))
    if stored["bad"]:
        if on_bad == "stop":
            raise TrainingDataError(next(iter(stored["bad"].values())))
        names = ", ".join(f'"{key}"' for key in list(stored["bad"])[:SHOWN_NAMES])
        logger.warning(
            "%d samples passed over, e.g. %s; all are listed in %s", len(stored["bad"]), names, index
        )
    if not stored["texts"]:
        raise TrainingDataError(
            f'None of the {len(stored["bad"])} samples can be used; the reasons are in "{index}".\n'
            "Look at the files and their captions."
        )
    shape = (len(stored["texts"]), side, side, 3)
    return CaptionPool(np.memmap(pictures, np.uint8, "r", shape=shape), stored["texts"], stored["keys"])


def _tar_entries(path: Path) -> Iterator[Entry]:
    end, has_picture = 0, False
    key, parts = "", {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                size = member.size if member.isfile() else 0
                end = member.offset_data + -(-size // TAR_BLOCK) * TAR_BLOCK
                match = MEMBER_NAME.match(member.name)
                if not member.isfile() or match is None:
                    continue
                if match[1] != key:
                    if entry := _tar_entry(path, key, parts):
                        has_picture |= entry.picture is not None
                        yield entry
                    key, parts = match[1], {}
                suffix = f".{match[2].lower()}"
                if suffix in parts:
                    raise TrainingDataError(
                        f'"{path}" holds "{member.name}" twice in one sample.\nWrite the tar again with different names.'
                    )
                parts[suffix] = FileSpan(path, member.offset_data, member.size)
            if entry := _tar_entry(path, key, parts):
                has_picture |= entry.picture is not None
                yield entry
    except (tarfile.TarError, OSError) as error:
        raise TrainingDataError(
            f'"{path}" cannot be read as a tar.\nDownload it again; a compressed tar must be decompressed first. ({error})'
        ) from error
    # tarfile takes a file cut off between two members for a whole one; a whole one ends in blocks of zeros.
    is_cut = path.stat().st_size < end + TAR_BLOCK or FileSpan(path, end, TAR_BLOCK).read() != bytes(
        TAR_BLOCK
    )
    if end and is_cut:
        raise TrainingDataError(f'"{path}" is cut off after {end} bytes.\nDownload it again.')
    if not has_picture:
        raise TrainingDataError(
            f'"{path}" holds no picture ({", ".join(PICTURE_SUFFIXES)}).\n'
            "Expected pairs of files like 000001.jpg and 000001.txt."
        )


def _tar_entry(path: Path, key: str, parts: dict[str, FileSpan]) -> Entry | None:
    """A group of files of one key; None where neither a picture nor a caption is among them."""
    picture = next((parts[suffix] for suffix in PICTURE_SUFFIXES if suffix in parts), None)
    caption = next((parts[suffix] for suffix in CAPTION_SUFFIXES if suffix in parts), None)
    if picture is None and caption is None:
        return None
    return Entry(f"{path}:{key}", picture, caption)


def _shuffled(entries: Iterator[Entry], rng: np.random.Generator, size: int) -> Iterator[Entry]:
    held: list[Entry] = []
    for entry in entries:
        if len(held) < size:
            held.append(entry)
            continue
        place = int(rng.integers(size))
        yield held[place]
        held[place] = entry
    for place in rng.permutation(len(held)):
        yield held[place]


def _decode_text(content: bytes, key: str) -> str:
    try:
        return content.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise TrainingDataError(
            f'The caption of "{key}" is not UTF-8 text.\nSave it as UTF-8. ({error})'
        ) from error


def _fingerprint(shards: Sequence[Path]) -> str:
    """Changes when a shard or the caption beside a picture does."""
    digest = hashlib.sha256()
    for shard in shards:
        beside = [shard.with_name(shard.stem + suffix) for suffix in CAPTION_SUFFIXES]
        for path in (shard, *(path for path in beside if path.is_file())):
            stat = path.stat()
            digest.update(f"{path.resolve()}:{stat.st_size}:{stat.st_mtime_ns};".encode())
    return digest.hexdigest()[:12]
