"""What no training can change: how much the frozen decoder shows of a picture, how far a trigger moves the conditioning."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor

from ...blip3o_core.drawing.presets import PRESETS
from ...blip3o_core.images import fit_size, to_pil
from ...blip3o_core.pipeline import Blip3oPipeline
from ..config import DataConfig
from ..data.dataset import assemble_prompts
from ..prompts import knows
from ..records import Interrupted, StopCheck

SHOWN_SIDE, CAPTION_HEIGHT, GAP = 192, 16, 4
# Cosine of features before and after decoding. Below LOST the picture is not recognisable any more.
GOOD, LOST = 0.9, 0.75
# Share of the distance between different captions that the trigger has to cover.
CLEAR, WEAK = 0.25, 0.08
TRIGGER_PATTERNS = (
    "{trigger} {word}",
    "ohwx {word}",
    "zeddy {word}",
    "{word} called Mirelo",
    "hand-made blue-eyed {word}",
)


@dataclass(frozen=True)
class Ceiling:
    """Pictures beside what the decoder makes of their own features: the best that any LoRA can reach.

    Attributes:
        names: of the pictures.
        originals, decoded: the same number of pictures.
        cosines: of the features of both, 1 = nothing is lost.
    """

    names: tuple[str, ...]
    originals: tuple[Image.Image, ...]
    decoded: tuple[Image.Image, ...]
    cosines: tuple[float, ...]

    @property
    def mean(self) -> float:
        return sum(self.cosines) / len(self.cosines)

    def sheet(self, columns: int = 4) -> Image.Image:
        """Pairs original and decoded, each with its cosine."""
        tiles = [
            _pair(original, decoded, f"{cosine:.2f} {name}")
            for name, original, decoded, cosine in zip(
                self.names, self.originals, self.decoded, self.cosines, strict=True
            )
        ]
        return picture_sheet(tiles, columns)

    def text(self) -> str:
        """What it means, for people."""
        lost = [name for name, cosine in zip(self.names, self.cosines, strict=True) if cosine < LOST]
        lines = [f"Ceiling: the frozen decoder keeps {self.mean:.2f} of these pictures' features (1 = all)."]
        if self.mean >= GOOD:
            lines.append("What they show can be learned.")
        elif self.mean >= LOST:
            lines.append("Details get lost whatever is trained: compare the pairs before you train.")
        if lost:
            lines.append(
                f"Hardly recognisable after decoding: {', '.join(lost)}. Crop closer, or leave them out."
            )
        return "\n".join(lines)


@dataclass(frozen=True)
class Separability:
    """How far the trigger moves the conditioning away from the class word.

    Attributes:
        score: distance between captions with trigger and with class word, by the distance between different captions.
        level: clear, weak or none.
    """

    score: float
    level: str

    @property
    def text(self) -> str:
        """What it means, for people."""
        said = f"Trigger: it moves the conditioning {self.score:.0%} as far as another caption does."
        if self.level == "clear":
            return f"{said} The model can tell it from the class word."
        if self.level == "weak":
            return f"{said} It will leak into the class word; a describing phrase moves it further."
        return (
            f"{said} The frozen backbone does not notice it, so it cannot be learned as a switch.\n"
            "Choose another data.trigger: a name or a describing phrase of words that the model knows."
        )


def measure_ceiling(
    pipeline: Blip3oPipeline,
    pictures: Sequence[Image.Image],
    *,
    names: Sequence[str] = (),
    seed: int = 0,
    preset: str = "fast",
    on_progress: Callable[[int, int], None] | None = None,
    should_stop: StopCheck | None = None,
) -> Ceiling:
    """Encode pictures, decode them, encode what came out. One large network is in memory at a time.

    Args:
        pictures: RGB, as they are cut for training.
        names: shown on the sheet; empty = numbers.
        preset: a name in PRESETS; its decoder settings are used.
        on_progress: called with pictures done and their number.

    Raises:
        Interrupted: asked to stop.
    """
    side = pipeline.image_encoder.config.image_size
    originals = tuple(fit_size(picture.convert("RGB"), side, side) for picture in pictures)
    features = pipeline.encode_images(originals)
    pipeline.unload("image_encoder")
    decoded = []
    for done in range(len(features)):
        if should_stop is not None and should_stop():
            raise Interrupted(f"Stopped after {done} of {len(features)} pictures.")
        decoded += decode_pictures(
            pipeline, features[done : done + 1], [seed + done], None, preset, keeps_decoder=True
        )
        if on_progress is not None:
            on_progress(done + 1, len(features))
    pipeline.unload("decoder")
    again = pipeline.encode_images(decoded)
    pipeline.unload("image_encoder")
    cosines = F.cosine_similarity(features.flatten(1), again.flatten(1), dim=1)
    labels = tuple(names) or tuple(str(number + 1) for number in range(len(originals)))
    return Ceiling(labels, originals, tuple(decoded), tuple(cosines.tolist()))


def decode_pictures(
    pipeline: Blip3oPipeline,
    features: Tensor,
    seeds: Sequence[int],
    negative: Tensor | None,
    preset: str,
    *,
    keeps_decoder: bool = False,
) -> list[Image.Image]:
    """Pictures of image features (B, N, C), with the decoder settings of a preset; the decoder is unloaded afterwards.

    Args:
        negative: features (1, N, C) that are steered away from; None = zeros.
    """
    settings = PRESETS[preset].pixels
    pictures = [
        pipeline.decode(features[n : n + 1], [seed], settings=settings, negative_features=negative)
        for n, seed in enumerate(seeds)
    ]
    if not keeps_decoder:
        pipeline.unload("decoder")
    return to_pil(torch.cat(pictures))


def separability(trigger: Tensor, class_word: Tensor, others: Tensor) -> Separability:
    """From conditioning (B, Q, D): of captions with trigger, of the same with the class word, of different captions."""
    moved = (trigger - class_word).flatten(1).float().norm(dim=1).mean()
    usual = F.pdist(others.flatten(1).float())
    score = (moved / usual.mean().clamp(min=1e-8)).item() if len(usual) else 0.0
    return Separability(score, "clear" if score >= CLEAR else "weak" if score >= WEAK else "none")


def trigger_separability(
    pipeline: Blip3oPipeline, prompts: Sequence[str], class_prompts: Sequence[str], others: Sequence[str] = ()
) -> Separability:
    """How far the trigger moves the conditioning.

    Args:
        prompts, class_prompts: captions with the trigger and the same with the class word.
        others: different prompts that say what a usual distance is; empty = the class prompts.
    """
    encoded = pipeline.encode_prompts([*prompts, *class_prompts, *others])
    count = len(prompts)
    usual = encoded[2 * count :] if len(others) > 1 else encoded[count : 2 * count]
    return separability(encoded[:count], encoded[count : 2 * count], usual)


def suggest_triggers(
    pipeline: Blip3oPipeline, config: DataConfig, captions: Sequence[str], others: Sequence[str]
) -> list[tuple[str, float]]:
    """Triggers with their separability, best first: patterns around trigger and class word of words the model knows."""
    word = config.class_word.strip()
    known = [
        text
        for text in dict.fromkeys(
            pattern.format(trigger=config.trigger.strip(), word=word).strip() for pattern in TRIGGER_PATTERNS
        )
        if knows(pipeline.tokenizer, text)
    ]
    # Two things that the model knows, named together, are a phrase it never met.
    words = dict.fromkeys(part for other in others for part in other.split() if part.isalpha())
    known += [f"{word} and {part}" for part in words if part != word and knows(pipeline.tokenizer, part)][:8]
    scored = []
    for trigger in known:
        settings = replace(config, trigger=trigger)
        pairs = [assemble_prompts(caption, settings) for caption in captions]
        found = trigger_separability(pipeline, [a for a, _ in pairs], [b for _, b in pairs], others)
        scored.append((trigger, found.score))
    return sorted(scored, key=lambda entry: -entry[1])


def picture_sheet(pictures: Sequence[Image.Image], columns: int) -> Image.Image:
    """Pictures of one size side by side, with a thin gap."""
    width, height = pictures[0].size
    columns = min(columns, len(pictures))
    lines = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * (width + GAP) - GAP, lines * (height + GAP) - GAP), (128, 128, 128))
    for n, picture in enumerate(pictures):
        sheet.paste(picture, ((n % columns) * (width + GAP), (n // columns) * (height + GAP)))
    return sheet


def _pair(left: Image.Image, right: Image.Image, label: str) -> Image.Image:
    tile = Image.new("RGB", (2 * SHOWN_SIDE, SHOWN_SIDE + CAPTION_HEIGHT), "white")
    for n, picture in enumerate((left, right)):
        tile.paste(picture.resize((SHOWN_SIDE, SHOWN_SIDE), Image.Resampling.BICUBIC), (n * SHOWN_SIDE, 0))
    ImageDraw.Draw(tile).text((3, SHOWN_SIDE + 2), label.encode("ascii", "replace").decode(), fill="black")
    return tile
