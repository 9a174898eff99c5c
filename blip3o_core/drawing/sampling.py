"""The flow from noise to image features: samplers, guidance, and where a run starts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from einops import rearrange
from torch import Tensor

from ..errors import BadInputError, check_choice, check_interval, check_range
from ..models.nextdit import NextDiT
from .flow import mix, sigma_schedule, skipped_steps, whole_timesteps

# A DiT made ready for a sampling run: (dit, timesteps of all noise levels (T,), (rows, columns) of the grid) -> PreparedRun.
PrepareRun = Callable[[NextDiT, Tensor, Sequence[int]], "PreparedRun"]
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


class PreparedRun(Protocol):
    """A velocity network for one run; what depends on the conditioning alone is computed by encode_context."""

    def encode_context(self, conditioning: Tensor, *, zero_rows: int = 0) -> Any:
        """See NextDiT.encode_context."""

    def __call__(self, feature_grid: Tensor, index: int, context: Any) -> Tensor:
        """Velocity (B, channels, H, W) of noisy features (B, channels, H, W) at the index-th noise level."""


@dataclass(frozen=True)
class FeatureStart:
    """Image features that a run starts from instead of pure noise.

    Attributes:
        features: (B or 1, N, channels).
        strength: 1 = start from pure noise, 0 = return the features.
        mask: 1 = draw again, 0 = keep the features, (B or 1, H, W); None = draw all.
    """

    features: Tensor
    strength: float = 1.0
    mask: Tensor | None = None

    def __post_init__(self) -> None:
        check_range("strength", self.strength, 0, 1)


class CachedDiT:
    """A DiT of any layers (adapters, offloaded ones) for one run: only the context is computed once."""

    def __init__(self, dit: NextDiT, timesteps: Tensor, grid_size: Sequence[int]) -> None:
        self.dit = dit
        self.timesteps = timesteps
        self.encode_context = dit.encode_context

    def __call__(self, feature_grid: Tensor, index: int, context: Any) -> Tensor:
        timestep = self.timesteps[index].expand(feature_grid.shape[0])
        return self.dit(feature_grid, timestep, context=context)


@torch.no_grad()
def sample_features(
    dit: NextDiT,
    conditioning: Tensor,
    *,
    noise: Tensor,
    settings: FeatureSettings | None = None,
    negative_conditioning: Tensor | None = None,
    start: FeatureStart | None = None,
    on_step: StepCallback | None = None,
    prepare: PrepareRun = CachedDiT,
) -> Tensor:
    """Carry noise to image features along the learned flow.

    Everything that depends on the conditioning alone is computed once; both guidance branches run in one network call.

    Args:
        conditioning: backbone states at the latent queries, (B, L, C).
        noise: standard normal, (B, channels, H, W); float32 keeps the sums exact in a half-precision network.
        negative_conditioning: (B or 1, L, C); None = all zeros as published, which needs no cross attention.
        start: None = pure noise.
        on_step: called as on_step(step, total, predicted image features (B, N, channels)), step from 1;
            raise in it to stop.
        prepare: how the network is made ready for the run.

    Returns:
        Image features, (B, N, channels), in noise's dtype.

    Source: BLIP3o@4689ec3 blip3o_qwen_inference.py, sample_images.
    """
    settings = settings or FeatureSettings()
    sigmas = sigma_schedule(settings.steps, settings.shift)
    grid_size = noise.shape[-2:]
    grid, start_grid, mask = noise, noise, None
    if start is not None:
        start_grid = to_grid(start.features, grid_size).to(noise)
        sigmas = sigmas[skipped_steps(settings.steps, start.strength) :]
        if len(sigmas) == 1:
            return to_tokens(start_grid.expand_as(noise))
        grid = mix(start_grid, noise, sigmas[:1])
        mask = None if start.mask is None else start.mask[:, None].to(noise)
    total = len(sigmas) - 1
    velocity = guided_velocity(
        prepare(dit, whole_timesteps(sigmas).to(noise.device), grid_size),
        conditioning,
        negative_conditioning,
        sigmas,
        settings,
    )
    integrate = {"euler": _euler, "heun": _heun, "ab2": _adams_bashforth}[settings.sampler]

    def after_step(grid: Tensor, step: int, predicted: Tensor) -> Tensor:
        if mask is not None:
            grid = mask * grid + (1 - mask) * mix(start_grid, noise, sigmas[step : step + 1])
        if on_step is not None:
            on_step(step, total, to_tokens(predicted))
        return grid

    return to_tokens(integrate(grid, sigmas.tolist(), velocity, after_step))


def guided_velocity(
    network: PreparedRun,
    conditioning: Tensor,
    negative_conditioning: Tensor | None,
    sigmas: Tensor,
    settings: FeatureSettings,
) -> VelocityFunction:
    """The velocity at the n-th noise level, with guidance where it acts: one batched network call, no host sync."""
    batch, dtype = len(conditioning), conditioning.dtype
    low, high = settings.guidance_interval
    is_guided = [settings.guidance_scale != 1 and low <= sigma <= high for sigma in sigmas.tolist()]
    guided = plain = None
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


def to_tokens(grid: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H x W, C), row major."""
    return rearrange(grid, "b c h w -> b (h w) c")


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
    return rearrange(image_features, "b (h w) c -> b c h w", h=height, w=width)


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
