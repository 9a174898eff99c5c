"""The stages of drawing on ComfyUI's samplers: prompt to conditioning, conditioning to image features, features to pictures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import comfy.model_patcher
import comfy.sample
import comfy.samplers
import comfy.sd
import comfy.utils
import torch
from torch import Tensor

from ...blip3o_core.config import PUBLISHED_CROP, PUBLISHED_ORIGINAL_SIZE
from ...blip3o_core.drawing.decoding import drawable_size
from ...blip3o_core.drawing.flow import sigma_schedule, skipped_steps
from ...blip3o_core.drawing.noise import seeded_noise
from ...blip3o_core.drawing.sampling import to_tokens
from ...blip3o_core.errors import BadInputError
from ...blip3o_core.images import to_pil
from ...blip3o_core.language.prompts import RECONSTRUCT_INSTRUCTION
from ...blip3o_core.pipeline import PUBLISHED_NEGATIVE_PROMPT
from ...blip3o_core.seeds import item_seeds
from . import host
from .decoder import FeatureDecoder
from .dit import FeatureFlow, check_conditioning
from .preview import RgbFactors
from .sockets import BackboneHandle

PUBLISHED = "published"
GRID_SIDE = 8
Patcher: TypeAlias = comfy.model_patcher.ModelPatcher
Conditioning: TypeAlias = list[list[Any]]


def encode_prompt(
    handle: BackboneHandle, prompt: str, negative_prompt: str, images: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Conditioning of the prompt, of what to guide away from, and of the decoder's blank prompt, each (1, L, C).

    Args:
        negative_prompt: empty = all zeros, as published.
        images: pictures inside the prompt (B, H, W, 3); with an empty prompt they are to be reconstructed.
    """
    pipeline = handle.pipeline
    pictures = [] if images is None else to_pil(images)
    if pictures and not prompt.strip():
        prompt = RECONSTRUCT_INSTRUCTION
    positive = host.to_intermediate(pipeline.encode_prompts(prompt, [pictures]))
    if negative_prompt.strip():
        negative = host.to_intermediate(pipeline.encode_prompts(negative_prompt))
    else:
        negative = torch.zeros_like(positive)
    blank = pipeline.encode_prompts(PUBLISHED_NEGATIVE_PROMPT, use_template=False)
    return positive, negative, host.to_intermediate(blank)


def require_dit(model: Patcher) -> FeatureFlow:
    """The DiT inside a MODEL.

    Raises:
        BadInputError: it is another model.
    """
    if not isinstance(model.model, FeatureFlow):
        raise BadInputError(
            'The model connected as dit is not BLIP3-o\'s DiT.\nConnect the output dit of "Load BLIP3-o".'
        )
    return model.model


def require_decoder(model: Patcher) -> FeatureDecoder:
    """The decoder's UNet inside a MODEL.

    Raises:
        BadInputError: it is another model.
    """
    if not isinstance(model.model, FeatureDecoder):
        raise BadInputError(
            "The model connected as decoder is not BLIP3-o's decoder.\n"
            'Connect the output decoder of "Load BLIP3-o"; an SDXL model cannot read image features.'
        )
    return model.model


def conditioning_tensor(conditioning: Conditioning, expected_width: int) -> Tensor:
    """The backbone states (P, L, C) of a CONDITIONING.

    Raises:
        BadInputError: it was made for another model, or holds several parts.
    """
    if len(conditioning) != 1:
        raise BadInputError(
            f"The conditioning has {len(conditioning)} parts; this node reads one.\n"
            'Connect "Encode Prompt (BLIP3-o)" directly, or sample with ComfyUI\'s own KSampler.'
        )
    check_conditioning(conditioning[0][0], expected_width)
    return conditioning[0][0]


def preview_of(model: Patcher) -> Callable[[Tensor], Tensor] | None:
    """Latents to a small picture, by the map that the model's latent format carries."""
    latent_format = model.model.latent_format
    if latent_format.latent_rgb_factors is None:
        return None
    bias = latent_format.latent_rgb_factors_bias or [0.0, 0.0, 0.0]
    return RgbFactors(latent_format.latent_rgb_factors, bias).picture


def run_sampler(
    model: Patcher,
    noise: Tensor,
    sigmas: Tensor,
    *,
    positive: Conditioning,
    negative: Conditioning,
    cfg: float,
    sampler: str,
    seed: int,
    start: Tensor | None = None,
    mask: Tensor | None = None,
    has_preview: bool = True,
) -> Tensor:
    """One run of ComfyUI's sampler with a live preview on the node; cancel stops it within a layer."""
    progress = host.StepProgress(len(sigmas) - 1, preview_of(model) if has_preview else None)
    return comfy.sample.sample_custom(
        model,
        noise,
        cfg,
        comfy.samplers.sampler_object(sampler),
        sigmas,
        positive,
        negative,
        torch.zeros_like(noise) if start is None else start,
        noise_mask=mask,
        callback=lambda step, predicted, _latents, _total: progress(step + 1, predicted),
        disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
        seed=seed,
    )


def run_dit(
    dit: Patcher,
    positive: Conditioning,
    negative: Conditioning,
    *,
    seed: int,
    steps: int,
    cfg: float,
    sampler: str = "euler",
    shift: float = 1.0,
    batch_size: int = 1,
    start_features: Tensor | None = None,
    strength: float = 1.0,
    mask: Tensor | None = None,
) -> Tensor:
    """Image features (prompts x batch_size, channels, 8, 8) of conditioning; all items of a prompt lie together."""
    config = require_dit(dit).diffusion_model.config
    wanted = conditioning_tensor(positive, config.conditioning_dim).repeat_interleave(batch_size, dim=0)
    unwanted = conditioning_tensor(negative, config.conditioning_dim).repeat_interleave(batch_size, dim=0)
    count = max(wanted.shape[0], 1 if start_features is None else start_features.shape[0])
    wanted = comfy.utils.repeat_to_batch_size(wanted, count)
    sigmas = sigma_schedule(steps, shift)
    if start_features is None:
        grid_size = (GRID_SIDE, GRID_SIDE)
        if mask is not None:
            raise BadInputError(
                "A mask needs start features: it says where to draw again and where to keep them.\n"
                'Connect start_features, for example from "Encode Image (BLIP3-o)".'
            )
    else:
        start_features = comfy.utils.repeat_to_batch_size(start_features, count)
        grid_size = tuple(start_features.shape[-2:])
        sigmas = sigmas[skipped_steps(steps, strength) :]
        if len(sigmas) == 1:
            return start_features
    if mask is not None:
        # Averaged, so that a small mark still counts; ComfyUI's own scaling would pick single points.
        mask = torch.nn.functional.adaptive_avg_pool2d(
            mask.reshape(-1, 1, *mask.shape[-2:]).float(), grid_size
        )[:, 0]
    noise = seeded_noise(item_seeds(seed, count), (config.in_channels, *grid_size))
    return run_sampler(
        dit,
        noise,
        sigmas,
        positive=[[wanted, {}]],
        negative=[[unwanted, {}]],
        cfg=cfg,
        sampler=sampler,
        seed=seed,
        start=start_features,
        mask=mask,
    )


def decoder_conditioning(
    features: Tensor, negative_features: Tensor | None, height: int, width: int
) -> tuple[Conditioning, Conditioning]:
    """What the decoder's UNet reads: the features as tokens, their mean, and the sizes, as published.

    Args:
        features: (B, channels, H, W).
        negative_features: the same to guide away from; None = all zeros.
        height, width: size of the picture, pixels.
    """
    names = ("height", "width", "crop_h", "crop_w", "target_height", "target_width")
    sizes = dict(zip(names, (*PUBLISHED_ORIGINAL_SIZE, *PUBLISHED_CROP, height, width), strict=True))

    def condition(grid: Tensor) -> Conditioning:
        tokens = to_tokens(grid)
        return [[tokens, {"pooled_output": tokens.mean(dim=1), **sizes}]]

    away = torch.zeros_like(features) if negative_features is None else negative_features
    return condition(features), condition(away)


def picture_size(decoder: FeatureDecoder, height: int, width: int) -> tuple[int, int]:
    """(height, width) in pixels, see drawable_size; 0 stands for the size the decoder was trained at."""
    return drawable_size(height, width, decoder.native_side, decoder.pixels_per_latent)


def published_sigmas(model: Patcher, steps: int) -> Tensor:
    """Noise levels of the published decoder: whole timesteps at equal distance, offset 1 ("leading"), then 0."""
    sampling = model.get_model_object("model_sampling")
    spacing = len(sampling.sigmas) // steps
    timesteps = torch.arange(steps).flip(0) * spacing + 1
    return torch.cat([sampling.sigmas[timesteps].float(), torch.zeros(1)])


def run_decoder(
    decoder: Patcher,
    vae: comfy.sd.VAE,
    features: Tensor,
    *,
    seed: int,
    steps: int,
    cfg: float,
    height: int = 0,
    width: int = 0,
    sampler: str = "euler",
    scheduler: str = PUBLISHED,
    negative_features: Tensor | None = None,
    start_images: Tensor | None = None,
    strength: float = 1.0,
    tiled: bool = False,
    has_preview: bool = True,
) -> Tensor:
    """Pictures (B, H, W, 3) in [0, 1] of image features (B, channels, h, w).

    Args:
        has_preview: off where the node shows a picture of its own in the end: the page keeps a live preview in its place.
    """
    network = require_decoder(decoder)
    height, width = picture_size(network, height, width)
    if scheduler == PUBLISHED:
        sigmas = published_sigmas(decoder, steps)
    else:
        sigmas = comfy.samplers.calculate_sigmas(decoder.get_model_object("model_sampling"), scheduler, steps)
    count = features.shape[0]
    factor = network.pixels_per_latent
    noise = seeded_noise(
        item_seeds(seed, count), (network.latent_format.latent_channels, height // factor, width // factor)
    )
    start = None
    if start_images is not None:
        if not start_images.isfinite().all():
            raise BadInputError(
                "The start image holds values that are not numbers (NaN or infinity).\n"
                "Look at the node that made it; black pictures from a half-precision VAE are a common cause."
            )
        resized = comfy.utils.common_upscale(
            start_images[..., :3].movedim(-1, 1), width, height, "bicubic", "center"
        )
        start = vae.encode(resized.movedim(1, -1).clamp(0, 1))
        start = comfy.utils.repeat_to_batch_size(start, count)
        sigmas = sigmas[skipped_steps(len(sigmas) - 1, strength) :]
    elif scheduler == PUBLISHED:
        # The published schedule starts below the highest sigma but still from noise of variance 1 + sigma^2.
        noise = noise * (1 + sigmas[0] ** 2).sqrt() / sigmas[0]
    if len(sigmas) == 1:
        latents = start
    else:
        positive, negative = decoder_conditioning(features, negative_features, height, width)
        latents = run_sampler(
            decoder,
            noise,
            sigmas,
            positive=positive,
            negative=negative,
            cfg=cfg,
            sampler=sampler,
            seed=seed,
            start=start,
            has_preview=has_preview,
        )
    return vae.decode_tiled(latents) if tiled else vae.decode(latents)
