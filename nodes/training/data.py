"""What the dataset nodes do: read a folder and show it, caption it, check what can be learned of it, encode it."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import comfy.sd
import comfy.utils
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ...blip3o_core.drawing.sampling import to_grid
from ...blip3o_core.errors import BadInputError, TrainingDataError
from ...blip3o_core.images import fit_size, to_pil
from ...lora_training.config import DataConfig, LoraConfig, parse_config, to_tree
from ...lora_training.data.crops import choose_views, cut, read_mask
from ...lora_training.data.dataset import Dataset, Problem
from ...lora_training.prompts import drift_prompts
from ..native import host
from ..native.drawing import Patcher, require_decoder, run_decoder
from ..native.sockets import BackboneHandle, ImageEncoderHandle, TrainingPictures
from .folders import EXAMPLE, content_hash, find_dataset, runs_folder
from .sheets import RED, YELLOW, Thumbnail, sheet

if TYPE_CHECKING:
    from ...lora_training.check import Report

HOLDOUT = {"auto": "auto", "none": "none", "10 %": 0.1, "20 %": 0.2, "30 %": 0.3}
MAX_SHOWN = 120
TRIGGER_PROMPTS = 8
SUGGESTIONS = 3
# Features and prompts that nodes encode on ComfyUI's networks: those may differ in the last bits from a training's own.
CACHE_FOLDER = "cache_comfyui"
# Names of settings in messages -> names of the widgets that set them.
WIDGETS = {
    "data.caption.missing": "missing_captions",
    "data.caption.prefix": "caption_prefix",
    "data.bad_image": "bad_pictures",
    "data.class_word": "class_word",
    "data.trigger": "trigger",
    "data.crop.mode": "crop",
    "data.crop": "crop",
    "data.mask": "mask",
    "(blip3o lora caption)": "(Caption Dataset)",
}


def data_config(**settings: Any) -> DataConfig:
    """Section `data` of a configuration, checked."""
    return parse_config({"run": {"name": "dataset"}, "data": settings}).data


def run_config(config: DataConfig) -> LoraConfig:
    """A run of default settings on this data, for what asks for a whole configuration."""
    return parse_config(
        {"run": {"name": "dataset", "dir": runs_folder().as_posix()}, "data": to_tree(config)}
    )


def dataset_fingerprint(folder: str) -> str:
    """Changes whenever a picture or caption of the folder does."""
    return content_hash(find_dataset(folder))


def to_widget_names(text: str) -> str:
    """A message about a configuration, in the words of the node."""
    for setting, widget in WIDGETS.items():
        text = text.replace(setting, widget)
    return text


def look_at_dataset(config: DataConfig) -> tuple[Image.Image, str]:
    """Sheet of thumbnails with badges, and everything that is wrong, in words."""
    from ...lora_training.check import check

    # What memory a run takes is left out: which model it is for is not known here.
    report = replace(check(run_config(config)), memory=())
    if report.dataset is None:
        report.raise_for_errors()
    assert report.dataset is not None
    return thumbnail_sheet(report.dataset, report.problems), to_widget_names(report.text())


def thumbnail_sheet(dataset: Dataset, problems: tuple[Problem, ...]) -> Image.Image:
    """Every picture small, those with errors marked red, with warnings yellow, those that cannot be opened crossed."""
    marked = {"error": set[str](), "warning": set[str]()}
    for problem in problems:
        marked[problem.level] |= set(problem.names)
    readable = {item.name: item for item in dataset.items}
    broken = [name for problem in problems if problem.kind == "unreadable" for name in problem.names]
    names = sorted({*readable, *broken})
    thumbnails = []
    for name in names[:MAX_SHOWN]:
        badge = RED if name in marked["error"] else YELLOW if name in marked["warning"] else None
        item = readable.get(name)
        if item is None:
            thumbnails.append(Thumbnail(None, name, badge=badge))
        else:
            caption = item.prompts[0] if item.prompts else ""
            held_out = "held out: " if item.is_held_out else ""
            thumbnails.append(Thumbnail(item.open(), name, held_out + caption, badge))
        host.raise_if_interrupted()
    return sheet(thumbnails)


def caption_pictures(
    dataset: TrainingPictures,
    backbone: BackboneHandle,
    *,
    mode: str,
    overwrite: bool,
    max_new_tokens: int,
    node_id: str | None,
) -> str:
    """Write missing captions next to the pictures of a dataset, shown on the node as they come; what was done, in words.

    Cancel keeps every caption that was written.

    Raises:
        BadInputError: the dataset is one that nothing is written into.
    """
    from ...blip3o_core.language.answers import AnswerSettings
    from ...lora_training.data.captioning import caption_dataset

    if dataset.name == EXAMPLE and overwrite:
        raise BadInputError(
            "The built-in example cannot be written to.\n"
            "Switch overwrite off: its captions are complete. Or copy it into ComfyUI's input folder."
        )
    progress = CaptionProgress(node_id)
    captions = caption_dataset(
        dataset.config,
        backbone.pipeline,
        mode,
        overwrite,
        settings=AnswerSettings(max_new_tokens=max_new_tokens),
        on_event=progress,
    )
    lines = [f"{len(captions.written)} captions written, {len(captions.kept)} kept."]
    lines += [f"{name}: {caption}" for name, caption in captions.written.items()]
    lines += [f"{name}: NO CAPTION. {reason}" for name, reason in captions.failed.items()]
    return "\n".join(lines)


class CaptionProgress:
    """Bar and captions on the node while they are written; also the interrupt check before each picture."""

    def __init__(self, node_id: str | None) -> None:
        self.node_id = node_id
        self.lines: list[str] = []

    def __call__(self, event: dict[str, Any]) -> None:
        host.raise_if_interrupted()
        if event["event"] == "phase" and event["total"]:
            comfy.utils.ProgressBar(event["total"]).update_absolute(event["done"])
        elif event["event"] == "caption":
            self.lines.append(f"{event['name']}: {event['caption']}")
            host.show_text("\n".join(self.lines), self.node_id)


def encode_training_set(
    dataset: TrainingPictures, backbone: BackboneHandle, image_encoder: ImageEncoderHandle
) -> tuple[list[Tensor], list[Tensor], list[str]]:
    """Feature grids (1, channels, 8, 8), conditioning (1, 64, C) and prompts of every view and caption to train on.

    Encoded pictures and prompts are kept on the disk by their content.

    Raises:
        TrainingDataError: there are errors in the dataset.
    """
    from ...lora_training.check import check
    from ...lora_training.data.cache import CacheKeys, cache_conditioning, cache_features, read_entry

    config = run_config(dataset.config)
    checked = raise_for_errors(check(config))
    for handle in (backbone, image_encoder):
        if handle.patcher.patches or handle.patcher.object_patches:
            # What is kept on the disk is found again by the checkpoint, which does not tell of a LoRA.
            raise BadInputError(
                f"The {handle.component.replace('_', ' ')} has a LoRA; a training set is made with the model itself.\n"
                'Connect "Load BLIP3-o" directly.'
            )
    folder = runs_folder() / CACHE_FOLDER
    cache_features(config, checked, image_encoder.pipeline, folder, EncodingProgress())
    cache_conditioning(config, checked, (), backbone.pipeline, folder, EncodingProgress())
    pictures = CacheKeys(config, image_encoder.files, image_encoder.dtype)
    prompts = CacheKeys(config, backbone.files, backbone.dtype)
    features, conditioning, texts = [], [], []
    for item in checked.train:
        for view in read_entry(folder / pictures.features(item)):
            side = round(view.shape[0] ** 0.5)
            for prompt in item.prompts * item.repeats:
                features.append(to_grid(view[None], (side, side)))
                conditioning.append(read_entry(folder / prompts.conditioning(prompt))[None])
                texts.append(prompt)
    return features, conditioning, texts


class EncodingProgress:
    """Bar of a phase that fills the cache; also the interrupt check before each entry."""

    def __call__(self, event: dict[str, Any]) -> None:
        host.raise_if_interrupted()
        if event["event"] == "phase" and event["total"]:
            comfy.utils.ProgressBar(event["total"]).update_absolute(event["done"])


def raise_for_errors(report: Report) -> Dataset:
    """The dataset of a report, or a refusal that names all of its errors in the words of the node.

    Raises:
        TrainingDataError: there are errors.
    """
    if report.errors:
        listed = "\n".join(str(problem) for problem in report.errors)
        count = f"{len(report.errors)} error" + ("s" if len(report.errors) > 1 else "")
        raise TrainingDataError(f"The dataset has {count} and cannot be used.\n{to_widget_names(listed)}")
    assert report.dataset is not None
    return report.dataset


def ceiling_and_trigger(
    dataset: TrainingPictures,
    backbone: BackboneHandle,
    image_encoder: ImageEncoderHandle,
    decoder: Patcher,
    vae: comfy.sd.VAE,
    *,
    count: int,
    steps: int,
    cfg: float,
    seed: int,
) -> tuple[Image.Image, str]:
    """Pairs of picture and ceiling with their similarity, and what that and the trigger promise, in words.

    Raises:
        TrainingDataError: there are errors in the dataset.
        BadInputError: decoder and image encoder belong to different models.
    """
    from ...lora_training.check import check
    from ...lora_training.proof.ceiling import Ceiling

    checked = raise_for_errors(check(run_config(dataset.config)))
    items = (*checked.train, *checked.held_out)[:count]
    squares = []
    for item in items:
        picture = item.open()
        mask = read_mask(item, picture, dataset.config)
        squares.append(cut(picture, choose_views(item, picture, dataset.config, mask)[0], dataset.config))
    features = image_encoder.pipeline.encode_images(squares)
    side = round(features.shape[1] ** 0.5)
    if features.shape[2] != require_decoder(decoder).feature_channels:
        raise BadInputError(
            "The image encoder and the decoder belong to different models.\n"
            'Choose the same checkpoint in "Load Image Encoder" and "Load BLIP3-o". '
            f"({features.shape[2]} channels, expected {require_decoder(decoder).feature_channels})"
        )
    settings: dict[str, Any] = {"seed": seed, "steps": steps, "cfg": cfg, "has_preview": False}
    painted = to_pil(run_decoder(decoder, vae, to_grid(features, (side, side)), **settings))
    again = image_encoder.pipeline.encode_images(painted)
    cosines = F.cosine_similarity(features.flatten(1), again.flatten(1), dim=1).tolist()
    originals = tuple(
        fit_size(square, *picture.size) for square, picture in zip(squares, painted, strict=True)
    )
    names = tuple(item.name for item in items)
    ceiling = Ceiling(names, originals, tuple(painted), tuple(cosines))
    return ceiling.sheet(columns=2), f"{ceiling.text()}\n{trigger_report(dataset.config, backbone, checked)}"


def trigger_report(config: DataConfig, backbone: BackboneHandle, dataset: Dataset) -> str:
    """How much the trigger moves a prompt, in words, with better ones where it hardly does."""
    from ...lora_training.proof.ceiling import suggest_triggers, trigger_separability

    items = [item for item in dataset.train if item.class_prompts][:TRIGGER_PROMPTS]
    if not items:
        return "Trigger: give a trigger and a class word to see whether the model can tell them apart."
    others = list(drift_prompts(run_config(config)))
    prompts, class_prompts = [item.prompts[0] for item in items], [item.class_prompts[0] for item in items]
    found = trigger_separability(backbone.pipeline, prompts, class_prompts, others)
    lines = [found.text]
    if found.level != "clear":
        captions = [item.captions[0] if item.captions else "" for item in items]
        suggested = suggest_triggers(backbone.pipeline, config, captions, others)
        better = [f"{trigger} ({score:.0%})" for trigger, score in suggested if score > found.score][
            :SUGGESTIONS
        ]
        if better:
            lines.append(f"These move it further: {', '.join(better)}.")
    return to_widget_names("\n".join(lines))
