"""The committed excerpt of the real server's /object_info: our nodes, and the nodes of ComfyUI that our graphs use."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from graphs import PAGE_NODES

ROOT = Path(__file__).resolve().parents[2]
SNAPSHOT = ROOT / "tests" / "data" / "object_info.json"
WORKFLOWS = ROOT / "workflows"
PREFIX = "BLIP3o"
# Lists of files on the disk: only their fixed entries are kept.
FILE_LISTS = {
    "checkpoint": ["built-in: tiny"],
    "decoder": ["of the checkpoint", "built-in: tiny"],
    "lora": ["none"],
    "file": [],
    "existing_lora": ["[None]"],
    "folder": ["built-in: example"],
}
FIELDS = (
    *("input", "input_order", "output", "output_name", "output_is_list", "output_tooltips", "output_node"),
    *("display_name", "description", "category", "search_aliases"),
)


def load_snapshot() -> dict[str, Any]:
    return json.loads(SNAPSHOT.read_text("utf-8"))


def load_workflows() -> dict[str, dict[str, Any]]:
    return {path.stem: json.loads(path.read_text("utf-8")) for path in sorted(WORKFLOWS.glob("*.json"))}


def used_nodes() -> set[str]:
    """Node types of ComfyUI that our graphs name."""
    types = {node["type"] for graph in load_workflows().values() for node in graph["nodes"]}
    return {name for name in types if not name.startswith(PREFIX)} - PAGE_NODES


def excerpt(object_info: dict[str, Any]) -> dict[str, Any]:
    """What of a server's /object_info is compared: nothing that depends on the files of one machine."""
    names = sorted({name for name in object_info if name.startswith(PREFIX)} | used_nodes())
    found = {}
    for name in names:
        entry = copy.deepcopy({field: object_info[name].get(field) for field in FIELDS})
        for group in ("required", "optional"):
            for key, definition in entry["input"].get(group, {}).items():
                if key in FILE_LISTS and "options" in definition[1]:
                    definition[1]["options"] = FILE_LISTS[key]
        entry["input"].pop("hidden", None)
        found[name] = entry
    return found
