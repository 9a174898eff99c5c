"""The scene world: drawn from a seed, within its rules, with the held-out pairs kept out."""

import numpy as np
from comfyui_blip3o.pretraining.world.scenes import (
    BACKGROUND_RGB,
    COLOUR_RGB,
    MAX_OBJECTS,
    RELATIONS,
    coverage_maps,
    draw_scenes,
    pair_is_held_out,
    render,
)


def test_the_same_seed_gives_the_same_pictures_and_another_seed_others():
    first, again, other = (render(draw_scenes(20, seed)) for seed in (3, 3, 4))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_training_never_shows_a_held_out_pair_and_the_held_out_side_shows_nothing_else():
    for side in (False, True):
        scenes = draw_scenes(3000, 5, held_out=side)
        pairs = scenes.group == 1
        assert pairs.sum() > 1000
        assert (pair_is_held_out(scenes.kind[pairs, :2], scenes.colour[pairs, :2]) == side).all()


def test_a_pair_is_held_out_in_either_order():
    scenes = draw_scenes(500, 6, held_out=None)
    pairs = scenes.group == 1
    kind, colour = scenes.kind[pairs, :2], scenes.colour[pairs, :2]
    assert np.array_equal(pair_is_held_out(kind, colour), pair_is_held_out(kind[:, ::-1], colour[:, ::-1]))


def test_objects_stand_as_their_relation_says_and_do_not_touch():
    scenes = draw_scenes(2000, 7, held_out=None)
    for index, relation in enumerate(RELATIONS):
        rows = scenes.relation == index
        dx = scenes.x[rows, 0] - scenes.x[rows, 1]
        dy = scenes.y[rows, 0] - scenes.y[rows, 1]
        along = {"left of": -dx, "right of": dx, "above": -dy, "below": dy}[relation]
        assert (along > 2 * 20).all()


def test_counted_objects_are_alike_and_two_or_three():
    scenes = draw_scenes(2000, 8)
    counted = scenes.take(scenes.group == 2)
    assert set(counted.count) == {2, 3}
    for k in range(1, MAX_OBJECTS):
        rows = counted.count > k
        assert (counted.kind[rows, k] == counted.kind[rows, 0]).all()
        assert (counted.colour[rows, k] == counted.colour[rows, 0]).all()


def test_a_picture_holds_only_ground_colour_object_colours_and_their_mixtures():
    scenes = draw_scenes(40, 9)
    for n, image in enumerate(render(scenes)):
        inks = COLOUR_RGB[scenes.colour[n, : scenes.count[n]]]
        ground = BACKGROUND_RGB[scenes.background[n]]
        # Distance of every pixel to the segments from ground to each ink.
        pixels = image.reshape(-1, 1, 3).astype(float)
        direction = inks - ground
        share = ((pixels - ground) * direction).sum(-1) / (direction**2).sum(-1)
        nearest = ground + share.clip(0, 1)[..., None] * direction
        assert np.linalg.norm(pixels - nearest, axis=-1).min(axis=1).max() < 1.0


def test_coverage_counts_the_pixels_that_differ_from_the_ground():
    scenes = draw_scenes(30, 10)
    cover = coverage_maps(scenes, 8)
    drawn = (
        abs(render(scenes).astype(float) - BACKGROUND_RGB[scenes.background][:, None, None]).max(-1) > 127
    ).mean(axis=(1, 2))
    np.testing.assert_allclose(cover.mean(axis=(1, 2)), drawn, atol=0.01)
