"""Compiled networks and recorded steps: the same numbers, nothing made twice, and a way on where they do not work."""

import gc
import weakref
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import tiny_models
import torch
from comfyui_blip3o.blip3o_core import networks as networks_module
from comfyui_blip3o.blip3o_core.drawing.decoding import PixelSettings, decode_features
from comfyui_blip3o.blip3o_core.drawing.sampling import FeatureSettings, sample_features
from comfyui_blip3o.blip3o_core.models.nextdit import NextDiT
from comfyui_blip3o.blip3o_core.performance import linear
from comfyui_blip3o.blip3o_core.performance import recording as compiling
from comfyui_blip3o.blip3o_core.performance.fused_dit import PreparedRuns
from comfyui_blip3o.blip3o_core.performance.recorded_answers import AnswerRecorder
from comfyui_blip3o.blip3o_core.performance.recording import (
    StepRecorder,
    can_compile,
    compile_network,
)
from comfyui_blip3o.blip3o_core.pipeline import load_pipeline
from recordings import Recordings
from torch import Tensor

CPU = torch.device("cpu")
GRID = (4, 4)


RECORDERS: weakref.WeakKeyDictionary[NextDiT, StepRecorder] = weakref.WeakKeyDictionary()


def recorded(dit: NextDiT) -> Recordings:
    recordings = Recordings()
    RECORDERS[dit] = StepRecorder(recordings, is_compiled=False)
    return recordings


def draw(dit: NextDiT, seed: int = 0, batch: int = 2, **settings: object) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    conditioning = torch.randn(batch, 7, dit.config.conditioning_dim, generator=generator)
    noise = torch.randn(batch, dit.config.in_channels, *GRID, generator=generator)
    return sample_features(
        dit,
        conditioning,
        noise=noise,
        settings=FeatureSettings(**{"steps": 4, **settings}),
        prepare=PreparedRuns(RECORDERS.get(dit)),
    )


SETTINGS = (
    {},
    {"sampler": "heun"},
    {"sampler": "ab2"},
    {"sampler": "ab2", "guidance_scale": 1.0},
    {"guidance_interval": (0.3, 0.7)},
)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_replayed_steps_draw_what_called_ones_draw(settings: dict[str, object]) -> None:
    dit, plain = tiny_models.build_dit(), tiny_models.build_dit()
    recordings = recorded(dit)
    for seed in (0, 1):  # the second run meets the first one's recordings with another prompt in them
        ours, expected = draw(dit, seed, **settings), draw(plain, seed, **settings)
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    assert recordings.replayed >= 8


def test_a_shape_is_recorded_once_and_only_the_latest_are_kept() -> None:
    dit = tiny_models.build_dit()
    recordings = recorded(dit)
    for seed in range(3):
        draw(dit, seed)
    assert recordings.made == 1
    draw(dit, guidance_interval=(0.3, 0.7))  # steps without guidance have half the rows
    assert recordings.made == 2
    for batch in (3, 4, 5):
        draw(dit, batch=batch)
    assert recordings.made == 5
    draw(dit, guidance_scale=1.0)
    assert recordings.made == 5
    draw(dit)  # used least lately, and so not kept
    assert recordings.made == 6


def test_weights_changed_in_place_count_and_moved_ones_are_recorded_again() -> None:
    dit, plain = tiny_models.build_dit(), tiny_models.build_dit()
    recordings = recorded(dit)
    draw(dit)
    for network in (dit, plain):
        network.layers[0].attn1.to_v.weight.mul_(2)
    torch.testing.assert_close(draw(dit), draw(plain), rtol=1e-5, atol=1e-5)
    assert recordings.made == 1
    for network in (dit, plain):
        layer = network.layers[0].attn1.to_v
        layer.weight = torch.nn.Parameter(layer.weight * -1, requires_grad=False)
    torch.testing.assert_close(draw(dit), draw(plain), rtol=1e-5, atol=1e-5)
    assert recordings.made == 2


def test_joined_weights_are_not_joined_again_in_the_next_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where projections of one input are joined."""
    monkeypatch.setattr(linear, "JOINING_DEVICES", ("cpu",))
    dit, plain = tiny_models.build_dit(), tiny_models.build_dit()
    recordings = recorded(dit)
    ours = [draw(dit, seed) for seed in (0, 1)]
    assert dit.layers[0].attn1.to_k.weight.data_ptr() > dit.layers[0].attn1.to_q.weight.data_ptr()
    monkeypatch.setattr(linear, "JOINING_DEVICES", ())
    for seed in (0, 1):
        torch.testing.assert_close(ours[seed], draw(plain, seed), rtol=1e-5, atol=1e-5)
    assert recordings.made == 1
    assert {key: value.shape for key, value in dit.state_dict().items()} == {
        key: value.shape for key, value in plain.state_dict().items()
    }


def test_what_cannot_be_recorded_is_called(caplog: pytest.LogCaptureFixture) -> None:
    def broken(step: object, inputs: object) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    dit = tiny_models.build_dit()
    expected = draw(dit)
    RECORDERS[dit] = StepRecorder(broken, is_compiled=False)
    for _ in range(2):
        torch.testing.assert_close(draw(dit), expected, rtol=0, atol=0)
    assert caplog.text.count("cannot be recorded") == 1


def test_what_cannot_be_compiled_is_recorded_all_the_same(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*inputs: object) -> None:
        raise RuntimeError("no such compiler")

    monkeypatch.setattr(torch, "compile", lambda function, **options: broken)
    dit, plain = tiny_models.build_dit(), tiny_models.build_dit()
    recordings = Recordings()
    RECORDERS[dit] = StepRecorder(recordings, is_compiled=True)
    for seed in (0, 1):
        torch.testing.assert_close(draw(dit, seed), draw(plain, seed), rtol=1e-5, atol=1e-5)
    assert recordings.made == 1
    assert caplog.text.count("cannot be compiled") == 1


def test_what_was_recorded_in_inference_mode_serves_outside_of_it() -> None:
    dit, plain = tiny_models.build_dit(), tiny_models.build_dit()
    recordings = recorded(dit)
    with torch.inference_mode():
        draw(dit)
    torch.testing.assert_close(draw(dit, seed=1), draw(plain, seed=1), rtol=1e-5, atol=1e-5)
    assert recordings.made == 1


def test_an_unloaded_network_is_gone_at_once(tiny_folder: Path) -> None:
    pipeline = load_pipeline(tiny_folder, dtype="fp32", device="cpu")
    recordings = Recordings()
    pipeline.load("dit").networks.record("dit", StepRecorder(recordings, is_compiled=False))
    pipeline.sample_features(torch.zeros(1, 4, 32), [0])
    assert recordings.made == 1
    left = weakref.ref(pipeline.dit)
    gc.collect()
    gc.disable()
    try:
        pipeline.unload("dit")
        assert left() is None
    finally:
        gc.enable()


def test_an_offloaded_network_leaves_no_recording_behind(tiny_folder: Path) -> None:
    pipeline = load_pipeline(tiny_folder, dtype="fp32", device="cpu", offload=True)
    plain = load_pipeline(tiny_folder, dtype="fp32", device="cpu")
    recordings = Recordings()
    pipeline.load("dit").networks.record("dit", StepRecorder(recordings, is_compiled=False))
    conditioning = plain.encode_prompts("a red circle")
    for made in (1, 2):
        ours = pipeline.sample_features(conditioning, [0])
        torch.testing.assert_close(ours, plain.sample_features(conditioning, [0]), rtol=1e-5, atol=1e-5)
        assert recordings.made == made


def test_without_a_gpu_nothing_is_compiled_and_that_is_said(
    tiny_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pipeline = load_pipeline(tiny_folder, dtype="fp32", device="cpu", compile=True)
    pipeline.load("dit", "backbone")
    assert pipeline.networks.prepare_run.recorder is None
    assert pipeline.networks.answer_steps is None
    assert pipeline.networks.before_step is None
    assert pipeline.decoder.unet._compiled_call_impl is None
    assert "nothing to gain without a CUDA GPU" in caplog.text


def test_on_a_gpu_all_networks_that_repeat_steps_are_recorded(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = load_pipeline(tiny_folder, dtype="fp32", device="cpu")
    compiled: list[torch.nn.Module] = []
    monkeypatch.setattr(
        networks_module, "compile_network", lambda network, device: compiled.append(network) or True
    )
    monkeypatch.setattr(networks_module, "can_compile", lambda device: False)
    pipeline.networks.compile = True
    pipeline.load("dit", "backbone")
    assert isinstance(pipeline.networks.prepare_run.recorder, StepRecorder)
    assert isinstance(pipeline.networks.answer_steps.__self__, AnswerRecorder)
    assert compiled == [pipeline.decoder.unet]
    assert pipeline.networks.before_step is not None


def test_without_a_compiler_everything_goes_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*unused: object, **options: object) -> None:
        raise RuntimeError("no compiler found")

    monkeypatch.setattr(torch, "compile", broken)
    compiling.can_compile.cache_clear()
    unet = torch.nn.Linear(2, 2)
    try:
        assert not compile_network(unet, CPU)
        assert not can_compile(CPU)
    finally:
        compiling.can_compile.cache_clear()
    assert unet._compiled_call_impl is None
    assert caplog.text.count("no compiler found") == 1


def needs_compiler() -> None:
    if not can_compile(CPU):
        pytest.skip("no C++ compiler on this machine")


@pytest.mark.slow
def test_all_layers_share_one_compiled_program_that_draws_the_same() -> None:
    needs_compiler()
    dit, plain = tiny_models.build_dit(), tiny_models.build_dit()
    assert len(dit.layers) > 1
    RECORDERS[dit] = StepRecorder(Recordings(), is_compiled=True)
    counts = torch._dynamo.utils.counters["stats"]
    before = counts["unique_graphs"]
    for seed in (0, 1):
        torch.testing.assert_close(draw(dit, seed), draw(plain, seed), rtol=1e-4, atol=1e-4)
    assert counts["unique_graphs"] == before + 1


@pytest.mark.slow
def test_a_compiled_decoder_paints_the_same_and_compiles_once(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the last stage, the machine code, which takes a minute."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    monkeypatch.setattr(compiling, "can_compile", lambda device: True)
    decoder = load_pipeline(tiny_folder, dtype="fp32", device="cpu").decoder
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(1, 4, decoder.unet.config.cross_attention_dim, generator=generator)
    side = decoder.unet.config.sample_size
    noise = torch.randn(1, decoder.latent_channels, side, side, generator=generator)
    settings = PixelSettings(steps=4, sampler="dpmpp_2m")
    plain = decode_features(decoder, features, noise=noise, settings=settings)
    counts = torch._dynamo.utils.counters["stats"]
    assert compile_network(decoder.unet, CPU)
    torch.testing.assert_close(
        decode_features(decoder, features, noise=noise, settings=settings), plain, rtol=1e-4, atol=1e-4
    )
    compiled = counts["unique_graphs"]
    decode_features(decoder, features.flip(1), noise=noise, settings=replace(settings, steps=5))
    assert counts["unique_graphs"] == compiled
