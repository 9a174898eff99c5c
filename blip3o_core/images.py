"""Layout and range of pictures, and each encoder's way of resizing them.

`images` are float (B, H, W, 3) in [0, 1]; PIL pictures stand for files. `pixels` are (B, 3, H, W).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from einops import rearrange, repeat
from PIL import Image, ImageOps
from torch import Tensor

from .errors import BadInputError
from .untrusted import brief

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
# Side of an image inside a drawing prompt, whatever its aspect, as published.
PROMPT_IMAGE_SIDE = 448
MIN_PIXELS = 56 * 56
# Qwen2.5-VL's published ceiling is 12.8 megapixels (16384 image tokens); this one keeps a question under 1280 tokens.
MAX_PIXELS = 1280 * 28 * 28
MAX_ASPECT = 200


def load_image(path: str | Path) -> Image.Image:
    """Open a picture file as RGB, turned upright; transparency is laid on white.

    Raises:
        BadInputError: the file is missing or no picture.
    """
    try:
        with Image.open(path) as image:
            return to_rgb(ImageOps.exif_transpose(image))
    except FileNotFoundError:
        raise BadInputError(f'There is no picture "{path}".\nCheck the path.') from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise BadInputError(
            f'"{path}" cannot be opened as a picture ({brief(error)}).\nUse a complete PNG, JPEG or WebP file.'
        ) from error


def to_rgb(image: Image.Image, background: str = "white") -> Image.Image:
    """RGB of any PIL picture, transparency laid on a colour (a name or "#rrggbb")."""
    # 16-bit grey; Pillow below 10.3 opens it in mode I. Its own conversion would clip at 255.
    if image.mode == "I" or image.mode.startswith("I;16"):
        shades = np.asarray(image).clip(0, 65535) >> 8
        return Image.fromarray(shades.astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, background), image).convert("RGB")
    return image.convert("RGB")


def to_pil(images: Tensor) -> list[Image.Image]:
    """PIL pictures of images (B, H, W, 3) or (H, W, 3) in [0, 1]; a fourth channel is transparency.

    Raises:
        BadInputError: wrong shape, no picture at all, or values that are not numbers.
    """
    if images.ndim == 3:
        images = images[None]
    if images.ndim != 4 or images.shape[-1] not in (1, 3, 4) or 0 in images.shape:
        raise BadInputError(
            f"Expected pictures as (count, height, width, 3) with values from 0 to 1, got the shape {tuple(images.shape)}."
        )
    if not torch.isfinite(images).all():
        raise BadInputError(
            "A picture holds values that are not numbers (NaN or infinity).\n"
            "Look at the step that made it; black pictures from a half-precision VAE are a common cause."
        )
    array = (images.detach().float().cpu().clamp(0, 1) * 255).round().to(torch.uint8).numpy()
    return [to_rgb(Image.fromarray(item.squeeze(-1) if item.shape[-1] == 1 else item)) for item in array]


def from_pil(pictures: Sequence[Image.Image]) -> Tensor:
    """images (B, H, W, 3) in [0, 1] of RGB pictures of one size."""
    return torch.stack([_to_tensor(picture) for picture in pictures])


def to_pixels(images: Tensor) -> Tensor:
    """(B, H, W, 3) in [0, 1] -> (B, 3, H, W) in [-1, 1], the VAE's range."""
    return rearrange(images, "b h w c -> b c h w") * 2 - 1


def fit_size(picture: Image.Image, width: int, height: int) -> Image.Image:
    """Scale and centre-crop to exactly width x height."""
    return ImageOps.fit(picture, (width, height), Image.Resampling.BICUBIC)


def preprocess_for_image_encoder(picture: Image.Image, size: int) -> Tensor:
    """CLIP-normalised pixels (3, size, size): short side to `size` (bicubic), centre crop.

    Source: BLIP3o@4689ec3 eva_clip_encoder.py, torchvision's Resize and CenterCrop; rounding as there.
    """
    width, height = picture.size
    scaled = (size, int(size * height / width)) if width <= height else (int(size * width / height), size)
    picture = picture.resize(scaled, Image.Resampling.BICUBIC)
    left, top = round((scaled[0] - size) / 2), round((scaled[1] - size) / 2)
    return _normalise(picture.crop((left, top, left + size, top + size)))


def preprocess_for_prompt(picture: Image.Image, factor: int = 28) -> Image.Image:
    """A picture as it enters a drawing prompt: 448 x 448, aspect ignored, as published."""
    side = max(factor, PROMPT_IMAGE_SIDE // factor * factor)
    return picture.resize((side, side), Image.Resampling.BICUBIC)


def question_size(
    height: int, width: int, *, factor: int = 28, min_pixels: int = MIN_PIXELS, max_pixels: int = MAX_PIXELS
) -> tuple[int, int]:
    """Height and width for the backbone's vision tower: multiples of `factor`, area within bounds, aspect kept.

    Source: Qwen2-VL's smart_resize.

    Raises:
        BadInputError: the picture is more than 200 times longer than wide.
    """
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise BadInputError(
            f"A picture of {width} x {height} pixels is too narrow to look at (more than {MAX_ASPECT}:1).\nCrop it."
        )
    rows, columns = (max(factor, round(side / factor) * factor) for side in (height, width))
    if rows * columns > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        rows, columns = (max(factor, math.floor(side / shrink / factor) * factor) for side in (height, width))
    elif rows * columns < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        rows, columns = (math.ceil(side * grow / factor) * factor for side in (height, width))
    return rows, columns


def to_patches(
    picture: Image.Image, *, patch_size: int, merge_size: int, temporal_patch_size: int = 2
) -> tuple[Tensor, tuple[int, int, int]]:
    """Flattened patches of one picture for the backbone's vision tower.

    Args:
        picture: RGB, sides multiples of patch_size x merge_size.

    Returns:
        Patches (rows x columns, 3 x temporal x patch x patch), ordered so that each merged square is contiguous, and
        the grid (1, rows, columns).

    Source: Qwen2-VL's image processor; a still picture is repeated over the temporal patch.
    """
    patches = repeat(
        _normalise(picture),
        "channel (row mr p) (column mc q) -> (row column mr mc) (channel t p q)",
        mr=merge_size,
        mc=merge_size,
        p=patch_size,
        q=patch_size,
        t=temporal_patch_size,
    )
    return patches, (1, picture.height // patch_size, picture.width // patch_size)


def _to_tensor(picture: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(picture, dtype=np.float32) / 255)


def _normalise(picture: Image.Image) -> Tensor:
    mean, std = torch.tensor(CLIP_MEAN), torch.tensor(CLIP_STD)
    return rearrange((_to_tensor(picture) - mean) / std, "h w c -> c h w")
