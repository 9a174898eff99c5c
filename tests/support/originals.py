"""The networks as their own libraries, or plain arithmetic, compute them: what ours are compared with."""

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from comfyui_blip3o.blip3o_core.config import EvaClipConfig
from diffusers import DPMSolverMultistepScheduler, EulerDiscreteScheduler, UNet2DConditionModel
from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina
from torch import Tensor, nn
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

SCHEDULES = {"euler": EulerDiscreteScheduler, "dpmpp_2m": DPMSolverMultistepScheduler}
SCHEDULE_FIELDS = (
    "beta_start",
    "beta_end",
    "beta_schedule",
    "num_train_timesteps",
    "prediction_type",
    "timestep_spacing",
    "steps_offset",
)


# Qwen2.5-VL


def qwen_model(
    config: dict[str, Any], vocab_size: int, image_pad: int, vision_start: int
) -> Qwen2_5_VLForConditionalGeneration:
    """transformers' own model of a published, flat config.json."""
    fields = {key: value for key, value in config.items() if key not in ("model_type", "tie_word_embeddings")}
    return Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(
            **fields,
            vocab_size=vocab_size,
            image_token_id=image_pad,
            video_token_id=vocab_size + 1,
            vision_start_token_id=vision_start,
        )
    ).eval()


def published_qwen_key(key: str) -> str:
    """The name in transformers 4.51 of a tensor of any later version's model."""
    key = key.replace("model.language_model.", "model.", 1)
    return key.removeprefix("model.") if key.startswith("model.visual.") else key


def qwen_inputs(
    token_ids: Sequence[int], patches: Sequence[Tensor], grids: Sequence[Sequence[int]], image_pad: int
) -> dict[str, Tensor]:
    """What transformers' model takes; newer versions also want to know which tokens are an image's."""
    ids = torch.tensor([list(token_ids)])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if "mm_token_type_ids" in inspect.signature(Qwen2_5_VLForConditionalGeneration.forward).parameters:
        inputs["mm_token_type_ids"] = (ids == image_pad).int()
    if patches:
        inputs |= {"pixel_values": torch.cat(list(patches)), "image_grid_thw": torch.tensor(grids)}
    return inputs


# NextDiT


def original_velocity(
    original: nn.ModuleDict, grid: Tensor, timestep: Tensor, conditioning: Tensor
) -> Tensor:
    transformer = original["transformer"]
    context = original["caption_projection"](conditioning)
    rotary = get_2d_rotary_pos_embed_lumina(transformer.head_dim, *grid.shape[-2:])
    return transformer(
        grid,
        timestep,
        context,
        torch.ones(context.shape[:2], dtype=torch.int32),
        rotary,
        cross_attention_kwargs={},
        return_dict=False,
    )[0]


# EVA-CLIP


def plain_tokens(weights: dict[str, Tensor], config: EvaClipConfig, pixels: Tensor) -> Tensor:
    """Tokens by loops over patches and heads, in double precision."""
    get: Callable[[str], Tensor] = lambda key: weights[key].double()  # noqa: E731
    pixels, patch = pixels.double(), config.patch_size

    def norm(x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        return scaled * get(name + ".weight") + get(name + ".bias")

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ get(name + ".weight").T + get(name + ".bias")

    def attend(x: Tensor, name: str) -> Tensor:
        query, key, value = linear(x, name + ".qkv").chunk(3, dim=-1)
        heads = []
        for start in range(0, config.width, config.head_width):
            part = slice(start, start + config.head_width)
            scores = query[..., part] @ key[..., part].transpose(1, 2) / math.sqrt(config.head_width)
            heads.append(scores.softmax(-1) @ value[..., part])
        return linear(torch.cat(heads, -1), name + ".proj")

    def feed(x: Tensor, name: str) -> Tensor:
        inner = linear(x, name + ".fc1")
        return linear(0.5 * inner * (1 + torch.erf(inner / math.sqrt(2))), name + ".fc2")

    kernel, bias = get("patch_embed.proj.weight"), get("patch_embed.proj.bias")
    tokens = [get("cls_token").expand(pixels.shape[0], -1, -1)]
    for row in range(0, config.image_size, patch):
        for column in range(0, config.image_size, patch):
            piece = pixels[:, :, row : row + patch, column : column + patch]
            tokens.append((torch.einsum("bchw,dchw->bd", piece, kernel) + bias)[:, None])
    x = torch.cat(tokens, dim=1) + get("pos_embed")
    for index in range(config.layers):
        x = x + norm(attend(x, f"blocks.{index}.attn"), f"blocks.{index}.norm1")
        x = x + norm(feed(x, f"blocks.{index}.mlp"), f"blocks.{index}.norm2")
    return x


# Decoder


def plain_loop(
    unet: UNet2DConditionModel,
    schedule: dict[str, Any],
    vae_scale: int,
    sampler: str,
    steps: int,
    guidance: float,
    positive: Tensor,
    negative: Tensor,
    noise: Tensor,
    start: Tensor | None = None,
    skipped: int = 0,
) -> Tensor:
    """diffusers' way, one network call per guidance branch."""
    scheduler = SCHEDULES[sampler](**{key: schedule[key] for key in SCHEDULE_FIELDS})
    scheduler.set_timesteps(steps)
    height, width = (side * vae_scale for side in noise.shape[-2:])
    time_ids = torch.tensor([[1024.0, 1024.0, 0.0, 0.0, height, width]]).repeat(noise.shape[0], 1)
    timesteps = scheduler.timesteps[skipped:]
    if start is None:
        latents = noise * scheduler.init_noise_sigma
    else:
        scheduler.set_begin_index(skipped)
        latents = scheduler.add_noise(start, noise, timesteps[:1])
    for timestep in timesteps:
        inputs = scheduler.scale_model_input(latents, timestep)
        away, toward = (
            unet(
                inputs,
                timestep,
                encoder_hidden_states=tokens,
                added_cond_kwargs={"text_embeds": tokens.mean(1), "time_ids": time_ids},
            ).sample
            for tokens in (negative.expand_as(positive), positive)
        )
        latents = scheduler.step(away + guidance * (toward - away), timestep, latents).prev_sample
    return latents
