"""LoRA files: every reader computes what the trainer did, conversions undo each other, nothing private gets out."""

import hashlib
import json
import os
import struct
from datetime import datetime
from pathlib import Path

import peft
import pytest
import tiny_models
import torch
from comfyui_blip3o.blip3o_core.checkpoints.layout import open_checkpoint
from comfyui_blip3o.blip3o_core.errors import BadInputError, WrongAdapterError
from comfyui_blip3o.blip3o_core.lora.files import LoraFile, read_lora
from comfyui_blip3o.lora_training.config import parse_config
from comfyui_blip3o.lora_training.files.convert import base_weights, convert_lora, save_as
from comfyui_blip3o.lora_training.files.merge import (
    _truncated,
    extract_lora,
    merge_into_checkpoint,
    merge_loras,
    resize_lora,
)
from comfyui_blip3o.lora_training.files.write import describe, inspect_lora, lora_metadata, save_lora
from diffusers.loaders import PeftAdapterMixin
from diffusers.utils import peft_utils
from lora_files import FACTORISED, KINDS, open_pipeline, trained, velocity
from safetensors import safe_open
from torch import Tensor

KEY = "diffusion_model.layers.0.attn1.to_q"
LAYER = ("dit", "layers.0.attn1.to_q")


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint; read only."""
    return tiny_models.write_checkpoint(tmp_path_factory.mktemp("tiny") / "tiny")


@pytest.fixture(scope="session")
def plain(folder: Path) -> Tensor:
    """The velocity without any LoRA."""
    return velocity(open_pipeline(folder))


def pair(seed: int, key: str = KEY, rank: int = 4, alpha: float = 2.0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        f"{key}.lora_A.weight": torch.randn(rank, 32, generator=generator),
        f"{key}.lora_B.weight": torch.randn(32, rank, generator=generator),
        f"{key}.alpha": torch.tensor(alpha),
    }


def assert_same(found: Tensor, expected: Tensor, plain: Tensor) -> None:
    assert (expected - plain).abs().max() > 1e-2
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


# Every reader


@pytest.mark.parametrize("kind", KINDS)
def test_the_core_draws_what_the_trainer_did(folder: Path, plain: Tensor, tmp_path: Path, kind: str):
    tensors, expected = trained(folder, kind)
    save_lora(tmp_path / "lora.safetensors", tensors, {}, "fp32")
    pipeline = open_pipeline(folder)
    pipeline.load_lora(tmp_path / "lora.safetensors")
    assert_same(velocity(pipeline), expected, plain)


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_with_the_lora_in_its_weights_draws_the_same(
    folder: Path, plain: Tensor, tmp_path: Path, kind: str
):
    tensors, expected = trained(folder, kind)
    merge_into_checkpoint(folder, tmp_path / "merged", [(LoraFile("lora", tensors), 1.0)])
    assert_same(velocity(open_pipeline(tmp_path / "merged")), expected, plain)


@pytest.mark.parametrize("kind", FACTORISED)
def test_plain_peft_computes_what_the_trainer_did(folder: Path, plain: Tensor, tmp_path: Path, kind: str):
    tensors, expected = trained(folder, kind)
    base = base_weights(open_checkpoint(folder))
    target = save_as(LoraFile("lora", tensors), tmp_path / "adapter", "peft", base=base)
    pipeline = open_pipeline(folder)
    network = pipeline.backbone if kind == "backbone" else pipeline.dit
    peft.PeftModel.from_pretrained(network, str(target))
    assert_same(velocity(pipeline), expected, plain)


def test_peft_adapters_of_both_networks_lie_in_one_folder(folder: Path, plain: Tensor, tmp_path: Path):
    tensors, expected = trained(folder, "lora, queries and backbone")
    queries = {key: tensors.pop(key) for key in list(tensors) if "latent_queries" in key}
    target = save_as(LoraFile("lora", tensors), tmp_path / "adapter", "peft")
    pipeline = open_pipeline(folder)
    pipeline.load_lora(target)
    pipeline.load_lora(LoraFile("queries", queries))
    assert_same(velocity(pipeline), expected, plain)


@pytest.mark.skipif(not hasattr(peft_utils, "_create_lokr_config"), reason="diffusers is too old for LoKr")
@pytest.mark.parametrize("kind", [kind for kind in FACTORISED if kind != "backbone"])
def test_diffusers_loads_what_the_trainer_did(folder: Path, plain: Tensor, tmp_path: Path, kind: str):
    tensors, expected = trained(folder, kind)
    base = base_weights(open_checkpoint(folder))
    target = save_as(LoraFile("lora", tensors), tmp_path / "lora.safetensors", "diffusers", base=base)
    pipeline = open_pipeline(folder)
    network = pipeline.dit
    network.__class__ = type("WithAdapters", (PeftAdapterMixin, type(network)), {})
    network.load_lora_adapter(str(tmp_path), weight_name=target.name, prefix="transformer")
    assert_same(velocity(pipeline), expected, plain)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_a_file_in_bf16_draws_nearly_the_same(folder: Path, plain: Tensor, tmp_path: Path, kind: str):
    tensors, expected = trained(folder, kind)
    path = save_lora(tmp_path / "lora.safetensors", tensors, {})
    dtypes = {key: value.dtype for key, value in read_lora(path).tensors.items()}
    assert all((dtypes[key] == torch.bfloat16) == ("lora_" in key) for key in dtypes)
    pipeline = open_pipeline(folder)
    pipeline.load_lora(path)
    assert (velocity(pipeline) - expected).abs().max() < 0.02 * (expected - plain).abs().max()


# Conversions


@pytest.mark.parametrize("to", ["kohya", "peft", "diffusers"])
@pytest.mark.parametrize("kind", KINDS)
def test_conversions_are_undone_by_converting_back(folder: Path, tmp_path: Path, kind: str, to: str):
    tensors, _ = trained(folder, kind)
    source = save_lora(tmp_path / "a.safetensors", tensors, {"modelspec.trigger_phrase": "dog"}, "fp32")
    there = tmp_path / ("there" if to == "peft" else "there.safetensors")
    if to != "kohya" and kind not in FACTORISED or to == "diffusers" and kind == "backbone":
        with pytest.raises(WrongAdapterError, match='"a.safetensors" changes'):
            convert_lora(source, there, to, checkpoint=folder)
        assert not there.exists()
        return
    convert_lora(source, there, to, checkpoint=folder)
    opened = open_checkpoint(folder)
    back = read_lora(convert_lora(there, tmp_path / "back.safetensors", "comfy", checkpoint=opened))
    assert back.tensors.keys() == tensors.keys()
    for key, tensor in back.tensors.items():
        if "dora_scale" in key and to != "kohya":
            torch.testing.assert_close(tensor, tensors[key], atol=1e-6, rtol=1e-6)
        else:
            assert torch.equal(tensor, tensors[key]), key
    assert back.trigger == "dog"
    assert "lora_adapter_metadata" not in back.metadata


def test_names_are_those_of_each_program(tmp_path: Path):
    file = LoraFile("a", pair(0))
    names = {
        to: set(read_lora(save_as(file, tmp_path / f"{to}.safetensors", to)).tensors)
        for to in ("comfy", "kohya", "diffusers")
    }
    assert names["comfy"] == {f"{KEY}.lora_A.weight", f"{KEY}.lora_B.weight", f"{KEY}.alpha"}
    kohya = "lora_unet_layers_0_attn1_to_q"
    assert names["kohya"] == {f"{kohya}.lora_down.weight", f"{kohya}.lora_up.weight", f"{kohya}.alpha"}
    theirs = "transformer.layers.0.attn1.to_q"
    assert names["diffusers"] == {f"{theirs}.lora_A.weight", f"{theirs}.lora_B.weight"}


def test_a_dora_is_converted_only_with_its_model(folder: Path, tmp_path: Path):
    tensors, _ = trained(folder, "dora")
    path = save_lora(tmp_path / "dora.safetensors", tensors, {})
    with pytest.raises(BadInputError, match='"dora.safetensors" is a DoRA.*\n.*--model'):
        convert_lora(path, tmp_path / "peft", "peft")
    other = tiny_models.write_checkpoint(tmp_path / "other", tiny_models.VARIANTS["grouped"])
    with pytest.raises(WrongAdapterError, match="was trained for"):
        convert_lora(path, tmp_path / "peft", "peft", checkpoint=other)


def test_odd_targets_are_refused(tmp_path: Path):
    file = LoraFile("a", pair(0))
    with pytest.raises(BadInputError, match='no format "gguf"'):
        save_as(file, tmp_path / "a.safetensors", "gguf")
    with pytest.raises(BadInputError, match="end in .safetensors"):
        save_as(file, tmp_path / "a.bin", "kohya")
    with pytest.raises(WrongAdapterError, match='is not one for BLIP3-o: 1 of its weights.*"lora_te1_x"'):
        save_as(LoraFile("sdxl", pair(0, "lora_te1_x")), tmp_path / "a.safetensors")


# Writing


def metadata_of(folder: Path, tmp_path: Path, *overrides: str) -> dict[str, str]:
    tree = {
        "run": {"name": "my_dog", "dir": str(tmp_path / "private" / "runs")},
        "data": {"path": str(tmp_path / "private" / "pictures"), "trigger": "ohwx dog", "class_word": "dog"},
        "model": {"root": str(folder)},
        "adapter": {"rank": 4, "alpha": 2, "start_from": str(tmp_path / "private" / "old.safetensors")},
        "train": {"prior": {"reg_path": str(tmp_path / "private" / "dogs")}},
    }
    return lora_metadata(
        parse_config(tree, overrides),
        open_checkpoint(folder),
        pair(0),
        pictures=12,
        steps=150,
        scorecard={"gain": 0.5},
        captions=["a secret dog", "a secret dog", "another"],
        strength=0.9,
        date=datetime(2026, 1, 2, 3, 4, 5),
    )


def test_the_metadata_tells_base_trigger_settings_and_proof(folder: Path, tmp_path: Path):
    metadata = metadata_of(folder, tmp_path)
    assert metadata["modelspec.architecture"] == "blip3o-nextdit-32/lora"
    assert metadata["modelspec.trigger_phrase"] == "ohwx dog"
    assert metadata["modelspec.date"] == "2026-01-02T03:04:05"
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == ("4", "2")
    assert (metadata["ss_steps"], metadata["ss_num_train_images"]) == ("150", "12")
    assert metadata["ss_base_model_version"] == folder.name
    assert metadata["blip3o.cond_dim"] == "32"
    assert json.loads(metadata["blip3o.scorecard"]) == {"gain": 0.5}
    settings = json.loads(metadata["blip3o.settings"])
    assert settings["train"]["optimizer"]["name"] == "adamw"
    assert settings["adapter"]["start_from"] == "old.safetensors"
    assert all(isinstance(value, str) for value in metadata.values())


def test_no_folder_and_no_caption_gets_out_unasked(folder: Path, tmp_path: Path):
    text = json.dumps(metadata_of(folder, tmp_path))
    assert "private" not in text and str(tmp_path) not in text and str(folder.parent) not in text
    assert "secret" not in text
    asked = metadata_of(folder, tmp_path, "save.captions=true")
    assert json.loads(asked["ss_tag_frequency"]) == {"my_dog": {"a secret dog": 2, "another": 1}}


def test_a_lora_knows_its_base_from_another(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    metadata = metadata_of(folder, tmp_path)
    path = save_lora(tmp_path / "dog.safetensors", pair(0), metadata)
    open_pipeline(folder).load_lora(path)
    assert not caplog.records
    merge_into_checkpoint(folder, tmp_path / "tuned", [(LoraFile("x", pair(1)), 1.0)])
    open_pipeline(tmp_path / "tuned").load_lora(path)
    assert '"dog.safetensors" was trained on another checkpoint of the same size' in caplog.text
    wide = save_lora(tmp_path / "wide.safetensors", pair(0), {**metadata, "blip3o.cond_dim": "3584"})
    with pytest.raises(WrongAdapterError, match='"wide.safetensors" was trained for the 8B model'):
        open_pipeline(folder).load_lora(wide)


def test_the_hash_is_that_of_the_tensors_bytes(tmp_path: Path):
    path = save_lora(tmp_path / "a.safetensors", pair(0), {"note": "one"})
    data = path.read_bytes()
    header = struct.unpack("<Q", data[:8])[0]
    with safe_open(str(path), framework="pt") as file:
        metadata = file.metadata()
    assert metadata["modelspec.hash_sha256"] == f"0x{hashlib.sha256(data[8 + header :]).hexdigest()}"
    assert metadata["note"] == "one"
    other = save_lora(tmp_path / "b.safetensors", pair(0), {"note": "a longer text"})
    assert read_lora(other).metadata["modelspec.hash_sha256"] == metadata["modelspec.hash_sha256"]
    different = save_lora(tmp_path / "c.safetensors", pair(1), {})
    assert read_lora(different).metadata["modelspec.hash_sha256"] != metadata["modelspec.hash_sha256"]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = save_lora(tmp_path / "a.safetensors", pair(0), {})
    before = path.read_bytes()
    real = os.replace

    def full(source: str, target: str) -> None:
        if Path(target) == path:
            raise OSError(28, "No space left on device")
        real(source, target)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        save_lora(path, pair(1), {})
    assert path.read_bytes() == before
    assert [each.name for each in tmp_path.iterdir()] == ["a.safetensors"]


def test_numbers_that_are_none_are_not_saved(tmp_path: Path):
    tensors = pair(0)
    tensors[f"{KEY}.lora_B.weight"] *= 1e6
    with pytest.raises(WrongAdapterError, match="no numbers in fp16"):
        save_lora(tmp_path / "a.safetensors", tensors, {}, "fp16")
    assert not list(tmp_path.iterdir())


# Merging


def deltas(file: LoraFile) -> dict[tuple[str, str], Tensor]:
    return {address: change.delta(torch.empty(change.size)) for address, change in file.changes.items()}


def test_concatenation_is_the_exact_sum(folder: Path, plain: Tensor):
    first, second = (
        LoraFile(kind, trained(folder, kind, seed)[0]) for seed, kind in enumerate(["lora", "rank pattern"])
    )
    both = open_pipeline(folder)
    both.load_lora(first, 0.7)
    both.load_lora(second, -0.4)
    merged = merge_loras([(first, 0.7), (second, -0.4)])
    assert merged.changes[LAYER].rank == 8
    one = open_pipeline(folder)
    one.load_lora(merged)
    assert_same(velocity(one), velocity(both), plain)


def test_whole_weights_and_queries_are_merged_too():
    tensors = {"backbone.latent_queries.diff": torch.ones(1, 4, 32), f"{KEY}.diff_b": torch.ones(32)}
    merged = merge_loras([(LoraFile("a", tensors), 0.5), (LoraFile("b", tensors), 1.0)])
    assert all((tensor == 1.5).all() for tensor in merged.tensors.values())
    with pytest.raises(WrongAdapterError, match="changes the whole of"):
        merge_loras(
            [(LoraFile("a", {f"{KEY}.diff": torch.ones(32, 32)}), 1.0), (LoraFile("b", pair(0)), 1.0)]
        )


def test_svd_merges_to_the_best_approximation_of_a_rank():
    first, second = LoraFile("a", pair(0)), LoraFile("b", pair(1, rank=3))
    exact = deltas(merge_loras([(first, 1.0), (second, 2.0)]))[LAYER]
    merged = merge_loras([(first, 1.0), (second, 2.0)], mode="svd", rank=5)
    assert merged.changes[LAYER].rank == 5
    u, values, v = torch.linalg.svd(exact)
    torch.testing.assert_close(deltas(merged)[LAYER], (u[:, :5] * values[:5]) @ v[:5], atol=1e-4, rtol=0)
    whole = merge_loras([(first, 1.0), (second, 2.0)], mode="svd", rank=7)
    torch.testing.assert_close(deltas(whole)[LAYER], exact, atol=1e-4, rtol=0)


def test_dora_and_lokr_are_merged_by_svd_alone(folder: Path, plain: Tensor):
    files = {kind: LoraFile(kind, trained(folder, kind)[0]) for kind in ("lora", "dora", "lokr")}
    for kind, word in (("dora", "DoRA"), ("lokr", "LoKr")):
        with pytest.raises(WrongAdapterError, match=f'The {word} "{kind}" has no exact sum'):
            merge_loras([(files["lora"], 1.0), (files[kind], 1.0)])
    with pytest.raises(BadInputError, match="--model"):
        merge_loras([(files["dora"], 1.0)], mode="svd", rank=32)
    base = base_weights(open_checkpoint(folder))
    for kind in ("dora", "lokr"):
        pipeline, expected = open_pipeline(folder), open_pipeline(folder)
        pipeline.load_lora(merge_loras([(files[kind], 0.5)], mode="svd", rank=48, base=base))
        expected.load_lora(files[kind], 0.5)
        assert_same(velocity(pipeline), velocity(expected), plain)


def test_loras_for_different_models_are_not_merged():
    small, big = (
        LoraFile("small", pair(0), {"blip3o.cond_dim": "2048"}),
        LoraFile("big", pair(0), {"blip3o.cond_dim": "3584"}),
    )
    with pytest.raises(
        WrongAdapterError, match='"small" and "big" were trained for models of different size'
    ):
        merge_loras([(small, 1.0), (big, 1.0)])
    wide = LoraFile("wide", {**pair(0), f"{KEY}.lora_A.weight": torch.ones(4, 48)})
    with pytest.raises(WrongAdapterError, match='"small" and "wide"'):
        merge_loras([(small, 1.0), (wide, 1.0)])


def test_a_merged_lora_remembers_what_it_is_made_of():
    first = LoraFile(
        "a", pair(0), {"blip3o.cond_dim": "32", "modelspec.trigger_phrase": "ohwx", "ss_steps": "9"}
    )
    second = LoraFile("b", pair(1), {"modelspec.trigger_phrase": "zwx"})
    metadata = merge_loras([(first, 0.5), (second, 1.0)]).metadata
    assert metadata["modelspec.trigger_phrase"] == "ohwx, zwx"
    assert metadata["blip3o.cond_dim"] == "32"
    assert json.loads(metadata["blip3o.merged_loras"])[0] == {"file": "a", "strength": 0.5}
    assert "ss_steps" not in metadata


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "ties"}, "no way"),
        ({"mode": "svd"}, "needs a rank"),
        ({"rank": 4}, "needs a rank"),
    ],
)
def test_unclear_merges_are_refused(options: dict, message: str):
    with pytest.raises(BadInputError, match=message):
        merge_loras([(LoraFile("a", pair(0)), 1.0)], **options)


# Extracting and resizing


def test_a_lora_is_extracted_from_a_finetuned_model(folder: Path, plain: Tensor, tmp_path: Path):
    tensors, expected = trained(folder, "lora, queries and backbone")
    tensors = {key: value for key, value in tensors.items() if ".text." not in key}
    tensors |= {
        "diffusion_model.layers.1.gate.diff": torch.ones(4),
        "diffusion_model.caption_projection.linear_2.diff_b": torch.ones(32),
    }
    tuned = merge_into_checkpoint(folder, tmp_path / "tuned", [(LoraFile("x", tensors), 1.0)])
    calls = []
    extracted, kept = extract_lora(folder, tuned, share=1.0, on_layer=lambda *each: calls.append(each))
    assert {rank for rank, _ in kept.layers.values()} == {4}
    assert kept.share == pytest.approx(1.0)
    assert calls[-1][0] == calls[-1][1]
    assert extracted.changes.keys() == LoraFile("x", tensors).changes.keys()
    pipeline = open_pipeline(folder)
    pipeline.load_lora(extracted)
    assert_same(velocity(pipeline), velocity(open_pipeline(tuned)), plain)
    _, less = extract_lora(folder, tuned, rank=2)
    assert 0.1 < less.share < 0.99
    assert {rank for rank, _ in less.layers.values()} == {2}


def test_models_that_do_not_differ_or_do_not_belong_together_give_no_lora(folder: Path, tmp_path: Path):
    with pytest.raises(WrongAdapterError, match="have the same DiT"):
        extract_lora(folder, folder, rank=4)
    other = tiny_models.write_checkpoint(tmp_path / "other", tiny_models.VARIANTS["grouped"])
    with pytest.raises(WrongAdapterError, match="not of the same size"):
        extract_lora(folder, other, rank=4)
    with pytest.raises(BadInputError, match="not both"):
        extract_lora(folder, folder)


def test_resizing_keeps_the_best_part_and_says_how_much():
    file = LoraFile(
        "a",
        pair(0, rank=6) | pair(1, KEY.replace("to_q", "to_k"), rank=3),
        {"modelspec.trigger_phrase": "dog"},
    )
    smaller, kept = resize_lora(file, rank=2)
    shares, total = {}, {}
    for address, exact in deltas(file).items():
        u, values, v = torch.linalg.svd(exact.double())
        best = (u[:, :2] * values[:2]) @ v[:2]
        torch.testing.assert_close(deltas(smaller)[address].double(), best, atol=1e-4, rtol=0)
        total[address[1]] = values.square().sum().item()
        shares[address[1]] = values[:2].square().sum().item() / total[address[1]]
    assert {name: share for name, (_, share) in kept.layers.items()} == pytest.approx(shares, rel=1e-5)
    together = sum(shares[name] * total[name] for name in total) / sum(total.values())
    assert kept.share == pytest.approx(together, rel=1e-5)
    assert f"{together:.1%} of the change kept" in str(kept)
    assert smaller.trigger == "dog"
    unchanged, all_kept = resize_lora(file, rank=64)
    assert [rank for rank, _ in all_kept.layers.values()] == [6, 3]
    torch.testing.assert_close(deltas(unchanged)[LAYER], deltas(file)[LAYER], atol=1e-4, rtol=0)


def test_of_large_matrices_a_few_singular_vectors_are_found_as_well_as_all():
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(size, 300, generator=generator))[0] for size in (300, 400))
    values = 0.97 ** torch.arange(300.0)
    matrix = (left * values) @ right.T
    state = torch.get_rng_state()
    up, down, kept = _truncated(matrix, None, rank=8)
    assert torch.equal(torch.get_rng_state(), state)
    best = values[:8].square().sum() / values.square().sum()
    assert kept == pytest.approx(best.item(), rel=1e-3)
    error = (matrix - up @ down).square().sum() / matrix.square().sum()
    assert error.item() == pytest.approx(1 - kept, rel=1e-3)


def test_resizing_to_a_share_takes_the_smallest_rank_that_reaches_it():
    file = LoraFile("a", pair(0, rank=8))
    smaller, kept = resize_lora(file, share=0.8)
    values = torch.linalg.svdvals(deltas(file)[LAYER].double()).square()
    needed = int((values.cumsum(0) / values.sum() < 0.8).sum()) + 1
    assert smaller.changes[LAYER].rank == needed < 8
    assert 0.8 <= kept.share < 1


def test_a_dora_becomes_a_lora_of_a_rank(folder: Path, plain: Tensor):
    file = LoraFile("dora", trained(folder, "dora")[0])
    resized, kept = resize_lora(file, rank=48, base=base_weights(open_checkpoint(folder)))
    assert kept.share == pytest.approx(1.0)
    pipeline, expected = open_pipeline(folder), open_pipeline(folder)
    pipeline.load_lora(resized)
    expected.load_lora(file)
    assert_same(velocity(pipeline), velocity(expected), plain)


def test_a_lora_of_zeros_is_resized_to_zeros():
    tensors = {**pair(0), f"{KEY}.lora_B.weight": torch.zeros(32, 4)}
    resized, kept = resize_lora(LoraFile("zero", tensors), rank=2)
    assert not deltas(resized)[LAYER].any()
    assert kept.share == 1.0


# Inspecting


def test_an_inspection_tells_people_and_programs_what_is_inside(folder: Path, tmp_path: Path):
    path = save_lora(tmp_path / "dog.safetensors", pair(0), metadata_of(folder, tmp_path))
    found = json.loads(json.dumps(inspect_lora(path)))
    assert (found["title"], found["trigger"], found["recommended_strength"]) == ("my_dog", "ohwx dog", 0.9)
    assert (found["steps"], found["pictures"], found["conditioning_width"]) == (150, 12, 32)
    assert found["networks"]["dit"]["ranks"] == {"4": 1}
    assert found["networks"]["dit"]["norm"] == pytest.approx(
        deltas(read_lora(path))[LAYER].norm().item(), rel=1e-3
    )
    assert found["problems"] == []
    text = describe(found)
    for fragment in (
        "my_dog",
        'trigger: "ohwx dog", strength 0.9',
        "rank 4 (1 layers)",
        "150 steps on 12",
        "gain: 0.5",
    ):
        assert fragment in text


def test_an_inspection_names_what_is_wrong(tmp_path: Path):
    tensors = {
        **pair(0),
        **{key: torch.zeros_like(value) for key, value in pair(1, KEY.replace("to_q", "to_k")).items()},
        f"{KEY.replace('to_q', 'to_v')}.lora_A.weight": torch.ones(4, 32),
        "lora_te1_text.alpha": torch.tensor(1.0),
    }
    found = inspect_lora(save_lora(tmp_path / "odd.safetensors", tensors, {}))
    assert len(found["problems"]) == 3
    for fragment in (
        "to_k changes nothing",
        "to_v: a part is missing",
        "lora_te1_text has a name of no known kind",
    ):
        assert fragment in describe(found)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "dora"])
def test_the_size_of_a_change_is_told_without_building_it(folder: Path, kind: str):
    from comfyui_blip3o.lora_training.files.write import change_norm

    for change in LoraFile(kind, trained(folder, kind)[0]).changes.values():
        if change.kind:
            expected = change.delta(torch.empty(change.size)).norm().item()
            assert change_norm(change) == pytest.approx(expected, rel=1e-4)
