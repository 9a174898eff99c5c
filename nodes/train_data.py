"""Nodes before a training: the pictures and their captions, what can be learned from them, and features for other trainers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import comfy.sd
from comfy_api.latest import io, ui

from ..blip3o_core.images import from_pil
from ..blip3o_core.seeds import MAX_SEED
from .native import host
from .native.drawing import Patcher
from .native.sockets import (
    BackboneHandle,
    BackboneType,
    DatasetType,
    ImageEncoderHandle,
    ImageEncoderType,
    TrainingPictures,
    features_latent,
)
from .training.data import (
    HOLDOUT,
    caption_pictures,
    ceiling_and_trigger,
    data_config,
    dataset_fingerprint,
    encode_training_set,
    look_at_dataset,
)
from .training.folders import EXAMPLE, find_dataset, list_datasets

CATEGORY = "BLIP3-o/train"


def dataset_input() -> io.Input:
    return DatasetType.Input("dataset", tooltip="The output dataset of Dataset or Caption Dataset.")


class Dataset(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="BLIP3oDataset",
            display_name="Dataset (BLIP3-o)",
            category=CATEGORY,
            description="Choose a folder of pictures to train a LoRA on, and see at once what is wrong with it. "
            "Connect dataset to Caption Dataset or Train LoRA.",
            search_aliases=["blip3o", "training images", "load folder", "lora dataset", "trigger word"],
            inputs=[
                io.Combo.Input(
                    "folder",
                    options=list_datasets(),
                    default=EXAMPLE,
                    tooltip="Folder with pictures inside ComfyUI's input or datasets folder, each with its caption in a text "
                    "file of the same name. The example comes with the nodes. Press R after adding one.",
                ),
                io.String.Input(
                    "trigger",
                    default="",
                    placeholder="ohwx dog",
                    tooltip="Words that will call what is learned. [trigger] in a caption stands for them, else they are put in "
                    "front. Something the model knows no picture of, e.g. ohwx dog.",
                ),
                io.String.Input(
                    "class_word",
                    default="",
                    placeholder="dog",
                    tooltip="What it is a kind of, e.g. dog. With it the training keeps the model's other dogs as they are; "
                    "takes about twice as long.",
                ),
                io.Combo.Input(
                    "crop",
                    options=["centre", "smart", "letterbox", "views"],
                    default="centre",
                    tooltip="How a picture becomes a square. centre: its middle. smart: where the detail is. letterbox: all of it, "
                    "with bars. views: several random squares, which learn less by heart.",
                ),
                io.Int.Input(
                    "views",
                    default=4,
                    min=1,
                    max=64,
                    tooltip="With crop views: squares per picture. 4-8 is usual. Encoding time grows in proportion.",
                ),
                io.Boolean.Input(
                    "flip",
                    default=False,
                    tooltip="Also learn every picture mirrored. Leave off for faces and lettering.",
                ),
                io.Combo.Input(
                    "mask",
                    options=["none", "alpha", "files"],
                    default="none",
                    tooltip="What of a picture counts. alpha: what is not transparent. files: what is white in NAME_mask.png next to it.",
                ),
                io.Combo.Input(
                    "holdout",
                    options=list(HOLDOUT),
                    default="auto",
                    tooltip="Pictures that are not learned but used to measure. auto: one in ten, from ten pictures on.",
                ),
                io.Combo.Input(
                    "missing_captions",
                    options=["error", "trigger", "skip"],
                    default="error",
                    tooltip="What happens to a picture without a caption. error: the training does not start. trigger: the trigger alone is "
                    "its caption. skip: it is left out.",
                ),
                io.Combo.Input(
                    "bad_pictures",
                    options=["stop", "skip"],
                    default="stop",
                    tooltip="What happens when a file cannot be opened. stop: the training does not start. skip: it is left out.",
                ),
                io.String.Input(
                    "caption_prefix",
                    default="",
                    optional=True,
                    tooltip="Text put before every caption, e.g. a watercolour of.",
                    advanced=True,
                ),
                io.String.Input(
                    "background",
                    default="white",
                    optional=True,
                    tooltip="Colour under transparent pictures and bars, as a name or #rrggbb.",
                    advanced=True,
                ),
            ],
            outputs=[
                DatasetType.Output(
                    "dataset", tooltip="The pictures, for Caption Dataset, the check and Train LoRA."
                ),
                io.Image.Output(
                    "sheet",
                    tooltip="All pictures small. Red marks stop a training, yellow ones are warnings.",
                ),
                io.String.Output("report", tooltip="Everything that is wrong, and what to do about it."),
            ],
            has_intermediate_output=True,
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, folder: str, **unused: Any) -> str:
        return dataset_fingerprint(folder)

    @classmethod
    def execute(
        cls,
        folder: str,
        trigger: str,
        class_word: str,
        crop: str,
        views: int,
        flip: bool,
        mask: str,
        holdout: str,
        missing_captions: str,
        bad_pictures: str,
        caption_prefix: str = "",
        background: str = "white",
    ) -> io.NodeOutput:
        config = data_config(
            path=find_dataset(folder).as_posix(),
            trigger=trigger.strip(),
            class_word=class_word.strip(),
            caption={"missing": missing_captions, "prefix": caption_prefix},
            crop={"mode": crop, "views": views, "flip": flip},
            background=background,
            mask=mask,
            bad_image=bad_pictures,
            holdout=HOLDOUT[holdout],
        )
        picture, report = look_at_dataset(config)
        sheet = from_pil([picture])
        shown = {**ui.PreviewImage(sheet, cls=cls).as_dict(), **ui.PreviewText(report).as_dict()}
        return io.NodeOutput(TrainingPictures(folder, config), sheet, report, ui=shown)


class CaptionDataset(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="BLIP3oCaptionDataset",
            display_name="Caption Dataset (BLIP3-o)",
            category=CATEGORY,
            description="Let the backbone write the captions of a dataset, as text files next to the pictures. "
            "Connect dataset to Train LoRA.",
            search_aliases=["blip3o", "auto caption", "describe", "tagger", "lora captions"],
            inputs=[
                dataset_input(),
                BackboneType.Input("backbone", tooltip="The output backbone of Load BLIP3-o."),
                io.Combo.Input(
                    "style",
                    options=[
                        "all but the subject",
                        "all but the style",
                        "training",
                        "short",
                        "detailed",
                        "tags",
                    ],
                    default="all but the subject",
                    tooltip="What the captions leave out is what the trigger comes to mean: how the thing looks, or how it is drawn. "
                    "The others describe everything.",
                ),
                io.Boolean.Input(
                    "overwrite",
                    default=False,
                    tooltip="Off: only pictures without a caption get one. On: existing captions are replaced.",
                ),
                io.Int.Input(
                    "max_new_tokens",
                    default=128,
                    min=1,
                    max=440,
                    tooltip="Longest caption; a token is about three quarters of a word.",
                ),
            ],
            outputs=[
                DatasetType.Output("dataset", tooltip="The same pictures, with captions."),
                io.String.Output("report", tooltip="Every picture's caption."),
            ],
            hidden=[io.Hidden.unique_id],
            has_intermediate_output=True,
            is_output_node=True,
            # The node shows text under its own id.
            not_idempotent=True,
        )

    @classmethod
    def execute(
        cls,
        dataset: TrainingPictures,
        backbone: BackboneHandle,
        style: str,
        overwrite: bool,
        max_new_tokens: int,
    ) -> io.NodeOutput:
        report = caption_pictures(
            dataset,
            backbone,
            mode=style,
            overwrite=overwrite,
            max_new_tokens=max_new_tokens,
            node_id=cls.hidden.unique_id,
        )
        return io.NodeOutput(replace(dataset), report, ui=ui.PreviewText(report))


class CheckDataset(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="BLIP3oCheckDataset",
            display_name="Ceiling & Trigger Check (BLIP3-o)",
            category=CATEGORY,
            description="See before training what can be learned at all: each picture next to its ceiling, the best that the "
            "decoder can paint of it, and whether the model notices the trigger.",
            search_aliases=["blip3o", "lora preflight", "reconstruction", "trigger word test", "ceiling"],
            inputs=[
                dataset_input(),
                BackboneType.Input("backbone", tooltip="The output backbone of Load BLIP3-o."),
                ImageEncoderType.Input("image_encoder", tooltip="From Load Image Encoder."),
                io.Model.Input("decoder", tooltip="The output decoder of Load BLIP3-o."),
                io.Vae.Input("vae", tooltip="The output vae of Load BLIP3-o."),
                io.Int.Input(
                    "pictures",
                    default=4,
                    min=1,
                    max=64,
                    tooltip="How many pictures are painted again. Time grows in proportion.",
                ),
                io.Int.Input(
                    "steps", default=30, min=1, max=500, tooltip="Steps of the decoder. 25-50 is usual."
                ),
                io.Float.Input(
                    "cfg",
                    default=3.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    tooltip="How closely the decoder follows the features. 3 as published.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=MAX_SEED,
                    control_after_generate=True,
                    tooltip="Same seed, same pictures.",
                ),
            ],
            outputs=[
                DatasetType.Output("dataset", tooltip="The dataset, unchanged."),
                io.Image.Output(
                    "comparison",
                    tooltip="Pairs of original and ceiling, with their similarity: 1 is the same to the model.",
                ),
                io.String.Output(
                    "report", tooltip="Similarity of each pair, and how much the trigger moves a prompt."
                ),
            ],
            has_intermediate_output=True,
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls,
        dataset: TrainingPictures,
        backbone: BackboneHandle,
        image_encoder: ImageEncoderHandle,
        decoder: Patcher,
        vae: comfy.sd.VAE,
        pictures: int,
        steps: int,
        cfg: float,
        seed: int,
    ) -> io.NodeOutput:
        picture, report = ceiling_and_trigger(
            dataset, backbone, image_encoder, decoder, vae, count=pictures, steps=steps, cfg=cfg, seed=seed
        )
        comparison = from_pil([picture])
        shown = {**ui.PreviewImage(comparison, cls=cls).as_dict(), **ui.PreviewText(report).as_dict()}
        return io.NodeOutput(dataset, comparison, report, ui=shown)


class TrainingSet(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="BLIP3oTrainingSet",
            display_name="Make Training Set (BLIP3-o)",
            category=CATEGORY,
            description="Turn a dataset into lists of features and prompts for ComfyUI's own training nodes: connect them to "
            "its Train LoRA or Save Training Dataset.",
            search_aliases=["blip3o", "training dataset", "latents", "train lora", "cache features"],
            inputs=[
                dataset_input(),
                BackboneType.Input("backbone", tooltip="The output backbone of Load BLIP3-o."),
                ImageEncoderType.Input("image_encoder", tooltip="From Load Image Encoder."),
            ],
            outputs=[
                io.Latent.Output(
                    "image_features",
                    tooltip="Features of every view of every picture, held-out ones left out.",
                    is_output_list=True,
                ),
                io.Conditioning.Output(
                    "positive", tooltip="The prompt of each of them, for the DiT.", is_output_list=True
                ),
                io.String.Output("captions", tooltip="The prompts in words.", is_output_list=True),
            ],
        )

    @classmethod
    def execute(
        cls, dataset: TrainingPictures, backbone: BackboneHandle, image_encoder: ImageEncoderHandle
    ) -> io.NodeOutput:
        features, conditioning, prompts = encode_training_set(dataset, backbone, image_encoder)
        latents = [features_latent(host.to_intermediate(grid)) for grid in features]
        return io.NodeOutput(latents, [[[item, {}]] for item in conditioning], prompts)


NODES = [Dataset, CaptionDataset, CheckDataset, TrainingSet]
