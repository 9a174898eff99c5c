"""Answers for nodes: questions asked in small batches, streamed onto the node while they are written, stopped on cancel."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from PIL import Image
from torch import Tensor

from ...blip3o_core.errors import BadInputError
from ...blip3o_core.images import to_pil
from ...blip3o_core.pipeline import SYSTEM_PROMPT
from . import host
from .sockets import BackboneHandle

# Questions answered side by side: more is hardly faster and needs more memory.
ASK_BATCH = 8
STREAM_SECONDS = 0.1


class AnswerStream:
    """Shows answers on the node while they are written, moves its progress bar, and stops on cancel.

    Args:
        node_id: the running node.
        rows: answers in all.
        max_new_tokens: longest answer.
    """

    def __init__(self, node_id: str | None, rows: int, max_new_tokens: int) -> None:
        self.node_id = node_id
        self.answers = [""] * rows
        self.max_new_tokens = max_new_tokens
        self.progress = host.StepProgress(rows * max_new_tokens)
        self.first = 0
        self.tokens = 0
        self.shown = 0.0

    def start_batch(self, first: int) -> None:
        """The next answers are numbers `first` and on."""
        self.first = first
        self.tokens = first * self.max_new_tokens

    def __call__(self, row: int, text: str) -> None:
        self.tokens += 1
        self.progress(min(self.tokens, self.progress.total - 1))
        self.answers[self.first + row] = text
        if time.monotonic() - self.shown >= STREAM_SECONDS:
            host.show_text(join_answers(self.answers), self.node_id)
            self.shown = time.monotonic()

    def finish(self) -> None:
        self.progress(self.progress.total)


def join_answers(answers: Sequence[str]) -> str:
    """Answers as one text for the node: numbered when there are several."""
    if len(answers) == 1:
        return answers[0]
    return "\n".join(f"{number}. {answer}" for number, answer in enumerate(answers, start=1))


def answer_settings(
    max_new_tokens: int, temperature: float, top_p: float, top_k: int, repetition_penalty: float, seed: int
) -> Any:
    """The core's settings of the widgets; the seed is folded into what a generator takes."""
    from ...blip3o_core.language.answers import AnswerSettings

    return AnswerSettings(max_new_tokens, temperature, top_p, top_k, repetition_penalty, seed % 2**63)


def ask_each(
    handle: BackboneHandle,
    chats: Sequence[Sequence[Any]],
    *,
    settings: Any,
    system_prompt: str,
    max_pixels: int,
    node_id: str | None,
) -> list[str]:
    """The answer to each chat, a few at a time, streamed onto the node."""
    stream = AnswerStream(node_id, len(chats), settings.max_new_tokens)
    answers: list[str] = []
    for first in range(0, len(chats), ASK_BATCH):
        stream.start_batch(first)
        answers += handle.pipeline.chat(
            chats[first : first + ASK_BATCH],
            # Answer i depends on seed + i alone, whatever the batches.
            settings=replace(settings, seed=settings.seed + first),
            system_prompt=system_prompt.strip() or SYSTEM_PROMPT,
            max_pixels=max_pixels,
            on_text=stream,
        )
    stream.finish()
    host.show_text(join_answers(answers), node_id)
    return answers


def question_turn(question: str, pictures: Sequence[Image.Image]) -> list[Any]:
    """A chat of one question.

    Raises:
        BadInputError: there is neither a question nor a picture.
    """
    from ...blip3o_core.language.answers import Turn

    if not question.strip():
        raise BadInputError("The question is empty.\nWrite what you want to know.")
    return [Turn("user", question.strip(), tuple(pictures))]


def require_pictures(images: Tensor) -> list[Image.Image]:
    """PIL pictures of an IMAGE that must hold at least one."""
    if images.shape[0] == 0:
        raise BadInputError("There is no picture in the batch.\nConnect at least one picture.")
    return to_pil(images)


def parse_choices(text: str) -> list[str]:
    """Different, non-empty choices, one per line or between commas.

    Raises:
        BadInputError: fewer than two.
    """
    parts = text.splitlines() if "\n" in text.strip() else text.split(",")
    choices = list(dict.fromkeys(part.strip() for part in parts if part.strip()))
    if len(choices) < 2:
        raise BadInputError(
            f"There are {len(choices)} different choices, but at least two are needed.\nWrite one choice per line."
        )
    return choices
