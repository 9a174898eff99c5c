"""Prompts that come with the program: what preservation holds still, and, never the same, what drift is measured on."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from ..blip3o_core.language.prompts import TextTokenizer
from .config import LoraConfig

PRESERVED = (
    "a photo of a cat on a sofa",
    "a street in the rain at night",
    "a bowl of fruit on a wooden table",
    "an old man reading a newspaper",
    "a mountain lake in the morning",
    "a red car parked in front of a house",
    "a child playing with a ball in a park",
    "a watercolor painting of a sailing boat",
    "two birds on a branch",
    "a close-up of a yellow flower",
    "a blue vase on a white shelf",
    "a futuristic city at sunset",
)
DRIFT = (
    "a photo of a dog in the snow",
    "a market with many people",
    "a cup of coffee next to a book",
    "a portrait of a young woman with a hat",
    "a forest path in autumn",
    "a bicycle leaning against a brick wall",
    "an oil painting of the sea",
    "three apples on a plate",
)
# For a model with the words of the built-in one: one to three coloured shapes. Every colour with every number and most kinds: with half as
# many, colours of the concept crept into pairs and counts that none of them named.
PRESERVED_SCENES = (
    "a red circle",
    "a blue square",
    "a green triangle",
    "a yellow cross",
    "a purple ring",
    "a cyan star",
    "a circle",
    "a square on a black background",
    "a ring",
    "a star on a black background",
    "a cyan ring on a black background",
    "a purple triangle on a black background",
    "a drawing of a green cross in front of a black background",
    "a small cyan cross",
    "a large yellow square",
    "a drawing of a large ring",
    "a small triangle on a black background",
    "two green circles",
    "two red stars",
    "a picture of two yellow rings in front of a black background",
    "two blue crosses",
    "there are two purple squares",
    "two circles",
    "three red squares",
    "three cyan triangles",
    "an image of three yellow stars , black background",
    "three purple circles",
    "three green rings",
    "three blue stars",
    "a blue triangle and a yellow ring",
    "a green star and a purple cross",
    "a drawing of a cyan circle and a red square in front of a black background",
    "a photo of a yellow ring and a yellow triangle",
    "a ring and a triangle",
    "a square and a cross on a black background",
    "a red ring above a cyan square",
    "a yellow circle left of a blue star",
    "a green ring below a red star",
    "a cyan cross to the right of a purple circle",
    "a yellow ring above a yellow square",
    "a blue star over a green circle on a black background",
    "a green ring to the left of a cyan square",
)
DRIFT_SCENES = (
    "a blue circle",
    "a yellow square",
    "a red triangle",
    "a purple star",
    "two cyan crosses",
    "three blue rings",
    "a green square and a red circle",
    "a yellow star above a purple square",
)


def preservation_prompts(config: LoraConfig) -> tuple[str, ...]:
    """Prompts beside the class word that must not change; empty without preservation."""
    if not config.uses_preservation:
        return ()
    if config.train.prior.prompts != "built-in":
        return tuple(config.train.prior.prompts)
    return PRESERVED if _knows_the_world(config.checkpoint) else PRESERVED_SCENES


def drift_prompts(config: LoraConfig) -> tuple[str, ...]:
    """Prompts that drift is measured on."""
    if config.validate.drift_prompts != "built-in":
        return tuple(config.validate.drift_prompts)
    return DRIFT if _knows_the_world(config.checkpoint) else DRIFT_SCENES


def knows(tokenizer: TextTokenizer, text: str) -> bool:
    """Whether a tokenizer has every word of a text: what it does not have is lost on the way back."""
    shown = tokenizer.decode(tokenizer.encode(text))
    return "".join(shown.split()).lower() == "".join(text.split()).lower()


@lru_cache(maxsize=8)
def _knows_the_world(folder: Path) -> bool:
    """Whether a checkpoint has the words of the everyday prompts; else it is of the built-in model's kind."""
    tokenizer = TextTokenizer(folder)
    return all(knows(tokenizer, prompt) for prompt in (*PRESERVED, *DRIFT))
