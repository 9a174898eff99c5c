"""The stages in the paper's order: what each one trains, on which data, from which earlier stages.

A run folder holds one folder per stage (config.yaml, state.pt, log.jsonl, tensorboard/, loss.png) and `cache/` with
rendered scenes and encoded features. Every stage reads the user's YAML file, or the one it was trained with, or its
file in configs/.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor, nn

from ..blip3o_core.config import EvaClipConfig, NextDiTConfig
from ..blip3o_core.errors import BadInputError, MissingFilesError
from ..blip3o_core.models.decoder import Decoder
from ..blip3o_core.models.eva_clip import EvaClip
from ..blip3o_core.models.nextdit import NextDiT
from .assemble import to_backbone, write_checkpoint
from .stages import encoder as encoder_stage
from .stages import generation as generation_stage
from .stages.decoder import (
    SCHEDULER_CONFIG,
    DecoderStage,
    build_unet,
    decoder_batches,
    encode_pool,
    tiny_unet_config,
)
from .stages.encoder import EncoderStage, encoder_batches, rescale
from .stages.generation import (
    LATENT_SQUARE,
    OPEN_COLOURS,
    GenerationOptions,
    GenerationStage,
    encode_pool_prompts,
    encode_prompts,
    generation_batches,
    latent_tokens,
    worded_batches,
)
from .stages.understanding import (
    BackboneSizes,
    UnderstandingStage,
    backbone_config,
    build_backbone,
    understanding_batches,
)
from .stages.vae import VaeStage, build_vae, vae_batches
from .trainer import Batch, LoopConfig, load_trained
from .world.captions import draw_caption
from .world.pool import ScenePool, draw_singles, load_pool
from .world.scenes import SIDE, Scenes
from .world.vocabulary import WordIds

EARLIER = ("encoder", "vae", "decoder", "understanding")
STAGES = (*EARLIER, "generation", "tuning")
CONFIGS = Path(__file__).parent / "configs"
CONFIG_NAME = "config.yaml"
STATE_NAME = "state.pt"


@dataclass
class Job:
    """A stage ready to train."""

    module: nn.Module
    batch_of: Callable[[int], Batch]
    loop: LoopConfig


class Recipe:
    """A run folder and the configurations of its stages.

    Args:
        folder: the run folder.
        overrides: stage name -> configuration that replaces the recorded or the shipped one.
        earlier: another run, whose encoder, VAE, decoder and backbone this one builds on, and whose cache it shares.
    """

    def __init__(
        self,
        folder: Path,
        overrides: dict[str, dict[str, Any]] | None = None,
        earlier: Path | None = None,
    ) -> None:
        self.folder = folder
        self.earlier = earlier
        self.cache = (earlier or folder) / "cache"
        self.configs: dict[str, dict[str, Any]] = {}
        for stage in STAGES:
            recorded = self.stage_folder(stage) / CONFIG_NAME
            self.configs[stage] = read_config(recorded if recorded.is_file() else CONFIGS / f"{stage}.yaml")
        self.configs.update(overrides or {})
        self.vocabulary = WordIds()

    def stage_folder(self, stage: str) -> Path:
        """Where a stage is, or will be, trained."""
        own = self.folder / stage
        return self.earlier / stage if self.earlier is not None and stage in EARLIER else own

    def record(self, stage: str) -> None:
        """Keep the configuration beside the stage, so that later commands build the same networks."""
        folder = self.folder / stage
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f"{CONFIG_NAME}.part"
        temporary.write_text(yaml.safe_dump(self.configs[stage], sort_keys=False), encoding="utf-8")
        os.replace(temporary, folder / CONFIG_NAME)

    def job(self, stage: str) -> Job:
        """The stage's module with its start weights, its batches and its loop.

        Raises:
            BadInputError: an unknown stage or an impossible option.
            MissingFilesError: an earlier stage that this one reads has not been trained.
        """
        if stage not in STAGES:
            raise BadInputError(f'There is no stage "{stage}"; choose one of {", ".join(STAGES)}.')
        config = self.configs[stage]
        loop = LoopConfig(**config["loop"])
        torch.manual_seed(loop.seed)
        module, batch_of = getattr(self, f"_{stage}")(config, loop, self._pool(stage))
        return Job(module, batch_of, loop)

    def image_encoder(self) -> EvaClip:
        """The trained image encoder, its features scaled."""
        stage = EncoderStage(self._new_encoder(), self.vocabulary.size)
        self._load(stage, "encoder")
        rescale(stage.encoder, self.configs["encoder"]["feature_scale"])
        return stage.encoder.eval().requires_grad_(False)

    def vae(self) -> nn.Module:
        """The trained VAE."""
        stage = VaeStage(build_vae(self.configs["vae"]["network"]), 0.0, 0.0)
        self._load(stage, "vae")
        return stage.vae.eval().requires_grad_(False)

    def understanding(self) -> UnderstandingStage:
        """The trained backbone with its latent queries."""
        stage = self._new_understanding()
        self._load(stage, "understanding")
        return stage.eval().requires_grad_(False)

    def drawing(self) -> tuple[UnderstandingStage, NextDiT]:
        """What draws: the backbone with its latent queries and the trained DiT, tuned where the tuning stage has run."""
        tuned = (self.stage_folder("tuning") / STATE_NAME).is_file()
        stage = self._trained_generation("tuning" if tuned else "generation")
        stage.eval().requires_grad_(False)
        return stage.understanding or self.understanding(), stage.dit

    def generation_options(self) -> GenerationOptions:
        """What stages d and e learn, from stage d's configuration."""
        config = self.configs["generation"]
        names = [field.name for field in fields(GenerationOptions)]
        return GenerationOptions(**{name: config[name] for name in names if name in config})

    def decoder(self) -> Decoder:
        """The trained decoder."""
        decoder = Decoder(self._unet_config(), self.configs["vae"]["network"], SCHEDULER_CONFIG)
        self._load(DecoderStage(decoder.unet, SIDE, 0.0, 0.0), "decoder")
        decoder.vae.load_state_dict(self.vae().state_dict())
        return decoder.eval().requires_grad_(False)

    def backbone_config(self) -> dict[str, Any]:
        """config.json of the checkpoint."""
        sizes = self.configs["encoder"]["network"]
        gen_vision = {
            key: sizes[key] for key in ("width", "layers", "head_width", "image_size", "patch_size")
        }
        gen_vision["mlp_ratio"] = sizes["mlp_dim"] / sizes["width"]
        return backbone_config(
            BackboneSizes(**self.configs["understanding"]["network"]), self.vocabulary, gen_vision
        )

    def assemble(self, folder: Path) -> Path:
        """Write the checkpoint of all trained stages.

        Raises:
            BadInputError: the DiT draws VAE latents, which the published layout has no place for.
        """
        if self.generation_options().target != "features":
            raise BadInputError(
                f'The DiT of "{self.folder}" draws VAE latents; a checkpoint of the published layout needs one that '
                'draws image features.\nTrain the generation stage with "target: features".'
            )
        understanding, dit = self.drawing()
        config = self.backbone_config()
        steps = {stage: self._step(stage) for stage in STAGES}
        return write_checkpoint(
            folder,
            config,
            backbone=to_backbone(understanding.backbone, understanding.latent_queries, config),
            dit=dit,
            image_encoder=self.image_encoder(),
            decoder=self.decoder(),
            metadata={
                "format": "pt",
                "steps": " ".join(f"{stage}={step}" for stage, step in steps.items() if step),
            },
        )

    def _pool(self, stage: str) -> ScenePool:
        data = self.configs[stage]["data"]
        return load_pool(data["scenes"], data["seed"], self.cache)

    def _new_encoder(self) -> EvaClip:
        return EvaClip(EvaClipConfig(**self.configs["encoder"]["network"]))

    def _new_understanding(self) -> UnderstandingStage:
        config = self.configs["understanding"]
        sizes = BackboneSizes(**config["network"])
        backbone = build_backbone(self.backbone_config())
        return UnderstandingStage(backbone, self.vocabulary, sizes.queries, config["anchor_weight"])

    def _new_dit(self, config: dict[str, Any]) -> NextDiT:
        channels = self.configs["encoder"]["network"]["width"]
        if self.generation_options().target == "latents":
            channels = LATENT_SQUARE**2 * self.configs["vae"]["network"]["latent_channels"]
        hidden = self.configs["understanding"]["network"]["hidden"]
        return NextDiT(NextDiTConfig(in_channels=channels, conditioning_dim=hidden, **config["network"]))

    def _new_generation(self, config: dict[str, Any]) -> GenerationStage:
        options = self.generation_options()
        understanding = None if options.learn == "dit" else self.understanding()
        return GenerationStage(self._new_dit(config), options, understanding)

    def _trained_generation(self, stage: str) -> GenerationStage:
        module = self._new_generation(self.configs[stage])
        self._load(module, stage)
        return module

    def _unet_config(self) -> dict[str, Any]:
        network = self.configs["decoder"]["network"]
        width = self.configs["encoder"]["network"]["width"]
        channels = self.configs["vae"]["network"]["latent_channels"]
        return tiny_unet_config(width, channels, tuple(network["channels"]), tuple(network["heads"]))

    def _encoder(
        self, config: dict[str, Any], loop: LoopConfig, pool: ScenePool
    ) -> tuple[nn.Module, Callable]:
        network = self._new_encoder()
        encoder_stage.initialise(network)
        stage = EncoderStage(network, self.vocabulary.size, config["contrast_weight"])
        return stage, encoder_batches(pool, self.caption_ids, loop.batch_size, loop.seed)

    def _vae(self, config: dict[str, Any], loop: LoopConfig, pool: ScenePool) -> tuple[nn.Module, Callable]:
        vae = build_vae(config["network"]).to(memory_format=torch.channels_last)
        channels = config["network"]["latent_channels"]
        batches = vae_batches(pool, loop.batch_size, loop.seed, config["crop"], channels, config["full_from"])
        return VaeStage(vae, config["kl_weight"], config["anchor_weight"]), batches

    def _decoder(
        self, config: dict[str, Any], loop: LoopConfig, pool: ScenePool
    ) -> tuple[nn.Module, Callable]:
        image_encoder, vae = self.image_encoder(), self.vae()
        scaling = self.configs["vae"]["network"]["scaling_factor"]
        name = self._cache_name("decoder")

        def encoded(scenes: ScenePool, which: str) -> tuple[np.ndarray, np.ndarray]:
            return encode_pool(scenes, image_encoder, vae, scaling, self.cache, which + name)

        singles = self._singles(config["data"])
        stage = DecoderStage(build_unet(self._unet_config()), SIDE, config["drop"], config["feature_noise"])
        return stage, decoder_batches(
            *encoded(pool, ""),
            loop.batch_size,
            loop.seed,
            config["drop"],
            singles=encoded(*singles) if singles else None,
        )

    def _singles(self, data: dict[str, Any]) -> tuple[ScenePool, str] | None:
        """The extra scenes of single objects that a stage's data ask for, and what their files are called."""
        if not data.get("extra_singles"):
            return None
        share = data.get("small_share")
        scenes = draw_singles(data["extra_singles"], data["seed"] + 1, share)
        return scenes, f"singles_{data['extra_singles']}_{share or 'plain'}_"

    def _understanding(
        self, config: dict[str, Any], loop: LoopConfig, pool: ScenePool
    ) -> tuple[nn.Module, Callable]:
        stage = self._new_understanding()
        if config["anchor_weight"] > 0:
            earlier = self._new_understanding()
            load_trained(earlier, Path(config["anchor"]))
            stage.set_anchor(earlier.state_dict())
        queries = config["network"]["queries"]
        return stage, understanding_batches(
            pool, self.vocabulary, loop.batch_size, config["prompts"], loop.seed, queries
        )

    def _generation(
        self, config: dict[str, Any], loop: LoopConfig, pool: ScenePool
    ) -> tuple[nn.Module, Callable]:
        stage = self._new_generation(config)
        generation_stage.initialise(stage.dit)
        return stage, self._generation_batches(config, loop, pool, "generation")

    def _tuning(
        self, config: dict[str, Any], loop: LoopConfig, pool: ScenePool
    ) -> tuple[nn.Module, Callable]:
        return self._trained_generation("generation"), self._generation_batches(config, loop, pool, "tuning")

    def _generation_batches(
        self, config: dict[str, Any], loop: LoopConfig, pool: ScenePool, stage: str
    ) -> Callable[[int], Batch]:
        options = self.generation_options()
        data, name = config["data"], self._cache_name(stage)
        image_encoder = self.image_encoder()
        scaling = self.configs["vae"]["network"]["scaling_factor"]
        vae = self.vae() if options.target == "latents" else None

        def targets(scenes: ScenePool, which: str) -> np.ndarray:
            features, latents = encode_pool(scenes, image_encoder, vae, scaling, self.cache, f"{which}{name}")
            return features if latents is None else latent_tokens(latents)

        singles = self._singles(data)
        open_colours = data.get("open_colours", OPEN_COLOURS)
        # The decoder's negative features are what the DiT draws for the bare prompt; latents have no such decoder.
        bare_share = config["bare_share"] if options.target == "features" else 0.0
        if options.learn != "dit":
            return worded_batches(
                targets(pool, ""),
                pool,
                self.vocabulary,
                self.configs["understanding"]["network"]["queries"],
                loop.batch_size,
                loop.seed,
                config["drop"],
                bare_share=bare_share,
                singles=(targets(*singles), singles[0].scenes) if singles else None,
                open_colours=open_colours,
                questions=options.questions,
            )
        understanding = self.understanding()

        def prompts(scenes: ScenePool, which: str, colourless: float) -> np.ndarray:
            share = f"{colourless}_" if which else ""
            path = self.cache / f"conditioning_{which}{share}{name}_{self._step('understanding')}.npy"
            return encode_pool_prompts(understanding, self.vocabulary, scenes, path, 0, colourless)

        return generation_batches(
            targets(pool, ""),
            prompts(pool, "", 0.15),
            loop.batch_size,
            loop.seed,
            config["drop"],
            bare=encode_prompts(understanding, self.vocabulary, [None])[0].numpy() if bare_share else None,
            bare_share=bare_share,
            singles=(targets(*singles), prompts(*singles, open_colours)) if singles else None,
        )

    def caption_ids(self, scenes: Scenes, step: int) -> Tensor:
        """Ids (B, L) of one caption per scene, 0 = padding."""
        rng = np.random.default_rng((step, 5))
        rows = [self.vocabulary(draw_caption(scenes, n, rng, held_out=False)) for n in range(len(scenes))]
        longest = max(map(len, rows))
        return torch.tensor([row + [0] * (longest - len(row)) for row in rows])

    def _cache_name(self, stage: str) -> str:
        data = self.configs[stage]["data"]
        return f"{data['scenes']}_{data['seed']}_{self._step('encoder')}_{self._step('vae')}"

    def _step(self, stage: str) -> int:
        path = self.stage_folder(stage) / STATE_NAME
        return torch.load(path, map_location="cpu", weights_only=True)["step"] if path.is_file() else 0

    def _load(self, module: nn.Module, stage: str) -> None:
        folder = self.stage_folder(stage)
        if not (folder / STATE_NAME).is_file():
            raise MissingFilesError(
                f'Stage "{stage}" has not been trained in "{self.folder}" (no {stage}/{STATE_NAME}).\n'
                f'Run "blip3o pretrain {stage} --run {self.folder}" first.'
            )
        load_trained(module, folder)


def read_config(path: Path) -> dict[str, Any]:
    """A stage's YAML file.

    Raises:
        MissingFilesError: no such file.
        BadInputError: it names no stage.
    """
    if not path.is_file():
        raise MissingFilesError(
            f'There is no configuration "{path}".\nGive the path of a YAML file with a stage in it.'
        )
    config = yaml.safe_load(path.read_text("utf-8"))
    if not isinstance(config, dict) or config.get("stage") not in STAGES:
        raise BadInputError(f'"{path}" names no stage: expected "stage:" with one of {", ".join(STAGES)}.')
    return config
