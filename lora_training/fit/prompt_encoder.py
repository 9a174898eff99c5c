"""Conditioning with gradients: prompts through the backbone while its latent queries or layers learn.

The queries come after the prompt, so under causal attention a prompt's own keys and values do not depend on them: as
long as the backbone's layers stay as they are, each prompt is read once and every step runs the queries alone.

Letters: B prompts, L tokens of the longest, Q queries, C width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache

from ...blip3o_core.language.prefixes import cached_layers
from ...blip3o_core.language.prompts import TextTokenizer, generation_text
from ...blip3o_core.language.rows import EncodedRow, embed_rows
from ...blip3o_core.models.backbone import Backbone


@dataclass(frozen=True)
class _Prefix:
    """Keys and values (1, kv_heads, length, d) of a prompt's tokens, one pair per layer."""

    layers: tuple[tuple[Tensor, Tensor], ...]
    length: int


class PromptEncoder:
    """Prompts -> conditioning (B, Q, C), differentiable in the queries and, where they learn, the layers.

    Args:
        are_layers_fixed: nothing but the queries learns: keep each prompt's keys and values.
    """

    def __init__(self, backbone: Backbone, tokenizer: TextTokenizer, *, are_layers_fixed: bool) -> None:
        self.backbone = backbone
        self.tokenizer = tokenizer
        self.are_layers_fixed = are_layers_fixed
        self._prefixes: dict[str, _Prefix] = {}

    def __call__(self, prompts: Sequence[str]) -> Tensor:
        """Conditioning with the published template; equal prompts are computed once."""
        unique = list(dict.fromkeys(prompts))
        encode = self._after_prefixes if self.are_layers_fixed else self._whole
        conditioning = encode(unique)
        if len(unique) == len(prompts):
            return conditioning
        return conditioning[[unique.index(prompt) for prompt in prompts]]

    @property
    def _device(self) -> torch.device:
        return self.backbone.latent_queries.device

    def _embed(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor | None]:
        rows = [
            EncodedRow(self.tokenizer.encode_for_generation(generation_text(prompt))) for prompt in prompts
        ]
        with torch.no_grad():
            return embed_rows(self.backbone, self.tokenizer, rows, self._device)

    def _whole(self, prompts: Sequence[str]) -> Tensor:
        return self.backbone.encode_conditioning(*self._embed(prompts))

    @torch.no_grad()
    def _read(self, prompt: str) -> _Prefix:
        if prompt not in self._prefixes:
            embeddings, _ = self._embed([prompt])
            length = embeddings.shape[1]
            cache = DynamicCache()
            positions = torch.arange(length, device=self._device).expand(3, 1, -1)
            self.backbone(embeddings, positions, None, cache)
            self._prefixes[prompt] = _Prefix(tuple(cached_layers(cache)), length)
        return self._prefixes[prompt]

    def _after_prefixes(self, prompts: Sequence[str]) -> Tensor:
        prefixes = [self._read(prompt) for prompt in prompts]
        longest = max(prefix.length for prefix in prefixes)
        cache = DynamicCache()
        for layer in range(len(prefixes[0].layers)):
            keys, values = (
                torch.cat(
                    [
                        F.pad(prefix.layers[layer][which], (0, 0, longest - prefix.length, 0))
                        for prefix in prefixes
                    ]
                )
                for which in (0, 1)
            )
            cache.update(keys, values, layer)
        embedded = prefixes[0].layers[0][0]
        queries = self.backbone.latent_queries.to(embedded).expand(len(prompts), -1, -1)
        lengths = torch.tensor([prefix.length for prefix in prefixes], device=self._device)[:, None]
        positions = lengths + torch.arange(queries.shape[1], device=self._device)
        places = torch.arange(longest + queries.shape[1], device=self._device)
        mask = (places >= longest - lengths).long()
        return self.backbone(queries, positions.expand(3, -1, -1), mask, cache)
