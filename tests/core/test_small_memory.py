"""Fewer bits and layers that visit the device: what changes and what must not."""

from pathlib import Path

import pytest
import tiny_models
import torch
from comfyui_blip3o.blip3o_core import offload
from comfyui_blip3o.blip3o_core.config import BUILT_IN_MODEL
from comfyui_blip3o.blip3o_core.errors import BadInputError, Blip3oError
from comfyui_blip3o.blip3o_core.pipeline import load_pipeline
from comfyui_blip3o.blip3o_core.quantize import (
    FORMATS,
    NF4_LEVELS,
    QuantizedLinear,
    dequantize,
    quantize,
    quantize_network,
)

CPU = torch.device("cpu")
# Largest error of one weight, in units of the largest weight of its row or block.
STEPS = {"fp8": 2**-4, "int8": 0.5 / 127, "nf4": 0.5 * (NF4_LEVELS[1] - NF4_LEVELS[0]) + 2**-8}


@pytest.mark.parametrize("weight_format", FORMATS)
def test_no_weight_is_off_by_more_than_half_a_step(weight_format: str) -> None:
    weight = torch.randn(24, 100, generator=torch.Generator().manual_seed(0))
    packed = quantize(weight, weight_format)
    again = dequantize(*packed, weight_format, torch.float32, 100)
    largest = weight.abs().amax(1, keepdim=True)
    assert ((again - weight).abs() <= STEPS[weight_format] * largest * 1.001).all()
    assert (again - weight).abs().max() > 0


def test_nf4_keeps_its_own_levels_exactly() -> None:
    levels = torch.tensor(NF4_LEVELS)
    weight = levels.repeat(2, 8)
    again = dequantize(*quantize(weight, "nf4"), "nf4", torch.float32, 128)
    torch.testing.assert_close(again, weight)


@pytest.mark.parametrize("weight_format", FORMATS)
def test_a_quantized_layer_computes_with_its_weight(weight_format: str) -> None:
    linear = torch.nn.Linear(96, 40)
    layer = QuantizedLinear(linear, weight_format, CPU)
    features = torch.randn(3, 5, 96)
    weight = dequantize(layer.quantized, layer.scales, weight_format, torch.float32, 96)
    torch.testing.assert_close(layer(features), features @ weight.T + linear.bias)
    similarity = torch.nn.functional.cosine_similarity(layer(features), linear(features), dim=-1).min()
    assert similarity > 0.98


def test_head_embedding_and_small_layers_keep_their_bits() -> None:
    backbone = tiny_models.build_backbone()
    quantize_network(backbone, "int8", CPU)
    assert type(backbone.lm_head) is torch.nn.Linear
    assert not any(isinstance(module, QuantizedLinear) for module in backbone.modules())  # all are small


@pytest.mark.parametrize(("weight_format", "floor"), [("fp8", 0.995), ("int8", 0.998), ("nf4", 0.95)])
def test_conditioning_stays_close_in_fewer_bits(weight_format: str, floor: float) -> None:
    prompts = ["a red circle left of a blue square", "two green triangles"]
    plain = load_pipeline(BUILT_IN_MODEL, device="cpu").encode_prompts(prompts)
    pipeline = load_pipeline(BUILT_IN_MODEL, device="cpu", quantize=weight_format)
    ours = pipeline.encode_prompts(prompts)
    assert any(isinstance(module, QuantizedLinear) for module in pipeline.backbone.modules())
    similarity = torch.nn.functional.cosine_similarity(ours, plain, dim=-1)
    assert floor < similarity.mean() < 0.999999


def test_unknown_formats_are_refused_before_anything_is_read(tiny_folder: Path) -> None:
    with pytest.raises(BadInputError, match="fp8, int8, nf4"):
        load_pipeline(tiny_folder, quantize="int3")


def test_streamed_layers_compute_the_same(tiny_folder: Path) -> None:
    pytest.importorskip("diffusers.hooks")
    plain = load_pipeline(tiny_folder, dtype="fp32", device="cpu")
    streamed = load_pipeline(tiny_folder, dtype="fp32", device="cpu", stream=True)
    shown = [[tiny_models.picture()], []]
    prompts = ["a red circle", "a cute cat"]
    torch.testing.assert_close(streamed.encode_prompts(prompts, shown), plain.encode_prompts(prompts, shown))
    assert streamed.ask("What is this ?", [[tiny_models.picture()]]) == plain.ask(
        "What is this ?", [[tiny_models.picture()]]
    )
    pictures = [tiny_models.picture()]
    torch.testing.assert_close(streamed.encode_images(pictures), plain.encode_images(pictures))


def test_an_old_diffusers_cannot_stream_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "diffusers.hooks", None)
    with pytest.raises(Blip3oError, match=r"diffusers 0\.33"):
        offload.stream_layers(torch.nn.Linear(2, 2), CPU)
