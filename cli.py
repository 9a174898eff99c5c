"""The `blip3o` command: draw, ask, caption, vary, inspect, download, convert, verify, check, train, pretrain and score."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .blip3o_core.config import BUILT_IN_MODEL
from .blip3o_core.errors import BadInputError, Blip3oError, MissingFilesError
from .blip3o_core.units import UNIT_WORDS, format_bytes
from .cli_doctor import add_doctor
from .lora_training.cli import add_lora
from .pretraining.benchmarks import add_benchmark_arguments, run_benchmark
from .pretraining.cli import add_eval, add_pretrain, run_eval, run_pretrain

if TYPE_CHECKING:  # torch takes seconds to import: only commands that compute do so
    from .blip3o_core.checkpoints.layout import CheckpointFiles
    from .blip3o_core.memory_plan import MemoryPlan
    from .blip3o_core.pipeline import Blip3oPipeline, Generation

EXIT_ERROR = 2
EXIT_INTERRUPTED = 130
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0 done, 1 verification failed, 2 a user can mend it, 130 interrupted."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    arguments = build_parser().parse_args(argv)
    try:
        return arguments.run_command(arguments) or 0
    except Blip3oError as error:
        print(error, file=sys.stderr)
        return EXIT_ERROR
    except OSError as error:
        print(
            f"A file cannot be read or written: {error}.\nCheck the path, its permissions and the free space.",
            file=sys.stderr,
        )
        return EXIT_ERROR
    except KeyboardInterrupt:
        print("Stopped.", file=sys.stderr)
        return EXIT_INTERRUPTED


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="blip3o",
        description="BLIP3-o draws pictures from prompts and answers questions about pictures.",
        epilog='Without --model the small built-in model is used. "blip3o COMMAND --help" tells more.',
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_generate(commands)
    _add_vary(commands)
    _add_ask(commands)
    _add_caption(commands)
    _add_info(commands)
    _add_download(commands)
    _add_convert(commands)
    _add_verify(commands)
    add_doctor(commands)
    add_lora(
        _command(
            commands, "lora", None, "Teach the model something of your own: train, prove and manage LoRAs."
        )
    )
    add_pretrain(
        _command(
            commands,
            "pretrain",
            run_pretrain,
            "Train a BLIP3-o, stage by stage; the recipe of the built-in model.",
        )
    )
    add_eval(_command(commands, "eval", run_eval, "Score a checkpoint on the scene world."))
    add_benchmark_arguments(
        _command(
            commands,
            "benchmark",
            run_benchmark,
            "Draw the pictures of GenEval, DPG-Bench or WISE for their own scorers.",
        )
    )
    return parser


def _command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], int | None] | None, text: str
) -> Any:
    parser = commands.add_parser(
        name, help=text, description=text, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.set_defaults(run_command=run)
    return parser


def _add_model_options(parser: argparse.ArgumentParser) -> None:
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
    group.add_argument(
        "--image-encoder", type=Path, metavar="PATH", help="a separate EVA-CLIP file or its folder"
    )
    parser.add_argument("--json", action="store_true", help="print JSON for scripts")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")


def _add_drawing_options(parser: argparse.ArgumentParser) -> None:
    """Options shared by generate and vary; None = not given, so that --like and presets can fill in."""
    parser.add_argument(
        "--lora",
        action="append",
        metavar="FILE[:STRENGTH]",
        help="draw with a LoRA (a .safetensors file or a PEFT folder); 1 = as trained (default), may be repeated; "
        '"none" = without those of --like',
    )
    parser.add_argument(
        "-o", "--out", type=Path, default=Path("."), help="folder, or one .png file (default: here)"
    )
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


def _add_generate(commands: Any) -> None:
    parser = _command(commands, "generate", run_generate, "Draw pictures from prompts.")
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
    _add_drawing_options(parser)
    _add_model_options(parser)


def _add_vary(commands: Any) -> None:
    parser = _command(
        commands, "vary", run_vary, "Draw new pictures from pictures, through EVA-CLIP image features."
    )
    parser.add_argument("picture", type=Path, nargs="+", help="picture files")
    parser.add_argument("--prompt", help="move the pictures towards this text")
    parser.add_argument("--strength", type=float, help="how far towards the prompt, 0 to 1 (default: 0.6)")
    parser.add_argument("-n", "--count", type=int, default=1, help="pictures for each input (default: 1)")
    _add_drawing_options(parser)
    _add_model_options(parser)


def _add_answer_options(parser: argparse.ArgumentParser) -> None:
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


def _add_ask(commands: Any) -> None:
    parser = _command(commands, "ask", run_ask, "Ask about pictures.")
    parser.add_argument("question")
    parser.add_argument("picture", type=Path, nargs="*", help="pictures, asked about one by one")
    parser.add_argument("--together", action="store_true", help="one question about all the pictures at once")
    parser.add_argument(
        "--choices", nargs="+", metavar="CHOICE", help="answer with the probability of each of these"
    )
    parser.add_argument("--yes-no", action="store_true", help="answer with the probability of yes")
    _add_answer_options(parser)
    _add_model_options(parser)


def _add_caption(commands: Any) -> None:
    parser = _command(
        commands, "caption", run_caption, "Describe pictures; optionally write a text file beside each."
    )
    parser.add_argument("picture", type=Path, nargs="+", help="picture files or folders of them")
    parser.add_argument("--style", default="short", help="short, detailed, tags or training (default: short)")
    parser.add_argument(
        "--write", action="store_true", help="write NAME.txt beside NAME.png; existing files are kept"
    )
    parser.add_argument("--overwrite", action="store_true", help="with --write: replace existing text files")
    parser.add_argument("--batch-size", type=int, default=4, help="pictures looked at together (default: 4)")
    _add_answer_options(parser)
    _add_model_options(parser)


def _add_info(commands: Any) -> None:
    parser = _command(
        commands,
        "info",
        run_info,
        "What is in a checkpoint folder, and in which memory it fits.",
    )
    parser.epilog = UNIT_WORDS
    parser.add_argument("folder", type=Path, nargs="?", help="default: the built-in tiny model")
    parser.add_argument(
        "--plan",
        metavar="SIZE",
        help="what goes where on a card of this size, e.g. 8GB, and with which options",
    )
    parser.add_argument("--json", action="store_true", help="print JSON for scripts")


def _add_download(commands: Any) -> None:
    parser = _command(
        commands,
        "download",
        run_download,
        "Download a checkpoint: only the files needed, resumable, checksums verified.",
    )
    parser.epilog = UNIT_WORDS
    parser.add_argument("repo", help="8b, 4b, or a repository OWNER/NAME of the hub")
    parser.add_argument(
        "folder", type=Path, help="where to put it, e.g. ComfyUI/models/blip3o/BLIP3o-Model-8B"
    )
    parser.add_argument(
        "--use",
        default="generate",
        choices=("generate", "encode"),
        help="generate = draw and answer; encode = also take pictures in as image features (default: generate)",
    )
    parser.add_argument("--revision", help="branch, tag or commit (default: main)")
    parser.add_argument("--dry-run", action="store_true", help="only show what would be downloaded")
    parser.add_argument(
        "--no-verify", action="store_true", help="trust files that already have the right size"
    )


def _add_convert(commands: Any) -> None:
    parser = _command(
        commands,
        "convert",
        run_convert,
        "Write a checkpoint folder again in another dtype, or a pickled EVA-CLIP (.bin) as safetensors.",
    )
    parser.add_argument("source", type=Path, help="checkpoint folder, or a .bin file")
    parser.add_argument("target", type=Path, help="new folder, or a .safetensors file")
    parser.add_argument("--dtype", default="bf16", help="bf16, fp16 or fp32 (default: bf16)")
    parser.add_argument(
        "--image-encoder", type=Path, metavar="PATH", help="put this EVA-CLIP into the folder"
    )


def _add_verify(commands: Any) -> None:
    parser = _command(
        commands,
        "verify-reference",
        run_verify,
        "Compare this installation with reference numbers of the published code; prints JSON, exit code 1 on a mismatch.",
    )
    parser.add_argument(
        "folder", type=Path, help="folder with checkpoint/, golden.safetensors, golden.json and pictures"
    )


def run_generate(arguments: argparse.Namespace) -> None:
    from .blip3o_core.images import load_image
    from .blip3o_core.metadata import read_description

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
    pixel_negative = _given(arguments.pixel_negative, like.get("pixel_negative", " "))
    pipeline = _open_pipeline(arguments)
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
            seed=_given(arguments.seed, like.get("seed", 0)),
            pixel_seed=_given(
                arguments.pixel_seed, None if arguments.seed is not None else like.get("pixel_seed")
            ),
            preset=_given(arguments.preset, like.get("preset", "standard")),
            features=features,
            pixels=pixels,
            negative_prompt=_given(arguments.negative, like.get("negative_prompt")),
            pixel_negative=None if pixel_negative == "zeros" else pixel_negative,
            pixel_negative_seed=like.get("pixel_negative_seed", 0),
            start_images=start,
            strength=_given(arguments.strength, like.get("strength", 1.0) if start else 1.0),
            batch_size=arguments.batch_size,
            **bars,
        )
    _save(arguments, pipeline, generation)


def run_vary(arguments: argparse.Namespace) -> None:
    from .blip3o_core.images import load_image

    _check_target(arguments.out)
    pictures = [load_image(path) for path in arguments.picture]
    pipeline = _open_pipeline(arguments)
    _load_loras(arguments, pipeline, {})
    features, pixels = _settings(arguments, {})
    with _drawing_bars(arguments) as bars:
        generation = pipeline.vary(
            pictures,
            prompt=arguments.prompt,
            strength=_given(arguments.strength, 0.6),
            count=arguments.count,
            seed=_given(arguments.seed, 0),
            pixel_seed=arguments.pixel_seed,
            preset=_given(arguments.preset, "standard"),
            features=features,
            pixels=pixels,
            batch_size=arguments.batch_size,
            **bars,
        )
    _save(arguments, pipeline, generation)


def run_ask(arguments: argparse.Namespace) -> None:
    from .blip3o_core.images import load_image

    paths = arguments.picture
    pictures = [load_image(path) for path in paths]
    pipeline = _open_pipeline(arguments)
    together = arguments.together or not paths
    groups = [pictures] if together else [[picture] for picture in pictures]
    limits = {"min_pixels": arguments.min_pixels, "max_pixels": arguments.max_pixels}
    if arguments.choices:
        answers: list[Any] = [
            pipeline.choose(arguments.question, arguments.choices, each, **limits) for each in groups
        ]
    elif arguments.yes_no:
        answers = [{"yes": pipeline.ask_yes_no(arguments.question, each, **limits)} for each in groups]
    else:
        with _streaming(arguments, len(groups)) as on_text:
            answers = pipeline.ask(arguments.question, groups, on_text=on_text, **_answer_options(arguments))
        if on_text is not None:
            return
    labels = [[str(path) for path in paths]] if together else [[str(path)] for path in paths]
    if arguments.json:
        rows = zip(labels, answers, strict=True)
        print(
            json.dumps(
                [{"pictures": each, "answer": answer} for each, answer in rows], indent=2, ensure_ascii=False
            )
        )
        return
    for each, answer in zip(labels, answers, strict=True):
        if isinstance(answer, dict):
            answer = "  ".join(f"{choice} {probability:.3f}" for choice, probability in answer.items())
        print(answer if len(labels) == 1 else f"{each[0]}: {answer}")


def run_caption(arguments: argparse.Namespace) -> None:
    from tqdm import tqdm

    from .blip3o_core.checkpoints.save import write_text
    from .blip3o_core.images import load_image

    paths = _picture_paths(arguments.picture)
    if arguments.write and not arguments.overwrite:
        paths = [path for path in paths if not path.with_suffix(".txt").exists()]
    pipeline = _open_pipeline(arguments)
    captions = {}
    with tqdm(total=len(paths), unit="picture", disable=arguments.quiet or arguments.json) as bar:
        for start in range(0, len(paths), arguments.batch_size):
            batch = paths[start : start + arguments.batch_size]
            written = pipeline.caption(
                [load_image(path) for path in batch], arguments.style, **_answer_options(arguments)
            )
            for path, caption in zip(batch, written, strict=True):
                captions[str(path)] = caption
                if arguments.write:
                    write_text(path.with_suffix(".txt"), caption + "\n")
            bar.update(len(batch))
    if arguments.json:
        print(json.dumps(captions, indent=2, ensure_ascii=False))
    else:
        for path, caption in captions.items():
            print(caption if len(captions) == 1 else f"{path}: {caption}")


def run_info(arguments: argparse.Namespace) -> None:
    from .blip3o_core.checkpoints.layout import open_checkpoint
    from .blip3o_core.info import describe_checkpoint

    files = open_checkpoint(arguments.folder or _built_in_model())
    plans = _memory_plans(files, arguments.plan) if arguments.plan else []
    if plans and not arguments.json:
        print("\n".join(str(plan) for plan in plans))
        return
    description = describe_checkpoint(files)
    if plans:
        from .blip3o_core.memory_plan import plan_json

        description["plans"] = [plan_json(plan) for plan in plans]
    if arguments.json:
        print(json.dumps(description, indent=2))
        return
    print(
        f"{description['name']}  ({format_bytes(description['total_bytes'])}, fingerprint {description['fingerprint']})"
    )
    for name, info in description["components"].items():
        if info["problem"]:
            print(f"  {name:14} not usable: {info['problem'].splitlines()[0]}")
        else:
            print(
                f"  {name:14} {format_bytes(info['bytes']):>9}  {info['parameters'] / 1e6:10,.1f} M parameters  {', '.join(info['dtypes'])}"
            )
    for use, fit in description["memory"].items():
        if fit["available"]:
            cards = ", ".join(f"{card}: {verdict}" for card, verdict in fit["cards"].items())
            print(
                f"To {use}: {format_bytes(fit['together_bytes'])} of weights, {format_bytes(fit['offload_bytes'])} with --offload. {cards}"
            )


def _memory_plans(files: CheckpointFiles, size: str) -> list[MemoryPlan]:
    """A plan for every use whose networks are there."""
    from .blip3o_core.memory_plan import USES, largest_file, measure_disk, parse_memory, plan_memory

    budget, speed = parse_memory(size), measure_disk(largest_file(files))
    usable = [use for use, networks in USES.items() if all(map(files.has_component, networks))]
    return [plan_memory(files, budget, use, bytes_per_second=speed) for use in usable]


def run_download(arguments: argparse.Namespace) -> None:
    from .blip3o_core.download import plan_download, progress_bars
    from .blip3o_core.download import run_download as fetch

    with progress_bars() as on_check:
        plan = plan_download(
            arguments.repo,
            arguments.folder,
            use=arguments.use,
            revision=arguments.revision,
            on_check=on_check,
        )
    print(plan)
    if not arguments.dry_run:
        with progress_bars(plan) as on_progress:
            fetch(plan, on_progress=on_progress, verify=not arguments.no_verify)
        print(f'Done. Try: blip3o generate "a photo of a cat" --model "{arguments.folder}"')


def run_convert(arguments: argparse.Namespace) -> None:
    import torch

    from .blip3o_core.convert import convert_folder, convert_pickle
    from .blip3o_core.devices import pick_dtype

    if arguments.dtype == "auto":
        raise BadInputError("A conversion needs a dtype: bf16, fp16 or fp32.")
    dtype = pick_dtype(arguments.dtype, torch.device("cpu"), 0)
    if arguments.source.is_file():
        written = convert_pickle(arguments.source, arguments.target, dtype)
    else:
        written = convert_folder(arguments.source, arguments.target, dtype, arguments.image_encoder)
    print(f"Wrote {written}")


def run_verify(arguments: argparse.Namespace) -> int:
    from .blip3o_core.verify import report_json, verify_reference

    checks = verify_reference(arguments.folder)
    print(report_json(checks))
    return 0 if all(check.passed for check in checks) else 1


def _built_in_model() -> Path:
    if not (BUILT_IN_MODEL / "config.json").is_file():
        raise MissingFilesError(
            f'The built-in tiny model is missing in "{BUILT_IN_MODEL}".\nInstall the project again, or name a checkpoint with --model.'
        )
    return BUILT_IN_MODEL


def _open_pipeline(arguments: argparse.Namespace) -> Blip3oPipeline:
    from .blip3o_core.pipeline import load_pipeline

    return load_pipeline(
        arguments.model or _built_in_model(),
        dtype=arguments.dtype,
        device=arguments.device,
        offload=arguments.offload,
        quantize=arguments.quantize,
        stream=arguments.stream,
        compile=arguments.compile,
        image_encoder_path=arguments.image_encoder,
    )


def _load_loras(arguments: argparse.Namespace, pipeline: Blip3oPipeline, like: dict[str, Any]) -> None:
    """The LoRAs of the command line, else those of --like."""
    from .blip3o_core.lora import split_strength

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
    from .blip3o_core.decoding import PixelSettings
    from .blip3o_core.presets import PRESETS
    from .blip3o_core.sampling import FeatureSettings, check_choice

    name = _given(arguments.preset, like.get("preset", "standard"))
    check_choice("preset", name, list(PRESETS))
    use_like = arguments.preset is None
    width, height = _parse_size(arguments.size)
    features = {
        **vars(PRESETS[name].features),
        **(like.get("features", {}) if use_like else {}),
        **_named(
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
        **_named(
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


def _parse_size(text: str | None) -> tuple[int | None, int | None]:
    if text is None:
        return None, None
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(part.isdigit() for part in parts):
        raise BadInputError(f'"{text}" is no size.\nWrite width x height in pixels, e.g. 1024x768.')
    return int(parts[0]), int(parts[1])


def _named(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _given(value: Any, otherwise: Any) -> Any:
    return otherwise if value is None else value


def _warn_of_other_checkpoint(pipeline: Blip3oPipeline, like: dict[str, Any]) -> None:
    from .blip3o_core.metadata import checkpoint_fingerprint

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


@contextmanager
def _streaming(arguments: argparse.Namespace, rows: int) -> Iterator[Callable[[int, str], None] | None]:
    """Print a single answer while it is written; None when several answers or JSON are wanted."""
    if rows != 1 or arguments.json:
        yield None
        return
    shown = ""

    def on_text(_: int, text: str) -> None:
        nonlocal shown
        # A character of several tokens decodes to a replacement sign until it is whole.
        if not text.endswith("\ufffd"):
            print(text[len(shown) :], end="", flush=True)
            shown = text

    yield on_text
    print()


def _answer_options(arguments: argparse.Namespace) -> dict[str, Any]:
    from .blip3o_core.prompts import SYSTEM_PROMPT
    from .blip3o_core.understanding import AnswerSettings

    return {
        "settings": AnswerSettings(
            max_new_tokens=arguments.max_tokens,
            temperature=arguments.temperature,
            top_p=arguments.top_p,
            top_k=arguments.top_k,
            repetition_penalty=arguments.repetition_penalty,
            seed=arguments.seed,
        ),
        "system_prompt": _given(arguments.system, SYSTEM_PROMPT),
        "min_pixels": arguments.min_pixels,
        "max_pixels": arguments.max_pixels,
    }


def _picture_paths(given: Sequence[Path]) -> list[Path]:
    paths: list[Path] = []
    for path in given:
        if path.is_dir():
            paths += sorted(child for child in path.iterdir() if child.suffix.lower() in PICTURE_SUFFIXES)
        else:
            paths.append(path)
    if not paths:
        raise BadInputError(
            f"There is no picture in {', '.join(map(str, given))}.\nName picture files, or a folder with some."
        )
    return paths


def _save(arguments: argparse.Namespace, pipeline: Blip3oPipeline, generation: Generation) -> None:
    from .blip3o_core.metadata import checkpoint_fingerprint, describe_picture, save_png

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


if __name__ == "__main__":
    sys.exit(main())
