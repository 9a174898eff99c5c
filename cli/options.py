"""Options that several commands share, and what they become."""

from __future__ import annotations

import argparse
import io
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..blip3o_core.config import BUILT_IN_MODEL, PICTURE_SUFFIXES
from ..blip3o_core.errors import BadInputError, MissingFilesError, SettingError

if TYPE_CHECKING:  # torch takes seconds to import: only commands that compute do so
    from PIL import Image

    from ..blip3o_core.checkpoints.layout import CheckpointFiles
    from ..blip3o_core.pipeline import Blip3oPipeline

ANSWER_NAMES = {
    "max_new_tokens": "--max-tokens",
    "temperature": "--temperature",
    "top_p": "--top-p",
    "top_k": "--top-k",
    "repetition_penalty": "--repetition-penalty",
    "seed": "--seed",
    "min_pixels": "--min-pixels",
    "max_pixels": "--max-pixels",
    "batch_size": "--batch-size",
}


def command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], int | None] | None, text: str
) -> argparse.ArgumentParser:
    """Add a command to the parsers of `blip3o`."""
    parser = commands.add_parser(
        name, help=text, description=text, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.set_defaults(run_command=run)
    return parser


def add_part_options(parser: Any) -> None:
    """Where the parts of a checkpoint come from that may lie elsewhere."""
    parser.add_argument(
        "--decoder",
        type=Path,
        metavar="FOLDER",
        help="a diffusion-decoder folder, or a checkpoint that has one, for a model without its own",
    )
    parser.add_argument(
        "--image-encoder", type=Path, metavar="PATH", help="a separate EVA-CLIP file or its folder"
    )
    parser.add_argument(
        "--strict", action="store_true", help="refuse a checkpoint with tensors that nothing needs"
    )


def add_model_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model", type=Path, metavar="FOLDER", help="checkpoint folder (default: the built-in tiny model)"
    )
    group.add_argument("--dtype", default="auto", help="auto, bf16, fp16 or fp32 (default: auto)")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda or mps (default: auto)")
    group.add_argument(
        "--offload",
        action="store_true",
        help="keep networks in main memory, move each to the GPU while it works",
    )
    group.add_argument(
        "--stream",
        action="store_true",
        help="backbone and EVA-CLIP visit the GPU layer by layer: smallest, exact, slow for long answers",
    )
    group.add_argument(
        "--quantize",
        metavar="FORMAT",
        help="int8, nf4 or fp8: keep the weights of backbone and EVA-CLIP in fewer bits; fp8 is as large as int8 and less exact",
    )
    group.add_argument(
        "--compile",
        action="store_true",
        help="on a CUDA GPU: record and compile what is repeated; the first picture takes a minute more, later ones less",
    )
    add_part_options(group)
    parser.add_argument("--json", action="store_true", help="print JSON for scripts")
    parser.add_argument(
        "--quiet", action="store_true", help="no progress bars, no remarks when all is as usual"
    )


def add_drawing_options(parser: argparse.ArgumentParser) -> None:
    """Options shared by generate and vary; None = not given, so that --like and presets can fill in."""
    parser.add_argument(
        "--lora",
        action="append",
        metavar="FILE[:STRENGTH]",
        help="draw with a LoRA (a .safetensors file or a PEFT folder); 1 = as trained (default), may be repeated; "
        '"none" = without those of --like',
    )
    parser.add_argument("-o", "--out", default=".", help="folder, or one .png file (default: here)")
    parser.add_argument("--seed", type=int, help="of the first picture; picture i uses seed + i (default: 0)")
    parser.add_argument("--pixel-seed", type=int, help="seed of the decoder (default: the seed)")
    parser.add_argument("--preset", help="standard, published or fast (default: standard)")
    parser.add_argument(
        "--size",
        metavar="WxH",
        help="in pixels, multiples of 8 (default: the decoder's own; others are experimental)",
    )
    features = parser.add_argument_group("image features (what is in the picture)")
    features.add_argument("--steps", type=int, help="default: 30")
    features.add_argument("--cfg", type=float, help="guidance scale, 1 = off (default: 3)")
    features.add_argument("--sampler", help="euler, heun or ab2 (default: euler)")
    features.add_argument("--shift", type=float, help="above 1 spends more steps at high noise (default: 1)")
    features.add_argument(
        "--guidance-interval",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="noise levels with guidance (default: 0 1)",
    )
    pixels = parser.add_argument_group("decoder (how it is painted)")
    pixels.add_argument("--pixel-steps", type=int, help="default: 50")
    pixels.add_argument("--pixel-cfg", type=float, help="guidance scale, 1 = off (default: 3)")
    pixels.add_argument("--pixel-sampler", help="euler or dpmpp_2m (default: euler)")
    pixels.add_argument(
        "--tiled", action="store_true", default=None, help="decode in tiles: large pictures on small cards"
    )
    parser.add_argument(
        "--batch-size", type=int, default=8, help="most pictures in one network call (default: 8)"
    )


def add_answer_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("answer")
    group.add_argument("--max-tokens", type=int, default=256, help="longest answer (default: 256)")
    group.add_argument(
        "--temperature", type=float, default=0.0, help="0 = always the likeliest word (default: 0)"
    )
    group.add_argument("--top-p", type=float, default=1.0, help="default: 1, all words")
    group.add_argument("--top-k", type=int, default=0, help="default: 0, all words")
    group.add_argument("--repetition-penalty", type=float, default=1.0, help="default: 1, off")
    group.add_argument("--seed", type=int, default=0, help="for temperature above 0 (default: 0)")
    group.add_argument("--min-pixels", type=int, help="smallest area at which a picture is looked at")
    group.add_argument("--max-pixels", type=int, help="largest area: more shows finer detail and costs time")
    parser.add_argument("--system", metavar="PROMPT", help="another system prompt")


def given(value: Any, otherwise: Any) -> Any:
    return otherwise if value is None else value


def named(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


@contextmanager
def as_typed(names: Mapping[str, str]) -> Iterator[None]:
    """Let an error about a setting name the option that the person typed.

    Args:
        names: setting -> option.
    """
    try:
        yield
    except SettingError as error:
        raise BadInputError(f"{names.get(error.setting, error.setting)} {error.fault}") from error


def parse_size(text: str | None) -> tuple[int | None, int | None]:
    """(width, height) of "1024x768"; (None, None) = not given."""
    if text is None:
        return None, None
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(part.isascii() and part.isdigit() and len(part) < 10 for part in parts):
        raise BadInputError(f'"{text}" is no size.\nWrite width x height in pixels, e.g. 1024x768.')
    return int(parts[0]), int(parts[1])


def read_lines(source: str) -> list[str]:
    """The lines of a text file, or of standard input ("-"), without empty ones and those that begin with #.

    Raises:
        BadInputError: no such file, nothing in it, or it is not UTF-8 text.
    """
    name = "standard input" if source == "-" else f'"{source}"'
    try:
        content = sys.stdin.buffer.read() if source == "-" else Path(source).read_bytes()
    except OSError as error:
        raise BadInputError(
            f"{name} cannot be read ({error.strerror}).\nName a text file with one prompt a line."
        ) from error
    try:
        # Not splitlines: it also splits at characters that belong into a prompt.
        lines = [line.strip() for line in io.StringIO(content.decode("utf-8-sig"), newline=None)]
    except UnicodeDecodeError as error:
        raise BadInputError(f"{name} is not UTF-8 text.\nSave it as UTF-8.") from error
    prompts = [line for line in lines if line and not line.startswith("#")]
    if not prompts:
        raise BadInputError(f"{name} holds no prompt.\nWrite one a line.")
    return prompts


def picture_file(text: str) -> Path:
    """The path of a picture as it was typed.

    Raises:
        BadInputError: it is the address of one.
    """
    if "://" in text:
        raise BadInputError(
            f'"{text}" is an address, not a file.\nDownload the picture first, then name its file.'
        )
    return Path(text)


def open_picture(text: str) -> Image.Image:
    """The picture of a path as it was typed.

    Raises:
        BadInputError: no such file, no picture, or the address of one.
    """
    from ..blip3o_core.images import load_image

    return load_image(picture_file(text))


def check_writable(folder: Path, advice: str) -> None:
    """Raise BadInputError unless files can be written into a folder, or into the nearest one above it that is there.

    Args:
        advice: what to do instead.
    """
    there = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    if not there.is_dir():
        raise BadInputError(f'"{folder}" cannot be written: "{there}" is a file.\nName another folder.')
    try:
        # Asking for permission is answered wrongly on some systems; trying is not.
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise BadInputError(f'Nothing can be written into "{there}" ({error.strerror}).\n{advice}') from error


def built_in_model() -> Path:
    if not (BUILT_IN_MODEL / "config.json").is_file():
        raise MissingFilesError(
            f'The built-in tiny model is missing in "{BUILT_IN_MODEL}".\nInstall the project again, or name a checkpoint with --model.'
        )
    return BUILT_IN_MODEL


def open_files(arguments: argparse.Namespace, folder: Path | None) -> CheckpointFiles:
    """The checkpoint of a command that computes nothing."""
    from ..blip3o_core.checkpoints.layout import open_checkpoint

    return open_checkpoint(
        folder or built_in_model(),
        image_encoder=arguments.image_encoder,
        decoder=arguments.decoder,
        strict=arguments.strict,
    )


def open_pipeline(arguments: argparse.Namespace) -> Blip3oPipeline:
    from ..blip3o_core.pipeline import load_pipeline

    return load_pipeline(
        arguments.model or built_in_model(),
        dtype=arguments.dtype,
        device=arguments.device,
        offload=arguments.offload,
        quantize=arguments.quantize,
        stream=arguments.stream,
        compile=arguments.compile,
        image_encoder_path=arguments.image_encoder,
        decoder_path=arguments.decoder,
        strict=arguments.strict,
    )


def answer_options(arguments: argparse.Namespace) -> dict[str, Any]:
    from ..blip3o_core.language.answers import AnswerSettings
    from ..blip3o_core.language.prompts import SYSTEM_PROMPT

    with as_typed(ANSWER_NAMES):
        settings = AnswerSettings(
            max_new_tokens=arguments.max_tokens,
            temperature=arguments.temperature,
            top_p=arguments.top_p,
            top_k=arguments.top_k,
            repetition_penalty=arguments.repetition_penalty,
            seed=arguments.seed,
        )
    return {
        "settings": settings,
        "system_prompt": given(arguments.system, SYSTEM_PROMPT),
        "min_pixels": arguments.min_pixels,
        "max_pixels": arguments.max_pixels,
    }


def picture_paths(names: Sequence[str]) -> list[str]:
    """Picture files: those named, and those in the folders named.

    Raises:
        BadInputError: there is none, one that is named is not there, or it is the address of one.
    """
    paths: list[str] = []
    for name in names:
        if "://" not in name and Path(name).is_dir():
            found = sorted(
                child for child in Path(name).iterdir() if child.suffix.lower() in PICTURE_SUFFIXES
            )
            paths += map(str, found)
            continue
        if not picture_file(name).exists():
            raise BadInputError(f'There is no picture "{name}".\nCheck the path.')
        paths.append(name)
    if not paths:
        raise BadInputError(
            f"There is no picture in {', '.join(names)}.\nName picture files, or a folder with some."
        )
    return paths
