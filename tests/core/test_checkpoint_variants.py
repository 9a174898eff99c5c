"""One checkpoint as different savers write it: whatever lies around the weights, it draws, answers and encodes the same."""

import json
import logging
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from comfyui_blip3o.blip3o_core.checkpoints import match
from comfyui_blip3o.blip3o_core.checkpoints.info import describe_checkpoint
from comfyui_blip3o.blip3o_core.checkpoints.layout import is_checkpoint_folder, open_checkpoint
from comfyui_blip3o.blip3o_core.drawing.sampling import FeatureSettings
from comfyui_blip3o.blip3o_core.errors import Blip3oError, MissingFilesError, WrongCheckpointError
from comfyui_blip3o.blip3o_core.language.answers import AnswerSettings
from comfyui_blip3o.blip3o_core.pipeline import Blip3oPipeline, load_pipeline
from safetensors.torch import load, load_file, save_file
from torch import Tensor

INDEX = "model.safetensors.index.json"
SHARD = "model-00001-of-00001.safetensors"
TOWER = "model.gen_vision_tower.vision_tower.model."
DIT = "model.dit.model."
PICTURE = tiny_models.picture(80, 60, seed=1)
Tensors = dict[str, Tensor]


@dataclass
class Variant:
    """A copy of the plain checkpoint and how it is opened."""

    folder: Path
    options: dict[str, Any]

    def read(self) -> Tensors:
        # Not mapped: write() goes over the same file.
        return load((self.folder / SHARD).read_bytes())

    def write(self, tensors: Tensors, *, index: bool = True) -> None:
        save_file(tensors, str(self.folder / SHARD))
        (self.folder / INDEX).unlink(missing_ok=True)
        if index:
            self.promise(dict.fromkeys(tensors, SHARD))

    def promise(self, weight_map: dict[str, str]) -> None:
        (self.folder / INDEX).write_text(json.dumps({"weight_map": weight_map}), "utf-8")

    def add(self, **tensors: Tensor) -> None:
        self.write({**self.read(), **tensors})

    def rename(self, new_name: Callable[[str], str]) -> None:
        self.write({new_name(key): tensor for key, tensor in self.read().items()})

    def drop(self, *beginnings: str) -> None:
        self.write({key: tensor for key, tensor in self.read().items() if not key.startswith(beginnings)})

    def configure(self, *removed: str, **fields: Any) -> None:
        config = json.loads((self.folder / "config.json").read_text("utf-8")) | fields
        config = {key: value for key, value in config.items() if key not in removed}
        (self.folder / "config.json").write_text(json.dumps(config), "utf-8")

    def take_tower(self) -> Tensors:
        """Take EVA-CLIP out of the shard; its tensors by their keys in the network."""
        tensors = self.read()
        self.write({key: tensor for key, tensor in tensors.items() if not key.startswith(TOWER)})
        return {key.removeprefix(TOWER): tensor for key, tensor in tensors.items() if key.startswith(TOWER)}

    def save_tower(self, tensors: Any, name: str = "pytorch_model.bin") -> None:
        folder = self.folder / "eva_clip_vision_tower"
        folder.mkdir()
        if name.endswith(".bin"):
            torch.save(tensors, folder / name)
        else:
            save_file(tensors, str(folder / name))

    def decoder_file(self, network: str, variant: str = ".bf16") -> Path:
        return self.folder / "diffusion-decoder" / network / f"diffusion_pytorch_model{variant}.safetensors"


def flux_vae(variant: Variant) -> None:
    kernel = torch.randn(8, 16, 3, 3, dtype=torch.bfloat16)
    variant.add(
        **{f"model.vae.{part}.conv_in.weight": kernel.clone() for part in ("encoder", "decoder")},
    )


def llava_projector(variant: Variant) -> None:
    variant.add(
        **{"model.mm_projector.0.weight": torch.ones(4, 4), "model.mm_projector.0.bias": torch.ones(4)}
    )


def generation_projectors(variant: Variant) -> None:
    variant.add(
        **{"model.gen_projector.weight": torch.ones(4, 4), "model.down_projector.weight": torch.ones(4, 4)},
    )


def image_newline(variant: Variant) -> None:
    variant.add(**{"model.image_newline": torch.ones(32)})


def rotary_tables(variant: Variant) -> None:
    variant.add(
        **{
            "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
            "visual.rotary_pos_emb.inv_freq": torch.ones(4),
            DIT + "freqs_cis": torch.ones(4),
        },
    )


def unknown_tensors(variant: Variant) -> None:
    variant.add(**{"ema.step": torch.ones(1), "model.reward_head.weight": torch.ones(2, 2)})


def unknown_tensors_in_the_networks(variant: Variant) -> None:
    variant.add(
        **{
            "model.layers.0.self_attn.q_scale": torch.ones(1),
            "visual.deepstack.weight": torch.ones(2, 2),
            DIT + "extra.weight": torch.ones(2),
        },
    )


def leftover_of_an_odd_format(variant: Variant) -> None:
    """A tensor of a number format that torch does not have: nobody needs to read it."""
    variant.add(**{"model.vae.odd": torch.zeros(8, dtype=torch.uint8)})
    content = (variant.folder / SHARD).read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    header["model.vae.odd"] |= {"dtype": "F4", "shape": [16]}
    packed = json.dumps(header).encode()
    (variant.folder / SHARD).write_bytes(len(packed).to_bytes(8, "little") + packed + content[end:])


def clip_norm_and_head(variant: Variant) -> None:
    variant.add(
        **{TOWER + "norm.weight": torch.ones(16), TOWER + "head.weight": torch.ones(8, 16)},
        **{"model.gen_vision_tower.vision_tower.text.logit_scale": torch.ones(1)},
    )


def no_index(variant: Variant) -> None:
    (variant.folder / INDEX).unlink()


def single_file(variant: Variant) -> None:
    (variant.folder / INDEX).unlink()
    (variant.folder / SHARD).rename(variant.folder / "model.safetensors")
    save_file({"foreign.weight": torch.ones(2)}, str(variant.folder / "adapter.safetensors"))


def many_shards(variant: Variant) -> None:
    split(variant)


def many_shards_without_index(variant: Variant) -> None:
    split(variant)
    (variant.folder / INDEX).unlink()


def index_with_a_missing_shard_of_leftovers(variant: Variant) -> None:
    names = dict.fromkeys(variant.read(), SHARD)
    variant.promise({**names, "model.vae.decoder.conv_in.weight": "model-00002-of-00002.safetensors"})


def index_that_promises_too_much(variant: Variant) -> None:
    variant.promise({**dict.fromkeys(variant.read(), SHARD), "model.mm_projector.weight": SHARD})


def index_that_lists_too_little(variant: Variant) -> None:
    variant.promise({"model.norm.weight": SHARD})


def names_of_later_transformers(variant: Variant) -> None:
    variant.rename(nested)


def everything_nested(variant: Variant) -> None:
    """As if the whole wrapper sat inside the language model."""
    parts = ("model.dit.", "model.latent_queries", "model.gen_vision_tower.")
    variant.rename(
        lambda key: "model.language_model." + key[len("model.") :] if key.startswith(parts) else nested(key)
    )


def deepspeed_wrapper(variant: Variant) -> None:
    variant.rename(lambda key: "module." + key)


def compiled_wrapper(variant: Variant) -> None:
    variant.rename(lambda key: key.replace("model.layers.", "model._orig_mod.layers."))


def peft_wrapper(variant: Variant) -> None:
    variant.rename(lambda key: "base_model.model." + re.sub(r"(q_proj)\.", r"\1.base_layer.", key))


def tower_without_inner_wrapper(variant: Variant) -> None:
    variant.rename(lambda key: key.replace("vision_tower.model.", "vision_tower.visual."))


def tower_pickle(variant: Variant) -> None:
    variant.save_tower(variant.take_tower())


def tower_pickle_of_a_whole_clip(variant: Variant) -> None:
    tower = {f"visual.{key}": tensor for key, tensor in variant.take_tower().items()}
    extras = {
        "text.transformer.weight": torch.ones(2),
        "logit_scale": torch.ones(1),
        "visual.norm.bias": torch.ones(16),
    }
    variant.save_tower(tower | extras)


def tower_pickle_of_a_trainer(variant: Variant) -> None:
    tower = {f"module.{key}": tensor for key, tensor in variant.take_tower().items()}
    variant.save_tower({"epoch": 3, "state_dict": tower})


def tower_as_safetensors(variant: Variant) -> None:
    tower = {f"vision_tower.model.{key}": tensor for key, tensor in variant.take_tower().items()}
    variant.save_tower(tower | {"vision_tower.model.head.weight": torch.ones(4, 16)}, "model.safetensors")


def tower_elsewhere(variant: Variant) -> None:
    variant.save_tower(variant.take_tower())
    elsewhere = variant.folder.parent / "towers"
    (variant.folder / "eva_clip_vision_tower").rename(elsewhere)
    variant.options["image_encoder_path"] = elsewhere


def decoder_without_variant(variant: Variant) -> None:
    for network in ("unet", "vae"):
        variant.decoder_file(network).rename(variant.decoder_file(network, ""))


def decoder_named_fp16(variant: Variant) -> None:
    for network in ("unet", "vae"):
        variant.decoder_file(network).rename(variant.decoder_file(network, ".fp16"))


def decoder_in_parts(variant: Variant) -> None:
    """As diffusers splits a UNet in fp32, which is above 10 GB."""
    path = variant.decoder_file("unet")
    tensors = load_file(str(path))
    path.unlink()
    names = {
        key: f"diffusion_pytorch_model-0000{1 + (i % 2)}-of-00002.safetensors"
        for i, key in enumerate(tensors)
    }
    for name in set(names.values()):
        save_file({key: tensors[key] for key in tensors if names[key] == name}, str(path.with_name(name)))
    index = path.with_name("diffusion_pytorch_model.safetensors.index.json")
    index.write_text(json.dumps({"weight_map": names}), "utf-8")


def decoder_with_more_inside(variant: Variant) -> None:
    path = variant.decoder_file("vae")
    save_file(load_file(str(path)) | {"loss.logvar": torch.ones(1)}, str(path))


def decoder_beside_the_folder(variant: Variant) -> None:
    (variant.folder / "diffusion-decoder").rename(variant.folder.parent / "diffusion-decoder")


def decoder_named(variant: Variant) -> None:
    (variant.folder / "diffusion-decoder").rename(variant.folder.parent / "painter")
    variant.options["decoder_path"] = variant.folder.parent / "painter"


def decoder_of_another_checkpoint(variant: Variant) -> None:
    other = variant.folder.parent / "Other"
    other.mkdir()
    (variant.folder / "diffusion-decoder").rename(other / "diffusion-decoder")
    variant.options["decoder_path"] = other


def no_model_type(variant: Variant) -> None:
    variant.configure("model_type")


def model_type_of_the_base_model(variant: Variant) -> None:
    variant.configure(model_type="qwen2_5_vl", architectures=["Qwen2_5_VLForConditionalGeneration"])


def nested_text_config(variant: Variant) -> None:
    config = json.loads((variant.folder / "config.json").read_text("utf-8"))
    inner = {
        key: value
        for key, value in config.items()
        if key not in ("vision_config", "model_type", "gen_vision_config")
    }
    variant.configure(*[key for key in inner if not key.startswith("gen_")], text_config=inner)


def more_in_the_config(variant: Variant) -> None:
    variant.configure(mm_use_im_start_end=False, tune_mm_mlp_adapter=True, transformers_version="4.51.3")


def files_of_a_trainer(variant: Variant) -> None:
    for name in (
        "training_args.bin",
        "gen_projector.bin",
        "mm_projector.bin",
        "rng_state.pth",
        "trainer_state.json",
    ):
        (variant.folder / name).write_bytes(b"not read")


def float32(variant: Variant) -> None:
    variant.write({key: tensor.float() for key, tensor in variant.read().items()})


def float64(variant: Variant) -> None:
    variant.write({key: tensor.double() for key, tensor in variant.read().items()})


def mixed_formats(variant: Variant) -> None:
    variant.write(
        {key: tensor.float() if "norm" in key else tensor for key, tensor in variant.read().items()}
    )


VARIANTS = [
    flux_vae, llava_projector, generation_projectors, image_newline, rotary_tables, unknown_tensors,
    unknown_tensors_in_the_networks, leftover_of_an_odd_format, clip_norm_and_head, no_index, single_file, many_shards,
    many_shards_without_index, index_with_a_missing_shard_of_leftovers, index_that_promises_too_much,
    index_that_lists_too_little, names_of_later_transformers, everything_nested, deepspeed_wrapper, compiled_wrapper,
    peft_wrapper, tower_without_inner_wrapper, tower_pickle, tower_pickle_of_a_whole_clip, tower_pickle_of_a_trainer,
    tower_as_safetensors, tower_elsewhere, decoder_without_variant, decoder_named_fp16, decoder_in_parts,
    decoder_with_more_inside, decoder_beside_the_folder, decoder_named, decoder_of_another_checkpoint, no_model_type,
    model_type_of_the_base_model, nested_text_config, more_in_the_config, files_of_a_trainer, float32, float64,
    mixed_formats,
]  # fmt: skip


def nested(key: str) -> str:
    for old, new in (("visual.", "model.visual."), ("model.layers.", "model.language_model.layers."),
                     ("model.norm.", "model.language_model.norm."), ("model.embed_tokens.", "model.language_model.embed_tokens.")):  # fmt: skip
        if key.startswith(old):
            return new + key[len(old) :]
    return key


def split(variant: Variant) -> None:
    tensors = variant.read()
    (variant.folder / SHARD).unlink()
    names = {key: f"model-0000{1 + (i % 3)}-of-00003.safetensors" for i, key in enumerate(sorted(tensors))}
    for name in set(names.values()):
        save_file({key: tensors[key] for key in tensors if names[key] == name}, str(variant.folder / name))
    variant.promise(names)


@pytest.fixture(scope="module")
def plain_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.write_checkpoint(tmp_path_factory.mktemp("plain") / "Plain", dtype=torch.bfloat16)


@pytest.fixture
def variant(plain_folder: Path, tmp_path: Path) -> Variant:
    return Variant(Path(shutil.copytree(plain_folder, tmp_path / "MyCheckpoint")), {})


@pytest.fixture(scope="module")
def plain(plain_folder: Path) -> dict[str, Any]:
    return use(load_pipeline(plain_folder, dtype="fp32", device="cpu"))


def use(pipeline: Blip3oPipeline) -> dict[str, Any]:
    """Draw, ask and encode."""
    drawn = pipeline.generate("a cute cat", preset="fast", features=FeatureSettings(steps=3))
    answers = pipeline.ask("What is this ?", [[PICTURE]], settings=AnswerSettings(max_new_tokens=5))
    return {"pixels": drawn.images, "answer": answers, "features": pipeline.encode_images([PICTURE])}


def test_the_table_has_enough_rows() -> None:
    assert len(VARIANTS) >= 25


@pytest.mark.parametrize("change", VARIANTS, ids=lambda change: change.__name__)
def test_a_checkpoint_works_as_the_wild_writes_it(
    plain: dict[str, Any], variant: Variant, change: Callable[[Variant], None]
) -> None:
    change(variant)
    assert is_checkpoint_folder(variant.folder) or change is model_type_of_the_base_model
    found = use(load_pipeline(variant.folder, dtype="fp32", device="cpu", **variant.options))
    assert found["answer"] == plain["answer"]
    assert torch.equal(found["pixels"], plain["pixels"])
    assert torch.equal(found["features"], plain["features"])


@pytest.mark.parametrize("change", VARIANTS, ids=lambda change: change.__name__)
def test_the_description_finds_no_fault_with_what_works(
    variant: Variant, change: Callable[[Variant], None]
) -> None:
    change(variant)
    options = {name.removesuffix("_path"): value for name, value in variant.options.items()}
    described = describe_checkpoint(open_checkpoint(variant.folder, **options))
    assert {name: info["problem"] for name, info in described["components"].items()} == dict.fromkeys(
        ("backbone", "dit", "image_encoder", "decoder")
    )


def test_half_precision_moves_a_picture_by_a_shade_at_most(plain: dict[str, Any], variant: Variant) -> None:
    variant.write({key: tensor.half() for key, tensor in variant.read().items()})
    found = use(load_pipeline(variant.folder, dtype="fp32", device="cpu"))
    assert (found["pixels"] - plain["pixels"]).abs().max() <= 1 / 255


def test_what_is_left_out_is_told_once_and_listed(variant: Variant, caplog: pytest.LogCaptureFixture) -> None:
    flux_vae(variant)
    variant.add(**{"mystery.weight": torch.ones(5)})
    match._told.clear()
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            use(load_pipeline(variant.folder, dtype="fp32", device="cpu"))
    assert caplog.text.count("2 tensors of model.vae, 4.5 KB") == 1
    assert caplog.text.count("1 tensor of mystery.weight") == 1
    levels = {
        record.levelname: record.getMessage()
        for record in caplog.records
        if "left out" in record.getMessage()
    }
    assert "model.vae" in levels["INFO"] and "mystery" in levels["WARNING"]
    listed = describe_checkpoint(open_checkpoint(variant.folder))["left_out"]
    assert listed == [
        {"name": "model.vae", "tensors": 2, "bytes": 2 * 8 * 16 * 9 * 2, "is_known": True},
        {"name": "mystery.weight", "tensors": 1, "bytes": 20, "is_known": False},
    ]


@pytest.mark.parametrize("change", [flux_vae, unknown_tensors, clip_norm_and_head, rotary_tables])
def test_a_strict_look_refuses_what_nothing_needs(
    variant: Variant, change: Callable[[Variant], None]
) -> None:
    change(variant)
    with pytest.raises(WrongCheckpointError, match="(?s)does not need.*--strict"):
        use(load_pipeline(variant.folder, dtype="fp32", device="cpu", strict=True))


def test_a_strict_look_passes_a_plain_checkpoint(plain: dict[str, Any], plain_folder: Path) -> None:
    found = use(load_pipeline(plain_folder, dtype="fp32", device="cpu", strict=True))
    assert torch.equal(found["pixels"], plain["pixels"])


# What is absent


def no_queries(variant: Variant) -> None:
    variant.drop("model.latent_queries")


def no_head(variant: Variant) -> None:
    variant.drop("lm_head.")


def no_dit(variant: Variant) -> None:
    variant.drop(DIT)


def no_tower(variant: Variant) -> None:
    variant.drop(TOWER)


def no_decoder(variant: Variant) -> None:
    shutil.rmtree(variant.folder / "diffusion-decoder")


def pickled_decoder(variant: Variant) -> None:
    path = variant.decoder_file("unet")
    path.rename(path.with_name("diffusion_pytorch_model.bin"))


def decoder_part_lost(variant: Variant) -> None:
    decoder_in_parts(variant)
    variant.decoder_file("unet").with_name("diffusion_pytorch_model-00002-of-00002.safetensors").unlink()


def named_decoder_that_is_none(variant: Variant) -> None:
    variant.options["decoder_path"] = variant.folder.parent


def lost_layer(variant: Variant) -> None:
    variant.drop("model.layers.1.mlp.up_proj.")


def promise_broken(variant: Variant) -> None:
    names = dict.fromkeys(variant.read(), SHARD)
    variant.drop("model.layers.1.mlp.up_proj.")
    variant.promise(names)


def needed_shard_lost(variant: Variant) -> None:
    split(variant)
    (variant.folder / "model-00002-of-00003.safetensors").unlink()


ABSENCES = [
    (no_queries, "draw", "no latent_queries.*saved without them.*BLIP3o-Model-8B"),
    (no_head, "ask", "lacks its language head.*tie_word_embeddings.*BLIP3o-Model-8B"),
    (no_dit, "draw", "no image feature generator.*BLIP3o-Model-8B.*blip3o download"),
    (no_tower, "encode", "without the EVA-CLIP.*jiuhai/eva_clip_vision_tower"),
    (no_decoder, "draw", "has no decoder unet.*diffusion-decoder.*BLIP3o-Model-8B.*--decoder FOLDER"),
    (pickled_decoder, "draw", "only as a pickle.*safetensors"),
    (decoder_part_lost, "draw", "has no decoder unet.*00002-of-00002"),
    (named_decoder_that_is_none, "draw", "is no complete decoder.*Name a folder"),
    (lost_layer, "ask", "lacks 1 of the .* tensors that its backbone needs.*layers.1.mlp.up_proj.weight"),
    (promise_broken, "ask", "lacks 1 of the .*layers.1.mlp.up_proj.weight"),
    (needed_shard_lost, "ask", "not complete: 1 of 3 weight files.*model-00002-of-00003"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("change", "use_for", "fragment"), ABSENCES, ids=lambda each: getattr(each, "__name__", None)
)
def test_what_is_absent_is_named_with_the_place_to_take_it_from(
    variant: Variant, change: Callable[[Variant], None], use_for: str, fragment: str
) -> None:
    change(variant)
    pipeline = load_pipeline(variant.folder, dtype="fp32", device="cpu", **variant.options)
    uses = {
        "draw": lambda: pipeline.generate("a cat", preset="fast"),
        "ask": lambda: pipeline.ask("What is this ?"),
        "encode": lambda: pipeline.encode_images([PICTURE]),
    }
    with pytest.raises(Blip3oError, match=f"(?s){fragment}"):
        uses[use_for]()
    options = {name.removesuffix("_path"): value for name, value in variant.options.items()}
    described = describe_checkpoint(open_checkpoint(variant.folder, **options))
    problems = "\n".join(info["problem"] or "" for info in described["components"].values())
    assert re.search(f"(?s){fragment}", problems)


@pytest.mark.parametrize("change", [no_decoder, no_dit, no_tower])
def test_a_part_that_is_absent_keeps_no_other_from_working(
    plain: dict[str, Any], variant: Variant, change: Callable[[Variant], None]
) -> None:
    change(variant)
    pipeline = load_pipeline(variant.folder, dtype="fp32", device="cpu")
    answers = pipeline.ask("What is this ?", [[PICTURE]], settings=AnswerSettings(max_new_tokens=5))
    assert answers == plain["answer"]


def test_a_head_that_the_configuration_ties_is_the_embedding(tmp_path: Path) -> None:
    folder = tiny_models.write_checkpoint(tmp_path / "tied", tiny_models.VARIANTS["tied"])
    head = load_pipeline(folder, dtype="fp32", device="cpu").backbone
    assert head.lm_head.weight is head.text.embed_tokens.weight


def test_pickled_shards_are_refused_with_the_way_to_save_them(variant: Variant) -> None:
    (variant.folder / SHARD).rename(variant.folder / "pytorch_model-00001-of-00001.bin")
    (variant.folder / INDEX).unlink()
    with pytest.raises(MissingFilesError, match="(?s)only as pickles.*safe_serialization"):
        open_checkpoint(variant.folder)


def test_an_index_cannot_lead_out_of_its_folder(variant: Variant) -> None:
    variant.promise({"model.norm.weight": "../elsewhere.safetensors"})
    with pytest.raises(WrongCheckpointError, match="cannot be one: .*elsewhere"):
        open_checkpoint(variant.folder)


def test_a_tokenizer_of_a_larger_model_is_told(variant: Variant) -> None:
    """Its last tokens have no row in the embedding."""
    tensors = variant.read()
    for key in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[key] = tensors[key][:20].clone()
    variant.write(tensors)
    pipeline = load_pipeline(variant.folder, dtype="fp32", device="cpu")
    for use_it in (lambda: pipeline.ask("What is this ?"), lambda: pipeline.encode_prompts("a cat")):
        with pytest.raises(WrongCheckpointError, match="knows more tokens than the language model"):
            use_it()
