"""Scores of a checkpoint on the scene world: prompts drawn, questions answered, pictures reconstructed; files and tables."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from ...blip3o_core.language.answers import AnswerSettings
from ..world.captions import Question, describe_question, draw_questions, match_question
from ..world.checker import look, matches_scene
from ..world.scenes import GROUPS, Scenes, draw_scenes, render
from .geneval import CATEGORIES, category_prompts, picture_grid, score_prompts, summary

if TYPE_CHECKING:
    from ...blip3o_core.pipeline import Blip3oPipeline

Progress = Callable[[str, int, int], None]
QUESTION_BATCH = 48
LONGEST_ANSWER = 24
GRID_COLUMNS = 10


def score_questions(
    pipeline: Blip3oPipeline, scenes_number: int, seed: int, on_progress: Progress | None = None
) -> dict[str, Any]:
    """Share of exactly right answers by question type, on scenes with object pairs training never showed.

    Returns:
        {"types": {type: {"correct", "questions"}}, "overall": mean over the questions, "questions": number}.
    """
    scenes = draw_scenes(scenes_number, seed, held_out=True)
    pictures = [Image.fromarray(image) for image in render(scenes)]
    asked = [(n, question) for n, of_scene in enumerate(questions_of(scenes, seed)) for question in of_scene]
    right: dict[str, list[bool]] = {}
    settings = AnswerSettings(max_new_tokens=LONGEST_ANSWER)
    for start in range(0, len(asked), QUESTION_BATCH):
        part = asked[start : start + QUESTION_BATCH]
        answers = pipeline.ask([q.text for _, q in part], [[pictures[n]] for n, _ in part], settings=settings)
        for (_, question), answer in zip(part, answers, strict=True):
            right.setdefault(question.type, []).append(answer.strip().lower() == question.answer)
        if on_progress is not None:
            on_progress("questions", min(start + QUESTION_BATCH, len(asked)), len(asked))
    return question_summary(right)


def questions_of(scenes: Scenes, seed: int) -> list[list[Question]]:
    """For each scene a description, a match and one question of every type that it can answer."""
    rng = np.random.default_rng((seed, 7))
    return [
        [describe_question(scenes, n, rng), match_question(scenes, n, rng), *draw_questions(scenes, n, rng)]
        for n in range(len(scenes))
    ]


def question_summary(right: dict[str, list[bool]]) -> dict[str, Any]:
    """Shares of right answers by type, and of all questions."""
    types = {
        name: {"correct": float(np.mean(values)), "questions": len(values)}
        for name, values in sorted(right.items())
    }
    every = [value for values in right.values() for value in values]
    return {"types": types, "overall": float(np.mean(every)), "questions": len(every)}


def score_reconstruction(
    pipeline: Blip3oPipeline, scenes_number: int, seed: int, preset: str, on_progress: Progress | None = None
) -> tuple[dict[str, Any], list[Image.Image]]:
    """Share of pictures that show the same scene after encoding and decoding, by group; and the pictures in pairs."""
    scenes = draw_scenes(scenes_number, seed, held_out=True)
    pictures = [Image.fromarray(image) for image in render(scenes)]
    same: dict[str, list[bool]] = {}
    pairs: list[Image.Image] = []
    errors = []
    for start in range(0, scenes_number, 16):
        part = pictures[start : start + 16]
        drawn = pipeline.vary(part, seed=seed + start, preset=preset).pictures
        for n, image in enumerate(drawn, start):
            array = np.asarray(image)
            same.setdefault(GROUPS[scenes.group[n]], []).append(matches_scene(look(array), scenes, n))
            errors.append(((array.astype(float) - np.asarray(pictures[n])) ** 2).mean())
            pairs += [pictures[n], image]
        if on_progress is not None:
            on_progress("reconstructions", min(start + 16, scenes_number), scenes_number)
    every = [value for values in same.values() for value in values]
    psnr = float(10 * np.log10(255**2 / max(np.mean(errors), 1e-9)))
    groups = {
        name: {"correct": float(np.mean(values)), "pictures": len(values)} for name, values in same.items()
    }
    return {"groups": groups, "overall": float(np.mean(every)), "psnr": psnr, "pictures": len(every)}, pairs


def evaluate(
    pipeline: Blip3oPipeline,
    folder: Path,
    *,
    prompts: int = 60,
    scenes: int = 100,
    seed: int = 0,
    preset: str = "standard",
    best_of: int = 1,
    parts: tuple[str, ...] = ("prompts", "questions", "reconstruction"),
    on_progress: Progress | None = None,
) -> dict[str, Any]:
    """Score a checkpoint and write scores.json, scores.md and picture grids into a folder.

    Args:
        prompts: unseen prompts per category.
        scenes: unseen pictures for questions and for reconstruction.
        seed: of prompts, scenes and noise; the same seed gives the same scores.
        best_of: pictures per prompt among which the model's own yes/no score picks; 1 = one picture.
        parts: which scores to take.
    """
    folder.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    result: dict[str, Any] = {
        "checkpoint": pipeline.files.name,
        "seed": seed,
        "preset": preset,
        "best_of": best_of,
    }
    if "prompts" in parts:
        rows = []
        for number, category in enumerate(CATEGORIES):
            rows += score_prompts(
                pipeline,
                category_prompts(category, prompts, seed),
                seed=seed + 1000,
                preset=preset,
                best_of=best_of,
            )
            if on_progress is not None:
                on_progress("prompts", number + 1, len(CATEGORIES))
        result["prompts"] = summary(rows)
        result["pictures"] = [{k: v for k, v in row.items() if k != "image"} for row in rows]
        shown = [row["image"] for category in CATEGORIES for row in rows if row["category"] == category]
        per_category = len(rows) // len(CATEGORIES)
        firsts = [
            shown[c * per_category + n]
            for c in range(len(CATEGORIES))
            for n in range(min(GRID_COLUMNS, per_category))
        ]
        picture_grid(firsts, min(GRID_COLUMNS, per_category)).save(folder / "prompts.png")
    if "questions" in parts:
        result["questions"] = score_questions(pipeline, scenes, seed + 1, on_progress)
    if "reconstruction" in parts:
        result["reconstruction"], pairs = score_reconstruction(
            pipeline, scenes, seed + 2, preset, on_progress
        )
        picture_grid(pairs[: 2 * GRID_COLUMNS * 4], GRID_COLUMNS).save(folder / "reconstruction.png")
    result["minutes"] = round((time.monotonic() - started) / 60, 1)
    _write(folder / "scores.json", json.dumps(result, indent=2))
    _write(folder / "scores.md", to_markdown(result))
    return result


def to_markdown(result: dict[str, Any]) -> str:
    """The scores as Markdown tables."""
    lines = [f"# Scores of {result['checkpoint']}", ""]
    if "prompts" in result:
        best = result["best_of"] > 1
        lines += [
            f"Preset {result['preset']}, seed {result['seed']}"
            + (f", best of {result['best_of']}" if best else "")
            + ".",
            "",
            "| category | prompts | correct |" + (" first picture alone |" if best else ""),
            "|---|---|---|" + ("---|" if best else ""),
        ]
        for name, entry in result["prompts"]["categories"].items():
            lines.append(
                f"| {name} | {entry['prompts']} | {entry['correct']:.3f} |"
                + (f" {entry['single']:.3f} |" if best else "")
            )
        overall = result["prompts"]["overall"]
        lines.append(
            f"| **overall** | | **{overall['correct']:.3f}** |"
            + (f" {overall['single']:.3f} |" if best else "")
        )
        lines.append("")
    if "questions" in result:
        lines += ["| question type | questions | correct |", "|---|---|---|"]
        for name, entry in result["questions"]["types"].items():
            lines.append(f"| {name} | {entry['questions']} | {entry['correct']:.3f} |")
        lines += [
            f"| **all** | {result['questions']['questions']} | **{result['questions']['overall']:.3f}** |",
            "",
        ]
    if "reconstruction" in result:
        entry = result["reconstruction"]
        lines += ["| reconstruction | pictures | same scene |", "|---|---|---|"]
        for name, group in entry["groups"].items():
            lines.append(f"| {name} | {group['pictures']} | {group['correct']:.3f} |")
        lines += [
            f"| **all** ({entry['psnr']:.1f} dB) | {entry['pictures']} | **{entry['overall']:.3f}** |",
            "",
        ]
    return "\n".join(lines)


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
