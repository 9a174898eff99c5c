"""Blend, compose and compare in a real ComfyUI, against what arithmetic says must come out."""

from typing import Any

import api_graphs
import pytest
from api_graphs import node
from comfyui_server import Server, error_of

REFERENCE = "reference"


def two_sets() -> dict[str, Any]:
    """Nodes 3 and 6: image features of two seeds."""
    graph = api_graphs.text_to_image(REFERENCE, seed=7)
    graph["6"] = {**graph["3"], "inputs": {**graph["3"]["inputs"], "seed": 8}}
    del graph["4"], graph["5"]
    return graph


def similarity(server: Server, graph: dict[str, Any], first: str, second: str) -> float:
    graph = {**graph, "90": node("BLIP3oCompareFeatures", first=[first, 0], second=[second, 0])}
    graph["91"] = node("PreviewAny", source=["90", 0])
    return float(server.run(graph)["91"]["text"][0])


def blended(weights: str, mode: str = "slerp") -> dict[str, Any]:
    graph = two_sets()
    wires = {"features.features_0": ["3", 0], "features.features_1": ["6", 0]}
    graph["10"] = node("BLIP3oBlendFeatures", mode=mode, weights=weights, **wires)
    return graph


@pytest.mark.parametrize("mode", ["slerp", "lerp"])
def test_a_weight_of_zero_leaves_the_other_input(server: Server, mode: str):
    assert similarity(server, blended("2, 0", mode), "10", "3") == pytest.approx(1, abs=1e-5)
    assert similarity(server, blended("0, 1", mode), "10", "6") == pytest.approx(1, abs=1e-5)


def test_equal_weights_lie_in_the_middle(server: Server):
    graph = blended("")
    to_first, to_second = similarity(server, graph, "10", "3"), similarity(server, graph, "10", "6")
    assert to_first == pytest.approx(to_second, abs=1e-4)
    assert to_first > similarity(server, graph, "3", "6")


BAD_WEIGHTS = {"1": "1 weights for 2 inputs", "1, x": "are not numbers", "1, -1": "add up to zero"}


@pytest.mark.parametrize("weights", BAD_WEIGHTS)
def test_weights_that_make_no_sense_are_explained(server: Server, weights: str):
    graph = blended(weights)
    graph["11"] = node("BLIP3oSaveFeatures", image_features=["10", 0], filename_prefix="x")
    assert BAD_WEIGHTS[weights] in error_of(server.wait(server.queue(graph)))


@pytest.mark.parametrize(("value", "same", "other"), [(0.0, "3", "6"), (1.0, "6", "3")])
def test_a_collage_shows_the_foreground_where_the_mask_is_white(
    server: Server, value: float, same: str, other: str
):
    graph = two_sets()
    graph["9"] = node("SolidMask", value=value, width=100, height=60)
    graph["10"] = node(
        "BLIP3oComposeFeatures", background=["3", 0], foreground=["6", 0], mask=["9", 0], hard_edge=False
    )
    assert similarity(server, graph, "10", same) == pytest.approx(1, abs=1e-5)
    assert similarity(server, graph, "10", other) < 0.999


def test_features_of_different_models_are_not_mixed(server: Server, checkpoint: str):
    if checkpoint == REFERENCE:
        pytest.skip("needs the built-in model as the second one")
    graph = two_sets()
    other = api_graphs.text_to_image(checkpoint, seed=1)
    graph |= {
        f"2{key}": {
            **part,
            "inputs": {
                name: [f"2{value[0]}", value[1]] if isinstance(value, list) else value
                for name, value in part["inputs"].items()
            },
        }
        for key, part in other.items()
        if key in "123"
    }
    graph["30"] = node("BLIP3oCompareFeatures", first=["3", 0], second=["23", 0])
    graph["31"] = node("PreviewAny", source=["30", 0])
    assert "different models or grids" in error_of(server.wait(server.queue(graph)))
