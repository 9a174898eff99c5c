"""Loads the checkout as `comfyui_blip3o`, the way ComfyUI loads a node pack, so that tests need no install."""

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# `nodes` must stay ComfyUI's module: the checkout never sits on sys.path.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]
if "comfyui_blip3o" not in sys.modules:
    spec = importlib.util.spec_from_file_location("comfyui_blip3o", ROOT / "__init__.py")
    sys.modules["comfyui_blip3o"] = package = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(package)
