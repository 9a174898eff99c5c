"""The NextDiT rearranged for one sampling run: the same numbers from fewer, larger and cheaper operations.

What depends on the weights, the prompt or the noise level alone is computed before the first step: the modulations of
all noise levels in one product per layer, gated values of the context. Only for networks whose layers
are plain and need no gradients, see can_fuse; NextDiT.forward is the reference for every number here.

Letters: B rows, R of them with a real prompt, N feature tokens, D model width, h heads, d head width, T noise levels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..drawing.sampling import CachedDiT
from ..models.nextdit import (
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
from .linear import PLAIN_LINEARS, ParallelLinears, multiply

if TYPE_CHECKING:
    from .recording import StepRecorder

# Modulations are kept for so many noise levels at a time.
MODULATION_BYTES = 64 * 2**20
PLAIN_LAYERS = (
    *PLAIN_LINEARS,
    *(nn.LayerNorm, nn.RMSNorm, nn.ModuleList, nn.Sequential),
    *(NextDiT, NextDiTBlock, AdaptiveRMSNorm, Attention, CaptionProjection, FeedForward, OutputNorm),
    *(PatchEmbedder, TimeCaptionEmbedding, TimestepMLP),
)


def can_fuse(dit: nn.Module) -> bool:
    """Whether a DiT consists of its own plain layers, all on one device, outside training.

    A wrapped layer (an adapter, a host's or an accelerator's hooks) computes in a way of its own and must be called.
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
            for module in dit.modules()
        )
    )


@dataclass(frozen=True)
class RunContext:
    """What one prompt adds to a run.

    Attributes:
        pooled: projected mean of the conditioning, (B, time_dim).
        keys, values: of all layers, (layers, R, h, L, d); the values carry their layer's gate.
        constants: gated attention of the B - R rows without a prompt, (layers, 1, 1, h, d), or None.
    """

    pooled: Tensor
    keys: Tensor
    values: Tensor
    constants: Tensor | None

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What FusedStep reads."""
        both = (self.keys, self.values)
        return both if self.constants is None else (*both, self.constants)


class FusedStep:
    """One call of the network as a function of tensors alone, which a graph can record. Reads the weights as they are now.

    Args:
        dit: a network for which can_fuse holds.
        grid_size: rows and columns of the feature grid.
        call_layer: how a layer is called, compiled or not.
    """

    def __init__(
        self, dit: NextDiT, grid_size: Sequence[int], call_layer: Callable[..., Tensor] | None = None
    ) -> None:
        self.dit = dit
        weight = dit.patch_embedder.proj.weight
        rows, columns = grid_size
        self.rotary = rotary_table(rows, columns, dit.config.head_dim, weight.device)
        self.layers = [FusedLayer(layer) for layer in dit.blocks]
        self.call_layer = call_layer or FusedLayer.__call__

    def __call__(
        self,
        feature_grid: Tensor,
        modulations: Tensor,
        out_scale: Tensor,
        keys: Tensor,
        values: Tensor,
        constants: Tensor | None = None,
    ) -> Tensor:
        """Velocity (B, channels, H, W) of noisy features (B, channels, H, W).

        Args:
            modulations, out_scale: see modulations().
            keys, values, constants: see RunContext.
        """
        hidden_states = self.dit.patch_embedder(feature_grid)
        for index, layer in enumerate(self.layers):
            constant = None if constants is None else constants[index]
            hidden_states = self.call_layer(
                *(layer, hidden_states, modulations[index], self.rotary, keys[index], values[index], constant)
            )
        normed = F.layer_norm(hidden_states, hidden_states.shape[-1:], eps=1e-6) * out_scale
        velocity = self.dit.norm_out.linear_2(normed)
        return velocity.transpose(1, 2).unflatten(2, feature_grid.shape[-2:])

    def modulations(self, times: Tensor, pooled: Tensor) -> tuple[Tensor, Tensor]:
        """Factors of all layers, (T, layers, B, 4, 1, D), and of the output norm, (T, B, 1, D), norm weights included.

        Args:
            times: embedded timesteps, (T, time_dim).
            pooled: (B, time_dim).
        """
        embedding = F.silu(times[:, None] + pooled)  # (T, B, time_dim)
        levels, batch, _ = embedding.shape
        factors = embedding.new_empty(levels, len(self.layers), batch, 4, 1, self.dit.config.dim)
        for index, layer in enumerate(self.layers):
            layer.modulations(embedding, out=factors[:, index])
        return factors, (1 + self.dit.norm_out.linear_1(embedding))[:, :, None]

    def prepare_context(self, context: DiTContext) -> RunContext:
        """Repeat grouped keys and values for all heads and fold each layer's gate into the values."""
        heads, dtype = self.dit.config.heads, context.keys[0].dtype
        gates = torch.stack([layer.gate.to(dtype).tanh() for layer in self.dit.blocks])  # (layers, h)
        groups = heads // self.dit.config.kv_heads
        keys = torch.stack(context.keys).repeat_interleave(groups, dim=2)
        values = torch.stack(context.values).repeat_interleave(groups, dim=2) * gates[:, None, :, None, None]
        constants = None
        if context.zero_values is not None:
            constants = torch.stack(context.zero_values).repeat_interleave(groups, dim=1) * gates[..., None]
            constants = constants[:, None, None]
        return RunContext(context.pooled, keys, values, constants)


class FusedDiT:
    """A DiT prepared for one run. Make a new one after changing its weights.

    Args:
        dit: a network for which can_fuse holds.
        timesteps: of all noise levels, (T,).
        grid_size: rows and columns of the feature grid.
        recorder: records its steps and replays them; None = they are called.
    """

    def __init__(
        self,
        dit: NextDiT,
        timesteps: Tensor,
        grid_size: Sequence[int],
        recorder: StepRecorder | None = None,
    ) -> None:
        assert can_fuse(dit)
        self.dit = dit
        weight = dit.patch_embedder.proj.weight
        self.dtype = weight.dtype
        self.times = dit.time_caption_embed.embed_timestep(timesteps.to(weight.device), self.dtype)
        self.recorder = recorder
        self.step = FusedStep(dit, grid_size) if recorder is None else recorder.step(dit, grid_size)
        self._chunks: dict[int, tuple[int, Tensor, Tensor]] = {}

    def encode_context(self, conditioning: Tensor, *, zero_rows: int = 0) -> RunContext:
        """See NextDiT.encode_context."""
        return self.step.prepare_context(self.dit.encode_context(conditioning, zero_rows=zero_rows))

    def __call__(self, feature_grid: Tensor, index: int, context: RunContext) -> Tensor:
        """Velocity (B, channels, H, W) of noisy features (B, channels, H, W) at the index-th noise level."""
        inputs = (feature_grid, *self._modulations(index, context), *context.tensors)
        return self.step(*inputs) if self.recorder is None else self.recorder(self.step, inputs)

    def _modulations(self, index: int, context: RunContext) -> tuple[Tensor, Tensor]:
        """Of every layer, (layers, B, 4, 1, D), and of the output norm, (B, 1, D), at one noise level."""
        layers, batch = len(self.step.layers), context.pooled.shape[0]
        level_bytes = layers * batch * 4 * self.dit.config.dim * self.dtype.itemsize
        size = max(1, min(len(self.times), MODULATION_BYTES // level_bytes))
        first = index // size * size
        if self._chunks.get(id(context), (-1,))[0] != first:
            made = self.step.modulations(self.times[first : first + size], context.pooled)
            self._chunks[id(context)] = (first, *made)
        _, factors, out_scales = self._chunks[id(context)]
        return factors[index - first], out_scales[index - first]


class PreparedRuns:
    """Makes a DiT ready for a sampling run in the fastest way that its layers allow; see sampling.PrepareRun.

    Args:
        recorder: of the DiT's steps; None = they are called.
    """

    def __init__(self, recorder: StepRecorder | None = None) -> None:
        self.recorder = recorder

    def __call__(self, dit: NextDiT, timesteps: Tensor, grid_size: Sequence[int]) -> FusedDiT | CachedDiT:
        if can_fuse(dit):
            return FusedDiT(dit, timesteps, grid_size, self.recorder)
        return CachedDiT(dit, timesteps, grid_size)


class FusedLayer:
    """A block of the network: layers that read the same input together, modulations instead of a time embedding."""

    def __init__(self, layer: NextDiTBlock) -> None:
        self.layer = layer
        own, feed_forward = layer.attn1, layer.feed_forward
        self.inputs = ParallelLinears(own.to_q, own.to_k, own.to_v)
        self.gate_and_up = ParallelLinears(feed_forward.linear_1, feed_forward.linear_3)

    def modulations(self, embedding: Tensor, out: Tensor) -> None:
        """Write the factors for (T, B, time_dim) into (T, B, 4, 1, D): into attention, out of it, and of the feed-forward."""
        layer = self.layer
        scale, attn_gate, mlp_scale, mlp_gate = (
            layer.norm1.linear(embedding).unflatten(-1, (4, 1, -1)).unbind(2)
        )
        torch.mul(layer.norm1.norm.weight, 1 + scale, out=out[:, :, 0])
        torch.mul(layer.norm2.weight, attn_gate.tanh(), out=out[:, :, 1])
        torch.mul(layer.ffn_norm1.weight, 1 + mlp_scale, out=out[:, :, 2])
        torch.mul(layer.ffn_norm2.weight, mlp_gate.tanh(), out=out[:, :, 3])

    def __call__(
        self,
        hidden_states: Tensor,
        modulations: Tensor,
        rotary: Tensor,
        key: Tensor,
        value: Tensor,
        constant: Tensor | None,
    ) -> Tensor:
        """(B, N, D) -> (B, N, D) with modulations (B, 4, 1, D), keys and values (R, h, L, d) and constant (1, 1, h, d)."""
        attention_in, attention_out, feed_forward_in, feed_forward_out = modulations.unbind(1)
        attended = self._attend(_normalise(hidden_states) * attention_in, rotary, key, value, constant)
        mixed = multiply(attended, cast(nn.Linear, self.layer.attn2.to_out[0]).weight)
        hidden_states = torch.addcmul(hidden_states, _normalise(mixed), attention_out)
        gate, up = self.gate_and_up(_normalise(hidden_states) * feed_forward_in)
        fed = multiply(F.silu(gate) * up, self.layer.feed_forward.linear_2.weight)
        return torch.addcmul(hidden_states, _normalise(fed), feed_forward_out)

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
        cross_query = multiply(normed[:rows], cross.to_q.weight)
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
