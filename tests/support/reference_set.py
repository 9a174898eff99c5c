"""The reference numbers of the published code, and the checkpoint they were computed with, rebuilt from a compact copy.

The copy in tests/data/reference keeps only the rows of the two vocabulary tables that are not zero.
"""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

COMPACT = Path(__file__).resolve().parents[1] / "data" / "reference"
VOCABULARY_TABLES = ("model.embed_tokens.weight", "lm_head.weight")
VOCABULARY_SIZE = 151936
PLAIN_IDS = slice(0, 1000)
SPECIAL_IDS = slice(151643, 151668)
# Of the original files: the rebuilt ones are the same to the byte.
ORIGINAL_SHA256 = {
    "model-00001-of-00002.safetensors": "b04eca68409ba9e1cfc3509b534f49e1f136d3c142a8225ef50a33815aef90a0",
    "model-00002-of-00002.safetensors": "ad552658db4a6ced2a001c48fba1c0a65ec49c19a1117ce9c49b562756392f5a",
}


def build_reference(target: Path) -> Path:
    """Write the reference folder, as it was published, to `target`."""
    shutil.copytree(COMPACT, target)
    for name, digest in ORIGINAL_SHA256.items():
        path = target / "checkpoint" / name
        tensors = load_file(str(path))
        for key in VOCABULARY_TABLES:
            if key in tensors:
                tensors[key] = _widen(tensors[key])
        save_file(tensors, str(path), metadata={"format": "pt"})
        assert hashlib.sha256(path.read_bytes()).hexdigest() == digest, f"{name} was not rebuilt faithfully"
    return target


def copy_folder(source: Path, target: Path) -> Path:
    """A copy whose unchanged files share the disk with the original: replace files in it, never write into them."""
    shutil.copytree(source, target, copy_function=_link)
    return target


def rewrite_weights(
    folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]
) -> None:
    """Replace the checkpoint's shards by one file, model.safetensors without an index, with changed tensors."""
    checkpoint = folder / "checkpoint"
    tensors: dict[str, torch.Tensor] = {}
    for name in ORIGINAL_SHA256:
        tensors |= load_file(str(checkpoint / name))
        (checkpoint / name).unlink()
    (checkpoint / "model.safetensors.index.json").unlink()
    save_file(change(tensors), str(checkpoint / "model.safetensors"), metadata={"format": "pt"})


def to_newer_layout(key: str) -> str:
    """The name that transformers 4.52 and later give a published tensor."""
    for published, newer in (
        ("model.embed_tokens.", "model.language_model.embed_tokens."),
        ("model.layers.", "model.language_model.layers."),
        ("model.norm.", "model.language_model.norm."),
        ("visual.", "model.visual."),
    ):
        if key.startswith(published):
            return newer + key.removeprefix(published)
    return key


def nest_text_config(folder: Path) -> None:
    """Move the text model's fields of config.json into `text_config`, as transformers 4.52 and later write them."""
    path = folder / "checkpoint" / "config.json"
    config = json.loads(path.read_text("utf-8"))
    path.unlink()  # may be shared with the original
    own = {"model_type", "vision_config", "gen_vision_config", "gen_pooling", "gen_hidden_size", "n_query"}
    text = {key: config.pop(key) for key in list(config) if key not in own}
    path.write_text(json.dumps({**config, "text_config": {"model_type": "qwen2_5_vl_text", **text}}), "utf-8")


def _widen(rows: torch.Tensor) -> torch.Tensor:
    table = torch.zeros(VOCABULARY_SIZE, rows.shape[1], dtype=rows.dtype)
    table[PLAIN_IDS] = rows[: PLAIN_IDS.stop]
    table[SPECIAL_IDS] = rows[PLAIN_IDS.stop :]
    return table


def _link(source: str, target: str) -> None:
    Path(target).hardlink_to(source)
