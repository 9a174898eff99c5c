"""Is everything well? A line when ComfyUI starts, and a node that looks thoroughly and computes."""

from __future__ import annotations

import logging
from pathlib import Path

from comfy_api.latest import io, ui

from ..blip3o_core.doctor import diagnose, start_up_report
from .native import host

logger = logging.getLogger(__name__)

CATEGORY = "BLIP3-o/load"


def own_checkpoints() -> dict[str, Path]:
    """Name -> folder of those in models/blip3o, the built-in one left out."""
    return {name: host.find_checkpoint(name) for name in host.list_checkpoints() if name != host.BUILT_IN}


def say_ready() -> None:
    """One line on ComfyUI's console, and one with a remedy for each thing that is wrong."""
    line, warnings = start_up_report(own_checkpoints(), host.device_words())
    logger.info(line)
    for warning in warnings:
        logger.warning("BLIP3-o: %s", warning)


class Doctor(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="BLIP3oDoctor",
            display_name="BLIP3-o Doctor",
            category=CATEGORY,
            description="Is everything well? Versions of the libraries, device and memory, every checkpoint in models/blip3o, "
            "and a self-test of a few seconds on the built-in model; and what to do about each thing that is wrong.",
            search_aliases=["blip3o", "check", "diagnose", "help", "problem", "versions", "self test"],
            inputs=[
                io.Boolean.Input(
                    "self_test",
                    default=True,
                    tooltip="Compute on the built-in model and compare with recorded numbers. Takes a few seconds on the CPU.",
                ),
            ],
            outputs=[io.String.Output("report", tooltip="What was found, and what to do.")],
            hidden=[io.Hidden.unique_id],
            has_intermediate_output=True,
            is_output_node=True,
            # Libraries, disks and memory change without the graph changing.
            not_idempotent=True,
        )

    @classmethod
    def fingerprint_inputs(cls, **unused: bool) -> float:
        return float("nan")

    @classmethod
    def execute(cls, self_test: bool) -> io.NodeOutput:
        text = str(diagnose(own_checkpoints(), self_test=self_test))
        host.show_text(text, cls.hidden.unique_id)
        return io.NodeOutput(text, ui=ui.PreviewText(text))


NODES = [Doctor]
