"""Weights in fewer bits: how far they are off, and products with them by every way that a machine has."""

from pathlib import Path

import pytest
import tiny_models
import torch
from comfyui_blip3o.blip3o_core.config import BUILT_IN_MODEL
from comfyui_blip3o.blip3o_core.errors import BadInputError
from comfyui_blip3o.blip3o_core.performance import quantize as module
from comfyui_blip3o.blip3o_core.performance.fused_dit import can_fuse
from comfyui_blip3o.blip3o_core.performance.quantize import (
    FORMATS,
    NF4_LEVELS,
    QuantizedLinear,
    can_multiply_int8,
    dequantize,
    multiply_quantized,
    quantize,
    quantize_network,
)
from comfyui_blip3o.blip3o_core.pipeline import load_pipeline
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

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
    weight = layer.weight
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


@pytest.mark.parametrize(
    ("weight_format", "error", "bits"), [("fp8", 0.04, 8.6), ("int8", 0.01, 8.6), ("nf4", 0.12, 6.0)]
)
def test_codes_keep_weights_within_the_error_of_their_format(
    weight_format: str, error: float, bits: float
) -> None:
    linear = torch.nn.Linear(96, 70)
    quantized = QuantizedLinear(linear, weight_format)
    difference = (quantized.weight - linear.weight).norm() / linear.weight.norm()
    assert 0.003 < difference < error
    stored = sum(buffer.nbytes for buffer in quantized.buffers())
    assert stored * 8 / linear.weight.numel() < bits


@pytest.mark.parametrize("weight_format", FORMATS)
def test_a_quantized_layer_computes_and_passes_gradients_as_a_layer_with_its_widened_weight(
    weight_format: str,
) -> None:
    quantized = QuantizedLinear(torch.nn.Linear(40, 24), weight_format)
    plain = torch.nn.Linear(40, 24)
    with torch.no_grad():
        plain.weight.copy_(quantized.weight)
        plain.bias.copy_(quantized.bias)
    inputs = torch.randn(2, 5, 40, requires_grad=True)
    results, gradients = zip(
        *(
            (layer(inputs), torch.autograd.grad((layer(inputs) ** 2).sum(), inputs)[0])
            for layer in (quantized, plain)
        ),
        strict=True,
    )
    assert torch.allclose(*results, atol=1e-6)
    assert torch.allclose(*gradients, rtol=1e-4, atol=1e-5)


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


class Operations(TorchDispatchMode):
    """Names of the operations that PyTorch runs, and the most values that one of them makes."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **kwargs or {})
        self.names.add(func._schema.name)
        is_new = isinstance(result, Tensor) and not func.is_view
        self.largest = max(self.largest, result.numel() if is_new else 0)
        return result


def test_every_code_of_fp8_is_cast_as_pytorch_does() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    codes = codes[(codes & 127) != 127].view(torch.float8_e4m3fn)  # the two left out are no numbers
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        ours = dequantize(codes[:, None], torch.ones(len(codes), 1), "fp8", dtype, 1)
        assert torch.equal(ours[:, 0], codes.to(dtype))


@pytest.mark.parametrize("columns", [64, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weight_format", FORMATS)
def test_products_are_those_with_the_wide_weight(
    weight_format: str, dtype: torch.dtype, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = quantize(draw(70, columns), weight_format)
    monkeypatch.setattr(module, "WIDENED_AT_ONCE", 16 * columns)  # five parts, the last one smaller
    for shape in ((1, columns), (2, 5, columns)):
        features = draw(*shape, seed=1, dtype=dtype)
        ours = multiply_quantized(features, *packed, weight_format)
        expected = features.double() @ dequantize(*packed, weight_format, torch.float32, columns).double().T
        # Rounding of the dtype: of the result and, where they are rounded, of levels and scales.
        tolerance = {torch.float32: 1e-6, torch.bfloat16: 2**-6, torch.float16: 2**-9}[dtype]
        assert ours.dtype == dtype
        assert (ours.double() - expected).abs().max() < tolerance * expected.std() * 4


def test_large_values_do_not_overflow_in_float16() -> None:
    features = torch.full((1, 4096), 60.0, dtype=torch.float16)
    weight = torch.full((8, 4096), 1e-3)
    for weight_format in FORMATS:
        ours = multiply_quantized(features, *quantize(weight, weight_format), weight_format)
        torch.testing.assert_close(ours.float(), features.float() @ weight.T, rtol=2e-2, atol=0)


@pytest.mark.skipif(not can_multiply_int8(), reason="this PyTorch has no product with int8")
def test_few_rows_in_bfloat16_are_multiplied_with_int8_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = quantize(draw(96, 128), "int8")

    def operations(rows: int, dtype: torch.dtype) -> set[str]:
        with Operations() as seen:
            multiply_quantized(draw(rows, 128, dtype=dtype), *packed, "int8")
        return seen.names

    assert "aten::_weight_int8pack_mm" in operations(4, torch.bfloat16)
    assert "aten::_weight_int8pack_mm" not in operations(5, torch.bfloat16)
    assert "aten::_weight_int8pack_mm" not in operations(1, torch.float32)
    features = draw(3, 128, seed=1, dtype=torch.bfloat16)
    few = multiply_quantized(features, *packed, "int8")
    monkeypatch.setattr(module, "can_multiply_int8", lambda: False)
    assert "aten::_weight_int8pack_mm" not in operations(4, torch.bfloat16)
    widened = multiply_quantized(features, *packed, "int8")
    torch.testing.assert_close(few, widened, rtol=2**-6, atol=2**-6)


@pytest.mark.parametrize("weight_format", FORMATS)
def test_on_the_cpu_no_wide_weight_exists_as_a_whole(weight_format: str) -> None:
    layer = QuantizedLinear(torch.nn.Linear(2048, 2048, bias=False), weight_format)
    features = draw(2, 2048)
    layer(features)
    with torch.no_grad(), Operations() as seen:
        layer(features)
    assert 2048 < seen.largest <= module.WIDENED_AT_ONCE < 2048**2


@pytest.mark.parametrize("weight_format", FORMATS)
def test_a_new_dtype_leaves_the_codes_as_they_are(weight_format: str) -> None:
    layer = QuantizedLinear(torch.nn.Linear(128, 64), weight_format)
    before = layer.codes.clone()
    weight = layer.weight
    layer.to(torch.bfloat16)
    assert torch.equal(layer.codes, before)
    torch.testing.assert_close(layer.weight, weight, rtol=2**-8, atol=0)
    assert layer(draw(2, 128, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_a_dit_with_quantized_layers_is_called_as_it_is() -> None:
    dit = tiny_models.build_dit()
    with torch.no_grad():
        assert can_fuse(dit)
        feed_forward = dit.layers[0].feed_forward
        feed_forward.linear_1 = QuantizedLinear(feed_forward.linear_1, "int8")
        assert not can_fuse(dit)


def test_quantized_layers_can_visit_the_device() -> None:
    pytest.importorskip("diffusers.hooks")
    options = {"device": "cpu", "quantize": "int8"}
    plain = load_pipeline(BUILT_IN_MODEL, **options).encode_prompts("a red circle")
    streamed = load_pipeline(BUILT_IN_MODEL, stream=True, **options).encode_prompts("a red circle")
    torch.testing.assert_close(streamed, plain)
