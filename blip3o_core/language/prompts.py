"""Chat templates and special tokens, by name, to the character of the published code."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from tokenizers import Tokenizer

from ..errors import BadInputError, MissingFilesError, WrongCheckpointError
from ..untrusted import brief

SYSTEM_PROMPT = "You are a helpful assistant."
GENERATE_INSTRUCTION = "Please generate image based on the following caption: {prompt}"
RECONSTRUCT_INSTRUCTION = "Please reconstruct the given image."
CAPTION_STYLES = {
    "short": "Describe this image in one short sentence.",
    "detailed": "Describe this image in detail: subjects, their attributes and positions, background, light, colours and style.",
    "tags": "List the contents and the style of this image as short comma-separated tags.",
    "training": (
        "Describe this image in one or two plain sentences, as a caption for training a picture generator: "
        "subject, action, surroundings, viewpoint and medium. Do not guess at names or feelings."
    ),
}
MATCH_QUESTION = "Does this picture show {statement}? Answer yes or no."
IMAGE_PLACEHOLDER = "<image>"
IMAGE_PAD = "<|image_pad|>"
VISION_START = "<|vision_start|>"
VISION_END = "<|vision_end|>"
IMAGE_BEGIN = "[IMG]"
END_OF_TURN = "<|im_end|>"
END_OF_TEXT = "<|endoftext|>"
# What a published 512-token training row leaves for text before [IMG] and the 64 queries.
TRAINED_PROMPT_TOKENS = 447


@dataclass(frozen=True)
class Message:
    """One turn of a chat.

    Attributes:
        role: "user" or "assistant".
        text: what is said; "<image>" in it is the place of an image, see place_images.
        images: how many images this turn shows.
    """

    role: str
    text: str
    images: int = 0


def chat_text(messages: Sequence[Message], system_prompt: str = SYSTEM_PROMPT, *, separator: str = "") -> str:
    """ChatML up to the point where the assistant answers; each image is one `<|image_pad|>`, before its text.

    Args:
        separator: what follows each image that comes before its text.

    Raises:
        BadInputError: see place_images; or a text is no UTF-8.
    """
    # Before the template is around them: a message shows what was typed and nothing else.
    for text in (system_prompt, *(message.text for message in messages)):
        check_text(text)
    parts = [f"<|im_start|>system\n{system_prompt}<|im_end|>\n"]
    for message in messages:
        # What the model said shows no picture, whatever words it used.
        is_shown = message.role == "user" or message.images
        said = place_images(message.text, message.images, separator) if is_shown else message.text
        parts.append(f"<|im_start|>{message.role}\n{said}<|im_end|>\n")
    return "".join(parts) + "<|im_start|>assistant\n"


def generation_text(prompt: str) -> str:
    """The published prompt for text to image, before `[IMG]`."""
    return chat_text([Message("user", GENERATE_INSTRUCTION.format(prompt=prompt))])


def image_prompt_text(instruction: str, images: int = 1) -> str:
    """The published prompt for images plus an instruction, before `[IMG]`.

    Source: BLIP3o@4689ec3: each image is the placeholder `<image>` and a newline at the start of the user turn.
    """
    return chat_text([Message("user", instruction, images)], separator="\n")


def place_images(text: str, images: int, separator: str = "") -> str:
    """Text with one `<|image_pad|>` for each image, between its vision marks.

    Images come first, each followed by the separator, unless the text says with `<image>` where each one belongs.
    `<image>` at the beginning, with or without a line break (or the two characters of one), is that usual place.

    Raises:
        BadInputError: the text has another number of `<image>` than there are images, or names the model's own mark.
    """
    if IMAGE_PAD in text:
        raise BadInputError(
            f'The text says "{IMAGE_PAD}", which stands for a part of a picture inside the model.\n'
            f'Write "{IMAGE_PLACEHOLDER}" where a picture belongs.'
        )
    pad = f"{VISION_START}{IMAGE_PAD}{VISION_END}"
    if IMAGE_PLACEHOLDER not in text:
        return (pad + separator) * images + text
    marks = text.count(IMAGE_PLACEHOLDER)
    if marks != images:
        raise BadInputError(
            f'The text says "{IMAGE_PLACEHOLDER}" {marks} time(s), but {images} picture(s) are given.\n'
            f"Write it once for each picture, or not at all: then the pictures come first."
        )
    text = text.replace(f"{IMAGE_PLACEHOLDER}\\n", f"{IMAGE_PLACEHOLDER}\n")
    first = 0
    while text.startswith(IMAGE_PLACEHOLDER):
        text = text.removeprefix(IMAGE_PLACEHOLDER).removeprefix("\n")
        first += 1
    return (pad + separator) * first + text.replace(IMAGE_PLACEHOLDER, pad)


def check_text(text: str) -> None:
    """Raise BadInputError for text that was given in bytes that are no UTF-8."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        shown = text.encode("utf-8", "replace").decode("utf-8")
        raise BadInputError(
            f'The text "{shown[:80]}" holds bytes that are not UTF-8 text.\nWrite it again, or save the file as UTF-8.'
        ) from error


class TextTokenizer:
    """The checkpoint's tokenizer, with its special tokens looked up by name.

    Args:
        folder: checkpoint folder with tokenizer.json, or vocab.json and merges.txt.

    Raises:
        MissingFilesError: the folder has no tokenizer.
        WrongCheckpointError: the tokenizer lacks a token that BLIP3-o needs.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._tokenizer = _read_tokenizer(folder)
        for token in (IMAGE_BEGIN, IMAGE_PAD, END_OF_TURN):
            if self._tokenizer.token_to_id(token) is None:
                raise WrongCheckpointError(
                    f'The tokenizer in "{folder}" has no token "{token}": it belongs to a plain Qwen model.\n'
                    "Use the tokenizer files of the BLIP3-o checkpoint."
                )

    def token_id(self, token: str) -> int | None:
        """None for a token that this tokenizer does not have."""
        return self._tokenizer.token_to_id(token)

    def _needed_id(self, token: str) -> int:
        found = self.token_id(token)
        assert found is not None, token  # looked up when the tokenizer was read
        return found

    @cached_property
    def image_pad(self) -> int:
        return self._needed_id(IMAGE_PAD)

    @cached_property
    def end_of_turn(self) -> int:
        return self._needed_id(END_OF_TURN)

    @cached_property
    def pad(self) -> int:
        """Filler of padded positions; never attended to."""
        found = self.token_id(END_OF_TEXT)
        return self.end_of_turn if found is None else found

    @cached_property
    def stop_tokens(self) -> frozenset[int]:
        """An answer ends with any of these."""
        ids = (self.token_id(token) for token in (END_OF_TURN, END_OF_TEXT))
        return frozenset(token for token in ids if token is not None)

    def encode(self, text: str, image_tokens: Sequence[int] = ()) -> list[int]:
        """Token ids of a text whose n-th `<|image_pad|>` stands for image_tokens[n] tokens.

        Raises:
            BadInputError: the text does not hold exactly one image place per image, or is no UTF-8.
        """
        check_text(text)
        places = text.count(IMAGE_PAD)
        if places != len(image_tokens):
            raise BadInputError(
                f"The text has {places} place(s) for images but {len(image_tokens)} image(s) are given.\n"
                f'Give one image for each place, and do not write "{IMAGE_PAD}" in a prompt.'
            )
        pieces = text.split(IMAGE_PAD)
        expanded = pieces[0] + "".join(
            IMAGE_PAD * count + piece for count, piece in zip(image_tokens, pieces[1:], strict=True)
        )
        return self._tokenizer.encode(expanded, add_special_tokens=False).ids

    def encode_for_generation(self, text: str, image_tokens: Sequence[int] = ()) -> list[int]:
        """Token ids of a prompt followed by `[IMG]`, after which the latent queries come."""
        return [*self.encode(text, image_tokens), self._needed_id(IMAGE_BEGIN)]

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of token ids, without special tokens."""
        return self._tokenizer.decode(list(token_ids), skip_special_tokens=True)


def count_prompt_tokens(tokenizer: TextTokenizer, prompt: str) -> int:
    """Tokens of a text-to-image prompt with its template; above TRAINED_PROMPT_TOKENS was never trained."""
    return len(tokenizer.encode(generation_text(prompt)))


def _read_tokenizer(folder: Path) -> Tokenizer:
    path = folder / "tokenizer.json"
    if path.is_file():
        try:
            return Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises the bare class
            raise WrongCheckpointError(
                f'"tokenizer.json" in "{folder}" cannot be read.\nDelete it and download it again. ({brief(error)})'
            ) from error
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        # transformers 5 makes this name when it is first asked for, which no type checker sees.
        from transformers import Qwen2TokenizerFast  # type: ignore[attr-defined]

        return Qwen2TokenizerFast.from_pretrained(str(folder)).backend_tokenizer
    raise MissingFilesError(
        f'"{folder}" has no tokenizer: neither tokenizer.json nor vocab.json with merges.txt is there.\n'
        "Download the small files of the checkpoint again."
    )
