"""Where training reads and writes inside ComfyUI: folders of pictures, run folders, finished LoRA files."""

from __future__ import annotations

import hashlib
import itertools
import os
import shutil
from functools import lru_cache
from pathlib import Path

import folder_paths

from ...blip3o_core.checkpoints.safetensor_files import read_header
from ...blip3o_core.config import PICTURE_SUFFIXES
from ...blip3o_core.errors import BadInputError, Blip3oError, MissingFilesError
from ...blip3o_core.files import replacing
from ...blip3o_core.untrusted import is_inner_name, is_new_name, quote
from ...lora_training.config import BUILT_IN, LoraConfig, to_yaml
from ..native import host

EXAMPLE = "built-in: example"
EXAMPLE_FOLDER = Path(__file__).resolve().parents[2] / "lora_training" / "assets" / "example"
ARCHIVE_SUFFIX = ".tar"
FOLDER_DEPTH = 2
RUNS_FOLDER = "blip3o_training"
DIGEST_LETTERS = 8
RUN_KEY = "ss_output_name"


def roots() -> list[tuple[str, Path]]:
    """Label and folder of the places whose folders may hold training pictures."""
    found = [("input", Path(folder_paths.get_input_directory()))]
    if "datasets" in folder_paths.folder_names_and_paths:
        found += [("datasets", Path(folder)) for folder in folder_paths.get_folder_paths("datasets")]
    return found


def list_datasets() -> list[str]:
    """Names for the folder picker: the example, then every folder with pictures and every tar, as "name [place]"."""
    found = set()
    for label, root in roots():
        for path in _candidates(root, FOLDER_DEPTH):
            found.add(f"{path.relative_to(root).as_posix()} [{label}]")
    return [EXAMPLE, *sorted(found)]


def find_dataset(name: str) -> Path:
    """Folder or tar of a name from list_datasets.

    Raises:
        BadInputError: the name leads out of ComfyUI's folders.
        MissingFilesError: it is not there.
    """
    if name == EXAMPLE:
        return EXAMPLE_FOLDER
    words, _, place = name.removesuffix("]").rpartition(" [")
    # Judged by its words, not by where it resolves to: people link big folders to other disks.
    if not is_inner_name(words):
        raise BadInputError(
            f"The folder {quote(name)} leads out of ComfyUI's folders.\n"
            "Put your pictures into a folder inside ComfyUI's input folder, press R and choose it from the list."
        )
    for label, root in roots():
        if label == place and os.path.exists(root / words):
            return root / words
    raise MissingFilesError(
        f'There is no folder "{name}".\n'
        "Put your pictures into a folder inside ComfyUI's input folder, press R and choose it from the list."
    )


def _candidates(folder: Path, depth: int) -> list[Path]:
    """Folders with pictures below `folder`, and tars; a folder of "N_name" folders counts as one set."""
    found = []
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError:
        return []
    for entry in entries:
        if entry.name.startswith("."):
            continue
        path = Path(entry.path)
        if entry.is_file():
            if path.suffix.lower() == ARCHIVE_SUFFIX:
                found.append(path)
        elif entry.is_dir():
            if _holds_pictures(path):
                found.append(path)
            elif depth > 1:
                found += _candidates(path, depth - 1)
    return found


def _holds_pictures(folder: Path) -> bool:
    try:
        entries = list(os.scandir(folder))
    except OSError:
        return False
    return any(_is_picture(entry) for entry in entries) or any(
        entry.name.partition("_")[0].isdigit() and any(_is_picture(inner) for inner in os.scandir(entry.path))
        for entry in entries
        if entry.is_dir()
    )


def _is_picture(entry: os.DirEntry) -> bool:
    return entry.is_file() and os.path.splitext(entry.name)[1].lower() in PICTURE_SUFFIXES


# --- content ---------------------------------------------------------------------------------------------------------


def content_hash(path: Path) -> str:
    """Hash of the names and bytes of every file of a folder, or of one file; a file touched but not changed keeps it."""
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    digest = hashlib.sha256()
    for file in files:
        stat = file.stat()
        name = file.relative_to(path).as_posix() if path.is_dir() else file.name
        digest.update(f"{name}\0{_file_hash(str(file), stat.st_size, stat.st_mtime_ns)}\n".encode())
    return digest.hexdigest()


@lru_cache(maxsize=16384)
def _file_hash(path: str, size: int, changed: int) -> str:
    """Hash of a file's bytes; size and time of change only tell whether it has to be read again."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


# --- runs and finished files -----------------------------------------------------------------------------------------


def runs_folder() -> Path:
    """Folder of all runs, inside ComfyUI's output folder; their shared cache lies in it too."""
    return Path(folder_paths.get_output_directory()) / RUNS_FOLDER


def check_name(name: str) -> str:
    """A LoRA's name that is safe as a file name.

    Raises:
        BadInputError: it is empty or names another folder.
    """
    name = name.strip()
    if set(name) & set("/\\") or not is_new_name(name):
        raise BadInputError(
            f"{quote(name)} cannot be the name of a file.\nUse letters, digits, spaces, - and _ for the name of the LoRA."
        )
    return name


def run_digest(config: LoraConfig, content: str, checkpoint: str) -> str:
    """What tells runs of one name apart: every setting, the pictures and captions, and the checkpoint's weights."""
    return hashlib.sha256("\n".join([to_yaml(config), content, checkpoint]).encode()).hexdigest()[
        :DIGEST_LETTERS
    ]


def publish_lora(file: Path, name: str, run: str | None = None) -> str:
    """Copy a LoRA into models/loras; its name there.

    Args:
        run: the training it comes from: its earlier file of this name is replaced. Any other file of that name is kept,
            and the copy gets a number.
    """
    folder = Path(folder_paths.get_folder_paths("loras")[0])
    content = content_hash_of_bytes(file)
    numbered = (f"{name}_{number:02}.safetensors" for number in itertools.count(2))
    for target in map(folder.joinpath, itertools.chain([f"{name}.safetensors"], numbered)):
        if not target.exists() or (run is not None and _made_by(target) == run):
            break
        if content_hash_of_bytes(target) == content:
            return target.name
    with replacing(target) as temporary:
        shutil.copyfile(file, temporary)
    return target.name


def _made_by(file: Path) -> str | None:
    """Name of the run that a LoRA file says it comes from."""
    try:
        return read_header(file)[1].get(RUN_KEY)
    except Blip3oError:
        return None


def content_hash_of_bytes(file: Path) -> str:
    """Hash of one file's bytes, whatever it is called."""
    stat = file.stat()
    return _file_hash(str(file), stat.st_size, stat.st_mtime_ns)


def checkpoint_root(name: str) -> str:
    """Value of `model.root` for a name of the checkpoint widget."""
    return BUILT_IN if name == host.BUILT_IN else str(host.find_checkpoint(name))
