"""NextDiT: predicts the velocity of a grid of image features, given the backbone's conditioning.

Letters: B batch, L conditioning tokens, C conditioning width, N = H x W feature tokens, D model width,
h heads, d head width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import NextDiTConfig

TIMESTEP_FREQUENCIES = 256
MAX_PERIOD = 10_000.0
ROPE_THETA = 10_000.0
# Where PyTorch multiplies complex numbers in one pass.
COMPLEX_DEVICES = ("cpu", "cuda")


@dataclass(frozen=True)
class DiTContext:
    """What the DiT derives from the conditioning alone: made once per prompt, read at every step.

    Attributes:
        pooled: projected mean of the conditioning, (B, time_dim).
        keys: one (R, kv_heads, L, d) tensor per layer; R = rows that attend to a real prompt, the first R of B.
        values: the same for the values.
        zero_values: one (kv_heads, d) tensor per layer for the last B - R rows, whose conditioning is all zeros,
            or None when R = B. Equal context tokens make attention return their common value whatever the query.
    """

    pooled: Tensor
    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    zero_values: tuple[Tensor, ...] | None = None


class CaptionProjection(nn.Module):
    """Bring the conditioning to the DiT's width: linear, GELU (tanh), linear."""

    def __init__(self, config: NextDiTConfig, ops: Any) -> None:
        super().__init__()
        self.linear_1 = ops.Linear(config.conditioning_dim, config.dim)
        self.linear_2 = ops.Linear(config.dim, config.dim)

    def forward(self, conditioning: Tensor) -> Tensor:
        return self.linear_2(F.gelu(self.linear_1(conditioning), approximate="tanh"))


class PatchEmbedder(nn.Module):
    """One token per grid cell (patch size 1): a linear map of its channels."""

    def __init__(self, config: NextDiTConfig, ops: Any) -> None:
        super().__init__()
        self.proj = ops.Linear(config.in_channels, config.dim)

    def forward(self, feature_grid: Tensor) -> Tensor:
        return self.proj(feature_grid.flatten(2).transpose(1, 2))  # (B, C, H, W) -> (B, N, D)


class TimestepMLP(nn.Module):
    """Two linear layers over the sinusoidal timestep."""

    def __init__(self, config: NextDiTConfig, ops: Any) -> None:
        super().__init__()
        self.linear_1 = ops.Linear(TIMESTEP_FREQUENCIES, config.time_dim)
        self.linear_2 = ops.Linear(config.time_dim, config.time_dim)

    def forward(self, frequencies: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(frequencies)))


class TimeCaptionEmbedding(nn.Module):
    """Sum of the embedded timestep and the embedded mean of the projected context, (B, time_dim)."""

    def __init__(self, config: NextDiTConfig, ops: Any) -> None:
        super().__init__()
        self.timestep_embedder = TimestepMLP(config, ops)
        self.caption_embedder = nn.Sequential(
            ops.LayerNorm(config.dim), ops.Linear(config.dim, config.time_dim)
        )

    def embed_timestep(self, timestep: Tensor, dtype: torch.dtype) -> Tensor:
        return self.timestep_embedder(timestep_frequencies(timestep).to(dtype))

    def embed_caption(self, context: Tensor) -> Tensor:
        return self.caption_embedder(context.mean(dim=1))


class AdaptiveRMSNorm(nn.Module):
    """RMSNorm scaled by the time embedding; also yields the block's three modulations ("RMSNorm-zero")."""

    def __init__(self, config: NextDiTConfig, ops: Any) -> None:
        super().__init__()
        self.linear = ops.Linear(config.time_dim, 4 * config.dim)
        self.norm = ops.RMSNorm(config.dim, eps=1e-5)

    def forward(self, hidden_states: Tensor, embedding: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        scale, attn_gate, mlp_scale, mlp_gate = self.linear(embedding).unsqueeze(1).chunk(4, dim=-1)
        return self.norm(hidden_states) * (1 + scale), attn_gate.tanh(), mlp_scale, mlp_gate.tanh()


class Attention(nn.Module):
    """Projections of one attention: q and k are LayerNorm'ed over their whole width before the split into heads."""

    def __init__(self, config: NextDiTConfig, ops: Any, *, has_output: bool) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        kv_dim = config.kv_heads * config.head_dim
        self.to_q = ops.Linear(config.dim, config.dim, bias=False)
        self.to_k = ops.Linear(config.dim, kv_dim, bias=False)
        self.to_v = ops.Linear(config.dim, kv_dim, bias=False)
        self.norm_q = ops.LayerNorm(config.dim)
        self.norm_k = ops.LayerNorm(kv_dim)
        if has_output:  # a list, because the published key is `to_out.0`
            self.to_out = nn.ModuleList([ops.Linear(config.dim, config.dim, bias=False)])

    def query(self, hidden_states: Tensor, rotary: Tensor) -> Tensor:
        return apply_rotary(self.split(self.norm_q(self.to_q(hidden_states))), rotary)

    def key(self, hidden_states: Tensor) -> Tensor:
        return self.split(self.norm_k(self.to_k(hidden_states)))

    def value(self, hidden_states: Tensor) -> Tensor:
        return self.split(self.to_v(hidden_states))

    def split(self, hidden_states: Tensor) -> Tensor:
        return hidden_states.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, N, h d) -> (B, h, N, d)


class FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, config: NextDiTConfig, ops: Any) -> None:
        super().__init__()
        self.linear_1 = ops.Linear(config.dim, config.ffn_dim, bias=False)
        self.linear_2 = ops.Linear(config.ffn_dim, config.dim, bias=False)
        self.linear_3 = ops.Linear(config.dim, config.ffn_dim, bias=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(hidden_states)) * self.linear_3(hidden_states))


class NextDiTBlock(nn.Module):
    """Self and cross attention over the same normed input, one shared output projection, SwiGLU; all gated."""

    def __init__(self, config: NextDiTConfig, ops: Any) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(config.heads))
        self.attn1 = Attention(config, ops, has_output=False)
        self.attn2 = Attention(config, ops, has_output=True)
        self.feed_forward = FeedForward(config, ops)
        self.norm1 = AdaptiveRMSNorm(config, ops)
        self.norm2 = ops.RMSNorm(config.dim, eps=1e-5)
        self.ffn_norm1 = ops.RMSNorm(config.dim, eps=1e-5)
        self.ffn_norm2 = ops.RMSNorm(config.dim, eps=1e-5)
        self.norm1_context = ops.RMSNorm(config.dim, eps=1e-5)

    def encode_context(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of the projected context (B, L, D), each (B, kv_heads, L, d). The key is not rotated."""
        context = self.norm1_context(context)
        return self.attn2.key(context), self.attn2.value(context)

    def forward(
        self,
        hidden_states: Tensor,
        embedding: Tensor,
        rotary: Tensor,
        keys: Tensor,
        values: Tensor,
        zero_value: Tensor | None,
    ) -> Tensor:
        normed, attn_gate, mlp_scale, mlp_gate = self.norm1(hidden_states, embedding)
        attended = self._attend_self(normed, rotary) + self._attend_context(
            normed, rotary, keys, values, zero_value
        )
        mixed = self.attn2.to_out[0](attended.transpose(1, 2).flatten(2))  # (B, h, N, d) -> (B, N, D)
        hidden_states = hidden_states + attn_gate * self.norm2(mixed)
        fed = self.feed_forward(self.ffn_norm1(hidden_states) * (1 + mlp_scale))
        return hidden_states + mlp_gate * self.ffn_norm2(fed)

    def _attend_self(self, normed: Tensor, rotary: Tensor) -> Tensor:
        key = apply_rotary(self.attn1.key(normed), rotary)
        return attention(self.attn1.query(normed, rotary), key, self.attn1.value(normed))

    def _attend_context(
        self,
        normed: Tensor,
        rotary: Tensor,
        keys: Tensor,
        values: Tensor,
        zero_value: Tensor | None,
    ) -> Tensor:
        # The query is rotated although the key is not: as published.
        attended = attention(self.attn2.query(normed[: keys.shape[0]], rotary), keys, values)
        if zero_value is not None:
            groups = attended.shape[1] // zero_value.shape[0]
            constant = zero_value.repeat_interleave(groups, dim=0)[None, :, None]  # (1, h, 1, d)
            rest = normed.shape[0] - keys.shape[0]
            attended = torch.cat([attended, constant.expand(rest, -1, attended.shape[2], -1)])
        # Cast at use: a parameter of a non-leaf module may be left on another device by a host that streams weights.
        gate = self.gate.to(device=normed.device, dtype=normed.dtype).tanh()
        return attended * gate.view(1, -1, 1, 1)


class OutputNorm(nn.Module):
    """LayerNorm without weights, scaled by the time embedding, then linear to the feature channels."""

    def __init__(self, config: NextDiTConfig, ops: Any) -> None:
        super().__init__()
        self.linear_1 = ops.Linear(config.time_dim, config.dim)
        self.linear_2 = ops.Linear(config.dim, config.in_channels)
        self.dim = config.dim

    def forward(self, hidden_states: Tensor, embedding: Tensor) -> Tensor:
        scale = self.linear_1(embedding).unsqueeze(1)
        return self.linear_2(F.layer_norm(hidden_states, (self.dim,), eps=1e-6) * (1 + scale))


class NextDiT(nn.Module):
    """The velocity network of BLIP3-o; keys of its state_dict are the published ones below `model.dit.model.`.

    Args:
        config: sizes.
        ops: namespace with Linear, LayerNorm and RMSNorm; torch.nn, or a host's layer classes.

    Source: diffusers LuminaNextDiT2DModel as changed by BLIP3o@4689ec3 lumina_nextdit2d.py.
    """

    def __init__(self, config: NextDiTConfig, ops: Any = nn) -> None:
        super().__init__()
        self.config = config
        self.caption_projection = CaptionProjection(config, ops)
        self.patch_embedder = PatchEmbedder(config, ops)
        self.time_caption_embed = TimeCaptionEmbedding(config, ops)
        self.layers = nn.ModuleList([NextDiTBlock(config, ops) for _ in range(config.layers)])
        self.norm_out = OutputNorm(config, ops)

    @property
    def blocks(self) -> list[NextDiTBlock]:
        """The layers, with the type that a ModuleList does not tell."""
        return cast("list[NextDiTBlock]", list(self.layers))

    def encode_context(self, conditioning: Tensor, *, zero_rows: int = 0) -> DiTContext:
        """Everything that depends on the conditioning alone.

        Args:
            conditioning: (R, L, C).
            zero_rows: rows with all-zero conditioning to add after the R given ones. They cost one token instead
                of L and no cross attention, and equal L zero tokens exactly.
        """
        context = self.caption_projection(conditioning)
        pooled = self.time_caption_embed.embed_caption(context)
        keys, values = zip(*(layer.encode_context(context) for layer in self.blocks), strict=True)
        if not zero_rows:
            return DiTContext(pooled, keys, values)
        zero_context = self.caption_projection(torch.zeros_like(conditioning[:1, :1]))
        zero_pooled = self.time_caption_embed.embed_caption(zero_context).expand(zero_rows, -1)
        zero_values = tuple(layer.encode_context(zero_context)[1][0, :, 0] for layer in self.blocks)
        return DiTContext(torch.cat([pooled, zero_pooled]), keys, values, zero_values)

    def forward(
        self,
        feature_grid: Tensor,
        timestep: Tensor,
        conditioning: Tensor | None = None,
        *,
        context: DiTContext | None = None,
    ) -> Tensor:
        """Velocity (noise - image features) at a noise level.

        Args:
            feature_grid: noisy features, (B, in_channels, H, W).
            timestep: sigma x 1000, (B,).
            conditioning: backbone states, (B, L, C); or pass its `context` from encode_context.

        Returns:
            (B, in_channels, H, W).
        """
        if context is None:
            assert conditioning is not None, "neither conditioning nor context"
            context = self.encode_context(conditioning)
        height, width = feature_grid.shape[-2:]
        rotary = rotary_table(height, width, self.config.head_dim, feature_grid.device)
        hidden_states = self.patch_embedder(feature_grid)
        time = self.time_caption_embed.embed_timestep(timestep, hidden_states.dtype)
        embedding = F.silu(time + context.pooled)
        zero_values = context.zero_values or (None,) * len(self.layers)
        for layer, keys, values, zero_value in zip(
            self.layers, context.keys, context.values, zero_values, strict=True
        ):
            hidden_states = layer(hidden_states, embedding, rotary, keys, values, zero_value)
        velocity = self.norm_out(hidden_states, embedding)
        return velocity.transpose(1, 2).unflatten(2, (height, width))  # (B, N, C) -> (B, C, H, W)


def timestep_frequencies(timestep: Tensor) -> Tensor:
    """Sinusoidal embedding (B, 256) in float32: cosines first, no frequency shift."""
    half = TIMESTEP_FREQUENCIES // 2
    # exp(-log(max period) ...) rather than a power: at timestep 1000 one rounding of the frequency is 1e-4 of angle,
    # and the weights were trained with this one (diffusers get_timestep_embedding).
    exponents = -math.log(MAX_PERIOD) * torch.arange(half, dtype=torch.float32, device=timestep.device) / half
    angles = timestep.float()[:, None] * exponents.exp()
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def rotary_table(height: int, width: int, head_dim: int, device: torch.device) -> Tensor:
    """Cosine and sine of each pair's angle at the 2-D rotary positions, (H x W, d / 2, 2), float32.

    Row and column angles alternate from pair to pair: row, column, row, ... with falling frequency.
    Computed at each call: a table stored in the module would be garbage after a build on the meta device.
    """
    pairs = head_dim // 4
    frequencies = ROPE_THETA ** -(torch.arange(pairs, dtype=torch.float32, device=device) / pairs)
    rows = torch.arange(height, dtype=torch.float32, device=device)[:, None] * frequencies
    columns = torch.arange(width, dtype=torch.float32, device=device)[:, None] * frequencies
    angles = torch.stack(
        [rows[:, None].expand(-1, width, -1), columns[None].expand(height, -1, -1)], dim=-1
    ).reshape(height * width, head_dim // 2)
    return torch.stack([angles.cos(), angles.sin()], dim=-1)


def apply_rotary(heads: Tensor, rotary: Tensor) -> Tensor:
    """Rotate adjacent pairs of (B, h, N, d) by their position's angles, in float32 as published."""
    pairs = heads.float().unflatten(-1, (-1, 2))
    if heads.device.type in COMPLEX_DEVICES and not torch.compiler.is_compiling():
        rotated = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(rotary))
    else:  # the same written out, for compilers and devices without complex numbers
        even, odd = pairs.unbind(-1)
        cos, sin = rotary.unbind(-1)
        rotated = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1)
    return rotated.flatten(-2).to(heads.dtype)


def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Scaled dot-product attention over (B, h, N, d) with (B, kv_heads, M, d) keys and values."""
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    return F.scaled_dot_product_attention(query, key, value)
