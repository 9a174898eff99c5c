"""Pictures for the scorers of published benchmarks, in the folder layouts they read; resumable, shared by processes.

geneval  .jsonl, a line per prompt {"tag", "prompt", ...} -> 00000/samples/00000.png ..., 00000/metadata.jsonl
dpg      folder of <name>.txt prompts                     -> <name>.png, four pictures as a 2 x 2 grid
wise     .json list of {"prompt_id", "Prompt", ...}       -> <prompt_id>.png

Every picture keeps how it was made (metadata.py); a folder is gone on with only by the same settings and checkpoint.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...blip3o_core.config import BUILT_IN_MODEL
from ...blip3o_core.errors import BadInputError, MissingFilesError

if TYPE_CHECKING:  # the command's parser needs the arguments below without waiting for torch
    from PIL import Image

    from ...blip3o_core.drawing.presets import Generation
    from ...blip3o_core.pipeline import Blip3oPipeline

# Source: ELLA's compute_dpg_bench.py crops (0, 0), (side, 0), (0, side), (side, side), with --resolution side.
DPG_COLUMNS = 2
# What a scorer needs beside the prompt, so that a wrong file is found before hours of drawing.
GENEVAL_FIELDS = ("prompt", "tag")
WISE_FIELDS = ("Prompt", "prompt_id")

ProgressCallback = Callable[[int, int], None]


@dataclass(frozen=True)
class Task:
    """One prompt: its place in the file, its name in the output folder, and the row it came from."""

    index: int
    name: str
    prompt: str
    row: dict[str, Any]


@dataclass(frozen=True)
class Benchmark:
    """How a benchmark's prompts are read and where its scorer looks for pictures.

    Attributes:
        samples: pictures per prompt; is_samples_fixed where the scorer knows no other number.
        advice: how to score, printed after drawing; {folder} and {side} are filled in.
    """

    name: str
    title: str
    expected: str
    read: Callable[[Path], list[Task]]
    samples: int
    is_samples_fixed: bool
    advice: str


@dataclass(frozen=True)
class Written:
    """What write_benchmark_images did.

    Attributes:
        drawn, skipped: prompts drawn now, and prompts whose pictures were there.
        side: width of the pictures drawn, pixels; None when none was.
    """

    drawn: int
    skipped: int
    side: int | None


def read_tasks(name: str, prompt_file: Path) -> list[Task]:
    """A benchmark's prompts in the order of its file, or of its folder's sorted names.

    Raises:
        MissingFilesError: nothing at the path.
        BadInputError: an unknown benchmark, or a file that is not this benchmark's.
    """
    benchmark = _benchmark(name)
    if not prompt_file.exists():
        raise MissingFilesError(
            f'There are no prompts at "{prompt_file}".\n'
            f"Get them from {benchmark.title}: {benchmark.expected}. They are not part of this package."
        )
    if prompt_file.is_dir() != (name == "dpg"):
        kind = "folder" if prompt_file.is_dir() else "file"
        raise BadInputError(f'"{prompt_file}" is a {kind}.\n{benchmark.title} wants {benchmark.expected}.')
    try:
        tasks = benchmark.read(prompt_file)
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise _wrong_file(benchmark, prompt_file, str(error)) from error
    except _RowError as error:
        raise _wrong_file(benchmark, prompt_file, str(error)) from error
    if not tasks:
        raise _wrong_file(benchmark, prompt_file, "there is no prompt in it")
    names = [task.name for task in tasks]
    twice = next((task_name for task_name in names if names.count(task_name) > 1), None)
    if twice is not None:
        raise _wrong_file(benchmark, prompt_file, f"{twice} occurs twice")
    return tasks


def write_benchmark_images(
    pipeline: Blip3oPipeline,
    name: str,
    prompt_file: Path,
    out_folder: Path,
    *,
    samples: int | None = None,
    seed: int = 0,
    preset: str = "standard",
    batch_size: int = 8,
    rank: int = 0,
    world_size: int = 1,
    with_grid: bool = False,
    on_progress: ProgressCallback | None = None,
) -> Written:
    """Draw the pictures of a benchmark that are still missing.

    Picture s of prompt i uses seed + i x samples + s, whatever the batches, processes and interruptions. (With the
    "published" preset the decoder's negative features come from the first picture each process draws, as published.)

    Args:
        name: a name in BENCHMARKS.
        prompt_file: the benchmark's own prompts, see read_tasks.
        samples: pictures per prompt; None = the benchmark's usual number. Only GenEval's scorer takes others.
        batch_size: most pictures in one network call.
        rank, world_size: this process draws every world_size-th batch of prompts; each starts with its own rank.
        with_grid: geneval: also 00000/grid.png, for people.
        on_progress: called as on_progress(prompts finished, prompts of this process).

    Raises:
        MissingFilesError, BadInputError: see read_tasks; also pictures in the folder made with other settings.
    """
    from ...blip3o_core.checkpoints.fingerprints import checkpoint_fingerprint

    benchmark = _benchmark(name)
    if samples is not None and benchmark.is_samples_fixed and samples != benchmark.samples:
        raise BadInputError(
            f"{benchmark.title} takes {benchmark.samples} picture(s) per prompt, not {samples}."
        )
    samples = benchmark.samples if samples is None else samples
    if samples < 1 or batch_size < 1:
        raise BadInputError(
            f"There must be at least one picture per prompt and batch, not {samples} and {batch_size}."
        )
    if not 0 <= rank < world_size:
        raise BadInputError(f"Process {rank} of {world_size} cannot be: ranks go from 0 to {world_size - 1}.")
    tasks = read_tasks(name, prompt_file)
    run = {
        "benchmark": name,
        "samples": samples,
        "preset": preset,
        "checkpoint_hash": checkpoint_fingerprint(pipeline.files),
    }
    layout = _Layout(name, out_folder, samples, seed, run, with_grid)
    per_call = max(1, batch_size // samples)
    calls = [tasks[start : start + per_call] for start in range(0, len(tasks), per_call)][rank::world_size]
    total, done, drawn, side = sum(map(len, calls)), 0, 0, None
    for call in calls:
        for run_of_tasks in _neighbours([task for task in call if not layout.is_complete(task)]):
            generation = pipeline.generate(
                [task.prompt for task in run_of_tasks],
                images_per_prompt=samples,
                seed=seed + run_of_tasks[0].index * samples,
                preset=preset,
                batch_size=batch_size,
            )
            for place, task in enumerate(run_of_tasks):
                layout.write(task, generation, place * samples, pipeline.files.name)
            drawn += len(run_of_tasks)
            side = generation.images.shape[2]
        done += len(call)
        if on_progress is not None:
            on_progress(done, total)
    return Written(drawn, total - drawn, side)


def add_benchmark_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of run_benchmark."""
    parser.add_argument("benchmark", choices=sorted(BENCHMARKS), help="whose scorer will read the pictures")
    parser.add_argument(
        "prompts", type=Path, help="its own prompts: geneval .jsonl, dpg folder of .txt, wise .json"
    )
    parser.add_argument(
        "--model", type=Path, default=BUILT_IN_MODEL, metavar="FOLDER", help="checkpoint folder"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="folder for the pictures")
    parser.add_argument("--samples", type=int, help="geneval: pictures per prompt (default: 4)")
    parser.add_argument("--seed", type=int, default=0, help="of the first picture (default: 0)")
    parser.add_argument(
        "--preset", default="standard", help="standard, published or fast (default: standard)"
    )
    parser.add_argument(
        "--batch-size", type=int, default=8, help="most pictures in one network call (default: 8)"
    )
    parser.add_argument("--grid", action="store_true", help="geneval: also write grid.png beside the samples")
    parser.add_argument("--dtype", default="auto", help="auto, bf16, fp16 or fp32 (default: auto)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps (default: auto)")
    parser.add_argument(
        "--offload", action="store_true", help="move each network to the GPU only while it works"
    )
    parser.add_argument(
        "--rank", type=int, help="this process (default: RANK, which torchrun and accelerate set, or 0)"
    )
    parser.add_argument("--world-size", type=int, help="number of processes (default: WORLD_SIZE, or 1)")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def run_benchmark(arguments: argparse.Namespace) -> int:
    """Draw a benchmark's pictures from the command line; returns the exit code.

    Raises:
        Blip3oError: see write_benchmark_images and load_pipeline.
    """
    from tqdm import tqdm

    from ...blip3o_core.pipeline import load_pipeline

    rank = _from_environment(arguments.rank, "RANK", 0)
    world_size = _from_environment(arguments.world_size, "WORLD_SIZE", 1)
    # A wrong prompt file is told before the weights are read.
    read_tasks(arguments.benchmark, arguments.prompts)
    pipeline = load_pipeline(
        arguments.model,
        dtype=arguments.dtype,
        device=process_device(arguments.device),
        offload=arguments.offload,
    )
    with tqdm(desc=arguments.benchmark, unit="prompt", disable=arguments.quiet or rank > 0) as bar:

        def on_progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        written = write_benchmark_images(
            pipeline,
            arguments.benchmark,
            arguments.prompts,
            arguments.out,
            samples=arguments.samples,
            seed=arguments.seed,
            preset=arguments.preset,
            batch_size=arguments.batch_size,
            rank=rank,
            world_size=world_size,
            with_grid=arguments.grid,
            on_progress=on_progress,
        )
    print(f"{written.drawn} prompts drawn, {written.skipped} were there already, in {arguments.out}")
    if rank == 0:
        advice = BENCHMARKS[arguments.benchmark].advice
        print(advice.format(folder=arguments.out, side=written.side or "the width of one picture"))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """`geneval PROMPTS --model FOLDER --out FOLDER ...`."""
    parser = argparse.ArgumentParser(
        prog="blip3o eval benchmark", description="Draw pictures for a benchmark's own scorer."
    )
    add_benchmark_arguments(parser)
    return run_benchmark(parser.parse_args(argv))


def process_device(device: str) -> str:
    """The device of this process: one GPU each where a launcher started several and none is named."""
    import torch

    local_rank = os.environ.get("LOCAL_RANK")
    if device in ("auto", "cuda") and local_rank is not None and torch.cuda.is_available():
        return f"cuda:{int(local_rank) % torch.cuda.device_count()}"
    return device


class _RowError(Exception):
    """What is wrong with a row of a prompt file."""


@dataclass(frozen=True)
class _Layout:
    """Where the pictures of a run lie, and whether those that are there belong to it."""

    name: str
    folder: Path
    samples: int
    seed: int
    run: dict[str, Any]
    with_grid: bool

    def paths(self, task: Task) -> list[Path]:
        if self.name == "geneval":
            return [self.folder / task.name / "samples" / f"{n:05d}.png" for n in range(self.samples)]
        return [self.folder / f"{task.name}.png"]

    def is_complete(self, task: Task) -> bool:
        if self.name == "geneval" and not (self.folder / task.name / "metadata.jsonl").is_file():
            return False
        if self.name == "geneval" and self.with_grid and not (self.folder / task.name / "grid.png").is_file():
            return False
        return all([self._is_ours(path, task, n) for n, path in enumerate(self.paths(task))])

    def write(self, task: Task, generation: Generation, first: int, checkpoint: str) -> None:
        """Write a task's pictures, generation.pictures[first:] being its own; the scorer's metadata goes first."""
        from ...blip3o_core.picture_files import describe_picture, save_png

        rows = range(first, first + self.samples)
        pictures = [generation.pictures[row] for row in rows]
        described = [
            {**describe_picture(generation, row, checkpoint, self.run["checkpoint_hash"]), **self.run}
            for row in rows
        ]
        if self.name == "geneval":
            _write_text(
                self.folder / task.name / "metadata.jsonl", json.dumps(task.row, ensure_ascii=False) + "\n"
            )
            if self.with_grid:
                save_png(_grid(pictures), self.folder / task.name / "grid.png", described[0])
        elif self.name == "dpg":
            pictures, described = [_grid(pictures)], described[:1]
        for picture, path, description in zip(pictures, self.paths(task), described, strict=True):
            save_png(picture, path, description)

    def _is_ours(self, path: Path, task: Task, sample: int) -> bool:
        """False for a missing or damaged picture.

        Raises:
            BadInputError: a picture that this run would not draw.
        """
        from PIL import Image

        from ...blip3o_core.picture_files import read_note

        try:
            with Image.open(path) as picture:
                picture.verify()  # reads all of it against its checksums
        except (OSError, ValueError, SyntaxError):
            return False
        advice = "Choose a new folder, or the same settings as before."
        try:
            found = read_note(path)
        except BadInputError as error:
            raise BadInputError(f"{str(error).splitlines()[0]}\n{advice}") from error
        expected = {**self.run, "prompt": task.prompt, "seed": self.seed + task.index * self.samples + sample}
        other = [
            f"{key} {found.get(key)!r}, now {value!r}"
            for key, value in expected.items()
            if found.get(key) != value
        ]
        if other:
            raise BadInputError(f'"{path}" was made another way ({"; ".join(other)}).\n{advice}')
        return True


def _benchmark(name: str) -> Benchmark:
    if name not in BENCHMARKS:
        raise BadInputError(f'There is no benchmark "{name}"; choose one of {", ".join(sorted(BENCHMARKS))}.')
    return BENCHMARKS[name]


def _wrong_file(benchmark: Benchmark, path: Path, reason: str) -> BadInputError:
    return BadInputError(
        f'"{path}" is no prompt file of {benchmark.title}: {reason}.\nExpected {benchmark.expected}.'
    )


def _read_geneval(path: Path) -> list[Task]:
    tasks = []
    for line, text in enumerate(path.read_text("utf-8").splitlines(), 1):
        if text.strip():
            try:
                row = json.loads(text)
            except json.JSONDecodeError as error:
                raise _RowError(f"line {line} is not JSON ({error})") from error
            _check_row(row, GENEVAL_FIELDS, f"line {line}")
            tasks.append(Task(len(tasks), f"{len(tasks):05d}", row["prompt"], row))
    return tasks


def _read_dpg(folder: Path) -> list[Task]:
    tasks = []
    for index, file in enumerate(sorted(folder.glob("*.txt"))):
        prompt = file.read_text("utf-8").strip()
        if not prompt:
            raise _RowError(f'"{file.name}" is empty')
        if "." in file.stem:
            raise _RowError(f'"{file.name}" has a dot in its name, where the scorer would cut it')
        tasks.append(Task(index, file.stem, prompt, {}))
    return tasks


def _read_wise(path: Path) -> list[Task]:
    rows = json.loads(path.read_text("utf-8"))
    if not isinstance(rows, list):
        raise _RowError("it is not a list")
    tasks = []
    for index, row in enumerate(rows):
        _check_row(row, WISE_FIELDS, f"entry {index + 1}")
        if not str(row["prompt_id"]).isalnum():
            raise _RowError(f"entry {index + 1} has the prompt_id {row['prompt_id']!r}, which is no number")
        tasks.append(Task(index, str(row["prompt_id"]), row["Prompt"], row))
    return tasks


def _check_row(row: Any, fields: tuple[str, ...], place: str) -> None:
    if not isinstance(row, dict):
        raise _RowError(f"{place} is not an object in braces")
    missing = [field for field in fields if field not in row]
    if missing:
        raise _RowError(f"{place} has no {' and no '.join(missing)}")
    prompt = row[fields[0]]
    if not isinstance(prompt, str) or not prompt.strip():
        raise _RowError(f"{place} has an empty prompt")


def _neighbours(tasks: Sequence[Task]) -> Iterator[list[Task]]:
    """Runs of tasks with successive indices, whose seeds are successive too."""
    run: list[Task] = []
    for task in tasks:
        if run and task.index != run[-1].index + 1:
            yield run
            run = []
        run.append(task)
    if run:
        yield run


def _grid(pictures: Sequence[Image.Image]) -> Image.Image:
    """Pictures two in a row without gaps."""
    from PIL import Image

    width, height = pictures[0].size
    lines = -(-len(pictures) // DPG_COLUMNS)
    sheet = Image.new("RGB", (min(len(pictures), DPG_COLUMNS) * width, lines * height))
    for n, picture in enumerate(pictures):
        sheet.paste(picture, (n % DPG_COLUMNS * width, n // DPG_COLUMNS * height))
    return sheet


def _write_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def _from_environment(given: int | None, variable: str, otherwise: int) -> int:
    return int(os.environ.get(variable, otherwise)) if given is None else given


BENCHMARKS = {
    "geneval": Benchmark(
        "geneval",
        "GenEval",
        'evaluation_metadata.jsonl, a line per prompt like {"tag": "counting", "include": [...], "prompt": "..."}',
        _read_geneval,
        samples=4,
        is_samples_fixed=False,
        advice='Score with GenEval: python evaluation/evaluate_images.py "{folder}" --outfile results.jsonl ...',
    ),
    "dpg": Benchmark(
        "dpg",
        "DPG-Bench",
        "its folder of prompts, one .txt file each",
        _read_dpg,
        samples=4,
        is_samples_fixed=True,
        advice='Score with DPG-Bench: compute_dpg_bench.py --image-root-path "{folder}" --resolution {side} --pic-num 4',
    ),
    "wise": Benchmark(
        "wise",
        "WISE",
        'one of its .json files, a list of {"Prompt": "...", "prompt_id": 1, "Explanation": ...}',
        _read_wise,
        samples=1,
        is_samples_fixed=True,
        advice='Score with WISE: gpt_eval.py --image_dir "{folder}" ...',
    ),
}
