"""Stage b, first half: the VAE of the decoder, trained to give pictures back exactly."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..trainer import Batch
from ..world.pool import ScenePool, rows_of_step


class VaeStage(nn.Module):
    """Reconstruction, a light KL term and an anchor that ties the first three latents to small RGB pictures.

    Without the anchor the colours of a tiny VAE collapse to one axis for hundreds of steps.
    """

    def __init__(self, vae: nn.Module, kl_weight: float, anchor_weight: float) -> None:
        super().__init__()
        self.vae = vae
        self.kl_weight = kl_weight
        self.anchor_weight = anchor_weight

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        pixels, noise = batch["pixels"], batch["noise"]
        posterior = self.vae.encode(pixels).latent_dist
        latents = posterior.mean + posterior.std * noise
        decoded = self.vae.decode(latents).sample
        error = decoded - pixels
        grey = error.mean(dim=1, keepdim=True)
        chroma = error - grey
        squared = error.square().mean() + 2 * chroma.square().mean()
        absolute = error.abs().mean() + chroma.abs().mean()
        small = F.avg_pool2d(pixels, 8)
        anchor = (posterior.mean[:, :3] - small).square().mean()
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        loss = squared + 0.5 * absolute + self.anchor_weight * anchor + self.kl_weight * kl
        return loss, {"mse": error.square().mean(), "anchor": anchor, "kl": kl}


def build_vae(config: dict[str, Any]) -> nn.Module:
    """An AutoencoderKL with a factor of 8 from its config fields."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(**config)


def vae_batches(pool: ScenePool, batch_size: int, seed: int, crop: int, latent_channels: int, full_from: int):
    """Batches of crops around the middle half of the pictures; whole pictures from step `full_from`."""

    def batch_of(step: int) -> Batch:
        rng = np.random.default_rng((seed, step, 1))
        whole = step >= full_from
        number = batch_size // 4 if whole else batch_size
        pixels = 2 * pool.pixels(rows_of_step(len(pool), number, seed, step)) - 1
        side = pixels.shape[-1] if whole else crop
        if not whole:
            corners = rng.integers(0, (pixels.shape[-1] - crop) // 8 + 1, size=(number, 2)) * 8
            pixels = torch.stack(
                [p[:, y : y + crop, x : x + crop] for p, (y, x) in zip(pixels, corners, strict=True)]
            )
        noise = torch.from_numpy(
            rng.standard_normal((number, latent_channels, side // 8, side // 8), np.float32)
        )
        return {"pixels": pixels, "noise": noise}

    return batch_of
