"""Graphs that train: the shipped example, quick settings."""

from typing import Any

from api_graphs import BUILT_IN, QUICK_TRAINING, node

EXAMPLE = {"folder": "built-in: example", "trigger": "red and yellow", "class_word": "red"}
DATASET = {
    "crop": "centre",
    "views": 4,
    "flip": False,
    "mask": "none",
    "holdout": "auto",
    "missing_captions": "error",
    "bad_pictures": "stop",
    "caption_prefix": "",
    "background": "white",
}
SETTINGS = {
    "adapter": "as the preset",
    "rank": 4,
    "targets": "as the preset",
    "tune_queries": False,
    "optimizer": "adamw",
    "learning_rate": 0.001,
    "schedule": "cosine",
    "batch_size": 0,
    "preservation": "auto",
    "preservation_weight": 1.0,
    "sample_prompts": "three {trigger} circles",
    "sample_every": 4,
    "seed": 0,
    "base_dtype": "auto",
    "more": QUICK_TRAINING,
}
STEPS = 8


def training(name: str, steps: int = STEPS, minutes: float = 0.0, **settings: Any) -> dict[str, Any]:
    """Nodes 1 dataset, 2 settings, 3 training, 4 its scorecard, 5 its loss in core's own plot."""
    return {
        "1": node("BLIP3oDataset", **EXAMPLE, **DATASET),
        "2": node("BLIP3oTrainingSettings", **{**SETTINGS, **settings}),
        "3": node(
            "BLIP3oTrainLora",
            dataset=["1", 0],
            settings=["2", 0],
            checkpoint=BUILT_IN,
            name=name,
            preset="subject",
            steps=steps,
            minutes=minutes,
        ),
        "4": node("PreviewAny", source=["3", 4]),
        "5": node("LossGraphNode", loss=["3", 1], filename_prefix="loss"),
    }
