"""Our native objects inside ComfyUI against the published numbers, diffusers and the core's own loops."""

import json
import os
import subprocess
from pathlib import Path

import pytest
from comfyui_server import COMFYUI, ROOT, comfyui_python

SCRIPT = Path(__file__).parent / "inside" / "parity.py"
CALL, LOOP = 2e-5, 2e-4
# What is compared -> largest difference, in units of the reference's spread.
TOLERANCES = {
    "dit.velocity": CALL,
    "dit.velocity, partly loaded": CALL,
    "dit.velocity by oneDNN": CALL,
    "sigmas of the simple schedule": 1e-6,
    "KSampler against published features": 1e-4,
    "KSampler against the core's sampler": 1e-4,
    "each of a batch draws the same": CALL,
    "a patched run against the core's sampler": 1e-4,
    "core's compile node draws the same": 1e-4,
    "the run after a patch is the one before it": 0.0,
    "UNet call against diffusers": CALL,
    "UNet of SDXL's topology": CALL,
    "decoder latents against the published ones": LOOP,
    "decoder picture against the published one": LOOP,
    "small VAE decodes as diffusers": CALL,
    "small VAE encodes as diffusers": CALL,
    "SDXL's VAE decodes as diffusers": 1e-4,
    "SDXL's VAE encodes as diffusers": 1e-4,
    "conditioning in fp32": CALL,
    "conditioning in bf16": CALL,
    "conditioning in fp8": 0.4,
    "conditioning, partly loaded": CALL,
    "blank prompt of the decoder": CALL,
    "picture in the prompt": CALL,
    "image features": CALL,
    "LoRA merged into the weight": CALL,
    "LoRA merged against partly loaded": CALL,
    "weights after the LoRA is gone": 0.0,
}
FACTS = {
    "timesteps are the published ones",
    "partly loaded DiT casts at use",
    "SDXL's VAE is ComfyUI's own network",
    "empty negative prompt is zeros",
    "no plain layer left in fp32",
    "no plain layer left in bf16",
    "no plain layer left in fp8",
    "report counts the weights",
    "a LoRA changes the velocity",
    "one context for all steps",
    "one context for a batch",
    "the CPU's linear layers are the core's",
    "core's compile node compiles the network",
    "core's compile node compiles once",
    "no context outlives its run",
    "a patch changes what the same conditioning draws",
    "a hooked prompt is encoded at every step",
    "a hook changes what the prompt draws",
    "training keeps no context",
    "the loader names every network and the time",
    "the loader tells of a device that is too small",
}


@pytest.fixture(scope="module")
def measured(base: Path) -> dict[str, float | bool]:
    run = subprocess.run(
        [comfyui_python(), str(SCRIPT), str(COMFYUI), str(ROOT), str(base / "published")],
        cwd=COMFYUI,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    lines = [line for line in run.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, run.stderr[-4000:]
    return json.loads(lines[0].removeprefix("RESULT "))


@pytest.mark.parametrize("name", TOLERANCES)
def test_numbers_agree(measured: dict[str, float | bool], name: str):
    assert measured[name] <= TOLERANCES[name]


@pytest.mark.parametrize("name", sorted(FACTS))
def test_facts_hold(measured: dict[str, float | bool], name: str):
    assert measured[name] is True


def test_nothing_measured_goes_unchecked(measured: dict[str, float | bool]):
    assert set(measured) == set(TOLERANCES) | FACTS
