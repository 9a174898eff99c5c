"""Whole runs on a tiny random checkpoint: pictures, captions and settings with which one takes a few seconds."""

from pathlib import Path
from typing import Any

import tiny_models
import yaml
from lora_concept import with_settings

CAPTIONS = ("a big blue [trigger] square", "a [trigger] cat", "two dogs in the [trigger] grass")
TRIGGER, CLASS_WORD = "red cute", "small"


def write_pictures(folder: Path) -> Path:
    """Three pictures with captions."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, caption in enumerate(CAPTIONS):
        tiny_models.picture(64, 64, seed=number).save(folder / f"picture_{number}.png")
        (folder / f"picture_{number}.txt").write_text(caption, "utf-8")
    return folder


def run_tree(root: Path, model: Path, **settings: Any) -> dict[str, Any]:
    """Plain values of a run in `root`/runs, on pictures in `root`/pictures; settings with "__" for the dot."""
    tree: dict[str, Any] = {
        "run": {"name": "it", "dir": str(root / "runs")},
        "model": {"root": str(model), "device": "cpu"},
        "data": {
            "path": str(write_pictures(root / "pictures")),
            "trigger": TRIGGER,
            "class_word": CLASS_WORD,
        },
        "adapter": {"rank": 2, "alpha": 2.0},
        "train": {
            "steps": 3,
            "batch": 2,
            "optimizer": {"lr": 1e-2},
            "prior": {"prompts": ["a green bird"]},
        },
        "validate": {
            "every": 0,
            "sigmas": [0.5],
            "noise_seeds": 1,
            "drift_prompts": ["a yellow house"],
        },
        "sample": {"prompts": ["a {trigger} cat"], "every": 0, "steps": 2},
        "save": {"dtype": "fp32"},
    }
    return with_settings(tree, settings)


def write_run(root: Path, model: Path, **settings: Any) -> Path:
    """The same as a YAML file."""
    root.mkdir(parents=True, exist_ok=True)
    path = root / "it.yaml"
    path.write_text(yaml.safe_dump(run_tree(root, model, **settings)), "utf-8")
    return path
