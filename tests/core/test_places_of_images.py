"""Where a prompt says its pictures belong."""

import pytest
from comfyui_blip3o.blip3o_core.errors import BadInputError
from comfyui_blip3o.blip3o_core.language.prompts import (
    IMAGE_PAD,
    VISION_END,
    VISION_START,
    Message,
    chat_text,
    image_prompt_text,
    place_images,
)

PAD = f"{VISION_START}{IMAGE_PAD}{VISION_END}"


@pytest.mark.parametrize(
    ("text", "images", "expected"),
    [
        ("what?", 2, f"{PAD}|{PAD}|what?"),
        ("<image>what?", 1, f"{PAD}|what?"),
        ("<image>\nwhat?", 1, f"{PAD}|what?"),
        ("<image>\\nwhat?", 1, f"{PAD}|what?"),
        ("<image>\n<image>\nwhat?", 2, f"{PAD}|{PAD}|what?"),
        ("from <image> to <image>", 2, f"from {PAD} to {PAD}"),
        ("<image>to <image>", 2, f"{PAD}|to {PAD}"),
        ("no pictures", 0, "no pictures"),
    ],
)
def test_each_mark_is_the_place_of_one_picture(text: str, images: int, expected: str) -> None:
    assert place_images(text, images, "|") == expected


@pytest.mark.parametrize(("text", "images"), [("<image>", 0), ("<image>", 2), ("<image> <image>", 1)])
def test_marks_and_pictures_must_agree(text: str, images: int) -> None:
    with pytest.raises(BadInputError, match=rf"{text.count('<image>')} time.*{images} picture"):
        place_images(text, images)


def test_published_instructions_are_the_same_with_their_mark_and_without() -> None:
    published = image_prompt_text("<image>\nPlease reconstruct the given image.", 1)
    assert published == image_prompt_text("Please reconstruct the given image.", 1)
    assert f"user\n{PAD}\nPlease reconstruct" in published


def test_questions_are_the_same_with_a_leading_mark_and_without() -> None:
    marked, plain = (chat_text([Message("user", text, 1)]) for text in ("<image>\nWhat?", "What?"))
    assert marked == plain
