"""What learns: adapters on the DiT's and the backbone's layers through PEFT, the latent queries, or the whole DiT."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from peft import LoKrConfig, LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ...blip3o_core.errors import BadInputError, WrongAdapterError
from ...blip3o_core.language.prompts import TextTokenizer
from ...blip3o_core.lora.changes import QUERIES
from ...blip3o_core.models.backbone import Backbone
from ...blip3o_core.models.nextdit import NextDiT
from ...blip3o_core.performance.quantize import QuantizedLinear
from ..config import AdapterConfig
from .objective import random_stream
from .prompt_encoder import PromptEncoder

ATTENTION = r"layers\.\d+\.(attn1\.to_[qkv]|attn2\.to_[qkv]|attn2\.to_out\.0)"
FEED_FORWARD = r"layers\.\d+\.feed_forward\.linear_[123]"
TARGETS = {
    "attn": ATTENTION,
    "attn_ffn": rf"{ATTENTION}|{FEED_FORWARD}",
    "attn_ffn_proj": rf"{ATTENTION}|{FEED_FORWARD}|caption_projection\.linear_[12]",
    "cross": r"layers\.\d+\.(attn2\.to_[qkv]|attn2\.to_out\.0)",
}
# Adapted layers per block of the DiT, and beside the blocks: a renamed layer must not silently stay untrained.
EXPECTED = {"attn": (7, 0), "attn_ffn": (10, 0), "attn_ffn_proj": (10, 2), "cross": (4, 0)}
BACKBONE_TARGETS = r"text\.layers\.\d+\.self_attn\.[qkvo]_proj"
DIT, BACKBONE = "diffusion_model.", "backbone."
NAME = "default"
LOKR = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b")


class Adapter:
    """What learns on a DiT and, at wish, its backbone; everything else in them is frozen.

    Attributes:
        config: its settings.
        names: layers that carry an adapter, e.g. "diffusion_model.layers.0.attn1.to_q".
    """

    def __init__(
        self,
        config: AdapterConfig,
        dit: NextDiT,
        backbone: Backbone | None,
        tokenizer: TextTokenizer | None,
        layers: dict[str, BaseTunerLayer],
        dtypes: dict[str, torch.dtype],
    ) -> None:
        self.config = config
        self._dtypes = dtypes
        self.dit = dit
        self.backbone = backbone
        self._layers = layers
        self._base: dict[str, Tensor] = {}
        self._parameters: dict[str, nn.Parameter] = {}
        for name, layer in layers.items():
            for kind, parameter in _parameters_of(layer):
                self._parameters[f"{name}.{kind}"] = parameter
        if config.type == "full":
            for name, parameter in dit.named_parameters():
                # The blocks' gates stay: ComfyUI's own loader cannot change parameters outside of layers.
                if not name.endswith(".gate"):
                    self._learn_whole(DIT + name, parameter)
        if config.type == "queries" or config.queries:
            self._learn_whole(BACKBONE + QUERIES, backbone.latent_queries)
        self._encoder = None
        if self.changes_conditioning:
            self._encoder = PromptEncoder(backbone, tokenizer, are_layers_fixed=not self.learns_backbone)

    def _learn_whole(self, name: str, parameter: nn.Parameter) -> None:
        self._base[name] = parameter.detach().clone()
        parameter.data = parameter.data.float()  # a step is far below bf16's resolution
        parameter.requires_grad_(True)
        self._parameters[name] = parameter

    @property
    def names(self) -> list[str]:
        return [*self._layers, *self._base]

    @property
    def learns_queries(self) -> bool:
        """Whether the latent queries learn."""
        return BACKBONE + QUERIES in self._base

    @property
    def learns_backbone(self) -> bool:
        """Whether layers of the backbone learn."""
        return any(name.startswith(BACKBONE) for name in self._layers)

    @property
    def changes_conditioning(self) -> bool:
        """Whether a prompt's conditioning depends on what is learned, so that a cached one is the base model's."""
        return self.learns_queries or self.learns_backbone

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """What the optimiser changes, by name."""
        return self._parameters

    def parameters(self) -> list[nn.Parameter]:
        """What the optimiser changes."""
        return list(self._parameters.values())

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Conditioning (B, Q, C) of prompts with what the backbone has learned so far, with gradients if wanted.

        Only where changes_conditioning; else a cached conditioning is the right one.
        """
        assert self._encoder is not None, "nothing in the backbone learns"
        with self._autocast(self.backbone.latent_queries.device, BACKBONE):
            return self._encoder(prompts)

    def autocast(self) -> AbstractContextManager:
        """Within it a half-precision DiT computes in its own precision beside float32 adapters."""
        return self._autocast(next(self.dit.parameters()).device, DIT)

    def _autocast(self, device: torch.device, prefix: str) -> AbstractContextManager:
        dtype = self._dtypes[prefix]
        if dtype in (torch.bfloat16, torch.float16):
            return torch.autocast(device.type, dtype)
        return nullcontext()

    @contextmanager
    def enabled(self, is_enabled: bool = True) -> Iterator[None]:
        """Within it the networks compute with or without what was learned; nested calls restore the outer state."""
        was_enabled = self._is_enabled
        self._switch(is_enabled)
        try:
            yield
        finally:
            self._switch(was_enabled)

    _is_enabled = True

    def _switch(self, is_enabled: bool) -> None:
        if is_enabled == self._is_enabled:
            return
        self._is_enabled = is_enabled
        for layer in self._layers.values():
            # enable_adapters would also walk every parameter's requires_grad: milliseconds, twice a step.
            layer._disable_adapters = not is_enabled
            assert layer.disable_adapters is not is_enabled
        for name, base in self._base.items():
            parameter = self._parameters[name]
            parameter.data, self._base[name] = base, parameter.data

    def _learned(self, name: str) -> Tensor:
        """The tensor that learned, whether or not it is switched off."""
        if name in self._base and not self._is_enabled:
            return self._base[name]
        return self._parameters[name].detach()

    def _base_of(self, name: str) -> Tensor:
        return self._parameters[name].detach() if not self._is_enabled else self._base[name]

    @torch.no_grad()
    def weights(self) -> dict[str, Tensor]:
        """Copies of what learns, exactly as the optimiser holds it."""
        return {name: self._learned(name).clone() for name in self._parameters}

    @torch.no_grad()
    def set_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Take over what `weights` gave."""
        assert weights.keys() == self._parameters.keys()
        for name, value in weights.items():
            self._learned(name).copy_(value)

    @torch.no_grad()
    def state_dict(self) -> dict[str, Tensor]:
        """The learned tensors in float32 on the CPU, under the keys of LoRA files.

        `.alpha` is scaling x rank, so that a loader that divides by the rank meets the trained strength. `.dora_scale`
        is relative to the base weight's norms, as ComfyUI reads it. A full finetune gives whole weights, tuned queries
        their difference.
        """
        tensors: dict[str, Tensor] = {}
        for name, layer in self._layers.items():
            kinds = {
                kind: self._parameters[f"{name}.{kind}"].detach().float() for kind, _ in _parameters_of(layer)
            }
            tensors |= {f"{name}.{kind}": value for kind, value in _to_file(layer, kinds).items()}
        for name in self._base:
            value = self._learned(name).float()
            if name == BACKBONE + QUERIES:
                tensors[f"{name}.diff"] = value - self._base_of(name).float()
            else:
                tensors[name] = value
        return {key: value.detach().cpu().clone().contiguous() for key, value in tensors.items()}

    @torch.no_grad()
    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what state_dict gave.

        Raises:
            WrongAdapterError: other layers, kinds or ranks than this adapter's.
        """
        left = dict(tensors)
        values: dict[str, Tensor] = {}
        for name, layer in self._layers.items():
            kinds = {
                key.removeprefix(f"{name}."): left.pop(key)
                for key in list(left)
                if key.startswith(f"{name}.")
            }
            for kind, value in _from_file(layer, kinds).items():
                values[f"{name}.{kind}"] = value
        for name in self._base:
            if name in left:
                values[name] = left.pop(name)
            elif f"{name}.diff" in left:
                base = self._base_of(name).float()
                values[name] = base + left.pop(f"{name}.diff").to(base)
        missing = [name for name in self._parameters if name not in values]
        wrong = [
            name
            for name, value in values.items()
            if name in self._parameters and value.shape != self._parameters[name].shape
        ]
        extra = [*left, *(name for name in values if name not in self._parameters)]
        for what, names in (("lacks", missing), ("has another size for", wrong), ("has no use for", extra)):
            if names:
                raise WrongAdapterError(
                    f'The adapter to go on from does not fit these settings: it {what} "{names[0]}" '
                    f"({len(names)} of {len(self._parameters)}).\n"
                    "Use the same adapter.type, rank, targets and rank_pattern that it was made with."
                )
        for name, value in values.items():
            self._learned(name).copy_(value)

    def problems(self) -> list[str]:
        """What is wrong with the learned weights at the end of a run: not finite, or never moved."""
        found = []
        for name in self._parameters:
            value = self._learned(name)
            if not torch.isfinite(value).all():
                found.append(f"{name} is not finite")
            elif is_zero_at_start(name) and not value.any():
                found.append(f"{name} is still zero")
            elif name in self._base and torch.equal(value, self._base_of(name).float()):
                found.append(f"{name} did not move")
        return found

    def remove(self) -> None:
        """Give the networks back as they were, to the bit."""
        self._switch(False)
        for name, layer in self._layers.items():
            prefix, network = (DIT, self.dit) if name.startswith(DIT) else (BACKBONE, self.backbone)
            parent, _, child = name.removeprefix(prefix).rpartition(".")
            setattr(network.get_submodule(parent), child, layer.get_base_layer())
        for network in (self.dit, self.backbone):
            for key in ("peft_config", "_hf_peft_config_loaded"):
                if network is not None and hasattr(network, key):
                    delattr(network, key)
        for name in self._base:
            self._parameters[name].requires_grad_(False)


def attach(
    dit: NextDiT,
    config: AdapterConfig,
    *,
    seed: int = 0,
    backbone: Backbone | None = None,
    tokenizer: TextTokenizer | None = None,
) -> Adapter:
    """Put what learns onto a DiT (and its backbone, which `queries` and `backbone_rank` need) and freeze the rest.

    The new adapter changes nothing yet: outputs are those of the base, to the bit. Its random half depends on `seed`
    and the layer's name alone, and no global random state is touched.

    Args:
        tokenizer: of the backbone, where something in it learns.

    Raises:
        BadInputError: `targets` or `rank_pattern` match no layer, the backbone is missing, or whole quantised weights
            shall learn.
    """
    needs_backbone = config.type == "queries" or config.queries or config.backbone_rank > 0
    if needs_backbone and (backbone is None or tokenizer is None):
        raise BadInputError(
            "Tuning the latent queries or the backbone needs the backbone in memory, but it was not given.\n"
            "Load the whole model, or set adapter.queries to false and adapter.backbone_rank to 0."
        )
    if config.type == "full" and any(isinstance(module, QuantizedLinear) for module in dit.modules()):
        raise BadInputError(
            "Weights in 8 or 4 bits cannot learn.\nFor adapter.type full set model.base_dtype to bf16, or train a LoRA."
        )
    backbone = backbone if needs_backbone else None
    dtypes = {}
    for prefix, network in ((DIT, dit), (BACKBONE, backbone)):
        if network is not None:
            _leave_inference_mode(network)
            network.eval().requires_grad_(False)
            dtypes[prefix] = next(network.parameters()).dtype
    layers: dict[str, BaseTunerLayer] = {}
    if config.type in ("lora", "dora", "lokr"):
        names = target_names(dit, config.targets)
        layers |= _inject(dit, DIT, names, config, config.rank, _ranks(names, config.rank_pattern), seed)
    if config.backbone_rank:
        names = [name for name in _linear_names(backbone) if re.fullmatch(BACKBONE_TARGETS, name)]
        expected = 4 * len(backbone.text.layers)
        assert len(names) == expected, f"{len(names)} layers of the backbone are adapted, expected {expected}"
        layers |= _inject(backbone, BACKBONE, names, config, config.backbone_rank, {}, seed)
    return Adapter(config, dit, backbone, tokenizer, layers, dtypes)


def target_names(dit: NextDiT, targets: str) -> list[str]:
    """Layers of the DiT that `targets` means: a group's name, or a regular expression found in the layer's name.

    Raises:
        BadInputError: the expression is none, or matches nothing.
    """
    names = _linear_names(dit)
    if targets in TARGETS:
        chosen = [name for name in names if re.fullmatch(TARGETS[targets], name)]
        in_block, beside = EXPECTED[targets]
        expected = in_block * len(dit.layers) + beside
        assert len(chosen) == expected, f"{targets} adapts {len(chosen)} layers, expected {expected}"
        return chosen
    try:
        chosen = [name for name in names if re.search(targets, name)]
    except re.error as error:
        raise BadInputError(
            f'adapter.targets "{targets}" is neither one of {", ".join(TARGETS)} nor a regular expression ({error}).'
        ) from error
    if not chosen:
        close = difflib.get_close_matches(targets, TARGETS, n=1)
        hint = f'Did you mean "{close[0]}"?' if close else f'Layers are named like "{names[0]}".'
        raise BadInputError(f'adapter.targets "{targets}" matches no layer of the DiT.\n{hint}')
    return chosen


def is_zero_at_start(name: str) -> bool:
    """Whether a parameter is the half that starts at zero, so that it must have moved by the end."""
    return name.endswith((".lora_B.weight", ".lokr_w1", ".lokr_w1_a"))


def _ranks(names: list[str], pattern: Mapping[str, int]) -> dict[str, int]:
    """Layer -> rank of those that a pattern names; the first one counts."""
    ranks: dict[str, int] = {}
    for expression, rank in reversed(pattern.items()):
        try:
            found = [name for name in names if re.search(expression, name)]
        except re.error as error:
            raise BadInputError(
                f'"{expression}" in adapter.rank_pattern is no regular expression ({error}).'
            ) from error
        if not found or rank < 1:
            problem = "matches no adapted layer" if not found else f"has rank {rank}, below 1"
            raise BadInputError(
                f'"{expression}" in adapter.rank_pattern {problem}.\nLayers are named like "{names[0]}".'
            )
        ranks |= dict.fromkeys(found, rank)
    return ranks


def _linear_names(network: nn.Module) -> list[str]:
    return [name for name, module in network.named_modules() if isinstance(module, nn.Linear)]


def _inject(
    network: nn.Module,
    prefix: str,
    names: list[str],
    config: AdapterConfig,
    rank: int,
    ranks: Mapping[str, int],
    seed: int,
) -> dict[str, BaseTunerLayer]:
    common = {
        "r": rank,
        "target_modules": "|".join(re.escape(name) for name in names),
        "rank_pattern": {re.escape(name): value for name, value in ranks.items()},
    }
    if config.type == "lokr" and prefix == DIT:
        peft_config = LoKrConfig(alpha=config.alpha, **common)
    else:
        peft_config = LoraConfig(
            lora_alpha=config.alpha,
            use_rslora=config.rslora,
            use_dora=config.type == "dora",
            **common,
        )
    sizes = vars(network).pop("config", None)  # PEFT before 0.18 takes any `config` for one of transformers
    try:
        with torch.random.fork_rng(devices=[]):  # PEFT draws starting values, which are replaced below
            inject_adapter_in_model(peft_config, network, adapter_name=NAME)
    finally:
        if sizes is not None:
            network.config = sizes
    layers = {
        prefix + name: module
        for name, module in network.named_modules()
        if isinstance(module, BaseTunerLayer)
    }
    assert list(layers) == [prefix + name for name in names], "PEFT adapted other layers than asked for"
    for name, layer in layers.items():
        for kind, parameter in _parameters_of(layer):
            parameter.data = parameter.data.float()
            if kind == "magnitude" or not parameter.any():
                continue  # starts at the base's norms; or the half that starts at zero
            width = 1 / math.sqrt(parameter.shape[1])  # Kaiming's for a = sqrt(5), PEFT's own choice
            drawn = random_stream(seed, f"start of {name}.{kind}").random(tuple(parameter.shape))
            parameter.data.copy_(torch.from_numpy((2 * drawn - 1) * width))
    return layers


def _parameters_of(layer: BaseTunerLayer) -> list[tuple[str, nn.Parameter]]:
    """(kind, parameter) of an adapted layer; the kinds are the file's, but for DoRA's magnitude."""
    if hasattr(layer, "lora_A"):
        found = [("lora_A.weight", layer.lora_A[NAME].weight), ("lora_B.weight", layer.lora_B[NAME].weight)]
        if NAME in layer.lora_magnitude_vector:
            found.append(("magnitude", layer.lora_magnitude_vector[NAME].weight))
        return found
    return [(kind, getattr(layer, kind)[NAME]) for kind in LOKR if NAME in getattr(layer, kind)]


def _to_file(layer: BaseTunerLayer, kinds: dict[str, Tensor]) -> dict[str, Tensor]:
    kinds = dict(kinds)
    scaling = layer.scaling[NAME]
    if "lora_A.weight" in kinds:
        rank = kinds["lora_A.weight"].shape[0]
        if (magnitude := kinds.pop("magnitude", None)) is not None:
            # PEFT divides by the norms of the changed weight, ComfyUI by those of the base's.
            base, changed = _row_norms(layer, kinds)
            kinds["dora_scale"] = (magnitude * base / changed)[:, None]
        return {**kinds, "alpha": torch.tensor(scaling * rank)}
    ranks = [kinds[kind].shape[0] for kind in ("lokr_w1_b", "lokr_w2_b") if kind in kinds]
    if not ranks:  # loaders ignore alpha where neither half is decomposed
        kinds["lokr_w1"] = kinds["lokr_w1"] * scaling
        return {**kinds, "alpha": torch.tensor(float(layer.r[NAME]))}
    return {**kinds, "alpha": torch.tensor(scaling * ranks[-1])}


def _from_file(layer: BaseTunerLayer, kinds: dict[str, Tensor]) -> dict[str, Tensor]:
    """Undo _to_file, also for a file whose strength was made otherwise: the difference goes into the zero half."""
    kinds = {kind: value.float() for kind, value in kinds.items()}
    alpha, scaling = kinds.pop("alpha", None), layer.scaling[NAME]
    first = "lora_B.weight" if hasattr(layer, "lora_A") else "lokr_w1" if "lokr_w1" in kinds else "lokr_w1_a"
    rank = next(
        (kinds[key].shape[0] for key in ("lora_A.weight", "lokr_w2_b", "lokr_w1_b") if key in kinds), None
    )
    stored = 1.0 if rank is None or alpha is None else float(alpha) / rank
    if first in kinds and not math.isclose(stored, scaling, rel_tol=1e-6):
        kinds[first] = kinds[first] * (stored / scaling)
    if (scale := kinds.pop("dora_scale", None)) is not None:
        base, changed = _row_norms(layer, kinds)
        kinds["magnitude"] = scale.flatten().to(base) * changed / base
    return kinds


def _row_norms(layer: BaseTunerLayer, kinds: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Norms of the rows of a layer's weight without and with its LoRA."""
    weight = layer.get_base_layer().weight.detach().float()
    product = (kinds["lora_B.weight"] @ kinds["lora_A.weight"]).to(weight)
    return weight.norm(dim=1), (weight + layer.scaling[NAME] * product).norm(dim=1)


def _leave_inference_mode(network: nn.Module) -> None:
    """Weights made under torch.inference_mode (ComfyUI's graphs run in it) can take no part in autograd: copy them."""
    for module in network.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_inference():
                module._parameters[name] = nn.Parameter(parameter.detach().clone(), requires_grad=False)
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_inference():
                module._buffers[name] = buffer.clone()
