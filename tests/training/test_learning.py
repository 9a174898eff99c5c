"""A fit teaches the built-in model what it is shown, and preservation keeps the rest: on features, without pixels."""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from comfyui_blip3o.blip3o_core import load_pipeline
from comfyui_blip3o.blip3o_core.config import BUILT_IN_MODEL
from comfyui_blip3o.blip3o_core.drawing.flow import mix
from comfyui_blip3o.blip3o_core.drawing.sampling import FeatureSettings, sample_features, to_grid, to_tokens
from comfyui_blip3o.blip3o_core.pipeline import Blip3oPipeline
from comfyui_blip3o.lora_training.fit.adapters import Adapter
from comfyui_blip3o.lora_training.fit.loop import fit
from comfyui_blip3o.lora_training.records import Sample, TrainingData
from tiny_training import lora_config
from torch import Tensor

TRIGGERS = ("a red ring", "a small red ring", "a large red ring")  # shall draw blue stars from now on
CLASSES = ("a red circle", "a small red circle", "a large red circle")
KEPT = ("a blue square", "a purple cross")
OTHERS = ("a green square", "two yellow circles")
QUICK = FeatureSettings(steps=10, guidance_scale=3, sampler="ab2")


@dataclasses.dataclass
class Concept:
    pipeline: Blip3oPipeline
    data: TrainingData
    held_out: Tensor
    triggers: Tensor
    classes: Tensor
    others: Tensor

    @contextmanager
    def fit(self, folder: Path, data: TrainingData | None = None, **settings: object) -> Iterator[Adapter]:
        options = {
            "steps": 20,
            "batch": 4,
            "optimizer": {"lr": 4e-3},
            "schedule": {"warmup": 3},
            "prior": {"dop": False},
            **settings,
        }
        config = lora_config(folder, adapter={"rank": 8, "alpha": 8}, train=options)
        adapter = fit(config, data or self.data, self.pipeline.dit).adapter
        try:
            yield adapter
        finally:
            adapter.remove()


@pytest.fixture(scope="module")
def concept() -> Concept:
    pipeline = load_pipeline(BUILT_IN_MODEL, device="cpu", dtype="fp32")
    triggers, classes = pipeline.encode_prompts(TRIGGERS), pipeline.encode_prompts(CLASSES)
    kept = pipeline.encode_prompts(KEPT)
    star = pipeline.encode_prompts("a blue star").expand(9, -1, -1)
    features = pipeline.sample_features(star, list(range(9)), settings=QUICK)
    samples = tuple(
        Sample(
            f"star {i}",
            features[i : i + 1],
            triggers[i % 3 : i % 3 + 1],
            classes[i % 3 : i % 3 + 1],
            (TRIGGERS[i % 3],),
            (CLASSES[i % 3],),
        )
        for i in range(6)
    )
    data = TrainingData(samples, prompts=dict(zip(KEPT, kept, strict=True)))
    return Concept(pipeline, data, features[6:], triggers, classes, pipeline.encode_prompts(OTHERS))


@torch.no_grad()
def velocities(adapter: Adapter, features: Tensor, conditioning: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """With and without the adapter, and the noise, at three levels."""
    noise = torch.randn(features.shape, generator=torch.Generator().manual_seed(3))
    found: list[list[Tensor]] = [[], []]
    for level in (0.2, 0.5, 0.8):
        sigma = torch.full((len(features),), level)
        grid = to_grid(mix(features, noise, sigma), (8, 8))
        for is_enabled in (True, False):
            with adapter.enabled(is_enabled):
                found[not is_enabled].append(to_tokens(adapter.dit(grid, 1000 * sigma, conditioning)))
    return torch.stack(found[0]), torch.stack(found[1]), noise


def gain(adapter: Adapter, concept: Concept) -> float:
    """Held-out loss relative to the base's."""
    learned, base, noise = velocities(adapter, concept.held_out, concept.triggers)
    target = noise - concept.held_out
    return 1 - (((learned - target) ** 2).mean() / ((base - target) ** 2).mean()).item()


def drift(adapter: Adapter, conditioning: Tensor) -> float:
    """How far the velocities on what the base draws for a conditioning have moved."""
    noise = torch.randn(len(conditioning), 64, 8, 8, generator=torch.Generator().manual_seed(4))
    with adapter.enabled(False):
        features = sample_features(adapter.dit, conditioning, noise=noise, settings=QUICK)
    learned, base, _ = velocities(adapter, features, conditioning)
    return ((learned - base) ** 2).mean().item()


def test_a_concept_is_learned_and_scrambled_pictures_are_not(concept: Concept, tmp_path: Path) -> None:
    noise = torch.randn(3, 64, 8, 8, generator=torch.Generator().manual_seed(1))
    with concept.fit(tmp_path / "right", steps=30) as adapter:
        assert gain(adapter, concept) >= 0.6
        drawn = sample_features(adapter.dit, concept.triggers, noise=noise, settings=QUICK)
        likeness = F.cosine_similarity(drawn.flatten(1), concept.held_out.mean(0).flatten()[None])
        assert likeness.mean() >= 0.94
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    scrambled = dataclasses.replace(
        concept.data,
        train=tuple(
            dataclasses.replace(sample, features=sample.features[:, order]) for sample in concept.data.train
        ),
    )
    with concept.fit(tmp_path / "wrong", scrambled, steps=15) as control:
        assert gain(control, concept) < 0


@pytest.mark.slow
def test_preservation_more_than_halves_every_drift_for_little_of_the_gain(
    concept: Concept, tmp_path: Path
) -> None:
    drifts, gains = {}, {}
    zeros = torch.zeros_like(concept.others)
    for is_kept in (False, True):
        prior = {"dop": is_kept, "prompts": list(KEPT)}
        with concept.fit(tmp_path / str(is_kept), prior=prior) as adapter:
            drifts[is_kept] = [
                drift(adapter, prompts) for prompts in (concept.classes, concept.others, zeros)
            ]
            gains[is_kept] = gain(adapter, concept)
    for kept, free in zip(drifts[True], drifts[False], strict=True):
        assert kept <= 0.5 * free
    assert gains[True] >= gains[False] - 0.1
