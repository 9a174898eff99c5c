"""ComfyUI's entry point, and the names that Python programs import; nothing is imported until one of them is asked for."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .nodes import Blip3oExtension

WEB_DIRECTORY = "./web"
# Offered here so that `from comfyui_blip3o import load_pipeline` works; they live in blip3o_core.
_FROM_CORE = (
    "AnswerSettings",
    "Blip3oError",
    "Blip3oPipeline",
    "FeatureSettings",
    "Generation",
    "PixelSettings",
    "Turn",
    "load_pipeline",
)


def __getattr__(name: str) -> Any:
    # ComfyUI asks for NODE_CLASS_MAPPINGS and the like first: what is not ours is told without an import.
    if name not in _FROM_CORE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(".blip3o_core", __name__), name)


async def comfy_entrypoint() -> Blip3oExtension:
    """Return the extension whose nodes ComfyUI registers."""
    from .nodes import Blip3oExtension

    return Blip3oExtension()
