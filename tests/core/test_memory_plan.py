"""Plans for cards of a size, from headers alone, against real networks and the published sizes."""

import json
from pathlib import Path

import pytest
import torch
from comfyui_blip3o.blip3o_core.checkpoints.layout import CheckpointFiles, open_checkpoint
from comfyui_blip3o.blip3o_core.checkpoints.load import load_backbone, load_decoder, load_dit
from comfyui_blip3o.blip3o_core.checkpoints.match import needed_tensors
from comfyui_blip3o.blip3o_core.checkpoints.memory_plan import (
    WAYS,
    Way,
    measure_disk,
    network_bytes,
    parse_memory,
    plan_json,
    plan_memory,
)
from comfyui_blip3o.blip3o_core.config import BUILT_IN_MODEL
from comfyui_blip3o.blip3o_core.errors import BadInputError
from comfyui_blip3o.blip3o_core.performance.quantize import FORMATS, quantize_network
from comfyui_blip3o.blip3o_core.units import GIB
from comfyui_blip3o.cli import build_parser, main
from published_shapes import write_published_shapes


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> CheckpointFiles:
    return open_checkpoint(write_published_shapes(tmp_path_factory.mktemp("published") / "8B"))


def size_of(network: torch.nn.Module) -> int:
    quantized = [buffer for name, buffer in network.named_buffers() if name.endswith((".codes", ".scales"))]
    return sum(tensor.nbytes for tensor in [*network.parameters(), *quantized])


@pytest.mark.parametrize(
    ("text", "size"), [("8GB", 8 * GIB), ("7.5 gib", int(7.5 * GIB)), ("12", 12 * GIB), ("512MB", 2**29)]
)
def test_sizes_are_read_as_people_write_them(text: str, size: int) -> None:
    assert parse_memory(text) == size


@pytest.mark.parametrize("text", ["", "much", "-3GB", "0GB", "8 TB"])
def test_other_sizes_are_refused(text: str) -> None:
    with pytest.raises(BadInputError, match="like 8GB"):
        parse_memory(text)


@pytest.mark.parametrize("load", [load_backbone, load_dit, load_decoder])
def test_bytes_are_those_of_the_loaded_network(load) -> None:
    files = open_checkpoint(BUILT_IN_MODEL)
    tensors = needed_tensors(files, load.__name__.removeprefix("load_"))
    assert network_bytes(tensors) == size_of(load(files, dtype=torch.bfloat16))


@pytest.mark.parametrize("weight_format", FORMATS)
def test_bytes_are_those_of_the_quantized_network(weight_format: str) -> None:
    files = open_checkpoint(BUILT_IN_MODEL)
    planned = network_bytes(needed_tensors(files, "backbone"), weight_format)
    backbone = load_backbone(files, dtype=torch.bfloat16)
    whole = size_of(backbone)
    real = size_of(quantize_network(backbone, weight_format, torch.device("cpu")))
    # Scales of rows, and what nf4 fills up narrow rows with, are not counted.
    assert planned == pytest.approx(real, rel=0.05)
    assert real < 0.8 * whole


@pytest.mark.parametrize(
    ("size", "use", "options"),
    [
        ("48GB", "draw", ""),
        ("17.5GB", "draw", "--offload"),
        ("12GB", "draw", "--offload --stream"),
        ("8GB", "draw", "--offload --stream"),
        ("24GB", "answer", ""),
        ("12GB", "answer", "--quantize int8"),
        ("8GB", "answer", "--quantize nf4"),
        ("24GB", "vary", ""),
        ("12GB", "vary", "--offload"),
    ],
)
def test_the_published_8b_fits(published: CheckpointFiles, size: str, use: str, options: str) -> None:
    plan = plan_memory(published, parse_memory(size), use)
    assert plan.fits
    assert plan.peak_bytes <= parse_memory(size)
    assert plan.way.options == options


def test_the_published_sizes_are_told(published: CheckpointFiles) -> None:
    plan = plan_memory(published, 48 * GIB)
    sizes = {each.component: each.device_bytes / 1e9 for each in plan.placements}
    assert sizes == pytest.approx({"backbone": 16.58, "dit": 2.73, "decoder": 5.22}, abs=0.02)
    assert plan.load_bytes == pytest.approx(24.5e9, rel=0.01)


def test_too_small_a_card_is_told_how_much_is_needed(published: CheckpointFiles) -> None:
    plan = plan_memory(published, 4 * GIB)
    assert not plan.fits
    assert "too small" in str(plan)
    assert f"{plan.peak_bytes / GIB:.2f} GB" in str(plan)


def test_better_ways_need_more_memory(published: CheckpointFiles) -> None:
    for use, ways in WAYS.items():
        peaks = [plan_memory(published, size * GIB, use).peak_bytes for size in (4, 8, 12, 24, 48)]
        assert peaks == sorted(peaks), use
        assert ways[0] == Way()


def test_loading_takes_the_bytes_by_the_speed_of_the_disk(published: CheckpointFiles) -> None:
    plan = plan_memory(published, 48 * GIB, bytes_per_second=2e9)
    assert plan.load_seconds == pytest.approx(plan.load_bytes / 2e9)
    assert f"about {plan.load_seconds:.0f} s" in str(plan)


def test_a_disk_is_measured_with_its_own_file(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(bytes(10**6))
    assert 1e5 < measure_disk(path) < 1e12


def test_every_way_is_one_the_command_line_takes() -> None:
    for ways in WAYS.values():
        for way in ways:
            parsed = build_parser().parse_args(["generate", "a cat", *way.options.split()])
            chosen = (parsed.offload, parsed.quantize, parsed.stream, bool(parsed.tiled))
            assert chosen == (way.offload, way.quantize, way.stream, way.tiled)


def test_the_command_prints_plans(published: CheckpointFiles, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(published.folder), "--plan", "8GB"]) == 0
    text = capsys.readouterr().out
    assert "To draw on 8 GB: --offload --stream" in text
    assert "To answer on 8 GB: --quantize nf4" in text
    assert main(["info", str(published.folder), "--plan", "8GB", "--json"]) == 0
    plans = json.loads(capsys.readouterr().out)["plans"]
    assert plans[0]["options"] == plan_json(plan_memory(published, 8 * GIB))["options"]
    assert main(["info", "--plan", "plenty"]) == 2


def test_a_plan_that_leaves_a_desktop_no_room_names_the_next_smaller_way(published: CheckpointFiles) -> None:
    tight = plan_memory(published, int(1.02 * plan_memory(published, 48 * GIB).peak_bytes))
    assert tight.smaller is not None
    options, peak = tight.smaller
    assert options == "--offload" and peak < 0.9 * tight.peak_bytes
    assert f"{options}, at most" in str(tight)
    assert plan_memory(published, 48 * GIB).smaller is None
