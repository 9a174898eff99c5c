"""Works in the space of image features: redraws a picture, moves it towards a text, and walks from one picture to another.

python examples/vary_and_blend.py --out variations
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from comfyui_blip3o import load_pipeline
from comfyui_blip3o.blip3o_core.config import BUILT_IN_MODEL
from comfyui_blip3o.blip3o_core.drawing.presets import PRESETS
from comfyui_blip3o.blip3o_core.images import to_pil


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--first", default="a red circle")
    parser.add_argument("--second", default="a blue square")
    parser.add_argument("--model", type=Path, default=BUILT_IN_MODEL, help="default: the built-in tiny model")
    parser.add_argument("--preset", default="standard", help="standard or fast")
    parser.add_argument("--between", type=int, default=3, help="pictures between the two")
    parser.add_argument("--out", type=Path, default=Path("variations"))
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)

    pipeline = load_pipeline(options.model)
    drawn = pipeline.generate([options.first, options.second], seed=1, preset=options.preset)
    first, _ = drawn.pictures
    first.save(options.out / "first.png")

    # The same content painted again, and the content moved towards another text.
    pipeline.vary([first], preset=options.preset, seed=2).pictures[0].save(options.out / "again.png")
    moved = pipeline.vary([first], prompt=options.second, strength=0.8, preset=options.preset, seed=2)
    moved.pictures[0].save(options.out / "towards_second.png")

    # Image features, (2, 64, channels), can be mixed like any tensor; the decoder paints what comes of it.
    start, end = pipeline.encode_images(drawn.pictures)
    shares = torch.linspace(0, 1, options.between + 2, device=start.device)
    path = torch.stack([torch.lerp(start, end, share) for share in shares])
    images = pipeline.decode(path, seeds=[0] * len(path), settings=PRESETS[options.preset].pixels)
    for number, picture in enumerate(to_pil(images)):
        picture.save(options.out / f"between_{number}.png")
    print(f"{len(path) + 3} pictures in {options.out}")


if __name__ == "__main__":
    main()
