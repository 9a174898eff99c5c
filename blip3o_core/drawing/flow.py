"""The path between image features and noise, shared by sampling, training and their tests.

sigma is the noise level: 1 = pure noise, 0 = image features. (flow_matching's and SiT's t runs the other way.)
"""

from __future__ import annotations

import torch
from torch import Tensor

TRAIN_TIMESTEPS = 1000


def mix(image_features: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """The point of the path at sigma (B,): (1 - sigma) features + sigma noise."""
    sigma = sigma.view(-1, *[1] * (image_features.ndim - 1)).to(image_features)
    return (1 - sigma) * image_features + sigma * noise


def target_velocity(image_features: Tensor, noise: Tensor) -> Tensor:
    """d x / d sigma, what the DiT learns."""
    return noise - image_features


def training_sigma(indices: Tensor) -> Tensor:
    """Sigma (B,) of training timestep indices 0..999; index 0 is pure noise.

    Source: FlowMatchEulerDiscreteScheduler with 1000 steps and shift 1: timesteps 1000, 999, ... 1.
    """
    return (TRAIN_TIMESTEPS - indices).float() / TRAIN_TIMESTEPS


def sigma_schedule(steps: int, shift: float = 1.0) -> Tensor:
    """Descending noise levels (steps + 1,), float32: linspace(1, 1/steps), shifted, then 0.

    Args:
        steps: at least 1.
        shift: above 1 spends more steps at high noise; 1 as published.

    Source: BLIP3o@4689ec3 sample_images; FlowMatchEulerDiscreteScheduler.set_timesteps.
    """
    sigmas = torch.linspace(1, 1 / steps, steps, dtype=torch.float64)
    # In double precision: in single, a shifted 1 may come out above 1, outside every guidance interval.
    sigmas = shift * sigmas / (1 + (shift - 1) * sigmas)
    return torch.cat([sigmas.float(), torch.zeros(1)])


def skipped_steps(steps: int, strength: float) -> int:
    """How many of a run's first steps are left out when it starts from something; strength 1 = none, 0 = all."""
    return steps - round(steps * strength)


def whole_timesteps(sigmas: Tensor) -> Tensor:
    """What the network is fed: sigma x 1000 cut to a whole number, float32.

    The cut is published inference (966.67 -> 966), and training only ever showed whole timesteps.
    """
    return (sigmas.float() * TRAIN_TIMESTEPS).floor()
