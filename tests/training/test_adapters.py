"""Adapters on the DiT and the backbone: they start as nothing, learn where they should, and come off again."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from comfyui_blip3o.blip3o_core.config import NextDiTConfig
from comfyui_blip3o.blip3o_core.errors import BadInputError, WrongAdapterError
from comfyui_blip3o.blip3o_core.language.prompts import TextTokenizer
from comfyui_blip3o.blip3o_core.models.nextdit import NextDiT
from comfyui_blip3o.lora_training.config import AdapterConfig
from comfyui_blip3o.lora_training.fit.adapters import Adapter, attach, target_names
from tiny_models import VARIANTS, build_backbone, build_dit, write_tokenizer
from torch import Tensor, nn

KINDS = {
    "lora": AdapterConfig(rank=4, alpha=6.0),
    "rslora": AdapterConfig(rank=4, alpha=6.0, rslora=True),
    "dora": AdapterConfig(type="dora", rank=4, alpha=6.0),
    "lokr": AdapterConfig(type="lokr", rank=4, alpha=6.0),
    "lokr of halves": AdapterConfig(type="lokr", rank=2, alpha=3.0),
    "full": AdapterConfig(type="full"),
    "patterns": AdapterConfig(rank=4, alpha=6.0, rank_pattern={r"layers\.1\.": 2, "feed_forward": 8}),
}


def velocity(dit: NextDiT, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    grid = torch.randn(2, dit.config.in_channels, 4, 4, generator=generator).to(dtype)
    conditioning = torch.randn(2, 9, dit.config.conditioning_dim, generator=generator).to(dtype)
    return dit(grid, torch.tensor([900.0, 40.0]), conditioning)


def learn_something(adapter: Adapter, size: float = 0.1) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter += size * torch.randn(parameter.shape, generator=generator)


@pytest.fixture
def tokenizer(tmp_path: Path) -> TextTokenizer:
    write_tokenizer(tmp_path)
    return TextTokenizer(tmp_path)


@pytest.mark.parametrize("config", KINDS.values(), ids=KINDS)
def test_a_new_adapter_changes_nothing_and_a_learned_one_can_be_switched_off_and_removed(
    config: AdapterConfig,
) -> None:
    dit = build_dit()
    base = velocity(dit)
    keys = list(dit.state_dict())
    adapter = attach(dit, config)
    assert torch.equal(velocity(dit), base)
    learn_something(adapter)
    learned = velocity(dit)
    assert not torch.allclose(learned, base, atol=1e-2)
    with adapter.enabled(False):
        assert torch.equal(velocity(dit), base)
        with adapter.enabled(True):
            assert torch.equal(velocity(dit), learned)
        assert torch.equal(velocity(dit), base)
    assert torch.equal(velocity(dit), learned)
    adapter.remove()
    assert torch.equal(velocity(dit), base)
    assert list(dit.state_dict()) == keys


@pytest.mark.parametrize("name", ["lora", "rslora", "dora", "lokr", "lokr of halves", "patterns"])
def test_the_file_tensors_give_the_learned_weights_by_the_formulas_of_comfyui(name: str) -> None:
    dit, plain = build_dit(), build_dit()
    adapter = attach(dit, KINDS[name])
    learn_something(adapter)
    tensors = adapter.state_dict()
    weights = dict(plain.named_parameters())
    for layer in adapter.names:
        weight = weights[layer.removeprefix("diffusion_model.") + ".weight"]
        part = {
            key.removeprefix(f"{layer}."): value
            for key, value in tensors.items()
            if key.startswith(f"{layer}.")
        }
        alpha = part["alpha"].item()
        if name.startswith("lokr"):
            rank = next((part[key].shape[0] for key in ("lokr_w2_b", "lokr_w1_b") if key in part), None)
            halves = [
                part[half] if half in part else part[f"{half}_a"] @ part[f"{half}_b"]
                for half in ("lokr_w1", "lokr_w2")
            ]
            change = torch.kron(*halves).reshape(weight.shape) * (1.0 if rank is None else alpha / rank)
        else:
            change = part["lora_B.weight"] @ part["lora_A.weight"] * alpha / part["lora_A.weight"].shape[0]
        changed = weight + change
        if name == "dora":
            changed = changed * part["dora_scale"] / weight.norm(dim=1, keepdim=True)
        with torch.no_grad():
            weight.copy_(changed)
    assert torch.allclose(velocity(plain), velocity(dit), atol=2e-5)
    rank = {"rslora": 4 * math.sqrt(1 / 4)}.get(name)
    if rank is not None:  # alpha / sqrt(rank) is the strength, and a loader divides by the rank
        assert tensors["diffusion_model.layers.0.attn1.to_q.alpha"].item() == pytest.approx(
            6 / math.sqrt(4) * 4
        )


def test_lora_equals_plain_peft_with_the_same_weights() -> None:
    from peft import LoraConfig, get_peft_model

    config = KINDS["rslora"]
    dit, other = build_dit(), build_dit()
    adapter = attach(dit, config)
    learn_something(adapter)
    names = [name.removeprefix("diffusion_model.") for name in adapter.names]
    sizes = vars(other).pop("config")  # PEFT before 0.18 wants one of transformers
    model = get_peft_model(other, LoraConfig(r=4, lora_alpha=6, use_rslora=True, target_modules=names))
    other.config = sizes
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in adapter.named_parameters().items():
            key = name.replace("diffusion_model.", "base_model.model.").replace(".weight", ".default.weight")
            parameters[key].copy_(value)
    assert torch.equal(velocity(other), velocity(dit))


@pytest.mark.parametrize("name", KINDS)
def test_a_saved_adapter_comes_back(name: str) -> None:
    dit, other = build_dit(), build_dit()
    adapter, again = attach(dit, KINDS[name]), attach(other, KINDS[name], seed=5)
    learn_something(adapter)
    again.load_state_dict(adapter.state_dict())
    assert torch.allclose(velocity(other), velocity(dit), atol=1e-5)
    again.set_weights(adapter.weights())
    assert torch.equal(velocity(other), velocity(dit))


def test_a_file_of_another_strength_goes_on_at_its_own() -> None:
    first, second = build_dit(), build_dit()
    strong, weak = (
        attach(first, AdapterConfig(rank=4, alpha=8)),
        attach(second, AdapterConfig(rank=4, alpha=2)),
    )
    learn_something(strong)
    weak.load_state_dict(strong.state_dict())
    assert torch.allclose(velocity(second), velocity(first), atol=1e-5)


def test_a_file_that_does_not_fit_the_settings_is_refused_by_name() -> None:
    tensors = attach(build_dit(), AdapterConfig(rank=4)).state_dict()
    with pytest.raises(WrongAdapterError, match="another size for .*caption_projection.linear_1.lora_A"):
        attach(build_dit(), AdapterConfig(rank=8)).load_state_dict(tensors)
    with pytest.raises(WrongAdapterError, match="has no use for"):
        attach(build_dit(), AdapterConfig(rank=4, targets="attn")).load_state_dict(tensors)
    del tensors["diffusion_model.layers.1.attn2.to_q.lora_B.weight"]
    with pytest.raises(WrongAdapterError, match="lacks .*layers.1.attn2.to_q.lora_B"):
        attach(build_dit(), AdapterConfig(rank=4)).load_state_dict(tensors)


def test_groups_adapt_the_layers_of_the_published_network() -> None:
    with torch.device("meta"):
        dit = NextDiT(NextDiTConfig())
    counts = {name: len(target_names(dit, name)) for name in ("attn_ffn_proj", "attn_ffn", "attn", "cross")}
    assert counts == {"attn_ffn_proj": 242, "attn_ffn": 240, "attn": 168, "cross": 96}
    sizes = dict(dit.named_modules())
    linear = [sizes[name] for name in target_names(dit, "attn_ffn_proj")]
    assert sum(16 * (layer.in_features + layer.out_features) for layer in linear) == 17_444_864
    excluded = ("norm1.linear", "patch_embedder", "norm_out", "time_caption_embed")
    assert not [name for name in target_names(dit, "attn_ffn_proj") if any(part in name for part in excluded)]


def test_a_regular_expression_chooses_layers_and_a_useless_one_is_refused() -> None:
    dit = build_dit()
    assert target_names(dit, r"layers\.1\.attn2") == [
        f"layers.1.attn2.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")
    ]
    with pytest.raises(BadInputError, match="matches no layer"):
        target_names(dit, "attn3")
    with pytest.raises(BadInputError, match='Did you mean "attn_ffn"'):
        target_names(dit, "atn_ffn")
    with pytest.raises(BadInputError, match="nor a regular expression"):
        target_names(dit, "layers.(")
    with pytest.raises(BadInputError, match="rank_pattern matches no adapted layer"):
        attach(dit, AdapterConfig(rank_pattern={"layers.77": 2}))


def test_the_start_depends_on_seed_and_name_alone_and_leaves_the_global_generator_alone() -> None:
    dits = [build_dit() for _ in range(3)]
    before = torch.random.get_rng_state()
    whole = attach(dits[0], AdapterConfig(rank=4), seed=3).weights()
    part = attach(dits[1], AdapterConfig(rank=4, targets="cross"), seed=3).weights()
    other = attach(dits[2], AdapterConfig(rank=4), seed=4).weights()
    assert torch.equal(torch.random.get_rng_state(), before)
    assert part.keys() < whole.keys()
    for name, value in part.items():
        assert torch.equal(value, whole[name])
    name = "diffusion_model.layers.0.attn2.to_q.lora_A.weight"
    assert not torch.equal(whole[name], other[name])
    bound = 1 / math.sqrt(whole[name].shape[1])
    assert 0.8 * bound < whole[name].abs().max() <= bound


@pytest.mark.parametrize("name", ["default", "grouped"])
def test_adapted_half_precision_networks_compute_beside_float32_adapters(name: str) -> None:
    dit = build_dit(VARIANTS[name]).to(torch.bfloat16)
    adapter = attach(dit, AdapterConfig(rank=4))
    learn_something(adapter, 0.02)
    assert {parameter.dtype for parameter in adapter.parameters()} == {torch.float32}
    assert dit.layers[0].attn1.to_q.base_layer.weight.dtype == torch.bfloat16
    with adapter.autocast():
        half = velocity(dit)
    half.float().sum().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in adapter.parameters())
    wide = build_dit(VARIANTS[name]).to(torch.bfloat16).float()
    exact = attach(wide, AdapterConfig(rank=4))
    exact.set_weights(adapter.weights())
    assert F.cosine_similarity(half.float().flatten(), velocity(wide).flatten(), dim=0) > 0.999


def test_networks_made_in_inference_mode_can_learn() -> None:
    with torch.inference_mode():
        dit = build_dit()
    adapter = attach(dit, AdapterConfig(rank=4))
    velocity(dit).sum().backward()
    assert all(parameter.grad is not None for parameter in adapter.parameters())


def test_queries_and_backbone_layers_learn_and_come_off_again(tokenizer: TextTokenizer) -> None:
    backbone, dit = build_backbone(), build_dit()
    state = {name: value.clone() for name, value in backbone.state_dict().items()}
    config = AdapterConfig(type="none", queries=True, backbone_rank=3)
    adapter = attach(dit, config, backbone=backbone, tokenizer=tokenizer)
    assert len(adapter.names) == 4 * 2 + 1
    before = adapter.encode(["a red circle"])
    learn_something(adapter)
    after = adapter.encode(["a red circle"])
    assert not torch.allclose(after, before, atol=1e-2)
    tensors = adapter.state_dict()
    queries = tensors["backbone.latent_queries.diff"] + state["latent_queries"]
    assert torch.allclose(queries, backbone.latent_queries, atol=1e-6)
    again = attach(build_dit(), config, backbone=build_backbone(), tokenizer=tokenizer)
    again.load_state_dict(tensors)
    assert torch.allclose(again.encode(["a red circle"]), after, atol=1e-5)
    adapter.remove()
    assert backbone.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in backbone.state_dict().items())


def test_what_learns_in_the_backbone_needs_the_backbone() -> None:
    with pytest.raises(BadInputError, match="needs the backbone in memory"):
        attach(build_dit(), AdapterConfig(type="queries"))


def test_problems_name_weights_that_are_broken_or_never_moved() -> None:
    adapter = attach(build_dit(), AdapterConfig(rank=2))
    assert len(adapter.problems()) == len(adapter.names)
    assert "lora_B.weight is still zero" in adapter.problems()[0]
    learn_something(adapter)
    assert adapter.problems() == []
    adapter.parameters()[0].data[0, 0] = math.nan
    assert "lora_A.weight is not finite" in adapter.problems()[0]
    frozen = [p for m in adapter.dit.modules() if isinstance(m, nn.LayerNorm) for p in m.parameters()]
    assert not any(parameter.requires_grad for parameter in frozen)
