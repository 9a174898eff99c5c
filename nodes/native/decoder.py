"""The decoder as ComfyUI's own: an SDXL-shaped UNet as MODEL and the autoencoder as VAE, from the diffusers files."""

from __future__ import annotations

import math
from typing import Any

import comfy.latent_formats
import comfy.ldm.models.autoencoder
import comfy.model_base
import comfy.model_management as memory
import comfy.model_patcher
import comfy.ops
import comfy.sd
import comfy.supported_models
import comfy.utils
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import Timestep, UNetModel
from torch import Tensor, nn

from ...blip3o_core.checkpoints.layout import CheckpointFiles, open_checkpoint
from ...blip3o_core.checkpoints.safetensor_files import read_tensors
from ...blip3o_core.config import pixels_per_latent
from ...blip3o_core.errors import BadInputError, WrongCheckpointError
from . import host, layers, preview

SUPPORTED_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
COMFY_NORM_GROUPS = 32
PREDICTIONS = {
    "epsilon": comfy.model_base.ModelType.EPS,
    "v_prediction": comfy.model_base.ModelType.V_PREDICTION,
}
# The sizes of SDXL's autoencoder, the only ones ComfyUI's own network can be built with.
SDXL_VAE = {
    "block_out_channels": [128, 256, 512, 512],
    "latent_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "mid_block_add_attention": True,
}


# --- UNet ------------------------------------------------------------------------------------------------------------


def unet_settings(config: dict[str, Any], name: str) -> dict[str, Any]:
    """ComfyUI's description of a diffusers UNet of SDXL's shape.

    Args:
        config: config.json of the UNet.
        name: checkpoint name, for messages.

    Raises:
        WrongCheckpointError: it has another shape than SDXL's, whatever its widths.
    """
    widths = config["block_out_channels"]
    levels = len(widths)
    resnets = _per_level(config["layers_per_block"], levels)
    depths = [
        depth if kind.startswith("CrossAttn") else 0
        for depth, kind in zip(
            _per_level(config.get("transformer_layers_per_block", 1), levels),
            config["down_block_types"],
            strict=True,
        )
    ]
    # diffusers' name is wrong on purpose: "attention_head_dim" holds the number of heads when the other is absent.
    heads = _per_level(config.get("num_attention_heads") or config["attention_head_dim"], levels)
    head_widths = {width // count for width, count, depth in zip(widths, heads, depths, strict=True) if depth}
    multipliers = [width // widths[0] for width in widths]
    oddities = {
        "one head width for all levels": len(head_widths) == 1,
        "widths that are multiples of the first": [widths[0] * times for times in multipliers]
        == list(widths),
        "the addition embedding text_time": config.get("addition_embed_type") == "text_time",
        "the middle block UNetMidBlock2DCrossAttn": config.get("mid_block_type", "UNetMidBlock2DCrossAttn")
        == "UNetMidBlock2DCrossAttn",
        "SiLU": config.get("act_fn", "silu") in ("silu", "swish"),
        "norm_eps 1e-5": math.isclose(config.get("norm_eps", 1e-5), 1e-5),
    }
    if missing := [what for what, is_met in oddities.items() if not is_met]:
        raise WrongCheckpointError(
            f'The decoder of checkpoint "{name}" is no UNet of SDXL\'s shape: it lacks {", ".join(missing)}.\n'
            'Use the folder "diffusion-decoder" of BLIP3o-Model-8B or -4B.'
        )
    return {
        "image_size": 32,
        "in_channels": config["in_channels"],
        "out_channels": config["out_channels"],
        "model_channels": widths[0],
        "channel_mult": multipliers,
        "num_res_blocks": resnets,
        "transformer_depth": [
            depth for depth, count in zip(depths, resnets, strict=True) for _ in range(count)
        ],
        "transformer_depth_output": [
            depth for depth, count in zip(depths, resnets, strict=True) for _ in range(count + 1)
        ],
        "transformer_depth_middle": _per_level(config.get("transformer_layers_per_block", 1), levels)[-1],
        "num_head_channels": head_widths.pop(),
        "context_dim": config["cross_attention_dim"],
        "adm_in_channels": config["projection_class_embeddings_input_dim"],
        "num_classes": "sequential",
        "use_linear_in_transformer": bool(config.get("use_linear_projection", False)),
        "use_spatial_transformer": True,
        "use_checkpoint": False,
        "legacy": False,
        "use_temporal_attention": False,
        "use_temporal_resblock": False,
    }


def with_norm_groups(ops: Any, groups: int) -> Any:
    """The layer classes with another number of groups in GroupNorm; ComfyUI's UNet asks for 32 always."""
    if groups == COMFY_NORM_GROUPS:
        return ops

    class GroupNorm(ops.GroupNorm):
        def __init__(self, num_groups: int, num_channels: int, **options: Any) -> None:
            super().__init__(groups, num_channels, **options)

    return type("LayerClasses", (ops,), {"GroupNorm": GroupNorm})


class DecoderLatents(comfy.latent_formats.SDXL):
    """The VAE's latents: SDXL's as published, or those of a smaller VAE with its own scale, channels and preview map."""

    def __init__(self, vae_config: dict[str, Any], rgb: preview.RgbFactors | None) -> None:
        super().__init__()
        self.scale_factor = vae_config["scaling_factor"]
        self.latent_channels = vae_config["latent_channels"]
        self.spacial_downscale_ratio = pixels_per_latent(vae_config)
        if rgb is not None:
            self.latent_rgb_factors, self.latent_rgb_factors_bias = rgb.factors, rgb.bias
            self.taesd_decoder_name = None


class DecoderConfig(comfy.supported_models.SDXL):
    """SDXL, conditioned on image features instead of text."""

    unet_extra_config: dict[str, Any] = {}

    def __init__(
        self, settings: dict[str, Any], latent_format: DecoderLatents, scheduler: dict[str, Any]
    ) -> None:
        self.latent_format: Any = lambda: latent_format  # ComfyUI calls it, and keeps what it returns
        super().__init__(settings)
        self.sampling_settings = {
            "beta_schedule": "linear",  # ComfyUI's word for diffusers' "scaled_linear"
            "linear_start": scheduler["beta_start"],
            "linear_end": scheduler["beta_end"],
            "timesteps": scheduler["num_train_timesteps"],
            "zsnr": scheduler.get("rescale_betas_zero_snr", False),
        }

    def inpaint_model(self) -> bool:
        return False


class FeatureDecoder(comfy.model_base.SDXL):
    """SDXL's sampling around the UNet; the size embedding has the width this UNet was trained with."""

    def __init__(
        self,
        model_config: DecoderConfig,
        model_type: comfy.model_base.ModelType,
        unet: UNetModel,
        *,
        time_width: int,
        native_side: int,
    ) -> None:
        super().__init__(model_config, model_type)
        self.diffusion_model = unet
        self.embedder = Timestep(time_width)
        self.pixels_per_latent = model_config.latent_format.spacial_downscale_ratio
        self.native_side = native_side
        memory.archive_model_dtypes(unet)

    @property
    def feature_channels(self) -> int:
        """Channels of the image features it paints."""
        return self.model_config.unet_config["context_dim"]

    def encode_adm(self, **conds: Any) -> Tensor:
        """Mean feature and sizes of the picture, (B, features + 6 x time width)."""
        pooled, width = conds.get("pooled_output"), self.feature_channels
        if pooled is None or pooled.shape[-1] != width:
            raise BadInputError(
                "The decoder draws from image features, but got a conditioning of another kind.\n"
                'Connect "Features To Conditioning (BLIP3-o)" to positive and negative of the sampler. '
                f"(pooled width {'none' if pooled is None else pooled.shape[-1]}, expected {width})"
            )
        return super().encode_adm(**conds)


def load_decoder_patcher(
    folder: str, dtype: str, decoder: str | None = None, disable_dynamic: bool = False
) -> comfy.model_patcher.ModelPatcher:
    """The decoder's UNet of a checkpoint folder as a MODEL. Arguments as load_dit_patcher.

    Args:
        decoder: folder of another decoder; None = the checkpoint's own.
    """
    files = open_checkpoint(folder, decoder=decoder)
    unet_config, vae_config = files.decoder_config("unet"), files.decoder_config("vae")
    scheduler = files.decoder_config("scheduler")
    storage, compute = host.storage_and_compute_dtype(
        dtype, SUPPORTED_DTYPES, sum(info.nbytes for info in files.decoder_tensors("unet").values())
    )
    settings = unet_settings(unet_config, files.name)
    ops = comfy.ops.manual_cast if storage != compute else comfy.ops.disable_weight_init
    groups = unet_config.get("norm_num_groups") or COMFY_NORM_GROUPS
    unet = UNetModel(**settings, dtype=compute, device="meta", operations=with_norm_groups(ops, groups))
    _fill_unet(unet, settings, files, layers.file_dtype(storage))
    layers.set_dtypes(unet, storage, compute)
    rgb, native_side = None, unet_config["sample_size"] * pixels_per_latent(vae_config)
    if not is_sdxl_vae(vae_config):
        rgb = preview.latent_factors(load_vae(folder, decoder), native_side, vae_config["scaling_factor"])
    latents = DecoderLatents(vae_config, rgb)
    config = DecoderConfig({**settings, "disable_unet_model_creation": True}, latents, scheduler)
    config.set_inference_dtype(storage, compute)
    prediction = PREDICTIONS[scheduler.get("prediction_type", "epsilon")]
    model = FeatureDecoder(
        config,
        prediction,
        unet.eval().requires_grad_(False),
        time_width=unet_config["addition_time_embed_dim"],
        native_side=native_side,
    )
    return host.make_patcher(
        model, load_decoder_patcher, (folder, dtype, decoder), disable_dynamic=disable_dynamic
    )


def _fill_unet(
    unet: UNetModel, settings: dict[str, Any], files: CheckpointFiles, dtype: torch.dtype | None
) -> None:
    names = comfy.utils.unet_to_diffusers(settings)
    infos = {key: info for key, info in files.decoder_tensors("unet").items() if key in names}
    state_dict = {names[key]: tensor for key, tensor in read_tensors(infos, dtype=dtype)}
    missing, _ = unet.load_state_dict(state_dict, strict=False, assign=True)
    if missing:
        raise WrongCheckpointError(
            f'The decoder of checkpoint "{files.name}" does not fit its configuration: {len(missing)} weights are missing '
            f'(e.g. {missing[0]}).\nDelete "{files.decoder_folder / "unet"}" and download it again.'
        )


def _per_level(value: int | list[int], levels: int) -> list[int]:
    return list(value) if isinstance(value, (list, tuple)) else [value] * levels


# --- VAE -------------------------------------------------------------------------------------------------------------


class Autoencoder(nn.Module):
    """A diffusers AutoencoderKL in the calling convention of ComfyUI's VAE."""

    def __init__(self, vae: nn.Module) -> None:
        super().__init__()
        self.vae: Any = vae  # diffusers' AutoencoderKL, of which a type checker sees a stand-in

    def encode(self, pixels: Tensor) -> Tensor:
        """Unscaled latents of pixels (B, 3, H, W) in [-1, 1]: the mean of the posterior."""
        return self.vae.encode(pixels).latent_dist.mode()

    def decode(self, latents: Tensor) -> Tensor:
        """Pixels in [-1, 1] of unscaled latents."""
        return self.vae.decode(latents).sample


def is_sdxl_vae(config: dict[str, Any]) -> bool:
    """Whether a diffusers VAE has the sizes of SDXL's."""
    return all(config.get(key, value) == value for key, value in SDXL_VAE.items())


def load_vae(folder: str, decoder: str | None = None) -> comfy.sd.VAE:
    """The decoder's autoencoder as a VAE: ComfyUI's own network where the sizes are SDXL's, diffusers' otherwise.

    Args:
        decoder: folder of another decoder; None = the checkpoint's own.
    """
    files = open_checkpoint(folder, decoder=decoder)
    config = files.decoder_config("vae")
    if is_sdxl_vae(config):
        state_dict = dict(read_tensors(files.decoder_tensors("vae")))
        vae = comfy.sd.VAE(sd=state_dict)
        vae.patcher.cached_patcher_init = (load_vae_patcher, (folder, decoder))
        return vae
    vae = _small_vae(files, config)
    vae.patcher.cached_patcher_init = (load_vae_patcher, (folder, decoder))
    return vae


def load_vae_patcher(
    folder: str, decoder: str | None = None, disable_dynamic: bool = False
) -> comfy.model_patcher.ModelPatcher:
    """The patcher inside a new VAE of load_vae."""
    vae = load_vae(folder, decoder)
    if not disable_dynamic:
        return vae.patcher
    return comfy.model_patcher.ModelPatcher(vae.first_stage_model, vae.device, memory.vae_offload_device())


def _small_vae(files: CheckpointFiles, config: dict[str, Any]) -> comfy.sd.VAE:
    from diffusers import AutoencoderKL

    # ComfyUI's VAE has no way to be handed a network; it makes a minimal one, which is then replaced.
    smallest = {
        "ddconfig": {
            **{"double_z": True, "z_channels": config["latent_channels"], "resolution": 32, "in_channels": 3},
            **{
                "out_ch": 3,
                "ch": 32,
                "ch_mult": [1],
                "num_res_blocks": 1,
                "attn_resolutions": [],
                "dropout": 0.0,
            },
        },
        "embed_dim": config["latent_channels"],
    }
    placeholder = comfy.ldm.models.autoencoder.AutoencoderKL(**smallest)
    vae = comfy.sd.VAE(sd=placeholder.state_dict(), config={"params": smallest})
    with torch.device("meta"):
        network = AutoencoderKL.from_config(config)
    infos = {key: info for key, info in files.decoder_tensors("vae").items() if key in network.state_dict()}
    network.load_state_dict(dict(read_tensors(infos, dtype=vae.vae_dtype)), assign=True)
    layers.exchange_layers(network, is_cast=False)
    vae.first_stage_model = Autoencoder(network).eval().requires_grad_(False)
    memory.archive_model_dtypes(vae.first_stage_model)
    vae.patcher = comfy.model_patcher.CoreModelPatcher(
        vae.first_stage_model, load_device=vae.device, offload_device=memory.vae_offload_device()
    )
    vae.latent_channels = config["latent_channels"]
    vae.downscale_ratio = vae.upscale_ratio = pixels_per_latent(config)
    vae.size = None
    vae.model_size()
    return vae
