"""Optimisers, rates over the steps, averages."""

import sys

import pytest
import torch
from comfyui_blip3o.blip3o_core.errors import MissingFilesError
from comfyui_blip3o.lora_training.config import OptimizerConfig, ScheduleConfig, TrainConfig
from comfyui_blip3o.lora_training.fit.optimizers import (
    MovingAverage,
    averaged,
    build_optimizer,
    rate_factor,
    set_rate,
)
from torch import nn

PACKAGES = {"prodigy": "prodigyopt", "schedule_free": "schedulefree"}


def pair(size: float = 1.0) -> dict[str, nn.Parameter]:
    return {
        "layer.lora_A.weight": nn.Parameter(size * torch.ones(2, 3)),
        "layer.lora_B.weight": nn.Parameter(size * torch.ones(4, 2)),
        "layer.magnitude": nn.Parameter(size * torch.ones(4)),
    }


def test_cosine_rises_over_the_warm_up_and_falls_to_the_floor() -> None:
    config = ScheduleConfig(type="cosine", warmup=4, floor=0.1)
    rates = [rate_factor(config, step, 24) for step in range(24)]
    assert rates[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert rates[4] == 1 and rates[-1] == pytest.approx(0.1)
    reference = torch.optim.lr_scheduler.CosineAnnealingLR(
        torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0), T_max=19, eta_min=0.1
    )
    for rate in rates[4:]:
        assert rate == pytest.approx(reference.get_last_lr()[0])
        reference.optimizer.step()
        reference.step()


def test_linear_and_constant_rates() -> None:
    linear = ScheduleConfig(type="linear", warmup=0, floor=0.0)
    assert [rate_factor(linear, step, 5) for step in range(5)] == pytest.approx([1, 0.75, 0.5, 0.25, 0])
    constant = ScheduleConfig(type="constant", warmup=1, floor=0.0)
    assert [rate_factor(constant, step, 3) for step in range(3)] == [0.5, 1, 1]


def test_a_run_shorter_than_its_warm_up_still_has_a_rate() -> None:
    assert 0 < rate_factor(ScheduleConfig(warmup=20), 0, 5) < 1
    assert rate_factor(ScheduleConfig(warmup=0), 0, 1) == 1


def test_adamw_steps_as_written_out_and_does_not_decay_magnitudes() -> None:
    config = TrainConfig(optimizer=OptimizerConfig(lr=0.1, betas=(0.9, 0.99), weight_decay=0.5))
    parameters = pair()
    optimizer = build_optimizer(parameters, config)
    set_rate(optimizer, 0.5)
    for parameter in parameters.values():
        parameter.grad = torch.full_like(parameter, 0.3)
    optimizer.step()
    rate, move = 0.05, 0.3 / (0.3 + 1e-8)  # bias-corrected moments of the first step are g and g^2
    assert torch.allclose(parameters["layer.lora_A.weight"], torch.tensor(1 - rate * 0.5 - rate * move))
    assert torch.allclose(parameters["layer.magnitude"], torch.tensor(1 - rate * move))


def test_loraplus_gives_b_its_own_rate() -> None:
    optimizer = build_optimizer(pair(), TrainConfig(optimizer=OptimizerConfig(lr=0.01, loraplus=4)))
    rates = {
        tuple(parameter.shape): group["lr"]
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    assert rates == {(2, 3): 0.01, (4, 2): 0.04, (4,): 0.01}


@pytest.mark.parametrize(("name", "rate"), [("adamw", 0.05), ("prodigy", 1.0), ("schedule_free", 0.05)])
def test_every_optimizer_walks_towards_the_goal_and_goes_on_exactly_from_its_state(
    name: str, rate: float, capsys: pytest.CaptureFixture[str]
) -> None:
    if name in PACKAGES:
        pytest.importorskip(PACKAGES[name])
    config = TrainConfig(optimizer=OptimizerConfig(name=name, lr=rate), schedule=ScheduleConfig(warmup=3))

    def walk(parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, steps: int) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            sum(((parameter - 3) ** 2).sum() for parameter in parameters.values()).backward()
            optimizer.step()

    whole = pair()
    optimizer = build_optimizer(whole, config)
    walk(whole, optimizer, 60)
    assert all((parameter - 3).abs().max() < 2 for parameter in whole.values())
    first, second = pair(), pair(0.0)
    begun = build_optimizer(first, config)
    walk(first, begun, 20)
    with torch.no_grad():
        for key, parameter in second.items():
            parameter.copy_(first[key])
    resumed = build_optimizer(second, config)
    resumed.load_state_dict(begun.state_dict())
    walk(second, resumed, 40)
    assert all(torch.equal(second[key], whole[key]) for key in whole)
    assert capsys.readouterr().out == ""  # where events may be read


def test_schedule_free_shows_its_average_and_goes_on_from_the_same_bits() -> None:
    pytest.importorskip("schedulefree")
    parameters = pair()
    optimizer = build_optimizer(
        parameters, TrainConfig(optimizer=OptimizerConfig(name="schedule_free", lr=0.1))
    )
    for step in range(5):
        for parameter in parameters.values():
            parameter.grad = torch.full_like(parameter, 0.1 + step)
        optimizer.step()
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    with averaged(optimizer):
        assert not torch.equal(parameters["layer.magnitude"], before["layer.magnitude"])
    assert all(torch.equal(parameters[name], value) for name, value in before.items())
    assert optimizer.param_groups[0]["train_mode"]


@pytest.mark.parametrize(("name", "package"), PACKAGES.items())
def test_a_missing_package_is_named_with_its_command(
    name: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingFilesError, match=f"pip install {package}"):
        build_optimizer(pair(), TrainConfig(optimizer=OptimizerConfig(name=name)))


def test_the_moving_average_follows_its_ramp() -> None:
    parameters = {"weight": nn.Parameter(torch.zeros(1))}
    average = MovingAverage(parameters, 0.5)
    expected = 0.0
    for step in range(1, 30):
        parameters["weight"].data.fill_(step)
        average.update(step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * step
        assert average.weights["weight"].item() == pytest.approx(expected, rel=1e-5)
