"""The BLIP3-o model and its pipeline, usable without ComfyUI. Names are imported when first asked for."""

from importlib import import_module

from . import quiet  # noqa: F401  whoever starts here, the command or a node, is spared other libraries' remarks

_HOMES = {
    "AnswerSettings": "language.answers",
    "Blip3oError": "errors",
    "Blip3oPipeline": "pipeline",
    "FeatureSettings": "drawing.sampling",
    "Generation": "drawing.presets",
    "PixelSettings": "drawing.decoding",
    "Turn": "language.answers",
    "load_pipeline": "pipeline",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
