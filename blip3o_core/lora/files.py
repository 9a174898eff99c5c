"""LoRA files: how they are read, whichever program wrote them, and which model they belong to."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from ..config import model_words
from ..errors import MissingFilesError, WrongAdapterError
from ..untrusted import brief, parse_object, quote, whole_number
from .changes import (
    BACKBONE,
    DIT,
    NOT_APPLIED,
    QUERIES,
    Address,
    Change,
    canonical_tensors,
    component_of,
    place,
    shape_fault,
    split_key,
    weight_key,
)

PEFT_CONFIG, PEFT_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PLAIN_NAME = re.compile(r"[\w.-]+", re.ASCII)
PEFT_METADATA = "lora_adapter_metadata"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
WIDTH_KEY, BASE_KEY = "blip3o.cond_dim", "blip3o.base_dit_hash"
TRIGGER_KEYS = ("modelspec.trigger_phrase", "trigger")
SAMPLED_VALUES = 512


@dataclass(frozen=True)
class LoraFile:
    """A LoRA as read from a file or a PEFT folder.

    Attributes:
        name: of the file, for messages.
        tensors: under the file's own names; those of PEFT folders already have canonical ones.
    """

    name: str
    tensors: dict[str, Tensor]
    metadata: dict[str, str] = field(default_factory=dict)

    @cached_property
    def changes(self) -> dict[Address, Change]:
        """By network and layer. Alpha is filled in where the file leaves it out."""
        found: dict[Address, dict[str, Tensor]] = {}
        for key, tensor in self.tensors.items():
            module, part = split_key(key)
            address = place(module)
            if part and address:
                found.setdefault(address, {})[part] = tensor
        for (_, module), parts in found.items():
            if fault := shape_fault(parts):
                raise WrongAdapterError(
                    f'The LoRA "{self.name}" is broken: the weights of "{module}" do not fit together ({fault}).\n'
                    "Copy or download it again, or ask its maker."
                )
        config = _peft_metadata(self.metadata)
        return {address: _with_alpha(address[1], parts, config) for address, parts in found.items()}

    @cached_property
    def unknown(self) -> list[str]:
        """Names that fit no naming in use."""
        modules = {key: split_key(key) for key in self.tensors}
        return sorted(
            {module or key for key, (module, part) in modules.items() if not part or not place(module)}
        )

    @cached_property
    def own_names(self) -> dict[Address, str]:
        """What the file itself calls each layer."""
        modules = {split_key(key)[0] for key in self.tensors}
        return {address: module for module in sorted(modules) if (address := place(module))}

    @property
    def canonical(self) -> dict[str, Tensor]:
        """The tensors under canonical names."""
        return canonical_tensors(self.changes)

    @property
    def fingerprint(self) -> str:
        """Hash of names, shapes and values, 16 hex digits; the same for a copy under another name."""
        digest = hashlib.sha256()
        for key in sorted(self.tensors):
            tensor = self.tensors[key].detach().cpu().contiguous()
            digest.update(f"{key}:{tensor.dtype}:{tuple(tensor.shape)}:".encode())
            digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:16]

    @property
    def conditioning_dim(self) -> int | None:
        """Width of the model it was trained on, where the file tells it."""
        width = self.metadata.get(WIDTH_KEY, "")
        return whole_number(width)

    @property
    def trigger(self) -> str:
        """Words that call what was learned."""
        return next((self.metadata[key] for key in TRIGGER_KEYS if self.metadata.get(key)), "")


def read_lora(path: str | Path) -> LoraFile:
    """A LoRA from a safetensors file, or from a PEFT folder (with a second one for the backbone inside).

    Raises:
        MissingFilesError: there is no such file.
        WrongAdapterError: it cannot be read, is a pickle, or holds a kind of adapter that cannot be applied.
    """
    path = Path(path).expanduser()
    if path.name in (PEFT_WEIGHTS, PEFT_CONFIG):
        path = path.parent
    if path.is_dir():
        return _read_peft_folder(path)
    if not path.is_file():
        raise MissingFilesError(
            f'There is no LoRA "{path}".\nName a .safetensors file, or a PEFT folder with {PEFT_CONFIG}.'
        )
    if path.suffix.lower() in PICKLES:
        raise WrongAdapterError(
            f'The LoRA "{path.name}" is a pickle, which can run programs when it is opened; it was not opened.\n'
            "Ask its maker for a .safetensors file."
        )
    tensors, metadata = _read_tensors(path, path.name)
    return LoraFile(path.name, tensors, metadata)


def split_strength(text: str) -> tuple[Path, float]:
    """File and strength of FILE[:STRENGTH]; without one it is 1. A colon inside a path, as in C:, stays."""
    name, colon, strength = text.rpartition(":")
    if colon and not Path(text).exists():
        try:
            return Path(name), float(strength)
        except ValueError:  # the colon belongs to the path
            pass
    return Path(text), 1.0


def check_fit(
    file: LoraFile, shapes: Mapping[str, Mapping[str, Sequence[int]]]
) -> dict[str, dict[str, Change]]:
    """Changes by network and key of its state_dict, after checking that each has its place.

    Args:
        shapes: network -> key of its state_dict -> shape.

    Raises:
        WrongAdapterError: the LoRA belongs to another model, or is one that cannot be applied.
    """
    for change in file.changes.values():
        _refuse_kinds(file.name, change)
    check_base(file, shapes)
    fitting: dict[str, dict[str, Change]] = {}
    homeless = list(file.unknown)
    for (component, module), change in file.changes.items():
        key = weight_key(module, shapes.get(component, {}))
        if key is None or not _has_bias(change, key, shapes[component]):
            homeless.append(file.own_names[component, module])
        else:
            fitting.setdefault(component, {})[key] = change
    total = len(file.changes) + len(file.unknown)
    if homeless or not fitting:
        example = f'"{homeless[0]}"' if homeless else "it holds none at all"
        raise WrongAdapterError(
            f'The LoRA "{file.name}" is not for the loaded model: {len(homeless)} of its {total} weights have no place '
            f"in it (e.g. {example}).\nUse a LoRA trained for BLIP3-o, of the size that is loaded."
        )
    return fitting


def _has_bias(change: Change, key: str, shapes: Mapping[str, Sequence[int]]) -> bool:
    """Whether a bias that is changed is there, and as long; True when none is changed."""
    if "diff_b" not in change.parts:
        return True
    found = shapes.get(f"{key.removesuffix('.weight')}.bias")
    return found is not None and tuple(found) == tuple(change.parts["diff_b"].shape)


def check_base(file: LoraFile, shapes: Mapping[str, Mapping[str, Sequence[int]]]) -> None:
    """Refuse a LoRA for a model of another size.

    Args:
        shapes: as for check_fit; networks that are not there are not checked.

    Raises:
        WrongAdapterError: widths differ.
    """
    _refuse_halves(file)
    loaded = None
    if DIT in shapes:
        loaded = shapes[DIT]["caption_projection.linear_1.weight"][1]
    elif BACKBONE in shapes:
        loaded = shapes[BACKBONE][QUERIES][-1]
    if file.conditioning_dim is not None and loaded is not None and file.conditioning_dim != loaded:
        raise _other_size(
            file.name, file.conditioning_dim, loaded, f"conditioning width {file.conditioning_dim}"
        )
    for (component, module), change in file.changes.items():
        key = weight_key(module, shapes.get(component, {}))
        found = change.size
        if key is None or found is None:
            continue
        expected = tuple(shapes[component][key])
        if found not in (expected, (expected[0], math.prod(expected[1:]))):
            side = -1 if found[-1] != expected[-1] else 0
            raise _other_size(file.name, found[side], expected[side], f"{module}: width {found[side]}")


def check_whole(file: LoraFile) -> None:
    """Refuse a LoRA of which a part would be lost in another file.

    Raises:
        WrongAdapterError: a name is unknown, or half of a pair is missing.
    """
    if file.unknown or not file.changes:
        example = f'e.g. "{file.unknown[0]}"' if file.unknown else "it holds none at all"
        raise WrongAdapterError(
            f'The LoRA "{file.name}" is not one for BLIP3-o: {len(file.unknown)} of its weights have no place in it '
            f"({example}).\nUse a LoRA trained for BLIP3-o."
        )
    _refuse_halves(file)


def other_base(file: LoraFile, fingerprint: str | Callable[[], str]) -> str | None:
    """A note when a LoRA was trained on another DiT of the same size, which works, more or less.

    Args:
        fingerprint: of the loaded DiT, see dit_fingerprint; "" = not known. A function is called only when needed.
    """
    trained = file.metadata.get(BASE_KEY)
    if not trained:
        return None
    fingerprint = fingerprint() if callable(fingerprint) else fingerprint
    if fingerprint in ("", trained):
        return None
    base = file.metadata.get("ss_base_model_version", "another checkpoint")
    return (
        f'Note: the LoRA "{file.name}" was trained on another checkpoint of the same size ({base}, {trained}; loaded is '
        f"{fingerprint}). It acts, but may look different from its samples."
    )


def dit_fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """Hash of a DiT, 16 hex digits: names, shapes and both ends of every tensor in bf16.

    The same whether the checkpoint is kept in float32 or bf16, in one file or several.
    """
    digest = hashlib.sha256()
    for key in sorted(tensors):
        values = tensors[key].detach().flatten()
        ends = torch.cat([values[:SAMPLED_VALUES], values[-SAMPLED_VALUES:]]).to("cpu", torch.bfloat16)
        digest.update(f"{key}:{tuple(tensors[key].shape)}:".encode())
        digest.update(ends.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]


def from_peft(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Tensors of a PEFT adapter (as saved, or the state_dict of a network with one injected) under canonical names.

    Alpha goes into the file beside each pair. A DoRA keeps PEFT's magnitudes, which ComfyUI does not read.

    Args:
        config: adapter_config.json, or the config's to_dict().

    Raises:
        WrongAdapterError: a kind of adapter, or an option of it, that has no place in a LoRA file.
    """
    _refuse_peft_options(config)
    found: dict[Address, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        module, part = split_key(key)
        if not part:
            raise WrongAdapterError(
                f'The PEFT adapter holds "{key}", which is no LoRA, LoKr or LoHa weight.\n'
                "Train it again with plain LoRA settings."
            )
        module = module.removeprefix("base_model.model.")
        address = place(module) or (component_of(module), module)
        found.setdefault(address, {})[part] = tensor
    return canonical_tensors(
        {address: _with_alpha(address[1], parts, config) for address, parts in found.items()}
    )


def _with_alpha(module: str, parts: dict[str, Tensor], config: Mapping[str, Any] | None) -> Change:
    """Add the alpha that a file leaves out: PEFT's configuration tells it, else it is the rank."""
    change = Change(parts)
    if "alpha" in parts or change.kind in ("", "full") or not change.is_complete:
        return change
    scale = 1.0 if config is None else _peft_scale(module, change, config)
    if change.rank is None:
        # Loaders read no alpha for a LoKr of two whole matrices: the factor goes into one of them.
        rank = _by_pattern(config or {}, "rank_pattern", module, (config or {}).get("r")) or 1
        return Change({**parts, "lokr_w1": parts["lokr_w1"] * scale, "alpha": torch.tensor(float(rank))})
    return Change({**parts, "alpha": torch.tensor(scale * change.rank)})


def _peft_scale(module: str, change: Change, config: Mapping[str, Any]) -> float:
    alpha = _by_pattern(config, "alpha_pattern", module, config.get("lora_alpha", config.get("alpha")))
    rank = change.rank or _by_pattern(config, "rank_pattern", module, config.get("r"))
    if alpha is None or rank is None:
        return 1.0
    return alpha / rank**0.5 if config.get("use_rslora") else alpha / rank


def _by_pattern(config: Mapping[str, Any], field: str, module: str, otherwise: Any) -> float | None:
    """The number that PEFT's configuration names for a layer, else another.

    PEFT takes the names for regular expressions. One from a file is never run: a few bytes can keep it busy for hours.

    Raises:
        WrongAdapterError: a pattern that is more than a name, or a number that is none.
    """
    patterns = config.get(field) or {}
    if not isinstance(patterns, Mapping):
        raise WrongAdapterError(
            f"The PEFT adapter's {field} is no table of names and numbers.\nAsk its maker."
        )
    value = otherwise
    for pattern, number in patterns.items():
        name = pattern.removeprefix("^").removesuffix("$").replace("\\.", ".")
        if not PLAIN_NAME.fullmatch(name):
            raise WrongAdapterError(
                f"The PEFT adapter's {field} holds the pattern {quote(pattern)}; only names of layers are read from a file.\n"
                "Save the adapter with the names written out."
            )
        if module == name or module.endswith(f".{name}"):
            value = number
            break
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e6:
        raise WrongAdapterError(
            f"The PEFT adapter gives {quote(value)} as rank or alpha, which must be a number above 0.\nAsk its maker."
        )
    return value


def _peft_metadata(metadata: Mapping[str, str]) -> dict[str, Any] | None:
    """PEFT's configuration in a file's metadata, as diffusers writes it."""
    try:
        config = parse_object(metadata.get(PEFT_METADATA) or "{}")
    except ValueError:
        return None
    return {key.removeprefix("transformer."): value for key, value in config.items()} or None


def _refuse_peft_options(config: Mapping[str, Any]) -> None:
    kind = str(config.get("peft_type", "LORA")).split(".")[-1].upper()
    if kind not in ("LORA", "LOKR", "LOHA"):
        raise WrongAdapterError(
            f"The PEFT adapter is of the kind {kind}, which cannot be used here.\nUse LoRA, DoRA, LoKr or LoHa."
        )
    odd = [name for name in ("fan_in_fan_out", "lora_bias", "modules_to_save") if config.get(name)]
    odd += ["bias"] if config.get("bias", "none") != "none" else []
    if odd:
        raise WrongAdapterError(
            f"The PEFT adapter was trained with {', '.join(odd)}, which a LoRA file has no place for.\n"
            "Train it again without."
        )


def _read_peft_folder(folder: Path) -> LoraFile:
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, str] = {}
    for part in (folder, folder / BACKBONE):
        weights, config_path = part / PEFT_WEIGHTS, part / PEFT_CONFIG
        if not weights.is_file():
            continue
        if not config_path.is_file():
            raise MissingFilesError(
                f'The PEFT folder "{folder.name}" has no {PEFT_CONFIG}, which tells how strong it is.\n'
                "Copy both files of the adapter."
            )
        try:
            config = parse_object(config_path.read_bytes())
        except (ValueError, OSError) as error:
            raise WrongAdapterError(
                f'{PEFT_CONFIG} in "{folder.name}" cannot be read ({brief(error)}).\nCopy or download it again.'
            ) from error
        found, notes = _read_tensors(weights, folder.name)
        tensors |= from_peft(found, config)
        metadata |= notes
    if not tensors:
        pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
        found_instead = f" It holds {pickles[0]}, a pickle, which is not opened." if pickles else ""
        raise MissingFilesError(
            f'There is no {PEFT_WEIGHTS} in the folder "{folder}".{found_instead}\n'
            "Name a PEFT folder, or a .safetensors file."
        )
    return LoraFile(folder.name, tensors, metadata)


def _read_tensors(path: Path, name: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = dict(file.metadata() or {})
            tensors = {key: _readable(file.get_tensor(key)) for key in file.keys()}  # noqa: SIM118 - not a dict
    except Exception as error:  # the library raises its own class, OSError and others
        raise WrongAdapterError(
            f'The LoRA "{name}" cannot be read; it is cut short or no safetensors file.\n'
            f"Copy or download it again. ({brief(error)})"
        ) from error
    broken = [key for key, tensor in tensors.items() if not tensor.isfinite().all()]
    if broken:
        raise WrongAdapterError(
            f'The LoRA "{name}" is broken: {len(broken)} of its {len(tensors)} tensors hold values that are no numbers '
            f'(e.g. "{broken[0]}"). Its training went wrong.\nUse an earlier file of that training, or train again.'
        )
    return tensors, metadata


def _readable(tensor: Tensor) -> Tensor:
    """8-bit floats in bf16, which holds all of their values: nothing can be computed with them."""
    return tensor.to(torch.bfloat16) if tensor.is_floating_point() and tensor.itemsize == 1 else tensor


def _refuse_halves(file: LoraFile) -> None:
    for (_, module), change in file.changes.items():
        if not change.is_complete:
            raise WrongAdapterError(
                f'The LoRA "{file.name}" is not complete: a part of "{module}" is missing.\n'
                "Copy or download it again."
            )


def _refuse_kinds(name: str, change: Change) -> None:
    if strange := [part for part in change.parts if part in NOT_APPLIED]:
        raise WrongAdapterError(
            f'The LoRA "{name}" is of a kind that is applied only inside ComfyUI ({strange[0]}).\n'
            "Use it there, or train a LoRA, DoRA, LoKr or LoHa."
        )


def _other_size(name: str, found: int, expected: int, detail: str) -> WrongAdapterError:
    trained = model_words(found, "a model of another size")
    loaded = model_words(expected, "another one")
    return WrongAdapterError(
        f'The LoRA "{name}" was trained for {trained}, but {loaded} is loaded.\n'
        "Load the model it was trained for, or train it again on this one. "
        f"({detail}, expected {expected})"
    )
