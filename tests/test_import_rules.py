"""Who may import whom, and that nothing heavy happens at import."""

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("cli", "blip3o_core", "lora_training", "pretraining", "nodes")
# Arrows that may exist beside imports within a package; "" is the root's own file.
ALLOWED = {
    "": {"nodes", "blip3o_core"},
    "cli": {"lora_training", "pretraining", "blip3o_core"},
    "nodes": {"lora_training", "blip3o_core"},
    "lora_training": {"blip3o_core"},
    "pretraining": {"blip3o_core"},
    "blip3o_core": set(),
}
HOST_MODULES = {
    "comfy",
    "comfy_api",
    "comfy_extras",
    "comfy_execution",
    "folder_paths",
    "nodes",
    "server",
    "latent_preview",
}


def source_files() -> list[Path]:
    files = [ROOT / "__init__.py"]
    for package in PACKAGES:
        files += sorted((ROOT / package).rglob("*.py"))
    return files


def imports(path: Path) -> list[tuple[int, str]]:
    """(level, module) of every import statement, also those inside functions."""
    found = []
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found += [(0, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module] if node.module else [alias.name for alias in node.names]
            found += [(node.level, name) for name in names]
    return found


@pytest.mark.parametrize("path", source_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_follow_the_arrows(path: Path):
    parts = path.relative_to(ROOT).parts
    package = parts[0] if len(parts) > 1 else ""
    for level, module in imports(path):
        top = module.split(".")[0]
        if level == 0:
            assert top not in PACKAGES or (top == "nodes" and package == "nodes"), (
                f"absolute import of our own {module}"
            )
            assert top not in HOST_MODULES or package == "nodes", f"only nodes/ sees ComfyUI, not {module}"
            continue
        # `level` dots climb from the module's own folder; what lies above the package is the repository root.
        if level >= len(parts):
            assert level == len(parts), f"{module} climbs out of the repository"
            if top in PACKAGES and top != package:
                assert top in ALLOWED[package], f"{package or 'the root'} must not import {top}"


def test_importing_the_pack_and_the_command_loads_nothing_heavy():
    code = (
        "import sys; sys.path.insert(0, {tests!r}); import conftest; import comfyui_blip3o.cli as cli; cli.build_parser();"
        "print([m for m in ('torch', 'transformers', 'diffusers', 'peft', 'numpy', 'PIL') if m in sys.modules])"
    ).format(tests=str(ROOT / "tests"))
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"


def core_places(path: Path) -> set[str]:
    """Folders and single files of the core that a file of it imports from; what only a type checker reads counts too."""
    found = set()
    for level, module in imports(path):
        if level:
            place = [*path.relative_to(ROOT).parts[:-level], *module.split(".")]
            if place[0] == "blip3o_core" and len(place) > 1:
                found.add(place[1])
    return found


def core_graph() -> dict[str, set[str]]:
    """Folder or file of the core -> those that it imports."""
    graph: dict[str, set[str]] = {}
    for path in sorted((ROOT / "blip3o_core").rglob("*.py")):
        name = path.relative_to(ROOT / "blip3o_core").parts[0].removesuffix(".py")
        if name != "__init__":
            graph[name] = graph.get(name, set()) | (core_places(path) - {name})
    return graph


def test_the_cores_folders_and_files_import_each_other_in_no_circle():
    try:
        order = list(TopologicalSorter(core_graph()).static_order())
    except CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))
    assert order.index("models") < order.index("drawing") < order.index("pipeline")


@pytest.mark.parametrize("folder", ["models", "drawing"])
def test_networks_and_drawing_know_nothing_of_what_makes_them_faster(folder: str):
    files = sorted((ROOT / "blip3o_core" / folder).glob("*.py"))
    assert len(files) > 3
    for path in files:
        assert "performance" not in core_places(path), path.name


@pytest.mark.parametrize(
    ("folder", "allowed"), [("native", {"native"}), ("training", {"native", "training"})]
)
def test_what_nodes_work_with_does_not_import_the_nodes(folder: str, allowed: set[str]):
    files = sorted((ROOT / "nodes" / folder).glob("*.py"))
    assert len(files) > 5
    for path in files:
        for level, module in imports(path):
            place = [*path.relative_to(ROOT).parts[:-level], *module.split(".")] if level else []
            assert place[:1] != ["nodes"] or place[1] in allowed, f"{path.name} imports {'.'.join(place)}"
