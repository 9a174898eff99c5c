"""What the nodes after a training do: plots of runs, and grids of prompts and strengths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import comfy.sd
import torch
from PIL import Image
from torch import Tensor

from ...blip3o_core.errors import BadInputError
from ...blip3o_core.images import to_pil
from ..native.drawing import Patcher, encode_prompt, run_decoder, run_dit
from ..native.lora import apply_file
from ..native.sockets import BackboneHandle, TrainingRun
from .lora_files import as_lora_file
from .sheets import grid

TRIGGER = "{trigger}"
MAX_PICTURES = 256


def plot_runs(runs: Sequence[TrainingRun]) -> Image.Image:
    """Curves of several runs over each other."""
    from ...lora_training.proof import plot

    return plot.plot_runs([run.folder for run in runs])


def parse_strengths(text: str) -> list[float]:
    """Strengths from "0, 0.5, 1".

    Raises:
        BadInputError: not numbers, or none.
    """
    try:
        strengths = [float(part) for part in text.replace(";", ",").split(",") if part.strip()]
    except ValueError:
        strengths = []
    if not strengths:
        raise BadInputError(f'The strengths "{text}" are not numbers.\nWrite numbers with commas: 0, 0.5, 1')
    return strengths


def parse_prompts(text: str, trigger: str) -> list[str]:
    """Prompts, one a line, with the LoRA's trigger filled in.

    Raises:
        BadInputError: there is none, or the LoRA names no trigger to fill in.
    """
    prompts = [line.strip() for line in text.splitlines() if line.strip()]
    if not prompts:
        raise BadInputError("There is no prompt to draw.\nWrite at least one line into prompts.")
    if not trigger and any(TRIGGER in prompt for prompt in prompts):
        raise BadInputError(
            "The LoRA does not say what its trigger is.\nWrite the words themselves into prompts instead of {trigger}."
        )
    return [prompt.replace(TRIGGER, trigger) for prompt in prompts]


def compare_strengths(
    backbone: BackboneHandle,
    dit: Patcher,
    decoder: Patcher,
    vae: comfy.sd.VAE,
    lora: Mapping[str, Tensor],
    prompts: str,
    strengths: str,
    *,
    seed: int,
    feature_steps: int,
    feature_cfg: float,
    pixel_steps: int,
    pixel_cfg: float,
) -> tuple[Image.Image, Tensor]:
    """A labelled grid, and its pictures (B, H, W, 3) row by row; all are drawn from the same noise."""
    file = as_lora_file(lora)
    texts, values = parse_prompts(prompts, file.trigger), parse_strengths(strengths)
    if len(texts) * len(values) > MAX_PICTURES:
        raise BadInputError(
            f"{len(texts)} prompts at {len(values)} strengths are {len(texts) * len(values)} pictures; at most "
            f"{MAX_PICTURES} fit in one grid.\nUse fewer."
        )
    sampling: dict[str, Any] = {"steps": feature_steps, "cfg": feature_cfg}
    painting: dict[str, Any] = {"seed": seed, "steps": pixel_steps, "cfg": pixel_cfg}
    columns = []
    for value in values:
        changed_dit, changed_backbone, _ = apply_file(file, dit, backbone, value, value)
        assert changed_dit is not None and changed_backbone is not None
        encoded = [encode_prompt(changed_backbone, text, "", None) for text in texts]
        features = [
            run_dit(changed_dit, [[positive, {}]], [[negative, {}]], seed=seed, **sampling)
            for positive, negative, _ in encoded
        ]
        away = None
        if pixel_cfg != 1:
            _, negative, blank = encoded[0]
            away = run_dit(changed_dit, [[blank, {}]], [[negative, {}]], seed=0, **sampling)
        columns.append(
            [run_decoder(decoder, vae, each, negative_features=away, **painting) for each in features]
        )
    rows = [[column[row] for column in columns] for row in range(len(texts))]
    pictures = [[to_pil(picture)[0] for picture in row] for row in rows]
    labels = [f"strength {value:g}" for value in values]
    return grid(pictures, texts, labels), torch.cat([picture for row in rows for picture in row])
