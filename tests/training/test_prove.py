"""The numbers of a scorecard against independent ones."""

import dataclasses
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from comfyui_blip3o.blip3o_core.models.nextdit import NextDiT
from comfyui_blip3o.lora_training.config import AdapterConfig, LoraConfig
from comfyui_blip3o.lora_training.fit.adapters import Adapter, attach
from comfyui_blip3o.lora_training.proof.judge import Judge, extra_prompts, sample_prompts, verdicts
from comfyui_blip3o.lora_training.records import TrainingData
from tiny_models import build_dit
from tiny_training import KEPT, lora_config, training_data, validation

DRIFT = "a red circle"


@pytest.fixture
def config(tmp_path: Path) -> LoraConfig:
    return lora_config(
        tmp_path, validate={"drift_prompts": [DRIFT], "sigmas": [0.25, 0.75], "noise_seeds": 2}
    )


@pytest.fixture
def adapter() -> Adapter:
    return attach(build_dit(), AdapterConfig(rank=4, alpha=4.0))


def shake(adapter: Adapter, size: float) -> None:
    """Weights as if something had been learned."""
    generator = torch.Generator().manual_seed(5)
    for parameter in adapter.parameters():
        parameter.data += size * torch.randn(parameter.shape, generator=generator)


def test_an_untrained_adapter_is_exactly_its_base(config: LoraConfig, adapter: Adapter) -> None:
    found = Judge(config, training_data()).validate(adapter, 0)
    assert (found.gain, found.train_gain, found.concept, found.leak) == (0, 0, 0, 0)
    assert found.drift == pytest.approx(0, abs=1e-6) and found.zero_drift == pytest.approx(0, abs=1e-6)
    assert all(base == now for base, now in found.per_sigma.values())


def test_a_network_that_knows_the_pictures_gains_everything(config: LoraConfig, adapter: Adapter) -> None:
    """The velocity n - x0 follows from the noisy features and x0 alone: (x_t - x0) / sigma."""
    data = training_data(1, views=1)
    clean = data.train[0].features[0].T.unflatten(1, (4, 4))[None]
    judge = Judge(config, data)
    judge.validate(adapter, 0)

    def truth(grid: torch.Tensor, timestep: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
        sigma = timestep.view(-1, 1, 1, 1) / 1000
        return (grid - clean) / sigma

    adapter.dit.forward = truth
    found = judge.validate(adapter, 1)
    assert found.loss == pytest.approx(0, abs=1e-8) and found.gain == pytest.approx(1)
    assert found.copy == pytest.approx(1, abs=1e-4)


def test_losses_are_the_published_objective_on_fixed_noise(config: LoraConfig, adapter: Adapter) -> None:
    shake(adapter, 0.05)
    data = training_data(1)
    seen: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
    forward = NextDiT.forward

    def record(grid: torch.Tensor, timestep: torch.Tensor, conditioning: torch.Tensor) -> torch.Tensor:
        velocity = forward(adapter.dit, grid, timestep, conditioning)
        seen.append((grid, timestep, velocity))
        return velocity

    judge = Judge(config, data)
    adapter.dit.forward = record
    with torch.no_grad():
        losses = judge._losses(adapter, data.train)
    clean = data.train[0].features[0].T.unflatten(1, (4, 4))[None]
    for (grid, timestep, velocity), (sigma, loss) in zip(seen, losses.items(), strict=True):
        assert (timestep == sigma * 1000).all()
        noise = (grid - (1 - sigma) * clean) / sigma
        assert loss == pytest.approx(F.mse_loss(velocity, noise - clean).item(), rel=1e-3)
        assert abs(noise.mean().item()) < 0.2 and noise.std().item() == pytest.approx(1, abs=0.2)


def test_the_same_adapter_gets_the_same_numbers_twice(config: LoraConfig, adapter: Adapter) -> None:
    shake(adapter, 0.05)
    judge = Judge(config, training_data())
    assert judge.validate(adapter, 7) == judge.validate(adapter, 7)


def test_drift_grows_with_the_change(config: LoraConfig, adapter: Adapter) -> None:
    judge = Judge(config, training_data())
    small = (shake(adapter, 0.02), judge.validate(adapter, 1))[1]
    large = (shake(adapter, 0.2), judge.validate(adapter, 2))[1]
    assert 0 < small.drift < large.drift and 0 < small.zero_drift < large.zero_drift


def test_held_out_pictures_are_what_counts_where_there_are_some(config: LoraConfig, adapter: Adapter) -> None:
    shake(adapter, 0.05)
    pictures = training_data(3).train
    data = TrainingData(pictures[:2], held_out=pictures[2:], prompts=training_data().prompts)
    found = Judge(config, data).validate(adapter, 1)
    alone = Judge(config, TrainingData(pictures[2:], prompts=data.prompts)).validate(adapter, 1)
    assert found.loss == pytest.approx(alone.loss) and found.train_gain != found.gain


def test_only_prompts_that_belong_to_no_picture_are_extra(tmp_path: Path) -> None:
    config = lora_config(
        tmp_path, sample__prompts=["{trigger} in snow", "{class}", "a house"], validate__drift_prompts=[DRIFT]
    )
    assert sample_prompts(config) == ("ohwx cat in snow", "cat", "a house")
    assert extra_prompts(config) == ("ohwx cat in snow", "cat", "a house", DRIFT)
    with_preservation = lora_config(tmp_path, train__prior={"dop": True, "prompts": list(KEPT)})
    assert set(KEPT) <= set(extra_prompts(with_preservation))
    without_words = lora_config(tmp_path, data={"path": "."}, sample__prompts=["{trigger}", "a house"])
    assert sample_prompts(without_words) == ("a house",)


def test_verdicts_say_what_the_numbers_mean(config: LoraConfig) -> None:
    good = dataclasses.replace(validation(1, gain=0.3, drift=0.01), concept=0.2, train_gain=0.35)
    assert "It learned" in verdicts(good, config, has_held_out=True)[0]
    assert "did not learn" in verdicts(validation(1, gain=-0.1), config, has_held_out=True)[0]
    said = verdicts(
        dataclasses.replace(good, drift=0.4, leak=0.2, gain=0.05, train_gain=0.6), config, has_held_out=True
    )
    assert any("changes other prompts" in each for each in said)
    assert any("leaks" in each for each in said) and any("by heart" in each for each in said)
