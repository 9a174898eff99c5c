"""Nodes that draw: prompt to conditioning, conditioning to image features, features to pictures."""

from __future__ import annotations

from typing import Any

import comfy.samplers
import comfy.sd
import torch
from comfy_api.latest import io
from torch import Tensor

from ..blip3o_core.seeds import MAX_SEED
from .native.drawing import (
    PUBLISHED,
    Conditioning,
    Patcher,
    decoder_conditioning,
    encode_prompt,
    picture_size,
    require_decoder,
    require_dit,
    run_decoder,
    run_dit,
)
from .native.sockets import BackboneHandle, BackboneType, feature_grid, features_latent

CATEGORY = "BLIP3-o/generate"
MAX_SIDE = 4096
# Beyond it the published spacing would repeat timesteps.
MAX_DECODER_STEPS = 500


def seed_input(what: str) -> io.Int.Input:
    return io.Int.Input(
        "seed",
        default=0,
        min=0,
        max=MAX_SEED,
        control_after_generate=True,
        tooltip=f"Same seed, same {what}. Item number i of a batch uses seed + i, so it can be made again alone.",
    )


def dit_settings() -> list[io.Input]:
    return [
        io.Int.Input(
            "steps",
            default=30,
            min=1,
            max=1000,
            tooltip="More steps follow the flow more exactly. 20-40 is usual, 30 as published. Time grows in proportion.",
        ),
        io.Float.Input(
            "cfg",
            default=3.0,
            min=0.0,
            max=100.0,
            step=0.1,
            tooltip="Higher follows the prompt more closely and varies less. 2-5 is usual. 1 switches guidance off.",
        ),
    ]


class EncodePrompt(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="BLIP3oEncodePrompt",
            display_name="Encode Prompt (BLIP3-o)",
            category=CATEGORY,
            description="Let the backbone read a prompt, with pictures if you like. Connect positive and negative to "
            "Sample Image Features, or to ComfyUI's own KSampler with the DiT as model.",
            search_aliases=["blip3o", "text encode", "clip text", "prompt", "instruction edit"],
            inputs=[
                BackboneType.Input("backbone", tooltip="The output backbone of Load BLIP3-o."),
                io.String.Input(
                    "prompt",
                    multiline=True,
                    dynamic_prompts=True,
                    default="",
                    placeholder="What the picture shows",
                    tooltip="What to draw, in plain sentences. With pictures connected: what to do with them. "
                    "May be empty only with pictures (then they are redrawn).",
                ),
                io.String.Input(
                    "negative_prompt",
                    multiline=True,
                    dynamic_prompts=True,
                    default="",
                    placeholder="What to avoid (may stay empty)",
                    tooltip="What to guide away from. Empty uses the published neutral direction, which is nearly always best.",
                ),
                io.Image.Input(
                    "images",
                    optional=True,
                    tooltip="Pictures the prompt talks about; all of the batch go into one prompt.",
                ),
            ],
            outputs=[
                io.Conditioning.Output("positive", tooltip="The prompt, for the DiT."),
                io.Conditioning.Output("negative", tooltip="What to guide away from, for the DiT."),
                io.Conditioning.Output(
                    "decoder_negative",
                    tooltip="The blank prompt whose features the published decoder guides away from. "
                    "Connect it to decoder_negative of Sample Image Features.",
                ),
            ],
        )

    @classmethod
    def execute(
        cls, backbone: BackboneHandle, prompt: str, negative_prompt: str, images: Tensor | None = None
    ) -> io.NodeOutput:
        positive, negative, blank = encode_prompt(backbone, prompt, negative_prompt, images)
        return io.NodeOutput([[positive, {}]], [[negative, {}]], [[blank, {}]])


class SampleImageFeatures(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="BLIP3oSampleFeatures",
            display_name="Sample Image Features (BLIP3-o)",
            category=CATEGORY,
            description="Draw image features with the DiT, from noise or from other features. "
            "Connect image_features to Decode Image Features.",
            search_aliases=["blip3o", "dit", "flow matching", "sampler", "ksampler", "semantic img2img"],
            inputs=[
                io.Model.Input("dit", tooltip="The output dit of Load BLIP3-o."),
                io.Conditioning.Input("positive", tooltip="The prompt, from Encode Prompt."),
                io.Conditioning.Input("negative", tooltip="What to guide away from, from Encode Prompt."),
                seed_input("features"),
                *dit_settings(),
                io.Combo.Input(
                    "sampler",
                    options=comfy.samplers.SAMPLER_NAMES,
                    default="euler",
                    tooltip="euler is the published one. heun and dpmpp_2m need fewer steps for the same result.",
                ),
                io.Float.Input(
                    "shift",
                    default=1.0,
                    min=0.1,
                    max=10.0,
                    step=0.1,
                    tooltip="Above 1 spends more steps on the layout, below 1 more on details. 1 as published.",
                    advanced=True,
                ),
                io.Int.Input(
                    "batch_size",
                    default=1,
                    min=1,
                    max=64,
                    tooltip="Pictures per prompt. Time grows in proportion.",
                ),
                io.Latent.Input(
                    "start_features",
                    optional=True,
                    tooltip="Image features to start from instead of noise, e.g. from Encode Image or Blend.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    optional=True,
                    tooltip="With start_features: how much is drawn again. 0 keeps them, 0.3-0.7 varies them, 1 ignores them.",
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="With start_features: white is drawn again, black is kept. Scaled to the 8 x 8 features.",
                ),
                io.Conditioning.Input(
                    "decoder_negative",
                    optional=True,
                    tooltip="The output of the same name of Encode Prompt: adds negative_features for the decoder.",
                ),
            ],
            outputs=[
                io.Latent.Output("image_features", tooltip="8 x 8 image features per picture."),
                io.Latent.Output(
                    "negative_features",
                    tooltip="Features of the blank prompt (zeros if decoder_negative is not connected), for the decoder.",
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        dit: Patcher,
        positive: Conditioning,
        negative: Conditioning,
        seed: int,
        steps: int,
        cfg: float,
        sampler: str,
        shift: float,
        batch_size: int,
        start_features: dict[str, Any] | None = None,
        strength: float = 1.0,
        mask: Tensor | None = None,
        decoder_negative: Conditioning | None = None,
    ) -> io.NodeOutput:
        channels = require_dit(dit).diffusion_model.config.in_channels
        settings: dict[str, Any] = {"steps": steps, "cfg": cfg, "sampler": sampler, "shift": shift}
        features = run_dit(
            dit,
            positive,
            negative,
            seed=seed,
            batch_size=batch_size,
            start_features=None if start_features is None else feature_grid(start_features, channels),
            strength=strength,
            mask=mask,
            **settings,
        )
        if decoder_negative is None:
            away = torch.zeros_like(features[:1])
        else:
            # A seed of its own: the blank direction must not change with the batch or the prompt's noise.
            away = run_dit(dit, decoder_negative, negative, seed=0, **settings)
        return io.NodeOutput(features_latent(features), features_latent(away))


class FeaturesToConditioning(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="BLIP3oFeaturesToConditioning",
            display_name="Features To Conditioning (BLIP3-o)",
            category=CATEGORY,
            description="Let ComfyUI's own KSampler drive the decoder: connect decoder as its model, and positive, negative "
            "and latent from here.",
            search_aliases=["blip3o", "conditioning", "ksampler", "decoder"],
            inputs=[
                io.Model.Input("decoder", tooltip="The output decoder of Load BLIP3-o."),
                io.Latent.Input("image_features", tooltip="What to paint."),
                *size_inputs(),
                io.Latent.Input(
                    "negative_features",
                    optional=True,
                    tooltip="Features to guide away from; without them all zeros.",
                ),
            ],
            outputs=[
                io.Conditioning.Output("positive", tooltip="For positive of the sampler."),
                io.Conditioning.Output("negative", tooltip="For negative of the sampler."),
                io.Latent.Output("latent", tooltip="Empty latents of the right size and batch."),
            ],
        )

    @classmethod
    def execute(
        cls,
        decoder: Patcher,
        image_features: dict[str, Any],
        width: int,
        height: int,
        negative_features: dict[str, Any] | None = None,
    ) -> io.NodeOutput:
        network = require_decoder(decoder)
        height, width = picture_size(network, height, width)
        features = feature_grid(image_features, network.feature_channels)
        away = (
            None if negative_features is None else feature_grid(negative_features, network.feature_channels)
        )
        positive, negative = decoder_conditioning(features, away, height, width)
        factor = network.pixels_per_latent
        empty = torch.zeros(
            features.shape[0], network.latent_format.latent_channels, height // factor, width // factor
        )
        return io.NodeOutput(positive, negative, {"samples": empty})


def size_inputs() -> list[io.Input]:
    return [
        io.Int.Input(
            name,
            default=0,
            min=0,
            max=MAX_SIDE,
            step=8,
            tooltip=f"{name.capitalize()} of the picture in pixels. 0 is the size the decoder was trained at (1024 for 8B and "
            "4B); others are experimental.",
        )
        for name in ("width", "height")
    ]


def decoder_settings() -> list[io.Input]:
    return [
        io.Int.Input(
            "steps",
            default=50,
            min=1,
            max=MAX_DECODER_STEPS,
            tooltip="More steps paint finer detail. 50 as published with euler; 20-25 suffice with dpmpp_2m.",
        ),
        io.Float.Input(
            "cfg",
            default=3.0,
            min=0.0,
            max=100.0,
            step=0.1,
            tooltip="Higher follows the features more closely and looks harsher. 2-5 is usual. 1 is off and twice as fast.",
        ),
    ]


class DecodeImageFeatures(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="BLIP3oDecodeFeatures",
            display_name="Decode Image Features (BLIP3-o)",
            category=CATEGORY,
            description="Paint image features as a picture with the decoder. Connect the picture to Save Image.",
            search_aliases=["blip3o", "clip to pixel", "decoder", "unclip", "img2img"],
            inputs=[
                io.Model.Input("decoder", tooltip="The output decoder of Load BLIP3-o."),
                io.Vae.Input("vae", tooltip="The output vae of Load BLIP3-o."),
                io.Latent.Input(
                    "image_features", tooltip="From Sample Image Features, Encode Image, Blend or Compose."
                ),
                seed_input("picture"),
                *decoder_settings(),
                *size_inputs(),
                io.Combo.Input(
                    "sampler",
                    options=comfy.samplers.SAMPLER_NAMES,
                    default="euler",
                    tooltip="euler is the published one; dpmpp_2m needs half the steps.",
                ),
                io.Combo.Input(
                    "scheduler",
                    options=[PUBLISHED, *comfy.samplers.SCHEDULER_NAMES],
                    default=PUBLISHED,
                    tooltip="How noise falls from step to step. published repeats the original decoder exactly.",
                    advanced=True,
                ),
                io.Boolean.Input(
                    "tiled",
                    default=False,
                    tooltip="Decode in tiles: slower, but large pictures fit on a small graphics card.",
                    advanced=True,
                ),
                io.Latent.Input(
                    "negative_features",
                    optional=True,
                    tooltip="From Sample Image Features; without them the decoder guides away from all zeros.",
                ),
                io.Image.Input(
                    "start_image",
                    optional=True,
                    tooltip="Picture to start from instead of noise, for img2img and hires fix.",
                ),
                io.Float.Input(
                    "denoise",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    optional=True,
                    tooltip="With start_image: how much is painted again. 0 keeps it, 0.3-0.6 refines it, 1 ignores it.",
                ),
            ],
            outputs=[io.Image.Output("images", tooltip="The pictures.")],
        )

    @classmethod
    def execute(
        cls,
        decoder: Patcher,
        vae: comfy.sd.VAE,
        image_features: dict[str, Any],
        seed: int,
        steps: int,
        cfg: float,
        width: int,
        height: int,
        sampler: str,
        scheduler: str,
        tiled: bool,
        negative_features: dict[str, Any] | None = None,
        start_image: Tensor | None = None,
        denoise: float = 1.0,
    ) -> io.NodeOutput:
        channels = require_decoder(decoder).feature_channels
        away = None if negative_features is None else feature_grid(negative_features, channels)
        pictures = run_decoder(
            decoder,
            vae,
            feature_grid(image_features, channels),
            seed=seed,
            steps=steps,
            cfg=cfg,
            width=width,
            height=height,
            sampler=sampler,
            scheduler=scheduler,
            negative_features=away,
            start_images=start_image,
            strength=denoise,
            tiled=tiled,
        )
        return io.NodeOutput(pictures)


class GeneratePicture(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="BLIP3oGenerate",
            display_name="Generate Picture (BLIP3-o)",
            category=CATEGORY,
            description="Prompt in, picture out: all stages in one node, with the published settings. "
            "Connect the picture to Save Image.",
            search_aliases=["blip3o", "text to image", "t2i", "easy", "all in one"],
            inputs=[
                BackboneType.Input("backbone", tooltip="The output backbone of Load BLIP3-o."),
                io.Model.Input("dit", tooltip="The output dit of Load BLIP3-o."),
                io.Model.Input("decoder", tooltip="The output decoder of Load BLIP3-o."),
                io.Vae.Input("vae", tooltip="The output vae of Load BLIP3-o."),
                io.String.Input(
                    "prompt",
                    multiline=True,
                    dynamic_prompts=True,
                    default="",
                    placeholder="What the picture shows",
                    tooltip="What to draw, in plain sentences.",
                ),
                seed_input("picture"),
                io.Int.Input("batch_size", default=1, min=1, max=64, tooltip="How many pictures."),
                io.Int.Input(
                    "feature_steps",
                    default=30,
                    min=1,
                    max=1000,
                    tooltip="Steps of the DiT, 30 as published.",
                    advanced=True,
                ),
                io.Float.Input(
                    "feature_cfg",
                    default=3.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    tooltip="How closely the DiT follows the prompt. 2-5 is usual.",
                    advanced=True,
                ),
                io.Int.Input(
                    "pixel_steps",
                    default=50,
                    min=1,
                    max=MAX_DECODER_STEPS,
                    tooltip="Steps of the decoder, 50 as published.",
                    advanced=True,
                ),
                io.Float.Input(
                    "pixel_cfg",
                    default=3.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    tooltip="How closely the decoder follows the features. 2-5 is usual.",
                    advanced=True,
                ),
                io.String.Input(
                    "negative_prompt",
                    multiline=True,
                    default="",
                    optional=True,
                    tooltip="What to avoid. May stay empty.",
                    advanced=True,
                ),
            ],
            outputs=[
                io.Image.Output("images", tooltip="The pictures."),
                io.Latent.Output(
                    "image_features", tooltip="What was drawn before it was painted, for the feature nodes."
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        backbone: BackboneHandle,
        dit: Patcher,
        decoder: Patcher,
        vae: comfy.sd.VAE,
        prompt: str,
        seed: int,
        batch_size: int,
        feature_steps: int,
        feature_cfg: float,
        pixel_steps: int,
        pixel_cfg: float,
        negative_prompt: str = "",
    ) -> io.NodeOutput:
        positive, negative, blank = encode_prompt(backbone, prompt, negative_prompt, None)
        settings: dict[str, Any] = {"steps": feature_steps, "cfg": feature_cfg}
        features = run_dit(
            dit, [[positive, {}]], [[negative, {}]], seed=seed, batch_size=batch_size, **settings
        )
        away = None
        if pixel_cfg != 1:
            away = run_dit(dit, [[blank, {}]], [[negative, {}]], seed=0, **settings)
        pictures = run_decoder(
            decoder, vae, features, seed=seed, steps=pixel_steps, cfg=pixel_cfg, negative_features=away
        )
        return io.NodeOutput(pictures, features_latent(features))


NODES = [EncodePrompt, SampleImageFeatures, DecodeImageFeatures, FeaturesToConditioning, GeneratePicture]
