"""What a stage must reach before the next one is worth training, measured on scenes no stage has seen.

A DiT trained on features that name shapes only faintly draws clean objects whose shapes nobody can name: gate the
encoder first, then the VAE, the decoder and the backbone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from ...blip3o_core.drawing.decoding import PixelSettings, decode_features
from ...blip3o_core.images import CLIP_MEAN, CLIP_STD
from ..stages.encoder import CELL, GRID
from ..stages.understanding import UnderstandingStage, question_rows
from ..world.captions import Question, describe_question
from ..world.checker import look, matches_scene
from ..world.scenes import Scenes, draw_scenes, render
from .scores import question_summary, questions_of

if TYPE_CHECKING:
    from ..recipe import Recipe

PROBE_SCENES = 1500
PICTURES = 60
BATCH = 50
RIDGE = 1.0


def measure(recipe: Recipe, stage: str, seed: int = 90_000) -> dict[str, float]:
    """The numbers a stage is gated by, 0 to 1; empty for stages without a gate."""
    measures = {
        "encoder": probe_encoder,
        "vae": exact_vae,
        "decoder": exact_decoder,
        "understanding": exact_descriptions,
    }
    return measures[stage](recipe, seed) if stage in measures else {}


@torch.no_grad()
def probe_encoder(recipe: Recipe, seed: int) -> dict[str, float]:
    """Accuracy of a linear probe on the feature in the middle of each object, for its kind and its colour."""
    scenes = draw_scenes(PROBE_SCENES, seed, held_out=None)
    features = encode(recipe.image_encoder(), pixels_of(scenes))
    rows, objects = np.nonzero(scenes.kind >= 0)
    cells = (scenes.y[rows, objects] // CELL).astype(int) * GRID + (scenes.x[rows, objects] // CELL).astype(
        int
    )
    seen = features[rows, cells].double()
    seen = torch.cat([seen, torch.ones(len(seen), 1, dtype=seen.dtype)], dim=1)
    half = len(seen) // 2
    found = {}
    for name, label in (("kind", scenes.kind), ("colour", scenes.colour)):
        target = torch.nn.functional.one_hot(torch.from_numpy(label[rows, objects])).double()
        inputs = seen[:half]
        gram = inputs.T @ inputs + RIDGE * torch.eye(inputs.shape[1], dtype=inputs.dtype)
        weights = torch.linalg.solve(gram, inputs.T @ target[:half])
        right = (seen[half:] @ weights).argmax(1) == target[half:].argmax(1)
        found[name] = right.double().mean().item()
    return found


@torch.no_grad()
def exact_vae(recipe: Recipe, seed: int) -> dict[str, float]:
    """Share of pictures that show the same scene after the VAE alone."""
    scenes = draw_scenes(PICTURES, seed, held_out=None)
    vae = recipe.vae()
    decoded = vae.decode(vae.encode(2 * pixels_of(scenes) - 1).latent_dist.mean).sample
    return {"exact": same_scene(decoded / 2 + 0.5, scenes)}


@torch.no_grad()
def exact_decoder(recipe: Recipe, seed: int) -> dict[str, float]:
    """Share of pictures that show the same scene after encoder and decoder."""
    scenes = draw_scenes(PICTURES, seed, held_out=None)
    features = encode(recipe.image_encoder(), pixels_of(scenes))
    decoder = recipe.decoder()
    side = decoder.unet.config.sample_size
    noise = torch.randn(
        PICTURES, decoder.latent_channels, side, side, generator=torch.Generator().manual_seed(seed)
    )
    settings = PixelSettings(steps=20, sampler="dpmpp_2m")
    return {"exact": same_scene(decode_features(decoder, features, noise=noise, settings=settings), scenes)}


def exact_descriptions(recipe: Recipe, seed: int) -> dict[str, float]:
    """Share of full descriptions that are right to the word."""
    rng = np.random.default_rng(seed)
    scenes = draw_scenes(4 * BATCH, seed, held_out=True)
    questions = [[describe_question(scenes, n, rng)] for n in range(len(scenes))]
    return {"describe": float(np.mean(right_answers(recipe.understanding(), scenes, questions)["describe"]))}


def answer_accuracy(stage: UnderstandingStage, scenes_number: int, seed: int) -> dict[str, Any]:
    """Share of right answers by question type: what score_questions asks a checkpoint, asked of a stage.

    Returns:
        {"types": {type: {"correct", "questions"}}, "overall": mean over the questions, "questions": number}.
    """
    scenes = draw_scenes(scenes_number, seed, held_out=True)
    return question_summary(right_answers(stage, scenes, questions_of(scenes, seed)))


@torch.no_grad()
def right_answers(
    stage: UnderstandingStage, scenes: Scenes, questions: list[list[Question]]
) -> dict[str, list[bool]]:
    """Which answers about each scene are right to the word, by type of question.

    Every word is predicted after the right ones before it: all are right exactly when the greedy answer is.
    """
    found: dict[str, list[bool]] = {}
    for start in range(0, len(scenes), BATCH):
        asked = questions[start : start + BATCH]
        pixels = pixels_of(scenes.take(slice(start, start + BATCH)))
        batch = {"pixels": pixels, **question_rows(stage.vocabulary, asked).tensors("picture")}
        guess = stage.backbone.lm_head(stage.picture_states(batch)[0]).argmax(-1)
        fits = (guess == batch["picture_targets"]) | (batch["picture_weights"] == 0)
        for row, branch, of_scene in zip(fits, batch["picture_branch"], asked, strict=True):
            for number, question in enumerate(of_scene, 1):
                found.setdefault(question.type, []).append(bool(row[branch == number].all()))
    return found


def pixels_of(scenes: Scenes) -> Tensor:
    """Pictures as (N, 3, 128, 128) in [0, 1]."""
    return torch.from_numpy(render(scenes)).permute(0, 3, 1, 2).float() / 255


def encode(image_encoder: nn.Module, pixels: Tensor) -> Tensor:
    """Image features (N, T, W)."""
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    parts = [image_encoder((part - mean) / std) for part in pixels.split(100)]
    return torch.cat(parts).flatten(2).transpose(1, 2)


def same_scene(pixels: Tensor, scenes: Scenes) -> float:
    """Share of pictures (N, 3, H, W) in [0, 1] in which the checker sees the scene."""
    images = (pixels.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()
    return float(np.mean([matches_scene(look(image), scenes, n) for n, image in enumerate(images)]))
