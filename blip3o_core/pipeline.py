"""The whole story: prompt -> conditioning -> image features -> pixels, and pictures -> answers."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from .checkpoints.layout import open_checkpoint
from .checkpoints.memory_plan import painting_bytes
from .devices import pick_device, pick_dtype, total_memory
from .drawing.decoding import PixelCallback, PixelSettings, PixelStart, decode_features, picture_size
from .drawing.noise import PublishedNoise, SeededNoise, seeded_noise
from .drawing.presets import Generation
from .drawing.request import PUBLISHED_NEGATIVE_PROMPT, DrawRequest
from .drawing.sampling import FeatureSettings, FeatureStart, StepCallback, sample_features, to_tokens
from .errors import BadInputError, check_range
from .images import fit_size, from_pil, preprocess_for_image_encoder, to_pixels
from .language.prompts import CAPTION_STYLES, MATCH_QUESTION, SYSTEM_PROMPT, TextTokenizer
from .lora.files import LoraFile
from .networks import LoadedLora, NetworkLender, Networks
from .performance.quantize import check_format
from .seeds import MAX_SEED
from .units import format_bytes

if TYPE_CHECKING:  # transformers and diffusers are imported only when their component is loaded
    from .language.answers import AnswerSettings, TextCallback, Turn
    from .language.prefixes import KeptChat
    from .language.rows import EncodedRow
    from .models.backbone import Backbone
    from .models.decoder import Decoder
    from .models.eva_clip import EvaClip
    from .models.nextdit import NextDiT

CACHED_NEGATIVES = 8
# With offload: batches of pictures whose prompts are encoded in one visit of the backbone.
BATCHES_ENCODED_AHEAD = 8
# Pictures in one call of the image encoder: its activations grow with every one.
ENCODED_AT_ONCE = 8


class Blip3oPipeline:
    """A checkpoint, ready to draw and to look.

    Args:
        networks: who holds the networks and lends them; Networks reads them from the checkpoint's files.
    """

    def __init__(self, networks: NetworkLender) -> None:
        self.networks = networks
        self.files = networks.files
        self._tokenizer: TextTokenizer | None = None
        self._negatives: OrderedDict[tuple[Any, ...], Tensor] = OrderedDict()
        self._kept_chat: KeptChat | None = None
        self._known_changes = networks.changes

    @property
    def device(self) -> torch.device:
        return self.networks.device

    @property
    def dtype(self) -> torch.dtype:
        return self.networks.dtype

    @property
    def tokenizer(self) -> TextTokenizer:
        if self._tokenizer is None:
            self._tokenizer = TextTokenizer(self.files.folder)
        return self._tokenizer

    @property
    def backbone(self) -> Backbone:
        return self.networks.get("backbone")

    @property
    def dit(self) -> NextDiT:
        return self.networks.get("dit")

    @property
    def image_encoder(self) -> EvaClip:
        return self.networks.get("image_encoder")

    @property
    def decoder(self) -> Decoder:
        return self.networks.get("decoder")

    def load(self, *components: str) -> Blip3oPipeline:
        """Load components now instead of at their first use; all that draw when none is named."""
        for component in components or ("backbone", "dit", "decoder"):
            self.networks.get(component)
        return self

    def unload(self, *components: str) -> None:
        """Forget components (all when none is named); they are read again when next used."""
        self.networks.unload(*components)
        if not components or "backbone" in components:
            self._kept_chat = None

    @property
    def loras(self) -> tuple[LoadedLora, ...]:
        """The LoRAs that change the networks, in the order they were loaded."""
        return self.networks.loras

    def load_lora(self, lora: str | Path | LoraFile, strength: float = 1.0) -> LoadedLora:
        """Draw with a LoRA, besides those already loaded; see Networks.load_lora."""
        return self._own_networks.load_lora(lora, strength)

    def unload_loras(self) -> None:
        """Draw as the checkpoint does."""
        self._own_networks.unload_loras()

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
        with self.networks.use("backbone") as backbone:
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
        start: FeatureStart | None = None,
        on_step: StepCallback | None = None,
    ) -> Tensor:
        """Image features (B, N, channels), float32, of conditioning (B, Q, C).

        Args:
            seeds: one for each row; or give `noise` (B, channels, H, W).

        The rest as in sampling.sample_features.
        """
        with self.networks.use("dit") as dit:
            if noise is None:
                noise = seeded_noise(_given(seeds), self.noise_shape)
            return sample_features(
                dit,
                conditioning.to(self.device, self.dtype),
                noise=noise.to(self.device),
                settings=settings,
                negative_conditioning=negative_conditioning,
                start=start,
                on_step=on_step,
                prepare=self.networks.prepare_run,
            )

    @property
    def noise_shape(self) -> tuple[int, int, int]:
        """(channels, H, W) of the feature grid: as many cells as latent queries."""
        queries = self.files.component_tensors("backbone")["latent_queries"].shape[1]
        side = round(queries**0.5)
        return self.dit.config.in_channels, side, side

    def picture_size(self, settings: PixelSettings) -> tuple[int, int]:
        """(height, width) of the pictures that the decoder draws; see decoding.picture_size."""
        decoder = self.decoder
        return picture_size(decoder.unet.config, decoder.vae.config, settings)

    def latent_shape(self, settings: PixelSettings) -> tuple[int, int, int]:
        """(channels, H, W) of the decoder's latents for a picture size."""
        height, width = self.picture_size(settings)
        decoder = self.decoder
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
        self._forget_what_is_old()
        key = (prompt, seed, settings)
        if key not in self._negatives:
            conditioning = self.encode_prompts(prompt, use_template=bool(prompt.strip()))
            noise = draw_noise() if draw_noise else seeded_noise([_given(seed)], self.noise_shape)
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
        start: PixelStart | None = None,
        on_step: PixelCallback | None = None,
    ) -> Tensor:
        """Pictures (B, H, W, 3), float32 in [0, 1] on the CPU, of image features (B, N, channels).

        Args:
            seeds: one for each row; or give `noise` (B, 4, H/8, W/8).
            negative_features: (B or 1, N, channels); None = zeros.
            start: latents to start from, see encode_latents.
        """
        settings = settings or PixelSettings()
        with self.networks.use("decoder") as decoder:
            if noise is None:
                noise = seeded_noise(_given(seeds), self.latent_shape(settings))
            pictures = decode_features(
                decoder,
                image_features.to(self.device),
                noise=noise.to(self.device),
                settings=settings,
                negative_features=negative_features,
                start=start,
                on_step=on_step,
                before_step=self.networks.before_step,
            )
        return pictures.permute(0, 2, 3, 1).cpu()

    @torch.no_grad()
    def encode_latents(self, images: Tensor) -> Tensor:
        """Latents (B, 4, H/8, W/8) of pictures (B, H, W, 3) in [0, 1], of the size to draw."""
        with self.networks.use("decoder") as decoder:
            return decoder.encode_latents(to_pixels(images.to(self.device)))

    def generate(
        self,
        prompts: str | Sequence[str],
        *,
        on_feature_step: StepCallback | None = None,
        on_pixel_step: PixelCallback | None = None,
        **options: Any,
    ) -> Generation:
        """Draw pictures from prompts.

        Args:
            on_feature_step, on_pixel_step: see draw.
            options: fields of DrawRequest.

        Raises:
            BadInputError: see DrawRequest.
        """
        request = DrawRequest((prompts,) if isinstance(prompts, str) else tuple(prompts), **_tuples(options))
        return self._draw_all(request, on_feature_step, on_pixel_step)

    def vary(
        self,
        pictures: Sequence[Image.Image],
        *,
        prompt: str | None = None,
        strength: float = 0.6,
        count: int = 1,
        on_feature_step: StepCallback | None = None,
        on_pixel_step: PixelCallback | None = None,
        **options: Any,
    ) -> Generation:
        """New pictures from old ones, through their EVA-CLIP features.

        Args:
            prompt: None redraws each picture as it is; a text moves the features towards it (semantic image to image).
            strength: how far towards the prompt, 0 to 1; not read without a prompt.
            count: pictures drawn for each input.
            on_feature_step, on_pixel_step: see draw.
            options: further fields of DrawRequest.
        """
        request = DrawRequest(
            (prompt or "",) * len(pictures),
            start_pictures=tuple(pictures),
            strength=strength,
            images_per_prompt=count,
            **options,
        )
        return self._draw_all(request, on_feature_step, on_pixel_step)

    def check(self, request: DrawRequest) -> None:
        """Refuse what this checkpoint cannot draw on this device; reads configurations, computes nothing.

        Raises:
            BadInputError: an impossible picture size, or one that the device has too little memory for.
            MissingFilesError: there is no decoder.
        """
        unet, vae = self.files.decoder_config("unet"), self.files.decoder_config("vae")
        height, width = size = request.size(unet, vae)
        is_tiled, together = _given(request.pixels).tiled, min(request.batch_size, request.total)
        needed = painting_bytes(
            *(unet, vae, size), is_tiled=is_tiled, number_bytes=self.dtype.itemsize, pictures=together
        )
        there = total_memory(self.device)
        if needed > there:
            what = f"A picture of {width} x {height} pixels needs"
            if together > 1:
                what = f"{together} pictures of {width} x {height} pixels at once need"
            ways = [
                "smaller",
                *([] if is_tiled else ["in tiles"]),
                *(["fewer at once"] if together > 1 else []),
            ]
            raise BadInputError(
                f"{what} about {format_bytes(needed)} to paint, but this device has {format_bytes(there)} in all.\n"
                f"Draw {', or '.join(ways)}."
            )

    def draw(
        self,
        request: DrawRequest,
        *,
        on_feature_step: StepCallback | None = None,
        on_pixel_step: PixelCallback | None = None,
    ) -> Iterator[Generation]:
        """The pictures of a request, batch by batch, each batch as soon as it is drawn.

        Prompts and pictures to start from are encoded when their batch comes, so that the first pictures of a long list
        do not wait for the last prompt. With offload, all networks take turns on the device: painting a batch takes many
        times as long as bringing DiT and decoder there; the backbone works for a moment only and thus encodes several
        batches in one visit.

        Args:
            on_feature_step, on_pixel_step: see sample_features and decode; called for each batch.
        """
        self.check(request)
        features, pixels = _given(request.features), _given(request.pixels)
        ahead = request.batch_size * (BATCHES_ENCODED_AHEAD if self.networks.leave_device else 1)
        conditioning = _InTime(
            len(request.prompts),
            ahead,
            lambda few: self.encode_prompts(request.prompts[few], request.images[few] or None),
        )
        encoded = _InTime(
            len(request.start_pictures), ahead, lambda few: self.encode_images(request.start_pictures[few])
        )
        negative = None
        if request.samples and request.negative_prompt is not None:
            negative = self.encode_prompts(request.negative_prompt)
        start_images = None
        if request.start_images:
            height, width = self.picture_size(pixels)
            start_images = from_pil([fit_size(picture, width, height) for picture in request.start_images])
        noise: PublishedNoise | SeededNoise = SeededNoise(request.seeds, request.pixel_seeds)
        if request.is_published:
            noise = PublishedNoise(request.seeds)
        prompts = [prompt for prompt in request.prompts for _ in range(request.images_per_prompt)]
        loras = [
            {"file": each.source, "hash": each.file.fingerprint, "strength": each.strength}
            for each in self.loras
        ]
        for rows in request.batches:
            places = [place // request.images_per_prompt for place in range(rows.start, rows.stop)]
            begun = encoded.rows(places) if request.start_pictures else _rows(request.start_features, rows)
            if not request.samples:
                sampled = _given(begun)
            else:
                sampled = self.sample_features(
                    conditioning.rows(places),
                    settings=features,
                    noise=noise.features(rows, self.noise_shape),
                    negative_conditioning=negative,
                    start=None if begun is None else FeatureStart(begun, request.strength),
                    on_step=on_feature_step,
                )
            # Before the latents' noise: the published preset draws all of a picture's noise in this order.
            negative_features = self._decoder_negative(request, noise)
            start = None
            if start_images is not None:
                strength = 1.0 if request.has_feature_start else request.strength
                start = PixelStart(self.encode_latents(_given(_rows(start_images, rows))), strength)
            images = self.decode(
                sampled,
                settings=pixels,
                noise=noise.latents(rows, self.latent_shape(pixels)),
                negative_features=negative_features,
                start=start,
                on_step=on_pixel_step,
            )
            yield Generation(
                images,
                sampled.cpu(),
                prompts[rows],
                request.seeds[rows],
                request.pixel_seeds[rows],
                request.note((images.shape[1], images.shape[2]), loras),
            )

    @torch.no_grad()
    def encode_images(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Image features (B, N, channels), float32, of pictures through EVA-CLIP."""
        if not pictures:
            raise BadInputError("There is no picture to encode.\nGive at least one.")
        with self.networks.use("image_encoder") as encoder:
            size = encoder.config.image_size
            grids = []
            for first in range(0, len(pictures), ENCODED_AT_ONCE):
                few = pictures[first : first + ENCODED_AT_ONCE]
                pixels = torch.stack([preprocess_for_image_encoder(picture, size) for picture in few])
                grids.append(encoder(pixels.to(self.device, self.dtype)))
        return to_tokens(torch.cat(grids)).float()

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
        chats = [
            [Turn("user", question, tuple(each))] for question, each in zip(questions, images, strict=True)
        ]
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
            style: a name in prompts.CAPTION_STYLES.
            options: see ask.
        """
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
        from .language.answers import encode_chat, write_answers, written_chat
        from .language.prefixes import KeptChat
        from .language.rows import pixel_limits

        if not chats:
            raise BadInputError("There is no question to answer.\nGive at least one question or picture.")
        limits = pixel_limits(self.files.folder, min_pixels, max_pixels)
        for turns in chats:
            written_chat(turns, system_prompt)  # what cannot be asked is told before the backbone is read
        with self.networks.use("backbone") as backbone:
            rows = [encode_chat(backbone, self.tokenizer, turns, limits, system_prompt) for turns in chats]
            self._forget_what_is_old()
            if self._kept_chat is None:
                self._kept_chat = KeptChat(is_put_away=self.networks.leave_device)
            return write_answers(
                *(backbone, self.tokenizer, rows),
                device=self.device,
                settings=settings,
                on_text=on_text,
                kept=self._kept_chat,
                make_steps=self.networks.answer_steps,
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
        with self.networks.use("backbone") as backbone:
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
        with self.networks.use("backbone") as backbone:
            return yes_probability(backbone, self.tokenizer, row, self.device)

    def score(self, pictures: Sequence[Image.Image], statement: str) -> list[float]:
        """For each picture, the probability, 0 to 1, that it shows the statement."""
        question = MATCH_QUESTION.format(statement=statement.strip().rstrip("."))
        return [self.ask_yes_no(question, [picture]) for picture in pictures]

    # Inside

    @property
    def _own_networks(self) -> Networks:
        assert isinstance(self.networks, Networks), "a host changes its networks by LoRAs itself"
        return self.networks

    def _forget_what_is_old(self) -> None:
        """What was computed with networks that have changed since."""
        if self._known_changes != self.networks.changes:
            self._negatives.clear()
            self._kept_chat = None
            self._known_changes = self.networks.changes

    def _decoder_negative(self, request: DrawRequest, noise: PublishedNoise | SeededNoise) -> Tensor | None:
        if request.pixel_negative is None or _given(request.pixels).guidance_scale == 1:
            return None
        published = noise if isinstance(noise, PublishedNoise) else None
        return self.negative_features(
            request.pixel_negative,
            seed=request.pixel_negative_seed if published is None else None,
            settings=request.features,
            draw_noise=None if published is None else (lambda: published.negative(self.noise_shape)),
        )

    def _draw_all(
        self, request: DrawRequest, on_feature_step: StepCallback | None, on_pixel_step: PixelCallback | None
    ) -> Generation:
        drawn = list(self.draw(request, on_feature_step=on_feature_step, on_pixel_step=on_pixel_step))
        return Generation(
            torch.cat([each.images for each in drawn]),
            torch.cat([each.image_features for each in drawn]),
            [prompt for each in drawn for prompt in each.prompts],
            [seed for each in drawn for seed in each.seeds],
            [seed for each in drawn for seed in each.pixel_seeds],
            drawn[0].settings,
        )

    def _question_row(
        self, question: str, images: Sequence[Image.Image], min_pixels: int | None, max_pixels: int | None
    ) -> EncodedRow:
        from .language.answers import Turn, encode_chat, written_chat
        from .language.rows import pixel_limits

        limits = pixel_limits(self.files.folder, min_pixels, max_pixels)
        turns = [Turn("user", question, tuple(images))]
        written_chat(turns)  # as in chat
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
    networks = Networks(
        files,
        pick_dtype(dtype, place, sum(files.component_bytes.values())),
        place,
        offload=offload,
        quantize=quantize,
        stream=stream,
        compile=compile,
    )
    return Blip3oPipeline(networks)


def _given(value: Any) -> Any:
    assert value is not None, "checked by the request"
    return value


def _tuples(options: dict[str, Any]) -> dict[str, Any]:
    """Lists of pictures, as people write them, in the form that a request keeps."""
    made = dict(options)
    if made.get("images") is not None:
        made["images"] = tuple(tuple(pictures) for pictures in made["images"])
    if made.get("start_images") is not None:
        made["start_images"] = tuple(made["start_images"])
    return {
        name: value
        for name, value in made.items()
        if value is not None or name not in ("images", "start_images")
    }


def _rows(tensor: Tensor | None, rows: slice) -> Tensor | None:
    """Rows of a batch; one row stands for all."""
    return tensor if tensor is None or tensor.shape[0] == 1 else tensor[rows]


class _InTime:
    """Rows that are computed in order, some ahead of time, and forgotten when they have been passed.

    Args:
        count: rows in all.
        ahead: rows computed in one call.
        compute: rows of a slice.
    """

    def __init__(self, count: int, ahead: int, compute: Callable[[slice], Tensor]) -> None:
        self._count, self._ahead, self._compute = count, ahead, compute
        self._kept: dict[int, Tensor] = {}

    def rows(self, places: Sequence[int]) -> Tensor:
        """Rows of places that never go back."""
        self._kept = {place: row for place, row in self._kept.items() if place >= places[0]}
        while places[-1] not in self._kept:
            first = max(self._kept, default=places[0] - 1) + 1
            few = slice(first, min(first + self._ahead, self._count))
            self._kept.update(zip(range(few.start, few.stop), self._compute(few), strict=True))
        return torch.stack([self._kept[place] for place in places])
