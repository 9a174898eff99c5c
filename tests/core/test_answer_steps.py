"""Answers by recorded steps: the same words and numbers as without, nothing recorded twice, and a way on where it fails."""

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_models
import torch
from comfyui_blip3o.blip3o_core.language import answers as understanding
from comfyui_blip3o.blip3o_core.language.answers import AnswerSettings, Turn, continue_rows, encode_chat
from comfyui_blip3o.blip3o_core.language.prompts import TextTokenizer
from comfyui_blip3o.blip3o_core.language.rows import EncodedRow, PixelLimits
from comfyui_blip3o.blip3o_core.performance import recorded_answers as answer_steps
from comfyui_blip3o.blip3o_core.performance.recorded_answers import AnswerRecorder
from comfyui_blip3o.blip3o_core.performance.recording import can_compile
from comfyui_blip3o.blip3o_core.pipeline import Blip3oPipeline, load_pipeline
from recordings import Recordings
from torch import Tensor

CPU = torch.device("cpu")
LIMITS = PixelLimits(28 * 28, tiny_models.MAX_PIXELS)
ONE, TWO = (tiny_models.picture(80, 60, seed=seed) for seed in (1, 2))
QUESTIONS = {
    "text": [Turn("user", "What is this ?")],
    "picture": [Turn("user", "What color is this ?", (ONE,))],
    "two pictures": [Turn("user", "Describe the picture .", (TWO, ONE))],
}
TOKENS = 10


@pytest.fixture
def own_pipeline(tiny_folder: Path) -> Blip3oPipeline:
    return load_pipeline(tiny_folder, dtype="fp32", device="cpu")


@pytest.fixture
def recordings(own_pipeline: Blip3oPipeline) -> Recordings:
    found = Recordings()
    own_pipeline.load("backbone").networks.record(
        "backbone", AnswerRecorder(found, is_compiled=False, places=64)
    )
    return found


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Logits of all steps. Words alone say little: a toy model gives the same ones to many questions."""
    logits_of_steps: list[Tensor] = []
    original = understanding._token_chooser

    def spy(*arguments: object) -> Callable[..., Tensor]:
        choose = original(*arguments)

        def see(logits: Tensor, answers: list[list[int]]) -> Tensor:
            logits_of_steps.append(logits.clone())
            return choose(logits, answers)

        return see

    monkeypatch.setattr(understanding, "_token_chooser", spy)
    return logits_of_steps


def encode(pipeline: Blip3oPipeline, *names: str) -> list[EncodedRow]:
    return [encode_chat(pipeline.backbone, pipeline.tokenizer, QUESTIONS[name], LIMITS) for name in names]


def answer(
    pipeline: Blip3oPipeline,
    rows: list[EncodedRow],
    tokenizer: TextTokenizer | None = None,
    **settings: object,
) -> list[list[int]]:
    return continue_rows(
        pipeline.backbone,
        tokenizer or pipeline.tokenizer,
        rows,
        device=CPU,
        make_steps=pipeline.networks.answer_steps,
        settings=AnswerSettings(**{"max_new_tokens": TOKENS, **settings}),
    )


@pytest.mark.parametrize("settings", [{}, {"temperature": 1.0, "repetition_penalty": 1.3}], ids=str)
@pytest.mark.parametrize("names", [("text",), ("picture",), ("two pictures", "text", "picture")], ids=str)
def test_replayed_steps_answer_what_called_ones_answer(
    pipeline: Blip3oPipeline,
    own_pipeline: Blip3oPipeline,
    recordings: Recordings,
    seen: list[Tensor],
    names: tuple[str, ...],
    settings: dict[str, object],
) -> None:
    rows = encode(pipeline, *names)
    expected = answer(pipeline, rows, **settings)
    plain = torch.stack(seen)
    for _ in range(2):  # the second answer meets the keys and values of the first
        seen.clear()
        assert answer(own_pipeline, rows, **settings) == expected
        torch.testing.assert_close(torch.stack(seen), plain, rtol=1e-4, atol=1e-4)
    assert recordings.replayed == 2 * (TOKENS - 1)


def test_a_number_of_rows_is_recorded_once(own_pipeline: Blip3oPipeline, recordings: Recordings) -> None:
    text, picture, both = encode(own_pipeline, "text", "picture", "two pictures")
    for rows in ([text], [picture], [both], [text]):
        answer(own_pipeline, rows)
    assert recordings.made == 1
    answer(own_pipeline, [text, picture])
    answer(own_pipeline, [both, text])
    assert recordings.made == 2


def test_an_answer_that_outgrows_its_places_goes_on_in_twice_as_many(
    pipeline: Blip3oPipeline, own_pipeline: Blip3oPipeline, recordings: Recordings, seen: list[Tensor]
) -> None:
    rows = encode(pipeline, "text", "picture")
    longest = max(len(row.token_ids) for row in rows)
    own_pipeline.networks._recorders["backbone"] = AnswerRecorder(
        recordings, is_compiled=False, places=longest + 3
    )
    expected = answer(pipeline, rows)
    plain = torch.stack(seen)
    seen.clear()
    assert answer(own_pipeline, rows) == expected
    torch.testing.assert_close(torch.stack(seen), plain, rtol=1e-4, atol=1e-4)
    assert (recordings.made, recordings.replayed) == (2, TOKENS - 1)


def test_an_answer_ends_at_its_stop_token_while_others_go_on(
    tiny_folder: Path, pipeline: Blip3oPipeline, own_pipeline: Blip3oPipeline, recordings: Recordings
) -> None:
    rows = encode(pipeline, "picture", "text")
    whole = answer(pipeline, rows)
    tokenizer = TextTokenizer(tiny_folder)
    tokenizer.stop_tokens = frozenset({whole[0][2]})
    expected = answer(pipeline, rows, tokenizer)
    assert len(expected[0]) < TOKENS
    assert answer(own_pipeline, rows, tokenizer) == expected
    assert answer(own_pipeline, rows[:1], tokenizer) == expected[:1]


def test_a_chat_goes_on_from_a_recorded_answer(
    tiny_folder: Path, own_pipeline: Blip3oPipeline, recordings: Recordings, seen: list[Tensor]
) -> None:
    settings = AnswerSettings(max_new_tokens=6)

    def talk(pipeline: Blip3oPipeline) -> Tensor:
        turns = QUESTIONS["picture"]
        seen.clear()
        for question in ("and this ?", "What is this ?"):
            said = pipeline.chat([turns], settings=settings)[0]
            turns = [*turns, Turn("assistant", said), Turn("user", question)]
        return torch.stack(seen)

    images = []
    own_pipeline.backbone.visual.register_forward_hook(lambda *_: images.append(1))
    ours = talk(own_pipeline)
    assert len(images) == 1
    plain = talk(load_pipeline(tiny_folder, dtype="fp32", device="cpu"))
    torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4)


def test_weights_that_moved_are_recorded_anew(own_pipeline: Blip3oPipeline, recordings: Recordings) -> None:
    rows = encode(own_pipeline, "text")
    before = answer(own_pipeline, rows)
    weight = own_pipeline.backbone.text.layers[0].mlp.up_proj.weight
    weight.data = weight.data.clone()
    assert answer(own_pipeline, rows) == before
    assert recordings.made == 2


def test_where_recording_fails_answers_are_written_all_the_same(
    pipeline: Blip3oPipeline, own_pipeline: Blip3oPipeline, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*unused: object) -> Callable[[], Tensor]:
        raise RuntimeError("no such driver")

    own_pipeline.load("backbone").networks.record("backbone", AnswerRecorder(fail, is_compiled=False))
    rows = encode(pipeline, "picture", "text")
    expected = answer(pipeline, rows)
    with caplog.at_level(logging.WARNING):
        assert [answer(own_pipeline, rows) for _ in range(2)] == [expected] * 2
    assert caplog.text.count("no such driver") == 1


def test_where_compiling_fails_steps_are_recorded_as_they_are(
    pipeline: Blip3oPipeline, own_pipeline: Blip3oPipeline, caplog: pytest.LogCaptureFixture
) -> None:
    recordings, calls = Recordings(), []

    def fail_once(*inputs: object) -> Callable[[], Tensor]:
        calls.append(1)
        if len(calls) == 1:
            raise RuntimeError("no such compiler")
        return recordings(*inputs)

    own_pipeline.load("backbone").networks.record("backbone", AnswerRecorder(fail_once, is_compiled=True))
    rows = encode(pipeline, "picture")
    with caplog.at_level(logging.WARNING):
        assert answer(own_pipeline, rows) == answer(pipeline, rows)
    assert "no such compiler" in caplog.text
    assert (recordings.made, recordings.replayed) == (1, TOKENS - 1)


def test_many_rows_keep_a_gpu_busy_without_recordings(
    pipeline: Blip3oPipeline, own_pipeline: Blip3oPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answer_steps, "MOST_ROWS", 1)
    recordings = Recordings()
    own_pipeline.load("backbone").networks.record("backbone", AnswerRecorder(recordings, is_compiled=False))
    rows = encode(pipeline, "text", "picture")
    assert answer(own_pipeline, rows) == answer(pipeline, rows)
    assert recordings.made == 0
    assert answer(own_pipeline, rows[:1]) == answer(pipeline, rows[:1])
    assert recordings.made == 1


@pytest.mark.slow
def test_compiled_steps_answer_the_same_and_are_compiled_once(
    pipeline: Blip3oPipeline, own_pipeline: Blip3oPipeline, seen: list[Tensor]
) -> None:
    if not can_compile(CPU):
        pytest.skip("no C++ compiler on this machine")
    text, picture = encode(pipeline, "text", "picture")
    expected = [answer(pipeline, [row]) for row in (text, picture)]
    plain = torch.stack(seen)
    seen.clear()
    own_pipeline.load("backbone").networks.record(
        "backbone", AnswerRecorder(Recordings(), is_compiled=True, places=64)
    )
    stats = torch._dynamo.utils.counters["stats"]
    before = stats["unique_graphs"]
    assert answer(own_pipeline, [text]) == expected[0]
    assert stats["unique_graphs"] == before + 1
    assert answer(own_pipeline, [picture]) == expected[1]
    assert stats["unique_graphs"] == before + 1
    torch.testing.assert_close(torch.stack(seen), plain, rtol=1e-4, atol=1e-4)
