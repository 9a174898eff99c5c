"""Conditioning: prompts, with or without pictures in them, to the backbone's states at the latent queries."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from ..errors import BadInputError
from ..images import preprocess_for_prompt
from ..models.backbone import Backbone
from .prefixes import encode_shared
from .prompts import (
    IMAGE_PLACEHOLDER,
    TRAINED_PROMPT_TOKENS,
    TextTokenizer,
    generation_text,
    image_prompt_text,
)
from .rows import EncodedRow, embed_rows, encode_picture, pixel_limits

logger = logging.getLogger(__name__)


@torch.no_grad()
def encode_prompts(
    backbone: Backbone,
    tokenizer: TextTokenizer,
    prompts: Sequence[str],
    images: Sequence[Sequence[Image.Image]] | None = None,
    *,
    device: torch.device,
    use_template: bool = True,
) -> Tensor:
    """Conditioning (B, Q, C) of prompts; each row equals the same prompt encoded alone.

    Args:
        images: pictures that come before each prompt's text, seen at 448 x 448 pixels as published.
        device: where the backbone computes.
        use_template: the published chat template; False encodes the bare text.

    Raises:
        BadInputError: no prompt, an empty one, or not one list of images for each prompt.

    Source: BLIP3o@4689ec3 blip3o_qwen_inference.py, generate_image.
    """
    images = [()] * len(prompts) if images is None else images
    if len(images) != len(prompts):
        raise BadInputError(
            f"There are {len(prompts)} prompts but {len(images)} lists of images.\nGive one list for each prompt."
        )
    is_empty = [not prompt.strip() and not shown for prompt, shown in zip(prompts, images, strict=True)]
    if not prompts or (use_template and any(is_empty)):
        raise BadInputError("The prompt is empty.\nWrite what the picture should show.")
    rows = [
        _prompt_row(backbone, tokenizer, prompt, shown, use_template)
        for prompt, shown in zip(prompts, images, strict=True)
    ]
    positions = torch.arange(len(rows[0].token_ids)).expand(3, -1)
    shared = encode_shared(backbone, tokenizer, rows, positions, device)
    embeddings, mask = embed_rows(backbone, tokenizer, shared.rests if shared else rows, device)
    return backbone.encode_conditioning(embeddings, mask, shared.cache if shared else None)


def _prompt_row(
    backbone: Backbone,
    tokenizer: TextTokenizer,
    prompt: str,
    pictures: Sequence[Image.Image],
    use_template: bool,
) -> EncodedRow:
    if pictures or IMAGE_PLACEHOLDER in prompt:
        limits = pixel_limits(tokenizer.folder)
        encoded = [encode_picture(backbone, preprocess_for_prompt(picture), limits) for picture in pictures]
        text = image_prompt_text(prompt, len(pictures))
        token_ids = tokenizer.encode_for_generation(text, [tokens for _, _, tokens in encoded])
        return EncodedRow(token_ids, [patches for patches, _, _ in encoded], [grid for _, grid, _ in encoded])
    token_ids = tokenizer.encode_for_generation(generation_text(prompt) if use_template else prompt)
    if len(token_ids) > TRAINED_PROMPT_TOKENS + 1:
        logger.warning(
            "This prompt has %d tokens; BLIP3-o was trained on at most %d and may ignore the rest. Shorten it.",
            len(token_ids) - 1,
            TRAINED_PROMPT_TOKENS,
        )
    return EncodedRow(token_ids)
