"""Draws two pictures of each prompt, asks about them, and scores how well each shows its prompt.

python examples/draw_and_ask.py "a red circle" "two green stars" --out pictures
"""

from __future__ import annotations

import argparse
from pathlib import Path

from comfyui_blip3o import load_pipeline
from comfyui_blip3o.blip3o_core.config import BUILT_IN_MODEL

PROMPTS = ("a red circle left of a blue square", "two green stars on a black background")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("prompts", nargs="*", default=PROMPTS)
    parser.add_argument("--question", default="What is in the picture?")
    parser.add_argument("--model", type=Path, default=BUILT_IN_MODEL, help="default: the built-in tiny model")
    parser.add_argument("--preset", default="standard", help="standard, published or fast")
    parser.add_argument("--count", type=int, default=2, help="pictures for each prompt")
    parser.add_argument("--out", type=Path, default=Path("pictures"))
    options = parser.parse_args(arguments)

    pipeline = load_pipeline(options.model)  # reads weights when they are first used
    drawn = pipeline.generate(
        list(options.prompts), images_per_prompt=options.count, seed=7, preset=options.preset
    )
    # One question about many lists of pictures, here one picture in each: read in one batch, answered one by one.
    answers = pipeline.ask(options.question, [[picture] for picture in drawn.pictures])
    options.out.mkdir(parents=True, exist_ok=True)
    for number, (prompt, picture, answer) in enumerate(
        zip(drawn.prompts, drawn.pictures, answers, strict=True)
    ):
        (shows_it,) = pipeline.score([picture], prompt)
        picture.save(options.out / f"{number:02}.png")
        print(f"{number:02}.png  {prompt}  ->  {answer}  (shows the prompt: {shows_it:.0%})")


if __name__ == "__main__":
    main()
