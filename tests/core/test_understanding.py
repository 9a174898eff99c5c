"""Answers: against transformers' own model and `generate`, alone and in batches, greedy and sampled."""

import inspect
import itertools
from collections.abc import Sequence
from pathlib import Path

import pytest
import tiny_models
import torch
from comfyui_blip3o.blip3o_core.checkpoints.keys import to_published_key
from comfyui_blip3o.blip3o_core.errors import BadInputError
from comfyui_blip3o.blip3o_core.language.answers import (
    AnswerSettings,
    Turn,
    choice_log_probabilities,
    continue_rows,
    encode_chat,
)
from comfyui_blip3o.blip3o_core.language.prompts import CAPTION_STYLES, MATCH_QUESTION, TextTokenizer
from comfyui_blip3o.blip3o_core.language.rows import EncodedRow, PixelLimits, pixel_limits, rope_positions
from comfyui_blip3o.blip3o_core.pipeline import Blip3oPipeline, load_pipeline
from originals import published_qwen_key, qwen_inputs, qwen_model
from PIL import Image
from torch import Tensor
from transformers import Qwen2_5_VLForConditionalGeneration

CPU = torch.device("cpu")
LIMITS = PixelLimits(28 * 28, tiny_models.MAX_PIXELS)
SHORT = AnswerSettings(max_new_tokens=8)
ONE, TWO, WIDE = (
    tiny_models.picture(*size, seed=seed) for size, seed in (((80, 60), 1), ((60, 90), 2), ((200, 40), 3))
)
CHATS: dict[str, list[Turn]] = {
    "text": [Turn("user", "What is this ?")],
    "picture": [Turn("user", "What color is this ?", (ONE,))],
    "two pictures": [Turn("user", "Describe the picture .", (TWO, WIDE))],
    "history": [
        Turn("user", "What is this ?", (ONE,)),
        Turn("assistant", "a red circle"),
        Turn("user", "and this ?", (TWO, ONE)),
    ],
}


@pytest.fixture(scope="module")
def original(tiny_folder: Path, pipeline: Blip3oPipeline) -> Qwen2_5_VLForConditionalGeneration:
    """transformers' own model with the tiny checkpoint's weights."""
    tokenizer, backbone = pipeline.tokenizer, pipeline.backbone
    model = qwen_model(
        tiny_models.tiny_config(),
        backbone.lm_head.out_features,
        tokenizer.image_pad,
        tokenizer.token_id("<|vision_start|>"),
    )
    names = {published_qwen_key(key): key for key in model.state_dict()}
    weights = {
        names[to_published_key("backbone", key)]: tensor
        for key, tensor in backbone.state_dict().items()
        if key != "latent_queries"
    }
    model.load_state_dict(weights, strict=True)
    return model


def inputs_of(row: EncodedRow, image_pad: int) -> dict[str, Tensor]:
    return qwen_inputs(row.token_ids, row.patches, row.grids, image_pad)


def encode(pipeline: Blip3oPipeline, chat: Sequence[Turn]) -> EncodedRow:
    return encode_chat(pipeline.backbone, pipeline.tokenizer, chat, LIMITS)


def answer_tokens(
    pipeline: Blip3oPipeline, rows: Sequence[EncodedRow], settings: AnswerSettings = SHORT
) -> list[list[int]]:
    return continue_rows(pipeline.backbone, pipeline.tokenizer, rows, device=CPU, settings=settings)


# Against transformers


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("penalty", [1.0, 1.7])
def test_greedy_answers_are_those_of_transformers(
    pipeline: Blip3oPipeline, original: Qwen2_5_VLForConditionalGeneration, chat: str, penalty: float
) -> None:
    row = encode(pipeline, CHATS[chat])
    stops = sorted(pipeline.tokenizer.stop_tokens)
    expected = original.generate(
        **inputs_of(row, pipeline.tokenizer.image_pad),
        max_new_tokens=12,
        do_sample=False,
        repetition_penalty=penalty,
        eos_token_id=stops,
        pad_token_id=stops[0],
    )[0, len(row.token_ids) :].tolist()
    ended = [token for token in expected if token not in stops]
    settings = AnswerSettings(max_new_tokens=12, repetition_penalty=penalty)
    assert answer_tokens(pipeline, [row], settings) == [ended]


def test_the_greedy_answers_above_differ(pipeline: Blip3oPipeline) -> None:
    answers = [
        tuple(
            answer_tokens(pipeline, [encode(pipeline, chat)], AnswerSettings(12, repetition_penalty=penalty))[
                0
            ]
        )
        for chat in CHATS.values()
        for penalty in (1.0, 1.7)
    ]
    assert len(set(answers)) >= 6


@pytest.mark.parametrize("chat", CHATS)
def test_positions_are_those_of_transformers(
    pipeline: Blip3oPipeline, original: Qwen2_5_VLForConditionalGeneration, chat: str
) -> None:
    row = encode(pipeline, CHATS[chat])
    find = getattr(original, "get_rope_index", None) or original.model.get_rope_index
    inputs = inputs_of(row, pipeline.tokenizer.image_pad)
    known = inspect.signature(find).parameters
    expected, delta = find(**{key: value for key, value in inputs.items() if key in known})
    ours = rope_positions(row, pipeline.tokenizer.image_pad, merge_size=2)
    assert torch.equal(ours, expected[:, 0])
    assert int(ours.max()) + 1 - len(row.token_ids) == int(delta)


@pytest.mark.parametrize("is_whole", [True, False])
def test_choices_have_the_probabilities_of_the_plain_model(
    pipeline: Blip3oPipeline, original: Qwen2_5_VLForConditionalGeneration, is_whole: bool
) -> None:
    row = encode(pipeline, CHATS["picture"])
    tokenizer = pipeline.tokenizer
    choices = ["red", "a blue square", "two dogs"]
    scores = choice_log_probabilities(
        pipeline.backbone, tokenizer, row, choices, device=CPU, is_whole_answer=is_whole
    )
    for choice, score in zip(choices, scores.tolist(), strict=True):
        tokens = tokenizer.encode(choice) + ([tokenizer.token_id("<|im_end|>")] if is_whole else [])
        written = EncodedRow(row.token_ids + tokens, row.patches, row.grids)
        with torch.no_grad():
            logits = original(**inputs_of(written, tokenizer.image_pad)).logits[0]
        start = len(row.token_ids)
        expected = sum(
            logits[start - 1 + place].log_softmax(-1)[token].item() for place, token in enumerate(tokens)
        )
        assert score == pytest.approx(expected, abs=1e-4)


# Batches


def test_answers_in_a_batch_equal_answers_alone(pipeline: Blip3oPipeline) -> None:
    rows = [encode(pipeline, chat) for chat in CHATS.values()]
    assert len({len(row.token_ids) for row in rows}) == len(rows)  # all of different lengths
    together = answer_tokens(pipeline, rows)
    assert together == [answer_tokens(pipeline, [row])[0] for row in rows]


@pytest.mark.parametrize("extra", [{}, {"top_k": 9}, {"top_p": 0.8}, {"repetition_penalty": 1.5}])
def test_sampled_answers_in_a_batch_equal_answers_alone(
    pipeline: Blip3oPipeline, extra: dict[str, float]
) -> None:
    rows = [encode(pipeline, chat) for chat in CHATS.values()]
    together = answer_tokens(pipeline, rows, AnswerSettings(8, temperature=1.5, seed=20, **extra))
    for index, row in enumerate(rows):
        alone = AnswerSettings(8, temperature=1.5, seed=20 + index, **extra)
        assert answer_tokens(pipeline, [row], alone) == [together[index]]


def test_asking_about_many_pictures_equals_asking_about_each(pipeline: Blip3oPipeline) -> None:
    pictures = [ONE, TWO, WIDE]
    together = pipeline.ask("What color is this ?", [[picture] for picture in pictures], settings=SHORT)
    alone = [pipeline.ask("What color is this ?", [[picture]], settings=SHORT)[0] for picture in pictures]
    assert together == alone
    questions = ["What is this ?", "What color is this ?", "Describe the picture ."]
    each = pipeline.ask(questions, [[picture] for picture in pictures], settings=SHORT)
    assert each[1] == together[1]


def test_a_question_needs_no_picture(pipeline: Blip3oPipeline) -> None:
    assert pipeline.ask("What is red ?", settings=SHORT) == pipeline.chat(
        [[Turn("user", "What is red ?")]], settings=SHORT
    )


# Sampling


def sampled(pipeline: Blip3oPipeline, **fields: float) -> list[list[int]]:
    row = encode(pipeline, CHATS["picture"])
    return answer_tokens(pipeline, [row], AnswerSettings(8, **fields))


def test_a_seed_decides_a_sampled_answer(pipeline: Blip3oPipeline) -> None:
    assert sampled(pipeline, temperature=2.0, seed=1) == sampled(pipeline, temperature=2.0, seed=1)
    assert len({tuple(sampled(pipeline, temperature=2.0, seed=seed)[0]) for seed in range(6)}) > 3


def test_global_random_numbers_are_not_used(pipeline: Blip3oPipeline) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    sampled(pipeline, temperature=2.0, seed=1)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("extra", [{"top_k": 1}, {"top_p": 0.01}])
def test_only_the_likeliest_token_left_is_greedy(pipeline: Blip3oPipeline, extra: dict[str, float]) -> None:
    assert sampled(pipeline, temperature=3.0, seed=4, **extra) == sampled(pipeline)
    assert sampled(pipeline, temperature=3.0, seed=4) != sampled(pipeline)


def test_top_k_and_top_p_keep_to_the_likeliest_tokens(
    pipeline: Blip3oPipeline, original: Qwen2_5_VLForConditionalGeneration
) -> None:
    row = encode(pipeline, CHATS["picture"])
    with torch.no_grad():
        logits = original(**inputs_of(row, pipeline.tokenizer.image_pad)).logits[0, -1]
    ranked = logits.argsort(descending=True).tolist()
    first = [
        answer_tokens(pipeline, [row], AnswerSettings(1, temperature=10.0, top_k=3, seed=seed))[0]
        for seed in range(40)
    ]
    # A token that ends the answer leaves it empty.
    drawn = set(itertools.chain.from_iterable(first))
    assert drawn <= set(ranked[:3])
    assert len(drawn) >= 2
    probabilities = (logits / 1.5).softmax(-1)
    kept = int((probabilities[ranked].cumsum(0) < 0.5).sum()) + 1
    nucleus = [
        answer_tokens(pipeline, [row], AnswerSettings(1, temperature=1.5, top_p=0.5, seed=seed))[0]
        for seed in range(40)
    ]
    assert set(itertools.chain.from_iterable(nucleus)) <= set(ranked[:kept])


@pytest.mark.parametrize(
    ("fields", "fragment"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"temperature": -1.0}, "temperature is -1"),
        ({"top_p": 0.0}, "top_p is 0"),
        ({"top_k": -1}, "top_k is -1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**64}, "seed is 18446744073709551616"),
    ],
)
def test_impossible_settings_are_refused(fields: dict[str, float], fragment: str) -> None:
    with pytest.raises(BadInputError, match=fragment):
        AnswerSettings(**fields)


def test_the_last_seed_wraps_around(pipeline: Blip3oPipeline) -> None:
    row = encode(pipeline, CHATS["text"])
    both = answer_tokens(pipeline, [row, row], AnswerSettings(8, temperature=2.0, seed=2**64 - 1))
    assert [both[1]] == answer_tokens(pipeline, [row], AnswerSettings(8, temperature=2.0, seed=0))


# Streaming and ends


def test_text_grows_token_by_token_and_a_row_can_be_stopped_alone(pipeline: Blip3oPipeline) -> None:
    chats = [CHATS["picture"], CHATS["history"]]
    seen: list[tuple[int, str]] = []

    def on_text(row: int, text: str) -> bool:
        seen.append((row, text))
        return row == 1 and len([1 for each, _ in seen if each == 1]) == 3

    answers = pipeline.chat(chats, settings=SHORT, on_text=on_text)
    whole = pipeline.chat(chats, settings=SHORT)
    assert answers[0] == whole[0]
    assert len([1 for row, _ in seen if row == 1]) == 3
    assert whole[1].startswith(answers[1])
    first = [text for row, text in seen if row == 0]
    assert first[-1].strip() == answers[0]
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(first))


def test_when_every_row_is_stopped_nothing_more_is_computed(pipeline: Blip3oPipeline) -> None:
    calls = []
    pipeline.chat(
        [CHATS["picture"], CHATS["text"]], settings=SHORT, on_text=lambda *_: calls.append(1) or True
    )
    assert len(calls) == 2


def test_an_error_in_the_callback_stops_and_leaves_the_pipeline_usable(pipeline: Blip3oPipeline) -> None:
    def on_text(row: int, text: str) -> None:
        raise InterruptedError

    before = pipeline.ask("What is this ?", settings=SHORT)
    with pytest.raises(InterruptedError):
        pipeline.ask("What is this ?", settings=SHORT, on_text=on_text)
    assert pipeline.ask("What is this ?", settings=SHORT) == before


def test_an_answer_ends_before_its_stop_token(tiny_folder: Path, pipeline: Blip3oPipeline) -> None:
    row = encode(pipeline, CHATS["history"])
    whole = answer_tokens(pipeline, [row])[0]
    stop = next(token for place, token in enumerate(whole) if place >= 2 and token not in whole[:place])
    tokenizer = TextTokenizer(tiny_folder)
    tokenizer.stop_tokens = frozenset({stop})
    other = encode(pipeline, CHATS["text"])
    answers = continue_rows(pipeline.backbone, tokenizer, [row, other], device=CPU, settings=SHORT)
    assert answers[0] == whole[: whole.index(stop)]
    alone = continue_rows(pipeline.backbone, tokenizer, [other], device=CPU, settings=SHORT)
    assert answers[1:] == alone


def test_the_longest_answer_is_a_limit(pipeline: Blip3oPipeline) -> None:
    row = encode(pipeline, CHATS["picture"])
    lengths = [len(answer_tokens(pipeline, [row], AnswerSettings(limit))[0]) for limit in (1, 3, 8)]
    assert lengths == [1, 3, 8]


# Choices and scores


def test_probabilities_of_choices_sum_to_one(pipeline: Blip3oPipeline) -> None:
    choices = ["red", "blue", "a big green square"]
    result = pipeline.choose("What color is this ?", choices, [ONE])
    assert list(result) == choices
    assert sum(result.values()) == pytest.approx(1.0)
    assert all(0 < value < 1 for value in result.values())
    turned = pipeline.choose("What color is this ?", choices[::-1], [ONE])
    for choice in choices:
        assert turned[choice] == pytest.approx(result[choice], rel=1e-4)
    assert pipeline.choose("What color is this ?", choices, [TWO])["red"] != pytest.approx(
        result["red"], rel=1e-6
    )


def test_choices_need_at_least_two_and_words(pipeline: Blip3oPipeline) -> None:
    with pytest.raises(BadInputError, match="at least two"):
        pipeline.choose("What is this ?", ["red"])
    with pytest.raises(BadInputError, match='choice "" is empty'):
        pipeline.choose("What is this ?", ["red", ""])
    with pytest.raises(BadInputError, match='"red" is there twice'):
        pipeline.choose("What is this ?", ["red", "blue", "red"])


def test_yes_and_no_in_either_spelling_share_the_probability(pipeline: Blip3oPipeline) -> None:
    row = encode(pipeline, CHATS["picture"])
    words = ["Yes", "yes", "No", "no"]
    scores = choice_log_probabilities(
        pipeline.backbone, pipeline.tokenizer, row, words, device=CPU, is_whole_answer=False
    ).exp()
    expected = (scores[0] + scores[1]) / scores.sum()
    assert pipeline.ask_yes_no("What color is this ?", [ONE]) == pytest.approx(expected.item(), rel=1e-4)


def test_scores_say_how_well_each_picture_fits(pipeline: Blip3oPipeline) -> None:
    scores = pipeline.score([ONE, TWO], "a red circle. ")
    assert all(0 <= score <= 1 for score in scores)
    question = MATCH_QUESTION.format(statement="a red circle")
    assert scores == [pipeline.ask_yes_no(question, [picture]) for picture in (ONE, TWO)]
    assert scores[0] != scores[1]


# Captions, chats, picture sizes


@pytest.mark.parametrize("style", CAPTION_STYLES)
def test_captions_ask_the_question_of_their_style(pipeline: Blip3oPipeline, style: str) -> None:
    captions = pipeline.caption([ONE, TWO], style, settings=SHORT)
    assert captions == pipeline.ask(CAPTION_STYLES[style], [[ONE], [TWO]], settings=SHORT)


def test_the_system_prompt_matters(pipeline: Blip3oPipeline) -> None:
    row = encode(pipeline, CHATS["text"])
    other = encode_chat(
        pipeline.backbone, pipeline.tokenizer, CHATS["text"], LIMITS, "red red red blue square"
    )
    assert row.token_ids != other.token_ids
    answers = pipeline.chat([CHATS["text"]], settings=SHORT, system_prompt="red red red blue square")
    assert answers == [pipeline.tokenizer.decode(answer_tokens(pipeline, [other])[0]).strip()]


def test_pixel_limits_decide_how_many_tokens_a_picture_takes(pipeline: Blip3oPipeline) -> None:
    def tokens(low: int, high: int, picture: Image.Image = WIDE) -> int:
        row = encode_chat(
            pipeline.backbone, pipeline.tokenizer, [Turn("user", "red", (picture,))], PixelLimits(low, high)
        )
        return row.token_ids.count(pipeline.tokenizer.image_pad)

    assert tokens(28 * 28, 4 * 28 * 28) == 4  # 200 x 40 -> 112 x 28
    assert tokens(28 * 28, 100 * 28 * 28) == 7  # its own size, rounded
    assert tokens(64 * 28 * 28, 100 * 28 * 28) >= 64
    coarse = pipeline.ask("What is this ?", [[WIDE]], settings=SHORT, max_pixels=2 * 28 * 28)
    assert len(coarse) == 1


def test_limits_come_from_the_checkpoint_unless_given(tmp_path: Path) -> None:
    tiny_models.write_tokenizer(tmp_path)
    assert pixel_limits(tmp_path) == PixelLimits(28 * 28, tiny_models.MAX_PIXELS)
    assert pixel_limits(tmp_path, 900, 5000) == PixelLimits(900, 5000)
    (tmp_path / "preprocessor_config.json").write_text('{"max_pixels": 12845056}', "utf-8")
    assert pixel_limits(tmp_path) == PixelLimits(56 * 56, 1280 * 28 * 28)
    (tmp_path / "preprocessor_config.json").unlink()
    assert pixel_limits(tmp_path) == PixelLimits(56 * 56, 1280 * 28 * 28)
    with pytest.raises(BadInputError, match="max_pixels is 100, below the smallest area, 9000 pixels"):
        pixel_limits(tmp_path, 9000, 100)


@pytest.mark.parametrize(
    ("chat", "fragment"),
    [
        ([], "must end with a question"),
        ([Turn("user", "red"), Turn("assistant", "blue")], "must end with a question"),
        ([Turn("user", "red <|image_pad|>")], 'Write "<image>" where'),
    ],
)
def test_chats_that_cannot_be_answered_are_refused(
    pipeline: Blip3oPipeline, chat: list[Turn], fragment: str
) -> None:
    with pytest.raises(BadInputError, match=fragment):
        pipeline.chat([chat])


def test_numbers_of_questions_and_pictures_must_fit(pipeline: Blip3oPipeline) -> None:
    with pytest.raises(BadInputError, match="2 questions about 3 lists"):
        pipeline.ask(["red", "blue"], [[ONE], [TWO], [WIDE]])
    with pytest.raises(BadInputError, match="no question to answer"):
        pipeline.ask([])
    with pytest.raises(BadInputError, match='no caption style "poem"; choose one of short'):
        pipeline.caption([ONE], "poem")


def test_a_tied_head_answers_too(tmp_path: Path) -> None:
    folder = tiny_models.write_checkpoint(tmp_path / "tied", tiny_models.VARIANTS["tied"])
    tied = load_pipeline(folder, dtype="fp32", device="cpu")
    answer = tied.ask("What is this ?", [[ONE]], settings=SHORT)
    assert tied.ask("What is this ?", [[ONE]], settings=SHORT) == answer
