"""The names that other programs import."""

import subprocess
import sys
from pathlib import Path

import comfyui_blip3o
import comfyui_blip3o.blip3o_core as core
import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", core.__all__)
def test_every_public_name_can_be_imported(name: str) -> None:
    assert getattr(core, name).__name__ == name


def test_the_package_itself_offers_the_same_names() -> None:
    from comfyui_blip3o import load_pipeline

    assert load_pipeline is core.load_pipeline
    for name in core.__all__:
        assert getattr(comfyui_blip3o, name) is getattr(core, name)


def test_other_names_are_missing_as_usual() -> None:
    for module in (core, comfyui_blip3o):
        with pytest.raises(AttributeError, match="has no attribute 'load_everything'"):
            _ = module.load_everything


def test_what_comfyui_looks_for_in_a_node_pack_imports_nothing() -> None:
    """Its loader asks for both kinds of node lists, and takes the first that is there."""
    code = (
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('a.path', {str(ROOT / '__init__.py')!r})\n"
        "sys.modules['a.path'] = package = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(package)\n"
        "names = ('NODE_CLASS_MAPPINGS', 'NODE_DISPLAY_NAME_MAPPINGS', 'WEB_DIRECTORY', 'comfy_entrypoint')\n"
        "print([hasattr(package, name) for name in names], [name for name in sys.modules if 'a.path.' in name])\n"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "[False, False, True, True] []"


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = (
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('comfyui_blip3o', {str(ROOT / '__init__.py')!r})\n"
        "sys.modules['comfyui_blip3o'] = package = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(package)\n"
        "from comfyui_blip3o import blip3o_core\n"
        "from comfyui_blip3o.blip3o_core import config, errors\n"
        "print(sorted({'torch', 'transformers', 'diffusers', 'numpy', 'PIL'} & set(sys.modules)))\n"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "[]"
