"""LoRA files on ComfyUI's patchers: every naming in use is recognised, a wrong base is refused, nothing is dropped silently."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import comfy.lora
import comfy.model_patcher
import folder_paths
from torch import nn

from ...blip3o_core.errors import BadInputError, MissingFilesError, WrongAdapterError
from ...blip3o_core.lora.changes import BACKBONE, CANONICAL, DIT, weight_key
from ...blip3o_core.lora.files import PEFT_WEIGHTS, LoraFile, check_base, other_base, read_lora
from ...blip3o_core.untrusted import is_inner_name, quote
from . import host
from .dit import FeatureFlow
from .sockets import BackboneHandle

NO_LORA = "none"


def list_loras() -> list[str]:
    """No LoRA, then safetensors files and PEFT folders below models/loras."""
    names = [name for name in folder_paths.get_filename_list("loras") if name.endswith(".safetensors")]
    found = sorted(
        {name[: -len(PEFT_WEIGHTS) - 1] if Path(name).name == PEFT_WEIGHTS else name for name in names}
    )
    return [NO_LORA, *found]


def find_lora(name: str) -> Path:
    """File or PEFT folder of a name from list_loras.

    Raises:
        MissingFilesError: there is none.
        BadInputError: the name leads out of the LoRA folders.
    """
    if not is_inner_name(name):
        raise BadInputError(
            f"The LoRA {quote(name)} leads out of ComfyUI's LoRA folders.\nPut it into models/loras and choose it there."
        )
    for root in folder_paths.get_folder_paths("loras"):
        if os.path.exists(Path(root) / name):
            return Path(root) / name
    raise MissingFilesError(
        f'There is no LoRA "{name}" in models/loras.\nPress "R" to refresh the list and choose one that exists.'
    )


def fingerprint(name: str) -> str:
    """Changes whenever the file does."""
    if name == NO_LORA:
        return NO_LORA
    path = find_lora(name)
    return host.files_fingerprint([path] if path.is_file() else path.iterdir())


def apply_lora(
    name: str,
    dit: comfy.model_patcher.ModelPatcher | None,
    backbone: BackboneHandle | None,
    strength: float,
    backbone_strength: float,
) -> tuple[comfy.model_patcher.ModelPatcher | None, BackboneHandle | None, str]:
    """Clones of the models with the patches of a LoRA in models/loras, and a report of what was matched.

    Raises: as apply_file; MissingFilesError: there is no such LoRA.
    """
    if name == NO_LORA:
        _require_models(dit, backbone)
        return dit, backbone, "no LoRA"
    return apply_file(
        replace(read_lora(find_lora(name)), name=name), dit, backbone, strength, backbone_strength
    )


def apply_file(
    file: LoraFile,
    dit: comfy.model_patcher.ModelPatcher | None,
    backbone: BackboneHandle | None,
    strength: float,
    backbone_strength: float,
) -> tuple[comfy.model_patcher.ModelPatcher | None, BackboneHandle | None, str]:
    """Clones of the models with a LoRA's patches, and a report of what was matched.

    Raises:
        BadInputError: nothing is connected, or not BLIP3-o's DiT.
        WrongAdapterError: the LoRA belongs to another model, or a part of it has no place here.
    """
    _require_models(dit, backbone)
    lines = [file.name]
    patches = _patches(file, dit, backbone)
    if dit is not None:
        dit = dit.clone()
        count = _add_patches(dit, patches[DIT], strength)
        lines.append(f"DiT: {count} of {len(patches[DIT])} weights at strength {strength:g}")
    if backbone is not None and patches[BACKBONE]:
        patcher = backbone.patcher.clone()
        count = _add_patches(patcher, patches[BACKBONE], backbone_strength)
        backbone = backbone.with_patcher(patcher)
        lines.append(
            f"backbone: {count} of {len(patches[BACKBONE])} weights at strength {backbone_strength:g}"
        )
    if file.trigger:
        lines.append(f"trigger: {file.trigger}")
    note = other_base(file, dit.model.fingerprint) if dit is not None else None
    return dit, backbone, "\n".join([*lines, *([note] if note else [])])


def _require_models(dit: comfy.model_patcher.ModelPatcher | None, backbone: BackboneHandle | None) -> None:
    if dit is None and backbone is None:
        raise BadInputError(
            'Nothing is connected to "Load LoRA (BLIP3-o)".\nConnect dit (and backbone) of "Load BLIP3-o".'
        )
    if dit is not None and not isinstance(dit.model, FeatureFlow):
        raise BadInputError(
            'The model connected as dit is not BLIP3-o\'s DiT.\nConnect the output dit of "Load BLIP3-o", not decoder.'
        )


def _patches(
    file: LoraFile, dit: comfy.model_patcher.ModelPatcher | None, backbone: BackboneHandle | None
) -> dict[str, dict[str, object]]:
    """ComfyUI's patches by network and key of its patcher's state_dict; every tensor of the file is in one."""
    networks: dict[str, nn.Module] = {}
    if dit is not None:
        networks[DIT] = dit.model.diffusion_model
    if backbone is not None:
        networks[BACKBONE] = backbone.patcher.model
    shapes = {
        component: {key: tuple(value.shape) for key, value in network.state_dict().items()}
        for component, network in networks.items()
    }
    check_base(file, shapes)
    if doras := [module for (_, module), change in file.changes.items() if "magnitude" in change.parts]:
        raise WrongAdapterError(
            f'The LoRA "{file.name}" is a DoRA in PEFT\'s format ({len(doras)} magnitude vectors).\n'
            "Export it for ComfyUI with: blip3o lora convert"
        )
    keys: dict[str, str] = {}
    homeless = dict.fromkeys(file.unknown, "")
    for component, module in file.changes:
        key = weight_key(module, shapes.get(component, {}))
        if key is None:
            homeless[file.own_names[component, module]] = component
        else:
            # Keys of the DiT's patcher begin with ComfyUI's own prefix, those of the backbone's have none.
            keys[CANONICAL[component] + module] = CANONICAL[component] + key
    loaded = comfy.lora.load_lora(file.canonical, keys, log_missing=False)
    if homeless or not loaded:
        _raise_homeless(file, homeless, dit, backbone)
    return {
        DIT: {key: patch for key, patch in loaded.items() if key.startswith(CANONICAL[DIT])},
        BACKBONE: {
            key.removeprefix(CANONICAL[BACKBONE]): patch
            for key, patch in loaded.items()
            if key.startswith(CANONICAL[BACKBONE])
        },
    }


def _add_patches(
    patcher: comfy.model_patcher.ModelPatcher, patches: dict[str, object], strength: float
) -> int:
    """How many of the patches found their weight."""
    # ComfyUI patches weights of layers only; the queries and the DiT's gates are parameters beside layers.
    beside = [key for key in patches if any(_owner(patcher.model, key).children())]
    count = len(
        patcher.add_patches({key: patch for key, patch in patches.items() if key not in beside}, strength)
    )
    for key in beside:
        base = patcher.get_model_object(key)
        tuned = comfy.lora.calculate_weight(
            [(strength, patches[key], 1.0, None, None)], base.detach().float().clone(), key
        )
        patcher.add_object_patch(key, nn.Parameter(tuned.to(base.dtype), requires_grad=False))
    return count + len(beside)


def _owner(network: nn.Module, key: str) -> nn.Module:
    return network.get_submodule(key.rpartition(".")[0])


def _raise_homeless(
    file: LoraFile,
    homeless: dict[str, str],
    dit: comfy.model_patcher.ModelPatcher | None,
    backbone: BackboneHandle | None,
) -> None:
    """Tell why names of the file (each with the network it means) have no place."""
    total = len(file.changes) + len(file.unknown)
    if set(homeless.values()) == {BACKBONE} and backbone is None:
        raise WrongAdapterError(
            f'The LoRA "{file.name}" also changes the backbone ({len(homeless)} weights), but no backbone is connected.\n'
            'Connect backbone of "Load BLIP3-o" to this node, and this node\'s backbone to "Encode Prompt".'
        )
    if 0 < len(homeless) < total and dit is None:
        raise WrongAdapterError(
            f'The LoRA "{file.name}" also changes the DiT ({len(homeless)} weights), but no DiT is connected.\n'
            'Connect dit of "Load BLIP3-o" to this node, and this node\'s dit to "Sample Image Features".'
        )
    raise WrongAdapterError(
        f'The LoRA "{file.name}" is not for the connected model: {len(homeless)} of its {total} weights have no place in it '
        f'(e.g. "{min(homeless, default="none at all")}").\n'
        "Use a LoRA trained for BLIP3-o's DiT, of the size that is loaded."
    )
