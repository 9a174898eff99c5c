"""The stage ask: answers about a picture, a chat's next turn, and tokens from weights in fewer bits."""

from __future__ import annotations

import copy
import inspect
import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from comfyui_blip3o.blip3o_core.language.answers import (
    AnswerSettings,
    MakeSteps,
    Turn,
    continue_rows,
    encode_chat,
)
from comfyui_blip3o.blip3o_core.language.prefixes import KeptChat
from comfyui_blip3o.blip3o_core.language.rows import EncodedRow, PixelLimits
from comfyui_blip3o.blip3o_core.models.backbone import Backbone
from comfyui_blip3o.blip3o_core.performance import quantize
from comfyui_blip3o.blip3o_core.performance.recorded_answers import AnswerRecorder, PlainSteps
from comfyui_blip3o.blip3o_core.performance.recording import can_compile, record_cuda_graph
from common import Limits, Mode, Row, compare, count_flops, pytorch_products
from networks import SizedPipeline
from PIL import Image
from torch import Tensor
from transformers import DynamicCache

ANSWER_TOKENS = 32
PICTURE_SIDE = {"tiny": 128, "middle": 448, "full": 896}


def ask_stage(networks: SizedPipeline, limits: Limits, rounds: int) -> list[Row]:
    """A question about a picture, 32 tokens of answer, against transformers' generate; and the chat's next turn."""
    tokenizer, backbone, device = networks.tokenizer, networks.backbone, networks.device
    tokenizer.__dict__["stop_tokens"] = frozenset()  # answers of one length in all modes
    first, area = question(networks.size)
    row = encode_chat(backbone, tokenizer, [first], area)
    settings = AnswerSettings(max_new_tokens=ANSWER_TOKENS)

    def answer(
        row: EncodedRow, kept: KeptChat | None = None, make_steps: MakeSteps | None = None
    ) -> list[int]:
        options = {"device": device, "settings": settings, "kept": kept, "make_steps": make_steps}
        return continue_rows(backbone, tokenizer, [row], **options)[0]

    def as_pytorch_multiplies() -> list[int]:
        with pytorch_products():
            return answer(row)

    first_token = replace(settings, max_new_tokens=1)
    read = count_flops(lambda: continue_rows(backbone, tokenizer, [row], device=device, settings=first_token))
    # First the picture and the question are read, then every token reads the weights: the limit is the sum.
    written = ANSWER_TOKENS * _bytes_per_token(backbone)
    moved = written + read / limits.flops * limits.bandwidth
    modes = {"transformers' generate (plain)": Mode(_transformers_answer(networks, row), 1, 0, moved)}
    if device.type == "cpu":
        modes["ours, products as PyTorch makes them"] = Mode(as_pytorch_multiplies, 1, 0, moved)
    modes["ours"] = Mode(lambda: answer(row), 1, 0, moved)
    if device.type == "cuda":
        for name, is_compiled in (("recorded", False), ("compiled and recorded", True)):
            if not is_compiled or can_compile(device):
                modes[f"ours, steps {name}"] = Mode(
                    _recorded(networks, answer, row, is_compiled), 1, 0, moved
                )
    options: dict[str, Any] = {"device": device, "rounds": rounds, "limits": limits}
    rows = compare("ask", networks.size, modes, **options)
    said = tokenizer.decode(answer(row))
    turns = [first, Turn("assistant", said), Turn("user", "what colour is it?")]
    second = encode_chat(backbone, tokenizer, turns, area)

    def next_turn() -> list[int]:
        kept = KeptChat()
        kept.keep(backbone, *known)
        return answer(second, kept)

    class Recorder(KeptChat):
        def keep(self, backbone: Any, row: EncodedRow, cache: Any) -> None:
            known[:] = [row, cache]

    known: list[Any] = []
    answer(row, Recorder())
    modes = {
        "everything anew (plain)": Mode(lambda: answer(second), 1, 0, moved),
        "first turn kept": Mode(next_turn, 1, 0, written, "the picture is not looked at again"),
    }
    rows += compare("chat turn 2", networks.size, modes, **options)
    return rows + compare("a token of an answer", networks.size, _formats(networks), **options)


def question(size: str) -> tuple[Turn, PixelLimits]:
    """A question about a picture, and the area at which the picture is looked at: its own."""
    side = PICTURE_SIDE[size]
    picture = Image.effect_mandelbrot((side, side), (-3, -2.5, 2, 2.5), 100).convert("RGB")
    return Turn("user", "what is in this picture?", (picture,)), PixelLimits(28 * 28, side * side)


def _recorded(
    networks: SizedPipeline, answer: Callable[[EncodedRow], list[int]], row: EncodedRow, is_compiled: bool
) -> Callable[[], list[int]]:
    recorder = AnswerRecorder(record_cuda_graph, is_compiled=is_compiled)
    return lambda: answer(row, make_steps=recorder.steps)


def _formats(networks: SizedPipeline) -> dict[str, Mode]:
    """The same 32 tokens after a short question, from the backbone in each format; what is compared are the last logits."""
    device = networks.device
    plain = networks.backbone
    ids = torch.tensor([networks.tokenizer.encode("what is in this picture?")], device=device)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(plain.lm_head.out_features, (ANSWER_TOKENS, 1), generator=generator).to(device)

    def write(backbone: Backbone) -> Tensor:
        cache = DynamicCache()
        length = ids.shape[1]
        backbone(backbone.embed(ids), torch.arange(length, device=device).expand(3, 1, -1), None, cache)
        next_logits = PlainSteps(backbone, cache, None)
        for step, token in enumerate(tokens):
            logits = next_logits(token, torch.full((1, 1), length + step, device=device))
        return logits

    def mode(backbone: Backbone, run: Callable[[Backbone], Tensor] = write, note: str = "") -> Mode:
        return Mode(lambda: run(backbone), ANSWER_TOKENS, 0, _bytes_per_token(backbone), note)

    def widened_whole(backbone: Backbone) -> Tensor:
        def multiply(hidden_states: Tensor, codes: Tensor, scales: Tensor, weight_format: str) -> Tensor:
            dtype, columns = hidden_states.dtype, hidden_states.shape[-1]
            return F.linear(hidden_states, quantize.dequantize(codes, scales, weight_format, dtype, columns))

        with mock.patch.object(quantize, "multiply_quantized", multiply):
            return write(backbone)

    name = str(networks.dtype).removeprefix("torch.")
    modes = {f"{name} (plain)": mode(plain)}
    half = plain if networks.dtype == torch.bfloat16 else copy.deepcopy(plain).to(torch.bfloat16)
    if half is not plain:
        modes["bfloat16"] = mode(half)
    for weight_format in quantize.FORMATS:
        smaller = quantize.quantize_network(copy.deepcopy(plain), weight_format, device)
        modes[weight_format] = mode(smaller)
        modes[f"{weight_format}, whole weights widened"] = mode(smaller, widened_whole)
        if half is not plain:
            of_half = quantize.quantize_network(copy.deepcopy(half), weight_format, device)
            modes[f"{weight_format}, arithmetic in bfloat16"] = mode(of_half)
    return modes


def _bytes_per_token(backbone: Backbone) -> int:
    """What one token of an answer reads: all of the language model but its table of embeddings."""
    parts = (backbone.text.layers, backbone.text.norm, backbone.lm_head)
    return sum(
        tensor.nbytes for part in parts for tensor in itertools.chain(part.parameters(), part.buffers())
    )


def _transformers_answer(networks: SizedPipeline, row: EncodedRow) -> Callable[[], list[int]]:
    """transformers' own model around the same weights."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    backbone, tokenizer, device = networks.backbone, networks.tokenizer, networks.device
    text, vision = backbone.text.config, backbone.visual.config
    shared = {
        key: value for key, value in text.to_dict().items() if key not in ("model_type", "architectures")
    }
    config = Qwen2_5_VLConfig(
        **shared | {"vision_config": vision.to_dict()},
        image_token_id=tokenizer.image_pad,
        vision_start_token_id=tokenizer.token_id("<|vision_start|>"),
        video_token_id=text.vocab_size + 1,
    )
    with device:
        model = Qwen2_5_VLForConditionalGeneration(config).to(networks.dtype).eval()
    names = {key: key for key in model.state_dict()}
    weights = {}
    for key, tensor in backbone.state_dict().items():
        candidates = (
            key.replace("text.", "model.language_model.", 1),
            key.replace("text.", "model.", 1),
            f"model.{key}",
            key,
        )
        found = next((name for name in candidates if name in names), None)
        if found:
            weights[found] = tensor
    model.load_state_dict(weights, strict=True, assign=True)
    ids = torch.tensor([row.token_ids], device=device)
    inputs: dict[str, Tensor] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if "mm_token_type_ids" in inspect.signature(model.forward).parameters:
        inputs["mm_token_type_ids"] = (ids == tokenizer.image_pad).int()
    inputs["pixel_values"] = torch.cat(row.patches).to(device, networks.dtype)
    inputs["image_grid_thw"] = torch.tensor(row.grids, device=device)

    def run() -> list[int]:
        answer = model.generate(
            **inputs,
            **{"max_new_tokens": ANSWER_TOKENS, "min_new_tokens": ANSWER_TOKENS, "do_sample": False},
            eos_token_id=None,
            pad_token_id=tokenizer.pad,
        )
        return answer[0, ids.shape[1] :].tolist()

    return run
