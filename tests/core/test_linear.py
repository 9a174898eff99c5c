"""Linear layers multiplied by oneDNN or joined: the numbers of nn.Linear, and where an exchange keeps out."""

from pathlib import Path

import pytest
import tiny_models
import torch
import torch.nn.functional as F
from comfyui_blip3o.blip3o_core.drawing.decoding import PixelSettings
from comfyui_blip3o.blip3o_core.performance import linear
from comfyui_blip3o.blip3o_core.performance.linear import OneDNNLinear, has_onednn, multiply, use_onednn
from comfyui_blip3o.blip3o_core.pipeline import load_pipeline
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

needs_onednn = pytest.mark.skipif(not has_onednn(torch.zeros(1)), reason="this PyTorch has no oneDNN")


class OpNames(TorchDispatchMode):
    """Names of the operations that PyTorch runs."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func._schema.name)
        return func(*args, **kwargs or {})


def is_multiplied_by_onednn(*arguments: torch.Tensor) -> bool:
    with torch.no_grad(), OpNames() as ops:
        multiply(*arguments)
    return "mkldnn::_linear_pointwise" in ops.names


@needs_onednn
@pytest.mark.parametrize("shape", [(1, 1, 96), (278, 96), (2, 5, 96), (0, 96)])
@pytest.mark.parametrize("has_bias", [False, True])
def test_products_are_those_of_pytorch_up_to_rounding(
    shape: tuple[int, ...], has_bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear, "WORTHWHILE_PRODUCTS", 0)
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(*shape, generator=generator)
    weight, bias = torch.randn(40, 96, generator=generator), torch.randn(40, generator=generator)
    inputs = (features, weight, bias if has_bias else None)
    assert is_multiplied_by_onednn(*inputs)
    torch.testing.assert_close(multiply(*inputs), F.linear(*inputs), rtol=1e-5, atol=1e-5)
    every_other = (torch.randn(*shape[:-1], 192, generator=generator)[..., ::2], weight.T.contiguous().T)
    torch.testing.assert_close(multiply(*every_other), F.linear(*every_other), rtol=1e-5, atol=1e-5)


@needs_onednn
def test_small_products_and_other_dtypes_stay_with_pytorch() -> None:
    weight = torch.randn(2048, 1024)
    assert is_multiplied_by_onednn(torch.randn(1, 1024), weight)
    assert not is_multiplied_by_onednn(torch.randn(1, 1024), weight[:1024])
    assert not is_multiplied_by_onednn(torch.randn(1, 1024).bfloat16(), weight.bfloat16())


@needs_onednn
def test_gradients_and_autocast_are_those_of_a_plain_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "WORTHWHILE_PRODUCTS", 0)
    plain = nn.Linear(8, 4)
    layer = nn.Linear(8, 4)
    layer.load_state_dict(plain.state_dict())
    use_onednn(layer)
    assert type(layer) is OneDNNLinear
    features = torch.randn(3, 8, requires_grad=True)
    ours, expected = (torch.autograd.grad(each(features).sum(), features)[0] for each in (layer, plain))
    assert torch.equal(ours, expected)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(features), plain(features))


def test_only_plain_layers_in_float32_are_exchanged() -> None:
    class Hosted(nn.Linear):
        pass

    network = nn.Sequential(nn.Linear(4, 4), Hosted(4, 4), nn.Linear(4, 4).half(), nn.LayerNorm(4))
    before = list(network.state_dict())
    use_onednn(network)
    assert [type(layer) for layer in network[1:]] == [Hosted, nn.Linear, nn.LayerNorm]
    assert list(network.state_dict()) == before


@needs_onednn
@pytest.mark.parametrize("part", ["prompt", "picture", "sampling", "features"])
def test_a_pipeline_on_the_cpu_reads_looks_samples_and_paints_with_it(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    pipeline = load_pipeline(tiny_folder, dtype="fp32", device="cpu")

    def run() -> torch.Tensor:
        if part == "prompt":
            return pipeline.encode_prompts("a red circle")
        if part == "picture":
            return pipeline.encode_images([tiny_models.picture()])
        if part == "sampling":
            conditioning = torch.randn(1, 4, 32, generator=torch.Generator().manual_seed(0))
            return pipeline.sample_features(conditioning, [0])
        features = torch.randn(1, 4, 16, generator=torch.Generator().manual_seed(0))
        return pipeline.decode(features, [0], settings=PixelSettings(steps=2))

    monkeypatch.setattr(linear, "WORTHWHILE_PRODUCTS", float("inf"))
    plain = run()
    monkeypatch.setattr(linear, "WORTHWHILE_PRODUCTS", 0)
    with OpNames() as ops:
        ours = run()
    assert "mkldnn::_linear_pointwise" in ops.names
    torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4)


def test_joined_weights_become_parts_of_one_tensor_and_keep_their_values() -> None:
    layers = [torch.nn.Linear(6, width, bias=False).requires_grad_(False) for width in (4, 3, 2)]
    before = [layer.weight.clone() for layer in layers]
    joined = linear.join(layers)
    torch.testing.assert_close(joined, torch.cat(before), rtol=0, atol=0)
    assert {layer.weight.untyped_storage().data_ptr() for layer in layers} == {joined.data_ptr()}
    for layer, weight in zip(layers, before, strict=True):
        torch.testing.assert_close(layer.weight.data, weight, rtol=0, atol=0)
    again = linear.join(layers)
    assert again.data_ptr() == joined.data_ptr()
    layers[1].weight.mul_(2)
    torch.testing.assert_close(again[4:7], before[1] * 2)


def test_weights_that_have_moved_apart_are_joined_again() -> None:
    layers = [torch.nn.Linear(6, width, bias=False).requires_grad_(False) for width in (4, 3)]
    linear.join(layers)
    moved = torch.randn(3, 6)
    layers[1].weight.data = moved.clone()
    torch.testing.assert_close(linear.join(layers), torch.cat([layers[0].weight, moved]), rtol=0, atol=0)
