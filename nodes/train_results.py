"""Nodes after a training: plots, grids of strengths, and LoRA files opened, merged, converted and saved."""

from __future__ import annotations

from typing import Any, Literal

import comfy.sd
from comfy_api.latest import io, ui
from torch import Tensor

from ..blip3o_core.images import from_pil
from ..blip3o_core.seeds import MAX_SEED
from .native import host
from .native import lora as lora_files
from .native.drawing import Patcher
from .native.sockets import BackboneHandle, BackboneType, RunType, TrainingRun
from .training.lora_files import convert_lora, merge_loras, open_lora, save_lora
from .training.results import compare_strengths, plot_runs

CATEGORY = "BLIP3-o/train"
MAX_LORAS = 8
MAX_RUNS = 8
DTYPES = ["bf16", "fp16", "fp32"]
FORMATS = ["comfy", "kohya", "diffusers", "peft"]


def checkpoint_of_lora() -> io.Combo.Input:
    return io.Combo.Input(
        "checkpoint",
        options=host.list_checkpoints(),
        default=host.BUILT_IN,
        tooltip="The model it was trained on. Read only for a DoRA, whose lengths depend on it.",
        advanced=True,
    )


class PlotRun(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        run = RunType.Input("run", tooltip="A training to draw; a free socket appears when one is used.")
        return io.Schema(
            node_id="BLIP3oPlotRun",
            display_name="Plot Run (BLIP3-o)",
            category=CATEGORY,
            description="Draw how trainings went: loss, what was learned, what else changed. Several are drawn over each other.",
            search_aliases=["blip3o", "loss graph", "chart", "training curve", "compare runs"],
            inputs=[
                io.Autogrow.Input(
                    "runs",
                    template=io.Autogrow.TemplatePrefix(run, prefix="run_", min=1, max=MAX_RUNS),
                    tooltip="One to eight trainings.",
                ),
            ],
            outputs=[io.Image.Output("plot", tooltip="The drawing.")],
            has_intermediate_output=True,
            is_output_node=True,
        )

    @classmethod
    def execute(cls, runs: dict[str, TrainingRun]) -> io.NodeOutput:
        plot = from_pil([plot_runs([run for run in runs.values() if run is not None])])
        return io.NodeOutput(plot, ui=ui.PreviewImage(plot, cls=cls))


class CompareStrengths(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="BLIP3oCompareStrengths",
            display_name="Compare Strengths (BLIP3-o)",
            category=CATEGORY,
            description="Draw the same prompts with a LoRA at several strengths, all from the same noise, as one labelled grid.",
            search_aliases=["blip3o", "xy plot", "lora grid", "lora strength", "test lora"],
            inputs=[
                BackboneType.Input("backbone", tooltip="The output backbone of Load BLIP3-o."),
                io.Model.Input("dit", tooltip="The output dit of Load BLIP3-o."),
                io.Model.Input("decoder", tooltip="The output decoder of Load BLIP3-o."),
                io.Vae.Input("vae", tooltip="The output vae of Load BLIP3-o."),
                io.LoraModel.Input("lora", tooltip="From Train LoRA, Open LoRA or Merge LoRAs."),
                io.String.Input(
                    "prompts",
                    multiline=True,
                    default="{trigger}",
                    tooltip="One prompt a line, one row each; {trigger} stands for the LoRA's own trigger. Add a prompt without "
                    "it, to see what else changed.",
                ),
                io.String.Input(
                    "strengths",
                    default="0, 0.5, 1",
                    tooltip="One column each, with commas. 0 is the model without the LoRA, 1 is as trained.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=MAX_SEED,
                    control_after_generate=True,
                    tooltip="Of the noise. It is the same for all pictures, so that only the strength differs.",
                ),
                io.Int.Input(
                    "feature_steps", default=30, min=1, max=1000, tooltip="Steps of the DiT, 30 as published."
                ),
                io.Float.Input(
                    "feature_cfg",
                    default=3.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    tooltip="How closely the DiT follows the prompt. 2-5 is usual.",
                ),
                io.Int.Input(
                    "pixel_steps",
                    default=50,
                    min=1,
                    max=500,
                    tooltip="Steps of the decoder, 50 as published.",
                ),
                io.Float.Input(
                    "pixel_cfg",
                    default=3.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    tooltip="How closely the decoder follows the features. 2-5 is usual.",
                ),
            ],
            outputs=[
                io.Image.Output("grid", tooltip="Prompts as rows, strengths as columns, with labels."),
                io.Image.Output("images", tooltip="The single pictures, row by row."),
            ],
        )

    @classmethod
    def execute(
        cls,
        backbone: BackboneHandle,
        dit: Patcher,
        decoder: Patcher,
        vae: comfy.sd.VAE,
        lora: dict[str, Tensor],
        prompts: str,
        strengths: str,
        **drawing: Any,
    ) -> io.NodeOutput:
        grid, images = compare_strengths(backbone, dit, decoder, vae, lora, prompts, strengths, **drawing)
        return io.NodeOutput(from_pil([grid]), images)


class OpenLora(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="BLIP3oOpenLora",
            display_name="Open LoRA (BLIP3-o)",
            category=CATEGORY,
            description="Read a LoRA file from models/loras and tell what is in it. Connect lora to Compare Strengths, Merge LoRAs "
            "or Convert LoRA.",
            search_aliases=["blip3o", "inspect lora", "lora info", "metadata", "lora model"],
            inputs=[
                io.Combo.Input(
                    "lora",
                    options=lora_files.list_loras(),
                    default=lora_files.NO_LORA,
                    tooltip="File in models/loras, or a PEFT folder there. Press R after adding one.",
                )
            ],
            outputs=[
                io.LoraModel.Output("lora", tooltip="The LoRA."),
                io.String.Output(
                    "report", tooltip="Size, rank, trigger, scorecard and what it was trained on."
                ),
            ],
            has_intermediate_output=True,
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, lora: str) -> str:
        return lora_files.fingerprint(lora)

    @classmethod
    def execute(cls, lora: str) -> io.NodeOutput:
        opened, report = open_lora(lora)
        return io.NodeOutput(opened, report, ui=ui.PreviewText(report))


class MergeLoras(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        lora = io.LoraModel.Input("lora", tooltip="A LoRA to merge; a free socket appears when one is used.")
        return io.Schema(
            node_id="BLIP3oMergeLoras",
            display_name="Merge LoRAs (BLIP3-o)",
            category=CATEGORY,
            description="Make one LoRA of several. Connect the result to Compare Strengths or Save LoRA.",
            search_aliases=["blip3o", "combine", "mix lora", "add lora", "ties", "dare"],
            inputs=[
                io.Autogrow.Input(
                    "loras",
                    template=io.Autogrow.TemplatePrefix(lora, prefix="lora_", min=2, max=MAX_LORAS),
                    tooltip="Two to eight LoRAs.",
                ),
                io.String.Input(
                    "weights",
                    default="",
                    placeholder="1, 0.5",
                    tooltip="How strongly each counts, with commas. Empty: each as trained.",
                ),
                io.Combo.Input(
                    "method",
                    options=["concat", "svd"],
                    default="concat",
                    tooltip="concat is exact; its rank is the sum of the ranks. svd is smaller: the nearest LoRA of one rank.",
                ),
                io.Int.Input(
                    "rank",
                    default=0,
                    min=0,
                    max=1024,
                    tooltip="Rank of the result, for svd. 0: as the largest of them.",
                ),
                checkpoint_of_lora(),
            ],
            outputs=[io.LoraModel.Output("lora", tooltip="The merged LoRA.")],
        )

    @classmethod
    def execute(
        cls,
        loras: dict[str, dict[str, Tensor]],
        weights: str,
        method: Literal["concat", "svd"],
        rank: int,
        checkpoint: str,
    ) -> io.NodeOutput:
        connected = [lora for lora in loras.values() if lora is not None]
        return io.NodeOutput(merge_loras(connected, weights, method, rank, checkpoint))


class ConvertLora(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="BLIP3oConvertLora",
            display_name="Convert LoRA (BLIP3-o)",
            category=CATEGORY,
            description="Write a LoRA for another program, or smaller, into the output folder.",
            search_aliases=["blip3o", "export lora", "kohya", "peft", "diffusers", "resize lora"],
            inputs=[
                io.LoraModel.Input("lora", tooltip="From Train LoRA, Open LoRA or Merge LoRAs."),
                io.Combo.Input(
                    "format",
                    options=FORMATS,
                    default="comfy",
                    tooltip="comfy: what ComfyUI reads. kohya: what other trainers write. diffusers and peft: for Python; peft is "
                    "a folder.",
                ),
                io.Int.Input(
                    "rank",
                    default=0,
                    min=0,
                    max=1024,
                    tooltip="Make it smaller: the best LoRA of this rank. 0 changes nothing.",
                ),
                io.Combo.Input(
                    "dtype",
                    options=DTYPES,
                    default="bf16",
                    tooltip="Of the numbers. bf16 is half the size of fp32.",
                ),
                io.String.Input(
                    "filename_prefix",
                    default="loras/BLIP3o",
                    tooltip="Folder and name in ComfyUI's output folder; a number is added.",
                ),
                checkpoint_of_lora(),
            ],
            outputs=[io.String.Output("file", tooltip="What was written, below the output folder.")],
            has_intermediate_output=True,
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls,
        lora: dict[str, Tensor],
        format: str,
        rank: int,
        dtype: str,
        filename_prefix: str,
        checkpoint: str,
    ) -> io.NodeOutput:
        written = convert_lora(
            lora, format, rank=rank, dtype=dtype, filename_prefix=filename_prefix, checkpoint=checkpoint
        )
        return io.NodeOutput(written, ui=ui.PreviewText(f"Saved {written}"))


class SaveLora(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="BLIP3oSaveLora",
            display_name="Save LoRA (BLIP3-o)",
            category=CATEGORY,
            description="Put a LoRA into models/loras, with what it says about itself. Press R, then choose it in Load LoRA.",
            search_aliases=["blip3o", "export lora", "write lora", "lora metadata"],
            inputs=[
                io.LoraModel.Input(
                    "lora", tooltip="From Train LoRA, Merge LoRAs, or ComfyUI's own Train LoRA."
                ),
                io.String.Input(
                    "name",
                    default="my_lora",
                    tooltip="Name of the file. One of that name is kept; the new one gets a number.",
                ),
                io.Combo.Input(
                    "dtype",
                    options=DTYPES,
                    default="bf16",
                    tooltip="Of the numbers. bf16 is half the size of fp32.",
                ),
                io.String.Input(
                    "trigger",
                    default="",
                    optional=True,
                    tooltip="Words that call it, kept in the file. Empty: what the LoRA already says.",
                ),
            ],
            outputs=[
                io.String.Output("lora_name", tooltip="The file in models/loras, to choose in Load LoRA.")
            ],
            has_intermediate_output=True,
            is_output_node=True,
        )

    @classmethod
    def execute(cls, lora: dict[str, Tensor], name: str, dtype: str, trigger: str = "") -> io.NodeOutput:
        written = save_lora(lora, name, dtype=dtype, trigger=trigger)
        return io.NodeOutput(written, ui=ui.PreviewText(f"Saved {written}"))


NODES = [PlotRun, CompareStrengths, OpenLora, MergeLoras, ConvertLora, SaveLora]
