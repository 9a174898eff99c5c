"""ComfyUI entry point; imports nothing until ComfyUI asks for the nodes."""

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    """Return the extension whose nodes ComfyUI registers."""
    from .nodes import Blip3oExtension

    return Blip3oExtension()
