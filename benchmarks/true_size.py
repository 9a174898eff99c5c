"""Every command on a checkpoint of the published sizes with random weights: time, memory, bytes from the disk.

    python benchmarks/true_size.py SCRATCH --size 4b --tokenizer QWEN --name two_cpu_cores   # 24 GB
    python benchmarks/true_size.py SCRATCH --size 8b --only info,draw,ask   # 33 GB
    python benchmarks/true_size.py SCRATCH --size tiny   # a minute

Writes the checkpoint in the published layout, with what the published shards hold beside the networks, then runs each
command in a process of its own, with small pictures and few steps. Files in SCRATCH are removed in the end, unless --keep
is given; a checkpoint that is there already is used again.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import psutil
import torch
from common import ROOT
from loading import forget
from PIL import Image, ImageDraw
from processes import Measured, measure
from run import RESULTS, describe_machine
from synthetic import SIZES, SPARE_BYTES, Plan, plan_checkpoint, write_checkpoint

# Runs the command line of this checkout, which need not be installed.
LAUNCH = f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location("comfyui_blip3o", {str(ROOT / "__init__.py")!r})
sys.modules["comfyui_blip3o"] = package = importlib.util.module_from_spec(spec)
spec.loader.exec_module(package)
from comfyui_blip3o.cli import main
sys.exit(main())
"""
RUN_NAME = "two_steps"
# The smallest run that still does everything: one prompt each to keep and to look at, no picture drawn.
LORA_SETTINGS = (
    "train.steps=2",
    "train.micro_batch=1",
    'train.prior.prompts=["a blue square"]',
    'validate.drift_prompts=["a red circle"]',
    "validate.sigmas=[0.5]",
    "validate.noise_seeds=1",
    "sample.prompts=[]",
    "sample.steps=2",
)
COLUMNS = (
    "command",
    "exit code",
    "seconds",
    "own memory, GB",
    "with mapped files, GB",
    "read from disk, GB",
    "note",
)


@dataclass(frozen=True)
class Places:
    """Where things lie; commands run in `work` and name the others by path."""

    scratch: Path
    size: str

    @property
    def checkpoint(self) -> Path:
        return self.scratch / f"checkpoint-{self.size}"

    @property
    def work(self) -> Path:
        return self.scratch / f"work-{self.size}"

    @property
    def converted(self) -> Path:
        return self.scratch / f"converted-{self.size}"

    def picture(self, step: str) -> Path:
        return self.work / f"{step}.png"


@dataclass(frozen=True)
class Step:
    """One command.

    Attributes:
        arguments: of `blip3o`; CHECKPOINT and CONVERTED stand for the folders.
        shown: what the table calls it.
        draws: it makes a picture named after the step, whose pixels are looked at.
        is_quiet: it takes --quiet.
        after: looks at what was made; returns a note, "" = nothing to say. Raises ValueError when it is wrong.
    """

    arguments: tuple[str, ...]
    shown: str
    draws: bool = False
    is_quiet: bool = True
    after: Callable[[Places], str] = field(default=lambda places: "")


@dataclass
class Row:
    """One line of the table; None = not measured, here or at all.

    Attributes:
        exit_code: None = the command did not run, or was ended.
        own_gb: most memory that is not a mapped file.
        mapped_gb: most memory including mapped files, whose pages the system may take back at any time.
    """

    step: str
    command: str
    exit_code: int | None = None
    seconds: float | None = None
    own_gb: float | None = None
    mapped_gb: float | None = None
    read_gb: float | None = None
    note: str = ""
    is_right: bool = False


def same_picture(places: Places) -> str:
    """How the streamed picture differs from the plain one."""
    if not places.picture("draw").is_file():
        return ""
    plain, streamed = (read_pixels(places.picture(step)) for step in ("draw", "draw_streamed"))
    difference = np.abs(plain - streamed).max()
    return "the same picture" if difference == 0 else f"differs from draw by up to {difference:.0f} of 255"


def converted_folder(places: Places) -> str:
    """The size of the converted folder, which is then removed."""
    found = sum(path.stat().st_size for path in places.converted.rglob("*.safetensors"))
    shutil.rmtree(places.converted)
    return f"wrote {found / 1e9:.2f} GB"


def trained_steps(places: Places) -> str:
    """Steps that the fit has done."""
    events = (places.work / "runs" / RUN_NAME / "events.jsonl").read_text("utf-8").splitlines()
    steps = [event for event in map(json.loads, events) if event["event"] == "step"]
    if len(steps) != 2 or not all(math.isfinite(event["loss"]) for event in steps):
        raise ValueError(f"{len(steps)} steps of 2, or a loss that is no number")
    return "losses " + ", ".join(f"{event['loss']:.3f}" for event in steps)


DRAWING = ("--steps", "2", "--pixel-steps", "2", "--size")
LORA = (f"{RUN_NAME}.yaml", *(part for setting in LORA_SETTINGS for part in ("--set", setting)))
LORA_NEW = (
    "lora",
    "new",
    RUN_NAME,
    "--data",
    "pictures",
    "--trigger",
    "ohwx",
    "--class",
    "circle",
    "--force",
)


def steps_of(size: str, device: str) -> dict[str, Step]:
    """The commands, in order; SIDE is the side of the drawn pictures in pixels."""
    side = "128" if size == "tiny" else "256"
    model = ("--model", "CHECKPOINT", "--device", device)
    drawing = (*DRAWING, f"{side}x{side}")
    generate = ("generate", "a red circle", *drawing, *model)
    draw_words = f"generate, 2 + 2 steps, {side} x {side}"
    return {
        "info": Step(("info", "CHECKPOINT"), "info", is_quiet=False),
        "plan": Step(("info", "CHECKPOINT", "--plan", "8GB"), "info --plan 8GB", is_quiet=False),
        "draw": Step((*generate, "--out", "draw.png"), draw_words, draws=True),
        "draw_streamed": Step(
            (*generate, "--offload", "--stream", "--out", "draw_streamed.png"),
            f"{draw_words}, --offload --stream",
            draws=True,
            after=same_picture,
        ),
        "ask": Step(
            ("ask", "What is this?", "pictures/0.png", "--max-tokens", "5", *model),
            "ask, a picture, 5 tokens",
        ),
        "vary": Step(
            ("vary", "pictures/0.png", *drawing, *model, "--out", "vary.png"),
            f"vary, 2 decoder steps, {side} x {side}",
            draws=True,
        ),
        "convert": Step(
            ("convert", "CHECKPOINT", "CONVERTED", "--dtype", "fp16"),
            "convert --dtype fp16",
            is_quiet=False,
            after=converted_folder,
        ),
        "lora_new": Step((*LORA_NEW, "--model", "CHECKPOINT"), "lora new", is_quiet=False),
        "lora_check": Step(("lora", "check", *LORA), "lora check"),
        "lora_cache": Step(("lora", "cache", *LORA), "lora cache, 3 pictures"),
        "lora_fit": Step(
            ("lora", "fit", *LORA, "--fresh"), "lora fit, 2 steps, micro batch 1", after=trained_steps
        ),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 1 when a command failed or drew nothing, 0 otherwise."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("scratch", type=Path, help="folder for the checkpoint and what is made with it")
    parser.add_argument("--size", required=True, choices=SIZES)
    parser.add_argument("--only", metavar="STEP,STEP", help="some of: " + ", ".join(steps_of("tiny", "cpu")))
    parser.add_argument("--keep", action="store_true", help="leave the checkpoint for another run")
    parser.add_argument(
        "--tokenizer",
        type=Path,
        help="folder of Qwen2.5's vocab.json and merges.txt (default: the built-in one)",
    )
    parser.add_argument(
        "--no-leftovers",
        action="store_true",
        help="without the tensors that the published shards hold beside the networks",
    )
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--minutes", type=float, help="end a command after so long (default: never)")
    parser.add_argument("--machine", default=describe_size(), help="what the table calls this machine")
    parser.add_argument(
        "--dry-run", action="store_true", help="print what the checkpoint would hold, write nothing"
    )
    parser.add_argument("--name", help="write results/NAME_true_size.md and .json")
    arguments = parser.parse_args(argv)
    plan = plan_checkpoint(
        arguments.size, leftovers=not arguments.no_leftovers, has_words=arguments.tokenizer is not None
    )
    if arguments.dry_run:
        print(json.dumps(plan.summary(), indent=1))
        return 0
    steps = steps_of(arguments.size, arguments.device)
    chosen = arguments.only.split(",") if arguments.only else list(steps)
    if unknown := set(chosen) - set(steps):
        parser.error(f"unknown step {min(unknown)}; choose from {', '.join(steps)}")
    places = Places(arguments.scratch.resolve(), arguments.size)
    started = time.perf_counter()
    write_checkpoint(plan, places.checkpoint, arguments.tokenizer)
    print(f"checkpoint: {plan.nbytes / 1e9:.2f} GB, {time.perf_counter() - started:.0f} s", file=sys.stderr)
    rows: dict[str, Row] = {}
    try:
        write_pictures(places.work / "pictures")
        for name in steps:  # in their order: some read what others made
            if name in chosen:
                print(f"{steps[name].shown} ...", file=sys.stderr, flush=True)
                rows[name] = run_step(name, steps[name], places, plan, arguments)
                if arguments.name:  # at once: a long run may be cut off
                    write_results(rows, plan, arguments)
    finally:
        shutil.rmtree(places.work, ignore_errors=True)
        shutil.rmtree(places.converted, ignore_errors=True)
    if not arguments.keep:
        shutil.rmtree(places.checkpoint)
    print(table(rows.values()))
    return 0 if all(row.is_right for row in rows.values()) else 1


def run_step(name: str, step: Step, places: Places, plan: Plan, arguments: argparse.Namespace) -> Row:
    """Run one command with cold files and look at what it made."""
    row = Row(name, step.shown)
    free = shutil.disk_usage(places.scratch).free
    if name == "convert" and free < plan.nbytes + SPARE_BYTES:
        row.note = (
            f"not run: a second copy needs {plan.nbytes / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free"
        )
        return row
    if hasattr(os, "posix_fadvise"):
        forget(sorted(places.checkpoint.rglob("*.safetensors")))
    folders = {"CHECKPOINT": str(places.checkpoint), "CONVERTED": str(places.converted)}
    options = [folders.get(argument, argument) for argument in step.arguments]
    options += ["--quiet"] if step.is_quiet else []
    measured = measure(
        [sys.executable, "-W", "ignore", "-c", LAUNCH, *options],
        cwd=places.work,
        threads=arguments.threads,
        limit_seconds=arguments.minutes * 60 if arguments.minutes else None,
    )
    row.exit_code, row.seconds = measured.exit_code, measured.seconds
    row.own_gb, row.mapped_gb, row.read_gb = (
        None if found is None else found / 1e9
        for found in (measured.own_bytes, measured.mapped_bytes, measured.read_bytes)
    )
    if measured.is_out_of_time:
        row.exit_code, row.note = None, f"ended after {arguments.minutes:g} minutes"
    elif measured.exit_code:
        row.note = first_words(measured, places)
    else:
        try:
            notes = [picture_words(places.picture(name))] if step.draws else []
            row.note = "; ".join(filter(None, [*notes, step.after(places)]))
            row.is_right = True
        except (ValueError, OSError) as error:
            row.note = f"wrong: {error}"
    return row


def picture_words(path: Path) -> str:
    """Mean and spread of a picture's values, 0 to 255.

    Raises:
        ValueError: it is of one colour, as pictures of numbers that are none turn out.
    """
    pixels = read_pixels(path)
    if pixels.std() < 1:
        raise ValueError(f"the picture is of one colour, {pixels.mean():.0f}")
    return f"mean {pixels.mean():.0f}, spread {pixels.std():.0f}"


def read_pixels(path: Path) -> np.ndarray:
    """A picture's values, 0 to 255, (height, width, 3)."""
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"), dtype=np.float64)


def first_words(measured: Measured, places: Places) -> str:
    """The first line of an error message: it says what happened, a second one what to do; of a traceback the last."""
    lines = [line.strip() for line in measured.stderr.splitlines() if line.strip()]
    if not lines:
        return "ended without a word"
    line = lines[-1] if any("Traceback" in each for each in lines) else lines[-2:][0]
    return line.replace(str(places.scratch), "SCRATCH").replace(str(ROOT), ".").replace("|", "/")


def write_pictures(folder: Path) -> None:
    """Three pictures with captions, to ask about, to vary and to learn from."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    for number, colour in enumerate(("red", "blue", "green")):
        coarse = random.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        picture = Image.fromarray(coarse).resize((512, 512), Image.Resampling.BICUBIC)
        corner = 60 + 70 * number
        ImageDraw.Draw(picture).ellipse((corner, corner, corner + 200, corner + 200), fill=colour)
        picture.resize((448, 448), Image.Resampling.BICUBIC).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"ohwx, a {colour} circle", "utf-8")


def write_results(rows: dict[str, Row], plan: Plan, arguments: argparse.Namespace) -> None:
    """Write the tables; sizes and steps that were not run this time keep what an earlier run under this name found."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{arguments.name}_true_size.json"
    results = json.loads(path.read_text("utf-8"))["results"] if path.is_file() else {}
    before = results.get(plan.size, {}).get("rows", {})
    found = before | {name: asdict(row) for name, row in rows.items()}
    results[plan.size] = {
        "checkpoint": plan.summary(),
        "tokenizer": "Qwen2.5's" if arguments.tokenizer else "the built-in model's",
        "threads": arguments.threads,
        "rows": {name: found[name] for name in steps_of(plan.size, arguments.device) if name in found},
    }
    entry = {"machine": arguments.machine, "results": results}
    path.write_text(json.dumps(entry, indent=1) + "\n", "utf-8")
    path.with_suffix(".md").write_text(report(entry), "utf-8")


def report(entry: dict) -> str:
    """Markdown: the machine in words, and a table for each size."""
    lines = [
        f"# Commands at the published sizes: {entry['machine']}\n\n",
        f"PyTorch {torch.__version__.split('+')[0]}. Weights are random, in bf16 and in the published layout; pictures are small "
        "and steps few, so times say how long a first picture waits for its weights rather than how long a good one takes. "
        "Before each command the files are taken out of the system's cache where the system can do that. Own memory is what "
        "no file backs; with mapped files it includes pages of the weights, which the system takes back when others need "
        "room. Empty: not measured.\n\n",
    ]
    for size in SIZES:
        if size not in entry["results"]:
            continue
        result = entry["results"][size]
        checkpoint = result["checkpoint"]
        shards = sum("/" not in name for name in checkpoint["files"])
        networks = ", ".join(f"{name} {count:,}" for name, count in checkpoint["parameters"].items())
        lines.append(
            f"## {size}\n\n{checkpoint['gigabytes']} GB, {shards} shards and a decoder; parameters: {networks}. "
            f"Tokenizer: {result['tokenizer']}. {result['threads']} thread(s) on the CPU.\n\n"
        )
        lines.append(table(Row(**row) for row in result["rows"].values()) + "\n")
    return "".join(lines)


def table(rows: Iterable[Row]) -> str:
    """Markdown of rows."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + " --- |" * len(COLUMNS)]
    for row in rows:
        numbers = [
            "" if value is None else f"{value:.{digits}f}"
            for value, digits in (
                (row.seconds, 1),
                (row.own_gb, 2),
                (row.mapped_gb, 2),
                (row.read_gb, 2),
            )
        ]
        code = "" if row.exit_code is None else str(row.exit_code)
        lines.append("| " + " | ".join([row.command, code, *numbers, row.note]) + " |")
    return "\n".join(lines) + "\n"


def describe_size() -> str:
    """What ran this, without names: processors and memory."""
    return f"{describe_machine()}, {psutil.virtual_memory().total / 1e9:.0f} GB of memory"


if __name__ == "__main__":
    sys.exit(main())
