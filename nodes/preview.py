"""Linear maps from latents to colours, for the live preview while sampling."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from ..blip3o_core.checkpoints.layout import CheckpointFiles
from ..blip3o_core.models.nextdit import NextDiT

# Optional file beside config.json: fitted maps, "features.factors" (C, 3), "features.bias" (3,), "latents.factors", "latents.bias".
FITTED_FILE = "preview.safetensors"


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


def feature_factors(files: CheckpointFiles, dit: NextDiT) -> RgbFactors:
    """Map of the image features: fitted to colours where the checkpoint brings one, else false colours.

    No weight of a published checkpoint tells which colour a feature has. False colours show the three directions in which
    the DiT's output varies most: layout and contours, not hues.
    """
    fitted = read_fitted(files.folder, "features")
    if fitted is not None:
        return fitted
    weight = dit.norm_out.linear_2.weight.detach().float()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # the low-rank SVD draws a random start
        directions, strengths, _ = torch.svd_lowrank(weight, q=6)
    # The features have about the scale of the noise, so a unit direction varies by about 1.
    factors = directions[:, :3] * torch.where(directions[:, :3].sum(0) < 0, -1.0, 1.0)
    return RgbFactors(factors.tolist(), [0.0, 0.0, 0.0])


def read_fitted(folder: Path, what: str) -> RgbFactors | None:
    """A fitted map from a checkpoint folder: `what` is "features" or "latents"."""
    path = folder / FITTED_FILE
    if not path.is_file():
        return None
    with safe_open(str(path), framework="pt") as file:
        return RgbFactors(
            file.get_tensor(f"{what}.factors").float().tolist(),
            file.get_tensor(f"{what}.bias").float().tolist(),
        )
