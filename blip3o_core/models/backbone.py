"""Backbone: Qwen2.5-VL with 64 learned latent queries; turns prompts into conditioning and continues texts.

The parts are transformers' own modules, held side by side, so that one class serves every transformers release
since 4.57, whatever way it nests them.

Letters: B batch, L tokens, Q latent queries, C width, P patches of all images together.
"""

from __future__ import annotations

import inspect
from copy import deepcopy
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as qwen

TEXT_FIELDS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
)
VISION_FIELDS = (
    "depth",
    "hidden_size",
    "hidden_act",
    "intermediate_size",
    "num_heads",
    "in_channels",
    "patch_size",
    "spatial_merge_size",
    "temporal_patch_size",
    "tokens_per_second",
    "window_size",
    "out_hidden_size",
    "fullatt_block_indexes",
)
TEXT_MODEL = qwen.Qwen2_5_VLTextModel
# The library types them as the base of all configurations, or None.
TEXT_CONFIG: Any = TEXT_MODEL.config_class
# transformers 5.24 renamed the argument. Its forward takes any name, and computes without a cache if it is the wrong one.
_OFFERED = inspect.signature(TEXT_MODEL.forward).parameters
CACHE_ARGUMENT = "cache" if "cache" in _OFFERED else "past_key_values"
# Up to 5.4 a cache with fixed places does not know by itself which ones are next.
NEEDS_CACHE_POSITION = "cache_position" in _OFFERED
VISION_MODEL = qwen.Qwen2_5_VisionTransformerPretrainedModel
VISION_CONFIG: Any = VISION_MODEL.config_class


def text_config(config: dict[str, Any], vocab_size: int) -> Any:
    """transformers' text configuration from a published config.json, flat or with a nested `text_config`."""
    source = config.get("text_config") or config
    # Copied: transformers writes into the tables it is given, and the checkpoint's own config must stay as it is read.
    fields = {name: deepcopy(source[name]) for name in TEXT_FIELDS if source.get(name) is not None}
    # Special tokens are looked up in the checkpoint's tokenizer; the library's defaults may lie outside the vocabulary.
    special = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    return TEXT_CONFIG(
        vocab_size=vocab_size, use_sliding_window=False, tie_word_embeddings=False, **special, **fields
    )


def vision_config(config: dict[str, Any]) -> Any:
    """transformers' vision configuration from a published config.json."""
    source = config["vision_config"]
    return VISION_CONFIG(**{name: source[name] for name in VISION_FIELDS if source.get(name) is not None})


class Backbone(nn.Module):
    """Qwen2.5-VL (`text`, `visual`, `lm_head`) and the latent queries.

    Args:
        config: a published config.json.
        vocab_size: rows of the token embedding.
        queries: number of latent queries, 64 as published.
        tie_head: the head shares the embedding's weights (4B base model).
    """

    def __init__(self, config: dict[str, Any], *, vocab_size: int, queries: int, tie_head: bool) -> None:
        super().__init__()
        text = text_config(config, vocab_size)
        self.text = TEXT_MODEL(text)
        self.visual = VISION_MODEL(vision_config(config))
        self.lm_head = nn.Linear(text.hidden_size, vocab_size, bias=False)
        self.latent_queries = nn.Parameter(torch.zeros(1, queries, text.hidden_size))
        self.is_head_tied = tie_head
        if tie_head:
            self.lm_head.weight = self.text.embed_tokens.weight

    @property
    def width(self) -> int:
        """Width C of the conditioning."""
        return self.latent_queries.shape[-1]

    @property
    def merge_size(self) -> int:
        """Patches along one side that become one image token."""
        return self.visual.spatial_merge_size

    @property
    def patch_size(self) -> int:
        """Pixels along one side of a patch."""
        return cast(int, self.visual.patch_size)

    @property
    def temporal_patch_size(self) -> int:
        """Pictures of a film in one patch."""
        return cast(int, self.visual.patch_embed.temporal_patch_size)

    def embed(self, token_ids: Tensor) -> Tensor:
        """Token embeddings (B, L, C)."""
        return self.text.embed_tokens(token_ids)

    def encode_images(self, patches: Tensor, grids: Tensor) -> Tensor:
        """Image tokens of all images in a row, (P / merge^2, C).

        Args:
            patches: flattened patches of all images, (P, channels x 2 x patch x patch).
            grids: time, rows and columns of patches per image, (images, 3).
        """
        weight = self.visual.patch_embed.proj.weight
        features = self.visual(patches.to(weight.dtype), grids)
        # A tensor up to transformers 4.5x, an output object later.
        return features if isinstance(features, Tensor) else features.pooler_output

    def forward(
        self,
        embeddings: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor | None = None,
        cache: Cache | None = None,
        cache_position: Tensor | None = None,
    ) -> Tensor:
        """Hidden states after the final norm, (B, L, C).

        Args:
            embeddings: (B, L, C).
            position_ids: time, row and column positions, (3, B, L).
            attention_mask: 1 = token, 0 = padding, over cache and new tokens, (B, cached + L); None = no padding. Or
                what is added to the attention's scores, (B, 1, L, cached + L).
            cache: keys and values of earlier tokens; extended in place.
            cache_position: places of the new tokens in a StaticCache, (L,); None = the next ones.
        """
        arguments: dict[str, Any] = {CACHE_ARGUMENT: cache}
        if cache_position is not None and NEEDS_CACHE_POSITION:
            arguments["cache_position"] = cache_position
        return self.text(
            inputs_embeds=embeddings,
            position_ids=position_ids,
            attention_mask=attention_mask,
            use_cache=cache is not None,
            **arguments,
        ).last_hidden_state

    def encode_conditioning(
        self, embeddings: Tensor, attention_mask: Tensor | None = None, cache: Cache | None = None
    ) -> Tensor:
        """Hidden states at the latent queries, which follow the prompt, (B, Q, C).

        Positions are plain 0..L-1 on all three axes even when the prompt holds an image, as published.

        Args:
            embeddings: the prompt up to and including `[IMG]`, padded on the left, (B, L, C).
            attention_mask: 1 = token, 0 = padding, (B, L); None = no padding.
            cache: keys and values of tokens that all prompts begin with and `embeddings` leaves out.
        """
        batch = embeddings.shape[0]
        queries = self.latent_queries.to(embeddings).expand(batch, -1, -1)
        embeddings = torch.cat([embeddings, queries], dim=1)
        before = 0 if cache is None else cache.get_seq_length()
        if attention_mask is None:
            positions = torch.arange(embeddings.shape[1], device=embeddings.device).expand(batch, -1)
        else:
            attention_mask = torch.cat(
                [attention_mask, attention_mask.new_ones(batch, queries.shape[1])], dim=1
            )
            positions = (attention_mask.cumsum(dim=1) - 1).clamp(min=0)
            attention_mask = torch.cat([attention_mask.new_ones(batch, before), attention_mask], dim=1)
        hidden_states = self(embeddings, (before + positions).expand(3, -1, -1), attention_mask, cache)
        return hidden_states[:, -queries.shape[1] :]
