"""Pictures in and out: layouts, odd files, and each encoder's resizing against the library it was written for."""

import inspect
from pathlib import Path

import numpy as np
import pytest
import tiny_models
import torch
from comfyui_blip3o.blip3o_core.errors import BadInputError
from comfyui_blip3o.blip3o_core.images import (
    CLIP_MEAN,
    CLIP_STD,
    fit_size,
    from_pil,
    load_image,
    preprocess_for_image_encoder,
    preprocess_for_prompt,
    question_size,
    to_patches,
    to_pil,
    to_pixels,
    to_rgb,
)
from PIL import Image
from transformers.models.qwen2_vl import image_processing_qwen2_vl as original

try:  # transformers 5 keeps the Pillow version under its own name
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (
        Qwen2VLImageProcessorPil as PilProcessor,
    )
except ImportError:
    PilProcessor = original.Qwen2VLImageProcessor

PIL_PARTS = inspect.getmodule(PilProcessor)
smart_resize = PIL_PARTS.smart_resize


# Question size and patches


@pytest.mark.parametrize("factor", [28, 32, 16])
def test_question_sizes_are_those_of_qwen(factor: int) -> None:
    generator = np.random.default_rng(0)
    for _ in range(400):
        height, width = (int(side) for side in generator.integers(factor, 3000, 2))
        low = int(generator.integers(1, 20)) * factor * factor
        high = low * int(generator.integers(2, 60))
        ours = question_size(height, width, factor=factor, min_pixels=low, max_pixels=high)
        expected = smart_resize(height, width, factor=factor, min_pixels=low, max_pixels=high)
        # transformers 4.51 shrinks a narrow picture to nothing; later ones keep one square, as ours.
        kept = tuple(max(factor, side) for side in expected)
        assert ours == kept, (height, width, low, high)


@pytest.mark.parametrize("size", [(1, 1), (1, 150), (9000, 9000), (5, 900)])
def test_question_sizes_stay_in_bounds_for_any_picture(size: tuple[int, int]) -> None:
    rows, columns = question_size(*size, min_pixels=56 * 56, max_pixels=200 * 28 * 28)
    assert rows % 28 == columns % 28 == 0
    assert rows * columns >= 56 * 56
    assert rows * columns <= 200 * 28 * 28 or min(rows, columns) == 28


def test_a_ribbon_is_refused() -> None:
    with pytest.raises(BadInputError, match="5 x 1200 pixels is too narrow"):
        question_size(1200, 5)


@pytest.mark.parametrize("size", [(112, 84), (56, 56), (28, 140)])
def test_patches_are_those_of_qwen(size: tuple[int, int]) -> None:
    picture = tiny_models.picture(*size)
    patches, grid = to_patches(picture, patch_size=14, merge_size=2)
    processor = PilProcessor(
        patch_size=14, merge_size=2, temporal_patch_size=2, image_mean=CLIP_MEAN, image_std=CLIP_STD
    )
    expected = processor(images=[picture], return_tensors="pt", do_resize=False)
    assert [list(grid)] == expected["image_grid_thw"].tolist()
    torch.testing.assert_close(patches, expected["pixel_values"], rtol=1e-5, atol=1e-5)


def test_patches_differ_when_two_merged_squares_change_places() -> None:
    picture = tiny_models.picture(56, 28)
    swapped = Image.new("RGB", (56, 28))
    swapped.paste(picture.crop((28, 0, 56, 28)), (0, 0))
    swapped.paste(picture.crop((0, 0, 28, 28)), (28, 0))
    ours, _ = to_patches(picture, patch_size=14, merge_size=2)
    theirs, _ = to_patches(swapped, patch_size=14, merge_size=2)
    assert torch.equal(ours[:4], theirs[4:])
    assert not torch.equal(ours[:4], theirs[:4])


# Image encoder and prompt


@pytest.mark.parametrize("size", [(300, 200), (200, 301), (224, 224), (90, 1000)])
def test_the_image_encoder_sees_the_middle_with_its_short_side_resized(size: tuple[int, int]) -> None:
    picture = tiny_models.picture(*size)
    pixels = preprocess_for_image_encoder(picture, 112)
    assert pixels.shape == (3, 112, 112)
    width, height = size
    scale = 112 / min(size)
    scaled = picture.resize((int(width * scale), int(height * scale)), Image.Resampling.BICUBIC)
    left, top = (scaled.width - 112) // 2, (scaled.height - 112) // 2
    expected = np.asarray(scaled.crop((left, top, left + 112, top + 112)), dtype=np.float32) / 255
    shown = pixels.permute(1, 2, 0).numpy() * np.array(CLIP_STD) + np.array(CLIP_MEAN)
    # An odd remainder may put the crop one pixel to the side.
    assert np.abs(shown - expected).mean() < 0.02
    assert shown.min() >= -1e-5
    assert shown.max() <= 1 + 1e-5


def test_a_picture_inside_a_prompt_is_448_pixels_whatever_its_aspect() -> None:
    assert preprocess_for_prompt(tiny_models.picture(300, 100)).size == (448, 448)
    assert preprocess_for_prompt(tiny_models.picture(300, 100), factor=32).size == (448, 448)
    assert preprocess_for_prompt(tiny_models.picture(30, 10), factor=60).size == (420, 420)


# Files


def save(picture: Image.Image, path: Path, **options: object) -> Path:
    picture.save(path, **options)
    return path


def test_pictures_are_turned_upright(tmp_path: Path) -> None:
    picture = Image.new("RGB", (20, 10), "white")
    picture.paste("red", (0, 0, 10, 10))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to see it upright
    upright = load_image(save(picture, tmp_path / "turned.png", exif=exif))
    assert upright.size == (10, 20)
    assert upright.getpixel((5, 2)) == (255, 0, 0)
    assert upright.getpixel((5, 17)) == (255, 255, 255)


def palette_picture() -> Image.Image:
    picture = Image.new("P", (2, 1), 0)
    picture.putpalette([0, 0, 255, 255, 0, 0])
    picture.putpixel((1, 0), 1)
    return picture


@pytest.mark.parametrize(
    ("picture", "options", "left", "right"),
    [
        (Image.new("RGBA", (2, 1), (0, 0, 0, 0)), {}, (255, 255, 255), (255, 255, 255)),
        (Image.new("RGBA", (2, 1), (255, 0, 0, 128)), {}, (255, 127, 127), (255, 127, 127)),
        (Image.new("LA", (2, 1), (0, 0)), {}, (255, 255, 255), (255, 255, 255)),
        (palette_picture(), {"transparency": 0}, (255, 255, 255), (255, 0, 0)),
        (palette_picture(), {}, (0, 0, 255), (255, 0, 0)),
        (Image.new("L", (2, 1), 77), {}, (77, 77, 77), (77, 77, 77)),
        (Image.new("1", (2, 1), 1), {}, (255, 255, 255), (255, 255, 255)),
    ],
)
def test_every_kind_of_png_becomes_rgb_on_white(
    tmp_path: Path, picture: Image.Image, options: dict, left: tuple, right: tuple
) -> None:
    loaded = load_image(save(picture, tmp_path / "kind.png", **options))
    assert loaded.mode == "RGB"
    assert (loaded.getpixel((0, 0)), loaded.getpixel((1, 0))) == (left, right)


def test_sixteen_bits_keep_their_grey(tmp_path: Path) -> None:
    values = np.array([[0, 32768, 65535]], dtype=np.uint16)
    loaded = load_image(save(Image.fromarray(values), tmp_path / "deep.png"))
    assert [loaded.getpixel((x, 0)) for x in range(3)] == [(0, 0, 0), (128, 128, 128), (255, 255, 255)]


def test_sixteen_bits_in_a_wider_mode_keep_their_grey() -> None:
    """Pillow below 10.3 opens 16-bit PNG files in mode I."""
    values = np.array([[0, 32768, 65535]], dtype=np.int32)
    loaded = to_rgb(Image.fromarray(values))
    assert [loaded.getpixel((x, 0)) for x in range(3)] == [(0, 0, 0), (128, 128, 128), (255, 255, 255)]


def test_sixteen_bits_with_a_transparent_grey_open_too(tmp_path: Path) -> None:
    values = np.array([[0, 32768, 65535]], dtype=np.uint16)
    loaded = load_image(save(Image.fromarray(values), tmp_path / "deep.png", transparency=0))
    assert loaded.mode == "RGB"
    assert loaded.getpixel((1, 0)) == (128, 128, 128)


def test_cmyk_jpegs_open(tmp_path: Path) -> None:
    loaded = load_image(save(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), tmp_path / "print.jpg"))
    red, green, blue = loaded.getpixel((4, 4))
    assert red > 200
    assert green < 60
    assert blue < 60


def test_a_missing_picture_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="no picture .*nothing.png"):
        load_image(tmp_path / "nothing.png")


@pytest.mark.parametrize("content", [b"", b"no picture at all", None])
def test_a_damaged_picture_is_named(tmp_path: Path, content: bytes | None) -> None:
    path = save(tiny_models.picture(), tmp_path / "broken.png")
    path.write_bytes(path.read_bytes()[:200] if content is None else content)
    with pytest.raises(BadInputError, match="(?s)broken.png.*cannot be opened.*PNG, JPEG or WebP"):
        load_image(path)


def test_a_folder_is_no_picture(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="cannot be opened"):
        load_image(tmp_path)


# Tensors


def test_pictures_survive_the_way_to_tensors_and_back() -> None:
    pictures = [tiny_models.picture(seed=seed) for seed in range(3)]
    images = from_pil(pictures)
    assert images.shape == (3, 60, 80, 3)
    assert [picture.tobytes() for picture in to_pil(images)] == [picture.tobytes() for picture in pictures]


def test_one_picture_without_a_batch_axis_is_a_picture() -> None:
    assert len(to_pil(torch.zeros(4, 5, 3))) == 1
    assert to_pil(torch.zeros(4, 5, 3))[0].size == (5, 4)


def test_grey_and_transparent_tensors_become_rgb() -> None:
    grey, transparent = torch.full((1, 2, 2, 1), 0.5), torch.zeros(1, 2, 2, 4)
    assert to_pil(grey)[0].getpixel((0, 0)) == (128, 128, 128)
    assert to_pil(transparent)[0].getpixel((0, 0)) == (255, 255, 255)


def test_values_outside_the_range_are_clamped() -> None:
    assert to_pil(torch.tensor([[[[-0.5, 0.5, 1.5]]]]))[0].getpixel((0, 0)) == (0, 128, 255)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_pictures_that_are_not_numbers_are_refused(value: float) -> None:
    images = torch.zeros(2, 2, 2, 3)
    images[1, 0, 0, 0] = value
    with pytest.raises(BadInputError, match="not numbers"):
        to_pil(images)


@pytest.mark.parametrize("shape", [(0, 4, 4, 3), (2, 0, 4, 3), (2, 3, 4, 4, 3), (4, 4), (1, 3, 8, 8)])
def test_tensors_that_are_no_pictures_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(BadInputError, match="Expected pictures as"):
        to_pil(torch.zeros(shape))


def test_pixels_run_from_minus_one_to_one() -> None:
    pixels = to_pixels(torch.tensor([[[[0.0, 0.5, 1.0]]]]))
    assert pixels.shape == (1, 3, 1, 1)
    assert pixels.flatten().tolist() == [-1, 0, 1]


def test_fitting_keeps_the_middle() -> None:
    picture = Image.new("RGB", (30, 10), "white")
    picture.paste("red", (10, 0, 20, 10))
    fitted = fit_size(picture, 16, 16)
    assert fitted.size == (16, 16)
    assert fitted.getpixel((8, 8)) == (255, 0, 0)
