"""Several LoRAs into one, into the model itself, out of a finetuned model, and down to a smaller rank."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from ...blip3o_core.checkpoints.layout import open_checkpoint
from ...blip3o_core.checkpoints.load import load_decoder, load_image_encoder
from ...blip3o_core.checkpoints.match import needed_tensors
from ...blip3o_core.checkpoints.save import save_checkpoint
from ...blip3o_core.errors import BadInputError, WrongAdapterError
from ...blip3o_core.lora.changes import BACKBONE, DIT, QUERIES, Address, Change, canonical_tensors
from ...blip3o_core.lora.files import BASE_KEY, WIDTH_KEY, LoraFile, check_whole, dit_fingerprint
from ...blip3o_core.pipeline import load_pipeline
from .convert import Weights, base_weight, base_weights

logger = logging.getLogger(__name__)

# What a file says about its model; the rest of the metadata is about one training.
BASE_METADATA = (WIDTH_KEY, BASE_KEY, "ss_base_model_version", "blip3o.backbone_hash", "blip3o.template_hash")
KIND_WORDS = {"dora": "DoRA", "lokr": "LoKr", "loha": "LoHa"}
# Singular values below this part of the largest are rounding.
NOTHING = 1e-6
# A random subspace has so many dimensions more than are wanted, and pays for matrices so many times larger than it.
MORE, SUBSPACE = 32, 4


@dataclass(frozen=True)
class Kept:
    """How much of a change a smaller rank keeps.

    Attributes:
        layers: layer -> (rank, share of the squared size that is kept, 0 to 1).
        share: of all layers together.
    """

    layers: dict[str, tuple[int, float]]
    share: float

    def __str__(self) -> str:
        if not self.layers:
            return "no layer needed a smaller rank"
        worst, (rank, share) = min(self.layers.items(), key=lambda entry: entry[1][1])
        ranks = [rank for rank, _ in self.layers.values()]
        return (
            f"{len(self.layers)} layers, rank {min(ranks)} to {max(ranks)}: {self.share:.1%} of the change kept, "
            f"{share:.1%} in the layer that loses most ({worst}, rank {rank})"
        )


def merge_loras(
    loras: Sequence[tuple[LoraFile, float]],
    *,
    mode: Literal["concat", "svd"] = "concat",
    rank: int | None = None,
    base: Weights | None = None,
    name: str = "merged",
) -> LoraFile:
    """One LoRA that at strength 1 does what several do at their strengths.

    Args:
        loras: files and strengths.
        mode: concat is exact, its rank is the sum of the ranks; svd keeps the best approximation of a rank.
        rank: for svd.
        base: weights of the model, for DoRA; see convert.base_weights.

    Raises:
        WrongAdapterError: they belong to models of different size, or concat meets a kind that has no low rank.
        BadInputError: no LoRA, an unknown mode, or svd without a rank.
    """
    if not loras:
        raise BadInputError("There is no LoRA to merge.\nName at least one.")
    if mode not in ("concat", "svd"):
        raise BadInputError(f'There is no way "{mode}" to merge LoRAs; choose concat or svd.')
    if (mode == "svd") != (rank is not None):
        raise BadInputError(
            "A merge by svd needs a rank, and only it does.\nGive mode svd and a rank, or neither."
        )
    for file, _ in loras:
        check_whole(file)
    _refuse_mixed_bases([file for file, _ in loras])
    found: dict[Address, list[tuple[LoraFile, Change, float]]] = {}
    for file, strength in loras:
        for address, change in file.changes.items():
            found.setdefault(address, []).append((file, change, strength))
    merged: dict[Address, Change] = {}
    for address, entries in found.items():
        parts: dict[str, Tensor] = {}
        products = [entry for entry in entries if entry[1].kind not in ("full", "")]
        for part in ("diff", "diff_b"):
            shifts = [
                strength * each.parts[part].float() for _, each, strength in entries if part in each.parts
            ]
            if shifts:
                parts[part] = sum(shifts)
        if products and "diff" in parts:
            raise WrongAdapterError(
                f'One LoRA changes the whole of "{address[1]}", another only some of it; one file cannot hold both.\n'
                "Make a LoRA of the full finetune first: blip3o lora extract"
            )
        if products and mode == "concat":
            parts |= _concatenated(products)
        elif products:
            parts |= _pair(*_truncated(*_summed(address, products, base), rank=rank)[:2])
        merged[address] = Change(parts)
    return LoraFile(name, canonical_tensors(merged), _merged_metadata(loras, name))


def merge_into_checkpoint(
    source: str | Path, target: str | Path, loras: Sequence[tuple[str | Path | LoraFile, float]]
) -> Path:
    """Write a checkpoint folder again with LoRAs in its weights; dtypes stay.

    Args:
        source: checkpoint folder.
        target: new folder.
        loras: files and strengths.

    Raises:
        BadInputError: source and target are the same folder.
        MissingFilesError, WrongAdapterError: see Blip3oPipeline.load_lora.
    """
    source, target = Path(source), Path(target)
    if source.resolve() == target.resolve():
        raise BadInputError(f'Source and target are the same folder "{source}".\nName another target folder.')
    files = open_checkpoint(source)
    dtypes = {info.dtype for name in (DIT, BACKBONE) for info in needed_tensors(files, name).values()}
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    pipeline = load_pipeline(source, dtype=dtype, device="cpu")
    loaded = [pipeline.load_lora(lora, strength) for lora, strength in loras]
    merged = [{"file": each.file.name, "strength": each.strength} for each in loaded]
    return save_checkpoint(
        target,
        files.config,
        backbone=pipeline.backbone,
        dit=pipeline.dit,
        image_encoder=load_image_encoder(files) if files.has_component("image_encoder") else None,
        decoder=load_decoder(files) if files.has_component("decoder") else None,
        tokenizer_from=source,
        dtype=None,
        metadata={"blip3o.merged_loras": json.dumps(merged, ensure_ascii=False)},
    )


def extract_lora(
    base: str | Path,
    tuned: str | Path,
    *,
    rank: int | None = None,
    share: float | None = None,
    name: str = "extracted",
    on_layer: Callable[[int, int], None] | None = None,
) -> tuple[LoraFile, Kept]:
    """The difference of two checkpoints as a LoRA: matrices of the DiT to a rank, the rest of it and the queries whole.

    Args:
        base, tuned: checkpoint folders of the same size.
        rank: of every layer; or
        share: the smallest rank of each layer that keeps this share of its squared change, 0 to 1.
        on_layer: called as on_layer(done, total).

    Raises:
        WrongAdapterError: the checkpoints differ in size, or not at all.
        BadInputError: neither or both of rank and share.
    """
    _check_size(rank, share)
    before, after = (base_weights(open_checkpoint(folder)) for folder in (base, tuned))
    changes: dict[Address, Change] = {}
    layers: dict[str, tuple[int, float, float]] = {}
    places = [*((DIT, key) for key in before[DIT]), (BACKBONE, QUERIES)]
    for done, (component, key) in enumerate(places, start=1):
        if on_layer is not None:
            on_layer(done, len(places))
        old, new = before[component][key], after[component].get(key)
        if new is None or new.shape != old.shape:
            raise WrongAdapterError(
                f'The checkpoints "{Path(base).name}" and "{Path(tuned).name}" are not of the same size ("{key}" differs).\n'
                "Name a model and a finetune of that very model."
            )
        difference = new.float() - old.float()
        if not difference.any():
            continue
        module = key.removesuffix(".weight").removesuffix(".bias")
        parts = dict(changes[component, module].parts) if (component, module) in changes else {}
        if component == DIT and key.endswith(".weight") and difference.ndim > 1:
            left, right, kept = _truncated(difference.flatten(1), None, rank=rank, share=share)
            parts |= _pair(left, right)
            layers[module] = (left.shape[1], kept, difference.double().square().sum().item())
        else:
            parts["diff_b" if key.endswith(".bias") else "diff"] = difference
        changes[component, module] = Change(parts)
    if not changes:
        raise WrongAdapterError(
            f'The checkpoints "{Path(base).name}" and "{Path(tuned).name}" have the same DiT and latent queries.\n'
            "Name a model and a finetune of it."
        )
    metadata = {
        "modelspec.title": name,
        WIDTH_KEY: str(before[DIT]["caption_projection.linear_1.weight"].shape[1]),
        BASE_KEY: dit_fingerprint(before[DIT]),
        "ss_base_model_version": Path(base).name,
        "blip3o.extracted_from": Path(tuned).name,
    }
    return LoraFile(name, canonical_tensors(changes), metadata), _kept(layers)


def resize_lora(
    file: LoraFile, *, rank: int | None = None, share: float | None = None, base: Weights | None = None
) -> tuple[LoraFile, Kept]:
    """A LoRA of another rank, by singular values; DoRA, LoKr and LoHa become plain LoRAs. A rank is never raised.

    Args:
        rank: largest rank of a layer; or
        share: the smallest rank of each layer that keeps this share of its squared change, 0 to 1.
        base: weights of the model, for DoRA; see convert.base_weights.
    """
    _check_size(rank, share)
    check_whole(file)
    changes: dict[Address, Change] = {}
    layers: dict[str, tuple[int, float, float]] = {}
    for address, change in file.changes.items():
        if change.kind in ("full", ""):
            changes[address] = change
            continue
        left, right = _summed(address, [(file, change, 1.0)], base)
        up, down, kept = _truncated(left, right, rank=rank, share=share)
        changes[address] = Change(
            {**_pair(up, down), **{part: each for part, each in change.parts.items() if part == "diff_b"}}
        )
        layers[address[1]] = (up.shape[1], kept, _squared_size(left, right))
    kept = _kept(layers)
    metadata = {
        **{
            key: value
            for key, value in file.metadata.items()
            if key not in ("format", "lora_adapter_metadata")
        },
        "blip3o.resized": f"{kept.share:.4f}",
    }
    if layers:
        ranks = [rank for rank, _, _ in layers.values()]
        metadata |= {"ss_network_dim": str(max(ranks)), "ss_network_alpha": str(max(ranks))}
    return LoraFile(file.name, canonical_tensors(changes), metadata), kept


def _concatenated(entries: Sequence[tuple[LoraFile, Change, float]]) -> dict[str, Tensor]:
    """[s1 B1, s2 B2] [A1; A2] = s1 B1 A1 + s2 B2 A2."""
    for file, change, _ in entries:
        if change.kind != "lora":
            raise WrongAdapterError(
                f'The {KIND_WORDS[change.kind]} "{file.name}" has no exact sum with other LoRAs.\n'
                "Merge by svd and give a rank: --mode svd --rank 32"
            )
    ups = [strength * each.scale * each.parts["lora_B"].float().flatten(1) for _, each, strength in entries]
    downs = [each.parts["lora_A"].float().flatten(1) for _, each, _ in entries]
    return _pair(torch.cat(ups, dim=1), torch.cat(downs))


def _summed(
    address: Address, entries: Sequence[tuple[LoraFile, Change, float]], base: Weights | None
) -> tuple[Tensor, Tensor | None]:
    """The sum of changes as a product of two matrices where all are such, else as one."""
    if all(change.kind == "lora" for _, change, _ in entries):
        pair = _concatenated(entries)
        return pair["lora_B"], pair["lora_A"]
    total = 0
    for file, change, strength in entries:
        is_dora = change.kind == "dora"
        weight = base_weight(file, base, address) if is_dora else torch.empty(change.size)
        total = total + strength * change.delta(weight)
    return total.flatten(1), None


def _truncated(
    left: Tensor, right: Tensor | None, *, rank: int | None = None, share: float | None = None
) -> tuple[Tensor, Tensor, float]:
    """(rows, r) and (r, columns) whose product is the best approximation of left @ right, and the share it keeps."""
    if right is None:
        u, values, v = _singular_vectors(left, rank)
    else:  # the product's own rank is small: its singular values are those of a small square matrix
        first, first_r = torch.linalg.qr(left.double())
        second, second_r = torch.linalg.qr(right.double().T)
        u, values, v = torch.linalg.svd(first_r @ second_r.T)
        u, v = first @ u, v @ second.T
    energy = values.double().square()
    total = energy.sum() if right is not None else left.double().square().sum()
    if total == 0:
        return left.new_zeros(left.shape[0], 1), left.new_zeros(1, v.shape[1]), 1.0
    if share is not None:
        reached = energy.cumsum(0) / total >= share - 1e-12
        rank = int(reached.int().argmax()) + 1 if reached.any() else len(values)
    rank = min(rank, int((values > values[0] * NOTHING).sum()))
    root = values[:rank].sqrt()
    kept = (energy[:rank].sum() / total).item()
    return (u[:, :rank] * root).float(), (root[:, None] * v[:rank]).float(), kept


def _singular_vectors(matrix: Tensor, count: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """U, singular values and V of a matrix, the first `count` or all of them.

    A few of a large matrix come from a random subspace, seconds instead of a minute for a layer of the 8B model; all come
    from the eigenvectors of the Gram matrix, many times faster than an SVD.
    """
    if count is not None and SUBSPACE * (count + MORE) < min(matrix.shape):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            u, values, v = torch.svd_lowrank(matrix.float(), q=count + MORE, niter=6)
        return u.double(), values.double(), v.T.double()
    if matrix.shape[0] > matrix.shape[1]:
        v, values, u = _singular_vectors(matrix.T)
        return u.T, values, v.T
    matrix = matrix.double()
    squares, u = torch.linalg.eigh(matrix @ matrix.T)
    u, values = u.flip(1), squares.flip(0).clamp(min=0).sqrt()
    return u, values, (u.T @ matrix) / values.clamp(min=torch.finfo(values.dtype).tiny)[:, None]


def _pair(up: Tensor, down: Tensor) -> dict[str, Tensor]:
    """A pair that counts once: alpha is its rank."""
    return {
        "lora_A": down.contiguous(),
        "lora_B": up.contiguous(),
        "alpha": torch.tensor(float(down.shape[0])),
    }


def _squared_size(left: Tensor, right: Tensor | None) -> float:
    if right is None:
        return left.double().square().sum().item()
    left, right = left.double(), right.double()
    return ((left.T @ left) * (right @ right.T)).sum().item()


def _kept(layers: Mapping[str, tuple[int, float, float]]) -> Kept:
    total = sum(size for _, _, size in layers.values())
    kept = sum(share * size for _, share, size in layers.values())
    return Kept(
        {module: (rank, share) for module, (rank, share, _) in layers.items()}, kept / total if total else 1.0
    )


def _check_size(rank: int | None, share: float | None) -> None:
    if (rank is None) == (share is None):
        raise BadInputError("Say how small: give a rank, or the share of the change to keep, but not both.")
    if rank is not None and rank < 1:
        raise BadInputError(f"The rank is {rank}; it must be at least 1.")
    if share is not None and not 0 < share <= 1:
        raise BadInputError(f"The share is {share}; it must lie between 0 and 1.")


def _refuse_mixed_bases(files: Sequence[LoraFile]) -> None:
    for first, second in combinations(files, 2):
        widths = {each.conditioning_dim for each in (first, second)} - {None}
        shared = first.changes.keys() & second.changes.keys()
        if len(widths) > 1 or any(first.changes[each].size != second.changes[each].size for each in shared):
            raise WrongAdapterError(
                f'The LoRAs "{first.name}" and "{second.name}" were trained for models of different size.\n'
                "Only LoRAs for the same model can be merged."
            )
    bases = {file.metadata[BASE_KEY] for file in files if file.metadata.get(BASE_KEY)}
    if len(bases) > 1:
        logger.warning(
            "Note: the LoRAs were trained on %d different checkpoints of the same size. The merged one acts on either, but "
            "may look different from their samples.",
            len(bases),
        )


def _merged_metadata(loras: Sequence[tuple[LoraFile, float]], name: str) -> dict[str, str]:
    triggers = dict.fromkeys(file.trigger for file, _ in loras if file.trigger)
    sources = [{"file": file.name, "strength": strength} for file, strength in loras]
    metadata = {
        key: loras[0][0].metadata[key]
        for key in BASE_METADATA
        if all(file.metadata.get(key) == loras[0][0].metadata.get(key) for file, _ in loras)
        and key in loras[0][0].metadata
    }
    widths = {str(file.conditioning_dim) for file, _ in loras if file.conditioning_dim is not None}
    return {
        **metadata,
        **({WIDTH_KEY: widths.pop()} if widths else {}),
        "modelspec.title": name,
        "modelspec.trigger_phrase": ", ".join(triggers),
        "blip3o.merged_loras": json.dumps(sources, ensure_ascii=False),
    }
