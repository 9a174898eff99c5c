"""Pictures for the scorers of real benchmarks, in the folder layouts they read; resumable and shared by processes.

geneval  jsonl of {"prompt", ...} -> 00000/samples/00000.png ... and 00000/metadata.jsonl
dpg      folder of <name>.txt     -> <name>.png, four pictures as a 2 x 2 grid
wise     json list of {"prompt_id", "Prompt"} -> <prompt_id>.png
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from ..blip3o_core.errors import BadInputError, MissingFilesError

if TYPE_CHECKING:
    from ..blip3o_core.pipeline import Blip3oPipeline

DPG_GRID = 4


@dataclass(frozen=True)
class Task:
    """One prompt of a benchmark: `name` is its place in the output folder."""

    index: int
    name: str
    prompt: str
    metadata: dict[str, Any]


def read_tasks(benchmark: str, path: Path) -> list[Task]:
    """The prompts of a benchmark's own file or folder, in its order.

    Raises:
        MissingFilesError: nothing at the path.
        BadInputError: the file does not look like this benchmark's.
    """
    if not path.exists():
        raise MissingFilesError(f'There are no prompts at "{path}".\nGive the prompt file of {benchmark}.')
    try:
        if benchmark == "geneval":
            rows = [json.loads(line) for line in path.read_text("utf-8").splitlines() if line.strip()]
            return [Task(n, f"{n:05d}", row["prompt"], row) for n, row in enumerate(rows)]
        if benchmark == "wise":
            rows = json.loads(path.read_text("utf-8"))
            return [Task(n, str(row["prompt_id"]), row["Prompt"], row) for n, row in enumerate(rows)]
        files = sorted(path.glob("*.txt"))
        tasks = [Task(n, file.stem, file.read_text("utf-8").strip(), {}) for n, file in enumerate(files)]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise BadInputError(
            f'"{path}" is no prompt file of {benchmark}.\n'
            f"Expected {__doc__.split(benchmark)[1].split('->')[0].strip()}. ({type(error).__name__}: {error})"
        ) from error
    if not tasks:
        raise BadInputError(f'"{path}" holds no .txt files.\nGive the folder with the prompts of DPG-Bench.')
    return tasks


def read_shard(text: str) -> tuple[int, int]:
    """ "1/4" -> (1, 4): the second of four parts.

    Raises:
        BadInputError: not k/n with 0 <= k < n.
    """
    part, _, parts = text.partition("/")
    if not (part.isdigit() and parts.isdigit() and int(part) < int(parts)):
        raise BadInputError(f'The shard "{text}" is not of the form k/n with k below n, e.g. 0/4.')
    return int(part), int(parts)


def draw_benchmark(
    pipeline: Blip3oPipeline,
    benchmark: str,
    prompt_path: Path,
    folder: Path,
    *,
    samples: int = 4,
    seed: int = 0,
    preset: str = "standard",
    shard: tuple[int, int] = (0, 1),
    on_done: Callable[[int, int], None] | None = None,
) -> int:
    """Draw what is still missing of a benchmark's pictures.

    Args:
        samples: pictures per prompt, for geneval; dpg takes four, wise one.
        seed: picture s of prompt i uses seed + 1000 i + s, whatever the shards.
        shard: (k, n): this process draws prompts k, k + n, ...

    Returns:
        The number of prompts drawn now.
    """
    tasks = read_tasks(benchmark, prompt_path)[shard[0] :: shard[1]]
    number = {"dpg": DPG_GRID, "wise": 1}.get(benchmark, samples)
    drawn = 0
    for done, task in enumerate(tasks, 1):
        if not _is_done(benchmark, folder, task, number):
            pictures = pipeline.generate(
                task.prompt, images_per_prompt=number, seed=seed + 1000 * task.index, preset=preset
            ).pictures
            _save(benchmark, folder, task, pictures)
            drawn += 1
        if on_done is not None:
            on_done(done, len(tasks))
    return drawn


def _is_done(benchmark: str, folder: Path, task: Task, number: int) -> bool:
    if benchmark == "geneval":
        return (folder / task.name / "samples" / f"{number - 1:05d}.png").is_file()
    return (folder / f"{task.name}.png").is_file()


def _save(benchmark: str, folder: Path, task: Task, pictures: list[Image.Image]) -> None:
    if benchmark == "geneval":
        samples = folder / task.name / "samples"
        samples.mkdir(parents=True, exist_ok=True)
        (folder / task.name / "metadata.jsonl").write_text(json.dumps(task.metadata), encoding="utf-8")
        for n, picture in enumerate(pictures):
            _save_picture(picture, samples / f"{n:05d}.png")
        return
    folder.mkdir(parents=True, exist_ok=True)
    sheet = pictures[0]
    if benchmark == "dpg":
        width, height = pictures[0].size
        sheet = Image.new("RGB", (2 * width, 2 * height))
        for n, picture in enumerate(pictures):
            sheet.paste(picture, (n % 2 * width, n // 2 * height))
    _save_picture(sheet, folder / f"{task.name}.png")


def _save_picture(picture: Image.Image, path: Path) -> None:
    temporary = path.with_name(path.name + ".part")
    picture.save(temporary, "PNG")
    os.replace(temporary, path)
