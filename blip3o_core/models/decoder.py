"""Diffusion decoder: an SDXL-shaped UNet that reads 64 image features, and a VAE; both from diffusers."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, EulerDiscreteScheduler, UNet2DConditionModel
from torch import Tensor, nn

from ..config import PUBLISHED_CROP, PUBLISHED_ORIGINAL_SIZE, TILE_SIDE, pixels_per_latent


class Decoder(nn.Module):
    """UNet, VAE and the noise schedule they were trained with.

    Args:
        unet_config, vae_config, scheduler_config: the JSON files of the published `diffusion-decoder` folder.
    """

    def __init__(
        self, unet_config: dict[str, Any], vae_config: dict[str, Any], scheduler_config: dict[str, Any]
    ) -> None:
        super().__init__()
        self.unet = UNet2DConditionModel.from_config(unet_config)
        self.vae = AutoencoderKL.from_config(vae_config)
        self.vae.tile_sample_min_size = TILE_SIDE
        self.vae.tile_latent_min_size = TILE_SIDE // self.vae_scale
        self.scheduler_config = scheduler_config

    @property
    def vae_scale(self) -> int:
        """Pixels per latent along one side: 8 for four VAE levels."""
        return pixels_per_latent(self.vae.config)

    @property
    def latent_channels(self) -> int:
        return self.unet.config.in_channels

    def scheduler(self, sampler: str) -> Any:
        """A fresh scheduler of diffusers for a sampler, "euler" or "dpmpp_2m", on the published noise schedule.

        Not typed: to a type checker diffusers exports stand-ins without methods.
        """
        if sampler == "euler":
            return EulerDiscreteScheduler.from_config(self.scheduler_config)
        assert sampler == "dpmpp_2m", sampler
        shared = {
            key: self.scheduler_config[key]
            for key in (
                "num_train_timesteps",
                "beta_start",
                "beta_end",
                "beta_schedule",
                "trained_betas",
                "prediction_type",
                "timestep_spacing",
                "steps_offset",
            )
            if key in self.scheduler_config
        }
        return DPMSolverMultistepScheduler(algorithm_type="dpmsolver++", solver_order=2, **shared)

    def condition(self, image_features: Tensor, height: int, width: int) -> dict[str, Any]:
        """Arguments of the UNet beside latents and timestep.

        Args:
            image_features: (B, N, channels).
            height, width: size of the picture, pixels.

        Source: BLIP3o@4689ec3, the decoder's pipeline: text_embeds is the mean token; time_ids are original size, crop, target.
        """
        time_ids = torch.tensor([*PUBLISHED_ORIGINAL_SIZE, *PUBLISHED_CROP, height, width])
        return {
            "encoder_hidden_states": image_features,
            "added_cond_kwargs": {
                "text_embeds": image_features.mean(dim=1),
                "time_ids": time_ids.to(image_features).expand(image_features.shape[0], -1),
            },
        }

    def encode_latents(self, pixels: Tensor) -> Tensor:
        """Scaled latents (B, 4, H/8, W/8) of pixels (B, 3, H, W) in [-1, 1]: the mean of the posterior."""
        moments = self.vae.encode(pixels.to(self.vae.dtype)).latent_dist.mode()
        return moments * self.vae.config.scaling_factor

    def decode_latents(self, latents: Tensor, *, tiled: bool = False) -> Tensor:
        """Pixels (B, 3, H, W), float32 in [0, 1], of scaled latents; `tiled` bounds the memory of large pictures."""
        self.vae.use_tiling = tiled
        try:
            pixels = self.vae.decode((latents / self.vae.config.scaling_factor).to(self.vae.dtype)).sample
        finally:
            self.vae.use_tiling = False
        return (pixels.float() / 2 + 0.5).clamp(0, 1)
