"""The designs the paper compares, trained and scored alike on the scene world: `blip3o pretrain compare`.

Each row of configs/designs.yaml or configs/joint.yaml is a generation stage on the encoder, VAE, decoder and backbone
of one finished run.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor

from ...blip3o_core.checkpoints.save import write_json
from ...blip3o_core.drawing.decoding import decode_features
from ...blip3o_core.drawing.noise import seeded_noise
from ...blip3o_core.drawing.presets import PRESETS
from ...blip3o_core.drawing.sampling import FeatureSettings, sample_features
from ...blip3o_core.errors import BadInputError
from ...blip3o_core.images import to_pil
from ...blip3o_core.seeds import item_seeds
from ..recipe import CONFIGS, Recipe, read_config
from ..stages.encoder import GRID
from ..stages.generation import encode_prompts, tokens_to_latents
from ..trainer import train_stage
from ..world.captions import article
from ..world.checker import look
from ..world.scenes import KINDS
from .gates import answer_accuracy
from .geneval import CATEGORIES, category_prompts, picture_grid, score_prompts, summary

SHOWN = 6
TRIES = 8
# What regression learns is drawn in one step from pure noise; guidance has nothing to steer.
ONE_STEP = FeatureSettings(steps=1, guidance_scale=1)


class Drawer:
    """Draws with the networks of a run as they are, in float32; stands where `score_prompts` wants a pipeline.

    A pipeline draws image features only; this also draws what a DiT of VAE latents or of regression has learned.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.options = recipe.generation_options()
        self.understanding, self.dit = recipe.drawing()
        self.vocabulary = recipe.vocabulary
        self.decoder = recipe.decoder()

    def generate(
        self, prompts: Sequence[str], *, images_per_prompt: int, seed: int, preset: str, batch_size: int
    ) -> SimpleNamespace:
        """Pictures of prompts, as Blip3oPipeline.generate seeds them: `pictures` and `seeds`."""
        seeds = item_seeds(seed, len(prompts) * images_per_prompt)
        conditioning = encode_prompts(self.understanding, self.vocabulary, prompts)
        conditioning = conditioning.repeat_interleave(images_per_prompt, dim=0)
        parts = [
            self._pixels(conditioning[start : start + batch_size], seeds[start : start + batch_size], preset)
            for start in range(0, len(seeds), batch_size)
        ]
        return SimpleNamespace(pictures=to_pil(torch.cat(parts).permute(0, 2, 3, 1)), seeds=seeds)

    @torch.no_grad()
    def _pixels(self, conditioning: Tensor, seeds: list[int], preset: str) -> Tensor:
        settings = PRESETS[preset].features if self.options.objective == "flow" else ONE_STEP
        noise = seeded_noise(seeds, (self.dit.config.in_channels, GRID, GRID))
        tokens = sample_features(self.dit, conditioning, noise=noise, settings=settings)
        if self.options.target == "latents":
            return self.decoder.decode_latents(tokens_to_latents(tokens))
        side = self.decoder.unet.config.sample_size
        noise = seeded_noise(seeds, (self.decoder.latent_channels, side, side))
        return decode_features(self.decoder, tokens, noise=noise, settings=PRESETS[preset].pixels)


def variety(drawer: Drawer, seed: int, preset: str) -> dict[str, float]:
    """What pictures of one prompt that leaves the colour open look like from seed to seed.

    Returns:
        `pure`: share of pictures with one object of one colour; `colours`: different colours among TRIES pictures of
        a prompt, the mean over all kinds.
    """
    found = []
    for kind in KINDS:
        drawn = drawer.generate(
            [article(kind)], images_per_prompt=TRIES, seed=seed, preset=preset, batch_size=TRIES
        )
        reports = [look(np.asarray(picture)) for picture in drawn.pictures]
        found.append([r.objects[0].colour if len(r.objects) == 1 else None for r in reports])
    pure = [[colour for colour in colours if colour is not None] for colours in found]
    return {
        "pure": sum(map(len, pure)) / (TRIES * len(KINDS)),
        "colours": float(np.mean([len(set(colours)) for colours in pure])),
    }


def comparison_rows(table: str) -> dict[str, dict[str, Any]]:
    """Name of each row of a table -> the configuration of its generation stage, with its `title`."""
    described = yaml.safe_load((CONFIGS / f"{table}.yaml").read_text("utf-8"))
    base = {**read_config(CONFIGS / "generation.yaml"), **described["all"]}
    return {name: {**base, **changes} for name, changes in described["rows"].items()}


def compare(
    run: Path,
    folder: Path,
    rows: dict[str, dict[str, Any]],
    *,
    prompts: int = 60,
    scenes: int = 100,
    seed: int = 0,
    preset: str = "fast",
    overrides: dict[str, dict[str, Any]] | None = None,
    on_row: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Train and score every row that is not scored yet; all of them go into comparison.json and comparison.md.

    Args:
        run: a run whose encoder, VAE, decoder and understanding stages are trained.
        folder: gets a run folder per row, and the table.
        rows: from comparison_rows.
        prompts: unseen prompts per category; 0 = no pictures, questions alone.
        scenes: unseen pictures for questions.
        overrides: configurations of the earlier stages, where they are not the recorded ones.
        on_row: called with the name of each row before it is trained.

    Returns:
        {"rows": {name: scores}, "understanding before": share of right answers, ...}.
    """
    before = answer_accuracy(Recipe(run, overrides).understanding(), scenes, seed + 1)["overall"]
    result: dict[str, Any] = {
        "seed": seed,
        "preset": preset,
        "prompts per category": prompts,
        "scenes": scenes,
        "understanding before": before,
        "rows": {},
    }
    for name, config in rows.items():
        path = folder / name / "scores.json"
        if not path.is_file():
            if on_row is not None:
                on_row(name)
            write_json(path, _row(folder / name, run, config, overrides, prompts, scenes, seed, preset))
        result["rows"][name] = json.loads(path.read_text("utf-8"))
    write_json(folder / "comparison.json", result)
    (folder / "comparison.md").write_text(to_markdown(result), encoding="utf-8")
    return result


def to_markdown(result: dict[str, Any]) -> str:
    """The comparison as a Markdown table; without pictures, their columns are left out."""
    drawn = all("prompts" in row for row in result["rows"].values())
    columns = [*CATEGORIES, "overall", "pure", "colours"] if drawn else []
    columns += ["questions", "drawing loss", "steps", "minutes"]
    lines = ["| design | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for row in result["rows"].values():
        cells = [row["title"]]
        if drawn:
            categories = row["prompts"]["categories"]
            cells += [f"{categories[name]['correct']:.2f}" for name in CATEGORIES]
            cells.append(f"**{row['prompts']['overall']['correct']:.3f}**")
            cells += [f"{row['open colours']['pure']:.2f}", f"{row['open colours']['colours']:.1f}"]
        cells += [f"{row['questions']['overall']:.3f}", f"{row['loss']:.3f}"]
        cells += [str(row["steps"]), f"{row['minutes']:.0f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", f"Questions before: {result['understanding before']:.3f}.", ""])


def _row(
    folder: Path,
    run: Path,
    config: dict[str, Any],
    overrides: dict[str, dict[str, Any]] | None,
    prompts: int,
    scenes: int,
    seed: int,
    preset: str,
) -> dict[str, Any]:
    """Train one row's generation stage and score it."""
    recipe = Recipe(folder, {**(overrides or {}), "generation": config}, earlier=run)
    job = recipe.job("generation")
    recipe.record("generation")
    stage_folder = recipe.stage_folder("generation")
    train_stage(job.module, job.batch_of, job.loop, stage_folder)
    log = [json.loads(line) for line in (stage_folder / "log.jsonl").read_text("utf-8").splitlines()]
    starts = [0, *(line["step"] for line in log[:-1])]
    seconds = sum(
        (line["step"] - start) * line["seconds_per_step"] for line, start in zip(log, starts, strict=True)
    )
    understanding, _ = recipe.drawing()
    scores = {
        "title": config["title"],
        "questions": answer_accuracy(understanding, scenes, seed + 1),
        "steps": job.loop.steps,
        "batch_size": job.loop.batch_size,
        "learning parameters": sum(p.numel() for p in job.module.parameters() if p.requires_grad),
        "loss": log[-1]["drawing"],
        "minutes": round(seconds / 60, 1),
    }
    return {**scores, **_pictures(Drawer(recipe), folder, prompts, seed, preset)} if prompts else scores


def _pictures(drawer: Drawer, folder: Path, prompts: int, seed: int, preset: str) -> dict[str, Any]:
    """Scores of drawing, and a grid with one line per category."""
    drawn = []
    for category in CATEGORIES:
        wanted = category_prompts(category, prompts, seed)
        drawn += score_prompts(drawer, wanted, seed=seed + 1000, preset=preset)
    shown = [
        row["image"]
        for category in CATEGORIES
        for row in [row for row in drawn if row["category"] == category][:SHOWN]
    ]
    picture_grid(shown, min(SHOWN, prompts)).save(folder / "prompts.png")
    return {"prompts": summary(drawn), "open colours": variety(drawer, seed + 2000, preset)}


def check_rows(rows: dict[str, dict[str, Any]], wanted: Sequence[str] | None) -> dict[str, dict[str, Any]]:
    """The wanted rows, all without a wish.

    Raises:
        BadInputError: a row that does not exist.
    """
    unknown = [name for name in wanted or () if name not in rows]
    if unknown:
        raise BadInputError(
            f'There is no row "{unknown[0]}" in the comparison; choose among {", ".join(rows)}.'
        )
    return {name: rows[name] for name in wanted or rows}
