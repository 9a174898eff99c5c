"""The node that trains a LoRA, and the node with its settings."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..lora_training.config import preset_names
from .load import validate_checkpoint
from .native import host
from .native.sockets import DatasetType, RunType, TrainingPictures, TrainingSettingsType
from .training.runs import train_lora, training_settings

CATEGORY = "BLIP3-o/train"
AS_PRESET = "as the preset"


class TrainingSettings(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="BLIP3oTrainingSettings",
            display_name="Training Settings (BLIP3-o)",
            category=CATEGORY,
            description="Everything about a training that the preset would otherwise decide. Connect settings to Train LoRA.",
            search_aliases=["blip3o", "learning rate", "rank", "optimizer", "lora config"],
            inputs=[
                io.Combo.Input(
                    "adapter",
                    options=[AS_PRESET, "lora", "dora", "lokr", "queries", "full"],
                    default=AS_PRESET,
                    tooltip="What learns. lora is nearly always right. queries tunes the 64 latent queries alone: a tiny file, and "
                    "the gentlest. full changes the whole DiT and needs much memory.",
                ),
                io.Int.Input(
                    "rank",
                    default=0,
                    min=0,
                    max=1024,
                    tooltip="Room to learn. 8-16 for a style, 32-64 for a person. 0 is as the preset. Size grows in proportion.",
                ),
                io.Combo.Input(
                    "targets",
                    options=[AS_PRESET, "attn_ffn_proj", "attn_ffn", "attn", "cross"],
                    default=AS_PRESET,
                    tooltip="Which layers learn. cross is the smallest and changes other pictures least.",
                ),
                io.Boolean.Input(
                    "tune_queries",
                    default=False,
                    tooltip="Also tune the latent queries. Keeps the backbone in memory.",
                ),
                io.Combo.Input(
                    "optimizer",
                    options=["adamw", "prodigy", "schedule_free"],
                    default="adamw",
                    tooltip="prodigy finds its own learning rate; set learning_rate to 1 for it.",
                ),
                io.Float.Input(
                    "learning_rate",
                    default=0.0002,
                    min=0.0000001,
                    max=10.0,
                    step=0.00001,
                    tooltip="How fast it learns. Too high spoils pictures, too low learns nothing. 0.0001-0.0005 is usual for the "
                    "large models, 0.001-0.005 for the tiny one.",
                ),
                io.Combo.Input(
                    "schedule",
                    options=["cosine", "linear", "constant"],
                    default="cosine",
                    tooltip="How the learning rate falls towards the end.",
                ),
                io.Int.Input(
                    "batch_size",
                    default=0,
                    min=0,
                    max=1024,
                    tooltip="Samples of one step. 0 is 8. More makes steps steadier and slower.",
                ),
                io.Combo.Input(
                    "preservation",
                    options=["auto", "on", "off"],
                    default="auto",
                    tooltip="Whether the model is held to what it knew. auto: when the dataset has a trigger and a class word. "
                    "Takes about twice as long.",
                ),
                io.Float.Input(
                    "preservation_weight",
                    default=1.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    tooltip="How strongly. Higher keeps more of the model and learns a little less.",
                ),
                io.String.Input(
                    "sample_prompts",
                    multiline=True,
                    default="",
                    placeholder="{trigger} on a beach",
                    tooltip="Pictures drawn while it learns, one prompt a line; {trigger} and {class} stand for the dataset's "
                    "words. Empty: as the preset.",
                ),
                io.Int.Input(
                    "sample_every",
                    default=100,
                    min=0,
                    max=100000,
                    tooltip="Steps between these pictures. 0 draws them only at the end.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=2**63 - 1,
                    control_after_generate=True,
                    tooltip="Same seed and same pictures, same LoRA.",
                ),
                io.Combo.Input(
                    "base_dtype",
                    options=["auto", "fp32", "bf16", "fp8", "nf4"],
                    default="auto",
                    tooltip="How the frozen model lies in memory while training. fp8 and nf4 save memory on NVIDIA cards.",
                    advanced=True,
                ),
                io.String.Input(
                    "more",
                    multiline=True,
                    default="",
                    placeholder="train.ema=0.995",
                    optional=True,
                    tooltip="Any other setting of a training file, one a line: section.key=value.",
                    advanced=True,
                ),
            ],
            outputs=[TrainingSettingsType.Output("settings", tooltip="For Train LoRA.")],
        )

    @classmethod
    def execute(cls, **choices: Any) -> io.NodeOutput:
        return io.NodeOutput(training_settings(AS_PRESET, **choices))


class TrainLora(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="BLIP3oTrainLora",
            display_name="Train LoRA (BLIP3-o)",
            category=CATEGORY,
            description="Learn a LoRA from a dataset, measure what it learned, and put it into models/loras. Cancel keeps what "
            "was learned so far; the same inputs go on from there.",
            search_aliases=["blip3o", "lora trainer", "finetune", "dreambooth", "fit"],
            inputs=[
                DatasetType.Input("dataset", tooltip="The output dataset of Dataset or Caption Dataset."),
                io.Combo.Input(
                    "checkpoint",
                    options=host.list_checkpoints(),
                    default=host.BUILT_IN,
                    tooltip="The model that the LoRA is for, a folder in models/blip3o. The training loads it by itself.",
                ),
                io.String.Input(
                    "name",
                    default="my_lora",
                    tooltip="Name of the file in models/loras. A file of that name from another training is kept; the new one gets "
                    "a number.",
                ),
                io.Combo.Input(
                    "preset",
                    options=preset_names(),
                    default="subject",
                    tooltip="subject: a thing, person or animal. style: a way of drawing. light: a third of the size, changes other "
                    "pictures least.",
                ),
                io.Int.Input(
                    "steps",
                    default=0,
                    min=0,
                    max=1000000,
                    tooltip="How long it learns. 0 chooses by the number of pictures: 187 to 750 steps of 8 samples. The best step "
                    "is kept, not the last.",
                ),
                io.Float.Input(
                    "minutes",
                    default=0.0,
                    min=0.0,
                    max=10000.0,
                    step=1.0,
                    tooltip="Stop after this many minutes and keep what was learned. 0 is no limit.",
                ),
                TrainingSettingsType.Input(
                    "settings",
                    optional=True,
                    tooltip="From Training Settings; without it the preset decides.",
                ),
            ],
            outputs=[
                io.LoraModel.Output(
                    "lora", tooltip="The LoRA, for Compare Strengths, Merge LoRAs or Load LoRA Model."
                ),
                io.LossMap.Output("loss", tooltip="Loss of every step, for ComfyUI's Plot Loss Graph."),
                RunType.Output("run", tooltip="The records of this training, for Plot Run."),
                io.String.Output("lora_name", tooltip="The file in models/loras, to choose in Load LoRA."),
                io.String.Output(
                    "scorecard", tooltip="What was measured: how much was learned, and how much else changed."
                ),
            ],
            hidden=[io.Hidden.unique_id],
            has_intermediate_output=True,
            is_output_node=True,
            # The node shows chart and text under its own id.
            not_idempotent=True,
        )

    @classmethod
    def validate_inputs(cls, checkpoint: str) -> bool | str:
        return validate_checkpoint(checkpoint)

    @classmethod
    def fingerprint_inputs(cls, checkpoint: str, **unused: Any) -> str:
        return host.checkpoint_fingerprint(checkpoint)

    @classmethod
    def execute(
        cls,
        dataset: TrainingPictures,
        checkpoint: str,
        name: str,
        preset: str,
        steps: int,
        minutes: float,
        settings: dict[str, Any] | None = None,
    ) -> io.NodeOutput:
        result = train_lora(
            dataset,
            checkpoint,
            name=name,
            preset=preset,
            steps=steps,
            minutes=minutes,
            settings=settings,
            node_id=cls.hidden.unique_id,
        )
        shown = {"text": (result.scorecard,), "chart": (result.chart,)}
        return io.NodeOutput(
            result.lora, {"loss": result.losses}, result.run, result.lora_name, result.scorecard, ui=shown
        )


NODES = [TrainingSettings, TrainLora]
