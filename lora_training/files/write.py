"""Finished LoRA files: one safetensors that ComfyUI's stock loader understands, with all that is known about its making."""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...blip3o_core.checkpoints.fingerprints import component_fingerprint
from ...blip3o_core.checkpoints.layout import CheckpointFiles
from ...blip3o_core.checkpoints.match import needed_tensors
from ...blip3o_core.checkpoints.safetensor_files import read_tensors, write_safetensors
from ...blip3o_core.errors import WrongAdapterError
from ...blip3o_core.lora.changes import CANONICAL, DIT, Change, split_key
from ...blip3o_core.lora.files import BASE_KEY, WIDTH_KEY, LoraFile, dit_fingerprint, read_lora
from ...blip3o_core.units import format_bytes
from ..config import LoraConfig, to_tree
from ..data.cache import template_hash

FORMAT = "1"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# Small, and a rounding of them scales whole weights.
KEPT_EXACT = ("alpha", "dora_scale", "magnitude")
HASH_KEY = "modelspec.hash_sha256"
HASH_PLACE = "0x" + "0" * 64
SCORECARD_KEY, SETTINGS_KEY, STRENGTH_KEY = (
    "blip3o.scorecard",
    "blip3o.settings",
    "blip3o.recommended_strength",
)
MODEL_NAMES = {3584: "8b", 2048: "4b"}


def lora_tensors(state: Mapping[str, Tensor], base: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Tensors of a file from what an adapter gives: the whole weights of a full finetune become differences.

    Args:
        state: Adapter.state_dict().
        base: state_dict of the DiT it was trained on; needed only for a full finetune.
    """
    tensors: dict[str, Tensor] = {}
    for key, tensor in state.items():
        if split_key(key)[1]:
            tensors[key] = tensor
            continue
        name = key.removeprefix(CANONICAL[DIT])
        difference = tensor.float().cpu() - base[name].float().cpu()
        if name.endswith(".bias"):
            tensors[f"{key.removesuffix('.bias')}.diff_b"] = difference
        else:
            tensors[f"{key.removesuffix('.weight')}.diff"] = difference
    return tensors


def save_lora(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], dtype: str = "bf16"
) -> Path:
    """Write a LoRA file; it appears complete or not at all.

    Args:
        tensors: under the names they shall have; the canonical ones for ComfyUI.
        metadata: strings; modelspec.hash_sha256, the hash of all tensors, is added.
        dtype: bf16, fp16 or fp32, of the matrices; alpha and DoRA's lengths stay float32.

    Raises:
        WrongAdapterError: values are no numbers, or become too large for the dtype.
    """
    path = Path(path)
    written = {
        key: tensor.to(torch.float32 if split_key(key)[1] in KEPT_EXACT else DTYPES[dtype])
        for key, tensor in tensors.items()
    }
    broken = [key for key, tensor in written.items() if not tensor.isfinite().all()]
    if broken:
        raise WrongAdapterError(
            f'The LoRA "{path.name}" was not saved: {len(broken)} of its {len(written)} tensors hold values that are no '
            f'numbers in {dtype} (e.g. "{broken[0]}").\nUse an earlier state of the training, or save.dtype fp32.'
        )
    temporary = path.with_name(f"{path.name}.new")
    try:
        write_safetensors(written, temporary, {**metadata, HASH_KEY: HASH_PLACE})
        _stamp_hash(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def lora_metadata(
    config: LoraConfig,
    checkpoint: CheckpointFiles,
    tensors: Mapping[str, Tensor],
    *,
    pictures: int,
    steps: int,
    scorecard: Mapping[str, Any] | None = None,
    captions: Sequence[str] = (),
    strength: float = 1.0,
    date: datetime | None = None,
) -> dict[str, str]:
    """Everything a reader of the file may ask: the model it belongs to, trigger, settings, proof. No folders are told.

    Args:
        checkpoint: the model it was trained on.
        tensors: of the file.
        pictures: that were trained on.
        steps: of the optimiser behind these weights.
        scorecard: JSON-ready.
        captions: written only when config.save.captions allows it.
        strength: at which it looks best.
        date: None = now.
    """
    base = dict(read_tensors(needed_tensors(checkpoint, DIT)))
    width = base["caption_projection.linear_1.weight"].shape[1]
    ranks, alphas, kinds = _most_common(LoraFile(config.run.name, dict(tensors)))
    trigger = config.data.trigger
    train = config.train
    settings = _without_folders(config)
    settings["model"]["root"] = Path(config.model.root).name
    counted = Counter(captions if config.save.captions else ())
    hint = f'Write "{trigger}" in the prompt. ' if trigger else ""
    metadata = {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"blip3o-nextdit-{MODEL_NAMES.get(width, width)}/{kinds}",
        "modelspec.implementation": "https://github.com/comfyui-blip3o/ComfyUI-BLIP3o",
        "modelspec.title": config.run.name,
        "modelspec.date": (date or datetime.now(timezone.utc)).isoformat(timespec="seconds"),
        "modelspec.trigger_phrase": trigger,
        "modelspec.prediction_type": "flow_velocity",
        "modelspec.usage_hint": f"{hint}Strength {strength:g}.",
        "ss_output_name": config.run.name,
        "ss_network_module": f"blip3o.{kinds}",
        "ss_network_dim": str(ranks),
        "ss_network_alpha": f"{alphas:g}",
        "ss_network_args": json.dumps(_without_folders(config.adapter)),
        "ss_base_model_version": checkpoint.name,
        "ss_steps": str(steps),
        "ss_seed": str(config.run.seed),
        "ss_num_train_images": str(pictures),
        "ss_total_batch_size": str(config.batch),
        "ss_learning_rate": f"{train.optimizer.lr:g}",
        "ss_optimizer": train.optimizer.name,
        "ss_lr_scheduler": train.schedule.type,
        "ss_tag_frequency": json.dumps(
            {config.run.name: dict(counted)} if counted else {}, ensure_ascii=False
        ),
        "ss_training_comment": f"trained with ComfyUI-BLIP3o, preset {config.run.preset}",
        "blip3o.format": FORMAT,
        WIDTH_KEY: str(width),
        BASE_KEY: dit_fingerprint(base),
        "blip3o.backbone_hash": component_fingerprint(checkpoint, "backbone"),
        "blip3o.template_hash": template_hash(),
        "blip3o.train_dtype": config.model.base_dtype,
        "blip3o.class_word": config.data.class_word,
        STRENGTH_KEY: f"{strength:g}",
        SETTINGS_KEY: json.dumps(settings, ensure_ascii=False),
    }
    if scorecard is not None:
        metadata[SCORECARD_KEY] = json.dumps(scorecard, ensure_ascii=False)
    return metadata


def inspect_lora(path: str | Path) -> dict[str, Any]:
    """What is in a LoRA file or PEFT folder, JSON-ready.

    Raises:
        MissingFilesError, WrongAdapterError: see read_lora.
    """
    file = read_lora(path)
    by_network: dict[str, dict[str, Any]] = {}
    problems = [f"{name} has a name of no known kind" for name in file.unknown]
    for (component, module), change in file.changes.items():
        if not change.is_complete:
            problems.append(f"{module}: a part is missing")
            continue
        entry = by_network.setdefault(
            component, {"layers": 0, "kinds": Counter(), "ranks": Counter(), "norm": 0.0}
        )
        entry["layers"] += 1
        entry["kinds"][change.kind or "bias"] += 1
        if change.rank is not None:
            entry["ranks"][str(change.rank)] += 1
        norm = change_norm(change)
        entry["norm"] += norm**2
        if norm == 0:
            problems.append(f"{module} changes nothing")
    for entry in by_network.values():
        entry["norm"] = math.sqrt(entry["norm"])
    known = file.metadata
    return {
        "name": file.name,
        "title": known.get("modelspec.title", ""),
        "trigger": file.trigger,
        "class_word": known.get("blip3o.class_word", ""),
        "recommended_strength": float(known[STRENGTH_KEY]) if known.get(STRENGTH_KEY) else None,
        "architecture": known.get("modelspec.architecture", ""),
        "base": known.get("ss_base_model_version", ""),
        "base_hash": known.get(BASE_KEY, ""),
        "conditioning_width": file.conditioning_dim,
        "networks": by_network,
        "dtypes": sorted({str(tensor.dtype).removeprefix("torch.") for tensor in file.tensors.values()}),
        "bytes": sum(tensor.nbytes for tensor in file.tensors.values()),
        "steps": int(known["ss_steps"]) if known.get("ss_steps", "").isdigit() else None,
        "pictures": int(known["ss_num_train_images"])
        if known.get("ss_num_train_images", "").isdigit()
        else None,
        "date": known.get("modelspec.date", ""),
        "hash": known.get(HASH_KEY, ""),
        "scorecard": _json_of(known.get(SCORECARD_KEY)),
        "settings": _json_of(known.get(SETTINGS_KEY)),
        "problems": problems,
    }


def describe(inspection: Mapping[str, Any]) -> str:
    """An inspection for people."""
    title = inspection["title"] or inspection["name"]
    lines = [f"{title}  ({format_bytes(inspection['bytes'])}, {', '.join(inspection['dtypes'])})"]
    if inspection["trigger"]:
        strength = inspection["recommended_strength"]
        at = f", strength {strength:g}" if strength is not None else ""
        lines.append(f'  trigger: "{inspection["trigger"]}"{at}')
    base = inspection["architecture"].split("/")[0] or "unknown"
    named = f" ({inspection['base']}, {inspection['base_hash']})" if inspection["base"] else ""
    lines.append(f"  trained for: {base}{named}")
    for component, entry in inspection["networks"].items():
        kinds = ", ".join(f"{count} {kind}" for kind, count in entry["kinds"].items())
        ranks = ", ".join(f"{rank} ({count} layers)" for rank, count in entry["ranks"].items())
        ranked = f"; rank {ranks}" if ranks else ""
        lines.append(f"  {component}: {kinds}{ranked}; size of the change {entry['norm']:.3g}")
    if inspection["steps"] is not None:
        lines.append(
            f"  {inspection['steps']} steps on {inspection['pictures']} pictures, {inspection['date'][:10]}"
        )
    for name, value in (inspection["scorecard"] or {}).items():
        if isinstance(value, (int, float)):
            lines.append(f"  {name}: {value:.4g}")
    lines += [f"  PROBLEM: {problem}" for problem in inspection["problems"][:10]]
    if len(inspection["problems"]) > 10:
        lines.append(f"  ... and {len(inspection['problems']) - 10} more problems")
    return "\n".join(lines)


def change_norm(change: Change) -> float:
    """Frobenius norm of what a change adds at strength 1; of a DoRA, without its lengths, which need the weight."""
    if change.kind in ("lora", "dora"):
        # tr((BA)^T BA) through the small Gram matrices: no product of full size.
        down, up = change.parts["lora_A"].double().flatten(1), change.parts["lora_B"].double().flatten(1)
        squared = ((up.T @ up) * (down @ down.T)).sum().clamp(min=0)
        return abs(change.scale) * math.sqrt(squared.item())
    if change.kind == "":
        return change.parts["diff_b"].double().norm().item()
    return change.delta(torch.empty(change.size)).double().norm().item()


def _stamp_hash(path: Path) -> None:
    """Put the hash of all bytes behind the header into the header, in the place kept for it."""
    digest = hashlib.sha256()
    with path.open("r+b") as file:
        header = file.read(struct.unpack("<Q", file.read(8))[0])
        while chunk := file.read(2**20):
            digest.update(chunk)
        file.seek(8)
        file.write(header.replace(HASH_PLACE.encode(), f"0x{digest.hexdigest()}".encode()))


def _most_common(file: LoraFile) -> tuple[int, float, str]:
    """Rank, alpha and kind of most layers."""
    ranks, alphas, kinds = Counter(), Counter(), Counter()
    for (_, module), change in file.changes.items():
        kinds["queries" if module == "latent_queries" else change.kind] += 1
        if change.rank is not None:
            ranks[change.rank] += 1
            alphas[change.alpha] += 1
    first = [counter.most_common(1)[0][0] if counter else 0 for counter in (ranks, alphas)]
    return int(first[0]), float(first[1]), kinds.most_common(1)[0][0]


def _without_folders(config: Any) -> Any:
    """A configuration as plain values, of paths only the last name."""
    if is_dataclass(config):
        return {item.name: _without_folders(getattr(config, item.name)) for item in fields(config)}
    return config.name if isinstance(config, Path) else to_tree(config)


def _json_of(text: str | None) -> Any:
    try:
        return json.loads(text) if text else None
    except ValueError:
        return None
