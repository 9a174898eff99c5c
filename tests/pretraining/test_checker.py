"""The judge: right on clean pictures, strict on wrong ones, and blind to how a picture was made."""

import numpy as np
import pytest
from comfyui_blip3o.pretraining.world.captions import Request, Thing, corrupt, draw_caption_and_request
from comfyui_blip3o.pretraining.world.checker import (
    check_prompt,
    check_report,
    components,
    look,
    loose_report,
    matches_scene,
)
from comfyui_blip3o.pretraining.world.scenes import draw_scenes, render
from PIL import Image, ImageDraw


def test_clean_scenes_are_read_without_error():
    scenes = draw_scenes(400, 21, held_out=None)
    images = render(scenes)
    right = [matches_scene(look(image), scenes, n) for n, image in enumerate(images)]
    assert np.mean(right) >= 0.99


def test_a_picture_passes_its_own_caption_and_fails_one_with_a_single_thing_changed():
    scenes = draw_scenes(200, 22, held_out=None)
    rng = np.random.default_rng(0)
    for n, image in enumerate(render(scenes)):
        report = look(image)
        caption, request = draw_caption_and_request(scenes, n, rng)
        assert check_report(report, request), caption
        other, change = corrupt(scenes, n, rng)
        plain = 0.0 if change in ("swap", "turn") else 0.45
        caption, request = draw_caption_and_request(other, 0, rng, colourless=0.0, plain=plain)
        assert not check_report(report, request), caption


def drawn(*shapes):
    """A white picture with shapes drawn by Pillow, not by the project's renderer."""
    image = Image.new("RGB", (128, 128), "white")
    draw = ImageDraw.Draw(image)
    for method, box, colour in shapes:
        getattr(draw, method)(box, fill=colour)
    return np.asarray(image)


RED, BLUE = (225, 30, 40), (30, 70, 230)


def test_pictures_of_another_maker_are_read_too():
    image = drawn(("ellipse", (20, 50, 55, 85), RED), ("rectangle", (75, 50, 110, 85), BLUE))
    things = (Thing("circle", "red"), Thing("square", "blue"))
    assert check_prompt(image, Request(things, "left of", "white"))
    assert not check_prompt(image, Request(things, "right of", "white"))
    assert not check_prompt(image, Request(things[::-1], "left of", "white"))
    assert not check_prompt(image, Request(things, None, "black"))


def test_an_object_too_many_or_too_few_is_wrong():
    two = drawn(("ellipse", (20, 50, 55, 85), RED), ("ellipse", (75, 50, 110, 85), RED))
    assert check_prompt(two, Request((Thing("circle", "red", 2),)))
    assert not check_prompt(two, Request((Thing("circle", "red", 3),)))
    assert not check_prompt(two, Request((Thing("circle", "red"),)))


def test_one_object_in_two_colours_has_no_colour():
    image = drawn(("rectangle", (40, 40, 88, 64), RED), ("rectangle", (40, 64, 88, 88), BLUE))
    found = look(image).objects
    assert [thing.colour for thing in found] == [None]
    assert found[0].kind == "square"
    assert not check_prompt(image, Request((Thing("square"),)))


def test_a_shapeless_blob_has_no_kind():
    image = drawn(("polygon", [(30, 60), (90, 58), (92, 64), (60, 90), (55, 66), (31, 66)], RED))
    assert [thing.kind for thing in look(image).objects] == [None]


def test_the_loose_report_says_what_is_right_in_a_wrong_picture():
    image = drawn(("ellipse", (20, 50, 55, 85), RED), ("rectangle", (75, 50, 110, 85), BLUE))
    request = Request((Thing("circle", "blue"), Thing("square", "red")), "above", "white")
    assert loose_report(image, request) == {
        "ground": True,
        "number": True,
        "kinds": True,
        "colours": True,
        "axis": False,
    }


@pytest.mark.parametrize("seed", range(4))
def test_components_equal_a_flood_fill(seed):
    mask = np.random.default_rng(seed).random((24, 24)) < 0.35
    regions = components(mask)
    label = np.zeros(mask.shape, int)
    for number, region in enumerate(regions, 1):
        assert not (label[region]).any()
        label[region] = number
    assert np.array_equal(label > 0, mask)
    seen = set()
    for start in zip(*np.nonzero(mask), strict=True):
        if start in seen:
            continue
        reached, todo = {start}, [start]
        while todo:
            y, x = todo.pop()
            for other in [(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]:
                if 0 <= other[0] < 24 and 0 <= other[1] < 24 and mask[other] and other not in reached:
                    reached.add(other)
                    todo.append(other)
        seen |= reached
        assert {int(label[place]) for place in reached} == {int(label[start])}
        assert (label == label[start]).sum() == len(reached)
