"""Thin adapters to ComfyUI: the list of nodes."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io


class Blip3oExtension(ComfyExtension):
    """What ComfyUI asks this pack for."""

    async def on_load(self) -> None:
        """Check ComfyUI's version, make models/blip3o known, and say whether all is well."""
        from . import doctor
        from .native import host

        host.require_comfyui()
        host.register_model_folder()
        doctor.say_ready()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """All nodes, in the order in which a graph is built."""
        from . import (
            doctor,
            download,
            feature_lab,
            generate,
            load,
            train,
            train_data,
            train_results,
            understand,
        )

        return [
            *load.NODES,
            *download.NODES,
            *doctor.NODES,
            *generate.NODES,
            *understand.NODES,
            *feature_lab.NODES,
            *train_data.NODES,
            *train.NODES,
            *train_results.NODES,
        ]
