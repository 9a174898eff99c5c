"""The stages: read a prompt, sample image features, decode them, load, start from cold."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from comfyui_blip3o.blip3o_core.drawing.decoding import PixelSettings, decode_features
from comfyui_blip3o.blip3o_core.drawing.flow import sigma_schedule, whole_timesteps
from comfyui_blip3o.blip3o_core.drawing.presets import PRESETS
from comfyui_blip3o.blip3o_core.drawing.sampling import CachedDiT, FeatureSettings, sample_features, to_tokens
from comfyui_blip3o.blip3o_core.language import prefixes
from comfyui_blip3o.blip3o_core.models.decoder import Decoder
from comfyui_blip3o.blip3o_core.models.nextdit import NextDiT
from comfyui_blip3o.blip3o_core.performance.fused_dit import PreparedRuns
from comfyui_blip3o.blip3o_core.performance.recording import (
    StepRecorder,
    can_compile,
    compile_network,
    record_cuda_graph,
)
from common import ROOT, Limits, Mode, Row, compare, count_flops, pytorch_products, weight_bytes
from networks import QUERIES, SizedPipeline
from torch import Tensor

PROMPTS = [
    f"a {colour} {kind} left of a blue square"
    for colour in ("red", "green", "yellow", "purple")
    for kind in ("circle", "triangle")
]


def encode_stage(networks: SizedPipeline, limits: Limits, rounds: int) -> list[Row]:
    """Eight prompts: one at a time, as a batch, and with their common beginning computed once."""
    flops = count_flops(lambda: networks.encode_prompts(PROMPTS[0]))
    moved = weight_bytes(networks.backbone.text) / len(PROMPTS)
    worthwhile = prefixes.WORTHWHILE_TOKENS

    def batch(at_least: int) -> Tensor:
        prefixes.WORTHWHILE_TOKENS = at_least
        try:
            return networks.encode_prompts(PROMPTS)
        finally:
            prefixes.WORTHWHILE_TOKENS = worthwhile

    shared = Mode(lambda: batch(0), len(PROMPTS), flops, moved, "the limit counts the whole prompt")
    modes = {
        "one prompt at a time (plain)": Mode(
            lambda: torch.cat([networks.encode_prompts(prompt) for prompt in PROMPTS]),
            *(len(PROMPTS), flops, weight_bytes(networks.backbone.text)),
        ),
        "batch of 8": Mode(lambda: batch(10**9), len(PROMPTS), flops, moved),
        "batch of 8, common beginning once": shared,
    }
    return compare(
        "encode prompt", networks.size, modes, device=networks.device, rounds=rounds, limits=limits
    )


def plain_loop(dit: NextDiT, conditioning: Tensor, noise: Tensor, settings: FeatureSettings) -> Tensor:
    """Step by step as published: two network calls a step, nothing kept from one call to the next."""
    sigmas = sigma_schedule(settings.steps)
    timesteps = whole_timesteps(sigmas).to(noise.device)
    grid, zeros = noise, torch.zeros_like(conditioning)
    for i in range(settings.steps):
        timestep = timesteps[i].expand(noise.shape[0])
        away = dit(grid.to(conditioning), timestep, zeros).to(grid)
        toward = dit(grid.to(conditioning), timestep, conditioning).to(grid)
        velocity = away + settings.guidance_scale * (toward - away)
        grid = grid + (sigmas[i + 1] - sigmas[i]).item() * velocity
    return to_tokens(grid)


def sampling_stage(networks: SizedPipeline, limits: Limits, rounds: int, batch: int = 1) -> list[Row]:
    """30 steps with guidance: the published loop, the context kept, everything prepared, and diffusers' blocks."""
    dit, device, dtype = networks.dit, networks.device, networks.dtype
    generator = torch.Generator().manual_seed(0)
    conditioning = torch.randn(batch, QUERIES, networks.dit.config.conditioning_dim, generator=generator)
    conditioning = conditioning.to(device, dtype)
    noise = torch.randn(batch, *networks.noise_shape, generator=generator).to(device)
    settings = FeatureSettings()

    def ours(*, is_prepared: bool, recorder: StepRecorder | None = None) -> Tensor:
        prepare = PreparedRuns(recorder) if is_prepared else CachedDiT
        return sample_features(dit, conditioning, noise=noise, settings=settings, prepare=prepare)

    def with_pytorchs_products(run: Callable[[], Tensor]) -> Tensor:
        with pytorch_products():
            return run()

    def recorded(recorder: StepRecorder) -> Tensor:
        return ours(is_prepared=True, recorder=recorder)

    flops = count_flops(lambda: ours(is_prepared=False)) / batch
    moved = settings.steps * weight_bytes(dit) / batch
    once = {"work": batch, "flops": flops, "moved": moved}
    modes = {
        "published loop (plain)": Mode(
            lambda: with_pytorchs_products(lambda: plain_loop(dit, conditioning, noise, settings)),
            *(batch, count_flops(lambda: plain_loop(dit, conditioning, noise, settings)) / batch, 2 * moved),
        ),
        "context kept, guidance in one call": Mode(
            lambda: with_pytorchs_products(lambda: ours(is_prepared=False)), **once
        ),
        "prepared run": Mode(lambda: with_pytorchs_products(lambda: ours(is_prepared=True)), **once),
        "diffusers' Lumina blocks, published loop": Mode(
            _diffusers_loop(networks, conditioning, noise, settings),
            batch,
            note="random weights of the same sizes",
            is_comparable=False,
        ),
    }
    if device.type == "cpu":
        modes["prepared run, oneDNN (what is used)"] = Mode(lambda: ours(is_prepared=True), **once)
        modes["context kept, oneDNN"] = Mode(lambda: ours(is_prepared=False), **once)
    if device.type == "cuda":
        for name, is_compiled in (("recorded as a graph", False), ("compiled and recorded", True)):
            if is_compiled and not can_compile(device):
                continue
            recorder = StepRecorder(record_cuda_graph, is_compiled=is_compiled)
            modes[f"prepared run, {name}"] = Mode(lambda recorder=recorder: recorded(recorder), **once)
    name = "DiT sampling" if batch == 1 else f"DiT sampling, batch {batch}"
    return compare(name, networks.size, modes, device=device, rounds=rounds, limits=limits)


def _diffusers_loop(
    networks: SizedPipeline, conditioning: Tensor, noise: Tensor, settings: FeatureSettings
) -> Callable[[], Tensor]:
    from diffusers import LuminaNextDiT2DModel
    from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina

    config, device, dtype = networks.dit.config, networks.device, networks.dtype
    sigmas, side = sigma_schedule(settings.steps), noise.shape[-1]
    with device:
        network = LuminaNextDiT2DModel(
            **{"sample_size": side, "patch_size": 1, "in_channels": config.in_channels, "qk_norm": True},
            hidden_size=config.dim,
            num_layers=config.layers,
            num_attention_heads=config.heads,
            num_kv_heads=config.kv_heads,
            multiple_of=32,
            ffn_dim_multiplier=config.ffn_dim / (4 * config.dim),
            cross_attention_dim=config.dim,
        ).to(dtype)
    network.eval().requires_grad_(False)
    rotary = get_2d_rotary_pos_embed_lumina(config.head_dim, side, side).to(device)
    context = torch.randn(*conditioning.shape[:2], config.dim, device=device, dtype=dtype)
    mask = torch.ones(context.shape[:2], dtype=torch.int32, device=device)

    def call(grid: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        inputs = (grid.to(dtype), timestep, context, mask, rotary)
        return network(*inputs, cross_attention_kwargs={}, return_dict=False)[0].to(grid)[:, : grid.shape[1]]

    def run() -> Tensor:
        grid = noise
        for i in range(settings.steps):
            timestep = (sigmas[i] * 1000).floor().to(device).expand(len(noise))
            away, toward = call(grid, timestep, torch.zeros_like(context)), call(grid, timestep, context)
            grid = grid + (sigmas[i + 1] - sigmas[i]).item() * (away + 3 * (toward - away))
        return grid

    return run


def decode_stage(networks: SizedPipeline, limits: Limits, rounds: int) -> list[Row]:
    """One picture: the published 50 steps, the fast preset, and what was tried on top of it."""
    decoder, device = networks.decoder, networks.device
    generator = torch.Generator().manual_seed(0)
    channels = decoder.unet.config.cross_attention_dim
    features = torch.randn(4, QUERIES, channels, generator=generator).to(device)
    fast = PRESETS["fast"].pixels
    shape = networks.latent_shape(fast)
    noise = torch.randn(4, *shape, generator=generator).to(device)

    first = SizedPipeline(networks.size, device, networks.dtype).decoder.to(
        memory_format=torch.contiguous_format
    )

    def decode(settings: PixelSettings, count: int = 1, by: Decoder = decoder) -> Tensor:
        return decode_features(by, features[:count], noise=noise[:count], settings=settings)

    def plain() -> Tensor:
        with pytorch_products():
            return decode(PixelSettings(), by=first)

    unet_bytes = weight_bytes(decoder.unet)
    published = (1, count_flops(plain), 50 * unet_bytes)
    flops = count_flops(lambda: decode(fast))
    note = "other steps, another picture: see the quality table"
    modes = {
        "published, Euler 50 (plain)": Mode(plain, *published),
        "published, Euler 50": Mode(lambda: decode(PixelSettings()), *published),
        "fast preset": Mode(
            lambda: decode(fast), 1, flops, fast.steps * unet_bytes, note, is_comparable=False
        ),
        "fast preset, channels first": Mode(
            lambda: decode(fast, by=first), 1, flops, fast.steps * unet_bytes, note, is_comparable=False
        ),
        "fast preset, four at a time": Mode(
            lambda: decode(fast, 4), 4, flops, fast.steps * unet_bytes / 4, note, is_comparable=False
        ),
    }
    if can_compile(device):
        compiled = SizedPipeline(networks.size, device, networks.dtype)
        compile_network(compiled.decoder.unet, device)
        modes["fast preset, compiled"] = Mode(
            *(lambda: decode(fast, by=compiled.decoder), 1, flops, fast.steps * unet_bytes, note),
            is_comparable=False,
        )
    return compare("decode", networks.size, modes, device=device, rounds=rounds, limits=limits)


START_CHILD = """
import json, sys, time
start = {start!r}
sys.path.insert(0, {folder!r})
import common
from comfyui_blip3o import cli
times = []
def mark(step, total, predicted):
    times.append(time.time())
from comfyui_blip3o.blip3o_core.pipeline import load_pipeline
from comfyui_blip3o.blip3o_core.config import BUILT_IN_MODEL
pipeline = load_pipeline(BUILT_IN_MODEL, device="cpu")
ends = []
for seed in range(4):
    pipeline.generate("a red circle left of a blue square", seed=seed, preset={preset!r}, on_feature_step=mark).pictures
    ends.append(time.time())
print(json.dumps([times[0], *ends]))
"""


def start_stage(rounds: int, preset: str) -> list[Row]:
    """The built-in model on the CPU, imports included, in a new process each time."""
    first_step, first, further = [], [], []
    for _ in range(rounds):
        code = START_CHILD.format(start=0, folder=str(Path(__file__).parent), preset=preset)
        start, output = _python(code)
        step, *ends = json.loads(output.splitlines()[-1])
        first_step.append(step - start)
        first.append(ends[0] - start)
        further += [after - before for before, after in zip(ends[:-1], ends[1:], strict=True)]
    stage = f"cold start, preset {preset}"
    return [
        Row(stage, "tiny", "to the first step", statistics.median(first_step)),
        Row(stage, "tiny", "to the first picture", statistics.median(first)),
        Row(stage, "tiny", "each further picture", statistics.median(further)),
    ]


def _python(code: str) -> tuple[float, str]:
    """Time of the start, and what a new process prints."""
    start = time.time()
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=ROOT.parent,
        env=os.environ,
        check=True,
        capture_output=True,
        text=True,
    )
    return start, done.stdout
