"""What a LoRA changes in a network: the names of its tensors, and their arithmetic.

Canonical names are those ComfyUI's stock loader understands: `diffusion_model.<layer of the DiT>.lora_A.weight` and so
on, `backbone.<layer>` for the backbone. Trainers write others (PEFT, kohya, diffusers); all of them are read.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

DIT, BACKBONE = "dit", "backbone"
CANONICAL = {DIT: "diffusion_model.", BACKBONE: "backbone."}
KOHYA = {DIT: "lora_unet_", BACKBONE: "lora_te_"}
COMPONENT_WORDS = {DIT: "DiT", BACKBONE: "backbone"}
# Longest first; None = the layer's own name tells the network.
PREFIXES: tuple[tuple[str, str | None], ...] = (
    ("base_model.model.backbone.", BACKBONE),
    ("text_encoders.backbone.", BACKBONE),
    ("base_model.model.dit.", DIT),
    ("base_model.model.", None),
    ("diffusion_model.", DIT),
    ("model.dit.model.", DIT),
    ("transformer.", DIT),
    ("backbone.", BACKBONE),
    ("dit.", DIT),
)
BACKBONE_PARTS = ("text", "visual", "lm_head", "latent_queries")
QUERIES = "latent_queries"

Address = tuple[str, str]  # network, and name of the layer in it

# Ending of a tensor's name -> what it is. The first name of each kind is the canonical one.
SUFFIXES = {
    ".lora_A.weight": "lora_A",
    ".lora_down.weight": "lora_A",
    ".lora.down.weight": "lora_A",
    ".lora_B.weight": "lora_B",
    ".lora_up.weight": "lora_B",
    ".lora.up.weight": "lora_B",
    ".alpha": "alpha",
    ".dora_scale": "dora_scale",
    ".lora_magnitude_vector": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude",
    ".diff": "diff",
    ".diff_b": "diff_b",
    **{f".lokr_{part}": f"lokr_{part}" for part in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")},
    **{f".hada_{part}": f"hada_{part}" for part in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
    ".set_weight": "set_weight",
    ".oft_blocks": "oft_blocks",
}
CANONICAL_SUFFIX = {part: suffix for suffix, part in reversed(SUFFIXES.items())}
# Kinds for convolutions, or that replace weights instead of adding to them.
NOT_APPLIED = ("lokr_t2", "hada_t1", "hada_t2", "set_weight", "oft_blocks")
# PEFT puts the adapter's name into the keys of a live model.
ADAPTER_NAME = re.compile(r"\.default(?=\.weight$|$)")

# Parts of layer names that hold an underscore themselves: kohya's names have underscores for the dots, too.
COMPOUND_NAMES = (
    *("to_q", "to_k", "to_v", "to_out", "norm_q", "norm_k", "norm_out", "norm1_context", "ffn_norm1"),
    *("ffn_norm2", "feed_forward", "linear_1", "linear_2", "linear_3", "caption_projection"),
    *("patch_embedder", "time_caption_embed", "timestep_embedder", "caption_embedder", "self_attn", "q_proj"),
    *("k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "embed_tokens", "input_layernorm"),
    *("post_attention_layernorm", "lm_head", "latent_queries", "patch_embed", "ln_q"),
)
KOHYA_PIECE = re.compile(f"({'|'.join(sorted(COMPOUND_NAMES, key=len, reverse=True))}|[^_]+)(?:_|$)")


@dataclass(frozen=True)
class Change:
    """What a LoRA does to one weight, and perhaps to the bias beside it.

    Attributes:
        parts: tensors by kind, see SUFFIXES.
    """

    parts: Mapping[str, Tensor]

    @property
    def kind(self) -> str:
        """lora, dora, lokr, loha or full; "" when only a bias changes."""
        names = self.parts.keys()
        if "lora_A" in names or "lora_B" in names:
            return "dora" if names & {"dora_scale", "magnitude"} else "lora"
        if any(name.startswith("lokr_") for name in names):
            return "lokr"
        if any(name.startswith("hada_") for name in names):
            return "loha"
        return "full" if "diff" in names else ""

    @property
    def is_complete(self) -> bool:
        """Whether no matrix of a product is missing."""
        names = self.parts.keys()
        if self.kind in ("lora", "dora"):
            return names >= {"lora_A", "lora_B"}
        if self.kind == "lokr":
            return all(f"lokr_{w}" in names or names >= {f"lokr_{w}_a", f"lokr_{w}_b"} for w in ("w1", "w2"))
        if self.kind == "loha":
            return names >= {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}
        return bool(names & {"diff", "diff_b"})

    @property
    def rank(self) -> int | None:
        """Rows that alpha is divided by; None where no matrix is factorised."""
        for name in ("lora_A", "lokr_w2_b", "lokr_w1_b", "hada_w1_b"):
            if name in self.parts:
                return self.parts[name].shape[0]
        return None

    @property
    def alpha(self) -> float | None:
        return self.parts["alpha"].item() if "alpha" in self.parts else None

    @property
    def scale(self) -> float:
        """Factor of the product of the matrices."""
        return 1.0 if self.rank is None or self.alpha is None else self.alpha / self.rank

    @property
    def size(self) -> tuple[int, ...] | None:
        """Rows and columns of the weight it is for, or its whole shape where that is known; of complete changes."""
        parts = self.parts
        if self.kind in ("lora", "dora"):
            return parts["lora_B"].shape[0], parts["lora_A"][0].numel()
        if self.kind == "lokr":
            (rows, columns), (more_rows, more_columns) = (
                (
                    parts[f"lokr_{w}" if f"lokr_{w}" in parts else f"lokr_{w}_a"].shape[0],
                    parts[f"lokr_{w}" if f"lokr_{w}" in parts else f"lokr_{w}_b"].shape[1],
                )
                for w in ("w1", "w2")
            )
            return rows * more_rows, columns * more_columns
        if self.kind == "loha":
            return parts["hada_w1_a"].shape[0], parts["hada_w1_b"].shape[1]
        return tuple(parts["diff"].shape) if self.kind == "full" else None

    def delta(self, weight: Tensor) -> Tensor:
        """What strength 1 adds to a weight, float32, of its shape.

        Args:
            weight: of the model without this LoRA; only its shape counts, except for DoRA.
        """
        parts = {name: part.to(weight.device, torch.float32) for name, part in self.parts.items()}
        if self.kind == "full":
            return parts["diff"]
        if self.kind == "lokr":
            first, second = _product(parts, "lokr_w1"), _product(parts, "lokr_w2")
            change = torch.kron(first, second)
        elif self.kind == "loha":
            change = _product(parts, "hada_w1") * _product(parts, "hada_w2")
        else:
            change = parts["lora_B"].flatten(1) @ parts["lora_A"].flatten(1)
        change = (self.scale * change).reshape(weight.shape)
        if self.kind != "dora":
            return change
        base = weight.float()
        moved = base + change
        if "magnitude" in parts:  # PEFT: the length each row shall have
            factor = parts["magnitude"].flatten() / row_lengths(moved)
        else:  # ComfyUI: the same in units of the row's length in the base model
            factor = parts["dora_scale"].flatten() / row_lengths(base)
        return moved * factor.reshape(-1, *[1] * (weight.dim() - 1)) - base


def shape_fault(parts: Mapping[str, Tensor]) -> str | None:
    """What is wrong with the shapes of a change's tensors, in words; None = they fit together, as far as they are there."""
    for name, tensor in parts.items():
        if name == "alpha" and (tensor.numel() != 1 or not tensor.isfinite().all()):
            return "alpha is not one number"
        least = {"alpha": 0, "diff": 1, "diff_b": 1, "dora_scale": 1, "magnitude": 1}.get(name, 2)
        is_matrix = name.startswith(("lokr_", "hada_")) and name not in NOT_APPLIED
        if tensor.ndim < least or (least and not tensor.numel()) or (is_matrix and tensor.ndim != 2):
            return f"{name} has the shape {tuple(tensor.shape)}"
    pairs = [("lora_B", "lora_A")]
    pairs += [(f"{word}_a", f"{word}_b") for word in ("lokr_w1", "lokr_w2", "hada_w1", "hada_w2")]
    for left, right in pairs:
        if left in parts and right in parts and parts[left].flatten(1).shape[1] != parts[right].shape[0]:
            return f"{left} and {right} have the ranks {parts[left].flatten(1).shape[1]} and {parts[right].shape[0]}"
    if all(f"hada_{word}" in parts for word in ("w1_a", "w1_b", "w2_a", "w2_b")):
        sizes = [(parts[f"hada_{w}_a"].shape[0], parts[f"hada_{w}_b"].shape[1]) for w in ("w1", "w2")]
        if sizes[0] != sizes[1]:
            return f"its two products have the sizes {sizes[0]} and {sizes[1]}"
    for name in ("dora_scale", "magnitude"):
        if name in parts and "lora_B" in parts and parts[name].numel() != parts["lora_B"].shape[0]:
            return f"{name} has {parts[name].numel()} numbers for {parts['lora_B'].shape[0]} rows"
    return None


def in_units_of_base(change: Change, weight: Tensor) -> Change:
    """A DoRA with PEFT's magnitudes as ComfyUI reads it: `dora_scale` is the length in units of the base weight's.

    ComfyUI divides by the rows' lengths in the base model, PEFT by those after the low-rank change, so the quotient of
    the two goes into the file. Other changes come back as they are.

    Args:
        weight: of the model it was trained on.
    """
    if "magnitude" not in change.parts:
        return change
    parts = {name: part for name, part in change.parts.items() if name != "magnitude"}
    quotient = _length_quotient(parts, weight)
    scale = change.parts["magnitude"].double().flatten().cpu() / quotient
    return Change({**parts, "dora_scale": scale.float()[:, None]})


def in_absolute_units(change: Change, weight: Tensor) -> Change:
    """A DoRA as PEFT writes it; undoes in_units_of_base."""
    if "dora_scale" not in change.parts:
        return change
    parts = {name: part for name, part in change.parts.items() if name != "dora_scale"}
    magnitude = change.parts["dora_scale"].double().flatten().cpu() * _length_quotient(parts, weight)
    return Change({**parts, "magnitude": magnitude.float()})


def canonical_tensors(changes: Mapping[Address, Change]) -> dict[str, Tensor]:
    """The tensors of changes under canonical names."""
    return {
        CANONICAL[component] + module + CANONICAL_SUFFIX[part]: tensor
        for (component, module), change in changes.items()
        for part, tensor in change.parts.items()
    }


def split_key(key: str) -> tuple[str, str]:
    """(name of the layer as in the file, kind of the tensor); the kind is empty for a name of no known ending."""
    key = ADAPTER_NAME.sub("", key)
    for suffix, part in SUFFIXES.items():
        if key.endswith(suffix):
            return key[: -len(suffix)], part
    return key, ""


def place(module: str) -> Address | None:
    """Network and layer that a file's name of a layer means; None = no naming in use."""
    for component, prefix in KOHYA.items():
        if module.startswith(prefix):
            return component, ".".join(KOHYA_PIECE.findall(module[len(prefix) :]))
    for prefix, named in PREFIXES:
        if module.startswith(prefix):
            layer = module[len(prefix) :]
            return named or component_of(layer), layer
    return None


def component_of(layer: str) -> str:
    """Network that a layer's own name belongs to."""
    return BACKBONE if layer.split(".")[0] in BACKBONE_PARTS else DIT


def weight_key(module: str, keys: Iterable[str]) -> str | None:
    """Key of the state_dict that a layer's change is for: its weight, or a parameter of that very name."""
    return next((key for key in (f"{module}.weight", module) if key in keys), None)


def row_lengths(weight: Tensor) -> Tensor:
    """Length of each row (all that makes one output), (rows,)."""
    return weight.flatten(1).norm(dim=1)


@torch.no_grad()
def apply_changes(network: nn.Module, updates: Sequence[tuple[Mapping[str, Change], float]]) -> None:
    """Put LoRAs into a network's weights, which are replaced, not written to: they may lie in the checkpoint file.

    Args:
        updates: (changes by key of the state_dict, strength) of each LoRA, in order; sums are float32.
    """
    for key in dict.fromkeys(key for changes, _ in updates for key in changes):
        weight = network.get_parameter(key).detach()
        summed = weight.float()
        for changes, strength in updates:
            if key in changes and strength and changes[key].kind:
                summed = summed + strength * changes[key].delta(summed)
        _set_parameter(network, key, summed.to(weight.dtype))
        shifts = [
            strength * changes[key].parts["diff_b"].to(weight.device, torch.float32)
            for changes, strength in updates
            if key in changes and strength and "diff_b" in changes[key].parts
        ]
        if shifts:
            bias_key = f"{key.removesuffix('.weight')}.bias"
            bias = network.get_parameter(bias_key).detach()
            _set_parameter(network, bias_key, (bias.float() + sum(shifts)).to(bias.dtype))


def _product(parts: Mapping[str, Tensor], name: str) -> Tensor:
    return parts[name] if name in parts else parts[f"{name}_a"] @ parts[f"{name}_b"]


def _length_quotient(parts: Mapping[str, Tensor], weight: Tensor) -> Tensor:
    """Rows' lengths with the low-rank change over those without, (rows,)."""
    base = weight.detach().cpu().double()
    moved = base + Change(parts).delta(weight.detach().cpu()).double()
    return row_lengths(moved) / row_lengths(base)


def _set_parameter(network: nn.Module, key: str, value: Tensor) -> None:
    path, _, name = key.rpartition(".")
    setattr(network.get_submodule(path), name, nn.Parameter(value, requires_grad=False))
