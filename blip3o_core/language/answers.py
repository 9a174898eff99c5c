"""Answers: questions, captions, chats and choices about pictures, with the backbone alone.

Letters: B rows, L tokens of the longest row, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from PIL import Image
from torch import Tensor
from transformers import DynamicCache
from transformers.generation.logits_process import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ..errors import BadInputError, check_range
from ..models.backbone import Backbone
from ..seeds import MAX_SEED, item_seeds
from .prefixes import Beginning, KeptChat, encode_shared
from .prompts import SYSTEM_PROMPT, Message, TextTokenizer, chat_text
from .rows import EncodedRow, PixelLimits, embed_rows, encode_picture, padded_positions, rope_positions

# How the steps of an answer are made: (backbone, keys and values of the rows so far, their mask) -> steps.
MakeSteps = Callable[[Backbone, DynamicCache, "Tensor | None"], "PlainSteps"]
# on_text(row, answer so far); return True to end that answer, raise to stop everything.
TextCallback = Callable[[int, str], "bool | None"]

YES_WORDS = ("Yes", "yes")
NO_WORDS = ("No", "no")


@dataclass(frozen=True)
class AnswerSettings:
    """How answers are written.

    Attributes:
        max_new_tokens: longest answer, tokens.
        temperature: 0 = always the likeliest token; 0.7 is lively.
        top_p: keep the likeliest tokens that together have this probability; 1 = all.
        top_k: keep so many of the likeliest tokens; 0 = all.
        repetition_penalty: above 1 avoids tokens of question and answer so far; 1 = off.
        seed: of the first row; row i uses seed + i.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_range("max_new_tokens", self.max_new_tokens, 1, 32768)
        check_range("temperature", self.temperature, 0, 10)
        check_range("top_p", self.top_p, 0.01, 1)
        check_range("top_k", self.top_k, 0, 200_000)
        check_range("repetition_penalty", self.repetition_penalty, 0.1, 10)
        check_range("seed", self.seed, 0, MAX_SEED)


@dataclass(frozen=True)
class Turn:
    """One turn of a chat: who speaks ("user" or "assistant"), what, and the pictures shown with it."""

    role: str
    text: str
    images: tuple[Image.Image, ...] = ()


def written_chat(turns: Sequence[Turn], system_prompt: str = SYSTEM_PROMPT) -> str:
    """A chat as one text up to the assistant's next answer; needs no network.

    Raises:
        BadInputError: no user turn at the end, or a text that does not name a place for each of its pictures.
    """
    if not turns or turns[-1].role != "user":
        raise BadInputError("There is nothing to answer: the chat must end with a question from the user.")
    return chat_text([Message(turn.role, turn.text, len(turn.images)) for turn in turns], system_prompt)


def encode_chat(
    backbone: Backbone,
    tokenizer: TextTokenizer,
    turns: Sequence[Turn],
    limits: PixelLimits,
    system_prompt: str = SYSTEM_PROMPT,
) -> EncodedRow:
    """Tokens and patches of a chat up to the assistant's next answer.

    Raises:
        BadInputError: see written_chat.
    """
    text = written_chat(turns, system_prompt)
    encoded = [encode_picture(backbone, image, limits) for turn in turns for image in turn.images]
    token_ids = tokenizer.encode(text, [tokens for _, _, tokens in encoded])
    return EncodedRow(token_ids, [patches for patches, _, _ in encoded], [grid for _, grid, _ in encoded])


class PlainSteps:
    """The steps of one answer, with keys and values that grow by each token.

    Args:
        cache: keys and values of the rows so far; extended in place.
        mask: 1 = token, 0 = padding, of the rows so far; None = no padding.
    """

    def __init__(self, backbone: Backbone, cache: DynamicCache, mask: Tensor | None) -> None:
        self._backbone, self._cache, self._mask = backbone, cache, mask

    def __call__(self, token_ids: Tensor, positions: Tensor) -> Tensor:
        """Logits (B, V) after tokens (B,) at positions (B, 1)."""
        if self._mask is not None:
            self._mask = torch.cat([self._mask, self._mask.new_ones(len(token_ids), 1)], dim=1)
        embeddings = self._backbone.embed(token_ids[:, None])
        states = self._backbone(embeddings, positions.expand(3, -1, -1), self._mask, self._cache)
        return self._backbone.lm_head(states[:, -1])

    def finish(self) -> None:
        """Bring the cache up to date."""


@torch.no_grad()
def write_answers(
    backbone: Backbone,
    tokenizer: TextTokenizer,
    rows: Sequence[EncodedRow],
    *,
    device: torch.device,
    settings: AnswerSettings | None = None,
    on_text: TextCallback | None = None,
    kept: KeptChat | None = None,
    make_steps: MakeSteps | None = None,
) -> list[str]:
    """Continue each row until it ends its turn; row i equals the same row answered alone.

    Args:
        device: where the backbone computes.
        kept: what is known of a single chat's earlier turns; updated.
        on_text: called as on_text(row, answer so far) after each token; return True to end that answer, raise to stop.
        make_steps: None = PlainSteps.
    """
    return [
        tokenizer.decode(token_ids).strip()
        for token_ids in continue_rows(
            backbone,
            tokenizer,
            rows,
            device=device,
            settings=settings,
            on_text=on_text,
            kept=kept,
            make_steps=make_steps,
        )
    ]


@torch.no_grad()
def continue_rows(
    backbone: Backbone,
    tokenizer: TextTokenizer,
    rows: Sequence[EncodedRow],
    *,
    device: torch.device,
    settings: AnswerSettings | None = None,
    on_text: TextCallback | None = None,
    kept: KeptChat | None = None,
    make_steps: MakeSteps | None = None,
) -> list[list[int]]:
    """Token ids of each row's answer, without the token that ended it."""
    settings = settings or AnswerSettings()
    choose_token = _token_chooser(settings, [row.token_ids for row in rows])
    longest = max(len(row.token_ids) for row in rows)
    positions, following = padded_positions(rows, longest, tokenizer.image_pad, backbone.merge_size)
    known: Beginning | None = None
    if kept is not None and len(rows) == 1:
        known = kept.take(backbone, rows[0], tokenizer.image_pad, device)
    embeddings, mask = embed_rows(backbone, tokenizer, known.rests if known else rows, device)
    positions, following = positions[..., -embeddings.shape[1] :].to(device), following.to(device)
    cache = known.cache if known else DynamicCache()
    answers: list[list[int]] = [[] for _ in rows]
    is_open = [True] * len(rows)
    logits = backbone.lm_head(backbone(embeddings, positions, mask, cache)[:, -1])
    next_logits = (make_steps or PlainSteps)(backbone, cache, mask)
    for step in range(settings.max_new_tokens):
        token_ids = choose_token(logits.float(), answers)
        for row, token in enumerate(token_ids.tolist()):
            if not is_open[row]:
                continue
            if token in tokenizer.stop_tokens:
                is_open[row] = False
                continue
            answers[row].append(token)
            if on_text is not None and on_text(row, tokenizer.decode(answers[row])):
                is_open[row] = False
        if not any(is_open) or step + 1 == settings.max_new_tokens:
            break
        logits = next_logits(token_ids.to(device), following + step)
    next_logits.finish()
    if kept is not None and len(rows) == 1:
        kept.keep(backbone, replace(rows[0], token_ids=rows[0].token_ids + answers[0]), cache)
    return answers


@torch.no_grad()
def choice_log_probabilities(
    backbone: Backbone,
    tokenizer: TextTokenizer,
    row: EncodedRow,
    choices: Sequence[str],
    *,
    device: torch.device,
    is_whole_answer: bool = True,
) -> Tensor:
    """Log-probability of each choice as the answer to a row, (len(choices),), float32.

    Args:
        is_whole_answer: count the end of the turn too, so that "red" does not win over "red circle" by being shorter.
    """
    end = [tokenizer.end_of_turn] if is_whole_answer else []
    continuations = [tokenizer.encode(choice) + end for choice in choices]
    for choice, tokens in zip(choices, continuations, strict=True):
        if len(tokens) == len(end):
            raise BadInputError(f'The choice "{choice}" is empty.\nWrite at least one word for each choice.')
    rows = [EncodedRow(row.token_ids + tokens, row.patches, row.grids) for tokens in continuations]
    # The token before each choice predicts its first: it is not part of what is computed once.
    question = replace(row, token_ids=row.token_ids[:-1])
    shared = encode_shared(
        *(backbone, tokenizer, rows),
        rope_positions(question, tokenizer.image_pad, backbone.merge_size),
        device,
        at_most=len(row.token_ids) - 1,
    )
    embeddings, mask = embed_rows(backbone, tokenizer, shared.rests if shared else rows, device)
    if shared and mask is not None:
        mask = torch.cat([mask.new_ones(len(rows), shared.length), mask], dim=1)
    longest = max(len(each.token_ids) for each in rows)
    positions, _ = padded_positions(rows, longest, tokenizer.image_pad, backbone.merge_size)
    positions = positions[..., -embeddings.shape[1] :]
    hidden_states = backbone(embeddings, positions.to(device), mask, shared.cache if shared else None)
    scores = []
    for index, tokens in enumerate(continuations):
        # The state before each token predicts it; rows end at the right edge.
        states = hidden_states[index, -len(tokens) - 1 : -1]
        log_probabilities = backbone.lm_head(states).float().log_softmax(dim=-1)
        targets = torch.tensor(tokens, device=log_probabilities.device)
        scores.append(log_probabilities.gather(1, targets[:, None]).sum())
    return torch.stack(scores).cpu()


def yes_probability(
    backbone: Backbone, tokenizer: TextTokenizer, row: EncodedRow, device: torch.device
) -> float:
    """Probability, 0 to 1, that the answer to a row begins with yes rather than no."""
    scores = choice_log_probabilities(
        backbone, tokenizer, row, [*YES_WORDS, *NO_WORDS], device=device, is_whole_answer=False
    )
    yes = scores[: len(YES_WORDS)].logsumexp(0)
    no = scores[len(YES_WORDS) :].logsumexp(0)
    return torch.sigmoid(yes - no).item()


def _token_chooser(
    settings: AnswerSettings, prompts: list[list[int]]
) -> Callable[[Tensor, list[list[int]]], Tensor]:
    """A function (logits (B, V), answers so far) -> next tokens (B,), with one generator per row."""
    warpers = LogitsProcessorList()
    if settings.temperature > 0:
        warpers.append(TemperatureLogitsWarper(float(settings.temperature)))
        if settings.top_k:
            warpers.append(TopKLogitsWarper(settings.top_k))
        if settings.top_p < 1:
            warpers.append(TopPLogitsWarper(settings.top_p))
    penalty = RepetitionPenaltyLogitsProcessor(float(settings.repetition_penalty))
    generators = [torch.Generator().manual_seed(seed) for seed in item_seeds(settings.seed, len(prompts))]

    def choose(logits: Tensor, answers: list[list[int]]) -> Tensor:
        if settings.repetition_penalty != 1:
            # Row by row, so that one row's padding cannot be penalised in place of another's words.
            seen = [
                torch.tensor([prompt + answer], device=logits.device)
                for prompt, answer in zip(prompts, answers, strict=True)
            ]
            logits = torch.cat([penalty(ids, row[None]) for ids, row in zip(seen, logits, strict=True)])
        if settings.temperature == 0:
            return logits.argmax(dim=-1)
        no_ids = cast(torch.LongTensor, None)  # which these three do not read
        probabilities = warpers(no_ids, cast(torch.FloatTensor, logits)).softmax(dim=-1).cpu()
        return torch.cat(
            [
                torch.multinomial(row, 1, generator=generator)
                for row, generator in zip(probabilities, generators, strict=True)
            ]
        )

    return choose
