"""LoRA files on ComfyUI's patchers: every naming in use is recognised, a wrong base is refused, nothing is dropped silently."""

from __future__ import annotations

import json
from pathlib import Path

import comfy.lora
import comfy.model_patcher
import comfy.utils
import folder_paths
import torch
from safetensors import safe_open
from torch import Tensor, nn

from ..blip3o_core.errors import BadInputError, MissingFilesError, WrongAdapterError
from . import host
from .native_dit import FeatureFlow
from .sockets import BackboneHandle

DIT_PREFIXES = (
    "diffusion_model.",
    "transformer.",
    "dit.",
    "base_model.model.",
    "base_model.model.dit.",
    "model.dit.model.",
)
BACKBONE_PREFIXES = ("backbone.", "text_encoders.backbone.", "base_model.model.backbone.")
PEFT_CONFIG, PEFT_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
QUERIES = "latent_queries"
NO_LORA = "none"
KNOWN_WIDTHS = {3584: "the 8B model", 2048: "the 4B model"}


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
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise BadInputError(
            f'The LoRA "{name}" leads out of ComfyUI\'s LoRA folders.\nPut it into models/loras and choose it there.'
        )
    for root in folder_paths.get_folder_paths("loras"):
        if (Path(root) / name).exists():
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


def read_lora(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors (alpha always present) and metadata of a LoRA file or PEFT folder.

    Raises:
        WrongAdapterError: the file cannot be read, or holds a kind of adapter that cannot be applied.
    """
    weights = path / PEFT_WEIGHTS if path.is_dir() else path
    try:
        with safe_open(str(weights), framework="pt") as file:
            metadata = dict(file.metadata() or {})
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
    except Exception as error:  # the library raises its own class, OSError and others
        raise WrongAdapterError(
            f'The LoRA "{path.name}" cannot be read; it is cut short or no safetensors file.\n'
            f"Copy or download it again. ({error})"
        ) from error
    config_path = weights.with_name(PEFT_CONFIG)
    if path.is_dir() and config_path.is_file():
        _add_peft_alpha(tensors, json.loads(config_path.read_text("utf-8")))
    if magnitude := [key for key in tensors if "lora_magnitude_vector" in key]:
        raise WrongAdapterError(
            f'The LoRA "{path.name}" is a DoRA in PEFT\'s format ({len(magnitude)} magnitude vectors).\n'
            "Export it for ComfyUI with: blip3o lora convert"
        )
    return tensors, metadata


def apply_lora(
    name: str,
    dit: comfy.model_patcher.ModelPatcher | None,
    backbone: BackboneHandle | None,
    strength: float,
    backbone_strength: float,
) -> tuple[comfy.model_patcher.ModelPatcher | None, BackboneHandle | None, str]:
    """Clones of the models with the LoRA's patches, and a report of what was matched.

    Raises:
        WrongAdapterError: the LoRA belongs to another model, or a part of it has no place here.
    """
    if dit is None and backbone is None:
        raise BadInputError(
            'Nothing is connected to "Load LoRA (BLIP3-o)".\nConnect dit (and backbone) of "Load BLIP3-o".'
        )
    if dit is not None and not isinstance(dit.model, FeatureFlow):
        raise BadInputError(
            'The model connected as dit is not BLIP3-o\'s DiT.\nConnect the output dit of "Load BLIP3-o", not decoder.'
        )
    if name == NO_LORA:
        return dit, backbone, "no LoRA"
    tensors, metadata = read_lora(find_lora(name))
    key_map: dict[str, str] = {}
    lines = []
    if dit is not None:
        key_map |= _key_map(dit.model.diffusion_model, DIT_PREFIXES, "diffusion_model.")
    if backbone is not None:
        key_map |= _key_map(backbone.patcher.model, BACKBONE_PREFIXES, "backbone:")
    _refuse_foreign(name, tensors, key_map, dit, backbone)
    loaded = comfy.lora.load_lora(dict(tensors), key_map, log_missing=False)
    unmatched = _unmatched(tensors, key_map)
    if unmatched or not loaded:
        _raise_unmatched(name, tensors, unmatched, dit, backbone)
    if dit is not None:
        patches = {key: value for key, value in loaded.items() if key.startswith("diffusion_model.")}
        dit = dit.clone()
        lines.append(
            f"DiT: {len(dit.add_patches(patches, strength))} of {len(patches)} weights at strength {strength:g}"
        )
    if backbone is not None:
        patches = {
            key[len("backbone:") :]: value for key, value in loaded.items() if key.startswith("backbone:")
        }
        backbone, count = _patch_backbone(backbone, patches, backbone_strength)
        if patches:
            lines.append(f"backbone: {count} of {len(patches)} weights at strength {backbone_strength:g}")
    trigger = metadata.get("trigger") or metadata.get("modelspec.trigger_phrase")
    return dit, backbone, "\n".join([f"{name}", *lines, *([f"trigger: {trigger}"] if trigger else [])])


def _patch_backbone(
    handle: BackboneHandle, patches: dict[str, object], strength: float
) -> tuple[BackboneHandle, int]:
    if not patches:
        return handle, 0
    patcher = handle.patcher.clone()
    queries = patches.pop(QUERIES, None)
    count = len(patcher.add_patches(patches, strength))
    if queries is not None:
        # ComfyUI patches weights of layers only, and the queries are a parameter of the whole network.
        base = patcher.get_model_object(QUERIES)
        tuned = comfy.lora.calculate_weight(
            [(strength, queries, 1.0, None, None)], base.detach().float().clone(), QUERIES
        )
        patcher.add_object_patch(QUERIES, nn.Parameter(tuned.to(base.dtype), requires_grad=False))
        count += 1
    return handle.with_patcher(patcher), count


def _key_map(network: nn.Module, prefixes: tuple[str, ...], ours: str) -> dict[str, str]:
    """Every name a file may use for a weight -> our name."""
    kohya = "lora_unet_" if ours == "diffusion_model." else "lora_te_"
    table: dict[str, str] = {}
    for key in network.state_dict():
        if key.endswith(".bias"):
            continue  # ComfyUI finds it through its weight
        base = key.removesuffix(".weight")
        table |= {prefix + base: ours + key for prefix in prefixes}
        table[kohya + base.replace(".", "_")] = ours + key
    return table


SUFFIXES = (
    *(".lora_up.weight", ".lora_down.weight", ".lora_A.weight", ".lora_B.weight", ".lora_A.default.weight"),
    *(
        ".lora_B.default.weight",
        ".lora.up.weight",
        ".lora.down.weight",
        ".alpha",
        ".dora_scale",
        ".diff",
        ".diff_b",
    ),
    *(".lokr_w1", ".lokr_w2", ".lokr_w1_a", ".lokr_w1_b", ".lokr_w2_a", ".lokr_w2_b", ".lokr_t2"),
    *(
        ".hada_w1_a",
        ".hada_w1_b",
        ".hada_w2_a",
        ".hada_w2_b",
        ".hada_t1",
        ".hada_t2",
        ".set_weight",
        ".oft_blocks",
    ),
)
DOWN = (".lora_down.weight", ".lora_A.weight", ".lora_A.default.weight", ".lora.down.weight")
UP = (".lora_up.weight", ".lora_B.weight", ".lora_B.default.weight", ".lora.up.weight")


def _split(key: str) -> tuple[str, str]:
    for suffix in SUFFIXES:
        if key.endswith(suffix):
            return key[: -len(suffix)], suffix
    return key, ""


def _unmatched(tensors: dict[str, Tensor], key_map: dict[str, str]) -> list[str]:
    return [key for key in tensors if _split(key)[0] not in key_map]


def _refuse_foreign(
    name: str,
    tensors: dict[str, Tensor],
    key_map: dict[str, str],
    dit: comfy.model_patcher.ModelPatcher | None,
    backbone: BackboneHandle | None,
) -> None:
    """Compare the sizes of low-rank pairs with the weights they are meant for."""
    shapes = {}
    if dit is not None:
        shapes |= {
            f"diffusion_model.{key}": value.shape
            for key, value in dit.model.diffusion_model.state_dict().items()
        }
    if backbone is not None:
        shapes |= {
            f"backbone:{key}": value.shape for key, value in backbone.patcher.model.state_dict().items()
        }
    for key, tensor in tensors.items():
        base, suffix = _split(key)
        weight = shapes.get(key_map.get(base, ""))
        if weight is None or suffix not in (*DOWN, *UP) or len(weight) < 2:
            continue
        found, expected = (tensor.shape[1], weight[1]) if suffix in DOWN else (tensor.shape[0], weight[0])
        if found != expected:
            trained, loaded = (
                KNOWN_WIDTHS.get(found, "a model of another size"),
                KNOWN_WIDTHS.get(expected, "another one"),
            )
            raise WrongAdapterError(
                f'The LoRA "{name}" was trained for {trained}, but {loaded} is loaded.\n'
                "Load the model it was trained for, or train it again on this one. "
                f"({base}: width {found}, expected {expected})"
            )


def _raise_unmatched(
    name: str,
    tensors: dict[str, Tensor],
    unmatched: list[str],
    dit: comfy.model_patcher.ModelPatcher | None,
    backbone: BackboneHandle | None,
) -> None:
    bases = {_split(key)[0] for key in tensors}
    left = sorted({_split(key)[0] for key in unmatched})
    of_backbone = [base for base in left if base.startswith(BACKBONE_PREFIXES) or base.startswith("lora_te_")]
    if left and len(of_backbone) == len(left) and backbone is None:
        raise WrongAdapterError(
            f'The LoRA "{name}" also changes the backbone ({len(left)} weights), but no backbone is connected.\n'
            'Connect backbone of "Load BLIP3-o" to this node, and this node\'s backbone to "Encode Prompt".'
        )
    if left and len(left) < len(bases) and dit is None:
        raise WrongAdapterError(
            f'The LoRA "{name}" also changes the DiT ({len(left)} weights), but no DiT is connected.\n'
            'Connect dit of "Load BLIP3-o" to this node, and this node\'s dit to "Sample Image Features".'
        )
    raise WrongAdapterError(
        f'The LoRA "{name}" is not for the connected model: {len(left)} of its {len(bases)} weights have no place in it '
        f'(e.g. "{left[0] if left else "none at all"}").\n'
        "Use a LoRA trained for BLIP3-o's DiT, of the size that is loaded."
    )


def _add_peft_alpha(tensors: dict[str, Tensor], config: dict) -> None:
    """PEFT keeps alpha in its configuration; ComfyUI expects it beside every pair."""
    patterns, default = config.get("alpha_pattern") or {}, config.get("lora_alpha", config.get("r", 1))
    for key in [key for key in tensors if key.endswith(DOWN)]:
        base, suffix = _split(key)
        rank = tensors[key].shape[0]
        alpha = next((value for name, value in patterns.items() if base.endswith(name)), default)
        if config.get("use_rslora"):
            alpha = alpha * rank**0.5
        tensors.setdefault(f"{base}.alpha", torch.tensor(float(alpha)))
