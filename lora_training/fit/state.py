"""States of a run on disk: whole or not there, never a pickle, and the newest one that loads is the one to go on from."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ...blip3o_core.errors import Blip3oError
from ...blip3o_core.units import format_bytes
from ...blip3o_core.untrusted import parse_object

logger = logging.getLogger(__name__)

ADAPTER, INTERNALS, STATE = "adapter.safetensors", "optimizer.safetensors", "state.json"
SCHEMA = 1
TENSOR = "__tensor__"
# What reading a damaged state may raise.
BROKEN = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, SafetensorError)


class NoSpace(Blip3oError):
    """A state could not be written; the states before it are intact."""


@dataclass
class State:
    """What a run needs to go on as if it had never stopped.

    Attributes:
        step: optimiser steps done.
        adapter: the learned tensors under the keys of LoRA files; usable as it is.
        internals: named tensors: exact weights, averages, the best weights so far.
        optimizer: the optimiser's state_dict.
        numbers: everything else, plain JSON.
    """

    step: int
    adapter: dict[str, Tensor]
    internals: dict[str, Tensor] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)
    numbers: dict[str, Any] = field(default_factory=dict)


def save_state(folder: Path, state: State, *, keep: int) -> Path:
    """Write a state beside the older ones, then delete all but the newest `keep`.

    The files are written and flushed to the disk under a temporary name, and only then renamed: a crash at any moment
    leaves the older states and at most a leftover that nobody reads.

    Raises:
        NoSpace: the disk is full or refuses; the older states are intact.
    """
    target = folder / f"step_{state.step:06d}"
    temporary = folder / f".{target.name}.part"
    if is_whole(target):
        amend_state(folder, state.step, state.numbers)
        _prune(folder, keep)
        return target
    tensors = {f"internal/{name}": tensor for name, tensor in state.internals.items()}
    optimizer = pack_tree(state.optimizer, tensors, "optimizer")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        files = {
            name: _write_tensors(temporary / name, content)
            for name, content in ((ADAPTER, state.adapter), (INTERNALS, tensors))
        }
        tree = {
            "schema": SCHEMA,
            "step": state.step,
            "files": files,
            "optimizer": optimizer,
            "numbers": state.numbers,
        }
        _write_tree(temporary / STATE, tree)
        _flush_folder(temporary)
        shutil.rmtree(target, ignore_errors=True)  # only ever a broken one
        os.rename(temporary, target)
        _flush_folder(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        reason = getattr(error, "strerror", None) or error
        size = sum(tensor.nbytes for tensor in [*state.adapter.values(), *tensors.values()])
        raise NoSpace(
            f'The state of step {state.step} could not be written to "{folder}": {reason}.\n'
            f"It needs {format_bytes(size)}. The states before it are intact: make room, then run the same command again."
        ) from error
    _prune(folder, keep)
    return target


def newest_state(folder: Path) -> State | None:
    """The newest state that is whole; a broken one is skipped with a warning. None = there is none."""
    for path in _states(folder):
        try:
            return read_state(path)
        except BROKEN as error:
            logger.warning(
                'The state "%s" is damaged (%s); an older one is used.', path, error or type(error).__name__
            )
    return None


def read_state(path: Path) -> State:
    """A state of one folder; its files must have the sizes and hashes that were noted.

    Raises:
        ValueError or KeyError: it is damaged.
        OSError: it cannot be read.
    """
    tree = parse_object((path / STATE).read_bytes())
    if tree["schema"] != SCHEMA:
        raise ValueError(f"schema {tree['schema']}, expected {SCHEMA}")
    contents = {}
    if tree["files"].keys() != {ADAPTER, INTERNALS}:
        raise ValueError(f"it names other files than {ADAPTER} and {INTERNALS}")
    if not isinstance(tree["step"], int) or not isinstance(tree["numbers"], dict):
        raise ValueError(f"{STATE} holds values of the wrong kind")
    for name, noted in tree["files"].items():
        if not (path / name).is_file():
            raise ValueError(f"{name} is no file")
        if _hash(path / name) != noted:
            raise ValueError(f"{name} is not what was written")
        contents[name] = load_file(path / name)
    tensors = contents[INTERNALS]
    internals = {
        name.removeprefix("internal/"): tensor
        for name, tensor in tensors.items()
        if name.startswith("internal/")
    }
    return State(
        tree["step"],
        contents[ADAPTER],
        internals,
        unpack_tree(tree["optimizer"], tensors),
        tree["numbers"],
    )


def is_whole(path: Path) -> bool:
    """Whether a folder holds a state that loads."""
    try:
        read_state(path)
    except BROKEN:
        return False
    return True


def pack_tree(tree: Any, tensors: dict[str, Tensor], name: str) -> Any:
    """A tree of dicts, lists, numbers and tensors as JSON; its tensors go to `tensors`, named by their place."""
    if isinstance(tree, Tensor):
        tensors[name] = tree
        return {TENSOR: name}
    if isinstance(tree, Mapping):
        # JSON knows text keys only, and an optimiser counts its parameters.
        return {
            "keys": [[key, pack_tree(value, tensors, f"{name}/{key}")] for key, value in tree.items()],
        }
    if isinstance(tree, (list, tuple)):
        return [pack_tree(value, tensors, f"{name}/{place}") for place, value in enumerate(tree)]
    assert tree is None or isinstance(tree, (bool, int, float, str)), f"{name} is a {type(tree).__name__}"
    return tree


def unpack_tree(tree: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Undo pack_tree; tuples come back as lists."""
    if isinstance(tree, dict):
        if TENSOR in tree:
            return tensors[tree[TENSOR]]
        return {key: unpack_tree(value, tensors) for key, value in tree["keys"]}
    if isinstance(tree, list):
        return [unpack_tree(value, tensors) for value in tree]
    return tree


def amend_state(folder: Path, step: int, numbers: Mapping[str, Any]) -> None:
    """Change some of a state's numbers; the file is replaced in one go."""
    path = folder / f"step_{step:06d}" / STATE
    tree = json.loads(path.read_text("utf-8"))
    tree["numbers"] |= numbers
    temporary = path.with_suffix(".part")
    _write_tree(temporary, tree)
    os.replace(temporary, path)


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write and flush a safetensors file; its SHA-256."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(plain, path, {"format": "pt"})
    with path.open("rb+") as file:
        os.fsync(file.fileno())
    return _hash(path)


def _write_tree(path: Path, tree: Mapping[str, Any]) -> None:
    with path.open("w", encoding="utf-8") as file:
        json.dump(tree, file)
        file.flush()
        os.fsync(file.fileno())


def _hash(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _flush_folder(path: Path) -> None:
    """Make renames in a folder last; systems that cannot open folders (Windows) do without."""
    with suppress(OSError):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _states(folder: Path) -> list[Path]:
    """State folders, newest first."""
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if re.fullmatch(r"step_\d+", path.name)), reverse=True)


def _prune(folder: Path, keep: int) -> None:
    for path in _states(folder)[keep:]:
        shutil.rmtree(path, ignore_errors=True)
    for path in folder.glob(".step_*.part"):
        shutil.rmtree(path, ignore_errors=True)
