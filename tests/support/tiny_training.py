"""Training sets and configurations for fits that take a second: features and conditioning for the tiny random DiT."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from comfyui_blip3o.lora_training.config import LoraConfig, parse_config
from comfyui_blip3o.lora_training.fit.loop import FitResult, fit
from comfyui_blip3o.lora_training.records import Sample, TrainingData, Validation
from tiny_models import DEFAULT, build_dit

FEATURES = 16
CAPTIONS = ("a cute cat", "a big blue square", "two dogs in the grass", "a small red circle")
CLASS_CAPTION = "a green cat"
KEPT = ("a red circle", "a yellow square")


def training_data(
    pictures: int = 4, *, seed: int = 0, views: int = 2, regularisation: int = 0
) -> TrainingData:
    """Pictures that share a look: one pattern of features with a little noise on it."""
    generator = torch.Generator().manual_seed(seed)
    channels, width = DEFAULT.dit.in_channels, DEFAULT.dit.conditioning_dim

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    look = draw(1, FEATURES, channels)

    def sample(index: int, name: str) -> Sample:
        prompt = CAPTIONS[index % len(CAPTIONS)]
        return Sample(
            name=f"{name} {index}",
            features=look + 0.2 * draw(views, FEATURES, channels),
            conditioning=draw(1, DEFAULT.queries, width),
            class_conditioning=draw(1, DEFAULT.queries, width),
            prompts=(prompt,),
            class_prompts=(CLASS_CAPTION,),
        )

    return TrainingData(
        train=tuple(sample(index, "picture") for index in range(pictures)),
        regularisation=tuple(sample(index, "regularisation") for index in range(regularisation)),
        prompts={prompt: draw(DEFAULT.queries, width) for prompt in KEPT},
    )


def lora_config(folder: Path, **settings: Any) -> LoraConfig:
    """A run named "run" below a folder; settings by dotted name with "__" for ".", e.g. train__steps=3."""
    tree: dict[str, Any] = {
        "run": {"name": "run", "dir": str(folder)},
        "data": {"path": ".", "trigger": "ohwx cat", "class_word": "cat"},
        "model": {"device": "cpu"},
        "adapter": {"type": "lora", "rank": 4, "alpha": 4.0},
        "train": {"steps": 6, "batch": 4, "prior": {"dop": False, "prompts": list(KEPT)}},
        "sample": {"steps": 3},
        "validate": {"every": 2, "patience": 0},
        "save": {"every_seconds": 1000},
    }
    for name, value in settings.items():
        *sections, key = name.split("__")
        branch = tree
        for section in sections:
            branch = branch.setdefault(section, {})
        branch[key] = value
    return parse_config(tree)


def run_fit(folder: Path, data: TrainingData | None = None, *, seed: int = 1, **options: Any) -> FitResult:
    """A fit of a fresh tiny DiT; options that fit() knows go there, the others are settings."""
    known = ("backbone", "tokenizer", "on_event", "should_stop", "validate", "sample")
    given = {name: options.pop(name) for name in known if name in options}
    return fit(lora_config(folder, **options), data or training_data(), build_dit(seed=seed), **given)


def validation(step: int, *, gain: float = 0.0, drift: float = 0.0) -> Validation:
    return Validation(step, 1.0, 1.0, gain, 0.0, {0.5: (1.0, 1.0)}, 0.0, drift, 0.0, 0.0, 0.0)


def stop_after(steps: int) -> Callable[[], bool]:
    """A should_stop that asks to stop at its so-manieth question, one a step."""
    asked = 0

    def should_stop() -> bool:
        nonlocal asked
        asked += 1
        return asked == steps

    return should_stop


def same(first: dict[str, torch.Tensor] | None, second: dict[str, torch.Tensor] | None) -> bool:
    """Equal to the bit."""
    if first is None or second is None:
        return first is second
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
