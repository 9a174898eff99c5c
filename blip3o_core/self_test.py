"""A self-test of seconds: what the built-in model computes here, beside numbers that were recorded where all tests pass.

Recorded again, on purpose only, by `python -m comfyui_blip3o.blip3o_core.self_test`.

A changed library can make every answer wrong without any error, e.g. by no longer handing keys and values on. So the
cache is also held against a whole computation, which needs no recorded numbers.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import DynamicCache

from .config import BUILT_IN_MODEL
from .devices import pick_device
from .drawing.decoding import PixelSettings
from .drawing.sampling import FeatureSettings
from .files import replacing
from .language.answers import AnswerSettings, Turn, continue_rows, encode_chat
from .language.prefixes import KeptChat
from .language.rows import embed_rows, padded_positions, pixel_limits
from .pipeline import Blip3oPipeline, load_pipeline
from .untrusted import read_json

RECORDED = Path(__file__).resolve().parent / "assets" / "self_test.json"
# In standard deviations. The same numbers from one thread and two, and from SSE4, AVX2 and AVX-512 code, differ by 1.2e-5
# at most (pixels; features by 2e-6). Computed in fp16 they differ by 4e-3 (features) and 2e-2 (pixels), in bf16 by 2e-2
# and 8e-2; a cache that is not read moves the next word's scores by more than 4.
TOLERANCE = 1e-3
# Other kernels, and convolutions that may round to TF32, which has the digits of fp16.
GPU_TOLERANCE = 2e-2
# Kept of each tensor.
VALUES = 256

PROMPT = "a red circle left of a blue square"
# Of their answers' words each leads the next best by more than 1 in its score, so that no rounding changes one.
QUESTIONS = ("What is in this picture?", "What shape is the blue one?", "Describe this picture again.")
SEED = 7
FEATURE_SETTINGS = FeatureSettings(steps=8)
PIXEL_SETTINGS = PixelSettings(steps=4)
ANSWER_SETTINGS = AnswerSettings(max_new_tokens=32)


@dataclass(frozen=True)
class SelfCheck:
    """One thing that was computed.

    Attributes:
        what: in words.
        difference: the largest, in standard deviations of what it is held against; None = words, which are equal or not.
        tolerance: largest difference allowed.
        problem: what is wrong; empty = nothing.
        is_on_gpu: computed there; everything else on the CPU.
    """

    what: str
    difference: float | None
    tolerance: float | None
    problem: str = ""
    is_on_gpu: bool = False


WORDS = {
    "features": "features of a drawing",
    "picture": "pixels of a drawing",
    "answer": "words of an answer",
    "chat": "words of a chat's later answers",
    "image_encoder": "features of a picture (EVA-CLIP)",
}


@torch.no_grad()
def run_self_test() -> tuple[list[SelfCheck], float]:
    """All checks in float32 on the CPU, and a drawing's features on the GPU too where there is one; and the seconds they took.

    Raises:
        Blip3oError, OSError: the built-in model or the recorded numbers cannot be read.
    """
    start = time.perf_counter()
    recorded = read_json(RECORDED)
    with _one_thread():
        pipeline = load_pipeline(BUILT_IN_MODEL, dtype="fp32", device="cpu")
        found = compute(pipeline)
        checks = [_compare(words, found[name], recorded[name], TOLERANCE) for name, words in WORDS.items()]
        checks.append(_check_cache(pipeline))
    device = pick_device("auto")
    if device.type != "cpu":
        checks.append(_check_gpu(device, found["features"]))
    return checks, time.perf_counter() - start


def _check_gpu(device: torch.device, wanted: list[float]) -> SelfCheck:
    """A drawing's features on the GPU beside those that the CPU computed."""
    what = "features of a drawing on the GPU, beside the CPU's"
    try:
        found = _some(_features(load_pipeline(BUILT_IN_MODEL, dtype="fp32", device=device)))
    except RuntimeError as error:  # of the driver: no memory left, no code for this GPU
        return SelfCheck(what, None, GPU_TOLERANCE, f"stopped with: {str(error).splitlines()[0]}", True)
    return replace(_compare(what, found, wanted, GPU_TOLERANCE), is_on_gpu=True)


def compute(pipeline: Blip3oPipeline) -> dict[str, list[Any]]:
    """What is recorded: values of tensors, token ids of answers."""
    features = _features(pipeline)
    answer, *later = _chat(pipeline)
    return {
        "features": _some(features),
        "picture": _some(pipeline.decode(features, [SEED], settings=PIXEL_SETTINGS)),
        "answer": answer,
        "chat": [token for tokens in later for token in tokens],
        "image_encoder": _some(pipeline.encode_images([_picture()])),
    }


@torch.no_grad()
def record(path: Path = RECORDED) -> None:
    """Write what this computer computes as the numbers that others are held against."""
    found = compute(load_pipeline(BUILT_IN_MODEL, dtype="fp32", device="cpu"))
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(values)}" for name, values in found.items())
    with replacing(path) as temporary:
        temporary.write_text(f"{{\n{lines}\n}}\n", "utf-8")


@contextmanager
def _one_thread() -> Iterator[None]:
    """Networks this small take ten times longer with threads that wait for each other on a busy computer."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _features(pipeline: Blip3oPipeline) -> Tensor:
    return pipeline.sample_features(
        pipeline.encode_prompts(PROMPT),
        [SEED],
        settings=FEATURE_SETTINGS,
        negative_conditioning=pipeline.encode_prompts(" ", use_template=False),
    )


def _picture() -> Image.Image:
    # Rectangles: every version of Pillow fills the same pixels.
    picture = Image.new("RGB", (128, 128), "white")
    picture.paste("red", (16, 40, 56, 80))
    picture.paste("blue", (76, 44, 112, 80))
    return picture


def _chat(pipeline: Blip3oPipeline) -> list[list[int]]:
    """Token ids of the answers, which read on from the kept keys and values of those before."""
    backbone, tokenizer = pipeline.backbone, pipeline.tokenizer
    limits, kept = pixel_limits(pipeline.files.folder), KeptChat()
    turns: list[Turn] = []
    answers: list[list[int]] = []
    for question in QUESTIONS:
        turns.append(Turn("user", question, () if turns else (_picture(),)))
        row = encode_chat(backbone, tokenizer, turns, limits)
        tokens = continue_rows(
            backbone, tokenizer, [row], device=pipeline.device, settings=ANSWER_SETTINGS, kept=kept
        )[0]
        turns.append(Turn("assistant", tokenizer.decode(tokens).strip()))
        answers.append(tokens)
    return answers


def _check_cache(pipeline: Blip3oPipeline) -> SelfCheck:
    """The last token's scores: with the keys and values of the tokens before it, and all tokens at once."""
    backbone, tokenizer = pipeline.backbone, pipeline.tokenizer
    limits = pixel_limits(pipeline.files.folder)
    row = encode_chat(backbone, tokenizer, [Turn("user", QUESTIONS[0], (_picture(),))], limits)
    embeddings, mask = embed_rows(backbone, tokenizer, [row], pipeline.device)
    positions, _ = padded_positions([row], embeddings.shape[1], tokenizer.image_pad, backbone.merge_size)
    whole = backbone.lm_head(backbone(embeddings, positions, mask)[:, -1])
    cache = DynamicCache()
    backbone(embeddings[:, :-1], positions[..., :-1], None, cache)
    step = backbone.lm_head(backbone(embeddings[:, -1:], positions[..., -1:], None, cache)[:, -1])
    return _compare("next word with and without kept keys and values", _some(step), _some(whole), TOLERANCE)


def _some(tensor: Tensor) -> list[float]:
    """Values from all over a tensor, with the digits that float32 has."""
    flat = tensor.float().cpu().flatten()
    places = torch.linspace(0, len(flat) - 1, min(VALUES, len(flat))).long()
    return [float(f"{value:.7g}") for value in flat[places].tolist()]


def _compare(what: str, found: list[Any], wanted: list[Any], tolerance: float) -> SelfCheck:
    if all(isinstance(value, int) for value in wanted):
        return SelfCheck(what, None, None, "" if found == wanted else "other words than recorded")
    if len(found) != len(wanted):
        return SelfCheck(what, None, tolerance, f"{len(found)} numbers instead of {len(wanted)}")
    ours, theirs = torch.tensor(found), torch.tensor(wanted)
    difference = ((ours - theirs).abs().max() / theirs.std()).item()
    if not math.isfinite(difference):
        return SelfCheck(what, None, tolerance, "gives values that are no numbers")
    if difference <= tolerance:
        return SelfCheck(what, difference, tolerance)
    return SelfCheck(
        what,
        difference,
        tolerance,
        f"differs by {difference:.2g} standard deviations, {tolerance:g} is allowed",
    )


if __name__ == "__main__":
    record()
