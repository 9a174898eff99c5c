"""`blip3o info`, `download`, `convert` and `verify-reference`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..blip3o_core.errors import BadInputError
from ..blip3o_core.units import UNIT_WORDS, format_bytes
from .options import add_part_options, command, open_files

if TYPE_CHECKING:  # torch takes seconds to import: only commands that compute do so
    from ..blip3o_core.checkpoints.layout import CheckpointFiles
    from ..blip3o_core.checkpoints.memory_plan import MemoryPlan


def add_info(commands: Any) -> None:
    parser = command(
        commands, "info", run_info, "What is in a checkpoint folder, and in which memory it fits."
    )
    parser.epilog = UNIT_WORDS
    parser.add_argument("folder", type=Path, nargs="?", help="default: the built-in tiny model")
    parser.add_argument(
        "--plan",
        metavar="SIZE",
        help="what goes where on a card of this size, e.g. 8GB, and with which options",
    )
    add_part_options(parser)
    parser.add_argument("--json", action="store_true", help="print JSON for scripts")


def add_download(commands: Any) -> None:
    parser = command(
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
    parser.add_argument(
        "--replace", action="store_true", help="put the files in place of another repository's in that folder"
    )
    parser.add_argument("--dry-run", action="store_true", help="only show what would be downloaded")
    parser.add_argument(
        "--no-verify", action="store_true", help="trust files that already have the right size"
    )


def add_convert(commands: Any) -> None:
    parser = command(
        commands,
        "convert",
        run_convert,
        "Write a checkpoint folder again in another dtype, or a pickled EVA-CLIP (.bin) as safetensors.",
    )
    parser.add_argument("source", type=Path, help="checkpoint folder, or a .bin file")
    parser.add_argument("target", type=Path, help="new folder, or a .safetensors file")
    parser.add_argument("--dtype", default="bf16", help="bf16, fp16 or fp32 (default: bf16)")
    add_part_options(parser)


def add_verify(commands: Any) -> None:
    parser = command(
        commands,
        "verify-reference",
        run_verify,
        "Compare this installation with reference numbers of the published code; prints JSON, exit code 1 on a mismatch.",
    )
    parser.add_argument(
        "folder", type=Path, help="folder with checkpoint/, golden.safetensors, golden.json and pictures"
    )


def run_info(arguments: argparse.Namespace) -> None:
    from ..blip3o_core.checkpoints.info import describe_checkpoint
    from ..blip3o_core.checkpoints.layout import LeftOut
    from ..blip3o_core.checkpoints.match import describe_left_out

    files = open_files(arguments, arguments.folder)
    plans = _memory_plans(files, arguments.plan) if arguments.plan else []
    if plans and not arguments.json:
        print("\n".join(str(plan) for plan in plans))
        return
    description = describe_checkpoint(files)
    if plans:
        from ..blip3o_core.checkpoints.memory_plan import plan_json

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
    if description["left_out"]:
        print(f"  left out: {describe_left_out([LeftOut(**group) for group in description['left_out']])}")
    for use, fit in description["memory"].items():
        if fit["available"]:
            cards = ", ".join(f"{card}: {verdict}" for card, verdict in fit["cards"].items())
            print(
                f"To {use}: {format_bytes(fit['together_bytes'])} of weights, {format_bytes(fit['offload_bytes'])} with --offload. {cards}"
            )


def _memory_plans(files: CheckpointFiles, size: str) -> list[MemoryPlan]:
    """A plan for every use whose networks are there."""
    from ..blip3o_core.checkpoints.memory_plan import (
        USES,
        largest_file,
        measure_disk,
        parse_memory,
        plan_memory,
    )

    budget, speed = parse_memory(size), measure_disk(largest_file(files))
    usable = [use for use, networks in USES.items() if all(map(files.has_component, networks))]
    return [plan_memory(files, budget, use, bytes_per_second=speed) for use in usable]


def run_download(arguments: argparse.Namespace) -> None:
    from ..blip3o_core.hub.download import plan_download, progress_bars
    from ..blip3o_core.hub.download import run_download as fetch

    with progress_bars() as on_check:
        plan = plan_download(
            arguments.repo,
            arguments.folder,
            use=arguments.use,
            revision=arguments.revision,
            on_check=on_check,
            replace=arguments.replace,
        )
    print(plan)
    if not arguments.dry_run:
        with progress_bars(plan) as on_progress:
            fetch(plan, on_progress=on_progress, verify=not arguments.no_verify)
        print(f'Done. Try: blip3o generate "a photo of a cat" --model "{arguments.folder}"')


def run_convert(arguments: argparse.Namespace) -> None:
    import torch

    from ..blip3o_core.checkpoints.convert import convert_folder, convert_pickle
    from ..blip3o_core.devices import pick_dtype

    if arguments.dtype == "auto":
        raise BadInputError("A conversion needs a dtype: bf16, fp16 or fp32.")
    dtype = pick_dtype(arguments.dtype, torch.device("cpu"), 0)
    if arguments.source.is_file():
        written = convert_pickle(arguments.source, arguments.target, dtype)
    else:
        written = convert_folder(open_files(arguments, arguments.source), arguments.target, dtype)
    print(f"Wrote {written}")


def run_verify(arguments: argparse.Namespace) -> int:
    from ..blip3o_core.verify import report_json, verify_reference

    checks = verify_reference(arguments.folder)
    print(report_json(checks))
    return 0 if all(check.passed for check in checks) else 1
