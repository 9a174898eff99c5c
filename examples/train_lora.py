"""Trains a LoRA on the twelve example pictures that come along, and draws with and without it.

python examples/train_lora.py --out lora

With 120 steps (a minute on two CPU cores) the built-in model learns a traffic light: three shapes, the top one red,
the left one yellow, the right one green.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import comfyui_blip3o
from comfyui_blip3o import load_pipeline
from comfyui_blip3o.blip3o_core.config import BUILT_IN_MODEL
from comfyui_blip3o.lora_training.config import parse_config
from comfyui_blip3o.lora_training.run import train_lora

EXAMPLE = Path(comfyui_blip3o.__file__).parent / "lora_training" / "assets" / "example"
TRIGGER, CLASS_WORD = "red and yellow", "red"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--draw-steps", type=int, default=30, help="of the pictures drawn to judge by")
    parser.add_argument(
        "--preset", default="standard", help="of the two pictures at the end: standard or fast"
    )
    parser.add_argument("--out", type=Path, default=Path("lora"))
    parser.add_argument(
        "--set", action="append", default=[], dest="overrides", metavar="SETTING=VALUE",
        help="any other setting of a run, e.g. train.optimizer.lr=1e-3",
    )  # fmt: skip
    options = parser.parse_args(arguments)

    # The same settings that a YAML file for `blip3o lora run` holds; what is not named has its default.
    settings = {
        "run": {"name": "traffic_light", "dir": str(options.out)},
        "data": {"path": str(EXAMPLE), "trigger": TRIGGER, "class_word": CLASS_WORD},
        "adapter": {"rank": options.rank, "alpha": options.rank},
        "train": {"steps": options.steps, "optimizer": {"lr": 1e-3}},
        "sample": {"prompts": ["three {trigger} circles"], "every": 0, "steps": options.draw_steps},
    }
    result = train_lora(parse_config(settings, options.overrides), on_event=tell)
    print(f"{result.lora}\n{result.report}")

    pipeline = load_pipeline(BUILT_IN_MODEL)
    prompt = f"three {TRIGGER} stars in front of a black background"  # a wording that no caption has
    pipeline.generate(prompt, seed=3, preset=options.preset).pictures[0].save(options.out / "without.png")
    pipeline.load_lora(result.lora, strength=1.0)
    pipeline.generate(prompt, seed=3, preset=options.preset).pictures[0].save(options.out / "with.png")


def tell(event: dict) -> None:
    """A line for every tenth step; events also go to events.jsonl in the run's folder."""
    if event["event"] == "step" and event["step"] % 10 == 0:
        print(f"step {event['step']}: loss {event['loss']:.3f}", flush=True)


if __name__ == "__main__":
    main()
