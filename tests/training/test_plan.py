"""The memory plan, against what the published networks weigh."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from comfyui_blip3o.blip3o_core.checkpoints.layout import open_checkpoint
from comfyui_blip3o.blip3o_core.config import BUILT_IN_MODEL, EvaClipConfig, NextDiTConfig
from comfyui_blip3o.blip3o_core.models.nextdit import NextDiT
from comfyui_blip3o.lora_training import plan as module
from comfyui_blip3o.lora_training.plan import plan_phases
from training_sets import config_of

GIB = 2**30


@pytest.fixture
def published(monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, float]]:
    """The plan, in MiB, for networks of the published 8B model's sizes on a GPU."""
    counted = {"image_encoder": 4.35e9, "backbone": 8.29e9, "dit": 1.365e9, "decoder": 2.65e9}
    monkeypatch.setattr(module, "parameters_of", lambda files, component: int(counted[component]))
    with torch.device("meta"):
        dit = NextDiT(NextDiTConfig())
    monkeypatch.setattr(module, "dit_without_weights", lambda files: dit)
    files = open_checkpoint(BUILT_IN_MODEL)

    def plan(*overrides: str, free: int | None = None) -> dict[str, float]:
        config = config_of(Path("x"), "model.base_dtype=bf16", "adapter.rank=16", "train.ema=0", *overrides)
        phases = plan_phases(config, files, EvaClipConfig(), torch.device("cuda"), free or 10**12)
        return {each.phase: each.bytes / 2**20 for each in phases}

    return plan


def test_the_plan_of_the_published_model_is_near_what_its_parts_weigh(
    published: Callable[..., dict[str, float]],
):
    plan = published("train.batch=8")
    assert 8.1 < plan["features"] / 1024 < 9.5
    assert 15.4 < plan["conditioning"] / 1024 < 16.5
    # 2.54 GiB of weights, 0.26 of adapter and optimiser, 8 times 264 to 286 MiB of activations, 0.8 of framework.
    assert plan["fit"] / 1024 == pytest.approx(5.7, abs=0.15)
    assert published("train.batch=4")["fit"] / 1024 == pytest.approx(4.6, abs=0.15)
    assert plan["prove"] < plan["fit"]


def test_the_plan_follows_the_settings(published: Callable[..., dict[str, float]]):
    assert published("train.batch=8", "model.base_dtype=fp8")["fit"] / 1024 == pytest.approx(4.4, abs=0.15)
    assert (
        published("train.batch=8", "adapter.targets=cross")["fit"] < published("train.batch=8")["fit"] - 100
    )
    whole = (
        published("adapter.type=full")["fit"] - published("adapter.type=none", "adapter.queries=true")["fit"]
    )
    # Gradient and two moments beside it, but then the backbone stays in memory.
    assert whole == pytest.approx((16 * 1.365e9 - 2 * 8.29e9) / 2**20, rel=0.01)


def test_the_plan_shrinks_into_the_memory_that_is_free(published: Callable[..., dict[str, float]]):
    roomy = published("train.batch=8")["fit"]
    for gib in (5, 4.2):
        assert published("train.batch=8", free=int(gib * GIB))["fit"] <= min(roomy, gib * 1024)
