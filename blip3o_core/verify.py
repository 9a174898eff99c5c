"""Comparison with reference numbers of the published code: proof that an installation computes the same.

A reference folder holds `checkpoint/` (published layout), `golden.safetensors` and `golden.json` (inputs and outputs of
the published code in float32 on the CPU) and the pictures they were made with.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from .checkpoints.layout import open_checkpoint
from .checkpoints.load import load_image_encoder
from .drawing.decoding import PixelSettings, decode_features, denoise_latents
from .drawing.flow import mix, target_velocity, training_sigma
from .drawing.sampling import FeatureSettings
from .errors import BadInputError, MissingFilesError
from .images import load_image, preprocess_for_image_encoder, preprocess_for_prompt
from .language.answers import AnswerSettings, Turn, continue_rows, encode_chat
from .language.rows import EncodedRow, embed_rows, encode_picture, padded_positions, pixel_limits
from .pipeline import Blip3oPipeline, load_pipeline
from .untrusted import read_json

# Largest absolute difference allowed, in standard deviations of the reference.
SINGLE_CALL_TOLERANCE = 2e-5
LOOP_TOLERANCE = 2e-4
# Every so many pixels of the image encoder's input are kept in a reference set.
PIXEL_STRIDE = 16
# The published answer limit in the reference's token table: ids 0..999 and the special tokens.
PLAIN_IDS = 1000
FIRST_SPECIAL_ID = 151643


@dataclass(frozen=True)
class Check:
    """One compared quantity; `max_abs_diff` and `std` in the reference's units, `allowed` = tolerance x std."""

    key: str
    max_abs_diff: float
    std: float
    tolerance: float
    passed: bool


def verify_reference(folder: str | Path) -> list[Check]:
    """Compare every quantity that the folder holds, in float32 on the CPU.

    Raises:
        MissingFilesError: the folder lacks golden.safetensors, golden.json or the checkpoint.
        BadInputError: golden.safetensors holds nothing to compare.
    """
    folder = Path(folder).expanduser()
    for name in ("golden.safetensors", "golden.json"):
        if not (folder / name).is_file():
            raise MissingFilesError(
                f'"{folder}" is no reference folder: "{name}" is missing.\n'
                "Name a folder with checkpoint/, golden.safetensors, golden.json and the pictures."
            )
    return _Verification(folder).run()


def report(checks: list[Check]) -> dict[str, Any]:
    """JSON-ready: per key the largest difference, the reference's std, the tolerance and the verdict."""
    return {
        "passed": all(check.passed for check in checks),
        "checks": {
            check.key: {
                # null = nothing to subtract: another shape, or token ids that differ
                "max_abs_diff": check.max_abs_diff if math.isfinite(check.max_abs_diff) else None,
                "std": check.std,
                "tolerance": check.tolerance,
                "passed": check.passed,
            }
            for check in checks
        },
    }


class _Verification:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.golden = load_file(str(folder / "golden.safetensors"))
        self.texts = read_json(folder / "golden.json")
        self.pipeline: Blip3oPipeline = load_pipeline(folder / "checkpoint", dtype="fp32", device="cpu")
        self.checks: list[Check] = []

    @torch.no_grad()
    def run(self) -> list[Check]:
        stages: tuple[tuple[str, Callable[[], None]], ...] = (
            ("text.hidden_states", self.conditioning),
            ("i2i.hidden_states", self.conditioning_with_image),
            ("dit.velocity", self.velocity),
            ("text.clip_features", self.features),
            ("train.loss", self.training),
            ("decode.latents", self.decoder),
            ("eva.pooled", self.image_encoder),
            ("vqa.logits_last", self.answer),
        )
        for key, stage in stages:
            if key in self.golden:
                stage()
        if not self.checks:
            raise BadInputError(
                f'golden.safetensors in "{self.folder}" holds none of the numbers that can be compared '
                f"(e.g. {stages[0][0]}, {stages[2][0]}).\nUse a complete reference folder."
            )
        return self.checks

    def compare(self, key: str, ours: Tensor, tolerance: float = SINGLE_CALL_TOLERANCE) -> None:
        if key not in self.golden:
            return
        reference = self.golden[key].float()
        if ours.shape != reference.shape:
            self.checks.append(Check(key, float("inf"), reference.std().item(), tolerance, False))
            return
        difference = (ours.float() - reference).abs().max().item()
        # A single number or a constant has no spread; its size is the scale then.
        std = reference.std().item() if reference.numel() > 1 else 0.0
        scale = std or reference.abs().max().item() or 1.0
        self.checks.append(Check(key, difference, std, tolerance, difference <= tolerance * scale))

    def conditioning(self) -> None:
        tokenizer = self.pipeline.tokenizer
        if "prompt_ids" in self.texts:
            self.compare_ids("prompt_ids", tokenizer.encode(self.texts["prompt_text"]))
        self.compare("text.hidden_states", self.pipeline.encode_prompts(self.texts["caption"]))
        self.compare("negative.hidden_states", self.pipeline.encode_prompts(" ", use_template=False))

    def conditioning_with_image(self) -> None:
        pipeline = self.pipeline
        picture = load_image(self.folder / "image.png")
        limits = pixel_limits(pipeline.files.folder)
        patches, _, _ = encode_picture(pipeline.backbone, preprocess_for_prompt(picture), limits)
        self.compare("i2i.pixel_values_mean", patches.mean(-1))
        instruction = self.texts["i2i_text"].split("<image>\n")[1].split("<|im_end|>")[0]
        self.compare("i2i.hidden_states", pipeline.encode_prompts(instruction, [[picture]]))

    def velocity(self) -> None:
        golden = self.golden
        self.compare(
            "dit.velocity", self.pipeline.dit(golden["dit.x"], golden["dit.timestep"], golden["dit.z"])
        )

    def features(self) -> None:
        for name in ("text", "negative", "i2i"):
            key = f"{name}.clip_features"
            if key in self.golden:
                features = self.pipeline.sample_features(
                    self.golden[f"{name}.hidden_states"],
                    noise=self.golden["text.noise"],
                    settings=FeatureSettings(),
                )
                self.compare(key, features, LOOP_TOLERANCE)

    def training(self) -> None:
        golden = self.golden
        sigmas = training_sigma(golden["train.indices"])
        self.compare("train.sigmas", sigmas)
        self.compare("train.timesteps", sigmas * 1000)
        noisy = mix(golden["train.latents"], golden["train.noise"], sigmas)
        prediction = self.pipeline.dit(noisy, golden["train.timesteps"], golden["train.z"])
        self.compare("train.prediction", prediction)
        target = target_velocity(golden["train.latents"], golden["train.noise"])
        self.compare("train.loss", torch.nn.functional.mse_loss(prediction, target))

    def decoder(self) -> None:
        golden, described = self.golden, self.texts["decode"]
        settings = PixelSettings(steps=described["steps"], guidance_scale=described["guidance"])
        arguments: dict[str, Any] = {
            "noise": golden["decode.noise"],
            "settings": settings,
            "negative_features": golden["negative.clip_features"],
        }
        decoder = self.pipeline.decoder
        latents = denoise_latents(decoder, golden["text.clip_features"], **arguments)
        self.compare("decode.latents", latents, LOOP_TOLERANCE)
        image = decode_features(decoder, golden["text.clip_features"], **arguments)
        self.compare("decode.image", image.permute(0, 2, 3, 1), LOOP_TOLERANCE)

    def image_encoder(self) -> None:
        towers = {"eva": load_image_encoder(self.pipeline.files, dtype=torch.float32)}
        separate = self.folder / "eva_clip_vision_tower"
        if separate.is_dir() and self.pipeline.files.has_component("image_encoder"):
            towers["eva from its own file"] = load_image_encoder(
                open_checkpoint(self.folder / "checkpoint", image_encoder=separate), dtype=torch.float32
            )
        picture = load_image(self.folder / "eva_image.png")
        for label, encoder in towers.items():
            pixels = preprocess_for_image_encoder(picture, encoder.config.image_size)[None]
            first = len(self.checks)
            self.compare("eva.pixels", pixels[:, :, ::PIXEL_STRIDE, ::PIXEL_STRIDE])
            self.compare("eva.pixels_mean", pixels.mean(dim=(2, 3)))
            tokens = encoder.encode_tokens(pixels)[:, 1:]
            if "eva.tokens_first64" in self.golden:
                self.compare("eva.tokens_first64", tokens[:, : self.golden["eva.tokens_first64"].shape[1]])
            self.compare("eva.pooled", encoder(pixels))
            self.checks[first:] = [
                Check(**{**vars(check), "key": check.key.replace("eva", label, 1)})
                for check in self.checks[first:]
            ]

    def answer(self) -> None:
        pipeline, golden = self.pipeline, self.golden
        backbone, tokenizer = pipeline.backbone, pipeline.tokenizer
        picture = load_image(self.folder / "image.png")
        # The reference looked at the picture with the stored limits, not with our ceiling for everyday use.
        path = pipeline.files.folder / "preprocessor_config.json"
        stored = read_json(path) if path.is_file() else {}
        limits = pixel_limits(pipeline.files.folder, stored.get("min_pixels"), stored.get("max_pixels"))
        row: EncodedRow = encode_chat(
            backbone, tokenizer, [Turn("user", self.texts["question"], (picture,))], limits
        )
        self.compare_ids("vqa_prompt_len", [len(row.token_ids)])
        embeddings, mask = embed_rows(backbone, tokenizer, [row], pipeline.device)
        positions, _ = padded_positions([row], embeddings.shape[1], tokenizer.image_pad, backbone.merge_size)
        logits = backbone.lm_head(backbone(embeddings, positions, mask)[:, -1])
        specials = golden["vqa.logits_last"].shape[1] - PLAIN_IDS
        picked = [logits[:, :PLAIN_IDS], logits[:, FIRST_SPECIAL_ID : FIRST_SPECIAL_ID + specials]]
        self.compare("vqa.logits_last", torch.cat(picked, dim=1))
        if "vqa.new_ids" in golden:
            wanted = golden["vqa.new_ids"][0].tolist()
            settings = AnswerSettings(max_new_tokens=len(wanted))
            answered = continue_rows(backbone, tokenizer, [row], device=pipeline.device, settings=settings)[0]
            stops = [token for token in wanted if token not in tokenizer.stop_tokens]
            self.compare_ids("vqa.new_ids", answered, stops)

    def compare_ids(self, key: str, ours: list[int], wanted: list[int] | None = None) -> None:
        """Token ids are exact or wrong."""
        if wanted is None:
            if key not in self.texts:
                return
            stored = self.texts[key]
            wanted = stored if isinstance(stored, list) else [stored]
        is_equal = ours == wanted
        self.checks.append(Check(key, 0.0 if is_equal else float("inf"), 0.0, 0.0, is_equal))


def report_json(checks: list[Check]) -> str:
    """The report as indented JSON."""
    return json.dumps(report(checks), indent=2)
