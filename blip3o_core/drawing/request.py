"""One drawing as one record: made by the command line, by Python and from a picture; checked whole before anything is computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from PIL import Image
from torch import Tensor

from ..errors import BadInputError, check_choice, check_range
from ..language.prompts import check_text, place_images
from ..seeds import MAX_SEED, item_seeds
from ..untrusted import quote
from .decoding import PixelSettings, picture_size
from .presets import PRESETS
from .sampling import FeatureSettings

# Published code steers the decoder away from features drawn for a bare space, without the chat template.
PUBLISHED_NEGATIVE_PROMPT = " "
MOST_PICTURES = 10_000
# What a picture's note holds beside the settings of the stages, and the types it may have.
NOTE_FIELDS: dict[str, tuple[type, ...]] = {
    "prompt": (str,),
    "seed": (int,),
    "pixel_seed": (int,),
    "preset": (str,),
    "negative_prompt": (str, type(None)),
    "pixel_negative": (str, type(None)),
    "pixel_negative_seed": (int,),
    "strength": (int, float),
}


@dataclass(frozen=True)
class DrawRequest:
    """Everything that is to be drawn, and how; picture i (prompt by prompt) uses seed + i and equals the same picture drawn alone.

    Attributes:
        prompts: what to draw; all "" redraw the features that the pictures start from as they are.
        images: pictures inside each prompt (reconstruct, edit instructions); empty = none.
        images_per_prompt: pictures drawn for each prompt.
        seed: of the first picture's features.
        pixel_seed: of the decoder's noise; None = the feature seed.
        preset: a name in PRESETS; `features` and `pixels` replace its settings.
        negative_prompt: steers the features; None = all zeros as published.
        pixel_negative: prompt whose features the decoder steers away from; None = zeros.
        start_pictures: pictures whose image features each prompt starts from (variation); or
        start_features: such features, (1 or pictures, N, channels); strength below 1 stays near them (semantic image to image).
        start_images: pictures whose latents the decoder starts from; without a feature start, `strength` counts here.
        strength: how far from where a picture starts, 0 to 1; 1 = do not look at it.
        batch_size: most pictures in one network call.

    Raises:
        BadInputError: an empty prompt, an unknown preset, or an impossible setting; SettingError names the setting.
    """

    prompts: tuple[str, ...]
    images: tuple[tuple[Image.Image, ...], ...] = ()
    images_per_prompt: int = 1
    seed: int = 0
    pixel_seed: int | None = None
    preset: str = "standard"
    features: FeatureSettings | None = None
    pixels: PixelSettings | None = None
    negative_prompt: str | None = None
    pixel_negative: str | None = PUBLISHED_NEGATIVE_PROMPT
    pixel_negative_seed: int = 0
    start_pictures: tuple[Image.Image, ...] = ()
    start_features: Tensor | None = None
    start_images: tuple[Image.Image, ...] = ()
    strength: float = 1.0
    batch_size: int = 8

    def __post_init__(self) -> None:
        check_choice("preset", self.preset, list(PRESETS))
        check_range("images_per_prompt", self.images_per_prompt, 1, MOST_PICTURES)
        check_range("batch_size", self.batch_size, 1, MOST_PICTURES)
        check_range("strength", self.strength, 0, 1)
        for name in ("seed", "pixel_seed", "pixel_negative_seed"):
            if getattr(self, name) is not None:
                check_range(name, getattr(self, name), 0, MAX_SEED)
        if self.images and len(self.images) != len(self.prompts):
            raise BadInputError(
                f"There are {len(self.prompts)} prompts but {len(self.images)} lists of images.\nGive one list for each prompt."
            )
        if self.start_pictures and len(self.start_pictures) != len(self.prompts):
            raise BadInputError(
                f"There are {len(self.start_pictures)} pictures to start from for {len(self.prompts)} prompts.\n"
                "Give one for each prompt."
            )
        for word, starts in (("features", self.start_features), ("images", self.start_images or None)):
            if starts is not None and len(starts) not in (1, self.total):
                raise BadInputError(
                    f"There are {len(starts)} start {word} for {self.total} pictures.\nGive one, or one for each picture."
                )
        shown = self.images or ((),) * len(self.prompts)
        is_empty = [
            not prompt.strip() and not pictures for prompt, pictures in zip(self.prompts, shown, strict=True)
        ]
        negatives = (self.negative_prompt or "", self.pixel_negative or "")
        for text, pictures in (
            *zip(self.prompts, shown, strict=True),
            *((text, ()) for text in negatives),
        ):
            check_text(text)
            place_images(text, len(pictures))
        if not self.prompts or (self.samples and any(is_empty)):
            raise BadInputError("The prompt is empty.\nWrite what the picture should show.")
        for name in ("features", "pixels"):
            if getattr(self, name) is None:
                object.__setattr__(self, name, getattr(PRESETS[self.preset], name))

    @property
    def total(self) -> int:
        """Pictures to draw."""
        return len(self.prompts) * self.images_per_prompt

    @property
    def seeds(self) -> list[int]:
        """Seed of each picture's features."""
        return item_seeds(self.seed, self.total)

    @property
    def pixel_seeds(self) -> list[int]:
        """Seed of each picture's latents."""
        return item_seeds(self.seed if self.pixel_seed is None else self.pixel_seed, self.total)

    @property
    def samples(self) -> bool:
        """Whether features are sampled; else those it starts from are decoded as they are."""
        return not self.has_feature_start or any(self.prompts) or any(self.images)

    @property
    def has_feature_start(self) -> bool:
        return self.start_features is not None or bool(self.start_pictures)

    @property
    def is_published(self) -> bool:
        """Whether noise is drawn in the published order."""
        return PRESETS[self.preset].is_published

    @property
    def batches(self) -> list[slice]:
        """Pictures of one network call each."""
        return [
            slice(first, min(first + self.batch_size, self.total))
            for first in range(0, self.total, self.batch_size)
        ]

    def size(self, unet: Mapping[str, Any], vae: Mapping[str, Any]) -> tuple[int, int]:
        """(height, width) of the pictures in pixels, by the decoder's configurations; see decoding.picture_size."""
        assert self.pixels is not None
        return picture_size(unet, vae, self.pixels)

    # The record that a picture keeps

    def note(self, size: tuple[int, int], loras: Sequence[Mapping[str, Any]] = ()) -> dict[str, Any]:
        """What all pictures of the request have in common, JSON-ready; from_note reads it.

        Args:
            size: (height, width) of the pictures.
            loras: what changed the networks: file, hash and strength of each.
        """
        assert self.features is not None and self.pixels is not None
        height, width = size
        given = {
            "prompt": any(self.images),
            "start": bool(self.start_images),
            "features": self.has_feature_start,
        }
        return {
            "preset": self.preset,
            "features": asdict(self.features),
            "pixels": {**asdict(self.pixels), "height": height, "width": width},
            "negative_prompt": self.negative_prompt,
            "pixel_negative": self.pixel_negative,
            "pixel_negative_seed": self.pixel_negative_seed,
            "strength": self.strength,
            "loras": list(loras),
            # Whoever draws the picture again must bring these along: a PNG does not keep them.
            "made_from_pictures": [place for place, is_given in given.items() if is_given],
        }

    @classmethod
    def options_of_note(cls, note: Mapping[str, Any]) -> dict[str, Any]:
        """Fields of the request that drew a picture, from its note; pictures that it was made from are not in it.

        Raises:
            BadInputError: the note holds something that cannot be a setting.
        """
        options: dict[str, Any] = {}
        for name, kinds in NOTE_FIELDS.items():
            if name in note:
                if isinstance(note[name], bool) or not isinstance(note[name], kinds):
                    raise BadInputError(f'Its "{name}" is {quote(note[name])}.')
                options[name] = note[name]
        if prompt := options.pop("prompt", ""):
            options["prompts"] = (prompt,)
        for name, kind in (("features", FeatureSettings), ("pixels", PixelSettings)):
            if name in note:
                options[name] = _settings(kind, note[name])
        return options


def _settings(kind: Any, values: Any) -> Any:
    """Settings of a stage from a note, whose values may be anything."""
    if not isinstance(values, dict):
        raise BadInputError(f"Its settings are {quote(values)}.")
    made = {}
    for item in fields(kind):
        if item.name not in values:
            continue
        value = values[item.name]
        if item.name == "guidance_interval":
            if not isinstance(value, list) or len(value) != 2 or not all(map(_is_number, value)):
                raise BadInputError(f'Its "{item.name}" is {quote(value)}.')
            value = (float(value[0]), float(value[1]))
        elif not _is_like(value, item.default):
            raise BadInputError(f'Its "{item.name}" is {quote(value)}.')
        made[item.name] = value
    if unknown := sorted(map(str, values.keys() - made.keys())):
        raise BadInputError(f"It names the setting {quote(unknown[0])}, which this version does not know.")
    return kind(**made)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_like(value: Any, default: Any) -> bool:
    """Whether a value is of the kind that a setting has; None is the default of whole numbers that may be absent."""
    if default is None:
        return value is None or (isinstance(value, int) and not isinstance(value, bool))
    if isinstance(default, float):
        return _is_number(value)
    return type(value) is type(default)
