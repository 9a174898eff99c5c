"""What is in a checkpoint folder, how large it is, and in which memory it fits."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ..errors import Blip3oError
from ..units import GIB
from .fingerprints import checkpoint_fingerprint
from .infer import infer_eva_clip, infer_nextdit
from .keys import COMPONENTS
from .layout import CheckpointFiles
from .match import left_out_tensors, needed_tensors
from .memory_plan import USES, plan_memory
from .safetensor_files import TensorInfo

MEMORY_SIZES_GIB = (8, 12, 16, 24, 32, 48)


@dataclass(frozen=True)
class ComponentInfo:
    """One network on disk; `problem` says why it cannot be loaded, None = it can."""

    parameters: int
    bytes: int
    dtypes: list[str]
    sizes: dict[str, Any]
    problem: str | None = None


def describe_checkpoint(files: CheckpointFiles) -> dict[str, Any]:
    """JSON-ready description: components with parameters, bytes, dtypes and sizes, and what fits in which memory."""
    components = {name: _describe(files, name) for name in COMPONENTS}
    present = {name: info for name, info in components.items() if info.problem is None}
    left_out = [*files.left_out, *(group for name in present for group in left_out_tensors(files, name))]
    return {
        "folder": str(files.folder),
        "name": files.name,
        "fingerprint": checkpoint_fingerprint(files),
        "components": {name: asdict(info) for name, info in components.items()},
        "left_out": [asdict(group) for group in left_out],
        "total_bytes": sum(info.bytes for info in present.values()),
        "memory": {use: _fits(files, present, use) for use in USES},
    }


def _describe(files: CheckpointFiles, name: str) -> ComponentInfo:
    try:
        tensors = needed_tensors(files, name)
        sizes = _sizes(files, name, tensors)
    except Blip3oError as error:
        return ComponentInfo(0, 0, [], {}, str(error))
    infos = tensors.values()
    count = sum(info.nbytes // info.dtype.itemsize for info in infos)
    dtypes = sorted({str(info.dtype).removeprefix("torch.") for info in infos})
    return ComponentInfo(count, sum(info.nbytes for info in infos), dtypes, sizes)


def _sizes(files: CheckpointFiles, name: str, tensors: dict[str, TensorInfo]) -> dict[str, Any]:
    if name == "decoder":
        unet = files.decoder_config("unet")
        return {
            "features": unet.get("cross_attention_dim"),
            "widths": unet.get("block_out_channels"),
            "prediction": files.decoder_config("scheduler").get("prediction_type"),
        }
    if name == "dit":
        return asdict(infer_nextdit(tensors, files.name))
    if name == "image_encoder":
        separate = files.image_encoder_file()
        sizes = asdict(infer_eva_clip(tensors, files.config, files.name))
        return sizes if separate is None else {**sizes, "file": separate.name}
    layers = {key.split(".")[2] for key in tensors if key.startswith("text.layers.")}
    _, queries, width = tensors["latent_queries"].shape
    return {"width": width, "layers": len(layers), "latent_queries": queries}


def _fits(files: CheckpointFiles, present: dict[str, ComponentInfo], use: str) -> dict[str, Any]:
    """Bytes of weights resident together and one at a time (offload), and how each memory size copes."""
    needed = [present[name].bytes for name in USES[use] if name in present]
    if len(needed) < len(USES[use]):
        return {"available": False}
    verdicts = {}
    for size in MEMORY_SIZES_GIB:
        plan = plan_memory(files, size * GIB, use)
        way = f"fits with {plan.way.options}" if plan.way.options else "fits"
        verdicts[f"{size} GB"] = way if plan.fits else "too small"
    return {
        "available": True,
        "together_bytes": sum(needed),
        "offload_bytes": max(needed),
        "cards": verdicts,
    }
