"""Frozen weights under an adapter, in whole dtypes and in 8 and 4 bits."""

from collections.abc import Callable

import pytest
import torch
from comfyui_blip3o.blip3o_core.errors import BadInputError
from comfyui_blip3o.blip3o_core.models.nextdit import NextDiT
from comfyui_blip3o.blip3o_core.performance.linear import use_onednn
from comfyui_blip3o.lora_training.config import AdapterConfig
from comfyui_blip3o.lora_training.fit.adapters import attach
from comfyui_blip3o.lora_training.fit.base_dtype import set_base_dtype
from tiny_models import build_dit

CPU = torch.device("cpu")


@pytest.mark.parametrize("kind", ["fp8", "nf4"])
@pytest.mark.parametrize(
    "config", [AdapterConfig(rank=4), AdapterConfig(type="dora", rank=4)], ids=["lora", "dora"]
)
@pytest.mark.parametrize("prepare", [lambda dit: None, use_onednn], ids=["from a file", "from a pipeline"])
def test_adapters_learn_on_a_quantised_dit(
    kind: str, config: AdapterConfig, prepare: Callable[[NextDiT], None]
) -> None:
    dit = build_dit()
    prepare(dit)
    before = sum(tensor.nbytes for block in dit.layers for tensor in block.state_dict().values())
    set_base_dtype(dit, kind, CPU)
    after = sum(tensor.nbytes for block in dit.layers for tensor in block.state_dict().values())
    assert after < before / 2
    generator = torch.Generator().manual_seed(0)
    given = (
        torch.randn(2, 16, 4, 4, generator=generator),
        torch.tensor([3.0, 700.0]),
        torch.randn(2, 9, 32, generator=generator),
    )
    base = dit(*given)
    adapter = attach(dit, config)
    assert torch.allclose(dit(*given), base, atol=1e-6)
    (dit(*given) ** 2).sum().backward()
    assert all(
        parameter.grad.abs().sum() > 0
        for name, parameter in adapter.named_parameters().items()
        if name.endswith("lora_B.weight")
    )


def test_quantised_weights_cannot_learn_themselves() -> None:
    dit = build_dit()
    set_base_dtype(dit, "fp8", CPU)
    with pytest.raises(BadInputError, match="8 or 4 bits cannot learn"):
        attach(dit, AdapterConfig(type="full"))


def test_a_device_without_8_bit_floats_is_told() -> None:
    with pytest.raises(BadInputError, match="base_dtype to bf16"):
        set_base_dtype(build_dit(), "fp8", torch.device("mps"))


def test_whole_dtypes_are_set() -> None:
    dit = build_dit()
    set_base_dtype(dit, "bf16", CPU)
    assert {parameter.dtype for parameter in dit.parameters()} == {torch.bfloat16}
    set_base_dtype(dit, "auto", CPU)
    assert {parameter.dtype for parameter in dit.parameters()} == {torch.float32}
