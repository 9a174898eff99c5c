"""Stage b, second half: the decoder's UNet learns to draw pictures from frozen image features.

Conditioning as SDXL has it: the features as `encoder_hidden_states`, their mean as `text_embeds`, sizes as `time_ids`.
The features get a little noise, so that the decoder forgives the small errors of features the DiT drew, and are
sometimes all zero, so that guidance away from zero features works.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...blip3o_core.images import CLIP_MEAN, CLIP_STD
from ..trainer import Batch
from ..world.pool import ScenePool, rows_of_step, save_array

SCHEDULER_CONFIG = {
    "_class_name": "EulerDiscreteScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "prediction_type": "v_prediction",
    "timestep_spacing": "leading",
    "steps_offset": 1,
    "interpolation_type": "linear",
    "timestep_type": "discrete",
    "trained_betas": None,
    "use_karras_sigmas": False,
}
SIZES = (1024, 1024, 0, 0)  # original size and crop, fixed as published; the target size follows


class DecoderStage(nn.Module):
    """Velocity prediction of VAE latents from image features."""

    def __init__(self, unet: nn.Module, side: int, drop: float, feature_noise: float) -> None:
        super().__init__()
        self.unet = unet
        self.drop = drop
        self.feature_noise = feature_noise
        betas = torch.linspace(
            SCHEDULER_CONFIG["beta_start"] ** 0.5,
            SCHEDULER_CONFIG["beta_end"] ** 0.5,
            1000,
            dtype=torch.float64,
        )
        self.register_buffer("signal", (1 - betas**2).cumprod(0).float())
        self.register_buffer("time_ids", torch.tensor([*SIZES, side, side]).float())

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        features = batch["features"] + self.feature_noise * batch["strength"] * batch["feature_noise"]
        features = features * batch["keep"]
        signal = self.signal[batch["timestep"]].view(-1, 1, 1, 1)
        latents, noise = batch["latents"], batch["noise"]
        noisy = signal.sqrt() * latents + (1 - signal).sqrt() * noise
        velocity = signal.sqrt() * noise - (1 - signal).sqrt() * latents
        added = {"text_embeds": features.mean(1), "time_ids": self.time_ids.expand(len(features), -1)}
        guess = self.unet(
            noisy, batch["timestep"], encoder_hidden_states=features, added_cond_kwargs=added
        ).sample
        loss = (guess - velocity).square().mean()
        return loss, {}


def build_unet(config: dict[str, Any]) -> nn.Module:
    """A UNet2DConditionModel from its config fields."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(**config)


def tiny_unet_config(
    feature_width: int, latent_channels: int, channels: tuple[int, int], heads: tuple[int, int]
) -> dict[str, Any]:
    """Two levels, cross attention at the lower one, where latents and features lie on the same 8 x 8 grid."""
    return {
        "sample_size": 16,
        "in_channels": latent_channels,
        "out_channels": latent_channels,
        "block_out_channels": list(channels),
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
        "layers_per_block": 1,
        "transformer_layers_per_block": 1,
        "attention_head_dim": list(heads),
        "cross_attention_dim": feature_width,
        "norm_num_groups": 8,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 16,
        "projection_class_embeddings_input_dim": feature_width + 6 * 16,
    }


@torch.no_grad()
def encode_pool(
    pool: ScenePool, encoder: nn.Module, vae: nn.Module | None, scaling: float, folder: Path, name: str
) -> tuple[np.ndarray, np.ndarray | None]:
    """Image features (N, T, W) and scaled latents (N, c, 16, 16) of all pictures, float16, kept in `folder`."""
    paths = [
        folder / f"{part}_{name}.npy"
        for part in (("features", "latents") if vae is not None else ("features",))
    ]
    if not all(path.is_file() for path in paths):
        mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (CLIP_MEAN, CLIP_STD))
        features, latents = [], []
        for start in range(0, len(pool), 200):
            pixels = pool.pixels(np.arange(start, min(start + 200, len(pool))))
            features.append(encoder((pixels - mean) / std).flatten(2).transpose(1, 2).half().numpy())
            if vae is not None:
                latents.append((scaling * vae.encode(2 * pixels - 1).latent_dist.mean).half().numpy())
        for path, parts in zip(paths, (features, latents), strict=False):
            save_array(path, np.concatenate(parts))
    arrays = [np.load(path, mmap_mode="r") for path in paths]
    return arrays[0], arrays[1] if vae is not None else None


def decoder_batches(
    features: np.ndarray,
    latents: np.ndarray,
    batch_size: int,
    seed: int,
    drop: float,
    *,
    singles: tuple[np.ndarray, np.ndarray] | None = None,
    singles_share: float = 0.35,
) -> Callable[[int], Batch]:
    """Features with their latents, noise, stratified timesteps and dropped rows.

    Args:
        singles: more features and latents, of single objects, which fill `singles_share` of each batch.
    """

    def batch_of(step: int) -> Batch:
        rng = np.random.default_rng((seed, step, 3))
        rows = rows_of_step(len(features), batch_size, seed, step)
        place = (rng.permutation(batch_size) + rng.random(batch_size)) / batch_size
        clean = features[rows].astype(np.float32)
        target = latents[rows].astype(np.float32)
        if singles is not None:
            number = round(singles_share * batch_size)
            rows = rng.integers(len(singles[0]), size=number)
            clean[:number], target[:number] = singles[0][rows], singles[1][rows]
        return {
            "features": torch.from_numpy(clean),
            "latents": torch.from_numpy(target),
            "noise": torch.from_numpy(rng.standard_normal(target.shape, np.float32)),
            "feature_noise": torch.from_numpy(rng.standard_normal(clean.shape, np.float32)),
            "strength": torch.from_numpy(rng.random((batch_size, 1, 1), np.float32)),
            "keep": torch.from_numpy((rng.random((batch_size, 1, 1)) >= drop).astype(np.float32)),
            "timestep": torch.from_numpy((place * 1000).astype(np.int64)),
        }

    return batch_of
