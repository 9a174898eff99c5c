"""Pictures with captions from a folder or from webdataset tars, streamed; the published format of pretraining data."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from ..blip3o_core.errors import TrainingDataError

PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
SHUFFLE_BUFFER = 1000


@dataclass(frozen=True)
class Sample:
    """One picture with its caption; `key` says where it came from."""

    key: str
    picture: Image.Image
    caption: str


def folder_samples(folder: Path) -> list[tuple[Path, Path]]:
    """Pictures of a folder and the caption file beside each.

    Raises:
        TrainingDataError: no pictures, or captions missing.
    """
    pictures = sorted(path for path in folder.rglob("*") if path.suffix.lower() in PICTURE_SUFFIXES)
    if not pictures:
        raise TrainingDataError(
            f'There are no pictures in "{folder}".\nPut files ending in {", ".join(PICTURE_SUFFIXES)} there.'
        )
    bare = [path for path in pictures if not path.with_suffix(".txt").is_file()]
    if bare:
        raise TrainingDataError(
            f'No caption for {len(bare)} of {len(pictures)} pictures in "{folder}", e.g. "{bare[0].name}".\n'
            f'Put a text file of the same name beside each picture ("{bare[0].stem}.txt").'
        )
    return [(path, path.with_suffix(".txt")) for path in pictures]


def read_folder(
    folder: Path, *, seed: int, rank: int = 0, world: int = 1, epochs: int | None = None
) -> Iterator[Sample]:
    """Samples of a folder in a new order each epoch; every process gets its share.

    Args:
        epochs: None = without end.
    """
    pairs = folder_samples(folder)
    epoch = 0
    while epochs is None or epoch < epochs:
        order = np.random.default_rng((seed, epoch)).permutation(len(pairs))
        for n in order[rank::world]:
            picture, caption = pairs[n]
            yield Sample(
                str(picture), _open(picture.read_bytes(), str(picture)), caption.read_text("utf-8").strip()
            )
        epoch += 1


def read_tars(
    tars: list[Path],
    *,
    seed: int,
    rank: int = 0,
    world: int = 1,
    epochs: int | None = None,
    buffer: int = SHUFFLE_BUFFER,
) -> Iterator[Sample]:
    """Samples of webdataset tars (key.jpg or key.png with key.txt), read front to back, never unpacked.

    Args:
        rank, world: with at least `world` tars every process reads its own tars, else its own samples.
        buffer: samples held for shuffling; 1 = file order.

    Raises:
        TrainingDataError: no tars, a damaged one, or one without pairs.
    """
    if not tars:
        raise TrainingDataError("There are no tars to read.\nGive a folder of .tar files or a list of them.")
    epoch = 0
    while epochs is None or epoch < epochs:
        rng = np.random.default_rng((seed, epoch))
        order = [tars[n] for n in rng.permutation(len(tars))]
        by_tar = len(order) >= world
        stream = (sample for tar in (order[rank::world] if by_tar else order) for sample in tar_samples(tar))
        if not by_tar:
            stream = (sample for n, sample in enumerate(stream) if n % world == rank)
        yield from _shuffled(stream, rng, buffer)
        epoch += 1


def tar_samples(path: Path) -> Iterator[Sample]:
    """Samples of one tar in its order; files of one sample stand next to each other, as webdataset wants."""
    found = 0
    try:
        with tarfile.open(path, "r|*") as tar:
            key, parts = "", {}
            for member in tar:
                if not member.isfile():
                    continue
                base, _, suffix = member.name.partition(".")
                if base != key:
                    key, parts = base, {}
                parts["." + suffix.lower()] = tar.extractfile(member).read()
                picture = next((parts[s] for s in PICTURE_SUFFIXES if s in parts), None)
                if picture is not None and ".txt" in parts:
                    found += 1
                    name = f"{path}:{key}"
                    yield Sample(name, _open(picture, name), parts[".txt"].decode("utf-8").strip())
                    parts = {}
    except tarfile.TarError as error:
        raise TrainingDataError(f'"{path}" cannot be read as a tar.\nDownload it again. ({error})') from error
    if not found:
        raise TrainingDataError(
            f'"{path}" holds no pair of picture and caption.\nExpected files like 000001.jpg and 000001.txt.'
        )


def find_tars(folder: Path) -> list[Path]:
    """The .tar files of a folder and its subfolders, sorted."""
    return sorted(folder.rglob("*.tar"))


def _shuffled(stream: Iterator[Sample], rng: np.random.Generator, size: int) -> Iterator[Sample]:
    held: list[Sample] = []
    for sample in stream:
        if len(held) < size:
            held.append(sample)
            continue
        place = int(rng.integers(size))
        yield held[place]
        held[place] = sample
    for place in rng.permutation(len(held)):
        yield held[place]


def _open(content: bytes, name: str) -> Image.Image:
    try:
        return Image.open(io.BytesIO(content)).convert("RGB")
    except (UnidentifiedImageError, OSError) as error:
        raise TrainingDataError(
            f'"{name}" is not a picture we can read.\nRemove or replace it. ({error})'
        ) from error
