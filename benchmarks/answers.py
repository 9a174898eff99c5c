"""The stage ask: answers about a picture, and a chat's next turn."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from comfyui_blip3o.blip3o_core.prefixes import KeptChat
from comfyui_blip3o.blip3o_core.rows import EncodedRow, PixelLimits
from comfyui_blip3o.blip3o_core.understanding import AnswerSettings, Turn, continue_rows, encode_chat
from common import Limits, Mode, Row, compare, weight_bytes
from networks import Networks
from PIL import Image
from torch import Tensor

ANSWER_TOKENS = 32
PICTURE_SIDE = {"tiny": 128, "middle": 448, "full": 896}


def ask_stage(networks: Networks, limits: Limits, rounds: int) -> list[Row]:
    """A question about a picture, 32 tokens of answer, against transformers' generate; and the chat's next turn."""
    tokenizer, backbone, device = networks.tokenizer, networks.backbone, networks.device
    tokenizer.__dict__["stop_tokens"] = frozenset()  # answers of one length in all modes
    side = PICTURE_SIDE[networks.size]
    picture = Image.effect_mandelbrot((side, side), (-3, -2.5, 2, 2.5), 100).convert("RGB")
    area = PixelLimits(28 * 28, side * side)
    first = Turn("user", "what is in this picture?", (picture,))
    row = encode_chat(backbone, tokenizer, [first], area)
    settings = AnswerSettings(max_new_tokens=ANSWER_TOKENS)

    def answer(row: EncodedRow, kept: KeptChat | None = None) -> list[int]:
        return continue_rows(backbone, tokenizer, [row], device=device, settings=settings, kept=kept)[0]

    moved = ANSWER_TOKENS * weight_bytes(backbone.text)
    modes = {
        "transformers' generate (plain)": Mode(_transformers_answer(networks, row), 1, 0, moved),
        "ours": Mode(lambda: answer(row), 1, 0, moved),
    }
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
        "first turn kept": Mode(next_turn, 1, 0, moved, "the picture is not looked at again"),
    }
    return rows + compare("chat turn 2", networks.size, modes, **options)


def _transformers_answer(networks: Networks, row: EncodedRow) -> Callable[[], list[int]]:
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
