"""Steps of answers over keys and values in fixed places: every step has the same shapes, and can be recorded.

A GPU starts some fifty small kernels for each layer and token; such steps it can record once and replay.

Letters: B rows, N places for tokens, C width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

from ..language.answers import PlainSteps
from ..language.prefixes import cached_layers
from ..models.backbone import NEEDS_CACHE_POSITION, Backbone
from .recording import Record, Recorder

if TYPE_CHECKING:
    from collections.abc import Callable

# Places for tokens that recordings are made for: a question with a picture, and its answer. Longer ones get twice the places.
FEWEST_PLACES = 2048
# All places of a row take 0.12 GB in the 8B model; many rows keep a GPU busy without recording.
MOST_ROWS = 4


class PlacedTokens:
    """Keys and values in fixed places, transformers' StaticCache, and which of them a step sees.

    Attributes:
        cache: with N places for each row.
        place: where this step's keys and values go, (1,).
        is_token: places that hold a token of a row rather than padding, (B, N); true for all places to come.
    """

    def __init__(self, backbone: Backbone, cache: DynamicCache, places: int) -> None:
        self.cache = StaticCache(config=backbone.text.config, max_cache_len=places)
        keys = cached_layers(cache)[0][0]
        self.place = torch.zeros(1, dtype=torch.long, device=keys.device)
        self.is_token = torch.ones(len(keys), places, dtype=torch.bool, device=keys.device)
        self.order = torch.arange(places, device=keys.device)

    def fill(self, cache: DynamicCache, mask: Tensor | None) -> None:
        """Take over the keys and values of a cache; the places to come are masked until then."""
        self.reset()
        for layer, (keys, values) in enumerate(cached_layers(cache)):
            places = ({"cache_position": self.order[: keys.shape[2]]},) if NEEDS_CACHE_POSITION else ()
            self.cache.update(keys, values, layer, *places)
        if mask is not None:
            self.is_token[:, : mask.shape[1]] = mask.bool()

    def reset(self) -> None:
        """Empty all places: a masked one counts nothing, unless a broken answer has left infinities there."""
        self.cache.reset()
        self.place.zero_()
        self.is_token.fill_(True)

    def step(self, backbone: Backbone, token_ids: Tensor, positions: Tensor) -> Tensor:
        """Logits (B, V) after tokens (B,) at positions (B, 1), which take the current place."""
        embeddings = backbone.embed(token_ids[:, None])
        is_seen = self.is_token & (self.order <= self.place)
        bias = torch.zeros_like(is_seen, dtype=embeddings.dtype)
        bias = bias.masked_fill(~is_seen, torch.finfo(embeddings.dtype).min)[:, None, None]
        states = backbone(embeddings, positions.expand(3, -1, -1), bias, self.cache, self.place)
        return backbone.lm_head(states[:, -1])


class AnswerRecorder(Recorder["AnswerRecording"]):
    """Steps recorded for each number of rows and places.

    Args:
        record: how a call is recorded, see compiling.Record.
        is_compiled: compile the steps of single rows before recording: they are the most, and each shape takes a minute.
        places: the fewest to record for.
    """

    def __init__(self, record: Record, *, is_compiled: bool, places: int = FEWEST_PLACES) -> None:
        super().__init__(record, is_compiled=is_compiled)
        self._fewest = places
        self._compiled = torch.compile(PlacedTokens.step, dynamic=False) if is_compiled else None

    def steps(self, backbone: Backbone, cache: DynamicCache, mask: Tensor | None) -> PlainSteps:
        """The steps of an answer to rows whose keys and values are in the cache."""
        rows = len(cached_layers(cache)[0][0])
        if self.is_broken or rows > MOST_ROWS:
            return PlainSteps(backbone, cache, mask)
        if self.has_moved(backbone):
            self.forget()
        return RecordedSteps(self, backbone, cache, mask)

    def recording(
        self, backbone: Backbone, cache: DynamicCache, mask: Tensor | None, inputs: Sequence[Tensor]
    ) -> AnswerRecording | None:
        """A recording with room for one more token and the cache's keys and values in it; None where it fails."""
        rows, length = len(inputs[0]), cache.get_seq_length()
        places = self._fewest
        while places <= length:
            places *= 2

        def make() -> AnswerRecording:
            call = self._compiled if self._compiled is not None and rows == 1 else PlacedTokens.step
            tokens = PlacedTokens(backbone, cache, places)
            # Filled, it has its tensors; empty, it has room for the calls that warm up.
            tokens.fill(cache, mask)
            tokens.reset()
            return AnswerRecording(self.record, tokens, call, backbone, inputs)

        found = self.find((rows, places), make)
        if found is not None:
            found.tokens.fill(cache, mask)
        return found


class RecordedSteps(PlainSteps):
    """The steps of one answer by a recorder's recordings; the cache learns of them at the end."""

    def __init__(
        self, recorder: AnswerRecorder, backbone: Backbone, cache: DynamicCache, mask: Tensor | None
    ) -> None:
        super().__init__(backbone, cache, mask)
        self._recorder = recorder
        self._recording: AnswerRecording | None = None
        self._length = cache.get_seq_length()

    def __call__(self, token_ids: Tensor, positions: Tensor) -> Tensor:
        if self._recording is None or self._length == self._recording.places:
            self.finish()
            self._recording = self._recorder.recording(
                self._backbone, self._cache, self._mask, (token_ids, positions)
            )
        if self._recording is None:
            return super().__call__(token_ids, positions)
        logits = self._recording(self._length, (token_ids, positions))
        self._length += 1
        return logits

    def finish(self) -> None:
        known = self._cache.get_seq_length()
        if self._recording is None or known == self._length:
            return
        for layer, pair in enumerate(cached_layers(self._recording.tokens.cache)):
            keys, values = (each[:, :, known : self._length].clone() for each in pair)
            self._cache.update(keys, values, layer)
        if self._mask is not None:
            self._mask = torch.cat(
                [self._mask, self._mask.new_ones(len(self._mask), self._length - known)], dim=1
            )


class AnswerRecording:
    """A recorded step with tokens and inputs of its own."""

    def __init__(
        self,
        record: Record,
        tokens: PlacedTokens,
        call: Callable[..., Tensor],
        backbone: Backbone,
        inputs: Sequence[Tensor],
    ) -> None:
        self.tokens = tokens
        self.places = len(tokens.order)
        self._inputs = [tensor.clone() for tensor in inputs]
        self._replay = record(lambda *given: call(tokens, backbone, *given), self._inputs)

    def __call__(self, place: int, inputs: Sequence[Tensor]) -> Tensor:
        self.tokens.place.fill_(place)
        for mine, given in zip(self._inputs, inputs, strict=True):
            mine.copy_(given)
        return self._replay()
