"""Broken and hostile files end in one sentence that names them: no traceback, no hang, nothing outside."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from comfyui_blip3o.blip3o_core.checkpoints.info import describe_checkpoint
from comfyui_blip3o.blip3o_core.checkpoints.layout import is_checkpoint_folder, open_checkpoint
from comfyui_blip3o.blip3o_core.checkpoints.load import (
    load_backbone,
    load_decoder,
    load_dit,
    load_image_encoder,
)
from comfyui_blip3o.blip3o_core.errors import Blip3oError, WrongAdapterError, WrongCheckpointError
from comfyui_blip3o.blip3o_core.lora.changes import shape_fault
from comfyui_blip3o.blip3o_core.lora.files import PEFT_METADATA, read_lora
from comfyui_blip3o.blip3o_core.picture_files import save_png
from comfyui_blip3o.cli import main
from safetensors.torch import save_file

LAYER = "diffusion_model.layers.0.attn1.to_q"
DEEP = "[" * 100_000


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_folder, tmp_path / "MyCheckpoint"))


def load_everything(folder: Path) -> None:
    files = open_checkpoint(folder)
    for load in (load_dit, load_image_encoder, load_backbone, load_decoder):
        load(files)


# config.json and the decoder's


def vision(**fields: Any) -> dict[str, Any]:
    return {"vision_config": {**tiny_models.tiny_config()["vision_config"], **fields}}


@pytest.mark.parametrize(
    "fields",
    [
        {"num_hidden_layers": 2**31}, {"num_hidden_layers": 1e29}, {"num_hidden_layers": "x"}, {"num_hidden_layers": True},
        {"hidden_size": 10**9}, {"hidden_size": -1}, {"intermediate_size": 10**9}, {"num_attention_heads": 0},
        {"num_attention_heads": "x"}, {"num_key_value_heads": 3}, {"hidden_act": "x"}, {"rms_norm_eps": "x"},
        {"rope_theta": "x"}, {"rope_scaling": 5}, {"max_position_embeddings": "x"}, {"text_config": 5}, {"text_config": [1]},
        {"vision_config": 5}, {"vision_config": None}, vision(depth=2**31), vision(depth=1e29), vision(hidden_size=10**9),
        vision(num_heads=0), vision(patch_size=0), vision(patch_size="x"), vision(out_hidden_size=7),
        vision(fullatt_block_indexes=5), vision(hidden_act=5), {"gen_vision_config": {"head_width": 0}},
        {"gen_vision_config": {"head_width": "x"}},
    ],
    ids=str,
)  # fmt: skip
def test_a_value_of_config_json_that_cannot_be_is_one_sentence(folder: Path, fields: dict[str, Any]) -> None:
    config = json.loads((folder / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, **fields}), "utf-8")
    with pytest.raises(Blip3oError, match="config.json|gen_vision_config|head_width"):
        load_everything(folder)
    describe_checkpoint(open_checkpoint(folder))


@pytest.mark.parametrize(
    ("part", "fields"),
    [
        ("unet", {"block_out_channels": "x"}), ("unet", {"block_out_channels": [10**9, 10**9]}),
        ("unet", {"layers_per_block": 10**9}), ("unet", {"layers_per_block": "x"}), ("unet", {"transformer_layers_per_block": 10**9}),
        ("unet", {"down_block_types": ["NoSuchBlock"]}), ("unet", {"cross_attention_dim": None}), ("unet", {"act_fn": "x"}),
        ("vae", {"block_out_channels": []}), ("vae", {"latent_channels": -1}), ("vae", {"norm_num_groups": 7}),
        ("vae", {"layers_per_block": 10**9}), ("scheduler", {"beta_schedule": "x"}), ("scheduler", {"num_train_timesteps": "x"}),
        ("scheduler", {"prediction_type": 5, "beta_start": "x"}),
    ],
    ids=str,
)  # fmt: skip
def test_a_value_of_the_decoder_that_cannot_be_is_one_sentence(
    folder: Path, part: str, fields: dict[str, Any]
) -> None:
    name = "scheduler_config.json" if part == "scheduler" else "config.json"
    path = folder / "diffusion-decoder" / part / name
    path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), **fields}), "utf-8")
    with pytest.raises(WrongCheckpointError, match="config.json|decoder"):
        load_decoder(open_checkpoint(folder))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_nested_json_is_one_sentence_and_hides_no_other_checkpoint(folder: Path, name: str) -> None:
    (folder / name).write_text(DEEP, "utf-8")
    with pytest.raises(WrongCheckpointError, match=name):
        open_checkpoint(folder)
    assert is_checkpoint_folder(folder) is (name != "config.json")


@pytest.mark.parametrize("shard", [5, ["a"], {"a": 1}, "../x.safetensors", "con.safetensors", "model.py"])
def test_an_index_names_weight_files_of_its_folder_alone(folder: Path, shard: Any) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": shard}}), "utf-8")
    with pytest.raises(WrongCheckpointError, match="index"):
        open_checkpoint(folder)


# LoRAs


def pair(**changes: torch.Tensor) -> dict[str, torch.Tensor]:
    tensors = {"lora_A.weight": torch.ones(4, 32), "lora_B.weight": torch.ones(32, 4)}
    return {f"{LAYER}.{name}": tensor for name, tensor in {**tensors, **changes}.items()}


@pytest.mark.parametrize(
    "tensors",
    [
        pair(alpha=torch.ones(7)), pair(alpha=torch.tensor(float("inf"))), pair(**{"lora_A.weight": torch.ones(())}),
        pair(**{"lora_A.weight": torch.ones(5, 32)}), pair(**{"lora_B.weight": torch.ones(0, 4)}), pair(dora_scale=torch.ones(3)),
        {f"{LAYER}.lokr_w1": torch.ones(4), f"{LAYER}.lokr_w2": torch.ones(8, 8)},
        {f"{LAYER}.lokr_w1_a": torch.ones(4, 2), f"{LAYER}.lokr_w1_b": torch.ones(3, 4), f"{LAYER}.lokr_w2": torch.ones(8, 8)},
        {f"{LAYER}.hada_w1_a": torch.ones(32, 2), f"{LAYER}.hada_w1_b": torch.ones(2, 32), f"{LAYER}.hada_w2_a": torch.ones(32, 2),
         f"{LAYER}.hada_w2_b": torch.ones(2, 31)},
        {f"{LAYER}.lokr_w2_a": torch.ones(8, 2), f"{LAYER}.lokr_w2_b": torch.ones(2, 8)}, {f"{LAYER}.dora_scale": torch.ones(32)},
        pair(diff_b=torch.ones(9)), {f"{LAYER}.diff": torch.ones(())},
    ],
    ids=range(13),
)  # fmt: skip
def test_a_lora_of_odd_shapes_is_one_sentence(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], tensors: dict[str, torch.Tensor]
) -> None:
    path = tmp_path / "odd.safetensors"
    save_file({key: tensor.clone() for key, tensor in tensors.items()}, str(path))
    model = ["--model", str(tiny_folder), "--device", "cpu", "--quiet", "-o", str(tmp_path / "a.png")]
    assert main(["generate", "red", "--lora", str(path), *model]) == 2
    assert "odd.safetensors" in capsys.readouterr().err


def test_shapes_that_fit_have_no_fault() -> None:
    assert (
        shape_fault({"lora_A": torch.ones(4, 8), "lora_B": torch.ones(6, 4), "alpha": torch.ones(())}) is None
    )
    assert shape_fault({"lora_A": torch.ones(4, 8, 3, 3), "lora_B": torch.ones(6, 4, 1, 1)}) is None
    assert (
        shape_fault({"lora_A": torch.ones(4, 8), "lora_B": torch.ones(6, 4), "dora_scale": torch.ones(6, 1)})
        is None
    )
    assert (
        shape_fault(
            {"lokr_w1": torch.ones(2, 2), "lokr_w2_a": torch.ones(3, 1), "lokr_w2_b": torch.ones(1, 4)}
        )
        is None
    )


def test_a_lora_in_8_bit_floats_draws_as_its_values_say(tiny_folder: Path, tmp_path: Path) -> None:
    from PIL import Image

    generator = torch.Generator().manual_seed(0)
    values = {
        key: (torch.randn(tensor.shape, generator=generator)).to(torch.float8_e4m3fn)
        for key, tensor in pair().items()
    }
    save_file(values, str(tmp_path / "small.safetensors"))
    save_file({key: value.float() for key, value in values.items()}, str(tmp_path / "whole.safetensors"))
    drawn = []
    for name in ("small", "whole"):
        out = tmp_path / f"{name}.png"
        options = [
            "--model",
            str(tiny_folder),
            "--device",
            "cpu",
            "--quiet",
            "--steps",
            "2",
            "--pixel-steps",
            "2",
        ]
        lora = str(tmp_path / f"{name}.safetensors")
        assert main(["generate", "red", "--lora", lora, "-o", str(out), *options]) == 0
        drawn.append(Image.open(out).tobytes())
    assert drawn[0] == drawn[1]


@pytest.mark.parametrize(
    "note",
    [
        {"r": 4, "lora_alpha": 4, "alpha_pattern": {"(([a-z0-9_.])+)+!": 1}}, {"r": 4, "lora_alpha": 4, "alpha_pattern": {"(": 1}},
        {"r": 4, "lora_alpha": 4, "alpha_pattern": [1]}, {"r": "x", "lora_alpha": "y"}, {"r": 4, "lora_alpha": [4]},
        {"r": 4, "lora_alpha": float("nan")}, {"r": 4, "lora_alpha": float("inf")}, {"r": 4, "lora_alpha": -1},
    ],
    ids=str,
)  # fmt: skip
def test_notes_of_peft_are_read_as_names_and_numbers(tmp_path: Path, note: dict[str, Any]) -> None:
    path = tmp_path / "noted.safetensors"
    save_file(pair(), str(path), metadata={PEFT_METADATA: json.dumps(note)})
    with pytest.raises(WrongAdapterError):
        _ = read_lora(path).changes


@pytest.mark.parametrize("name", ["to_q", "attn1.to_q", "layers.0.attn1.to_q", r"^layers\.0\.attn1\.to_q"])
def test_a_pattern_that_is_a_name_counts(tmp_path: Path, name: str) -> None:
    path = tmp_path / "noted.safetensors"
    note = {"r": 4, "lora_alpha": 4, "alpha_pattern": {"other": 2, name: 16}}
    save_file(pair(), str(path), metadata={PEFT_METADATA: json.dumps(note)})
    assert [change.alpha for change in read_lora(path).changes.values()] == [16.0]


# Pictures


@pytest.mark.parametrize(
    "change",
    [
        {"seed": "x"}, {"seed": -1}, {"seed": True}, {"prompt": 5}, {"prompt": ["a"]}, {"features": 5}, {"features": [1]},
        {"features": {"steps": "x"}}, {"features": {"steps": 10**9}}, {"features": {"guidance_interval": 5}},
        {"features": {"guidance_interval": ["a", "b"]}}, {"features": {"no such": 1}}, {"pixels": {"width": 10**9}},
        {"pixels": {"width": "x"}}, {"pixels": {"tiled": "x"}}, {"preset": 5}, {"preset": "x"}, {"loras": 5}, {"loras": [5]},
        {"loras": [{"file": 5, "strength": 1}]}, {"loras": [{"file": "x", "strength": "y"}]}, {"version": "x"},
        {"loras": [{"file": "/etc/passwd", "strength": 1}]}, {"loras": [{"file": "\\\\host\\share\\x", "strength": 1}]},
        {"loras": [{"file": "../../x.safetensors", "strength": 1}]}, {"strength": "x"}, {"negative_prompt": 5},
    ],
    ids=str,
)  # fmt: skip
def test_a_picture_whose_note_is_odd_is_one_sentence(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict[str, Any]
) -> None:
    path = tmp_path / "odd.png"
    note = {"version": 1, "prompt": "red", "seed": 1, "checkpoint": "tiny", "checkpoint_hash": "x", **change}
    save_png(tiny_models.picture(), path, note)
    options = ["--model", str(tiny_folder), "--device", "cpu", "-o", str(tmp_path / "a.png")]
    if "strength" in change:
        options += ["--start-image", str(path)]
    assert main(["generate", "--like", str(path), *options]) == 2
    assert capsys.readouterr().err.strip()
    assert not (tmp_path / "a.png").exists()


def test_a_deeply_nested_note_is_one_sentence(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_itxt("blip3o", DEEP)
    tiny_models.picture().save(tmp_path / "deep.png", pnginfo=info)
    assert main(["generate", "--like", str(tmp_path / "deep.png"), "--model", str(tiny_folder)]) == 2
    assert "deep.png" in capsys.readouterr().err


def test_a_lora_whose_header_is_nonsense_is_told_in_a_few_words(tmp_path: Path) -> None:
    header = json.dumps({"a": {"dtype": "F32", "shape": "x" * 10_000, "data_offsets": [0, 4]}}).encode()
    path = tmp_path / "lora.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(WrongAdapterError, match="cannot be read") as caught:
        read_lora(path)
    assert len(str(caught.value)) < 1000
