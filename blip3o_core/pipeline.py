"""The whole story: prompt -> conditioning -> image features -> pixels, and pictures -> answers."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor, nn

from .checkpoints.keys import COMPONENTS
from .checkpoints.layout import CheckpointFiles, open_checkpoint
from .checkpoints.load import load_backbone, load_decoder, load_dit, load_image_encoder
from .checkpoints.match import needed_tensors
from .checkpoints.safetensor_files import read_tensors
from .devices import pick_device, pick_dtype
from .drawing.decoding import PixelCallback, PixelSettings, decode_features, picture_size
from .drawing.noise import MAX_SEED, PublishedNoise, SeededNoise, item_seeds, seeded_noise
from .drawing.presets import PRESETS, Generation
from .drawing.sampling import FeatureSettings, StepCallback, check_range, sample_features
from .errors import BadInputError
from .images import (
    fit_size,
    from_pil,
    preprocess_for_image_encoder,
    to_pixels,
)
from .language.prompts import SYSTEM_PROMPT, TextTokenizer
from .lora.changes import Change, apply_changes
from .lora.files import LoraFile, check_fit, dit_fingerprint, other_base, read_lora
from .performance.linear import use_onednn
from .performance.offload import stream_layers, visit
from .performance.quantize import check_format, quantize_network
from .performance.recording import compile_dit, compile_network

if TYPE_CHECKING:  # transformers and diffusers are imported only when their component is loaded
    from .language.answers import AnswerSettings, TextCallback, Turn
    from .language.prefixes import KeptChat
    from .language.rows import EncodedRow
    from .models.backbone import Backbone
    from .models.decoder import Decoder
    from .models.eva_clip import EvaClip
    from .models.nextdit import NextDiT

logger = logging.getLogger(__name__)

# Published code steers the decoder away from features drawn for a bare space, without the chat template.
PUBLISHED_NEGATIVE_PROMPT = " "
CACHED_NEGATIVES = 8
LARGE_NETWORKS = ("backbone", "image_encoder")
# Pictures in one call of the image encoder: its activations grow with every one.
ENCODED_AT_ONCE = 8


@dataclass(frozen=True)
class LoadedLora:
    """A LoRA that a pipeline draws with.

    Attributes:
        source: relative path it was loaded from, or its name alone: pictures remember it, and tell no one's folders.
        strength: 1 = as trained.
        changes: by network and key of its state_dict.
    """

    file: LoraFile
    source: str
    strength: float
    changes: dict[str, dict[str, Change]]


class Blip3oPipeline:
    """A checkpoint folder, ready to draw and to look. Components are loaded when first used.

    Args:
        files: an opened checkpoint, see open_checkpoint.
        dtype: of the weights and the networks' arithmetic; the sampling loops always sum in float32.
        device: where networks compute.
        offload: keep networks in host memory; copies visit the device while they work.
        quantize: format of the linear layers of backbone and image encoder, a name in quantize.FORMATS; None = dtype.
        stream: keep backbone and image encoder in host memory for good, see stream_layers.
        compile: on a CUDA GPU, record the steps of the DiT and, unless the backbone moves, of answers as CUDA graphs; and
            torch.compile them and the UNet where that works.
    """

    def __init__(
        self,
        files: CheckpointFiles,
        *,
        dtype: torch.dtype,
        device: torch.device,
        offload: bool = False,
        quantize: str | None = None,
        stream: bool = False,
        compile: bool = False,
    ) -> None:
        self.files = files
        self.dtype = dtype
        self.device = device
        self.offload = offload
        self.quantize = quantize
        self.compile = compile and device.type == "cuda"
        if compile and not self.compile:
            logger.warning("compile has nothing to gain without a CUDA GPU; going on without it")
        self._components: dict[str, nn.Module] = {}
        self._streamed: set[str] = set(LARGE_NETWORKS if stream else ())
        self._tokenizer: TextTokenizer | None = None
        self._negatives: OrderedDict[tuple[Any, ...], Tensor] = OrderedDict()
        self._kept_chat: KeptChat | None = None
        self._loras: list[LoadedLora] = []

    @property
    def tokenizer(self) -> TextTokenizer:
        if self._tokenizer is None:
            self._tokenizer = TextTokenizer(self.files.folder)
        return self._tokenizer

    @property
    def backbone(self) -> Backbone:
        return self._component("backbone")

    @property
    def dit(self) -> NextDiT:
        return self._component("dit")

    @property
    def image_encoder(self) -> EvaClip:
        return self._component("image_encoder")

    @property
    def decoder(self) -> Decoder:
        return self._component("decoder")

    def load(self, *components: str) -> Blip3oPipeline:
        """Load components now instead of at their first use; all that draw when none is named."""
        for component in components or ("backbone", "dit", "decoder"):
            self._component(component)
        return self

    def unload(self, *components: str) -> None:
        """Forget components (all when none is named); they are read again when next used."""
        for component in components or COMPONENTS:
            self._forget(component)
            if component == "backbone":
                self._kept_chat = None

    def stream(self, component: str) -> Blip3oPipeline:
        """Keep a network in host memory from now on; each layer is on the device only while it computes.

        For encoding on a device that is too small for the whole network: every call moves all weights once. Answers,
        with a call for each word, are written sooner on the CPU.

        Args:
            component: backbone or image_encoder.
        """
        assert component in LARGE_NETWORKS, component
        self.unload(component)
        self._streamed.add(component)
        return self

    # LoRAs

    @property
    def loras(self) -> tuple[LoadedLora, ...]:
        """The LoRAs that change the networks, in the order they were loaded."""
        return tuple(self._loras)

    def load_lora(self, lora: str | Path | LoraFile, strength: float = 1.0) -> LoadedLora:
        """Draw with a LoRA, besides those already loaded. Sums are float32; a network keeps its dtype.

        Args:
            lora: a .safetensors file, a PEFT folder, or what read_lora gave.
            strength: 1 = as trained, 0 = off; negative values push the other way.

        Raises:
            MissingFilesError, WrongAdapterError: see read_lora and check_fit.
        """
        check_range("strength of a LoRA", strength, -100, 100)
        file = lora if isinstance(lora, LoraFile) else read_lora(lora)
        tensors = {
            name: needed_tensors(self.files, name)
            for name in ("dit", "backbone")
            if self.files.has_component(name)
        }
        shapes = {name: {key: info.shape for key, info in infos.items()} for name, infos in tensors.items()}
        is_near = not isinstance(lora, LoraFile) and not Path(lora).is_absolute()
        source = Path(lora).as_posix() if is_near else file.name
        loaded = LoadedLora(file, source, strength, check_fit(file, shapes))
        note = other_base(file, lambda: dit_fingerprint(dict(read_tensors(tensors["dit"]))))
        if note:
            logger.warning(note)
        self._change_loras([*self._loras, loaded])
        return loaded

    def unload_loras(self) -> None:
        """Draw as the checkpoint does."""
        self._change_loras([])

    def _change_loras(self, loras: list[LoadedLora]) -> None:
        # Networks are read again with all their LoRAs when next used: no second copy of the weights is kept.
        for name in {name for each in (*self._loras, *loras) for name in each.changes}:
            self._forget(name)
        self._negatives.clear()
        self._kept_chat = None
        self._loras = loras

    # Drawing

    def encode_prompts(
        self,
        prompts: str | Sequence[str],
        images: Sequence[Sequence[Image.Image]] | None = None,
        *,
        use_template: bool = True,
    ) -> Tensor:
        """Conditioning (B, Q, C) of prompts; see conditioning.encode_prompts."""
        from .language.conditioning import encode_prompts

        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        with self._on_device("backbone") as backbone:
            return encode_prompts(
                backbone, self.tokenizer, prompts, images, device=self.device, use_template=use_template
            )

    def sample_features(
        self,
        conditioning: Tensor,
        seeds: Sequence[int] | None = None,
        *,
        settings: FeatureSettings | None = None,
        noise: Tensor | None = None,
        negative_conditioning: Tensor | None = None,
        start_features: Tensor | None = None,
        strength: float = 1.0,
        mask: Tensor | None = None,
        on_step: StepCallback | None = None,
    ) -> Tensor:
        """Image features (B, N, channels), float32, of conditioning (B, Q, C).

        Args:
            seeds: one for each row; or give `noise` (B, channels, H, W).

        The rest as in sampling.sample_features.
        """
        with self._on_device("dit") as dit:
            if noise is None:
                noise = seeded_noise(seeds, self.noise_shape)
            return sample_features(
                dit,
                conditioning.to(self.device, self.dtype),
                noise=noise.to(self.device),
                settings=settings,
                negative_conditioning=negative_conditioning,
                start_features=start_features,
                strength=strength,
                mask=mask,
                on_step=on_step,
            )

    @property
    def noise_shape(self) -> tuple[int, int, int]:
        """(channels, H, W) of the feature grid: as many cells as latent queries."""
        tensors = self.files.component_tensors("backbone")
        queries = tensors["latent_queries"].shape[1]
        side = round(queries**0.5)
        return self.dit.config.in_channels, side, side

    def latent_shape(self, settings: PixelSettings) -> tuple[int, int, int]:
        """(channels, H, W) of the decoder's latents for a picture size."""
        decoder = self.decoder
        height, width = picture_size(decoder, settings)
        return decoder.latent_channels, height // decoder.vae_scale, width // decoder.vae_scale

    def negative_features(
        self,
        prompt: str = PUBLISHED_NEGATIVE_PROMPT,
        *,
        seed: int | None = 0,
        settings: FeatureSettings | None = None,
        draw_noise: Callable[[], Tensor] | None = None,
    ) -> Tensor:
        """Features (1, N, channels) that the decoder steers away from, sampled once for each prompt, seed and settings.

        A prompt of nothing but spaces is encoded without the chat template, as published.

        Args:
            seed: None = the noise of `draw_noise`, which is called only when the features are sampled: the published
                preset takes whatever noise comes next, once.
        """
        settings = settings or FeatureSettings()
        if seed is not None:
            check_range("seed", seed, 0, MAX_SEED)
        key = (prompt, seed, settings)
        if key not in self._negatives:
            conditioning = self.encode_prompts(prompt, use_template=bool(prompt.strip()))
            noise = seeded_noise([seed], self.noise_shape) if draw_noise is None else draw_noise()
            self._negatives[key] = self.sample_features(conditioning, settings=settings, noise=noise)
            while len(self._negatives) > CACHED_NEGATIVES:
                self._negatives.popitem(last=False)
        self._negatives.move_to_end(key)
        return self._negatives[key]

    def decode(
        self,
        image_features: Tensor,
        seeds: Sequence[int] | None = None,
        *,
        settings: PixelSettings | None = None,
        noise: Tensor | None = None,
        negative_features: Tensor | None = None,
        start_images: Tensor | None = None,
        strength: float = 1.0,
        on_step: PixelCallback | None = None,
    ) -> Tensor:
        """Pictures (B, H, W, 3), float32 in [0, 1] on the CPU, of image features (B, N, channels).

        Args:
            seeds: one for each row; or give `noise` (B, 4, H/8, W/8).
            negative_features: (B or 1, N, channels); None = zeros.
            start_images: pictures to start from, (B or 1, H, W, 3) in [0, 1], of the size to draw.
            strength: 1 = ignore start_images, 0 = keep them.
        """
        settings = settings or PixelSettings()
        with self._on_device("decoder") as decoder:
            if noise is None:
                noise = seeded_noise(seeds, self.latent_shape(settings))
            start_latents = None
            if start_images is not None:
                with torch.no_grad():
                    start_latents = decoder.encode_latents(to_pixels(start_images.to(self.device)))
            pictures = decode_features(
                decoder,
                image_features.to(self.device),
                noise=noise.to(self.device),
                settings=settings,
                negative_features=negative_features,
                start_latents=start_latents,
                strength=strength,
                on_step=on_step,
            )
        return pictures.permute(0, 2, 3, 1).cpu()

    def generate(
        self,
        prompts: str | Sequence[str],
        *,
        images: Sequence[Sequence[Image.Image]] | None = None,
        images_per_prompt: int = 1,
        seed: int = 0,
        pixel_seed: int | None = None,
        preset: str = "standard",
        features: FeatureSettings | None = None,
        pixels: PixelSettings | None = None,
        negative_prompt: str | None = None,
        pixel_negative: str | None = PUBLISHED_NEGATIVE_PROMPT,
        pixel_negative_seed: int = 0,
        start_features: Tensor | None = None,
        start_images: Sequence[Image.Image] | None = None,
        strength: float = 1.0,
        batch_size: int = 8,
        on_feature_step: StepCallback | None = None,
        on_pixel_step: PixelCallback | None = None,
    ) -> Generation:
        """Draw pictures from prompts; picture i (prompt by prompt) uses seed + i and equals the same picture drawn alone.

        Args:
            images: pictures inside each prompt (reconstruct, edit instructions).
            pixel_seed: seed of the decoder's noise; None = the feature seed.
            preset: a name in PRESETS; `features` and `pixels` replace its settings.
            negative_prompt: steers the features; None = all zeros as published.
            pixel_negative: prompt whose features the decoder steers away from; None = zeros.
            start_features: features to start from, strength below 1 stays near them (semantic image to image).
            start_images: pictures whose latents the decoder starts from; with start_features absent, `strength` counts here.
            batch_size: most pictures in one network call.
            on_feature_step, on_pixel_step: see sample_features and decode; called for each batch anew.

        Raises:
            BadInputError: an empty prompt, an unknown preset, or an impossible setting.
        """
        if preset not in PRESETS:
            raise BadInputError(f'There is no preset "{preset}"; choose one of {", ".join(PRESETS)}.')
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        check_range("images_per_prompt", images_per_prompt, 1, 10_000)
        check_range("batch_size", batch_size, 1, 10_000)
        features, pixels = features or PRESETS[preset].features, pixels or PRESETS[preset].pixels
        total = len(prompts) * images_per_prompt
        seeds = item_seeds(seed, total)
        pixel_seeds = item_seeds(seed if pixel_seed is None else pixel_seed, total)
        for word, starts in (("features", start_features), ("images", start_images)):
            if starts is not None and len(starts) not in (1, total):
                raise BadInputError(
                    f"There are {len(starts)} start {word} for {total} pictures.\nGive one, or one for each picture."
                )
        conditioning = self.encode_prompts(prompts, images).repeat_interleave(images_per_prompt, dim=0)
        negative_conditioning = None if negative_prompt is None else self.encode_prompts(negative_prompt)
        is_published = PRESETS[preset].is_published
        noise = PublishedNoise(seeds) if is_published else SeededNoise(seeds, pixel_seeds)
        sampled = torch.cat(
            [
                self.sample_features(
                    conditioning[rows],
                    settings=features,
                    noise=noise.features(rows, self.noise_shape),
                    negative_conditioning=negative_conditioning,
                    start_features=_rows(start_features, rows),
                    strength=strength if start_features is not None else 1.0,
                    on_step=on_feature_step,
                )
                for rows in _batches(total, batch_size)
            ]
        )
        away = None
        if pixel_negative is not None and pixels.guidance_scale != 1:
            away = self.negative_features(
                pixel_negative,
                seed=None if is_published else pixel_negative_seed,
                settings=features,
                draw_noise=(lambda: noise.negative(self.noise_shape)) if is_published else None,
            )
        start = None
        if start_images is not None:
            height, width = picture_size(self.decoder, pixels)
            start = from_pil([fit_size(picture, width, height) for picture in start_images])
        pictures = torch.cat(
            [
                self.decode(
                    sampled[rows],
                    settings=pixels,
                    noise=noise.latents(rows, self.latent_shape(pixels)),
                    negative_features=away,
                    start_images=_rows(start, rows),
                    strength=strength if start_features is None else 1.0,
                    on_step=on_pixel_step,
                )
                for rows in _batches(total, batch_size)
            ]
        )
        used = {
            "preset": preset,
            "features": asdict(features),
            "pixels": {**asdict(pixels), "height": pictures.shape[1], "width": pictures.shape[2]},
            "negative_prompt": negative_prompt,
            "pixel_negative": pixel_negative,
            "pixel_negative_seed": pixel_negative_seed,
            "strength": strength,
            "loras": self._describe_loras(),
            # Whoever draws the picture again must bring these along: a PNG does not keep them.
            "made_from_pictures": [
                place
                for place, is_given in (
                    ("prompt", images is not None and any(images)),
                    ("start", start_images is not None),
                    ("features", start_features is not None),
                )
                if is_given
            ],
        }
        each = [prompt for prompt in prompts for _ in range(images_per_prompt)]
        return Generation(pictures, sampled.cpu(), each, seeds, pixel_seeds, used)

    @torch.no_grad()
    def encode_images(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Image features (B, N, channels), float32, of pictures through EVA-CLIP."""
        if not pictures:
            raise BadInputError("There is no picture to encode.\nGive at least one.")
        with self._on_device("image_encoder") as encoder:
            size = encoder.config.image_size
            grids = []
            for rows in _batches(len(pictures), ENCODED_AT_ONCE):
                pixels = torch.stack(
                    [preprocess_for_image_encoder(picture, size) for picture in pictures[rows]]
                )
                grids.append(encoder(pixels.to(self.device, self.dtype)))
        return torch.cat(grids).flatten(2).transpose(1, 2).float()

    def vary(
        self,
        pictures: Sequence[Image.Image],
        *,
        prompt: str | None = None,
        strength: float = 0.6,
        count: int = 1,
        seed: int = 0,
        pixel_seed: int | None = None,
        preset: str = "standard",
        features: FeatureSettings | None = None,
        pixels: PixelSettings | None = None,
        batch_size: int = 8,
        on_feature_step: StepCallback | None = None,
        on_pixel_step: PixelCallback | None = None,
    ) -> Generation:
        """New pictures from old ones: their EVA-CLIP features decoded anew.

        Args:
            prompt: None redraws each picture as it is; a text moves the features towards it (semantic image to image).
            strength: how far towards the prompt, 0 to 1; not read without a prompt.
            count: pictures drawn for each input.
        """
        encoded = self.encode_images(pictures).repeat_interleave(count, dim=0)
        if prompt is not None:
            return self.generate(
                [prompt] * len(encoded),
                seed=seed,
                pixel_seed=pixel_seed,
                preset=preset,
                features=features,
                pixels=pixels,
                start_features=encoded,
                strength=strength,
                batch_size=batch_size,
                on_feature_step=on_feature_step,
                on_pixel_step=on_pixel_step,
            )
        pixels = pixels or PRESETS[preset].pixels
        pixel_seeds = item_seeds(seed if pixel_seed is None else pixel_seed, len(encoded))
        away = self.negative_features() if pixels.guidance_scale != 1 else None
        drawn = [
            self.decode(
                encoded[rows],
                pixel_seeds[rows],
                settings=pixels,
                negative_features=away,
                on_step=on_pixel_step,
            )
            for rows in _batches(len(encoded), batch_size)
        ]
        seeds = item_seeds(seed, len(encoded))
        used = {
            "preset": preset,
            "pixels": asdict(pixels),
            "pixel_negative": PUBLISHED_NEGATIVE_PROMPT,
            "loras": self._describe_loras(),
            "made_from_pictures": ["features"],
        }
        return Generation(torch.cat(drawn), encoded.cpu(), [""] * len(encoded), seeds, pixel_seeds, used)

    # Looking

    def ask(
        self,
        questions: str | Sequence[str],
        images: Sequence[Sequence[Image.Image]] | None = None,
        *,
        settings: AnswerSettings | None = None,
        system_prompt: str = SYSTEM_PROMPT,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        on_text: TextCallback | None = None,
    ) -> list[str]:
        """Answers to questions; each equals the same question asked alone.

        Args:
            questions: one for all lists of images, or one each.
            images: the pictures each question is about; None = none.
            min_pixels, max_pixels: area at which a picture is looked at; more pixels show finer detail and cost time.
            on_text: see understanding.write_answers.
        """
        from .language.answers import Turn

        questions = [questions] if isinstance(questions, str) else list(questions)
        images = [()] * len(questions) if images is None else [tuple(each) for each in images]
        if len(questions) == 1:
            questions = questions * len(images)
        if len(questions) != len(images):
            raise BadInputError(
                f"There are {len(questions)} questions about {len(images)} lists of images.\nGive one question, or one for each list."
            )
        chats = [[Turn("user", question, each)] for question, each in zip(questions, images, strict=True)]
        return self.chat(
            chats,
            settings=settings,
            system_prompt=system_prompt,
            min_pixels=min_pixels,
            max_pixels=max_pixels,
            on_text=on_text,
        )

    def caption(self, pictures: Sequence[Image.Image], style: str = "short", **options: Any) -> list[str]:
        """One caption for each picture.

        Args:
            style: a name in understanding.CAPTION_STYLES.
            options: see ask.
        """
        from .language.answers import CAPTION_STYLES

        if style not in CAPTION_STYLES:
            raise BadInputError(
                f'There is no caption style "{style}"; choose one of {", ".join(CAPTION_STYLES)}.'
            )
        return self.ask(CAPTION_STYLES[style], [[picture] for picture in pictures], **options)

    def chat(
        self,
        chats: Sequence[Sequence[Turn]],
        *,
        settings: AnswerSettings | None = None,
        system_prompt: str = SYSTEM_PROMPT,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        on_text: TextCallback | None = None,
    ) -> list[str]:
        """The assistant's next answer in each chat; every chat ends with a user's turn."""
        from .language.answers import encode_chat, write_answers
        from .language.prefixes import KeptChat
        from .language.rows import pixel_limits

        if not chats:
            raise BadInputError("There is no question to answer.\nGive at least one question or picture.")
        limits = pixel_limits(self.files.folder, min_pixels, max_pixels)
        with self._on_device("backbone") as backbone:
            rows = [encode_chat(backbone, self.tokenizer, turns, limits, system_prompt) for turns in chats]
            if self._kept_chat is None:
                self._kept_chat = KeptChat(is_put_away=self.offload)
            return write_answers(
                *(backbone, self.tokenizer, rows),
                device=self.device,
                settings=settings,
                on_text=on_text,
                kept=self._kept_chat,
            )

    def choose(
        self,
        question: str,
        choices: Sequence[str],
        images: Sequence[Image.Image] = (),
        *,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
    ) -> dict[str, float]:
        """Probability of each choice as the answer, summing to 1."""
        from .language.answers import choice_log_probabilities

        if len(choices) < 2:
            raise BadInputError(f"There are {len(choices)} choices; give at least two.")
        for place, choice in enumerate(choices):
            if choice in choices[:place]:
                raise BadInputError(f'The choice "{choice}" is there twice.\nGive each choice once.')
        row = self._question_row(question, images, min_pixels, max_pixels)
        with self._on_device("backbone") as backbone:
            scores = choice_log_probabilities(backbone, self.tokenizer, row, choices, device=self.device)
        return dict(zip(choices, scores.softmax(0).tolist(), strict=True))

    def ask_yes_no(
        self,
        question: str,
        images: Sequence[Image.Image] = (),
        *,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
    ) -> float:
        """Probability, 0 to 1, that the answer is yes."""
        from .language.answers import yes_probability

        row = self._question_row(question, images, min_pixels, max_pixels)
        with self._on_device("backbone") as backbone:
            return yes_probability(backbone, self.tokenizer, row, self.device)

    def score(self, pictures: Sequence[Image.Image], statement: str) -> list[float]:
        """For each picture, the probability, 0 to 1, that it shows the statement."""
        from .language.answers import MATCH_QUESTION

        question = MATCH_QUESTION.format(statement=statement.strip().rstrip("."))
        return [self.ask_yes_no(question, [picture]) for picture in pictures]

    # Inside

    def _describe_loras(self) -> list[dict[str, Any]]:
        return [
            {"file": each.source, "hash": each.file.fingerprint, "strength": each.strength}
            for each in self._loras
        ]

    def _component(self, name: str) -> Any:
        if name not in self._components:
            is_moved = self.offload or name in self._streamed
            weight_format = self.quantize if name in LARGE_NETWORKS else None
            home = torch.device("cpu") if is_moved else self.device
            # Shrunk on the way from the files to their place.
            network = self._read(name, home if weight_format is None else torch.device("cpu"))
            if weight_format is not None:
                quantize_network(network, weight_format, home)
            if self.device.type == "cpu":
                use_onednn(network)
            if name in self._streamed:
                stream_layers(network, self.device)
            if name == "decoder" and self.device.type in ("cpu", "cuda"):
                # The order of a tensor's values that its convolutions compute in; otherwise each one reorders twice.
                network.to(memory_format=torch.channels_last)
            if self.compile and name == "dit":
                compile_dit(network, self.device)
            if self.compile and name == "backbone" and not is_moved:
                from .performance.recorded_answers import record_answers

                record_answers(network, self.device)
            if self.compile and name == "decoder":
                compile_network(network.unet, self.device)
            self._components[name] = network
        return self._components[name]

    def _forget(self, name: str) -> None:
        recorder = getattr(self._components.pop(name, None), "recorder", None)
        if (
            recorder is not None
        ):  # it refers to the network, which would keep its memory until Python looks for circles
            recorder.forget()

    def _read(self, name: str, device: torch.device) -> Any:
        """A network from its files, with its LoRAs."""
        options: dict[str, Any] = {"dtype": self.dtype, "device": device}
        if name == "decoder":
            return load_decoder(self.files, **options)
        if name == "image_encoder":
            return load_image_encoder(self.files, **options)
        network = (load_backbone if name == "backbone" else load_dit)(self.files, **options)
        loras = [(each.changes[name], each.strength) for each in self._loras if name in each.changes]
        apply_changes(network, loras)
        return network

    @contextmanager
    def _on_device(self, name: str) -> Iterator[Any]:
        component = self._component(name)
        if not self.offload or name in self._streamed:
            yield component
            return
        with visit(component, self.device):
            try:
                yield component
            finally:
                if name == "dit" and component.recorder is not None:
                    component.recorder.forget()

    def _question_row(
        self, question: str, images: Sequence[Image.Image], min_pixels: int | None, max_pixels: int | None
    ) -> EncodedRow:
        from .language.answers import Turn, encode_chat
        from .language.rows import pixel_limits

        limits = pixel_limits(self.files.folder, min_pixels, max_pixels)
        turns = [Turn("user", question, tuple(images))]
        return encode_chat(self.backbone, self.tokenizer, turns, limits)


def load_pipeline(
    folder: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    offload: bool = False,
    quantize: str | None = None,
    stream: bool = False,
    compile: bool = False,
    image_encoder_path: str | Path | None = None,
    decoder_path: str | Path | None = None,
    strict: bool = False,
) -> Blip3oPipeline:
    """Open a checkpoint folder; weights are read when first used.

    Args:
        folder: a folder in the published layout.
        dtype: "auto", "bf16", "fp16", "fp32" or a torch dtype. Auto is bf16 on a GPU (fp16 where it cannot) and, on
            the CPU, fp32 for models below 4 GB and bf16 above.
        device: "auto" (a GPU when there is one), "cpu", "cuda", "mps" or a torch device.
        offload: keep networks in host memory; copies visit the device while they work.
        quantize: "fp8", "int8" or "nf4" for the linear layers of backbone and image encoder, see quantize.py.
        stream: backbone and image encoder visit the device layer by layer; exact, and slow for long answers.
        compile: on a CUDA GPU, record the steps of the DiT and, unless the backbone moves, of answers as CUDA graphs; and
            torch.compile them and the UNet where that works. The first picture and the first answer take a minute more.
        image_encoder_path: a separate EVA-CLIP file or its folder.
        decoder_path: a decoder folder, or a checkpoint folder that has one, instead of the checkpoint's own.
        strict: refuse a checkpoint with tensors that no network needs, instead of leaving them out.

    Raises:
        MissingFilesError, WrongCheckpointError: see checkpoints/layout.py.
        BadInputError: an unknown dtype, or a device that this machine does not have.
    """
    if quantize is not None:
        check_format(quantize)
    files = open_checkpoint(folder, image_encoder=image_encoder_path, decoder=decoder_path, strict=strict)
    place = pick_device(device)
    return Blip3oPipeline(
        files,
        dtype=pick_dtype(dtype, place, sum(files.component_bytes.values())),
        device=place,
        offload=offload,
        quantize=quantize,
        stream=stream,
        compile=compile,
    )


def _batches(total: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, total)) for start in range(0, total, size)]


def _rows(tensor: Tensor | None, rows: slice) -> Tensor | None:
    """Rows of a batch; one row stands for all."""
    return tensor if tensor is None or tensor.shape[0] == 1 else tensor[rows]
