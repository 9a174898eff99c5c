"""A training set on disk: its pictures, the prompts that come of its captions, and what is wrong with it."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import tarfile
import unicodedata
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from PIL import ExifTags, Image, ImageOps

from ...blip3o_core.config import PICTURE_SUFFIXES
from ...blip3o_core.errors import MissingFilesError, TrainingDataError
from ...blip3o_core.file_span import FileSpan
from ...blip3o_core.images import to_rgb
from ...blip3o_core.untrusted import brief, inner_path, parse_object, quote, whole_number
from ..config import DataConfig, LoraConfig

# Pictures to an artist, but Pillow needs a plugin for them, or cannot read them at all.
FOREIGN_SUFFIXES = (".heic", ".heif", ".jxl", ".psd", ".svg", ".raw", ".cr2", ".nef", ".arw", ".dng", ".exr")
# The first that is there counts.
CAPTION_SUFFIXES = (".txt", ".caption")
METADATA_NAME = "metadata.jsonl"
METADATA_KEYS = ("file_name", "text", "texts", "weight", "split", "mask")
SPLITS = {"train": False, "held_out": True, "val": True, "validation": True, "test": True}
MASK_ENDING = "_mask"
TRIGGER_PLACE = "[trigger]"
REPEATS_FOLDER = re.compile(r"(\d+)_.+")
# webdataset's rule: the key ends at the first dot of the file name.
TAR_MEMBER = re.compile(r"^((?:.*/)?[^./]+)\.([^/]*)$")
DIGEST_DIGITS = 24
AUTO_HOLDOUT_FROM = 10
AUTO_HOLDOUT_SHARE = 0.1
# A look is a picture squeezed to so many columns and rows of RGB: enough to see that two are the same.
LOOK_SIZE = (17, 16)
# Windows refuses longer paths unless they carry its prefix.
WINDOWS_PATH_LIMIT = 240
ORIENTATIONS_ON_THE_SIDE = (5, 6, 7, 8)
# The longest side of a JPEG. Pillow bounds the area alone, and resizing a line of a hundred million takes gigabytes.
MAX_SIDE = 65_535
MAX_REPEATS = 10_000


@dataclass(frozen=True)
class Problem:
    """Something wrong with a training set.

    Attributes:
        level: an error stops a run, a warning does not.
        kind: short and fixed, for badges and tests.
        text: what it is, and what to do.
        names: the files that have it.
        details: a remark on each of them, or none.
    """

    level: Literal["error", "warning"]
    kind: str
    text: str
    names: tuple[str, ...] = ()
    details: tuple[str, ...] = ()

    def __str__(self) -> str:
        remarks = self.details or ("",) * len(self.names)
        listed = "".join(
            f"\n    {name}{f' ({remark})' if remark else ''}"
            for name, remark in zip(self.names, remarks, strict=True)
        )
        return f"{self.level.upper()}: {self.text}{listed}"


@dataclass(frozen=True)
class Item:
    """A readable picture with its texts.

    Attributes:
        name: path below the training set, with "/".
        file: where its bytes are.
        digest: hash of these bytes.
        width, height: pixels, upright.
        look: the picture as 17 x 16 RGB values, to find duplicates.
        captions: as written; empty = none.
        prompts: the captions with prefix and trigger; empty = the picture is not trained on.
        class_prompts: the same with the class word for the trigger; empty without trigger and class word.
        repeats: how often it counts in a pass over the set.
        weight: of its loss.
        mask: picture file that says what counts.
        caption_path: where its caption is or would be written; None inside a tar and where metadata.jsonl has it.
    """

    name: str
    file: FileSpan
    digest: str
    width: int
    height: int
    has_alpha: bool
    look: bytes
    captions: tuple[str, ...] = ()
    prompts: tuple[str, ...] = ()
    class_prompts: tuple[str, ...] = ()
    repeats: int = 1
    weight: float = 1.0
    mask: FileSpan | None = None
    is_held_out: bool = False
    caption_path: Path | None = None

    def open(self) -> Image.Image:
        """The picture, upright, in the mode of its file."""
        return open_upright(self.file.read(), self.name)


@dataclass(frozen=True)
class Dataset:
    """A training set.

    Attributes:
        items: readable pictures, sorted by name; those without prompts are not trained on.
        problems: everything found wrong while reading.
        regularisation: items of the regularisation folder, see scan_run.
    """

    config: DataConfig
    items: tuple[Item, ...]
    problems: tuple[Problem, ...] = ()
    regularisation: tuple[Item, ...] = ()

    @property
    def train(self) -> tuple[Item, ...]:
        """Items that are trained on."""
        return tuple(item for item in self.items if item.prompts and not item.is_held_out)

    @property
    def held_out(self) -> tuple[Item, ...]:
        """Items that only measure what was learned."""
        return tuple(item for item in self.items if item.prompts and item.is_held_out)

    @property
    def used(self) -> tuple[Item, ...]:
        """Every item that a run reads, regularisation last."""
        return self.train + self.held_out + tuple(item for item in self.regularisation if item.prompts)

    @property
    def prompts(self) -> tuple[str, ...]:
        """Every prompt of the used items, once, in order."""
        return tuple(
            dict.fromkeys(prompt for item in self.used for prompt in item.prompts + item.class_prompts)
        )

    @property
    def fingerprint(self) -> str:
        """Hash of everything that a run reads from it, 16 hex digits."""
        digest = hashlib.sha256()
        for item in self.used:
            mask = hashlib.sha256(item.mask.read()).hexdigest() if item.mask else ""
            row = [item.digest, item.prompts, item.class_prompts, item.repeats, item.weight, item.is_held_out]
            digest.update(json.dumps([*row, mask]).encode())
        return digest.hexdigest()[:16]


@dataclass
class _Found:
    """A picture of a training set, not looked into yet. `texts` None = it has no caption at all."""

    name: str
    file: FileSpan
    texts: list[str] | None = None
    repeats: int = 1
    weight: float = 1.0
    is_held_out: bool | None = None
    mask: FileSpan | None = None
    caption_path: Path | None = None


@dataclass
class _Problems:
    """Problems by kind and text; each file is added to the one it has."""

    found: dict[tuple[str, str, str], list[str]] = field(default_factory=dict)

    def add(self, level: Literal["error", "warning"], kind: str, text: str, *names: str) -> None:
        self.found.setdefault((level, kind, text), []).extend(names)

    def listed(self) -> tuple[Problem, ...]:
        return tuple(
            Problem(level, kind, text, tuple(dict.fromkeys(names)))
            for (level, kind, text), names in self.found.items()
        )


def scan_dataset(config: DataConfig) -> Dataset:
    """Read a training set: every picture is decoded once, every caption read; what is wrong is collected, not raised.

    Raises:
        MissingFilesError: the folder or tar is not there.
    """
    root = reachable(config.path)
    if not root.exists():
        raise MissingFilesError(
            f'There is no training set at "{config.path}".\nName a folder of pictures or a .tar file (data.path).'
        )
    problems = _Problems()
    found = _read_folder(root, config, problems) if root.is_dir() else _read_tar(root, config, problems)
    if not found:
        problems.add(
            "error",
            "empty",
            f'There is no picture in "{config.path}". Put pictures there ({", ".join(PICTURE_SUFFIXES)}), each with a '
            "text file of the same name.",
        )
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        looked_at = list(pool.map(_look_at, found))
    items = []
    for entry, looked in zip(found, looked_at, strict=True):
        if isinstance(looked, str):
            is_skipped = config.bad_image == "skip"
            remedy = (
                "They are left out." if is_skipped else "Mend or remove them, or set data.bad_image to skip."
            )
            problems.add("warning" if is_skipped else "error", "unreadable", f"{looked} {remedy}", entry.name)
        else:
            items.append(_with_prompts(looked, entry, config, problems))
    items = _hold_out(items, found, config)
    return Dataset(config, tuple(items), problems.listed())


def scan_run(config: LoraConfig) -> Dataset:
    """The training set of a run, with its regularisation pictures.

    Raises:
        MissingFilesError: see scan_dataset.
    """
    dataset = scan_dataset(config.data)
    if config.train.prior.reg_path is None:
        return dataset
    settings = replace(
        config.data, path=config.train.prior.reg_path, trigger="", class_word="", holdout="none"
    )
    regularisation = scan_dataset(replace(settings, caption=replace(settings.caption, prefix="")))
    problems = tuple(
        replace(problem, text=f"Regularisation: {problem.text}") for problem in regularisation.problems
    )
    return replace(dataset, problems=dataset.problems + problems, regularisation=regularisation.items)


def assemble_prompts(caption: str, config: DataConfig) -> tuple[str, str]:
    """The prompt of a caption, and the same with the class word for the trigger ("" without trigger and class word).

    The prefix is put before the caption. `[trigger]` stands for the trigger; a caption that names it neither so nor
    in full gets it in front. Runs of white space become one space.
    """
    text = " ".join(f"{config.caption.prefix} {caption}".split())
    trigger = " ".join(config.trigger.split())
    if not trigger:
        return text, ""
    text = _as_words(trigger).sub(lambda _: TRIGGER_PLACE, text)
    if TRIGGER_PLACE not in text:
        text = f"{TRIGGER_PLACE}, {text}" if text else TRIGGER_PLACE
    class_word = " ".join(config.class_word.split())
    return text.replace(TRIGGER_PLACE, trigger), text.replace(TRIGGER_PLACE, class_word) if class_word else ""


def names_trigger(caption: str, config: DataConfig) -> bool:
    """Whether a caption says where the trigger goes, itself or through the prefix."""
    text = " ".join(f"{config.caption.prefix} {caption}".split())
    return TRIGGER_PLACE in text or bool(_as_words(" ".join(config.trigger.split())).search(text))


def fill_in(prompt: str, config: DataConfig) -> str:
    """A prompt of the configuration with its `{trigger}` and `{class}` filled in."""
    return " ".join(prompt.replace("{trigger}", config.trigger).replace("{class}", config.class_word).split())


def open_upright(data: bytes, name: str) -> Image.Image:
    """A picture of a file's bytes, turned upright, in the mode of the file.

    Raises:
        TrainingDataError: it cannot be decoded.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            return ImageOps.exif_transpose(image)
    except Exception as error:  # Pillow's decoders raise almost anything on damaged files
        raise TrainingDataError(f'"{name}": {_cause(data, error)}\nMend or remove it.') from error


def reachable(path: Path, system: str = os.name) -> Path:
    """The path in a form that opens files below it however long their names get."""
    if system != "nt" or str(path).startswith("\\\\"):
        return path
    full = os.path.abspath(path)
    return Path(f"\\\\?\\{full}") if len(full) > WINDOWS_PATH_LIMIT // 2 else path


def _as_words(words: str) -> re.Pattern[str]:
    """Finds words as a whole, whatever their case."""
    return re.compile(rf"(?<!\w){re.escape(words)}(?!\w)", re.IGNORECASE)


# Folders


def _read_folder(root: Path, config: DataConfig, problems: _Problems) -> list[_Found]:
    files = sorted(_walk(root, problems), key=lambda path: path.relative_to(root).as_posix())
    by_stem: dict[tuple[Path, str], dict[str, Path]] = {}
    for path in files:
        by_stem.setdefault((path.parent, _same_form(path.stem)), {})[path.suffix.lower()] = path
    pictures = [path for path in files if path.suffix.lower() in PICTURE_SUFFIXES]
    masks, pictures = _split_masks(pictures, root, config, problems)
    foreign = [path for path in files if path.suffix.lower() in FOREIGN_SUFFIXES]
    if foreign:
        problems.add(
            "warning",
            "format",
            "These files are not read. Save them as PNG or JPEG if they belong to the set.",
            *(_name(path, root) for path in foreign),
        )
    listed = _read_metadata(root, problems) if (root / METADATA_NAME).is_file() else {}
    found = []
    for path in pictures:
        name = _name(path, root)
        siblings = by_stem[path.parent, _same_form(path.stem)]
        entry = _Found(
            name,
            FileSpan(path),
            repeats=_repeats(path, root, problems),
            mask=masks.get((path.parent, _same_form(path.stem))),
        )
        entry.texts, entry.caption_path = _caption_beside(path, root, siblings, problems)
        if name in listed:
            _apply_metadata(entry, listed.pop(name), root, config, problems)
        found.append(entry)
    for name in listed:
        problems.add(
            "error",
            "metadata",
            f"{METADATA_NAME} names pictures that are not there. Correct the names.",
            name,
        )
    stems = {(path.parent, _same_form(path.stem)) for path in pictures}
    stray = [
        path
        for path in files
        if path.suffix.lower() in CAPTION_SUFFIXES and (path.parent, _same_form(path.stem)) not in stems
    ]
    if stray:
        problems.add(
            "warning",
            "caption without picture",
            "These texts belong to no picture: a caption has its picture's name. Rename or remove them.",
            *(_name(path, root) for path in stray),
        )
    return found


def _walk(root: Path, problems: _Problems) -> Iterator[Path]:
    """Files below a folder; what begins with a dot or underscores is what systems leave behind."""

    def refuse(error: OSError) -> None:
        problems.add(
            "error",
            "unreadable",
            "These folders cannot be opened. Change their permissions.",
            str(error.filename),
        )

    for folder, subfolders, names in os.walk(root, onerror=refuse):
        subfolders[:] = [name for name in subfolders if not name.startswith((".", "__"))]
        yield from (Path(folder) / name for name in names if not name.startswith("."))


def _split_masks(
    pictures: list[Path], root: Path, config: DataConfig, problems: _Problems
) -> tuple[dict[tuple[Path, str], FileSpan], list[Path]]:
    """`NAME_mask` files by their picture's folder and stem, and the other pictures."""
    stems = {(path.parent, _same_form(path.stem)) for path in pictures}
    masks, others, unread = {}, [], []
    for path in pictures:
        stem = _same_form(path.stem)
        owner = (path.parent, stem.removesuffix(MASK_ENDING))
        if not stem.endswith(MASK_ENDING) or owner not in stems:
            others.append(path)
        elif config.mask == "files":
            masks[owner] = FileSpan(path)
        else:
            unread.append(_name(path, root))
    if unread:
        problems.add(
            "warning",
            "mask",
            "These look like masks of other pictures and are not trained on. Set data.mask to files to use them as "
            "masks, or rename them.",
            *unread,
        )
    return masks, others


def _caption_beside(
    path: Path, root: Path, siblings: Mapping[str, Path], problems: _Problems
) -> tuple[list[str] | None, Path]:
    """The captions in the text file beside a picture, one a line (None = no such file), and the file's path."""
    name = _name(path, root)
    texts = [siblings[suffix] for suffix in CAPTION_SUFFIXES if suffix in siblings]
    if not texts:
        return None, path.with_suffix(CAPTION_SUFFIXES[0])
    if len(texts) > 1:
        problems.add(
            "warning",
            "caption",
            "These have a .txt and a .caption file; the .txt counts. Remove one of the two.",
            name,
        )
    if not _belongs(texts[0], path, root):
        text = "The captions of these are links that lead out of the training set. Put the texts themselves there."
        problems.add("error", "caption", text, name)
        return [], texts[0]
    try:
        data = FileSpan(texts[0]).read()
    except OSError as error:
        problems.add("error", "caption", f"The captions of these cannot be read ({error.strerror}).", name)
        return [], texts[0]
    return _lines(data, name, problems), texts[0]


def _belongs(caption: Path, picture: Path, root: Path) -> bool:
    """Whether a caption's text lies in the training set, or is linked there together with its picture.

    A shared folder could else link a caption to any text of this computer, which would then be learned and shown.
    """
    text, shown, inside = (Path(os.path.realpath(path)) for path in (caption, picture, root))
    return text.is_relative_to(inside) or (text.parent == shown.parent and text.stem == shown.stem)


def _lines(data: bytes, name: str, problems: _Problems) -> list[str]:
    encoding = "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError:
        problems.add(
            "error", "caption", "The captions of these are not UTF-8 text. Save them anew as UTF-8.", name
        )
        return []
    return [line.strip() for line in text.splitlines() if line.strip()]


def _read_metadata(root: Path, problems: _Problems) -> dict[str, dict[str, Any]]:
    """Rows of metadata.jsonl by the name of their picture."""
    rows: dict[str, dict[str, Any]] = {}
    try:
        lines = (root / METADATA_NAME).read_text("utf-8-sig").splitlines()
    except (UnicodeDecodeError, OSError) as error:
        text = f"{METADATA_NAME} cannot be read as UTF-8 text ({brief(error)}). Save it anew as UTF-8."
        problems.add("error", "metadata", text)
        return rows
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = parse_object(line)
            name = PurePosixPath(row["file_name"].replace("\\", "/"))
        except (ValueError, LookupError, TypeError, AttributeError):
            problems.add(
                "error",
                "metadata",
                f'These lines of {METADATA_NAME} are no JSON object with a "file_name". Correct them.',
                f"line {number}",
            )
            continue
        if name.is_absolute() or ".." in name.parts:
            problems.add(
                "error",
                "metadata",
                f"{METADATA_NAME} names files outside the training set.",
                quote(str(name)).strip('"'),
            )
            continue
        for key in row.keys() - set(METADATA_KEYS):
            problems.add(
                "warning",
                "metadata",
                f'{METADATA_NAME} has the key "{key}", which is not read. Known: {", ".join(METADATA_KEYS)}.',
                str(name),
            )
        rows[str(name)] = row
    return rows


def _apply_metadata(
    entry: _Found, row: Mapping[str, Any], root: Path, config: DataConfig, problems: _Problems
) -> None:
    texts = row.get("texts", row.get("text"))
    if texts is not None:
        texts = [texts] if isinstance(texts, str) else texts
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            wrong = 'In metadata.jsonl "text" must be a text and "texts" a list of texts.'
            problems.add("error", "metadata", wrong, entry.name)
            texts = []
        if entry.texts:
            both = f"These have captions in {METADATA_NAME} and beside the picture; the former count."
            problems.add("warning", "caption", both, entry.name)
        entry.texts = [text.strip() for text in texts if text.strip()]
        entry.caption_path = None
    weight = row.get("weight", 1.0)
    if isinstance(weight, (int, float)) and not isinstance(weight, bool) and 0 <= weight <= 100:
        entry.weight = float(weight)
    else:
        wrong = 'In metadata.jsonl "weight" must be a number from 0 to 100.'
        problems.add("error", "metadata", wrong, entry.name)
    if "split" in row:
        if isinstance(row["split"], str) and row["split"] in SPLITS:
            entry.is_held_out = SPLITS[row["split"]]
        else:
            wrong = f'In {METADATA_NAME} "split" must be one of {", ".join(SPLITS)}.'
            problems.add("error", "metadata", wrong, entry.name)
    if row.get("mask") and config.mask == "files":
        mask = inner_path(root, row["mask"].replace("\\", "/")) if isinstance(row["mask"], str) else None
        if mask is None or not os.path.isfile(mask):  # Path.is_file raises where a name is too long
            wrong = f"{METADATA_NAME} names masks that are not in the training set. Correct the names."
            problems.add("error", "mask", wrong, quote(row["mask"]).strip('"'))
        else:
            entry.mask = FileSpan(mask)


def _repeats(path: Path, root: Path, problems: _Problems) -> int:
    """The number before the nearest `N_name` folder below the root."""
    for parent in path.relative_to(root).parents:
        match = REPEATS_FOLDER.fullmatch(parent.name)
        if match:
            number = whole_number(match[1])
            if number is None or number > MAX_REPEATS:
                text = f"The number before these folders' names counts repeats, at most {MAX_REPEATS:,}. Rename them."
                problems.add("error", "repeats", text, quote(parent.name))
                return 1
            return max(1, number)
    return 1


def _name(path: Path, root: Path) -> str:
    """The path as text that can be shown and written, also where a file's name is no proper text."""
    return os.fsencode(path.relative_to(root).as_posix()).decode("utf-8", "replace")


def _same_form(stem: str) -> str:
    """macOS writes accents decomposed, others composed."""
    return unicodedata.normalize("NFC", stem)


# Tars


def _read_tar(path: Path, config: DataConfig, problems: _Problems) -> list[_Found]:
    """Samples of a webdataset tar: members that share a name up to its first dot."""
    members: dict[str, dict[str, tuple[str, FileSpan]]] = {}
    try:
        # "r:" = not compressed, so that members can be read in place.
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                match = TAR_MEMBER.match(member.name)
                if member.isfile() and match and not PurePosixPath(member.name).name.startswith("."):
                    span = FileSpan(path, member.offset_data, member.size)
                    members.setdefault(match[1], {})[f".{match[2].lower()}"] = (member.name, span)
    except (tarfile.TarError, EOFError, OSError) as error:
        text = f"The training set is no complete, uncompressed tar ({brief(error)}). Pack it again, or name a folder."
        problems.add("error", "unreadable", text, path.name)
    found = []
    for key in sorted(members):
        parts = members[key]
        suffix = next((suffix for suffix in PICTURE_SUFFIXES if suffix in parts), None)
        if suffix is None:
            problems.add("warning", "caption without picture", "These members hold no picture.", key)
            continue
        name, span = parts[suffix]
        entry = _Found(name, span)
        text = next((parts[suffix][1] for suffix in CAPTION_SUFFIXES if suffix in parts), None)
        if text is not None:
            try:
                entry.texts = _lines(text.read(), name, problems)
            except OSError as error:
                problems.add(
                    "error", "caption", f"The captions of these cannot be read ({error.strerror}).", name
                )
                entry.texts = []
        if config.mask == "files" and ".mask.png" in parts:
            entry.mask = parts[".mask.png"][1]
        found.append(entry)
    return found


# Pictures


def _look_at(found: _Found) -> Item | str:
    """The item of a picture, decoded completely, or why it cannot be."""
    try:
        data = found.file.read()
    except OSError as error:
        return f"These files cannot be read ({error.strerror})."
    try:
        with Image.open(io.BytesIO(data)) as image:
            width, height = image.size
            if max(width, height) > MAX_SIDE:
                return f"These pictures have a side above {MAX_SIDE:,} pixels. Cut them smaller."
            is_turned = image.getexif().get(ExifTags.Base.Orientation) in ORIENTATIONS_ON_THE_SIDE
            # JPEG only: all its bytes are read, but fewer pixels made.
            image.draft("RGB", (128, 128))
            image.load()
            has_alpha = "A" in image.getbands() or "transparency" in image.info
            small = to_rgb(ImageOps.exif_transpose(image)).resize(LOOK_SIZE, Image.Resampling.BOX)
    except Exception as error:  # Pillow's decoders raise almost anything on damaged files
        return _cause(data, error)
    if is_turned:
        width, height = height, width
    return Item(
        name=found.name,
        file=found.file,
        digest=hashlib.sha256(data).hexdigest()[:DIGEST_DIGITS],
        width=width,
        height=height,
        has_alpha=has_alpha,
        look=small.tobytes(),
        captions=tuple(found.texts or ()),
        repeats=found.repeats,
        weight=found.weight,
        mask=found.mask,
        caption_path=found.caption_path,
    )


def _cause(data: bytes, error: Exception) -> str:
    if not data:
        return "These files are empty (0 bytes)."
    if isinstance(error, Image.UnidentifiedImageError):
        return "These files are no pictures, whatever their names say."
    if isinstance(error, Image.DecompressionBombError):
        return "These pictures are too large to open safely (over 178 megapixels). Save them smaller."
    if "truncated" in str(error).lower() or isinstance(error, EOFError):
        return "These pictures are cut short: the copy or download stopped half way."
    return f"These pictures are damaged ({brief(error)})."


# Prompts and held-out pictures


def _with_prompts(item: Item, found: _Found, config: DataConfig, problems: _Problems) -> Item:
    captions = item.captions
    if not captions:
        kind = "missing caption" if found.texts is None else "empty caption"
        what = "have no caption" if found.texts is None else "have an empty caption"
        missing = config.caption.missing
        if missing == "error":
            remedy = (
                "Write a text file of the same name beside each, let BLIP3-o write them (blip3o lora caption), or set "
                "data.caption.missing to trigger or skip."
            )
            problems.add("error", kind, f"These pictures {what}. {remedy}", item.name)
        elif missing == "skip":
            problems.add("warning", kind, f"These pictures {what} and are left out.", item.name)
        elif config.trigger.strip():
            captions = (TRIGGER_PLACE,)
            problems.add("warning", kind, f"These pictures {what}; the trigger stands for it.", item.name)
        else:
            text = f"These pictures {what} and data.trigger is empty, so there is no prompt. Give a trigger."
            problems.add("error", kind, text, item.name)
    if not config.trigger.strip() and any(
        TRIGGER_PLACE in caption for caption in (*captions, config.caption.prefix)
    ):
        text = (
            f"These captions hold {TRIGGER_PLACE}, but data.trigger is empty. Give a trigger, or take it out."
        )
        problems.add("error", "trigger", text, item.name)
    pairs = list(dict.fromkeys(assemble_prompts(caption, config) for caption in captions))
    return replace(
        item,
        prompts=tuple(prompt for prompt, _ in pairs),
        class_prompts=tuple(prompt for _, prompt in pairs if prompt),
    )


def _hold_out(items: list[Item], found: list[_Found], config: DataConfig) -> list[Item]:
    """Mark held-out items: those that metadata.jsonl names, else the share with the smallest hashes of content.

    Copies of one picture stay together. A picture that is added changes the choice by one at most.
    """
    told = {entry.name: entry.is_held_out for entry in found}
    if any(told.values()):
        return [replace(item, is_held_out=bool(told[item.name])) for item in items]
    usable = sorted({item.digest for item in items if item.prompts and told[item.name] is None})
    if config.holdout == "none" or config.holdout == 0 or len(usable) < 2:
        return items
    if config.holdout == "auto":
        if len(usable) < AUTO_HOLDOUT_FROM:
            return items
        share = AUTO_HOLDOUT_SHARE
    else:
        share = config.holdout
    chosen = set(usable[: max(1, round(share * len(usable)))])
    return [replace(item, is_held_out=item.digest in chosen) for item in items]
