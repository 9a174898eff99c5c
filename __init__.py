"""ComfyUI entry point; imports nothing until ComfyUI asks for the nodes."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .nodes import Blip3oExtension

WEB_DIRECTORY = "./web"


async def comfy_entrypoint() -> Blip3oExtension:
    """Return the extension whose nodes ComfyUI registers."""
    from .nodes import Blip3oExtension

    return Blip3oExtension()
