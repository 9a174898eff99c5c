"""Curves drawn with Pillow."""

import math

import numpy as np
import pytest
from comfyui_blip3o.lora_training.proof.chart import (
    LEFT,
    PANEL_HEIGHT,
    RIGHT,
    WIDTH,
    Curve,
    Panel,
    draw_panels,
    ticks,
)
from PIL import Image

RED, BLUE = "#ff0000", "#0000ff"


def where(picture: Image.Image, colour: tuple[int, int, int]) -> np.ndarray:
    """Rows and columns (N, 2) of the pixels of a colour."""
    return np.argwhere((np.asarray(picture) == colour).all(axis=2))


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (0, 187, [0, 50, 100, 150]),
        (-0.1, 0.3, [-0.1, 0, 0.1, 0.2, 0.3]),
    ],
)
def test_ticks_are_round_numbers_inside(low: float, high: float, expected: list[float]):
    assert ticks(low, high) == pytest.approx(expected)


def test_a_rising_curve_goes_from_the_lower_left_to_the_upper_right():
    places = where(draw_panels([Panel("loss", [Curve([0, 10], [0, 5], RED)])]), (255, 0, 0))
    left, right = places[places[:, 1].argmin()], places[places[:, 1].argmax()]
    assert left[1] == pytest.approx(LEFT, abs=2) and right[1] == pytest.approx(WIDTH - RIGHT, abs=2)
    assert left[0] > right[0] + PANEL_HEIGHT / 2


def test_a_value_that_is_no_number_is_left_out():
    with_gap = Curve([0, 5, 10], [1, math.nan, 1], RED)
    without = Curve([0, 10], [1, 1], RED)
    first, second = (draw_panels([Panel("", [curve])]) for curve in (with_gap, without))
    assert first.tobytes() == second.tobytes()


def test_panels_share_their_steps_and_lie_below_each_other():
    picture = draw_panels(
        [Panel("", [Curve([0, 100], [1, 1], RED)]), Panel("", [Curve([0, 50], [1, 1], BLUE)])]
    )
    upper, lower = where(picture, (255, 0, 0)), where(picture, (0, 0, 255))
    assert upper[:, 0].max() < PANEL_HEIGHT <= lower[:, 0].min()
    assert lower[:, 1].max() == pytest.approx((LEFT + WIDTH - RIGHT) / 2, abs=3)


def test_a_dashed_curve_has_gaps_and_a_whole_one_has_none():
    def columns(style: str) -> set[int]:
        picture = draw_panels([Panel("", [Curve([0, 10], [1, 1], RED, style=style)])])
        return set(where(picture, (255, 0, 0))[:, 1])

    assert columns("--") < columns("-")
    assert len(columns("--")) < 0.8 * len(columns("-"))
