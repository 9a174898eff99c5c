"""EVA-CLIP image encoder: pixels to the grid of image features that the DiT learns to draw.

Letters: B batch, S image side in pixels, T = patches + 1 tokens, W width, g features along one side.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..config import EvaClipConfig


class PatchEmbed(nn.Module):
    """Non-overlapping patches through a convolution."""

    def __init__(self, config: EvaClipConfig, ops: Any) -> None:
        super().__init__()
        self.proj = ops.Conv2d(3, config.width, kernel_size=config.patch_size, stride=config.patch_size)

    def forward(self, pixels: Tensor) -> Tensor:
        return rearrange(self.proj(pixels), "b w row column -> b (row column) w")


class SelfAttention(nn.Module):
    """Multi-head self attention with one fused projection."""

    def __init__(self, config: EvaClipConfig, ops: Any) -> None:
        super().__init__()
        self.head_width = config.head_width
        self.qkv = ops.Linear(config.width, 3 * config.width)
        self.proj = ops.Linear(config.width, config.width)

    def forward(self, hidden_states: Tensor) -> Tensor:
        qkv = self.qkv(hidden_states)
        query, key, value = rearrange(qkv, "b t (three h d) -> three b h t d", three=3, d=self.head_width)
        attended = F.scaled_dot_product_attention(query, key, value)
        return self.proj(rearrange(attended, "b h t d -> b t (h d)"))


class FeedForward(nn.Module):
    """Two linear layers around an exact GELU."""

    def __init__(self, config: EvaClipConfig, ops: Any) -> None:
        super().__init__()
        self.fc1 = ops.Linear(config.width, config.mlp_dim)
        self.fc2 = ops.Linear(config.mlp_dim, config.width)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(hidden_states)))


class EvaClipBlock(nn.Module):
    """Post-norm block: the norms sit on the branches' outputs."""

    def __init__(self, config: EvaClipConfig, ops: Any) -> None:
        super().__init__()
        self.norm1 = ops.LayerNorm(config.width, eps=1e-6)
        self.attn = SelfAttention(config, ops)
        self.norm2 = ops.LayerNorm(config.width, eps=1e-6)
        self.mlp = FeedForward(config, ops)

    def forward(self, hidden_states: Tensor) -> Tensor:
        hidden_states = hidden_states + self.norm1(self.attn(hidden_states))
        return hidden_states + self.norm2(self.mlp(hidden_states))


class EvaClip(nn.Module):
    """EVA-CLIP vision tower without final norm and projection, pooled to a small grid.

    Keys of its state_dict are the published ones below `model.gen_vision_tower.vision_tower.model.`.

    Args:
        config: sizes.
        ops: namespace with Linear, LayerNorm and Conv2d; torch.nn, or a host's layer classes.

    Source: BLIP3o@4689ec3 eva_vit.py and eva_clip_encoder.py.
    """

    def __init__(self, config: EvaClipConfig, ops: Any = nn) -> None:
        super().__init__()
        self.config = config
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.width))
        self.pos_embed = nn.Parameter(torch.zeros(1, config.patch_grid**2 + 1, config.width))
        self.patch_embed = PatchEmbed(config, ops)
        self.blocks = nn.ModuleList([EvaClipBlock(config, ops) for _ in range(config.layers)])

    def encode_tokens(self, pixels: Tensor) -> Tensor:
        """All tokens of CLIP-normalised pixels (B, 3, S, S): (B, T, W), the class token first."""
        patches = self.patch_embed(pixels)
        # Cast at use: a parameter of a non-leaf module may be left on another device by a host that streams weights.
        cls_token = self.cls_token.to(patches).expand(patches.shape[0], -1, -1)
        hidden_states = torch.cat([cls_token, patches], dim=1) + self.pos_embed.to(patches)
        for block in self.blocks:
            hidden_states = block(hidden_states)
        return hidden_states

    def forward(self, pixels: Tensor) -> Tensor:
        """Image features as a grid.

        Args:
            pixels: CLIP-normalised, (B, 3, image_size, image_size).

        Returns:
            Patch features averaged in squares of `pool` patches, (B, width, g, g).
        """
        side = self.config.patch_grid
        patches = self.encode_tokens(pixels)[:, 1:]
        return F.avg_pool2d(
            rearrange(patches, "b (row column) w -> b w row column", row=side), self.config.pool
        )
