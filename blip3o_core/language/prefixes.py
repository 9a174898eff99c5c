"""Beginnings that rows of input share, with each other or with an earlier turn: computed once, their keys and values reused.

Letters: B rows, L tokens.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache

from ..models.backbone import Backbone
from .prompts import TextTokenizer
from .rows import EncodedRow, embed_rows

# Below so many saved tokens a second call of the backbone costs more than it saves. A GPU reads all weights for that call,
# in the time of some hundred tokens' arithmetic.
WORTHWHILE_TOKENS = 64
WORTHWHILE_GPU_FACTOR = 8


def split_row(row: EncodedRow, place: int, image_pad: int, merge_size: int) -> tuple[EncodedRow, EncodedRow]:
    """The first `place` tokens of a row and the rest, each with its own images; `place` must not lie inside an image."""
    pads = row.token_ids[:place].count(image_pad)
    images = 0
    while pads > 0:
        pads -= row.patches[images].shape[0] // merge_size**2
        images += 1
    assert pads == 0, f"token {place} lies inside an image"
    return (
        EncodedRow(row.token_ids[:place], row.patches[:images], row.grids[:images]),
        EncodedRow(row.token_ids[place:], row.patches[images:], row.grids[images:]),
    )


def common_length(one: EncodedRow, other: EncodedRow, image_pad: int, merge_size: int) -> int:
    """Leading tokens that two rows share, pictures compared by their pixels; ends before a picture rather than inside."""
    length = 0
    for mine, theirs in zip(one.token_ids, other.token_ids, strict=False):
        if mine != theirs:
            break
        length += 1
    place = 0
    for patches, grid, known, known_grid in zip(
        one.patches, one.grids, other.patches, other.grids, strict=False
    ):
        place = one.token_ids.index(image_pad, place)
        end = place + patches.shape[0] // merge_size**2
        if place >= length:
            break
        is_same = patches is known or (grid == known_grid and torch.equal(patches, known))
        if end > length or not is_same:
            return place
        place = end
    return length


@dataclass(frozen=True)
class Beginning:
    """What the backbone keeps of the first tokens of every row.

    Attributes:
        length: tokens.
        cache: their keys and values, for all rows.
        rests: what follows in each row.
    """

    length: int
    cache: DynamicCache
    rests: list[EncodedRow]


def encode_shared(
    backbone: Backbone,
    tokenizer: TextTokenizer,
    rows: Sequence[EncodedRow],
    positions: Tensor,
    device: torch.device,
    *,
    at_most: int | None = None,
) -> Beginning | None:
    """Compute what all rows begin with once; None when that is too little to be worth it.

    Args:
        positions: of the first row's tokens, (3, L).
        at_most: tokens to take as common, the rest is computed for each row.
    """
    image_pad, merge_size = tokenizer.image_pad, backbone.merge_size
    # At least one token of each row is left, whose state is asked for.
    length = min(min(len(row.token_ids) for row in rows) - 1, at_most or sys.maxsize)
    for row in rows[1:]:
        length = min(length, common_length(rows[0], row, image_pad, merge_size))
    length = _outside_images(rows[0], length, image_pad, merge_size)
    least = WORTHWHILE_TOKENS * (1 if device.type == "cpu" else WORTHWHILE_GPU_FACTOR)
    if length * (len(rows) - 1) < least:
        return None
    head, _ = split_row(rows[0], length, image_pad, merge_size)
    embeddings, _ = embed_rows(backbone, tokenizer, [head], device)
    cache = DynamicCache()
    backbone(embeddings, positions[:, None, :length].to(device), None, cache)
    cache.batch_repeat_interleave(len(rows))
    return Beginning(length, cache, [split_row(row, length, image_pad, merge_size)[1] for row in rows])


class KeptChat:
    """Keys and values of the last chat, so that its next turn computes only what is new: an image is looked at once.

    Args:
        is_put_away: keep them in main memory between turns, because the device is wanted for other networks.
    """

    def __init__(self, *, is_put_away: bool = False) -> None:
        self._is_put_away = is_put_away
        self._row: EncodedRow | None = None
        self._cache: DynamicCache | None = None
        self._weights: object = None

    def take(
        self, backbone: Backbone, row: EncodedRow, image_pad: int, device: torch.device
    ) -> Beginning | None:
        """What is known of a row's beginning, or None. It is handed over: nothing is kept until the next `keep`."""
        known, cache, weights = self._row, self._cache, self._weights
        self.clear()
        if known is None or cache is None or weights != _weights_key(backbone):
            return None
        merge_size = backbone.merge_size
        cached = cache.get_seq_length()
        length = min(common_length(row, known, image_pad, merge_size), len(row.token_ids) - 1, cached)
        length = _outside_images(row, length, image_pad, merge_size)
        if length == 0:
            return None
        if length < cached:
            cache.crop(length - cached)  # negative: so many tokens less
        move_cache(cache, device)
        return Beginning(length, cache, [split_row(row, length, image_pad, merge_size)[1]])

    def keep(self, backbone: Backbone, row: EncodedRow, cache: DynamicCache) -> None:
        """Remember the keys and values of a row, question and answer."""
        if self._is_put_away:
            move_cache(cache, torch.device("cpu"))
        self._row, self._cache, self._weights = row, cache, _weights_key(backbone)

    def clear(self) -> None:
        self._row = self._cache = self._weights = None


def cached_layers(cache: Cache) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of each layer, (B, heads, L, d)."""
    return [(layer.keys, layer.values) for layer in _filled(cache)]


def move_cache(cache: Cache, device: torch.device) -> None:
    """Bring all keys and values to a device, in place."""
    for layer in _filled(cache):
        layer.keys, layer.values = layer.keys.to(device), layer.values.to(device)


def _filled(cache: Cache) -> list[Any]:
    """The layers of a cache that holds something; to the library their keys and values may be missing."""
    return cache.layers


def _outside_images(row: EncodedRow, length: int, image_pad: int, merge_size: int) -> int:
    """The length, cut to before the image it would end in."""
    place = 0
    for patches in row.patches:
        place = row.token_ids.index(image_pad, place)
        end = place + patches.shape[0] // merge_size**2
        if place < length < end:
            return place
        place = end
    return length


def _weights_key(backbone: Backbone) -> tuple[object, ...]:
    """Changes when weights are exchanged or changed in place."""
    return weakref.ref(backbone), *(
        (id(parameter), 0 if parameter.is_inference() else parameter._version)
        for parameter in backbone.parameters()
    )
