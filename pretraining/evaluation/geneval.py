"""GenEval-like scores of the scene world: six categories of prompts no stage has seen, judged by the rule-based checker."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from ..world.captions import Request, caption_is_held_out, draw_caption_and_request
from ..world.checker import check_prompt, loose_report
from ..world.scenes import draw_scenes

if TYPE_CHECKING:
    from ...blip3o_core.pipeline import Blip3oPipeline

CATEGORIES = ("single object", "two objects", "counting", "colours", "position", "colour attribution")
POOL = 4000
MAX_POOLS = 40


@dataclass(frozen=True)
class Prompt:
    """A prompt, what it asks for, and the category it counts in."""

    category: str
    text: str
    request: Request


def category_prompts(category: str, number: int, seed: int = 0) -> list[Prompt]:
    """Different unseen prompts of a category: held-out wordings, and for pairs with colours held-out pairs too.

    Categories follow GenEval: "single object" and "two objects" leave colours open, "colours" names the colour of one
    object, "counting" asks for two or three, "position" states a relation, "colour attribution" joins two coloured
    objects by "and".
    """
    found: dict[str, Prompt] = {}
    rng = np.random.default_rng((seed, CATEGORIES.index(category)))
    for _ in range(MAX_POOLS):
        scenes = draw_scenes(POOL, int(rng.integers(2**31)), held_out=True)
        for n in np.flatnonzero(scenes.group == _group(category)):
            colourless = 1.0 if category in ("single object", "two objects") else 0.0
            plain = {"position": 0.0}.get(category, 1.0)
            text, request = draw_caption_and_request(scenes, int(n), rng, colourless=colourless, plain=plain)
            if caption_is_held_out(text) and text not in found and _belongs(category, request):
                found[text] = Prompt(category, text, request)
                if len(found) == number:
                    return list(found.values())
    return list(found.values())


def score_prompts(
    pipeline: Blip3oPipeline,
    prompts: Sequence[Prompt],
    *,
    seed: int,
    preset: str = "standard",
    best_of: int = 1,
    batch_size: int = 16,
    on_done: Callable[[int], None] | None = None,
) -> list[dict[str, Any]]:
    """Draw every prompt and judge it.

    Args:
        seed: of the first picture; picture i uses seed + i.
        best_of: pictures drawn per prompt; above 1 the model's own yes/no score picks one.
        on_done: called with the number of prompts finished.

    Returns:
        For each prompt: category, prompt, seed, correct, loose parts of the verdict, and the picture as `image`. With
        best_of above 1, `correct` judges the picked picture and `single` the first one.
    """
    rows = []
    for start in range(0, len(prompts), batch_size):
        part = prompts[start : start + batch_size]
        drawn = pipeline.generate(
            [prompt.text for prompt in part],
            images_per_prompt=best_of,
            seed=seed + start * best_of,
            preset=preset,
            batch_size=batch_size,
        )
        pictures = drawn.pictures
        for n, prompt in enumerate(part):
            tries = pictures[n * best_of : (n + 1) * best_of]
            picked = 0
            row: dict[str, Any] = {}
            if best_of > 1:
                scores = pipeline.score(tries, statement(prompt.text))
                picked = int(np.argmax(scores))
                row = {"scores": scores, "single": check_prompt(np.asarray(tries[0]), prompt.request)}
            image = np.asarray(tries[picked])
            rows.append(
                {
                    "category": prompt.category,
                    "prompt": prompt.text,
                    "seed": drawn.seeds[n * best_of + picked],
                    "correct": check_prompt(image, prompt.request),
                    "loose": loose_report(image, prompt.request),
                    "image": tries[picked],
                    **row,
                }
            )
        if on_done is not None:
            on_done(len(rows))
    return rows


def statement(prompt: str) -> str:
    """A prompt as the object of "does this picture show"."""
    return prompt.removeprefix("there is ").removeprefix("there are ")


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Share of correct pictures by category, and overall as GenEval counts it: the mean of the categories."""
    table: dict[str, Any] = {}
    for category in CATEGORIES:
        mine = [row for row in rows if row["category"] == category]
        if not mine:
            continue
        table[category] = {"correct": _mean([row["correct"] for row in mine]), "prompts": len(mine)}
        if "single" in mine[0]:
            table[category]["single"] = _mean([row["single"] for row in mine])
        parts = {name for row in mine for name in row["loose"]}
        table[category]["loose"] = {
            name: _mean([row["loose"][name] for row in mine if name in row["loose"]])
            for name in sorted(parts)
        }
    overall = {"correct": _mean([entry["correct"] for entry in table.values()])}
    if any("single" in entry for entry in table.values()):
        overall["single"] = _mean([entry["single"] for entry in table.values()])
    return {"categories": table, "overall": overall}


def picture_grid(images: Sequence[Image.Image], columns: int) -> Image.Image:
    """Pictures side by side with a thin gap."""
    width, height = images[0].size
    lines = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * (width + 4) - 4, lines * (height + 4) - 4), (128, 128, 128))
    for n, image in enumerate(images):
        sheet.paste(image, ((n % columns) * (width + 4), (n // columns) * (height + 4)))
    return sheet


def _group(category: str) -> int:
    return {"single object": 0, "colours": 0, "counting": 2}.get(category, 1)


def _belongs(category: str, request: Request) -> bool:
    if category in ("two objects", "colour attribution"):
        return request.relation is None
    return True


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))
