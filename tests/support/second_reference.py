"""A reference set of other sizes, written without this project's networks: libraries' own models and plain arithmetic.

Grouped-query DiT, 36 latent queries, a tied head, an image encoder of another resolution in its own pickle, a three-level
decoder that predicts v, one weight file without an index.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import originals
import tiny_models
import torch
from comfyui_blip3o.blip3o_core.config import EvaClipConfig
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    LuminaNextDiT2DModel,
    UNet2DConditionModel,
)
from diffusers.models.embeddings import PixArtAlphaTextProjection
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor, nn

QUERIES, WIDTH, CHANNELS, GRID = 36, 48, 24, 6
SIZES = tiny_models.TinySizes(queries=QUERIES, width=WIDTH, heads=6, kv_heads=3)
TOWER = EvaClipConfig(
    width=CHANNELS, layers=3, head_width=8, mlp_dim=40, image_size=336, patch_size=14, pool=4
)
CLIP_MEAN = np.array([0.48145466, 0.4578275, 0.40821073])
CLIP_STD = np.array([0.26862954, 0.26130258, 0.27577711])
PROMPT = "two dogs left of a red circle"
TEMPLATE = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n"
    "<|im_start|>assistant\n"
)
CAPTION = "Please generate image based on the following caption: " + PROMPT
INSTRUCTION = "Please reconstruct the given image."
DECODER_STEPS = 6
SCHEDULE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "prediction_type": "v_prediction",
    "timestep_spacing": "leading",
    "steps_offset": 1,
}


def build_second_reference(folder: Path) -> Path:
    """Write checkpoint/, eva_clip_vision_tower/, golden.safetensors, golden.json and the pictures."""
    checkpoint = folder / "checkpoint"
    tiny_models.write_tokenizer(checkpoint)
    _Set(folder, checkpoint).write()
    return folder


class _Set:
    def __init__(self, folder: Path, checkpoint: Path) -> None:
        self.folder, self.checkpoint = folder, checkpoint
        self.tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
        vocabulary = self.tokenizer.get_vocab_size()
        self.pad = self.tokenizer.token_to_id("<|image_pad|>")
        self.config = tiny_models.tiny_config(SIZES)
        self.config["num_hidden_layers"] = 3
        start = self.tokenizer.token_to_id("<|vision_start|>")
        self.qwen = _random(originals.qwen_model(self.config, vocabulary, self.pad, start), 1)
        self.qwen.lm_head.weight = self.qwen.get_input_embeddings().weight
        self.queries = _rounded(torch.randn(1, QUERIES, WIDTH, generator=torch.Generator().manual_seed(2)))
        self.dit = _random(
            nn.ModuleDict(
                {
                    "caption_projection": PixArtAlphaTextProjection(WIDTH, 64),
                    "transformer": LuminaNextDiT2DModel(
                        patch_size=1,
                        in_channels=CHANNELS,
                        hidden_size=64,
                        num_layers=3,
                        num_attention_heads=8,
                        num_kv_heads=2,
                        multiple_of=8,
                        learn_sigma=False,
                        cross_attention_dim=64,
                    ),
                }
            ),
            3,
        )
        self.tower = _tower_weights()
        self.unet = _random(UNet2DConditionModel(**_unet_config()), 5)
        self.vae = _random(AutoencoderKL(**_vae_config()), 6)
        self.golden: dict[str, Tensor] = {}
        self.picture = tiny_models.picture(90, 150, seed=4)

    @torch.no_grad()
    def write(self) -> None:
        self._write_checkpoint()
        self._compute()
        save_file(
            {key: value.contiguous() for key, value in self.golden.items()},
            str(self.folder / "golden.safetensors"),
        )
        texts = {
            "caption": PROMPT,
            "prompt_text": TEMPLATE.format(CAPTION),
            "prompt_ids": self._ids(TEMPLATE.format(CAPTION)),
            "i2i_text": TEMPLATE.format("<image>\n" + INSTRUCTION),
            "decode": {"steps": DECODER_STEPS, "guidance": 3.0},
        }
        (self.folder / "golden.json").write_text(json.dumps(texts), "utf-8")
        for name in ("image.png", "eva_image.png"):
            self.picture.save(self.folder / name)

    # Files

    def _write_checkpoint(self) -> None:
        weights = {
            originals.published_qwen_key(key): tensor
            for key, tensor in self.qwen.state_dict().items()
            if key != "lm_head.weight"
        }
        weights["model.latent_queries"] = self.queries
        for key, tensor in self.dit.state_dict().items():
            if key != "transformer.pad_token":
                weights["model.dit.model." + key.removeprefix("transformer.")] = tensor
        _save(weights, self.checkpoint / "model.safetensors")
        config = {
            **self.config,
            "tie_word_embeddings": True,
            "n_query": QUERIES,
            "gen_pooling": f"early_pool2d_{TOWER.pool}",
            "gen_hidden_size": CHANNELS,
            "gen_vision_config": {
                "width": TOWER.width,
                "layers": TOWER.layers,
                "head_width": TOWER.head_width,
                "mlp_ratio": TOWER.mlp_dim / TOWER.width,
                "image_size": TOWER.image_size,
                "patch_size": TOWER.patch_size,
            },
        }
        _write_json(self.checkpoint / "config.json", config)
        decoder = self.checkpoint / "diffusion-decoder"
        for name, network in (("unet", self.unet), ("vae", self.vae)):
            _write_json(decoder / name / "config.json", dict(network.config))
            _save(network.state_dict(), decoder / name / "diffusion_pytorch_model.bf16.safetensors")
        _write_json(decoder / "scheduler" / "scheduler_config.json", SCHEDULE)
        tower = self.folder / "eva_clip_vision_tower" / "pytorch_model.bin"
        tower.parent.mkdir(parents=True)
        torch.save({key: tensor.bfloat16() for key, tensor in self.tower.items()}, tower)

    # Numbers

    def _compute(self) -> None:
        golden, generator = self.golden, torch.Generator().manual_seed(9)

        def noise(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        golden["text.hidden_states"] = self._conditioning(self._ids(TEMPLATE.format(CAPTION)))
        golden["negative.hidden_states"] = self._conditioning(self._ids(" "))
        golden["i2i.hidden_states"] = self._conditioning_with_picture()
        golden["text.noise"] = noise(1, CHANNELS, GRID, GRID)
        for name in ("text", "negative", "i2i"):
            golden[f"{name}.clip_features"] = self._sample(golden[f"{name}.hidden_states"])
        golden |= {
            "dit.x": noise(2, CHANNELS, GRID, GRID),
            "dit.timestep": torch.tensor([966.0, 12.0]),
            "dit.z": noise(2, QUERIES, WIDTH),
        }
        golden["dit.velocity"] = self._velocity(golden["dit.x"], golden["dit.timestep"], golden["dit.z"])
        golden["decode.noise"] = noise(1, 4, 10, 12)
        golden["decode.latents"] = originals.plain_loop(
            self.unet,
            SCHEDULE,
            4,
            "euler",
            DECODER_STEPS,
            3.0,
            golden["text.clip_features"],
            golden["negative.clip_features"],
            golden["decode.noise"],
        )
        pixels = self.vae.decode(golden["decode.latents"] / self.vae.config.scaling_factor).sample
        golden["decode.image"] = (pixels / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
        self._encode_picture()

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def _conditioning(
        self, ids: list[int], patches: Tensor | None = None, grid: Tensor | None = None
    ) -> Tensor:
        ids = [*ids, self.tokenizer.token_to_id("[IMG]")]
        embeddings = self.qwen.get_input_embeddings()(torch.tensor([ids]))
        inner = self.qwen.model
        if patches is not None:
            visual = getattr(self.qwen, "visual", None) or inner.visual
            seen = visual(patches, grid)
            seen = seen if isinstance(seen, Tensor) else seen.pooler_output
            embeddings[0, [place for place, token in enumerate(ids) if token == self.pad]] = seen
        embeddings = torch.cat([embeddings, self.queries], dim=1)
        positions = torch.arange(embeddings.shape[1]).expand(3, 1, -1)
        text_model = getattr(inner, "language_model", inner)
        states = text_model(inputs_embeds=embeddings, position_ids=positions).last_hidden_state
        return states[:, -QUERIES:]

    def _conditioning_with_picture(self) -> Tensor:
        # The stored limit of 112 x 112 pixels holds for the 448 x 448 picture too.
        small = self.picture.resize((448, 448), Image.Resampling.BICUBIC).resize(
            (112, 112), Image.Resampling.BICUBIC
        )
        values = torch.from_numpy((np.asarray(small) / 255 - CLIP_MEAN) / CLIP_STD).float()
        patches = []
        for row, column in np.ndindex(4, 4):  # merged squares of 2 x 2 patches
            for inner_row, inner_column in np.ndindex(2, 2):
                top, left = 28 * row + 14 * inner_row, 28 * column + 14 * inner_column
                patch = values[top : top + 14, left : left + 14].permute(2, 0, 1)
                patches.append(torch.stack([patch, patch], dim=1).reshape(-1))
        rows = torch.stack(patches)
        self.golden["i2i.pixel_values_mean"] = rows.mean(-1)
        pads = "<|vision_start|>" + "<|image_pad|>" * 16 + "<|vision_end|>"
        ids = self._ids(TEMPLATE.format(pads + "\n" + INSTRUCTION))
        return self._conditioning(ids, rows, torch.tensor([[1, 8, 8]]))

    def _velocity(self, grid: Tensor, timestep: Tensor, conditioning: Tensor) -> Tensor:
        return originals.original_velocity(self.dit, grid, timestep, conditioning)

    def _sample(self, conditioning: Tensor) -> Tensor:
        scheduler = FlowMatchEulerDiscreteScheduler()
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / 30, 30))
        grid = self.golden["text.noise"]
        zeros = torch.zeros_like(conditioning)
        for timestep in scheduler.timesteps:
            whole = timestep.long().float().expand(1)
            plain, steered = (self._velocity(grid, whole, each) for each in (zeros, conditioning))
            grid = scheduler.step(plain + 3.0 * (steered - plain), timestep, grid).prev_sample
        return grid.flatten(2).transpose(1, 2)

    def _encode_picture(self) -> None:
        size, picture = TOWER.image_size, self.picture
        tall = picture.resize((size, int(size * picture.height / picture.width)), Image.Resampling.BICUBIC)
        top = round((tall.height - size) / 2)
        cropped = np.asarray(tall.crop((0, top, size, top + size))) / 255
        pixels = torch.from_numpy((cropped - CLIP_MEAN) / CLIP_STD).float().permute(2, 0, 1)[None]
        tokens = originals.plain_tokens(self.tower, TOWER, pixels).float()[:, 1:]
        grid = tokens.transpose(1, 2).reshape(1, CHANNELS, GRID, TOWER.pool, GRID, TOWER.pool)
        self.golden |= {
            "eva.pixels": pixels[:, :, ::16, ::16],
            "eva.pixels_mean": pixels.mean(dim=(2, 3)),
            "eva.tokens_first64": tokens[:, :64],
            "eva.pooled": grid.mean(dim=(3, 5)),
        }


def _random(module: nn.Module, seed: int) -> Any:
    """Random weights that bf16 holds exactly, as a published file does."""
    tiny_models.randomise(module, seed)
    for parameter in module.parameters():
        parameter.copy_(_rounded(parameter))
    return module


def _rounded(tensor: Tensor) -> Tensor:
    return tensor.bfloat16().float()


def _tower_weights() -> dict[str, Tensor]:
    width, generator = TOWER.width, torch.Generator().manual_seed(4)
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, TOWER.patch_grid**2 + 1, width),
        "patch_embed.proj.weight": (width, 3, TOWER.patch_size, TOWER.patch_size),
        "patch_embed.proj.bias": (width,),
    }
    for index in range(TOWER.layers):
        for name, shape in (
            ("norm1.weight", (width,)),
            ("norm1.bias", (width,)),
            ("attn.qkv.weight", (3 * width, width)),
            ("attn.qkv.bias", (3 * width,)),
            ("attn.proj.weight", (width, width)),
            ("attn.proj.bias", (width,)),
            ("norm2.weight", (width,)),
            ("norm2.bias", (width,)),
            ("mlp.fc1.weight", (TOWER.mlp_dim, width)),
            ("mlp.fc1.bias", (TOWER.mlp_dim,)),
            ("mlp.fc2.weight", (width, TOWER.mlp_dim)),
            ("mlp.fc2.bias", (width,)),
        ):
            shapes[f"blocks.{index}.{name}"] = shape
    return {
        key: _rounded(torch.randn(shape, generator=generator) / max(1.0, np.prod(shape[1:])) ** 0.5)
        for key, shape in shapes.items()
    }


def _unet_config() -> dict[str, Any]:
    return {
        "sample_size": 16,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (16, 16, 32),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 2,
        "attention_head_dim": (2, 2, 4),
        "cross_attention_dim": CHANNELS,
        "transformer_layers_per_block": (1, 1, 2),
        "norm_num_groups": 8,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": CHANNELS + 6 * 8,
    }


def _vae_config() -> dict[str, Any]:
    return {
        "block_out_channels": (8, 8, 16),
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
        "layers_per_block": 1,
        "latent_channels": 4,
        "norm_num_groups": 4,
        "sample_size": 64,
        "scaling_factor": 0.3,
    }


def _save(weights: dict[str, Tensor], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: tensor.bfloat16().contiguous().clone() for key, tensor in weights.items()}, str(path))


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, default=list), "utf-8")
