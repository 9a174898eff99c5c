"""The NextDiT rearranged for one sampling run: the same numbers from fewer, larger and cheaper operations.

What depends on the weights, the prompt or the noise level alone is computed before the first step: the modulations of
all noise levels in one product per layer, gated values of the context, packed weights. Only for networks whose layers
are plain and need no gradients, see can_fuse; NextDiT.forward is the reference for every number here.

Letters: B rows, R of them with a real prompt, N feature tokens, D model width, h heads, d head width, T noise levels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .linear import GatedLinears, ParallelLinears
from .nextdit import (
    AdaptiveRMSNorm,
    Attention,
    CaptionProjection,
    DiTContext,
    FeedForward,
    NextDiT,
    NextDiTBlock,
    OutputNorm,
    PatchEmbedder,
    TimeCaptionEmbedding,
    TimestepMLP,
    apply_rotary,
    attention,
    rotary_table,
)

# Modulations are kept for so many noise levels at a time.
MODULATION_BYTES = 64 * 2**20
PLAIN_LAYERS = (
    *(nn.Linear, nn.LayerNorm, nn.RMSNorm, nn.ModuleList, nn.Sequential),
    *(NextDiT, NextDiTBlock, AdaptiveRMSNorm, Attention, CaptionProjection, FeedForward, OutputNorm),
    *(PatchEmbedder, TimeCaptionEmbedding, TimestepMLP),
)


def can_fuse(dit: nn.Module) -> bool:
    """Whether a DiT consists of its own plain layers, all on one device, outside training.

    A wrapped layer (an adapter, a host's or an accelerator's hooks) or a compiled network computes in a way of its own
    and must be called.
    """
    return (
        type(dit) is NextDiT
        and not torch.is_grad_enabled()
        and len({parameter.device for parameter in dit.parameters()}) == 1
        and all(
            type(module) in PLAIN_LAYERS
            and not module._forward_hooks
            and not module._forward_pre_hooks
            and "forward" not in vars(module)
            and module._compiled_call_impl is None
            for module in dit.modules()
        )
    )


@dataclass(frozen=True)
class RunContext:
    """What one prompt adds to a run.

    Attributes:
        pooled: projected mean of the conditioning, (B, time_dim).
        keys, values: one (R, h, L, d) tensor per layer; the values carry the layer's gate.
        constants: one (1, 1, h, d) tensor per layer, the gated attention of the B - R rows without a prompt; or None.
    """

    pooled: Tensor
    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    constants: tuple[Tensor, ...] | None


class Modulation(NamedTuple):
    """Factors of one layer at one noise level, each (B, 1, D), norm weights included."""

    attention_in: Tensor
    attention_out: Tensor
    feed_forward_in: Tensor
    feed_forward_out: Tensor


class FusedDiT:
    """A DiT prepared for one run. Reads the weights as they are now: make a new one after changing them.

    Args:
        dit: a network for which can_fuse holds.
        timesteps: of all noise levels, (T,).
        grid_size: rows and columns of the feature grid.
    """

    def __init__(self, dit: NextDiT, timesteps: Tensor, grid_size: Sequence[int]) -> None:
        assert can_fuse(dit)
        self.dit = dit
        weight = dit.patch_embedder.proj.weight
        self.dtype = weight.dtype
        self.times = dit.time_caption_embed.embed_timestep(timesteps.to(weight.device), self.dtype)
        self.rotary = rotary_table(*grid_size, dit.config.head_dim, weight.device)
        rows = 2 * grid_size[0] * grid_size[1]
        self.layers = [_FusedLayer(layer, rows) for layer in dit.layers]
        self._chunks: dict[int, tuple[int, list[Tensor], Tensor]] = {}

    def encode_context(self, conditioning: Tensor, *, zero_rows: int = 0) -> RunContext:
        """See NextDiT.encode_context."""
        return self.prepare_context(self.dit.encode_context(conditioning, zero_rows=zero_rows))

    def prepare_context(self, context: DiTContext) -> RunContext:
        """Repeat grouped keys and values for all heads and fold each layer's gate into the values."""
        heads = self.dit.config.heads
        gates = [layer.gate.to(self.dtype).tanh().view(1, heads, 1, 1) for layer in self.dit.layers]
        groups = heads // self.dit.config.kv_heads
        keys = tuple(key.repeat_interleave(groups, dim=1) for key in context.keys)
        values = tuple(
            value.repeat_interleave(groups, dim=1) * gate
            for value, gate in zip(context.values, gates, strict=True)
        )
        constants = None
        if context.zero_values is not None:
            constants = tuple(
                value.repeat_interleave(groups, dim=0)[None, None] * gate.view(1, 1, heads, 1)
                for value, gate in zip(context.zero_values, gates, strict=True)
            )
        return RunContext(context.pooled, keys, values, constants)

    def __call__(self, feature_grid: Tensor, index: int, context: RunContext) -> Tensor:
        """Velocity (B, channels, H, W) of noisy features (B, channels, H, W) at the index-th noise level."""
        modulations, out_scale = self._modulations(index, context)
        hidden_states = self.dit.patch_embedder(feature_grid)
        constants = context.constants or (None,) * len(self.layers)
        for layer, modulation, key, value, constant in zip(
            self.layers, modulations, context.keys, context.values, constants, strict=True
        ):
            hidden_states = layer(hidden_states, modulation, self.rotary, key, value, constant)
        normed = F.layer_norm(hidden_states, hidden_states.shape[-1:], eps=1e-6) * out_scale
        velocity = self.dit.norm_out.linear_2(normed)
        return velocity.transpose(1, 2).unflatten(2, feature_grid.shape[-2:])

    def _modulations(self, index: int, context: RunContext) -> tuple[list[Modulation], Tensor]:
        """Modulations of every layer and the scale of the output norm, (B, 1, D), at one noise level."""
        width, batch = self.dit.config.dim, context.pooled.shape[0]
        level_bytes = len(self.layers) * batch * 4 * width * self.dtype.itemsize
        size = max(1, min(len(self.times), MODULATION_BYTES // level_bytes))
        first = index // size * size
        if self._chunks.get(id(context), (-1,))[0] != first:
            times = self.times[first : first + size]
            embedding = F.silu(times[:, None] + context.pooled)  # (levels, B, time_dim)
            self._chunks[id(context)] = (
                first,
                [layer.modulations(embedding) for layer in self.layers],
                1 + self.dit.norm_out.linear_1(embedding),
            )
        _, chunk, out_scales = self._chunks[id(context)]
        place = index - first
        return [Modulation(*each[place].unbind(1)) for each in chunk], out_scales[place][:, None]


class _FusedLayer:
    def __init__(self, layer: NextDiTBlock, rows: int) -> None:
        self.layer = layer
        own, cross, feed_forward = layer.attn1, layer.attn2, layer.feed_forward
        self.head_dim = own.head_dim
        self.inputs = ParallelLinears([own.to_q, own.to_k, own.to_v], rows)
        self.cross_query = ParallelLinears([cross.to_q], rows)
        self.output = ParallelLinears([cross.to_out[0]], rows)
        self.gated = GatedLinears(feed_forward.linear_1, feed_forward.linear_3, rows)
        self.feed_forward_out = ParallelLinears([feed_forward.linear_2], rows)

    def modulations(self, embedding: Tensor) -> Tensor:
        """(levels, B, time_dim) -> (levels, B, 4, 1, D)."""
        layer = self.layer
        values = layer.norm1.linear(embedding).unflatten(-1, (4, 1, -1))
        scale, attn_gate, mlp_scale, mlp_gate = values.unbind(2)
        return torch.stack(
            [
                layer.norm1.norm.weight * (1 + scale),
                layer.norm2.weight * attn_gate.tanh(),
                layer.ffn_norm1.weight * (1 + mlp_scale),
                layer.ffn_norm2.weight * mlp_gate.tanh(),
            ],
            dim=2,
        )

    def __call__(
        self,
        hidden_states: Tensor,
        modulation: Modulation,
        rotary: Tensor,
        key: Tensor,
        value: Tensor,
        constant: Tensor | None,
    ) -> Tensor:
        normed = _normalise(hidden_states) * modulation.attention_in
        attended = self._attend(normed, rotary, key, value, constant)
        (mixed,) = self.output(attended)
        hidden_states = torch.addcmul(hidden_states, _normalise(mixed), modulation.attention_out)
        (fed,) = self.feed_forward_out(self.gated(_normalise(hidden_states) * modulation.feed_forward_in))
        return torch.addcmul(hidden_states, _normalise(fed), modulation.feed_forward_out)

    def _attend(
        self,
        normed: Tensor,
        rotary: Tensor,
        key: Tensor,
        value: Tensor,
        constant: Tensor | None,
    ) -> Tensor:
        own, cross = self.layer.attn1, self.layer.attn2
        query, own_key, own_value = self.inputs(normed)
        attended = attention(
            apply_rotary(own.split(own.norm_q(query)), rotary),
            apply_rotary(own.split(own.norm_k(own_key)), rotary),
            own.split(own_value),
        ).transpose(1, 2)  # (B, N, h, d)
        rows = key.shape[0]
        (cross_query,) = self.cross_query(normed[:rows])
        cross_query = apply_rotary(cross.split(cross.norm_q(cross_query)), rotary)
        attended[:rows] += attention(cross_query, key, value).transpose(1, 2)
        if constant is not None:
            attended[rows:] += constant
        return attended.flatten(2)


def _normalise(hidden_states: Tensor) -> Tensor:
    """RMSNorm without weights, eps 1e-5 as in all of the DiT's."""
    if hidden_states.device.type != "cpu":
        return F.rms_norm(hidden_states, hidden_states.shape[-1:], eps=1e-5)
    # PyTorch's own takes three passes over the data on the CPU.
    norm = torch.linalg.vector_norm(hidden_states, dim=-1, keepdim=True, dtype=torch.float32)
    factor = (norm.square() / hidden_states.shape[-1] + 1e-5).rsqrt()
    return hidden_states * factor.to(hidden_states.dtype)
