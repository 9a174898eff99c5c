"""A checkpoint folder with the headers of the published 8B model: files of the right size whose weights are holes."""

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from comfyui_blip3o.blip3o_core.checkpoints.keys import to_published_key
from comfyui_blip3o.blip3o_core.config import EvaClipConfig, NextDiTConfig
from comfyui_blip3o.blip3o_core.models.backbone import Backbone
from comfyui_blip3o.blip3o_core.models.decoder import Decoder
from comfyui_blip3o.blip3o_core.models.eva_clip import EvaClip
from comfyui_blip3o.blip3o_core.models.nextdit import NextDiT
from torch import nn

CONFIG: dict[str, Any] = {
    "model_type": "blip3o_qwen",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "hidden_act": "silu",
    "max_position_embeddings": 128000,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "rope_scaling": {"type": "default", "mrope_section": [16, 24, 24], "rope_type": "default"},
    "vision_config": {
        "depth": 32,
        "hidden_size": 1280,
        "hidden_act": "silu",
        "intermediate_size": 3420,
        "num_heads": 16,
        "in_channels": 3,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "tokens_per_second": 2,
        "window_size": 112,
        "out_hidden_size": 3584,
        "fullatt_block_indexes": [7, 15, 23, 31],
    },
}
UNET = {
    "sample_size": 128,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [320, 640, 1280],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 2,
    "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20],
    "cross_attention_dim": 1792,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 3328,
}
VAE = {
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "scaling_factor": 0.13025,
}
SCHEDULER = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
    "timestep_spacing": "leading",
    "steps_offset": 1,
}
Shapes = Mapping[str, tuple[int, ...]]


def published_networks() -> dict[str, nn.Module]:
    """The networks in bf16 without weights, on the device "meta"."""
    with torch.device("meta"):
        networks = {
            "backbone": Backbone(CONFIG, vocab_size=151668, queries=64, tie_head=False),
            "dit": NextDiT(NextDiTConfig()),
            "image_encoder": EvaClip(EvaClipConfig()),
            "decoder": Decoder(UNET, VAE, SCHEDULER),
        }
    return {name: network.bfloat16().eval().requires_grad_(False) for name, network in networks.items()}


def write_published_shapes(folder: Path) -> Path:
    """The folder; it takes a few hundred kilobytes of disk."""
    networks = published_networks()
    decoder = networks.pop("decoder")
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG), "utf-8")
    shapes = {
        to_published_key(name, key): tuple(tensor.shape)
        for name, network in networks.items()
        for key, tensor in network.state_dict().items()
    }
    write_holes(shapes, folder / "model.safetensors")
    for name, network, config in (("unet", decoder.unet, UNET), ("vae", decoder.vae, VAE)):
        place = folder / "diffusion-decoder" / name
        place.mkdir(parents=True)
        (place / "config.json").write_text(json.dumps(config), "utf-8")
        its = {key: tuple(tensor.shape) for key, tensor in network.state_dict().items()}
        write_holes(its, place / "diffusion_pytorch_model.bf16.safetensors")
    schedule = folder / "diffusion-decoder" / "scheduler" / "scheduler_config.json"
    schedule.parent.mkdir()
    schedule.write_text(json.dumps(SCHEDULER), "utf-8")
    return folder


def write_holes(shapes: Shapes, path: Path) -> None:
    """A safetensors file in bf16 whose header is whole and whose weights are a hole."""
    header, place = {}, 0
    for key, shape in shapes.items():
        end = place + 2 * torch.Size(shape).numel()
        header[key] = {"dtype": "BF16", "shape": shape, "data_offsets": [place, end]}
        place = end
    raw = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        file.truncate(8 + len(raw) + place)
