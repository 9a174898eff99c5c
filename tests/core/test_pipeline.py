"""The whole way from prompts to pictures: batches, seeds, the published order of noise, stops, memory."""

import gc
import logging
import random
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import tiny_models
import torch
from comfyui_blip3o.blip3o_core import networks
from comfyui_blip3o.blip3o_core import pipeline as pipeline_module
from comfyui_blip3o.blip3o_core.devices import pick_device, pick_dtype
from comfyui_blip3o.blip3o_core.drawing.decoding import PixelSettings
from comfyui_blip3o.blip3o_core.drawing.noise import seeded_noise
from comfyui_blip3o.blip3o_core.drawing.presets import PRESETS
from comfyui_blip3o.blip3o_core.drawing.sampling import FeatureSettings
from comfyui_blip3o.blip3o_core.errors import BadInputError, MissingFilesError
from comfyui_blip3o.blip3o_core.images import from_pil, to_pixels
from comfyui_blip3o.blip3o_core.pipeline import Blip3oPipeline, load_pipeline
from torch import Tensor

PROMPTS = [
    "red",
    "a red circle above a blue square",
    "two dogs",
    "A photo of cute cat : many , many cat . one red cat and three yellow cat , left and right",
    "big green grass",
]
QUICK = {"features": FeatureSettings(steps=2), "pixels": PixelSettings(steps=2)}
FEATURE_SHAPE, LATENT_SHAPE = (16, 4, 4), (4, 16, 16)


@pytest.fixture
def fresh(tiny_folder: Path) -> Blip3oPipeline:
    """A pipeline of a test's own, with nothing loaded or cached."""
    return load_pipeline(tiny_folder, dtype="fp32", device="cpu")


def assert_close(ours: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(ours, expected, rtol=tolerance, atol=tolerance)


# Batches and seeds


@pytest.mark.parametrize("batch_size", [4, 15])
def test_five_prompts_times_three_pictures_are_fifteen_single_runs(
    pipeline: Blip3oPipeline, batch_size: int
) -> None:
    batch = pipeline.generate(PROMPTS, images_per_prompt=3, seed=40, batch_size=batch_size, **QUICK)
    assert batch.images.shape == (15, 32, 32, 3)
    assert batch.seeds == batch.pixel_seeds == list(range(40, 55))
    assert batch.prompts == [prompt for prompt in PROMPTS for _ in range(3)]
    for index in range(15):
        alone = pipeline.generate(PROMPTS[index // 3], seed=40 + index, **QUICK)
        assert_close(batch.image_features[index], alone.image_features[0])
        assert_close(batch.images[index], alone.images[0])
    spread = (batch.images[:, None] - batch.images[None]).abs().amax(dim=(2, 3, 4))
    assert (spread + torch.eye(15)).min() > 1e-3  # no two of the fifteen are the same picture


def test_prompts_of_different_lengths_do_not_disturb_each_other(pipeline: Blip3oPipeline) -> None:
    together = pipeline.encode_prompts(PROMPTS)
    for row, prompt in enumerate(PROMPTS):
        assert_close(together[row], pipeline.encode_prompts(prompt)[0], 2e-5)


def test_pictures_inside_prompts_work_in_a_batch(pipeline: Blip3oPipeline) -> None:
    one, two = tiny_models.picture(seed=1), tiny_models.picture(200, 90, seed=2)
    images = [[one], [], [two, one]]
    together = pipeline.encode_prompts(PROMPTS[:3], images)
    for row in range(3):
        assert_close(together[row], pipeline.encode_prompts(PROMPTS[row], [images[row]])[0], 2e-5)
    other = pipeline.encode_prompts(PROMPTS[:1], [[two]])
    assert (other - together[:1]).abs().max() > 1e-3
    drawn = pipeline.generate(PROMPTS[:3], images=images, **QUICK)
    assert drawn.images.shape[0] == 3


def test_features_and_pixels_have_separate_seeds(pipeline: Blip3oPipeline) -> None:
    first = pipeline.generate("red", seed=1, pixel_seed=5, **QUICK)
    other_pixels = pipeline.generate("red", seed=1, pixel_seed=6, **QUICK)
    other_features = pipeline.generate("red", seed=2, pixel_seed=5, **QUICK)
    assert torch.equal(first.image_features, other_pixels.image_features)
    assert not torch.equal(first.images, other_pixels.images)
    assert not torch.equal(first.image_features, other_features.image_features)
    again = pipeline.decode(
        first.image_features,
        [5],
        settings=QUICK["pixels"],
        negative_features=pipeline.negative_features(settings=QUICK["features"]),
    )
    assert_close(again, first.images)


def test_the_last_seed_wraps_around(pipeline: Blip3oPipeline) -> None:
    batch = pipeline.generate("red", images_per_prompt=2, seed=2**64 - 1, **QUICK)
    assert batch.seeds == [2**64 - 1, 0]
    assert_close(batch.images[1], pipeline.generate("red", seed=0, **QUICK).images[0])


def test_global_random_numbers_are_neither_drawn_nor_seeded(pipeline: Blip3oPipeline) -> None:
    torch.manual_seed(7)
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    first = pipeline.generate("red", seed=3, **QUICK)
    pipeline.vary([tiny_models.picture()], prompt="red", **QUICK)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()
    assert random.getstate() == before[2]
    torch.manual_seed(8)
    assert torch.equal(pipeline.generate("red", seed=3, **QUICK).images, first.images)


def test_noise_of_a_seed_does_not_depend_on_the_batch() -> None:
    together = seeded_noise([3, 4, 5], (2, 2))
    assert torch.equal(together[1:2], seeded_noise([4], (2, 2)))
    expected = torch.randn(2, 2, generator=torch.Generator().manual_seed(4))
    assert torch.equal(together[1], expected)


def test_the_stages_can_be_called_one_by_one(pipeline: Blip3oPipeline) -> None:
    whole = pipeline.generate("a red circle", seed=9, **QUICK)
    conditioning = pipeline.encode_prompts("a red circle")
    features = pipeline.sample_features(conditioning, [9], settings=QUICK["features"])
    images = pipeline.decode(
        features,
        [9],
        settings=QUICK["pixels"],
        negative_features=pipeline.negative_features(settings=QUICK["features"]),
    )
    assert_close(whole.image_features, features)
    assert_close(whole.images, images)
    assert images.dtype == torch.float32
    assert images.min() >= 0
    assert images.max() <= 1


@pytest.mark.parametrize("variant", ["grouped", "tied", "pooled", "deep"])
def test_other_sizes_draw_and_look(tmp_path: Path, variant: str) -> None:
    sizes = tiny_models.VARIANTS[variant]
    folder = tiny_models.write_checkpoint(tmp_path / variant, sizes)
    other = load_pipeline(folder, dtype="fp32", device="cpu")
    drawn = other.generate(["red", "two dogs"], **QUICK)
    assert drawn.image_features.shape == (2, sizes.queries, sizes.dit.in_channels)
    assert drawn.images.shape == (2, 32, 32, 3)
    assert other.encode_images([tiny_models.picture()]).shape == (1, sizes.queries, sizes.tower.width)
    assert other.vary([tiny_models.picture()], prompt="red", **QUICK).images.shape == (1, 32, 32, 3)
    assert isinstance(other.ask("What is this ?", [[tiny_models.picture()]])[0], str)


# The published preset


def published_by_hand(pipeline: Blip3oPipeline, seed: int, negative: Tensor | None) -> tuple[Tensor, Tensor]:
    """Section 4 of the published code, stage by stage: one generator, features first, then the negative's noise."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(1, *FEATURE_SHAPE, generator=generator)
    features = pipeline.sample_features(
        pipeline.encode_prompts("red"), noise=noise, settings=QUICK["features"]
    )
    if negative is None:
        negative = pipeline.sample_features(
            pipeline.encode_prompts(" ", use_template=False),
            noise=torch.randn(1, *FEATURE_SHAPE, generator=generator),
            settings=QUICK["features"],
        )
    latents = torch.randn(1, *LATENT_SHAPE, generator=generator)
    images = pipeline.decode(features, noise=latents, settings=QUICK["pixels"], negative_features=negative)
    return images, negative


def test_the_published_preset_draws_its_noise_in_the_published_order(fresh: Blip3oPipeline) -> None:
    expected, negative = published_by_hand(fresh, 12, None)
    assert_close(fresh.generate("red", seed=12, preset="published", **QUICK).images, expected)
    # The negative features are drawn once for each pipeline: the second picture has no noise in between.
    second, _ = published_by_hand(fresh, 12, negative)
    assert_close(fresh.generate("red", seed=12, preset="published", **QUICK).images, second)
    assert (second - expected).abs().max() > 1e-3


def test_the_standard_preset_draws_the_same_picture_first_and_later(fresh: Blip3oPipeline) -> None:
    first = fresh.generate("red", seed=12, **QUICK).images
    fresh.generate("two dogs", seed=1, **QUICK)
    assert torch.equal(fresh.generate("red", seed=12, **QUICK).images, first)


def test_published_settings() -> None:
    preset = PRESETS["published"]
    assert preset.is_published
    assert (preset.features.steps, preset.features.guidance_scale, preset.features.sampler) == (
        30,
        3.0,
        "euler",
    )
    assert (preset.features.shift, preset.features.guidance_interval) == (1.0, (0.0, 1.0))
    assert (preset.pixels.steps, preset.pixels.guidance_scale, preset.pixels.sampler) == (50, 3.0, "euler")
    assert (preset.pixels.width, preset.pixels.height) == (None, None)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_complete_runs(pipeline: Blip3oPipeline, name: str) -> None:
    features: list[int] = []
    pixels: list[int] = []
    pipeline.generate(
        "red",
        preset=name,
        on_feature_step=lambda step, total, _: features.append(total),
        on_pixel_step=lambda step, total, _: pixels.append(total),
    )
    preset = PRESETS[name]
    assert features == [preset.features.steps] * preset.features.steps
    assert pixels == [preset.pixels.steps] * preset.pixels.steps


# Negatives


@pytest.fixture
def feature_runs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Batch sizes of the runs of the feature sampler, as they happen."""
    runs: list[int] = []
    real = pipeline_module.sample_features

    def counting(dit: object, conditioning: Tensor, **options: object) -> Tensor:
        runs.append(conditioning.shape[0])
        return real(dit, conditioning, **options)

    monkeypatch.setattr(pipeline_module, "sample_features", counting)
    return runs


def test_negative_features_are_sampled_once_for_prompt_seed_and_settings(
    fresh: Blip3oPipeline, feature_runs: list[int]
) -> None:
    fresh.generate(["red", "blue"], **QUICK)
    assert feature_runs == [2, 1]
    fresh.generate("green", seed=5, **QUICK)
    assert feature_runs == [2, 1, 1]
    for change in (
        {"pixel_negative": "yellow"},
        {"pixel_negative_seed": 3},
        {"features": FeatureSettings(steps=3)},
    ):
        fresh.generate("green", **{**QUICK, **change})
        assert feature_runs[-2:] == [1, 1]
    assert len(feature_runs) == 9
    fresh.generate("green", pixel_negative="yellow", **QUICK)
    assert len(feature_runs) == 10


def test_zeros_or_no_guidance_need_no_negative_features(
    fresh: Blip3oPipeline, feature_runs: list[int]
) -> None:
    zeros = fresh.generate("red", pixel_negative=None, **QUICK)
    plain = {**QUICK, "pixels": PixelSettings(steps=2, guidance_scale=1.0)}
    fresh.generate("red", **plain)
    assert feature_runs == [1, 1]
    assert (fresh.generate("red", **QUICK).images - zeros.images).abs().max() > 1e-3


def test_the_cache_of_negative_features_is_bounded(fresh: Blip3oPipeline) -> None:
    settings = FeatureSettings(steps=1)
    for seed in range(20):
        fresh.negative_features(seed=seed, settings=settings)
    assert len(fresh._negatives) == pipeline_module.CACHED_NEGATIVES


def test_a_negative_of_spaces_has_no_template_and_a_written_one_has(fresh: Blip3oPipeline) -> None:
    settings, noise = FeatureSettings(steps=1), seeded_noise([0], FEATURE_SHAPE)
    for prompt, use_template in ((" ", False), ("yellow", True)):
        conditioning = fresh.encode_prompts(prompt, use_template=use_template)
        expected = fresh.sample_features(conditioning, noise=noise, settings=settings)
        assert torch.equal(fresh.negative_features(prompt, settings=settings), expected)


def test_a_negative_prompt_steers_the_features(pipeline: Blip3oPipeline) -> None:
    plain = pipeline.generate("red", **QUICK).image_features
    steered = pipeline.generate("red", negative_prompt="blue", **QUICK).image_features
    assert (plain - steered).abs().max() > 1e-3
    no_guidance = {**QUICK, "features": FeatureSettings(steps=2, guidance_scale=1.0)}
    same = pipeline.generate("red", negative_prompt="red", **QUICK).image_features
    assert_close(same, pipeline.generate("red", **no_guidance).image_features, 1e-3)


# Pictures in


def test_varying_redraws_the_features_of_a_picture(pipeline: Blip3oPipeline) -> None:
    pictures = [tiny_models.picture(seed=1), tiny_models.picture(90, 90, seed=2)]
    varied = pipeline.vary(pictures, count=2, seed=4, pixels=QUICK["pixels"])
    features = pipeline.encode_images(pictures)
    assert_close(varied.image_features, features.repeat_interleave(2, dim=0))
    expected = pipeline.decode(
        features[1:],
        [6],
        settings=QUICK["pixels"],
        negative_features=pipeline.negative_features(),
    )
    assert_close(varied.images[2:3], expected)
    assert varied.pixel_seeds == [4, 5, 6, 7]


def test_varying_towards_a_prompt_starts_at_the_picture(pipeline: Blip3oPipeline) -> None:
    pictures = [tiny_models.picture(seed=1)]
    features = pipeline.encode_images(pictures)

    def moved(strength: float) -> Tensor:
        varied = pipeline.vary(pictures, prompt="red", strength=strength, seed=4, **QUICK)
        return varied.image_features

    assert_close(moved(0.0), features)
    assert_close(moved(1.0), pipeline.generate("red", seed=4, **QUICK).image_features)
    assert (moved(0.5) - features).abs().max() > 1e-3
    assert (moved(0.5) - moved(1.0)).abs().max() > 1e-3


def test_encoding_pictures_in_a_batch_equals_one_by_one(pipeline: Blip3oPipeline) -> None:
    pictures = [tiny_models.picture(seed=1), tiny_models.picture(90, 200, seed=2)]
    together = pipeline.encode_images(pictures)
    for row, picture in enumerate(pictures):
        assert_close(together[row : row + 1], pipeline.encode_images([picture]))
    with pytest.raises(BadInputError, match="no picture to encode"):
        pipeline.encode_images([])


def test_many_pictures_are_encoded_a_few_at_a_time(
    pipeline: Blip3oPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    real = type(pipeline.image_encoder).forward

    def forward(self: torch.nn.Module, pixels: Tensor) -> Tensor:
        sizes.append(pixels.shape[0])
        return real(self, pixels)

    monkeypatch.setattr(type(pipeline.image_encoder), "forward", forward)
    features = pipeline.encode_images([tiny_models.picture(seed=seed % 3) for seed in range(19)])
    assert max(sizes) <= 8
    assert sum(sizes) == len(features) == 19
    assert_close(features[18], features[0])


def test_a_start_picture_comes_back_at_strength_zero(pipeline: Blip3oPipeline) -> None:
    picture = tiny_models.picture(32, 32)
    kept = pipeline.generate("red", start_images=[picture], strength=0.0, **QUICK).images
    pixels = to_pixels(from_pil([picture]))
    with torch.no_grad():
        decoder = pipeline.decoder
        expected = decoder.decode_latents(decoder.encode_latents(pixels))
    assert_close(kept, expected.permute(0, 2, 3, 1))
    drawn = pipeline.generate("red", start_images=[picture], strength=1.0, **QUICK).images
    assert (drawn - kept).abs().max() > 1e-2


def test_one_start_picture_serves_all_and_several_go_one_by_one(pipeline: Blip3oPipeline) -> None:
    one, two = tiny_models.picture(seed=1), tiny_models.picture(seed=2)
    options = {"strength": 0.5, "seed": 3, **QUICK}
    shared = pipeline.generate(["red", "blue"], start_images=[one], **options).images
    each = pipeline.generate(["red", "blue"], start_images=[one, two], **options).images
    assert_close(shared[0], each[0])
    assert (shared[1] - each[1]).abs().max() > 1e-3
    alone = pipeline.generate("blue", start_images=[two], strength=0.5, seed=4, **QUICK).images
    assert_close(each[1], alone[0])


@pytest.mark.parametrize("kind", ["start_images", "start_features"])
def test_starts_must_be_one_or_one_for_each_picture(pipeline: Blip3oPipeline, kind: str) -> None:
    starts = [tiny_models.picture()] * 2 if kind == "start_images" else torch.zeros(2, 16, 16)
    with pytest.raises(BadInputError, match="2 start .* for 3 pictures"):
        pipeline.generate(["red"] * 3, strength=0.5, **{kind: starts}, **QUICK)


def test_other_picture_sizes_are_drawn(pipeline: Blip3oPipeline) -> None:
    pixels = PixelSettings(steps=2, width=24, height=42)
    drawn = pipeline.generate("red", features=QUICK["features"], pixels=pixels)
    assert drawn.images.shape == (1, 42, 24, 3)
    assert drawn.pictures[0].size == (24, 42)


# Stops, memory, loading


class Stop(Exception):
    pass


def stop_at(step_to_stop: int):
    def on_step(step: int, *_: object) -> None:
        if step == step_to_stop:
            raise Stop

    return on_step


@pytest.mark.parametrize("callback", ["on_feature_step", "on_pixel_step"])
@pytest.mark.parametrize("offload", [False, True])
def test_a_stop_in_a_callback_leaves_the_pipeline_usable(
    tiny_folder: Path, callback: str, offload: bool
) -> None:
    pipeline = load_pipeline(tiny_folder, dtype="fp32", device="cpu", offload=offload)
    before = pipeline.generate("red", seed=2, **QUICK).images
    with pytest.raises(Stop):
        pipeline.generate("two dogs", **{callback: stop_at(1)}, **QUICK)
    assert torch.equal(pipeline.generate("red", seed=2, **QUICK).images, before)


def test_a_stop_before_anything_was_cached_leaves_nothing_half_done(fresh: Blip3oPipeline) -> None:
    with pytest.raises(Stop):
        fresh.generate("red", on_feature_step=stop_at(1), preset="published", **QUICK)
    assert len(fresh._negatives) == 0
    expected, _ = published_by_hand(fresh, 12, None)
    assert_close(fresh.generate("red", seed=12, preset="published", **QUICK).images, expected)


def test_offload_gives_the_same_pictures_and_answers(tiny_folder: Path, pipeline: Blip3oPipeline) -> None:
    moving = load_pipeline(tiny_folder, dtype="fp32", device="cpu", offload=True)
    for one, other in (
        (moving.generate("red", **QUICK).images, pipeline.generate("red", **QUICK).images),
        (
            moving.encode_images([tiny_models.picture()]),
            pipeline.encode_images([tiny_models.picture()]),
        ),
    ):
        assert torch.equal(one, other)
    question = ("What is this ?", [[tiny_models.picture()]])
    assert moving.ask(*question) == pipeline.ask(*question)


def test_offload_lets_a_network_visit_only_while_it_works(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = load_pipeline(tiny_folder, dtype="fp32", device="cpu", offload=True)
    visits: list[str] = []

    @contextmanager
    def visit(network: torch.nn.Module, device: torch.device) -> Iterator[None]:
        assert device == pipeline.device
        visits.append(f"{type(network).__name__} comes")
        try:
            yield
        finally:
            visits.append(f"{type(network).__name__} goes")

    monkeypatch.setattr(networks, "visit", visit)
    with pytest.raises(Stop):
        pipeline.generate("red", on_feature_step=stop_at(1), **QUICK)
    assert visits == ["Backbone comes", "Backbone goes", "NextDiT comes", "NextDiT goes"]


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text("utf-8").split()[1]) * 4096


def live_tensors() -> int:
    gc.collect()
    return sum(issubclass(type(item), Tensor) for item in gc.get_objects())


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's account of memory")
def test_two_hundred_generations_do_not_grow_memory(fresh: Blip3oPipeline) -> None:
    settings = {"features": FeatureSettings(steps=1), "pixels": PixelSettings(steps=1)}

    def draw(count: int) -> None:
        for index in range(count):
            fresh.generate(PROMPTS[index % 5], seed=index, pixel_negative_seed=index % 12, **settings)

    draw(30)
    tensors, bytes_before = live_tensors(), resident_bytes()
    draw(200)
    assert live_tensors() - tensors <= 2
    assert resident_bytes() - bytes_before < 24 * 2**20


def loaded(pipeline: Blip3oPipeline) -> set[str]:
    return set(pipeline.networks.loaded)


def test_networks_are_loaded_when_first_needed(fresh: Blip3oPipeline) -> None:
    assert loaded(fresh) == set()
    fresh.ask("What is this ?", [[tiny_models.picture()]])
    assert loaded(fresh) == {"backbone"}
    fresh.encode_images([tiny_models.picture()])
    assert loaded(fresh) == {"backbone", "image_encoder"}
    fresh.unload("image_encoder")
    fresh.generate("red", **QUICK)
    assert loaded(fresh) == {"backbone", "dit", "decoder"}
    before = fresh.generate("red", **QUICK).images
    fresh.unload()
    assert loaded(fresh) == set()
    assert torch.equal(fresh.load().generate("red", **QUICK).images, before)


def test_nothing_goes_to_the_network(fresh: Blip3oPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    fresh.generate("red", images=[[tiny_models.picture()]], **QUICK)
    fresh.vary([tiny_models.picture()], pixels=QUICK["pixels"])
    fresh.ask("What is this ?", [[tiny_models.picture()]])


def test_half_precision_draws_nearly_the_same(tiny_folder: Path, pipeline: Blip3oPipeline) -> None:
    half = load_pipeline(tiny_folder, dtype="bf16", device="cpu")
    ours, exact = (each.generate("red", **QUICK) for each in (half, pipeline))
    assert ours.image_features.dtype == torch.float32
    assert (ours.image_features - exact.image_features).abs().mean() < 0.1 * exact.image_features.std()
    assert (ours.images - exact.images).abs().mean() < 0.1


# Refusals and warnings


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        ({"prompts": ""}, "prompt is empty"),
        ({"prompts": []}, "prompt is empty"),
        ({"prompts": ["red", "  "]}, "prompt is empty"),
        ({"prompts": "red", "preset": "nice"}, 'preset is "nice".*standard, published, fast'),
        ({"prompts": "red", "images_per_prompt": 0}, "images_per_prompt is 0"),
        ({"prompts": "red", "batch_size": 0}, "batch_size is 0"),
        ({"prompts": "red", "seed": -1}, "seed is -1"),
        ({"prompts": "red", "pixel_seed": 2**64}, "seed is 18446744073709551616"),
        ({"prompts": "red", "pixel_negative_seed": -5}, "seed is -5"),
        ({"prompts": ["red", "blue"], "images": [[]]}, "2 prompts but 1 lists of images"),
        ({"prompts": "red", "pixels": PixelSettings(width=33)}, "width is 33"),
    ],
)
def test_impossible_requests_are_refused(
    pipeline: Blip3oPipeline, arguments: dict[str, object], fragment: str
) -> None:
    with pytest.raises(BadInputError, match=fragment):
        pipeline.generate(**{**QUICK, **arguments})


def test_a_picture_may_stand_in_a_prompt_without_words(pipeline: Blip3oPipeline) -> None:
    assert pipeline.encode_prompts("", [[tiny_models.picture()]]).shape == (1, 16, 32)


def test_a_prompt_longer_than_the_trained_one_is_warned_about(
    pipeline: Blip3oPipeline, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        pipeline.encode_prompts("red " * 200)
        assert caplog.records == []
        pipeline.encode_prompts("red " * 230)
    assert "trained on at most 447" in caplog.text


def test_a_missing_folder_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(MissingFilesError, match="no checkpoint folder"):
        load_pipeline(tmp_path / "nowhere")


def test_dtypes_by_name() -> None:
    cpu, gigabyte = torch.device("cpu"), 2**30
    assert pick_dtype("auto", cpu, gigabyte) == torch.float32
    assert pick_dtype("auto", cpu, 30 * gigabyte) == torch.bfloat16
    assert pick_dtype("fp16", cpu, 0) == torch.float16
    assert pick_dtype(torch.float64, cpu, 0) == torch.float64
    with pytest.raises(BadInputError, match='"int8" is no dtype; choose one of auto, bf16'):
        pick_dtype("int8", cpu, 0)


@pytest.fixture
def no_accelerator(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    yield


def test_devices_by_name(no_accelerator: None) -> None:
    assert pick_device("auto") == torch.device("cpu")
    assert pick_device("cpu") == torch.device("cpu")
    with pytest.raises(BadInputError, match='"warp" is no device'):
        pick_device("warp")
    with pytest.raises(BadInputError, match='finds no "cuda" device'):
        pick_device("cuda:0")
