"""EVA-CLIP against a plain implementation that is written another way."""

from dataclasses import replace

import pytest
import tiny_models
import torch
from comfyui_blip3o.blip3o_core.config import EvaClipConfig
from comfyui_blip3o.blip3o_core.models.eva_clip import EvaClip
from originals import plain_tokens
from torch import Tensor

Config = EvaClipConfig
SMALL = Config(width=16, layers=2, head_width=8, mlp_dim=24, image_size=56, patch_size=14, pool=1)
CONFIGS = {
    "small": SMALL,
    "pooled by 4": replace(SMALL, image_size=112, pool=4),
    "other patches": Config(
        width=12, layers=3, head_width=4, mlp_dim=20, image_size=48, patch_size=8, pool=2
    ),
}


def build(config: Config) -> tuple[EvaClip, Tensor]:
    pixels = torch.randn(
        2, 3, config.image_size, config.image_size, generator=torch.Generator().manual_seed(1)
    )
    return tiny_models.randomise(EvaClip(config), seed=4), pixels


@pytest.mark.parametrize("name", CONFIGS)
def test_equals_the_plain_implementation(name: str) -> None:
    encoder, pixels = build(CONFIGS[name])
    expected = plain_tokens(encoder.state_dict(), encoder.config, pixels).float()
    torch.testing.assert_close(encoder.encode_tokens(pixels), expected, rtol=1e-5, atol=5e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_features_are_means_of_squares_of_patches_in_reading_order(name: str) -> None:
    encoder, pixels = build(CONFIGS[name])
    config = encoder.config
    grid = encoder(pixels)
    assert grid.shape == (2, config.width, config.feature_grid, config.feature_grid)
    patches = encoder.encode_tokens(pixels)[:, 1:]  # without the class token
    for row, column in ((0, 0), (0, config.feature_grid - 1), (config.feature_grid - 1, 0)):
        members = [
            (row * config.pool + i) * config.patch_grid + column * config.pool + j
            for i in range(config.pool)
            for j in range(config.pool)
        ]
        torch.testing.assert_close(
            grid[:, :, row, column], patches[:, members].mean(dim=1), rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("key", ["cls_token", "pos_embed", "blocks.0.attn.qkv.bias", "blocks.1.norm2.weight"])
def test_every_kind_of_weight_shows_in_the_features(key: str) -> None:
    encoder, pixels = build(SMALL)
    before = encoder(pixels)
    encoder.state_dict()[key].add_(0.2)
    assert (encoder(pixels) - before).abs().max() > 1e-4


def test_pictures_of_a_batch_do_not_mix() -> None:
    encoder, pixels = build(SMALL)
    torch.testing.assert_close(encoder(pixels)[1:], encoder(pixels[1:]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "change", [{"head_width": 5}, {"image_size": 60}, {"pool": 3}], ids=["head", "image", "pool"]
)
def test_sizes_that_cannot_be_are_refused(change: dict[str, int]) -> None:
    with pytest.raises(AssertionError):
        replace(SMALL, **change)


def test_the_defaults_are_the_published_tower() -> None:
    with torch.device("meta"):
        encoder = EvaClip(Config())
    assert encoder.config.feature_grid == 8
    assert sum(parameter.numel() for parameter in encoder.parameters()) == pytest.approx(4.35e9, rel=0.01)
