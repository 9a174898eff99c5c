"""Who may import whom, and that nothing heavy happens at import."""

import ast
import subprocess
import sys
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
