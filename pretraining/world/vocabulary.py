"""The word-level tokenizer of the embedded model: every word the scene world can say, and the special tokens by name."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from . import captions
from .scenes import BACKGROUNDS, COLOURS, KINDS, SIZES

SPECIAL_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>", "[IMG]", "[/IMG]", "<image>", "<unk>",
)  # fmt: skip
PLAIN_WORDS = """
system user assistant you are a helpful please generate image based on the following caption : . , ? !
an picture photo of drawing there is in front background and left right to above over on top below under beneath
what color colour shape object objects how many big where does this show describe it something red bottom center
are yes no reconstruct given scene with next beside side by
""".split()


def words() -> list[str]:
    """Every plain word, each once, in a fixed order."""
    found = [
        *PLAIN_WORDS,
        *KINDS,
        *(captions.plural(k) for k in KINDS),
        *COLOURS,
        *BACKGROUNDS,
        *SIZES,
        *captions.NUMBERS,
    ]
    return list(dict.fromkeys(found))


def build_tokenizer() -> Any:
    """A tokenizers.Tokenizer: lower case, split at spaces and punctuation, one id per word; <|endoftext|> is id 0."""
    from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers

    vocabulary = {token: index for index, token in enumerate([*SPECIAL_TOKENS, *words()])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()]
    )
    tokenizer.add_special_tokens(
        [AddedToken(token, normalized=False, special=True) for token in SPECIAL_TOKENS]
    )
    return tokenizer


def tokenizer_files(folder: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and special_tokens_map.json."""
    tokenizer = build_tokenizer()
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "unk_token": "<unk>"}
    added = {
        str(tokenizer.token_to_id(token)): {
            "content": token, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True
        }
        for token in SPECIAL_TOKENS
    }  # fmt: skip
    config = {
        "added_tokens_decoder": added,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 4096,
        "tokenizer_class": "PreTrainedTokenizerFast",
        **special,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2), encoding="utf-8")


class WordIds:
    """Fast words -> ids for training, equal to the tokenizer on text without unknown characters."""

    def __init__(self) -> None:
        tokenizer = build_tokenizer()
        self.size = tokenizer.get_vocab_size()
        self.ids = tokenizer.get_vocab()
        self.unknown = self.ids["<unk>"]
        self._pieces = re.compile("|".join(re.escape(t) for t in SPECIAL_TOKENS) + r"|\w+|[^\w\s]")

    def __call__(self, text: str) -> list[int]:
        return [
            self.ids.get(piece, self.ids.get(piece.lower(), self.unknown))
            for piece in self._pieces.findall(text)
        ]
