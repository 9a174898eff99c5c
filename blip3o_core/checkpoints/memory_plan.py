"""What goes where on a card of a given size: computed from the headers of the weight files, nothing is loaded."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..config import TILE_SIDE, pixels_per_latent
from ..errors import BadInputError
from ..performance.quantize import FORMATS, SKIPPED, SMALLEST_WEIGHTS
from ..units import GIB, format_bytes
from .layout import DECODER_NETWORKS, CheckpointFiles
from .match import needed_tensors
from .safetensor_files import TensorInfo

USES = {
    "draw": ("backbone", "dit", "decoder"),
    "answer": ("backbone",),
    "vary": ("image_encoder", "dit", "decoder"),
}
# The driver's own share of a card.
CONTEXT_BYTES = GIB // 2
HALF = 2  # bytes of bf16 and fp16
# Tokens of a prompt and of a question with a picture at usual size, answer included.
PROMPT_TOKENS, QUESTION_TOKENS = 192, 1792
# Tensors of its widest level that the VAE holds at the same time, and of its first level the UNet, skips included.
VAE_TENSORS, UNET_TENSORS = 4, 30
# A plan that takes more of a card than this leaves a desktop's windows too little.
ROOMY = 0.9
SPEED_SAMPLE_BYTES = 128 * 2**20


@dataclass(frozen=True)
class Way:
    """How networks are kept; the options that load_pipeline and the command line have under the same names.

    Attributes:
        offload: one network on the card at a time.
        quantize: format of the backbone's and the image encoder's linear layers; None = as in the file, in 16 bits.
        stream: backbone and image encoder layer by layer.
        tiled: decode pictures in tiles.
    """

    offload: bool = False
    quantize: str | None = None
    stream: bool = False
    tiled: bool = False

    @property
    def options(self) -> str:
        """As options of the command line."""
        words = [
            "--offload" if self.offload else "",
            f"--quantize {self.quantize}" if self.quantize else "",
            "--stream" if self.stream else "",
            "--tiled" if self.tiled else "",
        ]
        return " ".join(word for word in words if word)


# Best first; int8 loses less than fp8 at the same size (benchmarks/results). Drawing calls the backbone once per prompt,
# so moving its layers costs little and loses nothing; answering calls it for every word.
WAYS = {
    "draw": (Way(), Way(offload=True), Way(True, stream=True), Way(True, stream=True, tiled=True)),
    "answer": (Way(), Way(quantize="int8"), Way(quantize="nf4"), Way(stream=True)),
    "vary": (Way(), Way(offload=True), Way(True, stream=True), Way(True, stream=True, tiled=True)),
}


@dataclass(frozen=True)
class Placement:
    """Where one network lies."""

    component: str
    place: str
    format: str
    device_bytes: int


@dataclass(frozen=True)
class Phase:
    """One step of the work and the most memory it takes on the card."""

    name: str
    peak_bytes: int


@dataclass(frozen=True)
class MemoryPlan:
    """What to do on a card of `budget_bytes`.

    Attributes:
        way: the best one that fits, or the smallest one when none does.
        load_seconds: reading the weights once from disk, None when not measured.
        smaller: options that need clearly less, and how much, where the plan leaves a desktop little room; else None.
    """

    use: str
    budget_bytes: int
    way: Way
    placements: tuple[Placement, ...]
    phases: tuple[Phase, ...]
    load_bytes: int
    load_seconds: float | None = None
    smaller: tuple[str, int] | None = None

    @property
    def peak_bytes(self) -> int:
        return max(phase.peak_bytes for phase in self.phases)

    @property
    def fits(self) -> bool:
        return self.peak_bytes <= self.budget_bytes

    def __str__(self) -> str:
        size = f"{self.budget_bytes / GIB:.3g} GB"
        if not self.fits:
            head = f"To {self.use} on {size}: too small, {format_bytes(self.peak_bytes)} are needed at least."
        else:
            head = f"To {self.use} on {size}: {self.way.options or 'no options needed'}"
        lines = [head]
        for each in self.placements:
            lines.append(
                f"  {each.component:14} {format_bytes(each.device_bytes):>9}  {each.format:20} {each.place}"
            )
        if self.smaller:
            options, peak = self.smaller
            lines.append(
                f"  beside a desktop that takes some of the card: {options}, at most {format_bytes(peak)}"
            )
        lines += [f"  {phase.name:22} at most {format_bytes(phase.peak_bytes)}" for phase in self.phases]
        read = f"  reads {format_bytes(self.load_bytes)} from disk"
        if self.load_seconds is not None:
            read += f", about {self.load_seconds:.0f} s on this one"
        return "\n".join([*lines, read])


def parse_memory(text: str) -> int:
    """Bytes of a size like "8GB", "8", "7.5 GiB" or "6000MB"; GB and GiB both mean what is printed on a card.

    Raises:
        BadInputError: not a size.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(g|m)?i?b?\s*", text.lower())
    if not found or float(found[1]) == 0:
        raise BadInputError(f'"{text}" is no amount of memory.\nWrite it like 8GB or 7.5GB.')
    return int(float(found[1]) * (2**20 if found[2] == "m" else GIB))


def plan_memory(
    files: CheckpointFiles, budget_bytes: int, use: str = "draw", *, bytes_per_second: float | None = None
) -> MemoryPlan:
    """The best way to use a checkpoint on a card of a size.

    Args:
        use: "draw" from prompts, "answer" questions, or "vary" pictures.
        bytes_per_second: of the disk, see measure_disk.

    Raises:
        MissingFilesError, WrongCheckpointError: a network of that use cannot be loaded.
    """
    tensors = {name: needed_tensors(files, name) for name in USES[use]}
    configs = {part: files.decoder_config(part) for part in DECODER_NETWORKS} if "decoder" in tensors else {}
    plans = [plan_way(tensors, configs, way, use, budget_bytes, bytes_per_second) for way in WAYS[use]]
    best = next((plan for plan in plans if plan.fits), None)
    if best is None:
        return min(plans, key=lambda plan: plan.peak_bytes)
    if best.peak_bytes > ROOMY * budget_bytes:
        smaller = [plan for plan in plans if plan.peak_bytes < ROOMY * best.peak_bytes]
        if smaller:
            return replace(best, smaller=(smaller[0].way.options, smaller[0].peak_bytes))
    return best


def network_bytes(tensors: Mapping[str, TensorInfo], weight_format: str | None = None) -> int:
    """Bytes of a network in 16 bits, or with its large linear layers in one of quantize.FORMATS."""
    total = 0.0
    for key, info in tensors.items():
        count = _count(info)
        if weight_format is not None and is_quantizable(key, info):
            total += count * FORMATS[weight_format]
        else:
            total += count * HALF
    return int(total)


def is_quantizable(key: str, info: TensorInfo) -> bool:
    """Whether a tensor is the weight of a layer that quantize_network exchanges."""
    *_, layer, name = ("", *key.split("."))
    is_linear = name == "weight" and len(info.shape) == 2 and "embed" not in layer
    return is_linear and layer not in SKIPPED and _count(info) >= SMALLEST_WEIGHTS


def measure_disk(path: Path) -> float:
    """Bytes per second at which the beginning of a file is read, past the system's cache where it allows that."""
    with path.open("rb", buffering=0) as file:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        start = time.perf_counter()
        read = 0
        while read < SPEED_SAMPLE_BYTES and (chunk := file.read(8 * 2**20)):
            read += len(chunk)
        return max(read, 1) / max(time.perf_counter() - start, 1e-6)


def largest_file(files: CheckpointFiles) -> Path:
    """The weight file to measure a disk with."""
    return max({info.path for info in files.tensors.values()}, key=lambda path: path.stat().st_size)


def plan_way(
    tensors: Mapping[str, Mapping[str, TensorInfo]],
    decoder_configs: Mapping[str, Mapping[str, Any]],
    way: Way,
    use: str,
    budget_bytes: int,
    bytes_per_second: float | None = None,
) -> MemoryPlan:
    """What one way takes.

    Args:
        tensors: of each network of the use, as needed_tensors gives them.
        decoder_configs: of "unet" and "vae"; needed when the use has the decoder.
    """
    placements, sizes = [], {}
    for name, its in tensors.items():
        is_large = name in ("backbone", "image_encoder")
        weight_format = way.quantize if is_large else None
        sizes[name] = network_bytes(its, weight_format)
        place = "on the card while it works" if way.offload else "stays on the card"
        if way.stream and is_large:
            # The layer that computes and the one that is fetched meanwhile.
            sizes[name] = 2 * max(_count(info) * HALF for info in its.values())
            place = "in main memory, layer by layer on the card"
        words = f"{weight_format} linear layers" if weight_format else "16 bits"
        placements.append(Placement(name, place, words, sizes[name]))
    phases = tuple(
        Phase(word, CONTEXT_BYTES + working + (sizes[name] if way.offload else sum(sizes.values())))
        for word, name, working in _work(tensors, decoder_configs, way, use)
    )
    load_bytes = sum(info.nbytes for its in tensors.values() for info in its.values())
    seconds = None if bytes_per_second is None else load_bytes / bytes_per_second
    return MemoryPlan(use, budget_bytes, way, tuple(placements), phases, load_bytes, seconds)


def _work(
    tensors: Mapping[str, Mapping[str, TensorInfo]],
    decoder_configs: Mapping[str, Mapping[str, Any]],
    way: Way,
    use: str,
) -> list[tuple[str, str, int]]:
    """(what is done, by which network, bytes beside the weights) of each phase of a use."""
    phases = []
    if "backbone" in tensors:
        tokens = QUESTION_TOKENS if use == "answer" else PROMPT_TOKENS
        word = "answering" if use == "answer" else "reading the prompt"
        phases.append((word, "backbone", _backbone_bytes(tensors["backbone"], tokens)))
    if "image_encoder" in tensors:
        phases.append(("encoding the picture", "image_encoder", _encoder_bytes(tensors["image_encoder"])))
    if "dit" in tensors:
        phases.append(("sampling features", "dit", _dit_bytes(tensors["dit"])))
    if "decoder" in tensors:
        unet, vae = decoder_configs["unet"], decoder_configs["vae"]
        side = unet["sample_size"] * pixels_per_latent(vae)
        phases.append(("painting", "decoder", painting_bytes(unet, vae, (side, side), is_tiled=way.tiled)))
    return phases


def _backbone_bytes(tensors: Mapping[str, TensorInfo], tokens: int) -> int:
    vocabulary, width = tensors["text.embed_tokens.weight"].shape
    inner = tensors["text.layers.0.mlp.gate_proj.weight"].shape[0]
    kept = sum(info.shape[0] for key, info in tensors.items() if re.search(r"[kv]_proj\.weight$", key))
    # Of one layer: the residual, the normed, q, k, v, attended, and three of the feed-forward; logits of one token.
    return tokens * (8 * width + 3 * inner + kept) * HALF + 3 * vocabulary * 4


def _encoder_bytes(tensors: Mapping[str, TensorInfo]) -> int:
    tokens, width = tensors["pos_embed"].shape[1:]
    inner = tensors["blocks.0.mlp.fc1.weight"].shape[0]
    return 2 * tokens * (8 * width + 2 * inner) * HALF


def _dit_bytes(tensors: Mapping[str, TensorInfo]) -> int:
    layers = sum(key.endswith(".gate") for key in tensors)
    width = tensors["layers.0.attn1.to_q.weight"].shape[0]
    # Of both guidance branches: keys and values of 64 tokens per layer, and some 20 tensors of one layer.
    return 2 * 64 * width * (2 * layers + 20) * HALF + 64 * 2**20


def painting_bytes(
    unet: Mapping[str, Any],
    vae: Mapping[str, Any],
    size: tuple[int, int],
    *,
    is_tiled: bool,
    number_bytes: int = HALF,
    pictures: int = 1,
) -> int:
    """What the decoder needs beside its weights to paint pictures with guidance.

    Args:
        unet, vae: configurations of the decoder's networks.
        size: (height, width) in pixels.
        number_bytes: of a number in the networks' arithmetic.
        pictures: in one call of the UNet; the VAE paints them one by one.
    """
    height, width = size
    levels = vae["block_out_channels"]
    scale = pixels_per_latent(vae)
    tile = TILE_SIDE if is_tiled else max(size)
    # Its last level reads the channels of the one below at full size.
    pixels = VAE_TENSORS * min(height, tile) * min(width, tile) * levels[min(1, len(levels) - 1)]
    cells = pictures * (height // scale) * (width // scale)
    latents = 2 * UNET_TENSORS * cells * unet["block_out_channels"][0]
    return max(pixels, latents) * number_bytes


def _count(info: TensorInfo) -> int:
    return info.nbytes // info.dtype.itemsize


def plan_json(plan: MemoryPlan) -> dict[str, Any]:
    """A plan for scripts."""
    return {
        "use": plan.use,
        "budget_bytes": plan.budget_bytes,
        "fits": plan.fits,
        "options": plan.way.options,
        "components": {
            each.component: {"bytes": each.device_bytes, "format": each.format, "place": each.place}
            for each in plan.placements
        },
        "peak_bytes": {phase.name: phase.peak_bytes for phase in plan.phases},
        "load_bytes": plan.load_bytes,
        "load_seconds": plan.load_seconds,
    }
