"""Views: which part of a picture is encoded, and how much each feature counts."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from comfyui_blip3o.blip3o_core.config import BUILT_IN_MODEL
from comfyui_blip3o.blip3o_core.images import load_image, preprocess_for_image_encoder
from comfyui_blip3o.blip3o_core.pipeline import load_pipeline
from comfyui_blip3o.lora_training.config import DataConfig
from comfyui_blip3o.lora_training.data.cache import feature_weights
from comfyui_blip3o.lora_training.data.crops import (
    View,
    choose_views,
    cut,
    describe_transform,
    grid_weights,
    read_mask,
    share_cut_away,
)
from comfyui_blip3o.lora_training.data.dataset import Item, scan_dataset
from PIL import Image, ImageDraw
from training_sets import config_of


def only_item(folder: Path, picture: Image.Image, *overrides: str, **data: object) -> tuple[Item, DataConfig]:
    folder.mkdir(exist_ok=True)
    picture.save(folder / "one.png")
    config = config_of(folder, "data.caption.missing=skip", *overrides, **data).data
    return scan_dataset(config).items[0], config


def views_of(item: Item, config: DataConfig) -> tuple[list[View], list[Image.Image]]:
    picture = item.open()
    views = choose_views(item, picture, config, read_mask(item, picture, config))
    return views, [cut(picture, view, config) for view in views]


def busy(width: int, height: int, left: int, top: int, side: int = 40) -> Image.Image:
    """Grey with a noisy square."""
    picture = Image.new("RGB", (width, height), "grey")
    noise = np.random.default_rng(0).integers(0, 255, (side, side, 3), np.uint8)
    picture.paste(Image.fromarray(noise), (left, top))
    return picture


@pytest.mark.parametrize("size", [(128, 128), (300, 200), (77, 131), (40, 30)])
def test_a_centre_crop_is_the_published_preprocessing_to_the_bit(tmp_path: Path, size: tuple[int, int]):
    item, config = only_item(tmp_path / "set", busy(*size, 5, 5, 20))
    pipeline = load_pipeline(BUILT_IN_MODEL, dtype="fp32", device="cpu")
    (view,) = views_of(item, config)[1]
    original = load_image(tmp_path / "set" / "one.png")
    assert torch.equal(preprocess_for_image_encoder(view, 128), preprocess_for_image_encoder(original, 128))
    assert torch.equal(pipeline.encode_images([view]), pipeline.encode_images([original]))


@pytest.mark.parametrize(
    ("size", "place"), [((300, 100), (10, 30)), ((300, 100), (240, 10)), ((100, 320), (30, 250))]
)
def test_a_smart_crop_shows_the_detail(tmp_path: Path, size: tuple[int, int], place: tuple[int, int]):
    item, config = only_item(tmp_path / "set", busy(*size, *place), crop={"mode": "smart"})
    ((left, top, right, bottom),) = (view.box for view in views_of(item, config)[0])
    assert right - left == bottom - top == 100
    assert left <= place[0] and place[0] + 40 <= right
    assert top <= place[1] and place[1] + 40 <= bottom
    assert 0 <= left and right <= size[0] and 0 <= top and bottom <= size[1]


def test_a_smart_crop_of_nothing_is_the_middle(tmp_path: Path):
    item, config = only_item(tmp_path / "set", Image.new("RGB", (301, 100), "red"), crop={"mode": "smart"})
    assert views_of(item, config)[0][0].box[0] in (100, 101)


def test_a_smart_crop_follows_the_mask_where_there_is_one(tmp_path: Path):
    folder = tmp_path / "set"
    folder.mkdir()
    mask = Image.new("L", (300, 100), 0)
    mask.paste(255, (230, 20, 290, 80))
    mask.save(folder / "one_mask.png")
    item, config = only_item(folder, busy(300, 100, 10, 30), crop={"mode": "smart"}, mask="files")
    assert views_of(item, config)[0][0].box[0] > 150
    assert views_of(item, replace(config, mask="none"))[0][0].box[0] < 150


@pytest.mark.parametrize("size", [(200, 81), (81, 200), (128, 128)])
def test_a_letterbox_shows_all_of_it_on_the_background(tmp_path: Path, size: tuple[int, int]):
    picture = Image.new("RGB", size, "red")
    item, config = only_item(tmp_path / "set", picture, crop={"mode": "letterbox"}, background="#0000ff")
    (view,), (shown,) = views_of(item, config)
    side = max(size)
    assert shown.size == (side, side)
    colours = {colour: count for count, colour in shown.getcolors()}
    assert colours[255, 0, 0] == size[0] * size[1]
    assert colours.get((0, 0, 255), 0) == side * side - size[0] * size[1]
    weights = grid_weights(view, size, None, 8)
    assert weights.mean().item() == pytest.approx(min(size) / side, abs=1e-6)


def test_views_are_seeded_squares_of_the_content(tmp_path: Path):
    picture = busy(300, 200, 100, 60)
    item, config = only_item(tmp_path / "set", picture, crop={"mode": "views", "views": 6})
    views, shown = views_of(item, config)
    assert len({view.box for view in views}) == 6
    for view, each in zip(views, shown, strict=True):
        left, top, right, bottom = view.box
        assert 160 <= right - left == bottom - top <= 200
        assert 0 <= left and right <= 300 and 0 <= top and bottom <= 200
        assert each.tobytes() == picture.crop((left, top, right, bottom)).tobytes()
    assert views_of(replace(item, name="renamed.png"), config)[0] == views
    assert views_of(replace(item, digest="ab" * 12), config)[0] != views
    fewer = replace(config, crop=replace(config.crop, views=2))
    assert views_of(item, fewer)[0] == views[:2]


@pytest.mark.parametrize("mode", ["centre", "smart", "letterbox", "views"])
def test_flipped_views_are_mirror_images_with_mirrored_weights(tmp_path: Path, mode: str):
    picture = busy(300, 200, 10, 20).convert("RGBA")
    alpha = Image.new("L", picture.size, 0)
    alpha.paste(255, (0, 0, 130, 200))
    picture.putalpha(alpha)
    item, config = only_item(
        tmp_path / "set", picture, crop={"mode": mode, "views": 3, "flip": True}, mask="alpha"
    )
    views, shown = views_of(item, config)
    half = len(views) // 2
    assert half == (3 if mode == "views" else 1)
    mask = read_mask(item, item.open(), config)
    for index in range(half):
        mirrored = shown[index].transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        assert shown[half + index].tobytes() == mirrored.tobytes()
        one, other = (
            grid_weights(views[place], picture.size, mask, 8).reshape(8, 8) for place in (index, half + index)
        )
        assert torch.equal(one.flip(1), other)
        assert not torch.equal(one, other)


# Weights


def test_a_mask_becomes_the_share_of_each_cell():
    mask = Image.new("L", (160, 160), 0)
    ImageDraw.Draw(mask).rectangle((0, 0, 79, 9), fill=255)
    weights = grid_weights(View((0, 0, 160, 160)), mask.size, mask, 8).reshape(8, 8)
    expected = torch.zeros(8, 8)
    expected[0, :4] = 0.5
    torch.testing.assert_close(weights, expected)
    half = grid_weights(View((0, 0, 160, 160)), mask.size, Image.new("L", mask.size, 128), 8)
    torch.testing.assert_close(half, torch.full((64,), 128 / 255))


def test_cells_that_split_pixels_weigh_exact_areas():
    random = np.random.default_rng(1)
    mask = Image.fromarray(random.integers(0, 256, (37, 53), np.uint8))
    # Each pixel as 8 x 8 pixels: cells of 37 / 8 pixels then begin and end between whole ones.
    fine = np.kron(np.asarray(mask, float) / 255, np.ones((8, 8)))[:, 8 * 8 : 8 * 45]
    expected = fine.reshape(8, 37, 8, 37).mean(axis=(1, 3))
    weights = grid_weights(View((8.0, 0.0, 45.0, 37.0)), mask.size, mask, 8).reshape(8, 8)
    np.testing.assert_allclose(weights.numpy(), expected, atol=1e-6)


def test_a_picture_without_mask_or_bars_has_no_weights(tmp_path: Path):
    item, _ = only_item(tmp_path / "set", busy(128, 128, 5, 5))
    config = config_of(tmp_path / "set")
    assert feature_weights(item, config, 64) is None
    assert feature_weights(item, config_of(tmp_path / "set", crop={"mode": "letterbox"}), 64) is None


def test_a_mask_of_another_size_is_scaled_to_its_picture(tmp_path: Path):
    folder = tmp_path / "set"
    folder.mkdir()
    mask = Image.new("L", (30, 20), 0)
    mask.paste(255, (15, 0, 30, 20))
    mask.save(folder / "one_mask.png")
    item, config = only_item(folder, busy(300, 200, 10, 10), mask="files")
    weights = feature_weights(item, config_of(folder, mask="files"), 64).reshape(8, 8)
    assert torch.equal(weights[:, :4], torch.zeros(8, 4))
    assert torch.equal(weights[:, 4:], torch.ones(8, 4))


# Settings


def test_the_transform_names_just_the_settings_that_change_pixels(tmp_path: Path):
    def transform(**data: object) -> str:
        return describe_transform(config_of(tmp_path, **data).data)

    assert transform() == transform(crop={"views": 9}) == transform(trigger="x", mask="alpha", holdout="none")
    others = [
        transform(crop={"mode": "smart"}),
        transform(crop={"mode": "smart"}, mask="alpha"),
        transform(crop={"mode": "views"}),
        transform(crop={"mode": "views", "views": 9}),
        transform(crop={"flip": True}),
        transform(background="black"),
    ]
    assert len({transform(), *others}) == 1 + len(others)


def test_the_share_cut_away_is_that_of_the_longer_side(tmp_path: Path):
    item, config = only_item(tmp_path / "set", busy(400, 100, 5, 5))
    assert share_cut_away(item, config.crop) == 0.75
    assert share_cut_away(item, replace(config.crop, mode="letterbox")) == 0
