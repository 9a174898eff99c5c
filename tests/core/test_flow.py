"""The path between noise and features, and its noise levels, against diffusers' scheduler."""

import numpy as np
import pytest
import torch
from comfyui_blip3o.blip3o_core.drawing.flow import (
    mix,
    sigma_schedule,
    target_velocity,
    training_sigma,
    whole_timesteps,
)
from diffusers import FlowMatchEulerDiscreteScheduler


@pytest.mark.parametrize("shift", [1.0, 0.5, 3.0])
def test_the_schedule_is_the_one_of_diffusers(shift: float) -> None:
    for steps in [*range(1, 61), 75, 100, 125, 250, 999, 1000]:
        scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps))
        ours = sigma_schedule(steps, shift)
        torch.testing.assert_close(ours, scheduler.sigmas, rtol=2e-7, atol=0)
        if shift == 1.0:  # as published: what the network is fed
            assert torch.equal(whole_timesteps(ours[:-1]), scheduler.timesteps.long().float()), steps


def test_the_published_timesteps_are_cut_not_rounded() -> None:
    timesteps = whole_timesteps(sigma_schedule(30))
    assert timesteps[:4].tolist() == [1000, 966, 933, 900]
    assert timesteps[-2:].tolist() == [33, 0]


@pytest.mark.parametrize("steps", [1, 2, 30, 1000])
@pytest.mark.parametrize("shift", [0.2, 1.0, 6.0])
def test_schedules_fall_from_one_to_zero(steps: int, shift: float) -> None:
    sigmas = sigma_schedule(steps, shift)
    assert sigmas.shape == (steps + 1,)
    assert (sigmas[0].item(), sigmas[-1].item()) == (1.0, 0.0)
    assert (sigmas.diff() < 0).all()


def test_a_shift_above_one_spends_more_steps_at_high_noise() -> None:
    assert (sigma_schedule(10, 3.0)[1:-1] > sigma_schedule(10)[1:-1]).all()
    assert (sigma_schedule(10, 0.5)[1:-1] < sigma_schedule(10)[1:-1]).all()


def test_training_levels_are_those_of_the_published_scheduler() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=1.0)
    sigmas = training_sigma(torch.arange(1000))
    torch.testing.assert_close(sigmas, scheduler.sigmas[:1000], rtol=1e-6, atol=0)
    assert sigmas[0].item() == 1.0
    assert sigmas[-1].item() == pytest.approx(0.001)


def test_mix_and_velocity_invert_each_other() -> None:
    generator = torch.Generator().manual_seed(0)
    features, noise = torch.randn(2, 4, 3, 2, 2, generator=generator)
    sigma = torch.tensor([0.0, 0.25, 0.5, 1.0])
    mixed = mix(features, noise, sigma)
    velocity = target_velocity(features, noise)
    levels = sigma[:, None, None, None]
    torch.testing.assert_close(mixed - levels * velocity, features)
    torch.testing.assert_close(mixed + (1 - levels) * velocity, noise)
    assert torch.equal(mixed[0], features[0])
    assert torch.equal(mixed[3], noise[3])
