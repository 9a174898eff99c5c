"""Memory and time of whole uses, drawing and answering, for each way to keep the networks on a card."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from answers import question
from comfyui_blip3o.blip3o_core.checkpoints.memory_plan import CONTEXT_BYTES, USES, MemoryPlan, Way, plan_way
from comfyui_blip3o.blip3o_core.checkpoints.safetensor_files import TensorInfo
from comfyui_blip3o.blip3o_core.drawing.presets import PRESETS
from comfyui_blip3o.blip3o_core.language.answers import AnswerSettings, continue_rows, encode_chat
from comfyui_blip3o.blip3o_core.units import GIB
from common import Row
from networks import SizedPipeline
from torch import Tensor

ANSWER_TOKENS = 16


@dataclass(frozen=True)
class Case:
    """A way, and the size of the card, GiB, that it is meant for."""

    way: Way
    card: float


CASES = {
    "draw": (
        Case(Way(), 32),
        Case(Way(offload=True), 17.5),
        Case(Way(offload=True, quantize="nf4"), 8),
        Case(Way(offload=True, stream=True), 8),
        Case(Way(offload=True, stream=True, tiled=True), 8),
    ),
    "answer": (
        Case(Way(), 17.5),
        Case(Way(quantize="fp8"), 12),
        Case(Way(quantize="int8"), 12),
        Case(Way(quantize="nf4"), 8),
        Case(Way(stream=True), 8),
    ),
}


def memory_stage(size: str, device: torch.device, dtype: torch.dtype, rounds: int) -> list[Row]:
    """A picture, preset fast, and an answer about one, in each way; on a GPU under the cap of the card it is meant for."""
    rows: list[Row] = []
    for use, run in (("draw", _draw), ("answer", _answer)):
        plain: Row | None = None
        picture: Tensor | None = None
        for case in CASES[use]:
            options = {key: value for key, value in asdict(case.way).items() if key != "tiled"}
            networks = SizedPipeline(size, device, dtype, **options).load(*USES[use])
            row = Row(f"whole use: {use}", size, case.way.options or "everything on the device (plain)", None)
            row.note = f"plan: {planned(networks, use, case).peak_bytes / 1e9:.3g} GB, {CONTEXT_BYTES / 1e9:.2g} of it the driver's"
            if device.type == "cuda":
                row.note += f"; memory limited to a {case.card:g} GiB card's"
            try:
                made, row.seconds, row.peak_device_gb = _measure(
                    partial(run, networks, case.way), case, device, rounds
                )
            except torch.OutOfMemoryError:
                row.note = "did not fit; " + row.note
            else:
                if plain is None:
                    plain, picture = row, made
                row.gain = plain.seconds / row.seconds
                if made is not None and row is not plain and case.way.quantize is None:
                    row.difference = ((made - picture).abs().max() / picture.std()).item()
            del networks
            gc.collect()  # what streams layers refers to itself in circles
            rows.append(row)
    return rows


def planned(networks: SizedPipeline, use: str, case: Case) -> MemoryPlan:
    """What the plan says about networks of this size."""
    shapes = SizedPipeline(networks.size, torch.device("meta"), networks.dtype)
    tensors = {name: _infos(shapes.networks.read(name, shapes.device)) for name in USES[use]}
    configs = {}
    if "decoder" in tensors:
        decoder = networks.decoder
        configs = {"unet": decoder.unet.config, "vae": decoder.vae.config}
    return plan_way(tensors, configs, case.way, use, int(case.card * GIB))


def _infos(network: torch.nn.Module) -> dict[str, TensorInfo]:
    return {
        key: TensorInfo(Path(), key, tensor.dtype, tuple(tensor.shape), tensor.nbytes)
        for key, tensor in network.state_dict().items()
    }


def _measure(
    run: Callable[[], Tensor | None], case: Case, device: torch.device, rounds: int
) -> tuple[Tensor | None, float, float | None]:
    """What was made, seconds (median), and the most memory on the device, GB, the driver's own share left out."""
    is_cuda = device.type == "cuda"
    if is_cuda:
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, (case.card * GIB - CONTEXT_BYTES) / total))
        torch.cuda.reset_peak_memory_stats()
    try:
        times = []
        for _ in range(rounds + 1):  # the first one warms up
            start = time.perf_counter()
            made = run()
            times.append(time.perf_counter() - start)
    finally:
        if is_cuda:
            torch.cuda.set_per_process_memory_fraction(1.0)
    peak = torch.cuda.max_memory_allocated() / 1e9 if is_cuda else None
    return made, statistics.median(times[1:]), peak


def _draw(networks: SizedPipeline, way: Way) -> Tensor:
    """A picture on the CPU."""
    fast = PRESETS["fast"]
    features = networks.sample_features(
        networks.encode_prompts("a red circle left of a blue square"), [0], settings=fast.features
    )
    return networks.decode(features, [0], settings=replace(fast.pixels, tiled=way.tiled))


def _answer(networks: SizedPipeline, way: Way) -> None:
    tokenizer = networks.tokenizer
    tokenizer.__dict__["stop_tokens"] = frozenset()  # answers of one length in all ways
    turn, area = question(networks.size)
    with networks.networks.use("backbone") as backbone:
        row = encode_chat(backbone, tokenizer, [turn], area)
        settings = AnswerSettings(max_new_tokens=ANSWER_TOKENS)
        continue_rows(backbone, tokenizer, [row], device=networks.device, settings=settings)
