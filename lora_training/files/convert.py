"""One LoRA, four ways of writing it down: ComfyUI, a PEFT folder, kohya, diffusers; each is the inverse of reading it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lokr.layer import factorization
from torch import Tensor

from ...blip3o_core.checkpoints.layout import CheckpointFiles, open_checkpoint
from ...blip3o_core.checkpoints.match import needed_tensors
from ...blip3o_core.checkpoints.safetensor_files import read_tensors
from ...blip3o_core.checkpoints.save import write_json
from ...blip3o_core.errors import BadInputError, WrongAdapterError
from ...blip3o_core.lora.changes import (
    BACKBONE,
    CANONICAL_SUFFIX,
    DIT,
    KOHYA,
    Address,
    Change,
    canonical_tensors,
    in_absolute_units,
    in_units_of_base,
    weight_key,
)
from ...blip3o_core.lora.files import (
    PEFT_CONFIG,
    PEFT_METADATA,
    PEFT_WEIGHTS,
    LoraFile,
    check_base,
    check_whole,
    read_lora,
)
from .write import save_lora

FORMATS = ("comfy", "peft", "kohya", "diffusers")
KOHYA_SUFFIX = {**CANONICAL_SUFFIX, "lora_A": ".lora_down.weight", "lora_B": ".lora_up.weight"}
LOKR_FACTORS = (-1, *range(1, 257))

Weights = Mapping[str, Mapping[str, Tensor]]


def convert_lora(
    source: str | Path,
    target: str | Path,
    to: str = "comfy",
    *,
    checkpoint: str | Path | CheckpointFiles | None = None,
    dtype: str | None = None,
) -> Path:
    """Write a LoRA file or PEFT folder again, named as another program names it.

    Args:
        target: a .safetensors file; for peft a folder.
        to: a name in FORMATS.
        checkpoint: the model it was trained on, or its folder. A DoRA needs it, because PEFT and diffusers keep rows' lengths
            and ComfyUI and kohya keep them relative to the model's.
        dtype: bf16, fp16 or fp32; None = as in the source.

    Raises:
        MissingFilesError, WrongAdapterError: see read_lora; or the other naming has no place for a part of it.
        BadInputError: an unknown format, or the checkpoint is needed and not given.
    """
    file = read_lora(source)
    if checkpoint is not None and not isinstance(checkpoint, CheckpointFiles):
        checkpoint = open_checkpoint(checkpoint)
    base = None if checkpoint is None else base_weights(checkpoint)
    return save_as(file, target, to, base=base, dtype=dtype)


def save_as(
    file: LoraFile,
    target: str | Path,
    to: str = "comfy",
    *,
    base: Weights | None = None,
    dtype: str | None = None,
) -> Path:
    """Write a LoRA in a format; see convert_lora.

    Args:
        base: of the model it was trained on, see base_weights.
    """
    check_whole(file)
    if to not in FORMATS:
        raise BadInputError(f'There is no format "{to}" of LoRA files; choose one of {", ".join(FORMATS)}.')
    target = Path(target)
    if to != "peft" and target.suffix != ".safetensors":
        raise BadInputError(f'"{target}" is no name for a LoRA file.\nLet it end in .safetensors.')
    dtype = dtype or _dtype_of(file)
    if to == "comfy":
        return save_lora(target, to_comfy(file, base), _plain_metadata(file), dtype)
    if to == "kohya":
        return save_lora(target, to_kohya(file, base), _plain_metadata(file), dtype)
    if to == "diffusers":
        tensors, metadata = to_diffusers(file, base)
        return save_lora(
            target, tensors, {**_plain_metadata(file), **metadata}, _exact_if_dora(tensors, dtype)
        )
    adapters = to_peft(file, base)
    for component, (tensors, config) in adapters.items():
        # PEFT adapts one network; with two, the backbone's adapter lies inside the DiT's folder.
        folder = target / BACKBONE if component == BACKBONE and DIT in adapters else target
        save_lora(folder / PEFT_WEIGHTS, tensors, _plain_metadata(file), _exact_if_dora(tensors, dtype))
        write_json(folder / PEFT_CONFIG, config)
    return target


def to_comfy(file: LoraFile, base: Weights | None = None) -> dict[str, Tensor]:
    """Tensors under canonical names, DoRA's lengths relative to the base model's."""
    return canonical_tensors(_relative(file, base))


def to_kohya(file: LoraFile, base: Weights | None = None) -> dict[str, Tensor]:
    """Tensors under kohya's names: `lora_unet_layers_0_attn1_to_q.lora_down.weight`."""
    return {
        KOHYA[component] + module.replace(".", "_") + KOHYA_SUFFIX[part]: tensor
        for (component, module), change in _relative(file, base).items()
        for part, tensor in change.parts.items()
    }


def to_diffusers(file: LoraFile, base: Weights | None = None) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors under diffusers' names, and the metadata that tells their strength.

    diffusers reads the metadata since 0.34, and LoKr since later; older ones take alpha to be the rank.

    Raises:
        WrongAdapterError: it changes the backbone, which has no place in a file of diffusers.
    """
    adapters = to_peft(file, base)
    if set(adapters) != {DIT}:
        raise WrongAdapterError(
            f'The LoRA "{file.name}" changes the backbone, for which a file of diffusers has no place.\n'
            "Convert it to comfy or peft."
        )
    tensors, config = adapters[DIT]
    if config["peft_type"] == "LOHA":
        raise WrongAdapterError(
            f'The LoRA "{file.name}" is a LoHa, which diffusers cannot load.\nConvert it to comfy, kohya or peft.'
        )
    named = {f"transformer.{key.removeprefix('base_model.model.')}": value for key, value in tensors.items()}
    options = {
        f"transformer.{key}": value
        for key, value in config.items()
        if key not in ("peft_type", "task_type", "base_model_name_or_path", "inference_mode")
    }
    return named, {PEFT_METADATA: json.dumps(options, indent=2, sort_keys=True)}


def to_peft(
    file: LoraFile, base: Weights | None = None
) -> dict[str, tuple[dict[str, Tensor], dict[str, Any]]]:
    """For each network it changes, tensors and configuration of a PEFT adapter.

    Raises:
        WrongAdapterError: it changes whole weights (latent queries, a full finetune), or mixes kinds.
        BadInputError: it is a DoRA and the base is not given.
    """
    found: dict[str, tuple[dict[str, Tensor], dict[str, Any]]] = {}
    for component in (DIT, BACKBONE):
        changes = {
            module: change for (owner, module), change in _absolute(file, base).items() if owner == component
        }
        if not changes:
            continue
        whole = [module for module, change in changes.items() if change.kind in ("full", "")]
        if whole:
            raise WrongAdapterError(
                f'The LoRA "{file.name}" changes {len(whole)} whole weights (e.g. "{whole[0]}"), for which PEFT has no '
                "place.\nConvert it to comfy or kohya, or make a LoRA of it first: blip3o lora extract"
            )
        kinds = {change.kind for change in changes.values()}
        if len(kinds) > 1:
            raise WrongAdapterError(
                f'The LoRA "{file.name}" mixes the kinds {", ".join(sorted(kinds))}, which one PEFT adapter cannot hold.\n'
                "Convert it to comfy or kohya."
            )
        make = {"lokr": _peft_lokr, "loha": _peft_loha}.get(kinds.pop(), _peft_lora)
        found[component] = make(file.name, changes)
    return found


def base_weights(checkpoint: CheckpointFiles) -> Weights:
    """Weights of the networks that LoRAs change, by network and key of its state_dict; read from disk when used."""
    return {
        component: dict(read_tensors(needed_tensors(checkpoint, component)))
        for component in (DIT, BACKBONE)
        if checkpoint.has_component(component)
    }


def base_weight(file: LoraFile, base: Weights | None, address: Address) -> Tensor:
    """The weight of the base model that a change is for.

    Raises:
        BadInputError: the base is not given.
        WrongAdapterError: it has no such weight.
    """
    if base is None:
        raise BadInputError(
            f'The LoRA "{file.name}" is a DoRA: its numbers depend on the weights of the model it was trained on.\n'
            "Name that model: --model FOLDER"
        )
    component, module = address
    key = weight_key(module, base.get(component, {}))
    if key is None:
        raise WrongAdapterError(
            f'The LoRA "{file.name}" is not for this model: "{module}" has no place in it.\n'
            "Name the model it was trained on."
        )
    return base[component][key]


def _relative(file: LoraFile, base: Weights | None) -> dict[Address, Change]:
    return {
        address: in_units_of_base(change, _checked_weight(file, base, address))
        if "magnitude" in change.parts
        else change
        for address, change in file.changes.items()
    }


def _absolute(file: LoraFile, base: Weights | None) -> dict[Address, Change]:
    return {
        address: in_absolute_units(change, _checked_weight(file, base, address))
        if "dora_scale" in change.parts
        else change
        for address, change in file.changes.items()
    }


def _checked_weight(file: LoraFile, base: Weights | None, address: Address) -> Tensor:
    weight = base_weight(file, base, address)
    check_base(file, {name: {key: value.shape for key, value in base[name].items()} for name in base})
    return weight


def _peft_lora(name: str, changes: Mapping[str, Change]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    config = {
        "peft_type": "LORA",
        **_sizes(changes, {module: change.rank for module, change in changes.items()}, "lora_alpha"),
        "use_dora": any(change.kind == "dora" for change in changes.values()),
        "use_rslora": False,  # each layer's alpha says how strong it is
        "lora_dropout": 0.0,
        "bias": "none",
    }
    return _peft_tensors(changes), config


def _peft_loha(name: str, changes: Mapping[str, Change]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    ranks = {module: change.rank for module, change in changes.items()}
    return _peft_tensors(changes), {"peft_type": "LOHA", **_sizes(changes, ranks, "alpha")}


def _peft_lokr(name: str, changes: Mapping[str, Change]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """PEFT makes up the sizes of a LoKr's matrices from a rank and a factor; these must come out as they are here."""
    splits = {module: _lokr_split(change) for module, change in changes.items()}
    decomposes = any("lokr_w1_a" in change.parts for change in changes.values())
    ranks = {module: _lokr_rank(change, splits[module], decomposes) for module, change in changes.items()}
    factor = next(
        (
            factor
            for factor in LOKR_FACTORS
            if all(
                factorization(first * second, factor) == (first, second)
                for split in splits.values()
                for first, second in split
            )
        ),
        None,
    )
    made = factor is not None and all(
        _has_peft_shape(changes[module], splits[module], ranks[module], decomposes) for module in changes
    )
    if not made:
        raise WrongAdapterError(
            f'The LoKr "{name}" splits its layers in a way that PEFT cannot.\nConvert it to comfy or kohya.'
        )
    config = {
        "peft_type": "LOKR",
        **_sizes(changes, ranks, "alpha"),
        "decompose_both": decomposes,
        "decompose_factor": factor,
    }
    return _peft_tensors(changes), config


def _lokr_split(change: Change) -> tuple[tuple[int, int], tuple[int, int]]:
    """((rows of the first matrix, of the second), (columns of the first, of the second))."""
    rows, columns = (
        [
            change.parts.get(f"lokr_{w}", change.parts.get(f"lokr_{w}_{half}")).shape[axis]
            for w in ("w1", "w2")
        ]
        for half, axis in (("a", 0), ("b", 1))
    )
    return (rows[0], rows[1]), (columns[0], columns[1])


def _lokr_rank(change: Change, split: tuple[tuple[int, int], tuple[int, int]], decomposes: bool) -> int:
    """The rank that makes PEFT build such matrices; where both are whole, alpha is the rank if that is enough."""
    if change.rank is not None:
        return change.rank
    (first_rows, rows), (first_columns, columns) = split
    needed = max(rows, columns, *((first_rows, first_columns) if decomposes else ()))
    needed = -(-needed // 2)
    alpha = change.alpha or 0
    return int(alpha) if alpha >= needed and alpha == int(alpha) else needed


def _has_peft_shape(
    change: Change, split: tuple[tuple[int, int], tuple[int, int]], rank: int, decomposes: bool
) -> bool:
    """Source: peft LoKrLayer.update_layer."""
    (first_rows, rows), (first_columns, columns) = split
    is_first_whole = not (decomposes and rank < max(first_rows, first_columns) / 2)
    is_second_whole = rank >= max(rows, columns) / 2
    return ("lokr_w1" in change.parts) == is_first_whole and ("lokr_w2" in change.parts) == is_second_whole


def _sizes(changes: Mapping[str, Change], ranks: Mapping[str, int], alpha_name: str) -> dict[str, Any]:
    """PEFT's target_modules, rank and alpha: the most common ones, and patterns for layers that differ."""
    # Where nothing is divided by a rank, PEFT's own alpha / rank must be 1.
    alphas = {
        module: float(ranks[module]) if change.rank is None else change.alpha
        for module, change in changes.items()
    }
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    return {
        "r": rank,
        alpha_name: _whole(alpha),
        "target_modules": list(changes),
        "rank_pattern": {module: value for module, value in ranks.items() if value != rank},
        "alpha_pattern": {module: _whole(value) for module, value in alphas.items() if value != alpha},
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
    }


def _peft_tensors(changes: Mapping[str, Change]) -> dict[str, Tensor]:
    return {
        f"base_model.model.{module}{CANONICAL_SUFFIX[part]}": tensor
        for module, change in changes.items()
        for part, tensor in change.parts.items()
        if part != "alpha"
    }


def _whole(value: float) -> float | int:
    return int(value) if value == int(value) else value


def _plain_metadata(file: LoraFile) -> dict[str, str]:
    left_out = (PEFT_METADATA, "format")
    return {key: value for key, value in file.metadata.items() if key not in left_out}


def _exact_if_dora(tensors: Mapping[str, Tensor], dtype: str) -> str:
    """diffusers tells the kind by the first tensor, and safetensors sorts by dtype: a DoRA must be of one."""
    return "fp32" if any("magnitude" in key for key in tensors) else dtype


def _dtype_of(file: LoraFile) -> str:
    """The matrices' own dtype, where it is one of those written."""
    names = {torch.bfloat16: "bf16", torch.float16: "fp16"}
    dtypes = {tensor.dtype for tensor in file.tensors.values() if tensor.ndim > 1 and tensor.shape[-1] > 1}
    return names.get(dtypes.pop(), "fp32") if len(dtypes) == 1 else "fp32"
