"""Rows of input for the backbone: token ids and image patches, padded into batches, with their positions.

Letters: B rows, L tokens of the longest row, C width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from ..errors import SettingError, WrongCheckpointError
from ..images import MAX_PIXELS, MIN_PIXELS, question_size, to_patches
from ..models.backbone import Backbone
from ..untrusted import read_json
from .prompts import TextTokenizer


@dataclass(frozen=True)
class PixelLimits:
    """Smallest and largest area, in pixels, at which a picture is looked at."""

    min_pixels: int
    max_pixels: int

    def __post_init__(self) -> None:
        for name in ("min_pixels", "max_pixels"):
            if getattr(self, name) < 1:
                raise SettingError(name, f"is {getattr(self, name)}; a picture has at least one pixel.")
        if self.max_pixels < self.min_pixels:
            raise SettingError(
                "max_pixels", f"is {self.max_pixels}, below the smallest area, {self.min_pixels} pixels."
            )


def pixel_limits(folder: Path, min_pixels: int | None = None, max_pixels: int | None = None) -> PixelLimits:
    """Limits for a checkpoint: those given, never above its preprocessor_config.json's, which it was trained with.

    Without a given upper limit it is MAX_PIXELS, or the checkpoint's when that is smaller.

    Raises:
        SettingError: a given limit is not above 0, or the two do not fit together.
    """
    low = 1 if min_pixels is None else min_pixels
    PixelLimits(low, max(low, 1) if max_pixels is None else max_pixels)
    path = folder / "preprocessor_config.json"
    stored = read_json(path) if path.is_file() else {}
    upper = MAX_PIXELS if max_pixels is None else max_pixels
    upper = min(upper, stored.get("max_pixels") or upper)
    lower = stored.get("min_pixels") or MIN_PIXELS if min_pixels is None else min_pixels
    return PixelLimits(min(lower, upper), upper)


@dataclass(frozen=True)
class EncodedRow:
    """One row of input: token ids, and patches and grid of each image in them."""

    token_ids: list[int]
    patches: list[Tensor] = field(default_factory=list)
    grids: list[tuple[int, int, int]] = field(default_factory=list)


def encode_picture(
    backbone: Backbone, picture: Image.Image, limits: PixelLimits
) -> tuple[Tensor, tuple[int, int, int], int]:
    """Patches, grid and number of image tokens of one picture."""
    patch, merge = backbone.patch_size, backbone.merge_size
    rows, columns = question_size(
        picture.height,
        picture.width,
        factor=patch * merge,
        min_pixels=limits.min_pixels,
        max_pixels=limits.max_pixels,
    )
    if picture.size != (columns, rows):
        picture = picture.resize((columns, rows), Image.Resampling.BICUBIC)
    patches, grid = to_patches(
        picture, patch_size=patch, merge_size=merge, temporal_patch_size=backbone.temporal_patch_size
    )
    return patches, grid, patches.shape[0] // merge**2


def embed_rows(
    backbone: Backbone, tokenizer: TextTokenizer, rows: Sequence[EncodedRow], device: torch.device
) -> tuple[Tensor, Tensor | None]:
    """Embeddings (B, L, C) of rows padded on the left, and the mask (B, L), None when nothing is padded.

    The vision tower runs once for all images of all rows, and sees an image that is in several of them once. `device` is
    where the backbone computes; its weights may lie elsewhere when a host streams them.

    Raises:
        WrongCheckpointError: a token that the language model does not have.
    """
    known, largest = backbone.text.config.vocab_size, max(max(row.token_ids) for row in rows)
    if largest >= known:
        raise WrongCheckpointError(
            f'The tokenizer in "{tokenizer.folder}" knows more tokens than the language model ({largest + 1:,} against '
            f"{known:,}): they belong to different models.\nTake the tokenizer files from the checkpoint that the weights are of."
        )
    longest = max(len(row.token_ids) for row in rows)
    padded = [[tokenizer.pad] * (longest - len(row.token_ids)) + row.token_ids for row in rows]
    token_ids = torch.tensor(padded, device=device)
    embeddings = backbone.embed(token_ids)
    patches = [item for row in rows for item in row.patches]
    if patches:
        grids = [grid for row in rows for grid in row.grids]
        first = {id(item): place for place, item in reversed(list(enumerate(patches)))}
        different = sorted(first.values())
        features = backbone.encode_images(
            torch.cat([patches[place] for place in different]).to(device),
            torch.tensor([grids[place] for place in different], device=device),
        )
        sizes = [patches[place].shape[0] // backbone.merge_size**2 for place in different]
        each = dict(zip(different, features.split(sizes), strict=True))
        features = torch.cat([each[first[id(item)]] for item in patches])
        is_image = (token_ids == tokenizer.image_pad).unsqueeze(-1).expand_as(embeddings)
        embeddings = embeddings.masked_scatter(is_image, features.to(embeddings))
    if all(len(row.token_ids) == longest for row in rows):
        return embeddings, None
    mask = torch.tensor([[0] * (longest - len(row.token_ids)) + [1] * len(row.token_ids) for row in rows])
    return embeddings, mask.to(device)


def rope_positions(row: EncodedRow, image_pad: int, merge_size: int) -> Tensor:
    """Time, row and column positions (3, L) of a row: text counts on; an image spans a grid at one time.

    Source: Qwen2-VL's multimodal rotary positions.
    """
    blocks: list[Tensor] = []
    grids = iter(row.grids)
    start, place = 0, 0
    while place < len(row.token_ids):
        end = place
        if row.token_ids[place] == image_pad:
            _, patch_rows, patch_columns = next(grids)
            size = (patch_rows // merge_size, patch_columns // merge_size)
            height, width = (torch.arange(side) for side in size)
            block = torch.stack(
                [torch.zeros(size[0] * size[1], dtype=torch.long)]
                + [axis.reshape(-1) for axis in torch.meshgrid(height, width, indexing="ij")]
            )
            end += block.shape[1]
            blocks.append(start + block)
            start += max(size)
        else:
            while end < len(row.token_ids) and row.token_ids[end] != image_pad:
                end += 1
            blocks.append((start + torch.arange(end - place)).expand(3, -1))
            start += end - place
        place = end
    return torch.cat(blocks, dim=1)


def padded_positions(
    rows: Sequence[EncodedRow], longest: int, image_pad: int, merge_size: int
) -> tuple[Tensor, Tensor]:
    """Positions (3, B, longest) of left-padded rows, and the position (B, 1) of the token after each row."""
    each = [rope_positions(row, image_pad, merge_size) for row in rows]
    padded = [torch.nn.functional.pad(position, (longest - position.shape[1], 0)) for position in each]
    return torch.stack(padded, dim=1), torch.tensor([[int(position.max()) + 1] for position in each])
