"""`blip3o generate` and `blip3o vary`."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..blip3o_core.config import PICTURE_SUFFIXES
from ..blip3o_core.errors import BadInputError, MissingFilesError
from ..blip3o_core.units import format_bytes
from ..blip3o_core.untrusted import is_inner_name, quote
from .options import (
    add_drawing_options,
    add_model_options,
    as_typed,
    check_writable,
    command,
    given,
    named,
    open_picture,
    open_pipeline,
    parse_size,
    picture_file,
    read_lines,
)

if TYPE_CHECKING:  # torch takes seconds to import: only commands that compute do so
    from ..blip3o_core.drawing.request import DrawRequest
    from ..blip3o_core.pipeline import Blip3oPipeline

# Settings and the options that a person types for them.
REQUEST_NAMES = {
    "images_per_prompt": "--count",
    "batch_size": "--batch-size",
    "seed": "--seed",
    "pixel_seed": "--pixel-seed",
    "preset": "--preset",
    "strength": "--strength",
    "width": "--size: the width",
    "height": "--size: the height",
}
FEATURE_NAMES = {
    "steps": "--steps",
    "guidance_scale": "--cfg",
    "sampler": "--sampler",
    "shift": "--shift",
    "guidance_interval": "--guidance-interval",
}
PIXEL_NAMES = {
    "steps": "--pixel-steps",
    "guidance_scale": "--pixel-cfg",
    "sampler": "--pixel-sampler",
    "width": "--size: the width",
    "height": "--size: the height",
}
ZEROS = "zeros"


def add_generate(commands: Any) -> None:
    parser = command(commands, "generate", run_generate, "Draw pictures from prompts.")
    parser.add_argument(
        "prompt",
        nargs="*",
        help='what the picture should show; several prompts make several pictures; "-" = from standard input, one a line',
    )
    parser.add_argument(
        "--prompts",
        metavar="FILE",
        help='prompts from a text file, one a line ("-" = standard input); empty lines and lines with # are left out',
    )
    parser.add_argument("-n", "--count", type=int, default=1, help="pictures for each prompt (default: 1)")
    parser.add_argument(
        "--like",
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
        action="append",
        default=[],
        metavar="FILE",
        help="a picture inside the prompt (edit instructions); may be repeated; <image> in the prompt is its place",
    )
    parser.add_argument("--start-image", metavar="FILE", help="start the decoder from this picture")
    parser.add_argument("--strength", type=float, help="how far from the start picture, 0 to 1 (default: 1)")
    add_drawing_options(parser)
    add_model_options(parser)


def add_vary(commands: Any) -> None:
    parser = command(
        commands, "vary", run_vary, "Draw new pictures from pictures, through EVA-CLIP image features."
    )
    parser.add_argument("picture", nargs="+", help="picture files")
    parser.add_argument("--prompt", help="move the pictures towards this text")
    parser.add_argument("--strength", type=float, help="how far towards the prompt, 0 to 1 (default: 0.6)")
    parser.add_argument("-n", "--count", type=int, default=1, help="pictures for each input (default: 1)")
    add_drawing_options(parser)
    add_model_options(parser)


def run_generate(arguments: argparse.Namespace) -> None:
    from ..blip3o_core.drawing.request import DrawRequest
    from ..blip3o_core.picture_files import read_note

    like = read_note(picture_file(arguments.like)) if arguments.like else {}
    if like and not like.get("prompt") and not arguments.prompt:
        raise BadInputError(
            f'"{arguments.like}" was drawn from another picture without a prompt.\n'
            "Use blip3o vary with that picture, or write a prompt."
        )
    known = _options_of(arguments.like, like)
    in_prompt = tuple(map(open_picture, arguments.image))
    prompts = _prompts(arguments) or known.pop("prompts", ())
    if not prompts:
        raise BadInputError(
            'There is no prompt.\nWrite one, e.g. blip3o generate "a red circle", or use --like picture.png.'
        )
    if arguments.seed is not None:
        known.pop("pixel_seed", None)
    start_images = (open_picture(arguments.start_image),) if arguments.start_image else ()
    if not start_images:
        known.pop("strength", None)
    options = {
        **known,
        **_settings(arguments, known),
        **_request_options(arguments),
        **named(negative_prompt=arguments.negative, pixel_negative=arguments.pixel_negative),
        "prompts": tuple(prompts),
        "images": (in_prompt,) * len(prompts) if in_prompt else (),
        "start_images": start_images,
    }
    if options.get("pixel_negative") == ZEROS:
        options["pixel_negative"] = None
    with as_typed(REQUEST_NAMES):
        request = DrawRequest(**options)
    pipeline = _ready_pipeline(arguments, request)
    _load_loras(arguments, pipeline, like)
    for text in (
        _other_checkpoint(pipeline, like),
        _missing_pictures(arguments, like),
        _published_noise(arguments, like),
    ):
        if text:
            print(f"Note: {text}", file=sys.stderr)
    _draw(arguments, pipeline, request)


def run_vary(arguments: argparse.Namespace) -> None:
    from ..blip3o_core.drawing.request import DrawRequest

    pictures = tuple(map(open_picture, arguments.picture))
    with as_typed(REQUEST_NAMES):
        request = DrawRequest(
            prompts=(arguments.prompt or "",) * len(pictures),
            start_pictures=pictures,
            **{"strength": 0.6, **_settings(arguments, {}), **_request_options(arguments)},
        )
    pipeline = _ready_pipeline(arguments, request)
    _load_loras(arguments, pipeline, {})
    _draw(arguments, pipeline, request)


def _prompts(arguments: argparse.Namespace) -> list[str]:
    """The prompts of the command line, of a file or of standard input."""
    if arguments.prompts is not None:
        return [*arguments.prompt, *read_lines(arguments.prompts)]
    return read_lines("-") if arguments.prompt == ["-"] else arguments.prompt


def _request_options(arguments: argparse.Namespace) -> dict[str, Any]:
    return {
        **named(
            seed=arguments.seed,
            pixel_seed=arguments.pixel_seed,
            preset=arguments.preset,
            strength=arguments.strength,
        ),
        "images_per_prompt": arguments.count,
        "batch_size": arguments.batch_size,
    }


def _options_of(path: str, note: Mapping[str, Any]) -> dict[str, Any]:
    """What --like says about a drawing."""
    from ..blip3o_core.drawing.request import DrawRequest

    try:
        return DrawRequest.options_of_note(note)
    except BadInputError as error:
        raise BadInputError(
            f'"{path}" does not say clearly how it was made. {error}\nWrite prompt and settings yourself.'
        ) from error


def _settings(arguments: argparse.Namespace, known: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of both stages: the preset's, then those of --like, then what the command line names."""
    from ..blip3o_core.drawing.presets import PRESETS
    from ..blip3o_core.errors import check_choice

    name = given(arguments.preset, known.get("preset", "standard"))
    with as_typed(REQUEST_NAMES):
        check_choice("preset", name, list(PRESETS))
    use_like = arguments.preset is None
    width, height = parse_size(arguments.size)
    interval = None if arguments.guidance_interval is None else tuple(arguments.guidance_interval)
    features = known["features"] if use_like and "features" in known else PRESETS[name].features
    pixels = known["pixels"] if use_like and "pixels" in known else PRESETS[name].pixels
    with as_typed(FEATURE_NAMES):
        features = replace(
            features,
            **named(
                steps=arguments.steps,
                guidance_scale=arguments.cfg,
                sampler=arguments.sampler,
                shift=arguments.shift,
                guidance_interval=interval,
            ),
        )
    with as_typed(PIXEL_NAMES):
        pixels = replace(
            pixels,
            **named(
                steps=arguments.pixel_steps,
                guidance_scale=arguments.pixel_cfg,
                sampler=arguments.pixel_sampler,
                width=width,
                height=height,
                tiled=arguments.tiled,
            ),
        )
    return {"features": features, "pixels": pixels}


def _ready_pipeline(arguments: argparse.Namespace, request: DrawRequest) -> Blip3oPipeline:
    """The pipeline, once everything that can be known about a drawing beforehand is in order."""
    _check_target(arguments.out, request.total)
    pipeline = open_pipeline(arguments)
    with as_typed(REQUEST_NAMES):
        pipeline.check(request)
    _check_room(Path(arguments.out), request, pipeline)
    return pipeline


def _load_loras(arguments: argparse.Namespace, pipeline: Blip3oPipeline, like: Mapping[str, Any]) -> None:
    """The LoRAs of the command line, else those of --like."""
    from ..blip3o_core.lora.files import split_strength
    from ..blip3o_core.picture_files import loras_of_note

    if arguments.lora is not None:
        for text in arguments.lora:
            if text != "none":
                pipeline.load_lora(*split_strength(text))
        return
    for used in loras_of_note(arguments.like, like) if like else ():
        # A picture of a stranger must not make this computer look anywhere else, least of all on a share in the network.
        folders = (Path("."), Path(arguments.like).parent) if is_inner_name(used["file"]) else ()
        path = next((place for folder in folders if (place := folder / used["file"]).exists()), None)
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


def _other_checkpoint(pipeline: Blip3oPipeline, like: Mapping[str, Any]) -> str | None:
    from ..blip3o_core.checkpoints.fingerprints import checkpoint_fingerprint

    wanted = like.get("checkpoint_hash")
    if not wanted or wanted == checkpoint_fingerprint(pipeline.files):
        return None
    return (
        f"the picture was made with checkpoint {quote(like.get('checkpoint'))} ({str(wanted)[:16]}), another than the loaded "
        f'"{pipeline.files.name}". The new picture will differ.'
    )


def _published_noise(arguments: argparse.Namespace, like: Mapping[str, Any]) -> str | None:
    """Published code draws the decoder's negative once, from the noise of the first picture of a run."""
    if like.get("preset") != "published" or arguments.preset not in (None, "published"):
        return None
    return (
        f'"{arguments.like}" was drawn with the preset "published", in which all pictures of a run depend on '
        "its first picture. Unless it was the first, the new picture will differ."
    )


def _missing_pictures(arguments: argparse.Namespace, like: Mapping[str, Any]) -> str | None:
    """A PNG keeps settings, not the pictures it was made from."""
    missing = {"prompt": "--image", "start": "--start-image", "features": "blip3o vary"}
    if arguments.image:
        del missing["prompt"]
    if arguments.start_image:
        del missing["start"]
    given_once = like.get("made_from_pictures")
    wanted = [missing[place] for place in missing if isinstance(given_once, list) and place in given_once]
    if not wanted:
        return None
    return (
        f'"{arguments.like}" was also made from pictures, which its file does not hold. '
        f"Give them again ({', '.join(wanted)}), or the new picture will differ."
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
                bars[label].total = (bars[label].total or 0) + total
            bars[label].update()

        return on_step

    try:
        yield {"on_feature_step": show("features"), "on_pixel_step": show("pixels")}
    finally:
        for bar in bars.values():
            bar.close()


def _draw(arguments: argparse.Namespace, pipeline: Blip3oPipeline, request: DrawRequest) -> None:
    """Draw, and save each picture as soon as its batch is there: what is done stays, whatever happens next."""
    from ..blip3o_core.checkpoints.fingerprints import checkpoint_fingerprint
    from ..blip3o_core.picture_files import describe_picture, save_png

    fingerprint = checkpoint_fingerprint(pipeline.files)
    paths = _target_paths(Path(arguments.out), request.total)
    saved: list[dict[str, Any]] = []
    try:
        with _drawing_bars(arguments) as bars:
            for generation in pipeline.draw(request, **bars):
                for index, picture in enumerate(generation.pictures):
                    path = next(paths)
                    description = describe_picture(generation, index, pipeline.files.name, fingerprint)
                    save_png(picture, path, description)
                    saved.append({"file": str(path), **description})
                    if not arguments.json:
                        print(path, flush=True)
    finally:
        if arguments.json:
            print(json.dumps(saved, indent=2, ensure_ascii=False))
        if saved and len(saved) < request.total and not isinstance(sys.exc_info()[1], BrokenPipeError):
            print(f"{len(saved)} of {request.total} pictures are saved.", file=sys.stderr)


def _check_target(out: str, count: int) -> None:
    """Raise BadInputError for a target that cannot be written, before minutes go into the drawing."""
    if not out:
        raise BadInputError(
            "--out is empty.\nName a folder or a .png file, or leave --out away to draw here."
        )
    path = Path(out)
    if path.suffix.lower() in PICTURE_SUFFIXES and path.suffix.lower() != ".png":
        raise BadInputError(
            f'"{out}" is not a PNG file; only PNG keeps prompt and seeds.\nName a .png file or a folder.'
        )
    is_picture = path.suffix.lower() == ".png"
    if is_picture and count == 1 and path.is_dir():
        raise BadInputError(f'"{out}" is a folder, but named like a picture.\nName another file with --out.')
    folder = path.parent if is_picture else path
    check_writable(folder, "Name another folder with --out.")


def _check_room(out: Path, request: DrawRequest, pipeline: Blip3oPipeline) -> None:
    """Raise BadInputError when the disk is too full for the pictures, each counted as if nothing could be compressed."""
    height, width = request.size(pipeline.files.decoder_config("unet"), pipeline.files.decoder_config("vae"))
    there = next(each for each in (out, *out.absolute().parents) if each.exists())
    needed, disk = 3 * height * width * request.total, shutil.disk_usage(there)
    # Some network drives tell no size at all.
    if disk.total and needed > disk.free:
        raise BadInputError(
            f'{request.total} pictures of {width} x {height} pixels may need {format_bytes(needed)}, but "{there}" has '
            f"{format_bytes(disk.free)} free.\nMake room, name another folder with --out, or draw fewer (--count)."
        )


def _target_paths(out: Path, count: int) -> Iterator[Path]:
    """Names of new pictures; files that exist are never overwritten, except one named outright."""
    if out.suffix.lower() == ".png":
        several = (out.with_name(f"{out.stem}_{index:02d}.png") for index in range(count))
        yield from [out] if count == 1 else several
        return
    taken = [path.stem.removeprefix("blip3o_") for path in out.glob("blip3o_*.png")]
    number = max((int(name) for name in taken if name.isdigit()), default=0)
    for _ in range(count):
        number += 1
        # Another run may have drawn into the folder since the last picture.
        while (path := out / f"blip3o_{number:05d}.png").exists():
            number += 1
        yield path
