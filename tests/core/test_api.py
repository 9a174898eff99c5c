"""The names that other programs import."""

import subprocess
import sys
from pathlib import Path

import comfyui_blip3o.blip3o_core as core
import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", core.__all__)
def test_every_public_name_can_be_imported(name: str) -> None:
    assert getattr(core, name).__name__ == name


def test_other_names_are_missing_as_usual() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'load_everything'"):
        _ = core.load_everything


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
