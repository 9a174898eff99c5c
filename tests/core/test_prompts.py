"""Prompts to the character and to the token of the published code."""

import json
from pathlib import Path

import pytest
import tiny_models
from comfyui_blip3o.blip3o_core.errors import BadInputError, MissingFilesError, WrongCheckpointError
from comfyui_blip3o.blip3o_core.language.prompts import (
    Message,
    TextTokenizer,
    chat_text,
    count_prompt_tokens,
    generation_text,
    image_prompt_text,
)
from reference_set import COMPACT

GOLDEN = json.loads((COMPACT / "golden.json").read_text("utf-8"))
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    """The reference's tokenizer, with the published ids."""
    return TextTokenizer(COMPACT / "checkpoint")


@pytest.fixture(scope="module")
def tiny_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny_models.write_tokenizer(folder)
    return TextTokenizer(folder)


def test_the_drawing_prompt_is_the_published_one() -> None:
    assert generation_text(GOLDEN["caption"]) == GOLDEN["prompt_text"]


def test_the_prompt_with_an_image_is_the_published_one() -> None:
    published = GOLDEN["i2i_text"].replace("<image>", IMAGE)
    assert image_prompt_text("Please reconstruct the given image.") == published


def test_several_images_stand_one_below_the_other() -> None:
    assert f"user\n{IMAGE}\n{IMAGE}\nMix them.<|im_end|>" in image_prompt_text("Mix them.", 2)


def test_a_question_shows_the_image_before_the_text() -> None:
    text = chat_text([Message("user", GOLDEN["question"], images=1)])
    assert text.startswith(GOLDEN["vqa_text"].removesuffix("...")[: -len("<|vis")])
    assert text == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        f"<|im_start|>user\n{IMAGE}What color is this ?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_chat_keeps_its_turns_in_order() -> None:
    text = chat_text(
        [Message("user", "one", 1), Message("assistant", "two"), Message("user", "three", 2)], "Be brief."
    )
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        f"<|im_start|>user\n{IMAGE}one<|im_end|>\n"
        "<|im_start|>assistant\ntwo<|im_end|>\n"
        f"<|im_start|>user\n{IMAGE}{IMAGE}three<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_token_ids_are_the_published_ones(tokenizer: TextTokenizer) -> None:
    assert tokenizer.encode(GOLDEN["prompt_text"]) == GOLDEN["prompt_ids"]
    assert tokenizer.encode_for_generation(GOLDEN["prompt_text"]) == [*GOLDEN["prompt_ids"], 151665]
    assert tokenizer.encode(" ") == GOLDEN["negative_ids"]
    assert tokenizer.image_pad == 151655
    assert tokenizer.stop_tokens == {151643, 151645}
    assert tokenizer.pad == 151643


def test_special_tokens_are_looked_up_by_name(tiny_tokenizer: TextTokenizer) -> None:
    first = len(tiny_models.WORDS) + 3
    assert tiny_tokenizer.pad == first
    assert tiny_tokenizer.image_pad == first + tiny_models.SPECIAL_TOKENS.index("<|image_pad|>")
    assert tiny_tokenizer.encode_for_generation("red")[-1] == first + tiny_models.SPECIAL_TOKENS.index(
        "[IMG]"
    )


def test_each_image_place_takes_its_own_number_of_tokens(tokenizer: TextTokenizer) -> None:
    ids = tokenizer.encode(f"a{IMAGE}red{IMAGE}cat", [2, 3])
    pad, start, end = 151655, 151652, 151653
    assert ids == [6, start, pad, pad, end, 27, start, pad, pad, pad, end, 26]


def test_the_published_answer_prompt_has_its_length(tokenizer: TextTokenizer) -> None:
    text = chat_text([Message("user", GOLDEN["question"], images=1)])
    assert len(tokenizer.encode(text, [256])) == GOLDEN["vqa_prompt_len"]


@pytest.mark.parametrize("images", [[], [4, 4]])
def test_images_and_places_must_match(tokenizer: TextTokenizer, images: list[int]) -> None:
    with pytest.raises(BadInputError, match=f"1 place.*{len(images)} image"):
        tokenizer.encode(f"{IMAGE}red", images)


def test_decoding_leaves_special_tokens_out(tokenizer: TextTokenizer) -> None:
    assert tokenizer.decode([27, 2, 28, 151645]) == "red circle"


def test_prompt_tokens_are_counted_with_their_template(tokenizer: TextTokenizer) -> None:
    assert count_prompt_tokens(tokenizer, GOLDEN["caption"]) == len(GOLDEN["prompt_ids"])


def test_vocabulary_and_merges_serve_when_tokenizer_json_is_missing(tmp_path: Path) -> None:
    """The files of the original Qwen2 tokenizer: a byte-level vocabulary, merges and added tokens."""
    from tokenizers.pre_tokenizers import ByteLevel

    vocabulary = {letter: index for index, letter in enumerate(sorted(ByteLevel.alphabet()))}
    vocabulary["re"] = len(vocabulary)
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|image_pad|>", "[IMG]"]
    added = {token: len(vocabulary) + index for index, token in enumerate(special)}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary), "utf-8")
    (tmp_path / "merges.txt").write_text("#version: 0.2\nr e\n", "utf-8")
    (tmp_path / "added_tokens.json").write_text(json.dumps(added), "utf-8")
    config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "added_tokens_decoder": {
            str(index): {
                "content": token,
                "special": True,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "single_word": False,
            }
            for token, index in added.items()
        },
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
    tokenizer = TextTokenizer(tmp_path)
    assert tokenizer.encode("red<|im_end|>") == [vocabulary["re"], vocabulary["d"], added["<|im_end|>"]]
    assert tokenizer.token_id("[IMG]") == added["[IMG]"]


def test_a_folder_without_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(MissingFilesError, match=f"{tmp_path.name}.*no tokenizer"):
        TextTokenizer(tmp_path)


def test_a_damaged_tokenizer_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0", "model"', "utf-8")
    with pytest.raises(WrongCheckpointError, match='(?s)"tokenizer.json" in .*download it again'):
        TextTokenizer(tmp_path)


def test_a_plain_qwen_tokenizer_is_refused(tmp_path: Path) -> None:
    content = (COMPACT / "checkpoint" / "tokenizer.json").read_text("utf-8").replace("[IMG]", "[NONE]")
    (tmp_path / "tokenizer.json").write_text(content, "utf-8")
    with pytest.raises(WrongCheckpointError, match=r'no token "\[IMG\]".*plain Qwen'):
        TextTokenizer(tmp_path)
