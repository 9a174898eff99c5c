"""Sizes of the networks written here, and where the built-in checkpoint lies; defaults are the published 8B checkpoint. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# The small trained checkpoint that ships with the project.
BUILT_IN_MODEL = Path(__file__).resolve().parent / "assets" / "tiny"
# Pixels along a tile of the VAE, whatever its own configuration says: SDXL's names 1024, the whole of our pictures.
TILE_SIDE = 512
# Endings of the picture files that every part of the program reads.
PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif")
# Width of the conditioning -> what people call the published model, and its hub repository.
PUBLISHED_SIZES = {3584: "8B", 2048: "4B"}
PUBLISHED_REPOS = {width: f"BLIP3o/BLIP3o-Model-{size}" for width, size in PUBLISHED_SIZES.items()}
# The UNet's size embedding: original size (height, width) and crop (top, left), pixels; the target size follows them.
PUBLISHED_ORIGINAL_SIZE = (1024, 1024)
PUBLISHED_CROP = (0, 0)
# Networks up to this size on disk are kept in float32 where a device computes in nothing smaller.
LARGEST_FLOAT32_BYTES = 4 * 2**30


@dataclass(frozen=True)
class NextDiTConfig:
    """Numbers of the NextDiT. All follow from a checkpoint's tensors, see checkpoints/infer.py.

    Attributes:
        dim: width of the token stream.
        layers: transformer blocks.
        heads: query heads; `dim / heads` is the head width and must be divisible by 4 for 2-D rotary positions.
        kv_heads: key and value heads, a divisor of `heads`.
        in_channels: channels of the feature grid, in and out.
        conditioning_dim: width C of the backbone's hidden states.
        ffn_dim: inner width of the SwiGLU feed-forward.
        time_dim: width of the timestep and pooled-context embedding.
    """

    dim: int = 1792
    layers: int = 24
    heads: int = 28
    kv_heads: int = 28
    in_channels: int = 1792
    conditioning_dim: int = 3584
    ffn_dim: int = 4864
    time_dim: int = 1024

    def __post_init__(self) -> None:
        assert self.dim % self.heads == 0, f"dim {self.dim} is not a multiple of heads {self.heads}"
        assert self.head_dim % 4 == 0, f"head width {self.head_dim} is not a multiple of 4"
        assert self.heads % self.kv_heads == 0, (
            f"heads {self.heads} is not a multiple of kv_heads {self.kv_heads}"
        )

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads


@dataclass(frozen=True)
class EvaClipConfig:
    """Numbers of the EVA-CLIP image encoder; the defaults are EVA-CLIP-E/14+.

    Attributes:
        width: channels of the image features.
        layers: transformer blocks.
        head_width: channels per attention head; no tensor tells it, so config.json must when it is not 112.
        mlp_dim: inner width of the feed-forward.
        image_size: side of the square input, pixels.
        patch_size: side of a patch, pixels.
        pool: side of the square of patches averaged into one feature; published `gen_pooling` "early_pool2d_4".
    """

    width: int = 1792
    layers: int = 64
    head_width: int = 112
    mlp_dim: int = 15360
    image_size: int = 448
    patch_size: int = 14
    pool: int = 4

    def __post_init__(self) -> None:
        assert self.width % self.head_width == 0, (
            f"width {self.width} is not a multiple of head_width {self.head_width}"
        )
        assert self.image_size % self.patch_size == 0, (
            f"image_size {self.image_size} is not a multiple of patch_size"
        )
        assert self.patch_grid % self.pool == 0, (
            f"{self.patch_grid} patches a side do not pool by {self.pool}"
        )

    @property
    def patch_grid(self) -> int:
        """Patches along one side of the image."""
        return self.image_size // self.patch_size

    @property
    def feature_grid(self) -> int:
        """Features along one side of the image, 8 as published."""
        return self.patch_grid // self.pool


def pixels_per_latent(vae: Mapping[str, Any]) -> int:
    """Pixels per latent along one side, of a VAE's configuration: 8 for four levels."""
    return 2 ** (len(vae["block_out_channels"]) - 1)


def model_words(width: int, otherwise: str) -> str:
    """Words for the published model whose conditioning has this width."""
    return f"the {PUBLISHED_SIZES[width]} model" if width in PUBLISHED_SIZES else otherwise
