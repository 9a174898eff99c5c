"""SizedPipeline of three sizes: the built-in trained one, one that fits a CPU, and the published sizes with random weights.

Random ones are built on the device that runs them; no file is read.
"""

from __future__ import annotations

from contextlib import contextmanager
from functools import partial
from typing import Any

import common  # noqa: F401 - makes the package known
import torch
from comfyui_blip3o.blip3o_core.checkpoints.layout import open_checkpoint
from comfyui_blip3o.blip3o_core.config import BUILT_IN_MODEL, NextDiTConfig
from comfyui_blip3o.blip3o_core.models.backbone import Backbone
from comfyui_blip3o.blip3o_core.models.decoder import Decoder
from comfyui_blip3o.blip3o_core.models.nextdit import NextDiT
from comfyui_blip3o.blip3o_core.networks import Networks
from comfyui_blip3o.blip3o_core.pipeline import Blip3oPipeline

SIZES = ("tiny", "middle", "full")
QUERIES = 64
DITS = {"middle": NextDiTConfig(768, 12, 12, 12, 768, 1536, 2048, 768), "full": NextDiTConfig()}
PUBLISHED_4B = "full 4b"
TEXTS = {
    "middle": {"hidden_size": 1536, "intermediate_size": 4096, "num_hidden_layers": 8},
    "full": {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28},
    PUBLISHED_4B: {"hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36},
}
HEADS = {"middle": (12, 2), "full": (28, 4), PUBLISHED_4B: (16, 2)}
VISIONS = {
    "middle": {"depth": 8, "hidden_size": 640, "intermediate_size": 1728, "num_heads": 8},
    "full": {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16},
}
VISIONS[PUBLISHED_4B] = VISIONS["full"]
VOCABULARY = {"middle": 32_000, "full": 151_668}
UNETS = {
    "middle": {"block_out_channels": [96, 192, 384], "sample_size": 32, "cross_attention_dim": 768},
    "full": {"block_out_channels": [320, 640, 1280], "sample_size": 128, "cross_attention_dim": 1792},
}
UNET_LAYERS = {"middle": ([1, 1, 2], [3, 6, 12]), "full": ([1, 2, 10], [5, 10, 20])}
VAES = {"middle": [32, 64, 128, 128], "full": [128, 256, 512, 512]}


class SizedPipeline(Blip3oPipeline):
    """A pipeline of one size; its networks come into being when first used.

    Args:
        size: one of SIZES; "tiny" reads the built-in checkpoint.
        options: how networks are kept, see blip3o_core.networks.Networks.
    """

    def __init__(self, size: str, device: torch.device, dtype: torch.dtype, **options: Any) -> None:
        # Tokenizer and noise schedule are the built-in model's in all sizes.
        files = open_checkpoint(BUILT_IN_MODEL)
        holder = Networks if size == "tiny" else partial(RandomNetworks, size)
        super().__init__(holder(files, dtype, device, **options))
        self.size = size


class RandomNetworks(Networks):
    """Networks of a size with random weights."""

    def __init__(self, size: str, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.size = size

    def read(self, name: str, device: torch.device) -> torch.nn.Module:
        torch.manual_seed(0)
        with _random_weights(self.device, self.dtype):  # a GPU draws them faster, wherever they go then
            network = {"backbone": self._backbone, "dit": self._dit, "decoder": self._decoder}[name]()
        return network.to(device, self.dtype).eval().requires_grad_(False)

    def _dit(self) -> NextDiT:
        dit = NextDiT(DITS[self.size])
        for layer in dit.layers:
            torch.nn.init.normal_(layer.gate)  # off zero, so that every branch counts
        return dit

    def _backbone(self) -> Backbone:
        config = backbone_config(self.size)
        return Backbone(config, vocab_size=VOCABULARY[self.size], queries=QUERIES, tie_head=False)

    def _decoder(self) -> Decoder:
        return Decoder(*decoder_configs(self.size, self.files.decoder_config("scheduler")))


def backbone_config(size: str) -> dict[str, Any]:
    """Fields of config.json that say how large a backbone is."""
    heads, kv_heads = HEADS[size]
    return {
        **TEXTS[size],
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "hidden_act": "silu",
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "rope_scaling": {"type": "default", "rope_type": "default", "mrope_section": [16, 24, 24]},
        "vision_config": {
            **VISIONS[size],
            "hidden_act": "silu",
            "in_channels": 3,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "tokens_per_second": 2,
            "window_size": 112,
            "out_hidden_size": TEXTS[size]["hidden_size"],
            "fullatt_block_indexes": [7, 15, 23, 31],
        },
    }


def decoder_configs(size: str, scheduler: dict[str, Any]) -> tuple[dict[str, Any], ...]:
    """Configurations of a decoder's UNet, VAE and scheduler, which predicts noise.

    Args:
        scheduler: the configuration that it differs from in that alone.
    """
    widths, (depths, heads) = UNETS[size], UNET_LAYERS[size]
    unet = {
        **widths,
        "in_channels": 4,
        "out_channels": 4,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "layers_per_block": 2,
        "transformer_layers_per_block": depths,
        "attention_head_dim": heads,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": widths["cross_attention_dim"] + 6 * 256,
    }
    levels = len(VAES[size])
    vae = {
        "block_out_channels": VAES[size],
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "layers_per_block": 2,
        "latent_channels": 4,
        "scaling_factor": 0.13025,
    }
    return unet, vae, scheduler | {"prediction_type": "epsilon"}


@contextmanager
def _random_weights(device: torch.device, dtype: torch.dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # full size in float32 first would need twice the memory
    try:
        with device:
            yield
    finally:
        torch.set_default_dtype(before)
