"""`blip3o generate` and `blip3o vary`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..blip3o_core.errors import BadInputError, MissingFilesError
from .options import (
    PICTURE_SUFFIXES,
    add_drawing_options,
    add_model_options,
    command,
    given,
    named,
    open_pipeline,
    parse_size,
)

if TYPE_CHECKING:  # torch takes seconds to import: only commands that compute do so
    from ..blip3o_core.pipeline import Blip3oPipeline, Generation


def add_generate(commands: Any) -> None:
    parser = command(commands, "generate", run_generate, "Draw pictures from prompts.")
    parser.add_argument(
        "prompt", nargs="*", help="what the picture should show; several prompts make several pictures"
    )
    parser.add_argument("-n", "--count", type=int, default=1, help="pictures for each prompt (default: 1)")
    parser.add_argument(
        "--like",
        type=Path,
        metavar="PNG",
        help="take prompt, seeds and settings from a picture made by this program",
    )
    parser.add_argument("--negative", metavar="PROMPT", help="steer the image features away from this")
    parser.add_argument(
        "--pixel-negative",
        metavar="PROMPT",
        help='steer the decoder away from this (default: " "; "zeros" = zeros)',
    )
    parser.add_argument(
        "--image",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="a picture inside the prompt (edit instructions); may be repeated",
    )
    parser.add_argument(
        "--start-image", type=Path, metavar="FILE", help="start the decoder from this picture"
    )
    parser.add_argument("--strength", type=float, help="how far from the start picture, 0 to 1 (default: 1)")
    add_drawing_options(parser)
    add_model_options(parser)


def add_vary(commands: Any) -> None:
    parser = command(
        commands, "vary", run_vary, "Draw new pictures from pictures, through EVA-CLIP image features."
    )
    parser.add_argument("picture", type=Path, nargs="+", help="picture files")
    parser.add_argument("--prompt", help="move the pictures towards this text")
    parser.add_argument("--strength", type=float, help="how far towards the prompt, 0 to 1 (default: 0.6)")
    parser.add_argument("-n", "--count", type=int, default=1, help="pictures for each input (default: 1)")
    add_drawing_options(parser)
    add_model_options(parser)


def run_generate(arguments: argparse.Namespace) -> None:
    from ..blip3o_core.images import load_image
    from ..blip3o_core.picture_files import read_description

    _check_target(arguments.out)
    like = read_description(arguments.like) if arguments.like else {}
    if like and not like.get("prompt") and not arguments.prompt:
        raise BadInputError(
            f'"{arguments.like}" was drawn from another picture without a prompt.\n'
            "Use blip3o vary with that picture, or write a prompt."
        )
    prompts = arguments.prompt or ([like["prompt"]] if like.get("prompt") else [])
    if not prompts:
        raise BadInputError(
            'There is no prompt.\nWrite one, e.g. blip3o generate "a red circle", or use --like picture.png.'
        )
    pixel_negative = given(arguments.pixel_negative, like.get("pixel_negative", " "))
    pipeline = open_pipeline(arguments)
    _load_loras(arguments, pipeline, like)
    _warn_of_other_checkpoint(pipeline, like)
    _warn_of_missing_pictures(arguments, like)
    _warn_of_published_noise(arguments, like)
    in_prompt = [load_image(path) for path in arguments.image]
    start = [load_image(arguments.start_image)] if arguments.start_image else None
    features, pixels = _settings(arguments, like)
    with _drawing_bars(arguments) as bars:
        generation = pipeline.generate(
            prompts,
            images=[in_prompt] * len(prompts) if in_prompt else None,
            images_per_prompt=arguments.count,
            seed=given(arguments.seed, like.get("seed", 0)),
            pixel_seed=given(
                arguments.pixel_seed, None if arguments.seed is not None else like.get("pixel_seed")
            ),
            preset=given(arguments.preset, like.get("preset", "standard")),
            features=features,
            pixels=pixels,
            negative_prompt=given(arguments.negative, like.get("negative_prompt")),
            pixel_negative=None if pixel_negative == "zeros" else pixel_negative,
            pixel_negative_seed=like.get("pixel_negative_seed", 0),
            start_images=start,
            strength=given(arguments.strength, like.get("strength", 1.0) if start else 1.0),
            batch_size=arguments.batch_size,
            **bars,
        )
    _save(arguments, pipeline, generation)


def run_vary(arguments: argparse.Namespace) -> None:
    from ..blip3o_core.images import load_image

    _check_target(arguments.out)
    pictures = [load_image(path) for path in arguments.picture]
    pipeline = open_pipeline(arguments)
    _load_loras(arguments, pipeline, {})
    features, pixels = _settings(arguments, {})
    with _drawing_bars(arguments) as bars:
        generation = pipeline.vary(
            pictures,
            prompt=arguments.prompt,
            strength=given(arguments.strength, 0.6),
            count=arguments.count,
            seed=given(arguments.seed, 0),
            pixel_seed=arguments.pixel_seed,
            preset=given(arguments.preset, "standard"),
            features=features,
            pixels=pixels,
            batch_size=arguments.batch_size,
            **bars,
        )
    _save(arguments, pipeline, generation)


def _load_loras(arguments: argparse.Namespace, pipeline: Blip3oPipeline, like: dict[str, Any]) -> None:
    """The LoRAs of the command line, else those of --like."""
    from ..blip3o_core.lora.files import split_strength

    if arguments.lora is not None:
        for text in arguments.lora:
            if text != "none":
                pipeline.load_lora(*split_strength(text))
        return
    for used in like.get("loras", []):
        places = [Path(used["file"]), arguments.like.parent / used["file"]]
        path = next((place for place in places if place.exists()), None)
        if path is None:
            raise MissingFilesError(
                f'"{arguments.like}" was drawn with the LoRA "{used["file"]}", which is neither here nor beside it.\n'
                f"Give it with --lora PATH:{used['strength']:g}, or draw without it: --lora none"
            )
        loaded = pipeline.load_lora(path, used["strength"])
        if loaded.file.fingerprint != used["hash"]:
            print(
                f'Note: the LoRA "{path}" is not the same as the one the picture was drawn with. The new picture will differ.',
                file=sys.stderr,
            )


def _settings(arguments: argparse.Namespace, like: dict[str, Any]) -> tuple[Any, Any]:
    """Settings of both stages: the preset's, then those of --like, then what the command line names."""
    from ..blip3o_core.drawing.decoding import PixelSettings
    from ..blip3o_core.drawing.presets import PRESETS
    from ..blip3o_core.drawing.sampling import FeatureSettings, check_choice

    name = given(arguments.preset, like.get("preset", "standard"))
    check_choice("preset", name, list(PRESETS))
    use_like = arguments.preset is None
    width, height = parse_size(arguments.size)
    features = {
        **vars(PRESETS[name].features),
        **(like.get("features", {}) if use_like else {}),
        **named(
            steps=arguments.steps,
            guidance_scale=arguments.cfg,
            sampler=arguments.sampler,
            shift=arguments.shift,
            guidance_interval=arguments.guidance_interval,
        ),
    }
    pixels = {
        **vars(PRESETS[name].pixels),
        **(like.get("pixels", {}) if use_like else {}),
        **named(
            steps=arguments.pixel_steps,
            guidance_scale=arguments.pixel_cfg,
            sampler=arguments.pixel_sampler,
            width=width,
            height=height,
            tiled=arguments.tiled,
        ),
    }
    for settings in (features, pixels):
        settings["guidance_interval"] = tuple(settings["guidance_interval"])
    return FeatureSettings(**features), PixelSettings(**pixels)


def _warn_of_other_checkpoint(pipeline: Blip3oPipeline, like: dict[str, Any]) -> None:
    from ..blip3o_core.picture_files import checkpoint_fingerprint

    wanted = like.get("checkpoint_hash")
    if wanted and wanted != checkpoint_fingerprint(pipeline.files):
        print(
            f'Note: the picture was made with checkpoint "{like["checkpoint"]}" ({wanted}), another than the loaded '
            f'"{pipeline.files.name}". The new picture will differ.',
            file=sys.stderr,
        )


def _warn_of_published_noise(arguments: argparse.Namespace, like: dict[str, Any]) -> None:
    """Published code draws the decoder's negative once, from the noise of the first picture of a run."""
    if like.get("preset") == "published" and arguments.preset in (None, "published"):
        print(
            f'Note: "{arguments.like}" was drawn with the preset "published", in which all pictures of a run depend on '
            "its first picture. Unless it was the first, the new picture will differ.",
            file=sys.stderr,
        )


def _warn_of_missing_pictures(arguments: argparse.Namespace, like: dict[str, Any]) -> None:
    """A PNG keeps settings, not the pictures it was made from."""
    missing = {"prompt": "--image", "start": "--start-image", "features": "blip3o vary"}
    if arguments.image:
        del missing["prompt"]
    if arguments.start_image:
        del missing["start"]
    wanted = [missing[place] for place in like.get("made_from_pictures", []) if place in missing]
    if wanted:
        print(
            f'Note: "{arguments.like}" was also made from pictures, which its file does not hold. '
            f"Give them again ({', '.join(wanted)}), or the new picture will differ.",
            file=sys.stderr,
        )


@contextmanager
def _drawing_bars(arguments: argparse.Namespace) -> Iterator[dict[str, Callable[..., None]]]:
    """Progress bars of both stages, as the callbacks of Blip3oPipeline.generate."""
    from tqdm import tqdm

    bars: dict[str, tqdm] = {}

    def show(label: str) -> Callable[..., None]:
        def on_step(step: int, total: int, _: Any) -> None:
            if label not in bars:
                bars[label] = tqdm(
                    total=0, desc=label, unit="step", disable=arguments.quiet or arguments.json
                )
            if step == 1:
                bars[label].total += total
            bars[label].update()

        return on_step

    try:
        yield {"on_feature_step": show("features"), "on_pixel_step": show("pixels")}
    finally:
        for bar in bars.values():
            bar.close()


def _save(arguments: argparse.Namespace, pipeline: Blip3oPipeline, generation: Generation) -> None:
    from ..blip3o_core.picture_files import checkpoint_fingerprint, describe_picture, save_png

    fingerprint = checkpoint_fingerprint(pipeline.files)
    pictures = generation.pictures
    saved = []
    for index, (path, picture) in enumerate(
        zip(_target_paths(arguments.out, len(pictures)), pictures, strict=True)
    ):
        description = describe_picture(generation, index, pipeline.files.name, fingerprint)
        save_png(picture, path, description)
        saved.append({"file": str(path), **description})
        if not arguments.json:
            print(path)
    if arguments.json:
        print(json.dumps(saved, indent=2, ensure_ascii=False))


def _check_target(out: Path) -> None:
    """Raise BadInputError for a target that cannot be written, before minutes go into the drawing."""
    if out.suffix.lower() in PICTURE_SUFFIXES and out.suffix.lower() != ".png":
        raise BadInputError(
            f'"{out}" is no PNG file; only PNG keeps prompt and seeds.\nName a .png file or a folder.'
        )
    folder = out.parent if out.suffix.lower() == ".png" else out
    blocked = next((each for each in (folder, *folder.parents) if each.exists() and not each.is_dir()), None)
    if blocked is not None:
        raise BadInputError(f'"{out}" cannot be written: "{blocked}" is a file.\nName another folder.')


def _target_paths(out: Path, count: int) -> list[Path]:
    """Names of new pictures; files that exist are never overwritten, except one named outright."""
    if out.suffix.lower() == ".png":
        if count == 1:
            return [out]
        return [out.with_name(f"{out.stem}_{index:02d}.png") for index in range(count)]
    taken = [path.stem.removeprefix("blip3o_") for path in out.glob("blip3o_*.png")]
    first = 1 + max((int(name) for name in taken if name.isdigit()), default=0)
    return [out / f"blip3o_{first + index:05d}.png" for index in range(count)]
