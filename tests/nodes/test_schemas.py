"""The nodes' schemas and the page's script. Needs no ComfyUI: reads the committed snapshot."""

import ast
import re
from typing import Any

import pytest
from schema_snapshot import PREFIX, ROOT, load_snapshot

NODES = {name: schema for name, schema in load_snapshot().items() if name.startswith(PREFIX)}


def inputs(schema: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {
        name: (definition + [{}])[1]
        for group in ("required", "optional")
        for name, definition in schema["input"].get(group, {}).items()
    }


def node_ids_in_source() -> set[str]:
    """Every literal node_id, found the way ComfyUI-Manager's scanner does."""
    found = set()
    for path in (ROOT / "nodes").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "Schema":
                identifier = next(keyword.value for keyword in node.keywords if keyword.arg == "node_id")
                assert isinstance(identifier, ast.Constant), f"{path.name}: a node_id is no literal"
                found.add(identifier.value)
    return found


def test_the_snapshot_holds_exactly_the_nodes_of_the_source():
    assert node_ids_in_source() == set(NODES)


@pytest.mark.parametrize("name", NODES)
def test_a_node_says_what_it_is(name: str):
    schema = NODES[name]
    assert schema["category"].startswith("BLIP3-o/")
    assert schema["description"].endswith(".") and schema["search_aliases"]
    for key, options in inputs(schema).items():
        assert options.get("tooltip", "").endswith("."), f"{key} has no tooltip"
    for key, tooltip in zip(schema["output_name"], schema["output_tooltips"] or [], strict=True):
        assert tooltip and tooltip.endswith("."), f"{key} has no tooltip"


def test_the_script_shows_answers_of_nodes_that_exist():
    script = (ROOT / "web" / "js" / "answers.js").read_text("utf-8")
    assert set(re.findall(r'"(BLIP3o\w+)"', script)) <= set(NODES)
    assert "/scripts/app.js" in script and "/extensions/" not in script
