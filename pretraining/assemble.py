"""Trained stages to one checkpoint folder in the published layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from ..blip3o_core.checkpoints.save import save_checkpoint, write_json
from ..blip3o_core.images import CLIP_MEAN, CLIP_STD
from ..blip3o_core.models.backbone import Backbone
from ..blip3o_core.models.decoder import Decoder
from ..blip3o_core.models.eva_clip import EvaClip
from ..blip3o_core.models.nextdit import NextDiT
from .stages.understanding import MERGE, PATCH
from .world.scenes import SIDE
from .world.vocabulary import tokenizer_files


def to_backbone(qwen: nn.Module, latent_queries: nn.Parameter, config: dict[str, Any]) -> Backbone:
    """The published backbone from transformers' Qwen2.5-VL and the latent queries."""
    backbone = Backbone(
        config,
        vocab_size=config["vocab_size"],
        queries=latent_queries.shape[1],
        tie_head=config["tie_word_embeddings"],
    )
    backbone.text.load_state_dict(qwen.model.language_model.state_dict())
    backbone.visual.load_state_dict(qwen.model.visual.state_dict())
    backbone.lm_head.load_state_dict(qwen.lm_head.state_dict())
    backbone.latent_queries.data.copy_(latent_queries.data)
    return backbone


def preprocessor_config() -> dict[str, Any]:
    """Picture size and normalisation of the backbone's vision tower: every picture is seen at 128 x 128 pixels."""
    return {
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2_5_VLProcessor",
        "patch_size": PATCH,
        "merge_size": MERGE,
        "temporal_patch_size": 2,
        "min_pixels": SIDE * SIDE,
        "max_pixels": SIDE * SIDE,
        "image_mean": list(CLIP_MEAN),
        "image_std": list(CLIP_STD),
    }


def write_checkpoint(
    folder: Path,
    config: dict[str, Any],
    *,
    backbone: Backbone,
    dit: NextDiT,
    image_encoder: EvaClip,
    decoder: Decoder,
    metadata: dict[str, str],
) -> Path:
    """Weights in bf16, tokenizer and preprocessor; the folder then loads like a published one."""
    save_checkpoint(
        folder,
        config,
        backbone=backbone,
        dit=dit,
        image_encoder=image_encoder,
        decoder=decoder,
        metadata={
            key: json.dumps(value) if not isinstance(value, str) else value for key, value in metadata.items()
        },
    )
    tokenizer_files(folder)
    write_json(folder / "preprocessor_config.json", preprocessor_config())
    return folder
