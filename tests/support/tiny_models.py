"""Random BLIP3-o models of toy size, of other proportions than the published ones, through the real constructors."""

import json
import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from comfyui_blip3o.blip3o_core.checkpoints.save import save_checkpoint
from comfyui_blip3o.blip3o_core.config import EvaClipConfig, NextDiTConfig
from comfyui_blip3o.blip3o_core.models.backbone import Backbone
from comfyui_blip3o.blip3o_core.models.decoder import Decoder
from comfyui_blip3o.blip3o_core.models.eva_clip import EvaClip
from comfyui_blip3o.blip3o_core.models.nextdit import NextDiT
from PIL import Image
from tokenizers import AddedToken, Regex, Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from torch import nn

WORDS = (
    "system user assistant You are a helpful Please generate image based on the following caption reconstruct given "
    "A photo of cute cat red circle blue square green yellow two three dogs grass What is this in one color and left "
    "right above below many describe Describe picture Does show Answer yes or no Yes No short sentence big small : . , ?"
).split()
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "[IMG]",
    "[/IMG]",
    "<image>",
)
# Far below the published 448 x 448, so that looking at a picture takes 16 tokens.
MAX_PIXELS = 112 * 112


@dataclass(frozen=True)
class TinySizes:
    """Numbers of a tiny checkpoint; the defaults are the smallest that still exercise everything."""

    queries: int = 16
    width: int = 32
    heads: int = 4
    kv_heads: int = 2
    tie_head: bool = False
    dit: NextDiTConfig = field(
        default_factory=lambda: NextDiTConfig(
            dim=32,
            layers=2,
            heads=4,
            kv_heads=4,
            in_channels=16,
            conditioning_dim=32,
            ffn_dim=48,
            time_dim=24,
        )
    )
    tower: EvaClipConfig = field(
        default_factory=lambda: EvaClipConfig(
            width=16, layers=2, head_width=8, mlp_dim=24, image_size=56, patch_size=14, pool=1
        )
    )
    unet_widths: tuple[int, ...] = (16, 32)
    vae_widths: tuple[int, ...] = (8, 16)
    sample_size: int = 16
    prediction_type: str = "epsilon"


DEFAULT = TinySizes()
VARIANTS = {
    "default": DEFAULT,
    "grouped": replace(
        DEFAULT,
        queries=36,
        width=48,
        heads=6,
        kv_heads=3,
        dit=NextDiTConfig(
            dim=48,
            layers=3,
            heads=6,
            kv_heads=2,
            in_channels=24,
            conditioning_dim=48,
            ffn_dim=40,
            time_dim=20,
        ),
        tower=EvaClipConfig(
            width=24, layers=3, head_width=12, mlp_dim=36, image_size=168, patch_size=14, pool=2
        ),
    ),
    "tied": replace(DEFAULT, tie_head=True),
    "pooled": replace(
        DEFAULT,
        tower=EvaClipConfig(
            width=16, layers=1, head_width=4, mlp_dim=20, image_size=128, patch_size=8, pool=4
        ),
    ),
    "deep": replace(
        DEFAULT,
        unet_widths=(16, 16, 32),
        vae_widths=(8, 8, 16),
        sample_size=8,
        prediction_type="v_prediction",
    ),
}


def randomise(module: nn.Module, seed: int) -> nn.Module:
    """Fill every parameter so that no branch is dead: matrices keep the scale, norms and biases vary."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            values = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                values *= 1 / math.sqrt(parameter[0].numel()) if parameter.shape[0] > 1 else 1.0
            elif name.endswith("weight"):
                values = 1 + 0.2 * values
            else:
                values *= 0.3
            parameter.copy_(values)
    return module.eval().requires_grad_(False)


def tiny_config(sizes: TinySizes = DEFAULT) -> dict[str, Any]:
    """config.json in the published, flat form."""
    head = sizes.width // sizes.heads // 2
    return {
        "model_type": "blip3o_qwen",
        "hidden_size": sizes.width,
        "intermediate_size": 2 * sizes.width,
        "num_hidden_layers": 2,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.kv_heads,
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "rope_scaling": {"type": "default", "mrope_section": [head - 2, 1, 1], "rope_type": "default"},
        "tie_word_embeddings": sizes.tie_head,
        "vision_config": {
            "depth": 2,
            "hidden_size": 16,
            "hidden_act": "silu",
            "intermediate_size": 24,
            "num_heads": 2,
            "in_channels": 3,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "tokens_per_second": 2,
            "window_size": 56,
            "out_hidden_size": sizes.width,
            "fullatt_block_indexes": [1],
        },
    }


def build_backbone(sizes: TinySizes = DEFAULT, seed: int = 0) -> Backbone:
    vocab = len(WORDS) + 3 + len(SPECIAL_TOKENS)
    backbone = Backbone(tiny_config(sizes), vocab_size=vocab, queries=sizes.queries, tie_head=sizes.tie_head)
    return randomise(backbone, seed)


def build_dit(sizes: TinySizes = DEFAULT, seed: int = 1) -> NextDiT:
    return randomise(NextDiT(sizes.dit), seed)


def build_image_encoder(sizes: TinySizes = DEFAULT, seed: int = 2) -> EvaClip:
    return randomise(EvaClip(sizes.tower), seed)


def build_decoder(sizes: TinySizes = DEFAULT, seed: int = 3) -> Decoder:
    levels = len(sizes.unet_widths)
    cross = ["DownBlock2D"] + ["CrossAttnDownBlock2D"] * (levels - 1)
    channels = sizes.dit.in_channels
    unet = {
        "_class_name": "UNet2DConditionModel",
        "sample_size": sizes.sample_size,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": list(sizes.unet_widths),
        "down_block_types": cross,
        "up_block_types": [name.replace("Down", "Up") for name in reversed(cross)],
        "layers_per_block": 1,
        "attention_head_dim": [2] * levels,
        "cross_attention_dim": channels,
        "norm_num_groups": 8,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": channels + 6 * 8,
    }
    vae_levels = len(sizes.vae_widths)
    vae = {
        "_class_name": "AutoencoderKL",
        "block_out_channels": list(sizes.vae_widths),
        "down_block_types": ["DownEncoderBlock2D"] * vae_levels,
        "up_block_types": ["UpDecoderBlock2D"] * vae_levels,
        "layers_per_block": 1,
        "latent_channels": 4,
        "norm_num_groups": 4,
        "sample_size": 32,
        "scaling_factor": 0.5,
    }
    scheduler = {
        "_class_name": "EulerDiscreteScheduler",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "num_train_timesteps": 1000,
        "prediction_type": sizes.prediction_type,
        "timestep_spacing": "leading",
        "steps_offset": 1,
    }
    return randomise(Decoder(unet, vae, scheduler), seed)


def write_tokenizer(folder: Path) -> None:
    """A word-level tokenizer whose special tokens have other ids than the published ones, and pixel limits."""
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {word: index for index, word in enumerate(["<unk>", "\n", " ", *WORDS])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Split(Regex(r"\n| |[A-Za-z]+|[^A-Za-z \n]"), "isolated")
    tokenizer.decoder = Fuse()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    tokenizer.save(str(folder / "tokenizer.json"))
    limits = {"min_pixels": 28 * 28, "max_pixels": MAX_PIXELS}
    (folder / "preprocessor_config.json").write_text(json.dumps(limits), "utf-8")


def write_checkpoint(folder: Path, sizes: TinySizes = DEFAULT, **options: Any) -> Path:
    """A whole checkpoint in the published layout; `options` go to save_checkpoint."""
    write_tokenizer(folder)
    return save_checkpoint(
        folder,
        tiny_config(sizes),
        backbone=build_backbone(sizes),
        dit=build_dit(sizes),
        image_encoder=build_image_encoder(sizes),
        decoder=build_decoder(sizes),
        **{"dtype": torch.float32, **options},
    )


def picture(width: int = 80, height: int = 60, seed: int = 0) -> Image.Image:
    """A smooth picture with a coloured disc: not noise, so that resizing methods differ little."""
    generator = torch.Generator().manual_seed(seed)
    background, disc = torch.randint(0, 256, (2, 3), generator=generator)
    rows = torch.linspace(0, 1, height)[:, None]
    columns = torch.linspace(0, 1, width)[None]
    is_disc = ((rows - 0.5) ** 2 + (columns - 0.4) ** 2 < 0.08)[..., None]
    shade = (0.6 + 0.4 * rows * columns)[..., None]
    values = torch.where(is_disc, disc.float(), background.float()) * shade
    return Image.fromarray(values.to(torch.uint8).numpy())
