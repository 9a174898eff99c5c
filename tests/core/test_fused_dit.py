"""The rearranged DiT of a sampling run against the network it was made of."""

from dataclasses import replace

import pytest
import tiny_models
import torch
from comfyui_blip3o.blip3o_core.drawing.sampling import FeatureSettings, sample_features
from comfyui_blip3o.blip3o_core.models.nextdit import NextDiT
from comfyui_blip3o.blip3o_core.performance import fused_dit, linear
from comfyui_blip3o.blip3o_core.performance.fused_dit import FusedDiT, PreparedRuns, can_fuse
from torch import Tensor

GRID = (4, 4)
TIMESTEPS = torch.tensor([1000.0, 640.0, 33.0])


def inputs(dit: NextDiT, batch: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    conditioning = torch.randn(batch, 7, dit.config.conditioning_dim, generator=generator)
    return conditioning, torch.randn(batch, dit.config.in_channels, *GRID, generator=generator)


@torch.no_grad()
def velocities(dit: NextDiT, batch: int = 2) -> tuple[Tensor, Tensor]:
    """Of the rearranged and of the plain network at all noise levels, with a zero branch."""
    conditioning, grid = inputs(dit, batch)
    grid = grid.repeat(2, 1, 1, 1)
    fused = FusedDiT(dit, TIMESTEPS, GRID)
    run = fused.encode_context(conditioning, zero_rows=batch)
    context = dit.encode_context(conditioning, zero_rows=batch)
    ours = [fused(grid, index, run) for index in range(len(TIMESTEPS))]
    plain = [dit(grid, timestep.expand(2 * batch), context=context) for timestep in TIMESTEPS]
    return torch.stack(ours), torch.stack(plain)


@pytest.mark.parametrize("variant", tiny_models.VARIANTS)
def test_velocities_are_those_of_the_plain_network(variant: str) -> None:
    ours, plain = velocities(tiny_models.build_dit(tiny_models.VARIANTS[variant]))
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)
    assert (plain[0] - plain[1]).abs().max() > 1e-2


@pytest.mark.parametrize("devices", [(), ("cpu",)])
def test_joined_projections_give_the_same(devices: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "JOINING_DEVICES", devices)
    ours, plain = velocities(tiny_models.build_dit())
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)


def test_modulations_are_made_for_a_few_noise_levels_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_dit, "MODULATION_BYTES", 1)
    ours, plain = velocities(tiny_models.build_dit())
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)


def test_half_precision_stays_close() -> None:
    dit = tiny_models.build_dit().to(torch.bfloat16)
    conditioning, grid = inputs(dit)
    with torch.no_grad():
        fused = FusedDiT(dit, TIMESTEPS, GRID)
        ours = fused(grid.bfloat16(), 1, fused.encode_context(conditioning.bfloat16()))
        plain = dit(grid.bfloat16(), TIMESTEPS[1].expand(2), conditioning.bfloat16())
    similarity = torch.nn.functional.cosine_similarity(ours.float().flatten(), plain.float().flatten(), dim=0)
    assert similarity > 0.9995


@pytest.mark.parametrize(
    "settings",
    [
        FeatureSettings(steps=6),
        FeatureSettings(steps=5, sampler="heun"),
        FeatureSettings(steps=5, guidance_interval=(0.3, 0.7)),
        FeatureSettings(steps=4, guidance_scale=1),
    ],
    ids=str,
)
@pytest.mark.parametrize("has_negative", [False, True])
def test_a_whole_run_equals_the_plain_one(settings: FeatureSettings, has_negative: bool) -> None:
    dit = tiny_models.build_dit()
    conditioning, noise = inputs(dit)
    negative = conditioning.flip(0) if has_negative else None
    run = dict(noise=noise, settings=settings, negative_conditioning=negative)
    ours = sample_features(dit, conditioning, **run, prepare=PreparedRuns())
    plain = sample_features(dit, conditioning, **run)
    torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4)
    more_steps = replace(settings, steps=settings.steps + 1)
    other = sample_features(dit, conditioning, **(run | {"settings": more_steps}))
    assert (other - plain).abs().max() > 1e-2


def test_changed_weights_count_in_the_next_run() -> None:
    dit = tiny_models.build_dit()
    conditioning, noise = inputs(dit)
    settings = FeatureSettings(steps=2)
    run = {"noise": noise, "settings": settings, "prepare": PreparedRuns()}
    before = sample_features(dit, conditioning, **run)
    dit.layers[0].attn1.to_v.weight.mul_(2)
    changed = sample_features(dit, conditioning, **run)
    assert (changed - before).abs().max() > 1e-3


def test_wrapped_layers_are_called() -> None:
    class Wrapped(torch.nn.Linear):
        def forward(self, hidden_states: Tensor) -> Tensor:
            return super().forward(hidden_states) + 1

    dit = tiny_models.build_dit()
    conditioning, noise = inputs(dit)
    with torch.no_grad():
        assert can_fuse(dit)
    assert not can_fuse(dit)  # with gradients
    run = {"noise": noise, "prepare": PreparedRuns()}
    plain = sample_features(dit, conditioning, **run)
    dit.layers[1].feed_forward.linear_2.__class__ = Wrapped
    with torch.no_grad():
        assert not can_fuse(dit)
    assert (sample_features(dit, conditioning, **run) - plain).abs().max() > 1e-2


def test_hooks_are_called() -> None:
    dit = tiny_models.build_dit()
    calls: list[str] = []
    dit.layers[0].attn1.to_q.register_forward_hook(lambda *unused: calls.append("hook"))
    conditioning, noise = inputs(dit)
    settings = FeatureSettings(steps=3)
    sample_features(dit, conditioning, noise=noise, settings=settings, prepare=PreparedRuns())
    assert len(calls) == 3
