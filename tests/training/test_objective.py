"""What a step trains on: the published formula, and random numbers that depend on seed, step and row alone."""

import math

import numpy as np
import pytest
import torch
from comfyui_blip3o.blip3o_core import load_pipeline
from comfyui_blip3o.blip3o_core.config import BUILT_IN_MODEL
from comfyui_blip3o.blip3o_core.drawing.flow import mix, target_velocity
from comfyui_blip3o.blip3o_core.drawing.sampling import to_grid, to_tokens
from comfyui_blip3o.lora_training.config import LossConfig, TimestepConfig
from comfyui_blip3o.lora_training.fit.objective import (
    draw_lessons,
    draw_noise,
    draw_rows,
    draw_sigmas,
    preservation_loss,
    random_stream,
    velocity_loss,
)
from tiny_training import CLASS_CAPTION, KEPT, training_data
from torch import Tensor


def many_sigmas(config: TimestepConfig, *, steps: int = 500, batch: int = 8) -> Tensor:
    return torch.cat([draw_sigmas(config, 0, step, batch) for step in range(steps)])


def test_levels_and_targets_are_those_of_the_published_training_step() -> None:
    # Written out from BLIP3o's forward: u in [0, 1), index int(u 1000), sigma and timestep of diffusers' scheduler.
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=1.0)
    uniform = random_stream(5, "sigma", 9).random(64)
    index = (torch.from_numpy(uniform) * 1000).long()
    timesteps = scheduler.timesteps[index]
    sigma = scheduler.sigmas[index]
    drawn = draw_sigmas(TimestepConfig(stratified=False), 5, 9, 64)
    assert torch.allclose(drawn, sigma, atol=1e-7)
    assert torch.equal((drawn * 1000).round(), timesteps.round())
    features, noise = torch.randn(64, 16, 8), torch.randn(64, 16, 8)
    noisy = (1 - sigma[:, None, None]) * features + sigma[:, None, None] * noise
    assert torch.allclose(mix(features, noise, drawn), noisy, atol=1e-6)
    predicted = torch.randn(64, 16, 8)
    published = ((predicted.float() - (noise - features).float()) ** 2).mean()
    loss = velocity_loss(predicted, target_velocity(features, noise), LossConfig())
    assert loss.shape == (64,)
    assert torch.allclose(loss.mean(), published)


def test_every_level_lies_on_the_trained_grid_and_uniform_draws_reach_all_of_it() -> None:
    for config in (
        TimestepConfig(),
        TimestepConfig(dist="logit_normal", std=3),
        TimestepConfig(shift=4),
        TimestepConfig(min=0.2, max=0.4),
    ):
        steps = many_sigmas(config) * 1000
        assert torch.allclose(steps, steps.round(), atol=1e-3)
        assert 1 <= steps.min() and steps.max() <= 1000.01
    assert len(many_sigmas(TimestepConfig(), steps=2000).unique()) == 1000


def test_stratified_batches_hold_one_level_of_each_range_in_random_order() -> None:
    orders = set()
    for step in range(50):
        sigmas = draw_sigmas(TimestepConfig(), 0, step, 8)
        ranges = ((1 - sigmas + 1e-6) * 8).floor().long()
        assert sorted(ranges.tolist()) == list(range(8))
        orders.add(tuple(ranges.tolist()))
    assert len(orders) == 50


def test_logit_normal_levels_have_the_asked_distribution() -> None:
    logits = torch.logit(many_sigmas(TimestepConfig(dist="logit_normal", mean=0.5, std=0.8)))
    assert logits.mean().item() == pytest.approx(0.5, abs=0.03)  # as in SD3: above 0 = more noise
    assert logits.std().item() == pytest.approx(0.8, abs=0.03)


def test_shift_moves_levels_as_the_sampling_schedule_is_shifted() -> None:
    plain, shifted = many_sigmas(TimestepConfig()), many_sigmas(TimestepConfig(shift=3))
    assert torch.allclose(shifted, 3 * plain / (1 + 2 * plain), atol=0.004)
    assert shifted.mean() > plain.mean() + 0.1


def test_a_range_of_one_level_gives_that_level() -> None:
    assert many_sigmas(TimestepConfig(min=0.3, max=0.3), steps=5).unique().tolist() == pytest.approx([0.3])


def test_stratified_levels_halve_the_spread_of_the_batch_loss_at_the_same_mean() -> None:
    # The trained model's loss on a picture of its own, once over a grid of levels; then batches of levels on it.
    pipeline = load_pipeline(BUILT_IN_MODEL, device="cpu", dtype="fp32")
    conditioning = pipeline.encode_prompts("a red circle")
    features = pipeline.sample_features(conditioning, [3])
    noise = draw_noise(0, 0, range(100), features.shape[1:])
    sigma = (torch.arange(100) + 0.5) / 100
    with torch.no_grad():
        grid = to_grid(mix(features.expand(100, -1, -1), noise, sigma), (8, 8))
        velocity = to_tokens(pipeline.dit(grid, sigma * 1000, conditioning.expand(100, -1, -1)))
    losses = velocity_loss(velocity, noise - features, LossConfig())
    spread, mean = {}, {}
    for is_stratified in (False, True):
        config = TimestepConfig(stratified=is_stratified)
        batches = many_sigmas(config, steps=1500, batch=12).view(-1, 12)
        each = losses[(batches * 100).long().clamp(max=99)].mean(dim=1)
        spread[is_stratified], mean[is_stratified] = each.std().item(), each.mean().item()
    assert spread[True] <= 0.65 * spread[False]
    assert mean[True] == pytest.approx(mean[False], rel=0.03)


def test_random_numbers_depend_on_seed_stream_step_and_row_alone() -> None:
    first = random_stream(1, "noise", 2, 3).random(5)
    random_stream(1, "noise", 2, 4).random(1000)
    assert np.array_equal(random_stream(1, "noise", 2, 3).random(5), first)
    for other in ((2, "noise", 2, 3), (1, "order", 2, 3), (1, "noise", 3, 3), (1, "noise", 2, 4)):
        assert not np.intersect1d(random_stream(*other).random(5), first).size
    whole = draw_noise(1, 2, range(6), (4, 8))
    assert torch.equal(draw_noise(1, 2, [4, 1], (4, 8)), whole[[4, 1]])
    assert abs(draw_noise(0, 0, range(64), (16, 16)).std().item() - 1) < 0.02


def test_an_epoch_shows_every_picture_as_often_as_it_repeats_in_another_order_each_time() -> None:
    data = training_data(5)
    object.__setattr__(data.train[2], "repeats", 3)
    rows = [row for step in range(14) for row in draw_rows(data.train, (), 0, step, 3, 0.0)]
    epochs = [[row.sample.name for row in rows[start : start + 7]] for start in range(0, 42, 7)]
    for epoch in epochs:
        assert sorted(epoch) == sorted([sample.name for sample in data.train] + ["picture 2"] * 2)
    assert len({tuple(epoch) for epoch in epochs}) == 6
    assert {row.view for row in rows} == {0, 1}


def test_the_share_of_dropped_rows_is_the_asked_one_and_their_conditioning_is_zero() -> None:
    data = training_data(4)
    rows = [row for step in range(300) for row in draw_rows(data.train, (), 0, step, 8, 0.1)]
    dropped = [row for row in rows if row.is_dropped]
    assert len(dropped) / len(rows) == pytest.approx(0.1, abs=0.02)
    assert not dropped[0].conditioning.any() and dropped[0].prompt is None
    kept = next(row for row in rows if not row.is_dropped)
    assert torch.equal(kept.conditioning, kept.sample.conditioning[0])


def test_regularisation_pictures_are_every_other_row_over_the_steps() -> None:
    data = training_data(3, regularisation=2)
    for batch in (1, 3, 4):
        rows = [
            row for step in range(12) for row in draw_rows(data.train, data.regularisation, 0, step, batch, 0)
        ]
        names = [row.sample.name.split()[0] for row in rows]
        assert names[::2] == ["picture"] * (len(rows) // 2)
        assert names[1::2] == ["regularisation"] * (len(rows) // 2)


def test_lessons_are_class_prompts_other_prompts_and_now_and_then_nothing() -> None:
    data = training_data(4)
    drawn = {prompt: (data.prompts[prompt], torch.full((16, 16), 9.0)) for prompt in KEPT}
    drawn[CLASS_CAPTION] = (data.train[0].class_conditioning[0], torch.full((16, 16), 5.0))
    kinds = dict.fromkeys((*KEPT, CLASS_CAPTION, None), 0)
    for step in range(100):
        rows = draw_rows(data.train, (), 0, step, 8, 0.5)
        for row, lesson in zip(rows, draw_lessons(rows, KEPT, drawn, 0, step, 8), strict=True):
            kinds[lesson.prompt] += 1
            assert lesson.index == row.index
            if lesson.prompt is None:
                assert not lesson.conditioning.any()
            else:
                assert torch.equal(lesson.conditioning, drawn[lesson.prompt][0])
                assert lesson.features is drawn[lesson.prompt][1]
    shares = {kind: count / 800 for kind, count in kinds.items()}
    assert shares[CLASS_CAPTION] == pytest.approx(0.5)
    assert shares[None] == pytest.approx(0.1)
    assert [shares[prompt] for prompt in KEPT] == pytest.approx([0.2, 0.2], abs=0.05)


def test_regularisation_pictures_without_other_prompts_hold_the_branch_without_conditioning() -> None:
    data = training_data(2, regularisation=1)
    object.__setattr__(data.regularisation[0], "class_prompts", ())
    drawn = {CLASS_CAPTION: (data.train[0].class_conditioning[0], torch.zeros(16, 16))}
    rows = draw_rows(data.train, data.regularisation, 0, 1, 4, 0.0)
    lessons = draw_lessons(rows, (), drawn, 0, 1, 4)
    assert [lesson.prompt for lesson in lessons] == [CLASS_CAPTION, None, CLASS_CAPTION, None]
    assert torch.equal(lessons[1].features, rows[1].features)


def test_masked_features_do_not_count_and_weights_are_relative() -> None:
    predicted, target = torch.randn(2, 4, 3), torch.randn(2, 4, 3)
    weights = torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.2, 0.2, 0.2, 0.2]])
    loss = velocity_loss(predicted, target, LossConfig(), weights)
    square = (predicted - target) ** 2
    assert torch.allclose(loss[0], square[0, [0, 3]].mean())
    assert torch.allclose(loss[1], square[1].mean())


def test_huber_is_the_square_up_to_delta_and_grows_evenly_beyond() -> None:
    target = torch.zeros(1, 1, 3)
    predicted = torch.tensor([[[0.5, 1.0, 4.0]]])
    loss = velocity_loss(predicted, target, LossConfig(type="huber", delta=1.0))
    assert loss.item() == pytest.approx((0.25 + 1.0 + (2 * 4 - 1)) / 3)


def test_losses_are_taken_in_float32_and_the_teacher_gets_no_gradient() -> None:
    student = torch.randn(1, 4, 3, dtype=torch.bfloat16, requires_grad=True)
    teacher = torch.randn(1, 4, 3, requires_grad=True)
    loss = preservation_loss(student, teacher)
    assert loss.dtype == torch.float32
    loss.sum().backward()
    assert teacher.grad is None and student.grad is not None
    assert math.isclose(loss.item(), ((student.float() - teacher) ** 2).mean().item(), rel_tol=1e-6)
