"""Samplers of the flow on velocities with a known answer, and every way to steer, start and stop a run."""

import math
from collections.abc import Callable

import pytest
import tiny_models
import torch
from comfyui_blip3o.blip3o_core.drawing.flow import mix, sigma_schedule
from comfyui_blip3o.blip3o_core.drawing.sampling import (
    FEATURE_SAMPLERS,
    FeatureSettings,
    FeatureStart,
    sample_features,
    to_grid,
    to_tokens,
)
from comfyui_blip3o.blip3o_core.errors import BadInputError
from torch import Tensor

SHAPE = (2, 3, 4, 4)


class FakeDiT:
    """A DiT whose velocity is a given function of grid, timestep and (per row) the mean of the conditioning."""

    def __init__(self, velocity: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        self.velocity = velocity
        self.batches: list[int] = []
        self.timesteps: list[float] = []
        self.contexts = 0

    def encode_context(self, conditioning: Tensor, *, zero_rows: int = 0) -> Tensor:
        self.contexts += 1
        means = conditioning.mean(dim=(1, 2))
        return torch.cat([means, means.new_zeros(zero_rows)])

    def __call__(self, grid: Tensor, timestep: Tensor, *, context: Tensor) -> Tensor:
        assert grid.shape[0] == timestep.shape[0] == context.shape[0]
        self.batches.append(grid.shape[0])
        self.timesteps.append(timestep[0].item())
        return self.velocity(grid, timestep[:, None, None, None], context[:, None, None, None])


def noise(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*SHAPE, generator=torch.Generator().manual_seed(3), dtype=dtype)


def conditioning(value: float = 1.0) -> Tensor:
    return torch.full((SHAPE[0], 5, 6), value, dtype=torch.float64)


def run(dit: FakeDiT, settings: FeatureSettings, **options: object) -> Tensor:
    """Options of a FeatureStart may be given beside those of sample_features."""
    begun = {name: options.pop(name) for name in ("strength", "mask") if name in options}
    if "start_features" in options:
        options["start"] = FeatureStart(options.pop("start_features"), **begun)
    return to_grid(
        sample_features(dit, conditioning(), noise=noise(), settings=settings, **options), SHAPE[2:]
    )


@pytest.mark.parametrize("sampler", FEATURE_SAMPLERS)
@pytest.mark.parametrize("steps", [1, 2, 7, 30])
def test_a_constant_velocity_lands_exactly(sampler: str, steps: int) -> None:
    target = torch.full(SHAPE, 0.7, dtype=torch.float64)
    dit = FakeDiT(lambda grid, *_: (noise() - target).repeat(grid.shape[0] // SHAPE[0], 1, 1, 1))
    settings = FeatureSettings(steps=steps, sampler=sampler, shift=2.0)
    torch.testing.assert_close(run(dit, settings), target, rtol=1e-6, atol=1e-6)


def error_of(sampler: str, steps: int, shift: float = 1.0) -> float:
    """Distance from the exact answer x(0) = x(1) / e of the flow dx / d sigma = x."""
    dit = FakeDiT(lambda grid, *_: grid)
    settings = FeatureSettings(steps=steps, sampler=sampler, guidance_scale=1.0, shift=shift)
    return (run(dit, settings) - noise() / math.e).abs().max().item()


@pytest.mark.parametrize(("sampler", "order"), [("euler", 1), ("heun", 2), ("ab2", 2)])
@pytest.mark.parametrize("shift", [1.0, 2.0])
def test_samplers_converge_with_their_order(sampler: str, order: int, shift: float) -> None:
    ratio = error_of(sampler, 80, shift) / error_of(sampler, 160, shift)
    assert math.log2(ratio) == pytest.approx(order, abs=0.1)


def test_second_order_samplers_are_closer_at_the_same_steps() -> None:
    assert max(error_of("heun", 20), error_of("ab2", 20)) < error_of("euler", 20) / 5


def test_adams_bashforth_minds_uneven_steps() -> None:
    """A velocity linear in sigma is followed exactly, but for the first step, which is Euler's."""
    sigmas = sigma_schedule(9, shift=4.0).double()
    call = iter(sigmas)
    dit = FakeDiT(lambda grid, *_: torch.zeros_like(grid) + next(call))
    settings = FeatureSettings(steps=9, sampler="ab2", guidance_scale=1.0, shift=4.0)
    first_step = (sigmas[1] - sigmas[0]) ** 2 / 2
    torch.testing.assert_close(run(dit, settings), noise() - 0.5 - first_step, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("sampler", "calls"), [("euler", 10), ("heun", 19), ("ab2", 10)])
def test_calls_of_the_network(sampler: str, calls: int) -> None:
    dit = FakeDiT(lambda grid, *_: grid)
    run(dit, FeatureSettings(steps=10, sampler=sampler))
    assert len(dit.batches) == calls
    assert dit.contexts == 1


def test_the_network_is_fed_whole_timesteps_once_each() -> None:
    dit = FakeDiT(lambda grid, *_: grid)
    run(dit, FeatureSettings(steps=3))
    assert dit.timesteps == [1000, 666, 333]


# Guidance


def test_guidance_moves_from_the_zero_velocity_past_the_prompt() -> None:
    dit = FakeDiT(lambda grid, _, mean: torch.zeros_like(grid) + 0.5 + mean)
    guided = run(dit, FeatureSettings(steps=1, guidance_scale=3.0))
    # velocity: 0.5 without, 1.5 with the prompt -> 0.5 + 3 x 1
    torch.testing.assert_close(guided, noise() - 3.5)


def test_both_branches_run_in_one_call() -> None:
    dit = FakeDiT(lambda grid, *_: grid)
    run(dit, FeatureSettings(steps=4, guidance_scale=2.0))
    assert dit.batches == [2 * SHAPE[0]] * 4


def test_guidance_of_one_skips_the_negative_pass() -> None:
    dit = FakeDiT(lambda grid, _, mean: torch.zeros_like(grid) + mean)
    plain = run(dit, FeatureSettings(steps=4, guidance_scale=1.0), negative_conditioning=conditioning(9.0))
    assert dit.batches == [SHAPE[0]] * 4
    torch.testing.assert_close(plain, noise() - 1.0)


def test_guidance_acts_from_the_first_step_whatever_the_shift() -> None:
    for shift in (0.2, 0.3, 1.7, 3.0, 7.0):
        dit = FakeDiT(lambda grid, *_: grid)
        run(dit, FeatureSettings(steps=6, shift=shift))
        assert dit.batches == [2 * SHAPE[0]] * 6, shift


@pytest.mark.parametrize("sampler", FEATURE_SAMPLERS)
def test_guidance_acts_inside_its_interval_only(sampler: str) -> None:
    dit = FakeDiT(lambda grid, *_: grid)
    run(dit, FeatureSettings(steps=10, sampler=sampler, guidance_interval=(0.35, 0.75)))
    sizes = dict(zip(dit.timesteps, dit.batches, strict=True))
    guided = {timestep for timestep, size in sizes.items() if size == 2 * SHAPE[0]}
    assert guided == {timestep for timestep in sizes if 350 <= timestep <= 750}
    assert len(guided) == 4


def test_a_negative_prompt_replaces_the_zeros() -> None:
    dit = FakeDiT(lambda grid, _, mean: torch.zeros_like(grid) + mean)
    settings = FeatureSettings(steps=1, guidance_scale=3.0)
    for negative in (conditioning(0.4), conditioning(0.4)[:1]):
        guided = run(dit, settings, negative_conditioning=negative)
        torch.testing.assert_close(guided, noise() - (0.4 + 3 * 0.6))


def real_run(settings: FeatureSettings, rows: slice = slice(None), **options: object) -> Tensor:
    generator = torch.Generator().manual_seed(8)
    prompts = torch.randn(3, 7, 32, generator=generator)
    start = torch.randn(3, 16, 4, 4, generator=generator)
    return sample_features(
        tiny_models.build_dit(), prompts[rows], noise=start[rows], settings=settings, **options
    )


@pytest.mark.parametrize("sampler", FEATURE_SAMPLERS)
def test_no_negative_prompt_equals_a_negative_conditioning_of_zeros(sampler: str) -> None:
    settings = FeatureSettings(steps=4, sampler=sampler)
    zeros = real_run(settings, negative_conditioning=torch.zeros(1, 7, 32))
    torch.testing.assert_close(real_run(settings), zeros, rtol=1e-4, atol=1e-5)
    other = real_run(settings, negative_conditioning=torch.ones(1, 7, 32))
    assert (other - zeros).abs().max() > 1e-2


@pytest.mark.parametrize("sampler", FEATURE_SAMPLERS)
def test_a_batch_equals_its_items_alone(sampler: str) -> None:
    settings = FeatureSettings(steps=4, sampler=sampler)
    batch = real_run(settings)
    for row in range(3):
        alone = real_run(settings, slice(row, row + 1))
        torch.testing.assert_close(batch[row : row + 1], alone, rtol=1e-4, atol=1e-5)


# Starts, masks, callbacks


def start_features() -> Tensor:
    return torch.randn(
        SHAPE[0], 16, SHAPE[1], generator=torch.Generator().manual_seed(4), dtype=torch.float64
    )


@pytest.mark.parametrize("sampler", FEATURE_SAMPLERS)
def test_strength_of_one_is_a_run_from_noise(sampler: str) -> None:
    settings = FeatureSettings(steps=5, sampler=sampler)
    dit = FakeDiT(lambda grid, *_: grid.square())
    assert torch.equal(run(dit, settings, start_features=start_features(), strength=1.0), run(dit, settings))


@pytest.mark.parametrize("strength", [0.0, 0.05])
def test_strength_of_nearly_nothing_returns_the_start(strength: float) -> None:
    dit = FakeDiT(lambda grid, *_: grid)
    kept = run(dit, FeatureSettings(steps=5), start_features=start_features(), strength=strength)
    assert torch.equal(to_tokens(kept), start_features())
    assert dit.batches == []


def test_strength_between_runs_the_last_steps_from_the_mixture() -> None:
    dit = FakeDiT(lambda grid, *_: torch.zeros_like(grid))
    kept = run(dit, FeatureSettings(steps=10), start_features=start_features(), strength=0.4)
    assert dit.timesteps == [400, 300, 200, 100]
    mixture = mix(to_grid(start_features(), SHAPE[2:]), noise(), sigma_schedule(10)[6:7])
    torch.testing.assert_close(kept, mixture)


def test_one_start_serves_a_batch() -> None:
    dit = FakeDiT(lambda grid, *_: grid)
    one = run(dit, FeatureSettings(steps=4), start_features=start_features()[:1], strength=0.5)
    both = run(
        dit, FeatureSettings(steps=4), start_features=start_features()[:1].expand(2, -1, -1), strength=0.5
    )
    assert torch.equal(one, both)


@pytest.mark.parametrize("sampler", FEATURE_SAMPLERS)
def test_a_mask_keeps_what_it_covers(sampler: str) -> None:
    mask = torch.zeros(1, 4, 4)
    mask[:, :2] = 1
    dit = FakeDiT(lambda grid, *_: grid - 3)
    settings = FeatureSettings(steps=6, sampler=sampler)
    result = run(dit, settings, start_features=start_features(), mask=mask)
    start = to_grid(start_features(), SHAPE[2:])
    assert torch.equal(result[:, :, 2:], start[:, :, 2:])
    assert (result[:, :, :2] - start[:, :, :2]).abs().min() > 0
    whole = run(dit, settings, start_features=start_features(), mask=torch.ones(1, 4, 4))
    torch.testing.assert_close(whole, run(dit, settings))
    torch.testing.assert_close(result[:, :, :2], whole[:, :, :2])  # this velocity does not look across cells


def test_what_a_mask_covers_is_as_noisy_as_the_rest_at_every_step() -> None:
    seen: list[Tensor] = []

    def velocity(grid: Tensor, *_: Tensor) -> Tensor:
        seen.append(grid[: SHAPE[0]])
        return grid - 3

    run(
        FakeDiT(velocity),
        FeatureSettings(steps=5),
        start_features=start_features(),
        mask=torch.zeros(1, 4, 4),
    )
    start = to_grid(start_features(), SHAPE[2:])
    assert len(seen) == 5
    for grid, sigma in zip(seen, sigma_schedule(5), strict=False):
        torch.testing.assert_close(grid, mix(start, noise(), sigma[None]))


@pytest.mark.parametrize("sampler", FEATURE_SAMPLERS)
def test_each_step_reports_the_predicted_features(sampler: str) -> None:
    target = torch.full(SHAPE, 0.7, dtype=torch.float64)
    dit = FakeDiT(lambda grid, *_: (noise() - target).repeat(grid.shape[0] // SHAPE[0], 1, 1, 1))
    seen: list[tuple[int, int]] = []

    def on_step(step: int, total: int, predicted: Tensor) -> None:
        seen.append((step, total))
        torch.testing.assert_close(predicted, to_tokens(target), rtol=1e-6, atol=1e-6)

    run(dit, FeatureSettings(steps=4, sampler=sampler), on_step=on_step)
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


@pytest.mark.parametrize("sampler", FEATURE_SAMPLERS)
def test_an_error_in_the_callback_stops_the_run(sampler: str) -> None:
    def on_step(step: int, *_: object) -> None:
        if step == 2:
            raise KeyboardInterrupt

    dit = FakeDiT(lambda grid, *_: grid)
    with pytest.raises(KeyboardInterrupt):
        run(dit, FeatureSettings(steps=9, sampler=sampler), on_step=on_step)
    assert len(dit.batches) <= 4


def test_tokens_and_grid_are_row_major() -> None:
    grid = torch.arange(12.0).view(1, 2, 2, 3)
    tokens = to_tokens(grid)
    assert tokens[0, 4].tolist() == [grid[0, 0, 1, 1].item(), grid[0, 1, 1, 1].item()]
    assert torch.equal(to_grid(tokens, (2, 3)), grid)


# Refusals


@pytest.mark.parametrize(
    ("fields", "fragment"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"steps": 1001}, "steps is 1001"),
        ({"guidance_scale": -1.0}, "guidance_scale is -1"),
        ({"guidance_scale": float("nan")}, "guidance_scale is nan"),
        ({"shift": 0.0}, "shift is 0"),
        ({"sampler": "dpm"}, '"dpm"; choose one of euler'),
        ({"guidance_interval": (0.8, 0.2)}, "guidance_interval is 0.8 to 0.2"),
    ],
)
def test_impossible_settings_are_refused(fields: dict[str, object], fragment: str) -> None:
    with pytest.raises(BadInputError, match=fragment):
        FeatureSettings(**fields)


def test_features_of_another_model_are_refused() -> None:
    dit = FakeDiT(lambda grid, *_: grid)
    with pytest.raises(BadInputError, match="do not fit this model"):
        run(dit, FeatureSettings(steps=2), start_features=torch.zeros(2, 64, 3), strength=0.5)


def test_a_strength_beyond_one_is_refused() -> None:
    dit = FakeDiT(lambda grid, *_: grid)
    with pytest.raises(BadInputError, match="strength is 1.5"):
        run(dit, FeatureSettings(steps=2), start_features=start_features(), strength=1.5)
