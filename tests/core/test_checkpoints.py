"""Checkpoint folders: what is read, what is written, and what a person is told when something is wrong with them."""

import json
import pickle
import random
import re
import shutil
import struct
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
import tiny_models
import torch
from comfyui_blip3o.blip3o_core.checkpoints import safetensor_files, save
from comfyui_blip3o.blip3o_core.checkpoints.convert import convert_folder, convert_pickle
from comfyui_blip3o.blip3o_core.checkpoints.info import describe_checkpoint
from comfyui_blip3o.blip3o_core.checkpoints.keys import to_component_key, to_published_key
from comfyui_blip3o.blip3o_core.checkpoints.layout import is_checkpoint_folder, open_checkpoint
from comfyui_blip3o.blip3o_core.checkpoints.load import (
    load_backbone,
    load_decoder,
    load_dit,
    load_image_encoder,
)
from comfyui_blip3o.blip3o_core.checkpoints.safetensor_files import (
    TensorShape,
    read_header,
    stream_safetensors,
    write_safetensors,
)
from comfyui_blip3o.blip3o_core.errors import (
    BadInputError,
    Blip3oError,
    MissingFilesError,
    WrongCheckpointError,
)
from comfyui_blip3o.blip3o_core.pipeline import load_pipeline
from reference_set import COMPACT
from safetensors import safe_open
from safetensors.torch import load_file, save_file

INDEX = "model.safetensors.index.json"
SHARD = "model-00001-of-00001.safetensors"
TOWER = "model.gen_vision_tower.vision_tower.model."
LOADERS = {
    "backbone": load_backbone,
    "dit": load_dit,
    "image_encoder": load_image_encoder,
    "decoder": load_decoder,
}
LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0000\nsize 5000000000\n"


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    """A tiny checkpoint that a test may damage."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "MyCheckpoint"))


def change_config(folder: Path, **fields: object) -> None:
    config = json.loads((folder / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, **fields}), "utf-8")


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Change the tensors of the only shard, and let the index agree."""
    tensors = load_file(str(folder / SHARD))
    change(tensors)
    save_file(tensors, str(folder / SHARD))
    weight_map = {"weight_map": dict.fromkeys(tensors, SHARD)}
    (folder / INDEX).write_text(json.dumps(weight_map), "utf-8")


def split_tower(folder: Path) -> Path:
    """Move EVA-CLIP into a shard of its own; returns that shard."""
    tensors = load_file(str(folder / SHARD))
    names = {key: "tower.safetensors" if key.startswith(TOWER) else "rest.safetensors" for key in tensors}
    for name in set(names.values()):
        save_file({key: tensors[key] for key in tensors if names[key] == name}, str(folder / name))
    (folder / SHARD).unlink()
    (folder / INDEX).write_text(json.dumps({"weight_map": names}), "utf-8")
    return folder / "tower.safetensors"


def cut(path: Path, share: float = 0.6) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


def state(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return dict(module.state_dict())


# Round trips and sizes


@pytest.mark.parametrize("variant", tiny_models.VARIANTS)
def test_every_tensor_comes_back_equal(tmp_path: Path, variant: str) -> None:
    sizes = tiny_models.VARIANTS[variant]
    files = open_checkpoint(tiny_models.write_checkpoint(tmp_path / "made", sizes))
    for name, build in (
        ("backbone", tiny_models.build_backbone),
        ("dit", tiny_models.build_dit),
        ("image_encoder", tiny_models.build_image_encoder),
        ("decoder", tiny_models.build_decoder),
    ):
        written, read = state(build(sizes)), state(LOADERS[name](files))
        assert list(read) == list(written)
        for key, tensor in written.items():
            torch.testing.assert_close(read[key], tensor, rtol=0, atol=0, msg=f"{name} {key}")


@pytest.mark.parametrize("variant", tiny_models.VARIANTS)
def test_sizes_are_inferred_from_the_tensors(tmp_path: Path, variant: str) -> None:
    sizes = tiny_models.VARIANTS[variant]
    files = open_checkpoint(tiny_models.write_checkpoint(tmp_path / "made", sizes))
    assert load_dit(files).config == sizes.dit
    assert load_image_encoder(files).config == sizes.tower
    backbone = load_backbone(files)
    assert backbone.latent_queries.shape == (1, sizes.queries, sizes.width)
    assert (backbone.lm_head.weight is backbone.text.embed_tokens.weight) is sizes.tie_head
    assert load_decoder(files).vae_scale == 2 ** (len(sizes.vae_widths) - 1)


def test_names_and_shapes_of_the_published_files_map_one_to_one() -> None:
    files = open_checkpoint(COMPACT / "checkpoint")
    published = {}
    for component in ("backbone", "dit", "image_encoder"):
        tensors = files.component_tensors(component)
        published |= {to_published_key(component, key): info.shape for key, info in tensors.items()}
    assert published == {key: info.shape for key, info in files.tensors.items()}


def test_a_tied_head_is_not_written(tmp_path: Path) -> None:
    folder = tiny_models.write_checkpoint(tmp_path / "tied", tiny_models.VARIANTS["tied"])
    assert "lm_head.weight" not in json.loads((folder / INDEX).read_text("utf-8"))["weight_map"]


def test_written_names_are_the_published_ones(tiny_folder: Path) -> None:
    names = set(json.loads((tiny_folder / INDEX).read_text("utf-8"))["weight_map"])
    published = set(json.loads((COMPACT / "checkpoint" / INDEX).read_text("utf-8"))["weight_map"])
    # Layer counts differ between the two; everything else is the same.
    assert names - published == set()
    assert {key for key in published - names} == {
        key for key in published if key.startswith("model.layers.2.")
    }


@pytest.mark.parametrize("dtype", [None, torch.float16, torch.float64])
@pytest.mark.parametrize("seed", range(3))
def test_tensors_are_complete_whatever_their_order_in_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype | None, seed: int
) -> None:
    # So small that the file is mapped anew in the middle.
    monkeypatch.setattr(safetensor_files, "REMAP_BYTES", 5000)
    order = random.Random(seed)
    written = {f"weight.{i}": torch.randn(i, 7).bfloat16() for i in range(40)}
    written["ids"] = torch.arange(99)
    in_file = order.sample(sorted(written), len(written))
    header, content = {}, b""
    for key in in_file:
        data = written[key].view(torch.uint8).numpy().tobytes()
        kind = "I64" if key == "ids" else "BF16"
        offsets = [len(content), len(content) + len(data)]
        header[key] = {"dtype": kind, "shape": list(written[key].shape), "data_offsets": offsets}
        content += data
    path = tmp_path / "shuffled.safetensors"
    raw = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + content)
    infos = read_header(path)[0]
    wanted = order.sample(in_file, len(in_file))
    read = dict(safetensor_files.read_tensors({key: infos[key] for key in wanted}, dtype=dtype))
    assert set(read) == set(written)
    for key, tensor in written.items():
        target = dtype if dtype and tensor.is_floating_point() else tensor.dtype
        assert read[key].dtype == target
        assert torch.equal(read[key], tensor.to(target)), key


def test_buffers_that_old_savers_stored_are_dropped_on_purpose(folder: Path) -> None:
    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
        tensors["visual.rotary_pos_emb.inv_freq"] = torch.ones(4)

    change_weights(folder, add)
    assert to_component_key("visual.rotary_pos_emb.inv_freq") == (None, "rotary tables")
    load_backbone(open_checkpoint(folder))


def test_small_shards_hold_everything(tmp_path: Path) -> None:
    folder = tiny_models.write_checkpoint(tmp_path / "many", max_shard_bytes=20_000)
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 3
    assert shards[0].name == f"model-00001-of-{len(shards):05d}.safetensors"
    reread = state(load_dit(open_checkpoint(folder)))
    for key, tensor in state(tiny_models.build_dit()).items():
        assert torch.equal(reread[key], tensor)


def test_weights_are_frozen_and_in_the_dtype_asked_for(tiny_folder: Path) -> None:
    files = open_checkpoint(tiny_folder)
    for load in LOADERS.values():
        module = load(files, dtype=torch.bfloat16)
        assert not module.training
        assert not any(parameter.requires_grad for parameter in module.parameters())
        assert {parameter.dtype for parameter in module.parameters()} == {torch.bfloat16}
    decoder = load_decoder(files, dtype=torch.float16)
    assert (decoder.unet.dtype, decoder.vae.dtype) == (torch.float16, torch.float32)


def test_rotary_tables_are_real_after_a_meta_build(tiny_folder: Path) -> None:
    backbone = load_backbone(open_checkpoint(tiny_folder))
    for name, buffer in backbone.named_buffers():
        assert buffer.device.type == "cpu", name
        assert torch.isfinite(buffer).all(), name
    fresh = tiny_models.build_backbone()
    for (name, ours), (_, built) in zip(backbone.named_buffers(), fresh.named_buffers(), strict=True):
        assert torch.equal(ours, built), name


# What is read


def test_drawing_reads_no_tensor_of_the_image_encoder(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: dict[str, int] = {}
    real = safetensor_files.safe_open

    class Counting:
        def __init__(self, *arguments: object, **options: object) -> None:
            self.handle = real(*arguments, **options)

        def get_tensor(self, key: str) -> torch.Tensor:
            tensor = self.handle.get_tensor(key)
            read[key] = tensor.nbytes
            return tensor

    monkeypatch.setattr(safetensor_files, "safe_open", Counting)
    pipeline = load_pipeline(tiny_folder, dtype="fp32", device="cpu")
    pipeline.load()
    files = open_checkpoint(tiny_folder)
    wanted = {key: info.nbytes for key, info in files.tensors.items() if not key.startswith(TOWER)}
    assert {key: size for key, size in read.items() if key in files.tensors} == wanted
    assert not any(key.startswith(TOWER) for key in read)
    pipeline.load("image_encoder")
    assert any(key.startswith(TOWER) for key in read)


def test_drawing_works_without_the_shard_of_the_image_encoder(folder: Path) -> None:
    split_tower(folder).unlink()
    pipeline = load_pipeline(folder, dtype="fp32", device="cpu")
    conditioning = pipeline.encode_prompts("a red circle")
    assert pipeline.sample_features(conditioning, [0]).shape == (1, 16, 16)
    with pytest.raises(MissingFilesError, match="tower.safetensors"):
        pipeline.encode_images([tiny_models.picture()])


def test_only_files_of_the_index_are_read(folder: Path) -> None:
    save_file({"features.factors": torch.zeros(2)}, str(folder / "preview.safetensors"))
    stale = {key: tensor + 1 for key, tensor in load_file(str(folder / SHARD)).items()}
    save_file(stale, str(folder / "model-00002-of-00002.safetensors"))
    reread = load_dit(open_checkpoint(folder))
    assert torch.equal(reread.layers[0].gate, tiny_models.build_dit().layers[0].gate)


def test_a_single_file_without_an_index_is_read(folder: Path) -> None:
    (folder / SHARD).rename(folder / "model.safetensors")
    (folder / INDEX).unlink()
    save_file({"features.factors": torch.zeros(2)}, str(folder / "preview.safetensors"))
    load_backbone(open_checkpoint(folder))


# Separate image encoder


@pytest.fixture
def tower_pickle(tmp_path: Path) -> Path:
    path = tmp_path / "eva_clip_vision_tower" / "pytorch_model.bin"
    path.parent.mkdir()
    torch.save(dict(tiny_models.build_image_encoder().state_dict()), path)
    return path


def drop_tower(folder: Path) -> None:
    def drop(tensors: dict[str, torch.Tensor]) -> None:
        for key in [key for key in tensors if key.startswith(TOWER)]:
            del tensors[key]

    change_weights(folder, drop)


def assert_is_the_tiny_tower(module: torch.nn.Module) -> None:
    for key, tensor in tiny_models.build_image_encoder().state_dict().items():
        assert torch.equal(state(module)[key], tensor), key


def test_the_image_encoder_is_found_beside_the_checkpoint(folder: Path, tower_pickle: Path) -> None:
    drop_tower(folder)
    assert_is_the_tiny_tower(load_image_encoder(open_checkpoint(folder)))


@pytest.mark.parametrize("form", ["file", "folder"])
def test_the_image_encoder_is_read_from_a_given_path(folder: Path, tower_pickle: Path, form: str) -> None:
    path = tower_pickle if form == "file" else tower_pickle.parent
    assert_is_the_tiny_tower(load_image_encoder(open_checkpoint(folder, image_encoder=path)))


def test_a_pickle_of_the_old_kind_is_read_too(folder: Path, tower_pickle: Path) -> None:
    tensors = dict(tiny_models.build_image_encoder().state_dict())
    torch.save(tensors, tower_pickle, _use_new_zipfile_serialization=False)
    assert_is_the_tiny_tower(load_image_encoder(open_checkpoint(folder, image_encoder=tower_pickle)))


@pytest.mark.parametrize(
    "leftovers",
    [{5: 5}, {7: torch.zeros(2)}, {"sparse": torch.zeros(3, 3).to_sparse()}, {"meta": torch.zeros(3, device="meta")},
     {"positions": torch.arange(9).expand(50, 9)}],
    ids=str,
)  # fmt: skip
def test_odd_leftovers_in_a_pickle_are_passed_over(folder: Path, tower_pickle: Path, leftovers: dict) -> None:
    torch.save({**torch.load(tower_pickle, weights_only=True), **leftovers}, tower_pickle)
    assert_is_the_tiny_tower(load_image_encoder(open_checkpoint(folder, image_encoder=tower_pickle)))
    convert_pickle(tower_pickle, folder / "converted.safetensors")


def test_a_few_bytes_that_pretend_to_be_gigabytes_are_refused(tower_pickle: Path, tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1).expand(2**30)}, tower_pickle)
    with pytest.raises(WrongCheckpointError, match="holds only 4 of them"):
        convert_pickle(tower_pickle, tmp_path / "converted.safetensors")
    assert not list(tmp_path.glob("*.safetensors*"))


def test_a_converted_pickle_gives_the_same_network(folder: Path, tower_pickle: Path, tmp_path: Path) -> None:
    written = convert_pickle(tower_pickle, tmp_path / "converted")
    assert written == tmp_path / "converted" / "model.safetensors"
    assert_is_the_tiny_tower(load_image_encoder(open_checkpoint(folder, image_encoder=written)))
    half = convert_pickle(tower_pickle, tmp_path / "half.safetensors", torch.float16)
    assert {tensor.dtype for tensor in load_file(str(half)).values()} == {torch.float16}


def test_a_pickle_with_code_is_refused_and_not_run(folder: Path, tower_pickle: Path, tmp_path: Path) -> None:
    mark = tmp_path / "ran"

    class Harmful:
        def __reduce__(self) -> tuple[object, ...]:
            return Path.touch, (mark,)

    torch.save({"cls_token": Harmful()}, tower_pickle)
    for attempt in (
        lambda: load_image_encoder(open_checkpoint(folder, image_encoder=tower_pickle)),
        lambda: convert_pickle(tower_pickle, tmp_path / "out.safetensors"),
    ):
        with pytest.raises(
            WrongCheckpointError, match="(?s)pytorch_model.bin.*Python code besides.*Do not use this file"
        ):
            attempt()
    tower_pickle.write_bytes(pickle.dumps(Harmful()))
    with pytest.raises(WrongCheckpointError, match="(?s)pytorch_model.bin.*Python code besides"):
        load_image_encoder(open_checkpoint(folder, image_encoder=tower_pickle))
    assert not mark.exists()


@pytest.mark.parametrize(
    ("version", "opens"), [("1.13.1", False), ("2.5.1+cu124", False), ("2.6.0+cpu", True), ("2.10.0a0", True)]
)
def test_a_pickle_is_opened_by_a_pytorch_that_keeps_it_from_running_code(
    folder: Path,
    tower_pickle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    version: str,
    opens: bool,
) -> None:
    monkeypatch.setattr(torch, "__version__", version)
    if opens:
        assert_is_the_tiny_tower(load_image_encoder(open_checkpoint(folder, image_encoder=tower_pickle)))
        return
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("opened"))
    message = f"(?s)pytorch_model.bin.*{re.escape(version)}.*Update PyTorch to 2.6.*safetensors file.*blip3o convert"
    for attempt in (
        lambda: load_image_encoder(open_checkpoint(folder, image_encoder=tower_pickle)),
        lambda: convert_pickle(tower_pickle, tmp_path / "out.safetensors"),
    ):
        with pytest.raises(WrongCheckpointError, match=message):
            attempt()


@pytest.mark.parametrize(
    ("content", "fragment"),
    [
        (LFS_POINTER, "Git LFS pointer"),
        (b"<html>Not found</html>", "no PyTorch file"),
        (b"", "cut short or no PyTorch file"),
        (None, "cut short or no PyTorch file"),
    ],
)
def test_a_damaged_pickle_is_named(
    folder: Path, tower_pickle: Path, content: bytes | None, fragment: str
) -> None:
    if content is None:
        cut(tower_pickle)
    else:
        tower_pickle.write_bytes(content)
    with pytest.raises(WrongCheckpointError, match=f"(?s)pytorch_model.bin.*{fragment}"):
        load_image_encoder(open_checkpoint(folder, image_encoder=tower_pickle))


def test_a_pickle_of_something_else_is_refused(folder: Path, tower_pickle: Path) -> None:
    torch.save({"epoch": 3, "model": "a"}, tower_pickle)
    with pytest.raises(WrongCheckpointError, match="not a table of tensors"):
        load_image_encoder(open_checkpoint(folder, image_encoder=tower_pickle))
    torch.save({"unrelated": torch.zeros(2)}, tower_pickle)
    with pytest.raises(WrongCheckpointError, match="cls_token"):
        load_image_encoder(open_checkpoint(folder, image_encoder=tower_pickle))


def test_a_given_image_encoder_that_is_not_there_is_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(MissingFilesError, match="nowhere"):
        load_image_encoder(open_checkpoint(folder, image_encoder=tmp_path / "nowhere"))


def test_a_checkpoint_without_image_encoder_says_where_to_put_it(folder: Path) -> None:
    drop_tower(folder)
    with pytest.raises(MissingFilesError, match="(?s)without the EVA-CLIP.*eva_clip_vision_tower"):
        load_image_encoder(open_checkpoint(folder))


# Messages


def lacks_the_folder(folder: Path) -> None:
    shutil.rmtree(folder)


def is_the_parent_folder(folder: Path) -> None:
    for child in list(folder.iterdir()):
        target = folder / "BLIP3o-Model-8B" / child.name
        target.parent.mkdir(exist_ok=True)
        child.rename(target)


def is_the_decoder_folder(folder: Path) -> None:
    for child in [child for child in folder.iterdir() if child.name != "diffusion-decoder"]:
        child.unlink()
    for child in list((folder / "diffusion-decoder").iterdir()):
        if child.is_dir():
            child.rename(folder / child.name)


def is_sdxl(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "model_index.json").write_text('{"_class_name": "StableDiffusionXLPipeline"}', "utf-8")


def is_plain_qwen(folder: Path) -> None:
    change_weights(folder, no_dit)
    change_config(folder, model_type="qwen2_5_vl", architectures=["Qwen2_5_VLForConditionalGeneration"])


def is_next_by_type(folder: Path) -> None:
    change_config(folder, model_type="blip3o_qwen3", architectures=["blip3oQwen3ForCausalLM"])


def is_next_by_text_type(folder: Path) -> None:
    change_config(folder, text_config={"model_type": "qwen3"})


def is_next_by_tensors(folder: Path) -> None:
    def swap(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.self_attn.q_norm.weight"] = torch.ones(8)

    change_weights(folder, swap)


def is_another_model(folder: Path) -> None:
    change_weights(folder, no_dit)
    change_config(folder, model_type="llama")


def lacks_the_shard(folder: Path) -> None:
    (folder / SHARD).unlink()


def lacks_all_weights(folder: Path) -> None:
    (folder / SHARD).unlink()
    (folder / INDEX).unlink()


def lacks_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def has_damaged_config(folder: Path) -> None:
    cut(folder / "config.json")


def has_a_list_as_config(folder: Path) -> None:
    (folder / "config.json").write_text("[1, 2]", "utf-8")


def has_damaged_index(folder: Path) -> None:
    cut(folder / INDEX)


def has_an_empty_index(folder: Path) -> None:
    (folder / INDEX).write_text("{}", "utf-8")


def is_cut_short(folder: Path) -> None:
    cut(folder / SHARD)


def is_cut_in_the_header(folder: Path) -> None:
    (folder / SHARD).write_bytes((folder / SHARD).read_bytes()[:40])


def is_too_long(folder: Path) -> None:
    with (folder / SHARD).open("ab") as file:
        file.write(b"\0" * 16)


def is_an_lfs_pointer(folder: Path) -> None:
    (folder / SHARD).write_bytes(LFS_POINTER)


def is_a_web_page(folder: Path) -> None:
    (folder / SHARD).write_bytes(b"<!doctype html><html>Please log in</html>" * 10)


def is_empty(folder: Path) -> None:
    (folder / SHARD).write_bytes(b"")


def has_a_list_as_header(folder: Path) -> None:
    (folder / SHARD).write_bytes(struct.pack("<Q", 6) + b"[1, 2]")


def has_odd_header_entries(folder: Path) -> None:
    header = json.dumps({"a": {"shape": [1]}}).encode()
    (folder / SHARD).write_bytes(struct.pack("<Q", len(header)) + header)


@pytest.mark.parametrize(
    ("damage", "error", "fragment"),
    [
        (lacks_the_folder, MissingFilesError, "no checkpoint folder .*MyCheckpoint.*blip3o download 8b"),
        (is_the_parent_folder, MissingFilesError, "holds BLIP3o-Model-8B.*Name one of these"),
        (is_the_decoder_folder, MissingFilesError, "only the decoder.*folder above"),
        (is_sdxl, WrongCheckpointError, "StableDiffusionXLPipeline.*SDXL.*cannot be used"),
        (is_plain_qwen, WrongCheckpointError, "plain Qwen model.*blip3o download"),
        (is_next_by_type, WrongCheckpointError, "BLIP3o-NEXT.*BLIP3o-Model-8B"),
        (is_next_by_text_type, WrongCheckpointError, "BLIP3o-NEXT"),
        (is_next_by_tensors, WrongCheckpointError, "BLIP3o-NEXT.*q_norm"),
        (is_another_model, WrongCheckpointError, '"llama".*blip3o_qwen'),
        (lacks_all_weights, MissingFilesError, "no weight file.*Run the download again"),
        (lacks_config, MissingFilesError, "no config.json.*blip3o download"),
        (has_damaged_config, WrongCheckpointError, '"config.json" in .*MyCheckpoint.*download it again'),
        (has_a_list_as_config, WrongCheckpointError, "config.json.*no JSON object"),
        (has_damaged_index, WrongCheckpointError, f"{INDEX}.*download it again"),
        (has_an_empty_index, WrongCheckpointError, f"{INDEX}.*lists no weights"),
        (is_cut_short, WrongCheckpointError, f"{SHARD}.*cut short.*Run the download again"),
        (is_cut_in_the_header, WrongCheckpointError, f"{SHARD}.*cut short"),
        (is_too_long, WrongCheckpointError, f"{SHARD}.*16 bytes more.*download it again"),
        (is_an_lfs_pointer, WrongCheckpointError, f"{SHARD}.*Git LFS pointer.*git lfs pull"),
        (is_a_web_page, WrongCheckpointError, f"{SHARD}.*not a readable safetensors.*download it again"),
        (is_empty, WrongCheckpointError, f"{SHARD}.*not a readable safetensors"),
        (has_a_list_as_header, WrongCheckpointError, f"{SHARD}.*not a readable safetensors"),
        (has_odd_header_entries, WrongCheckpointError, f"{SHARD}.*not a readable safetensors"),
    ],
)
def test_opening_says_what_is_wrong(
    folder: Path, damage: Callable[[Path], None], error: type[Blip3oError], fragment: str
) -> None:
    damage(folder)
    with pytest.raises(error, match=f"(?s){fragment}"):
        open_checkpoint(folder)


def test_missing_shards_are_named_when_their_component_is_wanted(folder: Path) -> None:
    lacks_the_shard(folder)
    files = open_checkpoint(folder)
    for component in ("backbone", "dit", "image_encoder"):
        with pytest.raises(MissingFilesError, match=f"(?s)not complete: 1 of 1.*{SHARD}.*Download"):
            LOADERS[component](files)
    load_decoder(files)


def unknown_key(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.mm_projector.weight"] = torch.zeros(2, 2)


def unknown_dit_key(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.dit.model.layers.0.extra.weight"] = torch.zeros(2, 2)


def missing_key(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["model.dit.model.layers.1.attn2.to_q.weight"]


def missing_size_key(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["model.dit.model.layers.0.gate"]


def wrong_shape(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.dit.model.norm_out.linear_1.weight"] = torch.zeros(5, 24)


def impossible_sizes(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.dit.model.layers.0.gate"] = torch.zeros(3)


def no_heads(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.dit.model.layers.0.gate"] = torch.zeros(0)


def other_outputs(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.dit.model.norm_out.linear_2.weight"] = torch.zeros(8, 32)


def no_dit(tensors: dict[str, torch.Tensor]) -> None:
    for key in [key for key in tensors if key.startswith("model.dit.")]:
        del tensors[key]


@pytest.mark.parametrize(
    ("change", "fragment"),
    [
        (missing_key, "lacks .*layers.1.attn2.to_q.weight.*Download the checkpoint again"),
        (missing_size_key, "damaged.*layers.0.gate.*download them again"),
        (wrong_shape, f"norm_out.linear_1.weight.*wrong size in {SHARD}.*\\(5, 24\\), expected \\(32, 24\\)"),
        (impossible_sizes, "impossible sizes"),
        (no_heads, "impossible sizes"),
        (other_outputs, "reads 16 channels but writes 8"),
        (no_dit, "has no image feature generator.*blip3o download"),
    ],
)
def test_loading_the_dit_says_what_is_wrong(
    folder: Path, change: Callable[[dict[str, torch.Tensor]], None], fragment: str
) -> None:
    change_weights(folder, change)
    with pytest.raises(WrongCheckpointError, match=f"(?s){fragment}"):
        load_dit(open_checkpoint(folder))


def test_a_backbone_without_latent_queries_is_a_plain_model(folder: Path) -> None:
    def drop(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["model.latent_queries"]

    change_weights(folder, drop)
    with pytest.raises(WrongCheckpointError, match="(?s)no latent_queries.*plain language model"):
        load_backbone(open_checkpoint(folder))


def test_a_tower_that_config_json_does_not_describe_is_explained(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text("utf-8"))
    del config["gen_vision_config"]
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    with pytest.raises(WrongCheckpointError, match="(?s)do not fit together.*gen_vision_config"):
        load_image_encoder(open_checkpoint(folder))


def test_a_tower_without_blocks_is_damaged(folder: Path) -> None:
    def drop(tensors: dict[str, torch.Tensor]) -> None:
        for key in [key for key in tensors if key.startswith(TOWER + "blocks.")]:
            del tensors[key]

    change_weights(folder, drop)
    with pytest.raises(WrongCheckpointError, match="(?s)damaged.*blocks"):
        load_image_encoder(open_checkpoint(folder))


@pytest.mark.parametrize(
    ("path", "fragment"),
    [
        ("unet/config.json", '"config.json" is missing'),
        ("scheduler/scheduler_config.json", '"scheduler_config.json" is missing'),
        ("vae/diffusion_pytorch_model.safetensors", "no decoder vae"),
    ],
)
def test_an_incomplete_decoder_says_which_file_is_missing(folder: Path, path: str, fragment: str) -> None:
    (folder / "diffusion-decoder" / path).unlink()
    with pytest.raises(MissingFilesError, match=f"(?s){fragment}.*Download the folder"):
        load_decoder(open_checkpoint(folder))


def test_a_tensor_format_that_cannot_be_read_is_named(folder: Path) -> None:
    header = json.dumps({"a": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}).encode()
    (folder / SHARD).write_bytes(struct.pack("<Q", len(header)) + header + b"\0")
    with pytest.raises(WrongCheckpointError, match="F4"):
        read_header(folder / SHARD)[0]["a"].require_readable()


def test_offsets_that_contradict_the_shapes_are_damage_not_a_traceback(folder: Path) -> None:
    raw = (folder / SHARD).read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + length])
    first, second = [key for key in header if key != "__metadata__"][:2]
    header[first]["data_offsets"], header[second]["data_offsets"] = (
        header[second]["data_offsets"],
        header[first]["data_offsets"],
    )
    packed = json.dumps(header).encode()
    (folder / SHARD).write_bytes(struct.pack("<Q", len(packed)) + packed + raw[8 + length :])
    files = open_checkpoint(folder)
    with pytest.raises(WrongCheckpointError, match=SHARD):
        for load in (load_dit, load_backbone, load_image_encoder):
            load(files)


@pytest.mark.parametrize("model_type", ["blip3o_qwen", "blip3o_qwen_inference"])
def test_both_published_model_types_open(folder: Path, model_type: str) -> None:
    change_config(folder, model_type=model_type)
    assert is_checkpoint_folder(folder)
    assert open_checkpoint(folder).has_component("dit")


def test_a_cheap_look_at_a_folder_never_raises(folder: Path, tmp_path: Path) -> None:
    assert is_checkpoint_folder(folder)
    assert not is_checkpoint_folder(tmp_path / "nowhere")
    has_a_list_as_config(folder)
    assert not is_checkpoint_folder(folder)
    has_damaged_config(folder)
    assert not is_checkpoint_folder(folder)


# Writing


def test_a_failed_write_leaves_the_old_file_and_no_rest(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    write_safetensors({"a": torch.ones(3)}, path)

    def half(key: str) -> Iterator[torch.Tensor]:
        yield torch.zeros(2)
        raise OSError("No space left on device")

    with pytest.raises(OSError, match="No space"):
        stream_safetensors({"a": TensorShape(torch.float32, (3,))}, half, path)
    assert [child.name for child in tmp_path.iterdir()] == ["weights.safetensors"]
    assert torch.equal(load_file(str(path))["a"], torch.ones(3))


def test_what_is_written_is_what_the_safetensors_library_reads(tmp_path: Path) -> None:
    shared = torch.randn(6)
    tensors = {
        'name with ü and "quotes"': torch.randn(4, 3).bfloat16(),
        "not contiguous": torch.randn(4, 5).t(),
        "every second": torch.arange(10)[::2],
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "empty": torch.zeros(0, 3),
        "flags": torch.tensor([True, False, True]),
        "bytes": torch.arange(3, dtype=torch.uint8),
        "eight bits": torch.randn(5).to(torch.float8_e4m3fn),
        "trained": torch.nn.Parameter(shared),
        "of the same memory": shared[:2],
    }
    path = tmp_path / "all.safetensors"
    write_safetensors(tensors, path, {"made by": "ü"})
    read = load_file(str(path))
    assert read.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert read[key].dtype == tensor.dtype and read[key].shape == tensor.shape
        assert torch.equal(read[key].float(), tensor.detach().float()), key
    with safe_open(str(path), "pt") as file:
        assert file.metadata() == {"format": "pt", "made by": "ü"}
    write_safetensors(tensors, path, dtype=torch.float16)
    read = load_file(str(path))
    assert torch.equal(read["trained"], shared.half()) and read["every second"].dtype == torch.int64


def test_a_tensor_is_written_in_pieces_that_join_without_a_seam(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(safetensor_files, "PIECE_BYTES", 64)
    long = torch.randn(7, 31)
    assert max(piece.numel() for piece in safetensor_files.pieces_of(long, torch.float16)) == 16
    write_safetensors({"long": long}, tmp_path / "long.safetensors", dtype=torch.float16)
    assert torch.equal(load_file(str(tmp_path / "long.safetensors"))["long"], long.half())


def test_numbers_that_no_such_file_holds_are_named(tmp_path: Path) -> None:
    with pytest.raises(WrongCheckpointError, match='"wave".*complex64'):
        write_safetensors({"wave": torch.zeros(2, dtype=torch.complex64)}, tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())


def test_config_json_is_never_half_written(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (folder / "config.json").read_bytes()
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("cut")))
    with pytest.raises(OSError, match="cut"):
        save.write_json(folder / "config.json", {"new": True})
    assert (folder / "config.json").read_bytes() == before


def test_writing_into_the_folder_one_reads_from_works(folder: Path) -> None:
    files = open_checkpoint(folder)
    dit = load_dit(files)
    before = {key: tensor.clone() for key, tensor in state(dit).items()}
    save.save_checkpoint(
        folder, files.config, dit=dit, backbone=load_backbone(files), dtype=None, tokenizer_from=folder
    )
    assert all(torch.equal(tensor, before[key]) for key, tensor in state(dit).items())
    assert all(
        torch.equal(tensor, before[key]) for key, tensor in state(load_dit(open_checkpoint(folder))).items()
    )


def test_a_decoder_saved_again_in_another_dtype_replaces_the_first(tmp_path: Path) -> None:
    target = tmp_path / "twice"
    tiny_models.write_checkpoint(target, dtype=torch.bfloat16)
    tiny_models.write_checkpoint(target, dtype=torch.float32)
    decoder = load_decoder(open_checkpoint(target))
    assert decoder.unet.dtype == torch.float32
    assert len(list((target / "diffusion-decoder" / "unet").glob("*.safetensors"))) == 1
    tiny_models.write_checkpoint(target, dtype=torch.bfloat16)
    assert load_decoder(open_checkpoint(target)).unet.dtype == torch.bfloat16


def test_a_converted_folder_holds_the_rounded_tensors(tiny_folder: Path, tmp_path: Path) -> None:
    written = convert_folder(open_checkpoint(tiny_folder), tmp_path / "half", torch.bfloat16)
    assert (written / "tokenizer.json").is_file()
    files = open_checkpoint(written)
    for name, load in LOADERS.items():
        source, target = state(load(open_checkpoint(tiny_folder))), state(load(files))
        for key, tensor in source.items():
            assert target[key].dtype == torch.bfloat16
            assert torch.equal(target[key], tensor.bfloat16()), f"{name} {key}"


def test_converting_puts_a_separate_image_encoder_inside(
    folder: Path, tower_pickle: Path, tmp_path: Path
) -> None:
    drop_tower(folder)
    written = convert_folder(
        open_checkpoint(folder, image_encoder=tower_pickle), tmp_path / "whole", torch.float32
    )
    tower_pickle.unlink()
    assert_is_the_tiny_tower(load_image_encoder(open_checkpoint(written)))


def test_a_folder_is_not_converted_onto_itself(folder: Path) -> None:
    with pytest.raises(BadInputError, match="same folder"):
        convert_folder(open_checkpoint(folder), folder / "." / "", torch.bfloat16)


def test_the_header_tells_shapes_and_bytes(tiny_folder: Path) -> None:
    tensors, metadata = read_header(tiny_folder / SHARD)
    stored = load_file(str(tiny_folder / SHARD))
    assert {key: (info.shape, info.dtype, info.nbytes) for key, info in tensors.items()} == {
        key: (tuple(tensor.shape), tensor.dtype, tensor.nbytes) for key, tensor in stored.items()
    }
    assert metadata["format"] == "pt"


# Description


def test_the_description_counts_parameters_and_bytes(tiny_folder: Path) -> None:
    described = describe_checkpoint(open_checkpoint(tiny_folder))
    for name, build in (
        ("backbone", tiny_models.build_backbone),
        ("dit", tiny_models.build_dit),
        ("image_encoder", tiny_models.build_image_encoder),
        ("decoder", tiny_models.build_decoder),
    ):
        count = sum(parameter.numel() for parameter in build().parameters())
        info = described["components"][name]
        assert (info["parameters"], info["bytes"], info["dtypes"]) == (count, 4 * count, ["float32"])
    assert described["components"]["dit"]["sizes"] == asdict(tiny_models.DEFAULT.dit)
    assert described["total_bytes"] == sum(info["bytes"] for info in described["components"].values())
    assert described["memory"]["draw"]["cards"]["8 GB"] == "fits"
    assert json.loads(json.dumps(described)) == described


def test_the_description_counts_an_image_encoder_beside_the_checkpoint(
    folder: Path, tower_pickle: Path
) -> None:
    drop_tower(folder)
    described = describe_checkpoint(open_checkpoint(folder))
    info = described["components"]["image_encoder"]
    tensors = torch.load(tower_pickle, weights_only=True)
    assert (info["problem"], info["bytes"]) == (None, sum(each.nbytes for each in tensors.values()))
    assert info["sizes"]["file"] == "pytorch_model.bin"
    assert described["memory"]["vary"]["available"]


def test_the_description_says_what_cannot_be_used(folder: Path) -> None:
    drop_tower(folder)
    shutil.rmtree(folder / "diffusion-decoder")
    described = describe_checkpoint(open_checkpoint(folder))
    assert "decoder" in described["components"]["decoder"]["problem"]
    assert "EVA-CLIP" in described["components"]["image_encoder"]["problem"]
    assert described["memory"]["draw"] == {"available": False}
    assert described["memory"]["answer"]["available"]
