"""Gain of the cached context, the analytic zero branch and batched guidance over the plain sampling loop.

Both loops run in turn in one process on the same random weights; quoted are medians and the ratio of each pair.

    python benchmarks/feature_sampling.py [--size tiny|middle|full] [--batch 1] [--steps 30] [--device cpu] [--json FILE]

The plain loop is the published one: two whole network calls a step, each with the conditioning's keys and values made
anew, the unconditional one from a conditioning of zeros.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
if "comfyui_blip3o" not in sys.modules:  # as ComfyUI loads the checkout, without an install
    spec = importlib.util.spec_from_file_location("comfyui_blip3o", ROOT / "__init__.py")
    sys.modules["comfyui_blip3o"] = package = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(package)

from comfyui_blip3o.blip3o_core.config import NextDiTConfig  # noqa: E402
from comfyui_blip3o.blip3o_core.flow import sigma_schedule, whole_timesteps  # noqa: E402
from comfyui_blip3o.blip3o_core.models.nextdit import NextDiT  # noqa: E402
from comfyui_blip3o.blip3o_core.sampling import FeatureSettings, sample_features, to_tokens  # noqa: E402

SIZES = {
    "tiny": NextDiTConfig(128, 5, 4, 4, 48, 128, 352, 128),
    "middle": NextDiTConfig(768, 12, 12, 12, 768, 1536, 2048, 768),
    "full": NextDiTConfig(),
}
TOKENS, SIDE = 64, 8


@torch.no_grad()
def plain_loop(dit: NextDiT, conditioning: Tensor, noise: Tensor, settings: FeatureSettings) -> Tensor:
    """Section by section as published: nothing is kept from one network call to the next."""
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


def random_dit(config: NextDiTConfig, device: torch.device, dtype: torch.dtype) -> NextDiT:
    """A DiT of random weights, made on the device; gates off zero, so that every branch counts."""
    torch.manual_seed(0)
    with device:
        dit = NextDiT(config).to(dtype)
        for layer in dit.layers:
            torch.nn.init.normal_(layer.gate)
    return dit.eval().requires_grad_(False)


def seconds(run, device: torch.device) -> tuple[float, Tensor]:
    start = time.perf_counter()
    result = run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", default="middle", choices=SIZES)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    dit = random_dit(SIZES[arguments.size], device, dtype)
    conditioning = torch.randn(
        arguments.batch, TOKENS, dit.config.conditioning_dim, device=device, dtype=dtype
    )
    noise = torch.randn(arguments.batch, dit.config.in_channels, SIDE, SIDE, device=device)
    settings = FeatureSettings(steps=arguments.steps)

    def plain() -> Tensor:
        return plain_loop(dit, conditioning, noise, settings)

    def ours() -> Tensor:
        return sample_features(dit, conditioning, noise=noise, settings=settings)

    plain(), ours()
    times: dict[str, list[float]] = {"plain": [], "ours": []}
    for _ in range(arguments.rounds):
        for name, run in (("plain", plain), ("ours", ours)):
            elapsed, result = seconds(run, device)
            times[name].append(elapsed)
    difference = (plain() - ours()).abs().max().item() / result.float().std().item()
    ratios = [a / b for a, b in zip(times["plain"], times["ours"], strict=True)]
    row = {
        "size": arguments.size,
        "batch": arguments.batch,
        "steps": arguments.steps,
        "device": torch.cuda.get_device_name()
        if device.type == "cuda"
        else f"cpu, {torch.get_num_threads()} threads",
        "dtype": str(dtype).removeprefix("torch."),
        "plain_seconds": statistics.median(times["plain"]),
        "ours_seconds": statistics.median(times["ours"]),
        "ratio": statistics.median(ratios),
        "max_difference_in_std": difference,
    }
    print("| " + " | ".join(row) + " |")
    print("|" + " --- |" * len(row))
    print(
        "| "
        + " | ".join(f"{value:.3g}" if isinstance(value, float) else str(value) for value in row.values())
        + " |"
    )
    if arguments.json:
        arguments.json.write_text(json.dumps(row, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main()
