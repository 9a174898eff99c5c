"""The cache: the same numbers as drawing uses, one entry for what changed, and nothing wrong is ever trained on."""

import errno
import importlib.util
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from comfyui_blip3o.blip3o_core.checkpoints.safetensor_files import write_safetensors
from comfyui_blip3o.blip3o_core.checkpoints.save import save_checkpoint
from comfyui_blip3o.blip3o_core.config import BUILT_IN_MODEL
from comfyui_blip3o.blip3o_core.errors import MissingFilesError, TrainingDataError
from comfyui_blip3o.blip3o_core.images import load_image
from comfyui_blip3o.blip3o_core.networks import Networks
from comfyui_blip3o.blip3o_core.pipeline import Blip3oPipeline, load_pipeline
from comfyui_blip3o.lora_training.config import LoraConfig
from comfyui_blip3o.lora_training.data import cache
from comfyui_blip3o.lora_training.data.cache import (
    CacheKeys,
    Counts,
    DamagedEntry,
    cache_conditioning,
    cache_features,
    cache_keys,
    collect_garbage,
    encoding_dtype,
    load_data,
    open_pipeline,
    read_entry,
    verify_cache,
)
from comfyui_blip3o.lora_training.data.dataset import scan_run
from comfyui_blip3o.lora_training.records import Interrupted, TrainingData
from PIL import Image
from training_sets import caption, config_of, drawing, write_set

EXTRA = ("a red ring", "two blue stars")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three captioned drawings."""
    return write_set(tmp_path / "set", 3)


def fill(
    config: LoraConfig, extra: tuple[str, ...] = EXTRA, **options: Any
) -> tuple[Counts, Counts, TrainingData]:
    """Fill the cache of a run as a run does, and load it."""
    dataset, pipeline, place = scan_run(config), open_pipeline(config), config.run.dir / cache.CACHE_NAME
    features = cache_features(config, dataset, pipeline, place, **options)
    conditioning = cache_conditioning(config, dataset, extra, pipeline, place, **options)
    return features, conditioning, load_data(config, dataset, extra, place)


def entries(config: LoraConfig, part: str) -> list[Path]:
    return sorted((config.run.dir / cache.CACHE_NAME / part).iterdir())


# The same numbers as in drawing


def test_cached_conditioning_is_that_of_the_pipeline_to_the_bit(folder: Path):
    config = config_of(folder, trigger="star", class_word="ring")
    data = fill(config)[2]
    pipeline = load_pipeline(BUILT_IN_MODEL, dtype="fp32", device="cpu")
    for sample in data.train:
        for prompt, row in zip(sample.prompts, sample.conditioning, strict=True):
            assert torch.equal(row, pipeline.encode_prompts(prompt)[0])
        for prompt, row in zip(sample.class_prompts, sample.class_conditioning, strict=True):
            assert torch.equal(row, pipeline.encode_prompts(prompt)[0])
    assert set(data.prompts) == set(EXTRA)
    for prompt, row in data.prompts.items():
        assert torch.equal(row, pipeline.encode_prompts(prompt)[0])
    assert not torch.equal(*data.prompts.values())


def test_cached_features_are_those_of_the_pipeline_to_the_bit(folder: Path):
    Image.new("RGB", (200, 133), "red").save(folder / "p01.png")
    data = fill(config_of(folder))[2]
    pipeline = load_pipeline(BUILT_IN_MODEL, dtype="fp32", device="cpu")
    for sample in data.train:
        assert sample.features.shape == (1, 64, 64)
        assert sample.features.dtype == torch.float32
        assert torch.equal(sample.features, pipeline.encode_images([load_image(folder / sample.name)]))


def test_an_entry_does_not_depend_on_what_else_is_encoded(folder: Path, tmp_path: Path):
    together = fill(config_of(folder))[2].train[0]
    alone = write_set(tmp_path / "alone" / "set", 1)
    (alone / "p01.txt").write_text("unused", "utf-8")
    single = fill(config_of(alone), ())[2].train[0]
    assert together.name == single.name
    assert torch.equal(together.conditioning, single.conditioning)
    assert torch.equal(together.features, single.features)


def test_views_flips_captions_weights_and_repeats_reach_the_sample(folder: Path):
    (folder / "p00.txt").write_text("one\ntwo\nthree", "utf-8")
    picture = drawing(0).convert("RGBA")
    picture.putalpha(Image.new("L", picture.size, 51))
    picture.save(folder / "p00.png")
    (folder / "4_more").mkdir()
    (folder / "p01.png").rename(folder / "4_more" / "p01.png")
    (folder / "p01.txt").rename(folder / "4_more" / "p01.txt")
    (folder / "metadata.jsonl").write_text('{"file_name": "p02.png", "weight": 0.3}', "utf-8")
    config = config_of(folder, crop={"mode": "views", "views": 3, "flip": True}, mask="alpha")
    by_name = {sample.name: sample for sample in fill(config)[2].train}
    first = by_name["p00.png"]
    assert first.features.shape == (6, 64, 64)
    assert first.conditioning.shape == (3, 64, 128)
    torch.testing.assert_close(first.weights, torch.full((6, 64), 0.2))
    assert first.class_conditioning is None
    assert (by_name["4_more/p01.png"].repeats, first.repeats) == (4, 1)
    assert by_name["p02.png"].weights is None
    assert (by_name["p02.png"].weight, first.weight) == (0.3, 1.0)


def test_held_out_and_regularisation_pictures_are_kept_apart(tmp_path: Path):
    folder, others = write_set(tmp_path / "set", 12), write_set(tmp_path / "others", 2)
    data = fill(config_of(folder, f"train.prior.reg_path={others}", trigger="star", class_word="ring"))[2]
    assert (len(data.train), len(data.held_out), len(data.regularisation)) == (11, 1, 2)
    assert data.regularisation[0].prompts == (caption(0),)
    assert data.regularisation[0].class_conditioning is None


# One entry for what changed


def test_a_second_run_computes_and_loads_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch):
    config = config_of(folder)
    assert fill(config)[:2] == (Counts(3, 0), Counts(5, 0))
    monkeypatch.setattr(Networks, "get", lambda self, name: pytest.fail(f"{name} was loaded"))
    assert fill(config)[:2] == (Counts(0, 3), Counts(0, 5))


def test_an_edited_caption_costs_one_conditioning(folder: Path):
    config = config_of(folder)
    fill(config)
    (folder / "p01.txt").write_text("something else", "utf-8")
    features, conditioning, data = fill(config)
    assert (features.computed, conditioning.computed) == (0, 1)
    assert data.train[1].prompts == ("something else",)


def test_new_pixels_under_the_same_name_cost_one_feature_entry(folder: Path):
    config = config_of(folder)
    before = fill(config)[2]
    drawing(9).save(folder / "p01.png")
    features, conditioning, data = fill(config)
    assert (features.computed, conditioning.computed) == (1, 0)
    assert not torch.equal(before.train[1].features, data.train[1].features)
    assert torch.equal(before.train[0].features, data.train[0].features)


def test_a_renamed_picture_costs_nothing(folder: Path):
    config = config_of(folder)
    fill(config)
    for suffix in (".png", ".txt"):
        (folder / f"p01{suffix}").rename(folder / f"zebra 🦓{suffix}")
    features, conditioning, data = fill(config)
    assert (features.computed, conditioning.computed) == (0, 0)
    assert data.train[-1].name == "zebra 🦓.png"


def test_other_crops_cost_features_and_other_triggers_cost_conditioning(folder: Path):
    fill(config_of(folder))
    features, conditioning, _ = fill(config_of(folder, crop={"flip": True}))
    assert (features.computed, conditioning.computed) == (3, 0)
    features, conditioning, _ = fill(config_of(folder, trigger="star"))
    assert (features.computed, conditioning.computed) == (0, 3)


def other_model(tmp_path: Path, change: str) -> Path:
    """The built-in model with one network changed in one place."""
    pipeline = load_pipeline(BUILT_IN_MODEL, dtype="bf16", device="cpu")
    backbone, dit, encoder = pipeline.backbone, pipeline.dit, pipeline.image_encoder
    weight = {
        "queries": backbone.latent_queries,
        "layer": backbone.text.layers[2].mlp.up_proj.weight,
        "dit": dit.layers[1].attn1.to_q.weight,
        "encoder": encoder.blocks[1].mlp.fc1.weight,
        "nothing": torch.zeros(1),
    }[change]
    # Files are mapped into memory: never write into the original's pages.
    weight.data = weight.data * 1.5
    target = tmp_path / change
    save_checkpoint(
        target,
        pipeline.files.config,
        backbone=backbone,
        dit=dit,
        image_encoder=encoder,
        tokenizer_from=BUILT_IN_MODEL,
        max_shard_bytes=3 * 10**6,
    )
    return target


@pytest.mark.parametrize(
    ("change", "features", "conditioning"),
    [("queries", 0, 5), ("layer", 0, 5), ("encoder", 3, 0), ("dit", 0, 0), ("nothing", 0, 0)],
)
def test_another_network_costs_exactly_its_own_entries(
    folder: Path, tmp_path: Path, change: str, features: int, conditioning: int
):
    fill(config_of(folder))
    config = config_of(folder, f"model.root={other_model(tmp_path, change)}")
    done = fill(config)
    assert (done[0].computed, done[1].computed) == (features, conditioning)


def test_another_template_or_tokenizer_costs_all_conditioning(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    config = config_of(folder)
    fill(config)
    changed = config_of(folder, f"model.root={other_model(tmp_path, 'nothing')}")
    path = tmp_path / "nothing" / "tokenizer.json"
    path.write_text(path.read_text("utf-8") + " ", "utf-8")
    assert fill(changed)[1].computed == 5
    monkeypatch.setattr(cache, "generation_text", lambda prompt: f"Draw: {prompt}")
    assert fill(config)[:2] == (Counts(0, 3), Counts(5, 0))


def test_other_numbers_cost_everything(folder: Path):
    fill(config_of(folder))
    config = config_of(folder, "model.base_dtype=bf16")
    features, conditioning, data = fill(config)
    assert (features.computed, conditioning.computed) == (3, 5)
    assert data.train[0].conditioning.dtype == torch.bfloat16
    assert data.train[0].features.dtype == torch.float32


def test_the_fits_reduced_numbers_are_not_used_for_encoding(folder: Path):
    assert encoding_dtype(config_of(folder, "model.base_dtype=nf4")) == torch.float32
    assert encoding_dtype(config_of(folder, "model.base_dtype=bf16")) == torch.bfloat16


# Nothing wrong is trained on


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-50] ^= 1
    path.write_bytes(data)


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [cut_short, flip_a_bit, empty])
@pytest.mark.parametrize("part", ["features", "conditioning"])
def test_a_damaged_entry_is_found_named_and_computed_again(folder: Path, part: str, damage: Any):
    config = config_of(folder)
    whole = fill(config)[2]
    damage(entries(config, part)[0])
    with pytest.raises(DamagedEntry):
        read_entry(entries(config, part)[0])
    with pytest.raises(MissingFilesError, match=r"(?s)lacks 1 of 8 entries.*blip3o lora cache"):
        load_data(config, scan_run(config), EXTRA, config.run.dir / cache.CACHE_NAME)
    events: list[dict[str, Any]] = []
    features, conditioning, data = fill(config, on_event=events.append)
    done, other = (features, conditioning) if part == "features" else (conditioning, features)
    assert (done.computed, done.repaired, other.computed) == (1, 1, 0)
    (warning,) = (event["message"] for event in events if event["event"] == "warning")
    assert "damaged" in warning and (".png" in warning or "prompt" in warning)
    for before, after in zip(whole.train, data.train, strict=True):
        assert torch.equal(before.features, after.features)
        assert torch.equal(before.conditioning, after.conditioning)


def test_features_that_are_no_numbers_are_refused_by_name_and_the_others_kept(
    folder: Path, monkeypatch: pytest.MonkeyPatch
):
    encode = Blip3oPipeline.encode_images
    bad = load_image(folder / "p01.png").tobytes()

    def poisoned(self: Blip3oPipeline, pictures: list[Image.Image]) -> torch.Tensor:
        features = encode(self, pictures)
        features[0, 3, 5] = float("nan") if pictures[0].tobytes() == bad else features[0, 3, 5]
        return features

    monkeypatch.setattr(Blip3oPipeline, "encode_images", poisoned)
    config = config_of(folder)
    with pytest.raises(TrainingDataError, match=r"NaN or infinity\) for p01.png"):
        fill(config)
    assert len(entries(config, "features")) == 2


def test_an_entry_with_values_that_are_no_numbers_is_damaged(folder: Path):
    config = config_of(folder)
    fill(config)
    path = entries(config, "features")[0]
    tensor = read_entry(path)
    tensor[0, 0, 0] = float("inf")
    cache._write_entry(path, tensor, {})
    with pytest.raises(DamagedEntry, match="not numbers"):
        read_entry(path)


def test_a_foreign_file_in_the_cache_is_damaged(folder: Path):
    config = config_of(folder)
    fill(config)
    path = entries(config, "features")[0]
    write_safetensors({"value": torch.zeros(1, 64, 64)}, path)
    with pytest.raises(DamagedEntry, match="checksum"):
        read_entry(path)


def test_a_full_disk_is_told_and_keeps_what_is_done(folder: Path, monkeypatch: pytest.MonkeyPatch):
    config, written = config_of(folder), []

    def write(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
        if written:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(path)
        write_safetensors(tensors, path, metadata)

    monkeypatch.setattr(cache, "write_safetensors", write)
    with pytest.raises(TrainingDataError, match="disk is not full"):
        fill(config)
    monkeypatch.undo()
    assert entries(config, "features") == written
    assert fill(config)[0] == Counts(2, 1)


def test_missing_entries_are_named(folder: Path):
    config = config_of(folder)
    fill(config, ("a red ring",))
    with pytest.raises(MissingFilesError, match='prompt "two blue stars"'):
        load_data(config, scan_run(config), EXTRA, config.run.dir / cache.CACHE_NAME)


# One network at a time, and stopping


def test_never_two_networks_are_in_memory(folder: Path, monkeypatch: pytest.MonkeyPatch):
    loaded: list[set[str]] = []
    for name in ("encode_images", "encode_prompts"):
        original = getattr(Blip3oPipeline, name)

        def watched(self: Blip3oPipeline, *args: Any, original: Any = original, **options: Any) -> Any:
            result = original(self, *args, **options)
            loaded.append(set(self.networks.loaded))
            return result

        monkeypatch.setattr(Blip3oPipeline, name, watched)
    config = config_of(folder)
    dataset, pipeline, place = scan_run(config), open_pipeline(config), config.run.dir / "cache"
    pipeline.load("dit", "decoder", "backbone")
    cache_features(config, dataset, pipeline, place)
    cache_conditioning(config, dataset, EXTRA, pipeline, place)
    assert loaded == [{"image_encoder"}] * 3 + [{"backbone"}] * 5
    assert not pipeline.networks.loaded


@pytest.mark.skipif(
    importlib.util.find_spec("diffusers.hooks") is None,
    reason="needs diffusers 0.33 or newer",
)
def test_networks_that_do_not_fit_are_streamed_and_give_the_same_bits(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    whole = fill(config_of(folder))[2]
    monkeypatch.setattr(cache, "is_too_large", lambda pipeline, component: True)
    events: list[dict[str, Any]] = []
    config = config_of(folder, f"run.dir={tmp_path / 'small card'}")
    features, conditioning, streamed = fill(config, on_event=events.append)
    assert (features.computed, conditioning.computed) == (3, 5)
    for one, other in zip(whole.train, streamed.train, strict=True):
        assert torch.equal(one.features, other.features)
        assert torch.equal(one.conditioning, other.conditioning)
    messages = [event["message"] for event in events if event["event"] == "warning"]
    assert messages == [cache.TOO_LARGE["image_encoder"], cache.TOO_LARGE["backbone"]]


def test_a_network_is_too_large_when_its_weights_and_the_framework_exceed_what_is_free(
    folder: Path, monkeypatch: pytest.MonkeyPatch
):
    config = config_of(folder)
    pipeline = open_pipeline(config)
    backbone = 4 * sum(parameter.numel() for parameter in pipeline.backbone.parameters())
    needed = backbone + cache.OVERHEAD_BYTES
    assert not cache.is_too_large(pipeline, "backbone")
    pipeline.networks.device = torch.device("cuda")
    for free, is_too_large in ((needed, False), (needed - 1, True)):
        monkeypatch.setattr(cache, "free_memory", lambda device, free=free: free)
        assert cache.is_too_large(pipeline, "backbone") is is_too_large


@pytest.mark.parametrize("done", [0, 1, 2])
def test_a_stop_keeps_what_is_done_and_the_next_run_goes_on(folder: Path, done: int):
    config = config_of(folder)
    asked = iter([False] * done + [True] * 9)
    with pytest.raises(Interrupted, match=f"after {done} of 3"):
        fill(config, should_stop=lambda: next(asked))
    features, _, _ = fill(config)
    assert features == Counts(3 - done, done)


def test_progress_counts_to_the_end(folder: Path):
    events: list[dict[str, Any]] = []
    fill(config_of(folder), on_event=events.append)
    for phase, total in (("features", 3), ("conditioning", 5)):
        steps = [(event["done"], event["total"]) for event in events if event.get("phase") == phase]
        assert steps == [(done, total) for done in range(total + 1)]


# Keeping house


def test_a_sound_cache_verifies_and_each_kind_of_fault_is_found(folder: Path):
    config = config_of(folder)
    fill(config)
    place, dataset = config.run.dir / cache.CACHE_NAME, scan_run(config)

    def verify() -> dict[str, tuple[str, ...]]:
        pipeline = open_pipeline(config)
        found = verify_cache(config, dataset, EXTRA, place, pipeline, samples=9)
        assert not pipeline.networks.loaded
        return {problem.kind: problem.names for problem in found}

    assert verify() == {}
    keys = cache_keys(config)
    first, second, third = (place / keys.features(item) for item in dataset.used)
    flip_a_bit(first)
    second.unlink()
    cache._write_entry(third, torch.randn(1, 64, 64), {})
    lied = place / keys.conditioning(EXTRA[1])
    cache._write_entry(lied, read_entry(place / keys.conditioning(EXTRA[0])), {})
    assert verify() == {
        "damaged entry": ("p00.png",),
        "missing entry": ("p01.png",),
        "wrong entry": ("p02.png", f'prompt "{EXTRA[1]}"'),
    }


def test_garbage_is_what_no_run_used_for_days(folder: Path):
    config = config_of(folder)
    fill(config)
    place = config.run.dir / cache.CACHE_NAME
    (folder / "p01.txt").write_text("new words", "utf-8")
    dataset = scan_run(config)
    month_ago = time.time() - 31 * 86400
    for part in ("features", "conditioning"):
        for path in entries(config, part):
            os.utime(path, (month_ago, month_ago))
        (place / part / "half.safetensors.part").write_bytes(b"x")
        os.utime(place / part / "half.safetensors.part", (month_ago, month_ago))
        (place / part / "mine.txt").write_bytes(b"x")
    # A run that uses its entries keeps them: all but the conditioning of the old words.
    fill(config)
    removed = collect_garbage(place)
    assert removed.files == 3 and removed.bytes > 10_000
    assert fill(config)[:2] == (Counts(0, 3), Counts(0, 5))
    assert collect_garbage(place, cache_keys(config).all(dataset, EXTRA), unused_days=0).files == 0
    assert collect_garbage(place, unused_days=0).files == 8
    assert [path.name for path in entries(config, "features")] == ["mine.txt"]


def test_keys_of_the_pipeline_and_of_the_configuration_are_the_same(folder: Path):
    config = config_of(folder)
    pipeline = open_pipeline(config)
    theirs = CacheKeys(config, pipeline.files, pipeline.dtype)
    dataset = scan_run(config)
    assert cache_keys(config).all(dataset, EXTRA) == theirs.all(dataset, EXTRA)
    assert len(set(theirs.all(dataset, EXTRA))) == 8


def test_a_smart_crop_along_a_mask_has_the_mask_in_its_key(folder: Path):
    drawing(0).convert("L").save(folder / "p00_mask.png")
    config = config_of(folder, crop={"mode": "smart"}, mask="files")
    item = scan_run(config).items[0]
    before = cache_keys(config).features(item)
    drawing(1).convert("L").save(folder / "p00_mask.png")
    assert cache_keys(config).features(item) != before
    centre = replace(config, data=replace(config.data, crop=replace(config.data.crop, mode="centre")))
    plain = cache_keys(centre).features(item)
    drawing(2).convert("L").save(folder / "p00_mask.png")
    assert cache_keys(centre).features(item) == plain
