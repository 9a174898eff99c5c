"""Image features to pictures through the diffusion decoder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..config import pixels_per_latent
from ..errors import SettingError, check_choice, check_interval, check_range
from .flow import skipped_steps

if TYPE_CHECKING:  # diffusers is imported only when the decoder is loaded
    from ..models.decoder import Decoder

PIXEL_SAMPLERS = ("euler", "dpmpp_2m")
# Pixels along one side of a picture: no card paints more, and a slip of the finger is told before anything is computed.
LARGEST_SIDE = 16384
PixelCallback = Callable[[int, int, Tensor], None]


@dataclass(frozen=True)
class PixelSettings:
    """How pictures are decoded; the defaults are the published ones.

    Attributes:
        steps: 50 as published with "euler"; 14 to 25 with "dpmpp_2m".
        guidance_scale: 1 = off and half the work; 3 as published.
        sampler: "euler" (published) or "dpmpp_2m".
        width, height: pixels, multiples of 8; None = the size the UNet was trained at (1024 for 8B and 4B).
            Other sizes are experimental.
        guidance_interval: (low, high) part of the run in which guidance acts, 1 = start, 0 = end.
        tiled: decode the latents in tiles, for large pictures on small cards.
    """

    steps: int = 50
    guidance_scale: float = 3.0
    sampler: str = "euler"
    width: int | None = None
    height: int | None = None
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    tiled: bool = False

    def __post_init__(self) -> None:
        check_range("steps", self.steps, 1, 1000)
        check_range("guidance_scale", self.guidance_scale, 0, 100)
        check_choice("sampler", self.sampler, PIXEL_SAMPLERS)
        check_interval(self.guidance_interval)
        for name in ("width", "height"):
            if getattr(self, name) is not None:
                check_range(name, getattr(self, name), 1, LARGEST_SIDE)


@dataclass(frozen=True)
class PixelStart:
    """A picture that decoding starts from instead of pure noise.

    Attributes:
        latents: of pictures, (B or 1, 4, H/8, W/8).
        strength: 1 = start from pure noise, 0 = keep the picture.
    """

    latents: Tensor
    strength: float = 1.0

    def __post_init__(self) -> None:
        check_range("strength", self.strength, 0, 1)


def picture_size(unet: Mapping[str, Any], vae: Mapping[str, Any], settings: PixelSettings) -> tuple[int, int]:
    """(height, width) in pixels.

    Args:
        unet, vae: configurations of the decoder's networks.

    Raises:
        SettingError: not a multiple of 8 (or of what this decoder's levels need).
    """
    factor = pixels_per_latent(vae)
    return drawable_size(settings.height, settings.width, unet["sample_size"] * factor, factor)


def drawable_size(height: int | None, width: int | None, native: int, factor: int) -> tuple[int, int]:
    """(height, width) in pixels; none or 0 stands for `native`, the side that the decoder was trained at.

    Raises:
        SettingError: not a multiple of `factor`.
    """
    height, width = height or native, width or native
    for name, value in (("width", width), ("height", height)):
        if value < factor or value % factor:
            lower = max(factor, value // factor * factor)
            raise SettingError(
                name,
                f"is {value}; this decoder draws multiples of {factor} pixels. Use {lower} or {lower + factor}.",
            )
    return height, width


@torch.no_grad()
def decode_features(
    decoder: Decoder,
    image_features: Tensor,
    *,
    noise: Tensor,
    settings: PixelSettings | None = None,
    negative_features: Tensor | None = None,
    start: PixelStart | None = None,
    on_step: PixelCallback | None = None,
    before_step: Callable[[], None] | None = None,
) -> Tensor:
    """Draw pictures from image features.

    Args:
        image_features: (B, N, channels).
        noise: standard normal latents, (B, 4, H/8, W/8), before the schedule's scaling.
        negative_features: guidance away from these, (B or 1, N, channels); None = all zeros.
        start: None = pure noise.
        on_step: called as on_step(step, total, latents of the predicted clean picture), step from 1; raise to stop.
        before_step: called before each call of the UNet.

    Returns:
        Pictures (B, 3, H, W), float32 in [0, 1].

    Source: BLIP3o@4689ec3, the decoder's pipeline; section numbers in the tests.
    """
    latents = denoise_latents(
        decoder,
        image_features,
        noise=noise,
        settings=settings,
        negative_features=negative_features,
        start=start,
        on_step=on_step,
        before_step=before_step,
    )
    # One picture at a time: the VAE's activations at 1024 pixels dwarf its weights.
    tiled = settings.tiled if settings else False
    return torch.cat([decoder.decode_latents(item[None], tiled=tiled) for item in latents])


@torch.no_grad()
def denoise_latents(
    decoder: Decoder,
    image_features: Tensor,
    *,
    noise: Tensor,
    settings: PixelSettings | None = None,
    negative_features: Tensor | None = None,
    start: PixelStart | None = None,
    on_step: PixelCallback | None = None,
    before_step: Callable[[], None] | None = None,
) -> Tensor:
    """The diffusion loop of decode_features: scaled latents (B, 4, H/8, W/8), in noise's dtype."""
    settings = settings or PixelSettings()
    dtype = decoder.unet.dtype
    height, width = (side * decoder.vae_scale for side in noise.shape[-2:])
    scheduler = decoder.scheduler(settings.sampler)
    scheduler.set_timesteps(settings.steps)  # stays on the CPU: reading its tables never waits for the device
    timesteps = scheduler.timesteps
    latents = noise * scheduler.init_noise_sigma
    if start is not None:
        skipped = skipped_steps(settings.steps, start.strength)
        start_latents = start.latents.to(noise).expand_as(noise)
        if skipped == settings.steps:
            return start_latents
        timesteps = timesteps[skipped:]
        scheduler.set_begin_index(skipped)
        latents = scheduler.add_noise(start_latents, noise, timesteps[:1])
    features = image_features.to(dtype)
    plain = decoder.condition(features, height, width)
    negative = torch.zeros_like(features) if negative_features is None else negative_features.to(features)
    both = decoder.condition(torch.cat([negative.expand_as(features), features]), height, width)
    low, high = settings.guidance_interval
    total = len(timesteps)
    # The UNet's own: read from the CPU, each would wait for the device and keep a compiled UNet from being recorded.
    device_timesteps = timesteps.to(noise.device)
    for step, timestep in enumerate(timesteps):
        position = 1 - step / total
        is_guided = settings.guidance_scale != 1 and low <= position <= high
        inputs = scheduler.scale_model_input(latents, timestep).to(dtype)
        if before_step is not None:
            before_step()
        if is_guided:
            output = decoder.unet(inputs.repeat(2, 1, 1, 1), device_timesteps[step], **both).sample
            away, toward = output.to(latents.dtype).chunk(2)
            output = away + settings.guidance_scale * (toward - away)
        else:
            # A copy: a recorded graph writes each result over the one before, and some samplers look back.
            output = decoder.unet(inputs, device_timesteps[step], **plain).sample.to(latents.dtype, copy=True)
        index = scheduler.step_index if scheduler.step_index is not None else scheduler.begin_index or 0
        sigma = scheduler.sigmas[index]
        before = latents
        latents = scheduler.step(output, timestep, latents, return_dict=False)[0]
        if on_step is not None:
            on_step(step + 1, total, clean_latents(scheduler, before, output, sigma, settings.sampler))
    return latents


def clean_latents(scheduler: Any, latents: Tensor, output: Tensor, sigma: Tensor, sampler: str) -> Tensor:
    """The clean latents that a network output stands for, at a step's sigma (of the schedule, not in [0, 1])."""
    # Euler keeps latents at variance 1 + sigma^2; DPM++ keeps them at variance 1.
    scale = (1 + sigma**2).sqrt()
    scaled = latents if sampler == "euler" else latents * scale
    if scheduler.config.prediction_type == "v_prediction":
        return scaled / scale**2 - output * sigma / scale
    return scaled - sigma * output
