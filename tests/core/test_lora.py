"""LoRA files in the core: their names, what they do to weights, which model they belong to."""

import json
import logging
from pathlib import Path

import peft
import pytest
import tiny_models
import torch
from comfyui_blip3o import cli
from comfyui_blip3o.blip3o_core.drawing.sampling import FeatureSettings
from comfyui_blip3o.blip3o_core.errors import MissingFilesError, WrongAdapterError
from comfyui_blip3o.blip3o_core.lora.changes import CANONICAL, KOHYA, Change, place, split_key
from comfyui_blip3o.blip3o_core.lora.files import (
    LoraFile,
    check_fit,
    dit_fingerprint,
    from_peft,
    read_lora,
    split_strength,
)
from comfyui_blip3o.blip3o_core.picture_files import read_note
from comfyui_blip3o.blip3o_core.pipeline import Blip3oPipeline, load_pipeline
from safetensors.torch import save_file
from torch import Tensor, nn

LAYER = "layers.0.attn1.to_q"
KEY = f"diffusion_model.{LAYER}"
TARGETS = ["layers.0.attn1.to_q", "layers.1.feed_forward.linear_2", "caption_projection.linear_1"]


def shapes_of(**networks: nn.Module) -> dict[str, dict[str, tuple[int, ...]]]:
    return {
        name: {key: tuple(value.shape) for key, value in network.state_dict().items()}
        for name, network in networks.items()
    }


def pair(rows: int = 32, columns: int = 32, rank: int = 4, seed: int = 0) -> tuple[Tensor, Tensor]:
    """lora_A and lora_B."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rank, columns, generator=generator), torch.randn(rows, rank, generator=generator)


def lora_tensors(key: str = KEY, alpha: float = 2.0, **sizes: int) -> dict[str, Tensor]:
    down, up = pair(**sizes)
    return {
        f"{key}.lora_A.weight": down,
        f"{key}.lora_B.weight": up,
        f"{key}.alpha": torch.tensor(alpha),
    }


def write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    save_file(tensors, str(path), metadata)
    return path


@pytest.fixture
def pipe(tiny_folder: Path) -> Blip3oPipeline:
    return load_pipeline(tiny_folder, dtype="fp32", device="cpu")


def velocity(dit: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    grid, conditioning = (
        torch.randn(2, 16, 4, 4, generator=generator),
        torch.randn(2, 16, 32, generator=generator),
    )
    with torch.no_grad():
        return dit(grid, torch.tensor([900.0, 100.0]), conditioning)


@pytest.mark.parametrize("component", ["dit", "backbone"])
def test_every_layers_name_survives_kohyas_underscores(component: str):
    network = {"dit": tiny_models.build_dit, "backbone": tiny_models.build_backbone}[component]()
    names = {key.removesuffix(".weight").removesuffix(".bias") for key in network.state_dict()}
    assert len(names) > 20
    for name in names:
        assert place(KOHYA[component] + name.replace(".", "_")) == (component, name)


@pytest.mark.parametrize(
    ("name", "address"),
    [
        ("diffusion_model.layers.0.attn1.to_q", ("dit", "layers.0.attn1.to_q")),
        ("transformer.layers.0.attn1.to_q", ("dit", "layers.0.attn1.to_q")),
        ("base_model.model.layers.0.attn1.to_q", ("dit", "layers.0.attn1.to_q")),
        ("base_model.model.dit.layers.0.attn1.to_q", ("dit", "layers.0.attn1.to_q")),
        ("model.dit.model.layers.0.attn1.to_q", ("dit", "layers.0.attn1.to_q")),
        (
            "base_model.model.text.layers.0.self_attn.q_proj",
            ("backbone", "text.layers.0.self_attn.q_proj"),
        ),
        ("text_encoders.backbone.latent_queries", ("backbone", "latent_queries")),
        ("down_blocks.0.attentions.0", None),
    ],
)
def test_names_of_other_trainers_are_understood(name: str, address: tuple[str, str] | None):
    assert place(name) == address


def test_kinds_of_tensors_are_told_by_their_endings():
    assert split_key("a.b.lora_down.weight") == ("a.b", "lora_A")
    assert split_key("a.b.lora_A.default.weight") == ("a.b", "lora_A")
    assert split_key("a.b.lokr_w1.default") == ("a.b", "lokr_w1")
    assert split_key("a.b.lokr_w1_a") == ("a.b", "lokr_w1_a")
    assert split_key("a.b.weight") == ("a.b.weight", "")


def test_strength_and_alpha_scale_the_product_of_the_matrices(pipe: Blip3oPipeline):
    before = pipe.dit.get_parameter(f"{LAYER}.weight").clone()
    down, up = pair()
    pipe.load_lora(LoraFile("test", lora_tensors(alpha=2.0)), 0.5)
    torch.testing.assert_close(
        pipe.dit.get_parameter(f"{LAYER}.weight"), before + 0.5 * (2.0 / 4) * up @ down
    )


def test_without_alpha_the_product_counts_once(pipe: Blip3oPipeline):
    before = pipe.dit.get_parameter(f"{LAYER}.weight").clone()
    down, up = pair()
    tensors = {key: value for key, value in lora_tensors().items() if "alpha" not in key}
    pipe.load_lora(LoraFile("test", tensors))
    torch.testing.assert_close(pipe.dit.get_parameter(f"{LAYER}.weight"), before + up @ down)


def test_weights_and_biases_of_a_full_finetune_are_added(pipe: Blip3oPipeline):
    layer = "caption_projection.linear_1"
    before = {name: pipe.dit.get_parameter(f"{layer}.{name}").clone() for name in ("weight", "bias")}
    gate = pipe.dit.layers[0].gate.clone()
    tensors = {
        f"diffusion_model.{layer}.diff": torch.full((32, 32), 0.25),
        f"diffusion_model.{layer}.diff_b": torch.full((32,), 0.5),
        "diffusion_model.layers.0.gate.diff": torch.full((4,), 2.0),
    }
    pipe.load_lora(LoraFile("test", tensors), 2.0)
    torch.testing.assert_close(pipe.dit.get_parameter(f"{layer}.weight"), before["weight"] + 0.5)
    torch.testing.assert_close(pipe.dit.get_parameter(f"{layer}.bias"), before["bias"] + 1.0)
    torch.testing.assert_close(pipe.dit.layers[0].gate, gate + 4.0)


def test_two_loras_add_up_and_unloading_restores_the_bits(pipe: Blip3oPipeline):
    before = velocity(pipe.dit)
    first, second = (
        LoraFile("a", lora_tensors()),
        LoraFile("b", lora_tensors(f"diffusion_model.{TARGETS[1]}", rows=32, columns=48)),
    )
    pipe.load_lora(first)
    with_first = velocity(pipe.dit)
    pipe.load_lora(second)
    with_both = velocity(pipe.dit)
    assert (with_first - before).abs().max() > 1e-2
    assert (with_both - with_first).abs().max() > 1e-2
    pipe.unload_loras()
    assert torch.equal(velocity(pipe.dit), before)
    assert pipe.loras == ()


def test_a_network_that_is_read_again_still_has_its_lora(pipe: Blip3oPipeline):
    pipe.load_lora(LoraFile("a", lora_tensors()))
    changed = velocity(pipe.dit)
    pipe.unload()
    assert torch.equal(velocity(pipe.dit), changed)


def test_strength_zero_changes_no_bit(tiny_folder: Path):
    pipe = load_pipeline(tiny_folder, dtype="bf16", device="cpu")
    before = pipe.dit.state_dict()
    pipe.load_lora(LoraFile("a", lora_tensors()), 0.0)
    assert all(torch.equal(value, before[key]) for key, value in pipe.dit.state_dict().items())


def test_the_decoders_negative_is_drawn_anew_with_a_lora(pipe: Blip3oPipeline):
    settings = FeatureSettings(steps=2)
    before = pipe.negative_features(settings=settings)
    pipe.load_lora(LoraFile("a", lora_tensors()))
    assert not torch.allclose(pipe.negative_features(settings=settings), before)


def test_tuned_queries_and_a_backbone_lora_change_the_conditioning(pipe: Blip3oPipeline):
    before = pipe.encode_prompts("a red circle")
    queries = pipe.backbone.latent_queries.clone()
    pipe.load_lora(LoraFile("q", {"backbone.latent_queries.diff": torch.ones(1, 16, 32)}), 0.5)
    torch.testing.assert_close(pipe.backbone.latent_queries.data, queries + 0.5)
    tuned = pipe.encode_prompts("a red circle")
    assert not torch.allclose(tuned, before)
    pipe.load_lora(LoraFile("b", lora_tensors("backbone.text.layers.1.self_attn.q_proj")))
    assert not torch.allclose(pipe.encode_prompts("a red circle"), tuned)


def peft_velocity(config: peft.PeftConfig, seed: int = 0) -> tuple[Tensor, dict[str, Tensor]]:
    """What plain PEFT computes with a random adapter, and its state_dict."""
    dit = tiny_models.build_dit()
    model = peft.get_peft_model(dit, config)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name or "lokr_" in name or "hada_" in name:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data = parameter.data + 0.3 * noise
    return velocity(model), peft.get_peft_model_state_dict(model)


RANKS = {
    "rank_pattern": {"layers.1.feed_forward.linear_2": 8},
    "alpha_pattern": {"caption_projection.linear_1": 3},
}
CONFIGS = {
    "lora": peft.LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS),
    "rslora": peft.LoraConfig(r=4, lora_alpha=6, use_rslora=True, target_modules=TARGETS, **RANKS),
    "patterns": peft.LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS, **RANKS),
    "dora": peft.LoraConfig(r=4, lora_alpha=6, use_dora=True, target_modules=TARGETS),
    "lokr": peft.LoKrConfig(r=2, alpha=6, target_modules=TARGETS),
    "lokr of whole matrices": peft.LoKrConfig(r=8, alpha=6, target_modules=TARGETS),
    "lokr of four matrices": peft.LoKrConfig(
        r=1, alpha=6, decompose_both=True, decompose_factor=4, target_modules=TARGETS
    ),
    "loha": peft.LoHaConfig(r=4, alpha=6, target_modules=TARGETS),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_peft_adapter_computes_the_same_here(pipe: Blip3oPipeline, kind: str):
    expected, tensors = peft_velocity(CONFIGS[kind])
    plain = velocity(pipe.dit)
    pipe.load_lora(LoraFile(kind, from_peft(tensors, CONFIGS[kind].to_dict())))
    torch.testing.assert_close(velocity(pipe.dit), expected, atol=1e-5, rtol=0)
    assert (expected - plain).abs().max() > 1e-2


def test_a_folder_saved_by_peft_is_read(pipe: Blip3oPipeline, tmp_path: Path):
    expected, tensors = peft_velocity(CONFIGS["rslora"])
    model = peft.get_peft_model(tiny_models.build_dit(), CONFIGS["rslora"])
    peft.set_peft_model_state_dict(model, tensors)
    model.save_pretrained(tmp_path / "adapter")
    pipe.load_lora(tmp_path / "adapter")
    torch.testing.assert_close(velocity(pipe.dit), expected, atol=1e-5, rtol=0)


def test_a_file_in_diffusers_naming_takes_its_strength_from_the_metadata():
    config = {"transformer.r": 4, "transformer.lora_alpha": 8, "transformer.use_rslora": True}
    down, up = pair()
    tensors = {f"transformer.{LAYER}.lora_A.weight": down, f"transformer.{LAYER}.lora_B.weight": up}
    file = LoraFile("d", tensors, {"lora_adapter_metadata": json.dumps(config)})
    weight = torch.zeros(32, 32)
    torch.testing.assert_close(file.changes["dit", LAYER].delta(weight), 8 / 4**0.5 * up @ down)


def test_a_lokr_of_whole_matrices_may_leave_its_rank_empty():
    left, right = pair(rows=4, columns=8, rank=4)
    tensors = {f"transformer.{LAYER}.lokr_w1": left, f"transformer.{LAYER}.lokr_w2": right}
    file = LoraFile("k", tensors, {"lora_adapter_metadata": json.dumps({"transformer.r": None})})
    expected = torch.kron(left, right)
    torch.testing.assert_close(file.changes["dit", LAYER].delta(torch.zeros(expected.shape)), expected)


def test_a_lora_of_another_size_is_refused_by_name(pipe: Blip3oPipeline):
    with pytest.raises(WrongAdapterError, match='"big" was trained for a model of another size'):
        pipe.load_lora(LoraFile("big", lora_tensors(rows=32, columns=1792)))


def test_the_width_in_the_metadata_tells_models_apart_whose_layers_look_alike(pipe: Blip3oPipeline):
    lora = LoraFile("dog", lora_tensors(), {"blip3o.cond_dim": "2048"})
    with pytest.raises(WrongAdapterError, match='"dog" was trained for the 4B model.*\n.*2048, expected 32'):
        pipe.load_lora(lora)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (lora_tensors("diffusion_model.double_blocks.0.img"), "1 of its 1 weights have no place"),
        (lora_tensors() | lora_tensors("lora_te1_text_model"), "1 of its 2 weights have no place"),
        (lora_tensors("lora_unet_down_blocks_0_attn"), '"lora_unet_down_blocks_0_attn"'),
        ({}, "it holds none at all"),
        ({f"{KEY}.lora_A.weight": torch.ones(4, 32)}, "is not complete"),
        ({f"{KEY}.lokr_w1": torch.ones(4, 4)}, "is not complete"),
        ({f"{KEY}.oft_blocks": torch.ones(4, 4)}, "applied only inside ComfyUI"),
    ],
)
def test_what_has_no_place_is_refused(pipe: Blip3oPipeline, tensors: dict[str, Tensor], message: str):
    with pytest.raises(WrongAdapterError, match=message):
        pipe.load_lora(LoraFile("odd", tensors))
    assert pipe.loras == ()


def test_another_checkpoint_of_the_same_size_is_only_noted(
    pipe: Blip3oPipeline, caplog: pytest.LogCaptureFixture
):
    with caplog.at_level(logging.WARNING):
        pipe.load_lora(
            LoraFile("same", lora_tensors(), {"blip3o.base_dit_hash": dit_fingerprint(pipe.dit.state_dict())})
        )
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        pipe.load_lora(LoraFile("other", lora_tensors(), {"blip3o.base_dit_hash": "0123456789abcdef"}))
    assert '"other" was trained on another checkpoint' in caplog.text


def test_the_fingerprint_of_a_dit_survives_a_change_of_dtype_and_tells_finetunes_apart():
    dit = tiny_models.build_dit()
    rounded = {key: value.bfloat16() for key, value in dit.state_dict().items()}
    print_of = dit_fingerprint(rounded)
    assert dit_fingerprint({key: value.float() for key, value in rounded.items()}) == print_of
    moved = {**rounded, f"{LAYER}.weight": rounded[f"{LAYER}.weight"] + 1}
    assert dit_fingerprint(moved) != print_of


def test_broken_files_are_refused_with_their_name(tmp_path: Path):
    good = write(tmp_path / "good.safetensors", lora_tensors()).read_bytes()
    (tmp_path / "short.safetensors").write_bytes(good[: len(good) // 2])
    (tmp_path / "other.safetensors").write_text("not a file")
    for name in ("short", "other"):
        with pytest.raises(WrongAdapterError, match=f'"{name}.safetensors" cannot be read; it is cut short'):
            read_lora(tmp_path / f"{name}.safetensors")
    with pytest.raises(MissingFilesError, match="There is no LoRA"):
        read_lora(tmp_path / "none.safetensors")


def test_a_lora_with_nan_is_refused(tmp_path: Path):
    tensors = lora_tensors()
    tensors[f"{KEY}.lora_B.weight"][0, 0] = torch.nan
    with pytest.raises(WrongAdapterError, match="values that are no numbers"):
        read_lora(write(tmp_path / "nan.safetensors", tensors))


def test_pickles_are_never_opened(tmp_path: Path):
    torch.save(lora_tensors(), tmp_path / "dog.pt")
    with pytest.raises(WrongAdapterError, match="is a pickle"):
        read_lora(tmp_path / "dog.pt")
    folder = tmp_path / "folder"
    folder.mkdir()
    torch.save(lora_tensors(), folder / "adapter_model.bin")
    with pytest.raises(MissingFilesError, match="adapter_model.bin, a pickle, which is not opened"):
        read_lora(folder)


def test_peft_options_without_a_place_in_a_file_are_refused():
    _, tensors = peft_velocity(CONFIGS["lora"])
    for option, value in (("fan_in_fan_out", True), ("modules_to_save", ["norm_out"]), ("bias", "all")):
        with pytest.raises(WrongAdapterError, match=option):
            from_peft(tensors, {**CONFIGS["lora"].to_dict(), option: value})
    with pytest.raises(WrongAdapterError, match="of the kind OFT"):
        from_peft(tensors, {"peft_type": "OFT"})


def test_the_change_of_a_dora_depends_on_the_weight():
    down, up = pair(rows=3, columns=5, rank=2)
    weight = torch.arange(15.0).reshape(3, 5) - 4
    magnitude = torch.tensor([1.0, 2.0, 3.0])
    change = Change({"lora_A": down, "lora_B": up, "alpha": torch.tensor(2.0), "magnitude": magnitude})
    torch.testing.assert_close((weight + change.delta(weight)).norm(dim=1), magnitude)


def test_fitting_changes_are_sorted_by_network():
    dit, backbone = tiny_models.build_dit(), tiny_models.build_backbone()
    tensors = lora_tensors() | {"backbone.latent_queries.diff": torch.ones(1, 16, 32)}
    fitting = check_fit(LoraFile("both", tensors), shapes_of(dit=dit, backbone=backbone))
    assert {name: list(changes) for name, changes in fitting.items()} == {
        "dit": [f"{LAYER}.weight"],
        "backbone": ["latent_queries"],
    }
    assert set(LoraFile("both", tensors).canonical) == set(tensors)
    assert CANONICAL["dit"] == "diffusion_model."


# The command


def run(tiny_folder: Path, *arguments: str) -> int:
    fast = ["--model", str(tiny_folder), "--steps", "2", "--pixel-steps", "2", "--quiet"]
    return cli.main([*arguments, *fast])


def test_the_command_draws_with_loras_and_like_draws_with_them_again(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loras").mkdir()
    write(tmp_path / "loras" / "dog.safetensors", lora_tensors())
    lora = "loras/dog.safetensors:0.75"
    assert run(tiny_folder, "generate", "a red circle", "--out", "with.png", "--lora", lora) == 0
    assert run(tiny_folder, "generate", "a red circle", "--out", "without.png") == 0
    assert run(tiny_folder, "generate", "--like", "with.png", "--out", "again.png") == 0
    assert run(tiny_folder, "generate", "--like", "with.png", "--out", "none.png", "--lora", "none") == 0
    described = {name: read_note(f"{name}.png")["loras"] for name in ("with", "without", "again", "none")}
    assert described["with"][0]["file"] == "loras/dog.safetensors"
    assert described["with"][0]["strength"] == 0.75
    assert described["again"] == described["with"]
    assert described["without"] == described["none"] == []
    drawn = {name: tiny_models.Image.open(f"{name}.png").tobytes() for name in described}
    assert drawn["with"] == drawn["again"] != drawn["without"] == drawn["none"]
    # Another file of that name is noted, a missing one is asked for.
    write(tmp_path / "loras" / "dog.safetensors", lora_tensors(seed=1))
    capsys.readouterr()
    assert run(tiny_folder, "generate", "--like", "with.png", "--out", "other.png") == 0
    assert "not the same" in capsys.readouterr().err
    (tmp_path / "loras" / "dog.safetensors").unlink()
    assert run(tiny_folder, "generate", "--like", "with.png", "--out", "lost.png") == 2
    assert "--lora PATH:0.75" in capsys.readouterr().err


def test_the_strength_is_told_from_the_path(tmp_path: Path):
    assert split_strength("dog.safetensors") == (Path("dog.safetensors"), 1.0)
    assert split_strength("dog.safetensors:-0.5") == (Path("dog.safetensors"), -0.5)
    assert split_strength("C:\\loras\\dog.safetensors") == (Path("C:\\loras\\dog.safetensors"), 1.0)
    assert split_strength("C:\\loras\\dog.safetensors:2") == (Path("C:\\loras\\dog.safetensors"), 2.0)
    odd = tmp_path / "a:1"
    odd.mkdir()
    assert split_strength(str(odd)) == (odd, 1.0)
