"""Linear maps from latents to colours, for the live preview while sampling."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor

from ...blip3o_core.checkpoints.layout import CheckpointFiles
from ...blip3o_core.checkpoints.load import load_image_encoder
from ...blip3o_core.images import from_pil, preprocess_for_image_encoder
from ...blip3o_core.models.nextdit import NextDiT

# Encoders up to this size are asked about colours at load; the published tower has 8.1 GB and is never read for a preview.
SMALL_ENCODER_BYTES = 64 * 2**20
PROBES = 48
RIDGE = 1e-2


@dataclass(frozen=True)
class RgbFactors:
    """Colour = latent @ factors + bias, in [-1, 1]; plain lists, as ComfyUI's latent formats hold them."""

    factors: list[list[float]]
    bias: list[float]

    def picture(self, latents: Tensor) -> Tensor:
        """Picture (H, W, 3) in [0, 1] of the first of the latents (B, C, H, W)."""
        factors = torch.tensor(self.factors, device=latents.device)
        bias = torch.tensor(self.bias, device=latents.device)
        return ((latents[0].float().movedim(0, -1) @ factors + bias + 1) / 2).clamp(0, 1)


def fit(latents: Tensor, images: Tensor) -> RgbFactors:
    """The linear map that best tells the colours of images (B, H, W, 3) in [0, 1] from their latents (B, C, h, w)."""
    height, width = latents.shape[-2:]
    colours = F.adaptive_avg_pool2d(images.movedim(-1, 1), (height, width)) * 2 - 1
    inputs = latents.float().movedim(1, -1).flatten(0, 2)
    mean = inputs.mean(0)
    targets = colours.movedim(1, -1).flatten(0, 2)
    centred = inputs - mean
    gram = centred.T @ centred
    ridge = RIDGE * gram.diagonal().mean() * torch.eye(len(gram))
    factors = torch.linalg.solve(gram + ridge, centred.T @ (targets - targets.mean(0)))
    return RgbFactors(factors.tolist(), (targets.mean(0) - mean @ factors).tolist())


def probe_pictures(side: int) -> list[Image.Image]:
    """Pictures of plain coloured shapes on plain grounds, always the same ones."""
    random = np.random.default_rng(0)
    pictures = []
    for _ in range(PROBES):
        picture = Image.new(
            "RGB", (side, side), tuple(random.integers(0, 2, 3) * 255) if random.random() < 0.5 else "white"
        )
        draw = ImageDraw.Draw(picture)
        for _ in range(random.integers(1, 4)):
            left, top = random.integers(0, side * 3 // 4, 2)
            size = random.integers(side // 4, side // 2)
            shape = draw.ellipse if random.random() < 0.5 else draw.rectangle
            shape((left, top, left + size, top + size), fill=tuple(random.integers(0, 256, 3)))
        pictures.append(picture)
    return pictures


@torch.no_grad()
def feature_factors(files: CheckpointFiles, dit: NextDiT) -> RgbFactors:
    """Map of the image features: fitted to colours where the image encoder is small, else false colours.

    No weight of the published checkpoints but EVA-CLIP's tells which colour a feature has. False colours show the three
    directions in which the DiT's output varies most: layout and contours, not hues.
    """
    if 0 < files.component_bytes.get("image_encoder", 0) <= SMALL_ENCODER_BYTES:
        encoder = load_image_encoder(files, dtype=torch.float32)
        side = encoder.config.image_size
        pictures = probe_pictures(side)
        grids = encoder(torch.stack([preprocess_for_image_encoder(picture, side) for picture in pictures]))
        return fit(grids, from_pil(pictures))
    weight = dit.norm_out.linear_2.weight.detach().float()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # the low-rank SVD draws a random start
        directions, _, _ = torch.svd_lowrank(weight, q=6)
    # The features have about the scale of the noise, so a unit direction varies by about 1.
    factors = directions[:, :3] * torch.where(directions[:, :3].sum(0) < 0, -1.0, 1.0)
    return RgbFactors(factors.tolist(), [0.0, 0.0, 0.0])


@torch.no_grad()
def latent_factors(vae: Any, side: int, scaling_factor: float) -> RgbFactors:
    """Map of the scaled latents of a small VAE that ComfyUI knows no map for.

    Args:
        vae: a ComfyUI VAE.
        side: of the pictures it was trained on, pixels.
    """
    images = from_pil(probe_pictures(side))
    return fit(vae.encode(images).float() * scaling_factor, images)
