"""The flow from noise to image features: samplers, guidance, and where a run starts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import BadInputError
from ..models.nextdit import DiTContext, NextDiT
from ..performance.fused_dit import FusedDiT, RunContext, can_fuse
from .flow import mix, sigma_schedule, whole_timesteps

FEATURE_SAMPLERS = ("euler", "heun", "ab2")
StepCallback = Callable[[int, int, Tensor], None]
# velocity(grid (B, C, H, W), index of the noise level) -> (B, C, H, W)
VelocityFunction = Callable[[Tensor, int], Tensor]


@dataclass(frozen=True)
class FeatureSettings:
    """How image features are sampled; the defaults are the published ones.

    Attributes:
        steps: noise levels visited, 1 to 1000.
        guidance_scale: 1 = off and half the work; 3 as published.
        sampler: "euler" (published), "heun" (second order, two network calls a step) or "ab2" (second order
            Adams-Bashforth, one call a step).
        shift: above 1 spends more steps at high noise.
        guidance_interval: (low, high) sigmas between which guidance acts.
    """

    steps: int = 30
    guidance_scale: float = 3.0
    sampler: str = "euler"
    shift: float = 1.0
    guidance_interval: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        check_range("steps", self.steps, 1, 1000)
        check_range("guidance_scale", self.guidance_scale, 0, 100)
        check_range("shift", self.shift, 0.01, 100)
        check_choice("sampler", self.sampler, FEATURE_SAMPLERS)
        check_interval(self.guidance_interval)


@torch.no_grad()
def sample_features(
    dit: NextDiT,
    conditioning: Tensor,
    *,
    noise: Tensor,
    settings: FeatureSettings | None = None,
    negative_conditioning: Tensor | None = None,
    start_features: Tensor | None = None,
    strength: float = 1.0,
    mask: Tensor | None = None,
    on_step: StepCallback | None = None,
) -> Tensor:
    """Carry noise to image features along the learned flow.

    Everything that depends on the conditioning alone is computed once; both guidance branches run in one network call.

    Args:
        conditioning: backbone states at the latent queries, (B, L, C).
        noise: standard normal, (B, channels, H, W); float32 keeps the sums exact in a half-precision network.
        negative_conditioning: (B or 1, L, C); None = all zeros as published, which needs no cross attention.
        start_features: image features to start from, (B or 1, N, channels).
        strength: 1 = start from pure noise, 0 = return start_features; only with start_features.
        mask: 1 = draw anew, 0 = keep start_features, (B or 1, H, W).
        on_step: called as on_step(step, total, predicted image features (B, N, channels)), step from 1;
            raise in it to stop.

    Returns:
        Image features, (B, N, channels), in noise's dtype.

    Source: BLIP3o@4689ec3 blip3o_qwen_inference.py, sample_images.
    """
    settings = settings or FeatureSettings()
    sigmas = sigma_schedule(settings.steps, settings.shift)
    grid_size = noise.shape[-2:]
    start_grid = None
    if start_features is not None:
        check_range("strength", strength, 0, 1)
        start_grid = to_grid(start_features, grid_size).to(noise)
        sigmas = sigmas[settings.steps - round(settings.steps * strength) :]
    if mask is not None:
        if start_grid is None:
            raise BadInputError(
                "A mask needs start features: it says which of them to keep.\nGive start features too."
            )
        mask = mask[:, None].to(noise)
    total = len(sigmas) - 1
    if total == 0:
        return to_tokens(start_grid.expand_as(noise))
    grid = noise if start_grid is None else mix(start_grid, noise, sigmas[:1])
    velocity = guided_velocity(dit, conditioning, negative_conditioning, sigmas, settings, noise)
    integrate = {"euler": _euler, "heun": _heun, "ab2": _adams_bashforth}[settings.sampler]

    def after_step(grid: Tensor, step: int, predicted: Tensor) -> Tensor:
        if mask is not None:
            grid = mask * grid + (1 - mask) * mix(start_grid, noise, sigmas[step : step + 1])
        if on_step is not None:
            on_step(step, total, to_tokens(predicted))
        return grid

    return to_tokens(integrate(grid, sigmas.tolist(), velocity, after_step))


def guided_velocity(
    dit: NextDiT,
    conditioning: Tensor,
    negative_conditioning: Tensor | None,
    sigmas: Tensor,
    settings: FeatureSettings,
    noise: Tensor,
) -> VelocityFunction:
    """The velocity at the n-th noise level, with guidance where it acts: one batched network call, no host sync."""
    batch = noise.shape[0]
    dtype = conditioning.dtype
    timesteps = whole_timesteps(sigmas).to(noise.device)
    low, high = settings.guidance_interval
    is_guided = [settings.guidance_scale != 1 and low <= sigma <= high for sigma in sigmas.tolist()]
    network = FusedDiT(dit, timesteps, noise.shape[-2:]) if can_fuse(dit) else CachedDiT(dit, timesteps)
    guided: DiTContext | RunContext | None = None
    plain: DiTContext | RunContext | None = None
    if any(is_guided[:-1]):
        if negative_conditioning is None:
            guided = network.encode_context(conditioning, zero_rows=batch)
        else:
            negative = negative_conditioning.to(conditioning).expand_as(conditioning)
            guided = network.encode_context(torch.cat([conditioning, negative]))
    if not all(is_guided[:-1]):
        plain = network.encode_context(conditioning)

    def velocity(grid: Tensor, index: int) -> Tensor:
        if not is_guided[index]:
            return network(grid.to(dtype), index, plain).to(grid.dtype)
        both = network(grid.to(dtype).repeat(2, 1, 1, 1), index, guided)
        positive, negative = both.to(grid.dtype).chunk(2)
        return negative + settings.guidance_scale * (positive - negative)

    return velocity


class CachedDiT:
    """A DiT of any layers (adapters, offloaded ones) for one run: only the context is computed once."""

    def __init__(self, dit: NextDiT, timesteps: Tensor) -> None:
        self.dit = dit
        self.timesteps = timesteps
        self.encode_context = dit.encode_context

    def __call__(self, feature_grid: Tensor, index: int, context: DiTContext) -> Tensor:
        timestep = self.timesteps[index].expand(feature_grid.shape[0])
        return self.dit(feature_grid, timestep, context=context)


def to_tokens(grid: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H x W, C), row major."""
    return grid.flatten(2).transpose(1, 2)


def to_grid(image_features: Tensor, size: Sequence[int]) -> Tensor:
    """(B, H x W, C) -> (B, C, H, W).

    Raises:
        BadInputError: the number of features is not H x W.
    """
    height, width = size
    if image_features.ndim != 3 or image_features.shape[1] != height * width:
        raise BadInputError(
            f"These image features do not fit this model: {tuple(image_features.shape)}, expected (count, {height * width}, channels).\n"
            "Use features made with the same checkpoint."
        )
    return image_features.transpose(1, 2).unflatten(2, (height, width))


def check_range(name: str, value: float, low: float, high: float) -> None:
    """Raise BadInputError unless low <= value <= high."""
    if not low <= value <= high:
        raise BadInputError(f"{name} is {value}; it must lie between {low} and {high}.")


def check_interval(interval: tuple[float, float]) -> None:
    """Raise BadInputError unless 0 <= low <= high <= 1."""
    low, high = interval
    if not 0 <= low <= high <= 1:
        raise BadInputError(f"guidance_interval is {low} to {high}; use 0 <= low <= high <= 1.")


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Raise BadInputError unless value is one of the choices."""
    if value not in choices:
        raise BadInputError(f'{name} is "{value}"; choose one of {", ".join(choices)}.')


AfterStep = Callable[[Tensor, int, Tensor], Tensor]


def _euler(grid: Tensor, sigmas: list[float], velocity: VelocityFunction, after_step: AfterStep) -> Tensor:
    for i, (sigma, following) in enumerate(zip(sigmas[:-1], sigmas[1:], strict=True)):
        slope = velocity(grid, i)
        predicted = grid - sigma * slope
        grid = after_step(grid + (following - sigma) * slope, i + 1, predicted)
    return grid


def _heun(grid: Tensor, sigmas: list[float], velocity: VelocityFunction, after_step: AfterStep) -> Tensor:
    """Trapezoid rule; the last step, to sigma 0 where the network was never trained, is Euler's."""
    for i, (sigma, following) in enumerate(zip(sigmas[:-1], sigmas[1:], strict=True)):
        slope = velocity(grid, i)
        predicted = grid - sigma * slope
        if following > 0:
            slope = (slope + velocity(grid + (following - sigma) * slope, i + 1)) / 2
        grid = after_step(grid + (following - sigma) * slope, i + 1, predicted)
    return grid


def _adams_bashforth(
    grid: Tensor, sigmas: list[float], velocity: VelocityFunction, after_step: AfterStep
) -> Tensor:
    """Second order from the previous step's velocity; the first step is Euler's."""
    previous: Tensor | None = None
    previous_width = 0.0
    for i, (sigma, following) in enumerate(zip(sigmas[:-1], sigmas[1:], strict=True)):
        slope = velocity(grid, i)
        predicted = grid - sigma * slope
        width = following - sigma
        if previous is None:
            extrapolated = slope
        else:
            ratio = width / previous_width / 2
            extrapolated = (1 + ratio) * slope - ratio * previous
        grid = after_step(grid + width * extrapolated, i + 1, predicted)
        previous, previous_width = slope, width
    return grid
