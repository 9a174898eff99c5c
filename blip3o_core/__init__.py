"""The BLIP3-o model and its pipeline, usable without ComfyUI. Names are imported when first asked for."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import quiet  # noqa: F401  whoever starts here, the command or a node, is spared other libraries' remarks

if TYPE_CHECKING:
    from .drawing.decoding import PixelSettings as PixelSettings
    from .drawing.presets import Generation as Generation
    from .drawing.sampling import FeatureSettings as FeatureSettings
    from .errors import Blip3oError as Blip3oError
    from .language.answers import AnswerSettings as AnswerSettings
    from .language.answers import Turn as Turn
    from .pipeline import Blip3oPipeline as Blip3oPipeline
    from .pipeline import load_pipeline as load_pipeline

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


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
