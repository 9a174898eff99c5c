"""The DiT as a MODEL of ComfyUI: a flow whose latents are the 8 x 8 grid of image features."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import comfy.conds
import comfy.latent_formats
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.supported_models_base
import comfy.utils
import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ...blip3o_core.checkpoints.layout import CheckpointFiles, open_checkpoint
from ...blip3o_core.checkpoints.load import load_dit
from ...blip3o_core.config import model_words
from ...blip3o_core.errors import BadInputError
from ...blip3o_core.lora.files import dit_fingerprint
from ...blip3o_core.models.nextdit import NextDiT
from . import host, layers, preview

SUPPORTED_DTYPES = (torch.bfloat16, torch.float32)
# One feature stands for 128 x 128 of the 1024 x 1024 pixels, so that ComfyUI's empty latent of that size is 8 x 8.
PIXELS_PER_FEATURE = 128
# Divisible by all usual step counts, so that ComfyUI's "simple" schedule is exactly linspace(1, 1 / steps, steps).
SIGMA_TABLE = 25200
# Sigma x 1000 comes out a few float32 roundings below a whole number; the published code truncates the exact value.
TIMESTEP_ROUNDING = 1e-3


class FeatureFormat(comfy.latent_formats.LatentFormat):
    """Latents that are image features, unscaled.

    Args:
        channels: of the image features, 1792 as published.
        rgb: factors (channels, 3) and bias (3,) of the preview picture in [-1, 1].
    """

    spacial_downscale_ratio = PIXELS_PER_FEATURE

    def __init__(self, channels: int, rgb: preview.RgbFactors) -> None:
        self.latent_channels = channels
        self.latent_rgb_factors = rgb.factors
        self.latent_rgb_factors_bias = rgb.bias


class FeatureFlowConfig(comfy.supported_models_base.BASE):
    """What ComfyUI asks about the model besides its weights."""

    unet_extra_config: dict[str, Any] = {}
    sampling_settings = {"shift": 1.0, "multiplier": 1000}
    supported_inference_dtypes = list(SUPPORTED_DTYPES)
    # 64 tokens of one image need about 5 MB of activations in bf16.
    memory_usage_factor = 4.0

    def __init__(self, latent_format: FeatureFormat, storage: torch.dtype, compute: torch.dtype) -> None:
        self.latent_format = lambda: latent_format
        super().__init__({"disable_unet_model_creation": True})
        self.set_inference_dtype(storage, compute)


class PromptCond(comfy.conds.CONDRegular):
    """A conditioning that stays the same tensor object at every step of a run, so that what is made of it can be kept."""

    def __init__(self, cond: Tensor) -> None:
        super().__init__(cond)
        self._repeated: dict[int, PromptCond] = {}
        self._joined: dict[tuple[PromptCond, ...], Tensor] = {}

    def process_cond(self, batch_size: int, **unused: Any) -> PromptCond:
        if batch_size not in self._repeated:
            self._repeated[batch_size] = PromptCond(comfy.utils.repeat_to_batch_size(self.cond, batch_size))
        return self._repeated[batch_size]

    def concat(self, others: list[PromptCond]) -> Tensor:
        key = tuple(others)
        if key not in self._joined:
            self._joined[key] = super().concat(others)
        return self._joined[key]


class SamplerDiT(NextDiT):
    """The DiT with the calling convention of ComfyUI's samplers. A loaded NextDiT becomes one by changing its class.

    Keys and values of the context are made at the first step of a run and kept as long as its conditioning lives: see
    FeatureFlow.extra_conds, which makes a new one for each run.
    """

    dtype: torch.dtype

    def forward(  # type: ignore[override]  # called by ComfyUI, in its own words
        self,
        x: Tensor,
        timesteps: Tensor,
        context: Tensor,
        control: Any = None,
        transformer_options: dict[str, Any] | None = None,
        **unused: Any,
    ) -> Tensor:
        if torch.is_grad_enabled():  # training changes the weights in the middle of a run
            return super().forward(x, timesteps, context)
        kept = vars(self).setdefault("_contexts", WeakTensorKeyDictionary())
        if context not in kept:
            kept[context] = self.encode_context(context)
        return super().forward(x, timesteps, context=kept[context])


class FeatureFlow(comfy.model_base.BaseModel):
    """Flow from noise to image features, velocity = noise - features, with the published noise levels.

    Args:
        fingerprint: of the DiT as it is in the checkpoint, by which a LoRA knows its base.
    """

    def __init__(
        self, model_config: FeatureFlowConfig, diffusion_model: SamplerDiT, fingerprint: str
    ) -> None:
        super().__init__(model_config, comfy.model_base.ModelType.FLOW)
        self.diffusion_model = diffusion_model
        self.fingerprint = fingerprint
        comfy.model_management.archive_model_dtypes(diffusion_model)
        self.model_sampling.set_parameters(shift=1.0, timesteps=SIGMA_TABLE, multiplier=1000)

    def process_timestep(self, timestep: Tensor, **unused: Any) -> Tensor:
        """Whole timesteps: the network was trained and published with truncated ones (966.67 -> 966)."""
        return torch.floor(timestep + TIMESTEP_ROUNDING)

    def extra_conds(self, **conds: Any) -> dict[str, Any]:
        """Pass the conditioning on, after checking that it was made by a backbone of this model's width."""
        found = super().extra_conds(**conds)
        conditioning = conds.get("cross_attn")
        if conditioning is not None:
            check_conditioning(conditioning, self.diffusion_model.config.conditioning_dim)
            # Hooks change weights in the middle of a run: what was made with the old ones must not be kept.
            kind = comfy.conds.CONDRegular if conds.get("hooks") is not None else PromptCond
            device = conds.get("device", conditioning.device)
            # A copy: the weights may be others when the same conditioning comes again in another run.
            own = conditioning.to(device, self.get_dtype_inference(), copy=True)
            found["c_crossattn"] = kind(own)
        return found


def check_conditioning(conditioning: Tensor, expected_width: int) -> None:
    """Refuse conditioning of another model.

    Raises:
        BadInputError: its width is not the DiT's.
    """
    width = conditioning.shape[-1]
    if width != expected_width:
        other = {768: "an SD 1.5 text encoder", 4096: "a T5 text encoder"}.get(width, "another model")
        raise BadInputError(
            f"This prompt was encoded by {model_words(width, other)}, but the DiT belongs to "
            f"{model_words(expected_width, 'a model of another size')}.\n"
            'Connect the conditioning of "Encode Prompt (BLIP3-o)" and let both come from the same "Load BLIP3-o" node. '
            f"(conditioning width {width}, expected {expected_width})"
        )


def load_dit_patcher(
    folder: str, dtype: str, disable_dynamic: bool = False
) -> comfy.model_patcher.ModelPatcher:
    """The DiT of a checkpoint folder as a MODEL.

    Args:
        folder: checkpoint folder.
        dtype: choice of the loader's widget, see host.DTYPES.
    """
    files: CheckpointFiles = open_checkpoint(Path(folder))
    storage, compute = host.storage_and_compute_dtype(
        dtype, SUPPORTED_DTYPES, files.component_bytes.get("dit", 0)
    )
    dit = load_dit(files, dtype=layers.file_dtype(storage))
    rgb = preview.feature_factors(files, dit)
    fingerprint = dit_fingerprint(dit.state_dict())
    layers.prepare(dit, storage, compute)
    config = FeatureFlowConfig(FeatureFormat(dit.config.in_channels, rgb), storage, compute)
    dit.__class__ = SamplerDiT
    assert isinstance(dit, SamplerDiT)
    dit.dtype = storage
    model = FeatureFlow(config, dit, fingerprint)
    return host.make_patcher(model, load_dit_patcher, (folder, dtype), disable_dynamic=disable_dynamic)
