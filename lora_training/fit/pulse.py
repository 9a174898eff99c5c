"""Signs of life within work that takes minutes: one sample of the published DiT on a CPU, say."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from ...blip3o_core.models.nextdit import NextDiT
from ..records import EventSink

# Work that ends within so many seconds is told of by its own event alone.
SIGN_SECONDS = 2.0


class Pulse:
    """Tells "working" events while a fit computes, at most one every SIGN_SECONDS.

    It counts the DiT's layers as they are passed, forwards and backwards; nothing is computed differently.

    Args:
        is_counted: False = layers are not watched, as a compiled network must not be; micro batches are still told.
    """

    def __init__(self, dit: NextDiT, on_event: EventSink, *, is_counted: bool) -> None:
        self.on_event = on_event
        self._layers = len(dit.layers)
        self._hooks = [layer.register_forward_hook(self._after_layer) for layer in dit.layers if is_counted]
        self._is_first = True  # the weights' first use reads them from the disk
        self._event: dict[str, Any] | None = None
        self._passed = self._expected = 0
        self._told_at = 0.0

    @contextmanager
    def during(self, what: str, step: int, total: int) -> Iterator[None]:
        """While this lasts, "working" events tell of it.

        Args:
            what: "prompts", "step" or "measuring", see records.EVENTS.
            step: that is computed, from 1; 0 = before the first.
            total: steps of the run.
        """
        self._event = {"event": "working", "what": what, "step": step, "total": total}
        self._event |= {"micro_batch": 1, "micro_batches": 1}
        self._passed = self._expected = 0
        self._told_at = time.monotonic()
        try:
            yield
        finally:
            self._event = None

    def begin(self, micro_batch: int, micro_batches: int, passes: int) -> None:
        """A micro batch, counted from 1, that goes through the DiT `passes` times, counting the way back."""
        assert self._event is not None
        self._event |= {"micro_batch": micro_batch, "micro_batches": micro_batches}
        self._passed, self._expected = 0, passes * self._layers if self._hooks else 0
        # Compiling comes first and takes minutes.
        self._tell(at_once=self._is_first and not self._hooks)
        self._is_first = self._is_first and bool(self._hooks)

    def close(self) -> None:
        """Watch the layers no longer."""
        for hook in self._hooks:
            hook.remove()

    def _after_layer(self, layer: nn.Module, inputs: Any, output: Tensor) -> None:
        self._pass_layer()
        if output.requires_grad:
            output.register_hook(lambda gradient: self._pass_layer())

    def _pass_layer(self) -> None:
        self._passed += 1
        self._tell()
        self._is_first = self._is_first and self._passed < self._layers

    def _tell(self, at_once: bool = False) -> None:
        now = time.monotonic()
        if self._event is None or not (at_once or now - self._told_at >= SIGN_SECONDS):
            return
        self._told_at = now
        event = self._event
        share = None
        if self._expected:
            within = min(1.0, self._passed / self._expected)
            share = round((event["micro_batch"] - 1 + within) / event["micro_batches"], 4)
        self.on_event({**event, "share": share, "is_first": self._is_first})
