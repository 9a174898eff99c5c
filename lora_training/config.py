"""What a training run is: one YAML file, read strictly, checked once, kept with the run."""

from __future__ import annotations

import difflib
import types
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from ..blip3o_core.config import BUILT_IN_MODEL
from ..blip3o_core.errors import BadInputError, MissingFilesError
from ..blip3o_core.untrusted import is_new_name, parse_yaml, quote

SCHEMA = 1
PRESET_FOLDER = Path(__file__).parent / "configs"
BUILT_IN = "built-in"


@dataclass(frozen=True)
class RunConfig:
    """Which run this is.

    Attributes:
        name: of the run's folder and of the finished LoRA.
        dir: folder of runs; a relative path counts from the configuration file.
        seed: root of every random number of the run.
        preset: a file in configs/ whose settings count where this one is silent.
    """

    name: str
    dir: Path = Path("runs")
    seed: int = 0
    preset: str = "subject"


@dataclass(frozen=True)
class ModelConfig:
    """The model that the LoRA is for.

    Attributes:
        root: checkpoint folder, or "built-in".
        image_encoder: a separate EVA-CLIP file or its folder.
        decoder: a decoder folder, or a checkpoint folder that has one, where the model's own has none.
        base_dtype: of the frozen weights while fitting; auto = bf16 on a GPU, fp32 on the CPU.
        device: auto, cpu, cuda or mps.
        compile: torch.compile the DiT; worth it from a few hundred steps on a GPU.
    """

    root: str = BUILT_IN
    image_encoder: Path | None = None
    decoder: Path | None = None
    base_dtype: Literal["auto", "fp32", "bf16", "fp8", "nf4"] = "auto"
    device: str = "auto"
    compile: bool = False


@dataclass(frozen=True)
class CaptionConfig:
    """How a picture's text becomes its prompt.

    Attributes:
        missing: what a picture without a caption does: error, trigger (the trigger alone is its caption), skip.
        prefix: put before every caption.
    """

    missing: Literal["error", "trigger", "skip"] = "error"
    prefix: str = ""


@dataclass(frozen=True)
class CropConfig:
    """How a picture becomes the encoder's square.

    Attributes:
        mode: centre (as published), smart (where the detail is), letterbox (all of it, on the background colour), or
            views (several random squares of 80 to 100 % of the short side).
        views: squares per picture in mode views.
        flip: also encode each view mirrored; leave off for faces and lettering.
    """

    mode: Literal["centre", "smart", "letterbox", "views"] = "centre"
    views: int = 4
    flip: bool = False


@dataclass(frozen=True)
class DataConfig:
    """The pictures and their texts.

    Attributes:
        path: folder of pictures, or a webdataset tar; a relative path counts from the configuration file.
        trigger: words that call the concept; `[trigger]` in a caption stands for it, else it is put in front.
        class_word: what the concept is a kind of; needed for preservation.
        background: colour under transparent pictures and letterboxes.
        mask: none, alpha (transparency marks what does not count) or files (`NAME_mask.png`, white counts).
        bad_image: stop, or skip with a warning.
        holdout: auto (one in ten from ten pictures on), none, or a share between 0 and 0.5.
    """

    path: Path
    trigger: str = ""
    class_word: str = ""
    caption: CaptionConfig = field(default_factory=CaptionConfig)
    crop: CropConfig = field(default_factory=CropConfig)
    background: str = "white"
    mask: Literal["none", "alpha", "files"] = "none"
    bad_image: Literal["stop", "skip"] = "stop"
    holdout: Literal["auto", "none"] | float = "auto"


@dataclass(frozen=True)
class AdapterConfig:
    """What learns.

    Attributes:
        type: lora, dora, lokr, queries (the latent queries alone), none (only backbone_rank or queries), or full (the
            whole DiT).
        rank: of each pair of matrices.
        alpha: strength of an adapter is alpha / rank (alpha / sqrt(rank) with rslora).
        targets: attn_ffn_proj, attn_ffn, attn, cross, or a regular expression over the DiT's layer names.
        rank_pattern: regular expression -> rank, for layers that differ.
        queries: also tune the latent queries.
        backbone_rank: rank of a LoRA on the backbone's q, k, v and o; 0 = none. Keeps the backbone in memory.
        start_from: a LoRA file of this program to go on from.
    """

    type: Literal["lora", "dora", "lokr", "queries", "none", "full"] = "lora"
    rank: int = 16
    alpha: float = 16.0
    rslora: bool = False
    targets: str = "attn_ffn_proj"
    rank_pattern: dict[str, int] = field(default_factory=dict)
    queries: bool = False
    backbone_rank: int = 0
    start_from: Path | None = None


@dataclass(frozen=True)
class OptimizerConfig:
    """Attributes:
    name: adamw, prodigy (finds its own rate; lr is a factor, 1) or schedule_free (no schedule).
    loraplus: how many times faster B learns than A; 1 = equally fast.
    """

    name: Literal["adamw", "prodigy", "schedule_free"] = "adamw"
    lr: float = 2e-4
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.01
    loraplus: float = 1.0


@dataclass(frozen=True)
class ScheduleConfig:
    """Attributes:
    warmup: steps of linear rise.
    floor: share of the rate that is left at the end.
    """

    type: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: int = 20
    floor: float = 0.1


@dataclass(frozen=True)
class TimestepConfig:
    """Which noise levels are trained.

    Attributes:
        dist: uniform (as published) or logit_normal (with mean and std, more of the middle).
        stratified: spread each batch evenly over the levels; the same mean at a quarter of the variance.
        shift: above 1 trains more at high noise.
        min, max: range of sigma.
    """

    dist: Literal["uniform", "logit_normal"] = "uniform"
    stratified: bool = True
    shift: float = 1.0
    min: float = 0.0
    max: float = 1.0
    mean: float = 0.0
    std: float = 1.0


@dataclass(frozen=True)
class LossConfig:
    """Attributes:
    delta: where huber turns from square to line, in units of the velocity.
    """

    type: Literal["mse", "huber"] = "mse"
    delta: float = 1.0


@dataclass(frozen=True)
class PriorConfig:
    """Keeping what the model knew.

    Attributes:
        dop: differential output preservation: with the class word for the trigger, and for `prompts`, the base model
            is the teacher. auto = on when trigger and class_word are given.
        weight: of its loss.
        prompts: more prompts that must not change; "built-in" = a small list of everyday ones.
        reg_path: folder of regularisation pictures with captions, trained at equal share.
    """

    dop: Literal["auto"] | bool = "auto"
    weight: float = 1.0
    prompts: Literal["built-in"] | list[str] = "built-in"
    reg_path: Path | None = None


@dataclass(frozen=True)
class TrainConfig:
    """How it learns.

    Attributes:
        batch: samples of one optimiser step over all processes; auto = 8.
        micro_batch: samples in one network call; auto = as many as fit.
        steps: optimiser steps; auto = 120 samples per picture, 1500 to 6000 samples in all.
        clip: largest gradient norm; 0 = off.
        cond_drop: share of samples trained with all-zero conditioning.
        ema: decay of the averaged weights, 0 = none; auto = 0.99 with a ramp.
    """

    batch: Literal["auto"] | int = "auto"
    micro_batch: Literal["auto"] | int = "auto"
    steps: Literal["auto"] | int = "auto"
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    clip: float = 1.0
    cond_drop: float = 0.1
    timesteps: TimestepConfig = field(default_factory=TimestepConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    ema: Literal["auto"] | float = "auto"
    prior: PriorConfig = field(default_factory=PriorConfig)
    grad_checkpoint: Literal["auto"] | bool = "auto"


@dataclass(frozen=True)
class ValidateConfig:
    """How learning is measured while it goes on.

    Attributes:
        every: steps between validations; 0 = only at the end.
        sigmas: noise levels of the held-out loss.
        noise_seeds: noises per level and picture.
        drift_prompts: prompts whose pictures should not change.
        patience: stop after so many validations without a better one; 0 = never.
        drift_max: a step that changes other prompts more than this is not the best one.
    """

    every: int = 25
    sigmas: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.9)
    noise_seeds: int = 4
    drift_prompts: Literal["built-in"] | list[str] = "built-in"
    patience: int = 6
    drift_max: float = 0.15


@dataclass(frozen=True)
class SampleConfig:
    """Pictures drawn while it learns, through the real decoder.

    Attributes:
        prompts: `{trigger}` and `{class}` stand for the words of `data`.
        every: steps between pictures; 0 = only at the end.
    """

    prompts: tuple[str, ...] = ("{trigger}",)
    every: int = 100
    steps: int = 30
    cfg: float = 3.0
    seed: int = 42


@dataclass(frozen=True)
class SaveConfig:
    """Attributes:
    every_seconds: longest time between two saved states.
    keep: saved states that are kept.
    dtype: of the weights in the finished files.
    formats: files beside the one for ComfyUI: peft, kohya, diffusers.
    captions: write the pictures' captions into the finished file, for everyone to read.
    """

    every_seconds: float = 60.0
    keep: int = 3
    dtype: Literal["bf16", "fp16", "fp32"] = "bf16"
    formats: tuple[Literal["peft", "kohya", "diffusers"], ...] = ()
    captions: bool = False


@dataclass(frozen=True)
class MonitorConfig:
    """Attributes:
    tensorboard: also write TensorBoard events.
    """

    tensorboard: bool = False


@dataclass(frozen=True)
class LoraConfig:
    """Everything about a run. See the sections' own descriptions."""

    run: RunConfig
    data: DataConfig
    schema: int = SCHEMA
    model: ModelConfig = field(default_factory=ModelConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    validate: ValidateConfig = field(default_factory=ValidateConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    save: SaveConfig = field(default_factory=SaveConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)

    def __post_init__(self) -> None:
        _check_ranges(self)

    @property
    def folder(self) -> Path:
        """The run's own folder."""
        return self.run.dir / self.run.name

    @property
    def checkpoint(self) -> Path:
        """Folder of the model."""
        return BUILT_IN_MODEL if self.model.root == BUILT_IN else Path(self.model.root)

    @property
    def batch(self) -> int:
        """Samples of one optimiser step."""
        return 8 if self.train.batch == "auto" else self.train.batch

    @property
    def ema(self) -> float:
        """Decay of the averaged weights."""
        return 0.99 if self.train.ema == "auto" else self.train.ema

    @property
    def uses_preservation(self) -> bool:
        """Whether the base model teaches what must not change."""
        if self.train.prior.dop == "auto":
            return bool(self.data.trigger and self.data.class_word)
        return self.train.prior.dop

    @property
    def needs_backbone(self) -> bool:
        """Whether something in the backbone learns, so that conditioning cannot be cached."""
        return self.adapter.type == "queries" or self.adapter.queries or self.adapter.backbone_rank > 0

    def steps(self, pictures: int) -> int:
        """Optimiser steps for a number of training pictures."""
        if self.train.steps != "auto":
            return self.train.steps
        return max(1, min(6000, max(1500, 120 * pictures)) // self.batch)


def read_config(path: str | Path, overrides: Sequence[str] = ()) -> LoraConfig:
    """The configuration in a YAML file.

    Args:
        overrides: "section.key=value", as after --set; the value is YAML.

    Raises:
        MissingFilesError: there is no such file.
        BadInputError: it is not YAML, or a key or value is unknown; the nearest match is named.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise MissingFilesError(
            f'There is no configuration file "{path}".\nMake one with: blip3o lora new NAME --data FOLDER'
        )
    try:
        tree = parse_yaml(path.read_text("utf-8"))
    except ValueError as error:
        raise BadInputError(
            f'"{path}" cannot be read as YAML: {error}.\nCorrect that line; indentation counts.'
        ) from error
    if not isinstance(tree, dict):
        raise BadInputError(f'"{path}" holds no settings.\nMake one with: blip3o lora new NAME --data FOLDER')
    return parse_config(tree, overrides, base=path.parent)


def parse_config(
    tree: Mapping[str, Any], overrides: Sequence[str] = (), *, base: Path | None = None
) -> LoraConfig:
    """The configuration of a tree of plain values.

    Args:
        base: folder that relative paths of the tree count from; None = leave them.

    Raises:
        BadInputError: a key or value is unknown or impossible.
    """
    tree = _deep_copy(tree)
    for override in overrides:
        _override(tree, override)
    _check_schema(tree)
    run = tree.get("run")
    preset = run.get("preset", RunConfig.preset) if isinstance(run, dict) else RunConfig.preset
    config = _build(LoraConfig, _merge(read_preset(preset), tree), "")
    return config if base is None else _resolve_paths(config, base)


def read_preset(name: str) -> dict[str, Any]:
    """Settings of a preset.

    Raises:
        BadInputError: there is none of that name.
    """
    names = preset_names()
    if name not in names:
        raise BadInputError(f"There is no preset {quote(name)}{_nearest(str(name), names)}")
    return yaml.safe_load((PRESET_FOLDER / f"{name}.yaml").read_text("utf-8")) or {}


def preset_names() -> list[str]:
    """Names of the presets that come with the program."""
    return sorted(path.stem for path in PRESET_FOLDER.glob("*.yaml"))


def to_tree(config: Any) -> Any:
    """A configuration as plain values, ready for YAML or JSON; parse_config reads it back equal."""
    if is_dataclass(config):
        return {item.name: to_tree(getattr(config, item.name)) for item in fields(config)}
    if isinstance(config, Path):
        return config.as_posix()
    if isinstance(config, (list, tuple)):
        return [to_tree(value) for value in config]
    if isinstance(config, dict):
        return {key: to_tree(value) for key, value in config.items()}
    return config


def to_yaml(config: LoraConfig) -> str:
    """A configuration as a YAML file's text."""
    return yaml.safe_dump(to_tree(config), sort_keys=False, allow_unicode=True)


# --- strict reading --------------------------------------------------------------------------------------------------


def _build(kind: type, tree: Any, where: str) -> Any:
    if not isinstance(tree, Mapping):
        raise BadInputError(f'"{where}" must be a section with settings of its own, not {quote(tree)}.')
    types_of = get_type_hints(kind)
    known = [item.name for item in fields(kind)]
    values = {}
    for key, value in tree.items():
        name = f"{where}.{key}" if where else str(key)
        if key not in known:
            raise BadInputError(f'The setting "{name}" is unknown{_nearest(str(key), known)}')
        values[key] = _value(types_of[key], value, name)
    for item in fields(kind):
        if item.name not in values and item.default is MISSING and item.default_factory is MISSING:
            name = f"{where}.{item.name}" if where else item.name
            raise BadInputError(f'The setting "{name}" is missing.\nAdd it to the configuration.')
    return kind(**values)


def _value(kind: Any, value: Any, name: str) -> Any:
    """The value as its declared type, or an error that says what is allowed."""
    if is_dataclass(kind):
        return _build(kind, value, name)
    origin = get_origin(kind)
    if origin in (Union, types.UnionType):
        for option in get_args(kind):
            try:
                return _value(option, value, name)
            except BadInputError:
                continue
    elif origin is Literal:
        if any(value == choice and type(value) is type(choice) for choice in get_args(kind)):
            return value
    elif origin in (list, tuple) and isinstance(value, (list, tuple)):
        arguments = [argument for argument in get_args(kind) if argument is not Ellipsis]
        if len(arguments) in (1, len(value)):
            each = arguments * len(value) if len(arguments) == 1 else arguments
            return origin(_value(item, part, name) for item, part in zip(each, value, strict=True))
    elif origin is dict and isinstance(value, Mapping):
        return {_value(str, key, name): _value(get_args(kind)[1], part, name) for key, part in value.items()}
    elif kind is type(None):
        if value is None:
            return None
    elif kind is Path:
        if isinstance(value, (str, Path)) and str(value):
            return Path(value).expanduser()
    elif kind is float:
        # YAML reads 1e-4 (without a point) as text.
        if isinstance(value, str):
            try:
                return float(value)
            except ValueError:
                pass
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            try:
                return float(value)
            except OverflowError:
                pass
    elif origin is None and isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
        return value
    raise BadInputError(f'The setting "{name}" is {quote(value)}; it must be {_describe(kind)}.')


def _describe(kind: Any) -> str:
    origin = get_origin(kind)
    if origin in (Union, types.UnionType):
        return " or ".join(_describe(option) for option in get_args(kind))
    if origin is Literal:
        return " or ".join(f'"{choice}"' for choice in get_args(kind))
    if origin in (list, tuple):
        return f"a list, each {_describe(get_args(kind)[0])}"
    if origin is dict:
        return "a table of names and values"
    names = {
        bool: "true or false",
        int: "a whole number",
        float: "a number",
        str: "a text",
        Path: "a path",
        type(None): "nothing (null)",
    }
    return names.get(kind, str(kind))


def _nearest(word: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    if close:
        return f'; did you mean "{close[0]}"?'
    return f".\nKnown here: {', '.join(known)}."


def _check_ranges(config: LoraConfig) -> None:
    train, adapter, data = config.train, config.adapter, config.data
    check = {
        "run.seed": (config.run.seed, 0, 2**63 - 1),
        "data.crop.views": (data.crop.views, 1, 64),
        "adapter.rank": (adapter.rank, 1, 1024),
        "adapter.alpha": (adapter.alpha, 0.001, 4096),
        "adapter.backbone_rank": (adapter.backbone_rank, 0, 1024),
        "train.optimizer.lr": (train.optimizer.lr, 1e-8, 10),
        "train.optimizer.loraplus": (train.optimizer.loraplus, 0.1, 100),
        "train.schedule.warmup": (train.schedule.warmup, 0, 10**6),
        "train.schedule.floor": (train.schedule.floor, 0, 1),
        "train.cond_drop": (train.cond_drop, 0, 1),
        "train.clip": (train.clip, 0, 10**6),
        "train.timesteps.min": (train.timesteps.min, 0, train.timesteps.max),
        "train.timesteps.max": (train.timesteps.max, train.timesteps.min, 1),
        "train.timesteps.shift": (train.timesteps.shift, 0.01, 100),
        "train.timesteps.std": (train.timesteps.std, 0.01, 10),
        "train.loss.delta": (train.loss.delta, 1e-6, 1e6),
        "train.prior.weight": (train.prior.weight, 0, 100),
        "validate.every": (config.validate.every, 0, 10**6),
        "validate.noise_seeds": (config.validate.noise_seeds, 1, 64),
        "validate.patience": (config.validate.patience, 0, 10**6),
        "validate.drift_max": (config.validate.drift_max, 0, 2),
        "sample.every": (config.sample.every, 0, 10**6),
        "sample.steps": (config.sample.steps, 1, 1000),
        "sample.cfg": (config.sample.cfg, 0, 100),
        "save.every_seconds": (config.save.every_seconds, 0, 86400),
        "save.keep": (config.save.keep, 1, 1000),
    }
    for name, value in (("batch", train.batch), ("micro_batch", train.micro_batch), ("steps", train.steps)):
        if value != "auto":
            check[f"train.{name}"] = (value, 1, 10**7)
    if train.ema != "auto":
        check["train.ema"] = (train.ema, 0, 0.999999)
    if isinstance(data.holdout, float):
        check["data.holdout"] = (data.holdout, 0, 0.5)
    for place, sigma in enumerate(config.validate.sigmas):
        check[f"validate.sigmas[{place}]"] = (sigma, 0.001, 1)
    for name, (value, low, high) in check.items():
        if not low <= value <= high:
            raise BadInputError(
                f"The setting {name} is {quote(value)}; it must lie between {low} and {high}."
            )
    if set(config.run.name) & set("/\\") or not is_new_name(config.run.name):
        raise BadInputError(
            f'{quote(config.run.name)} cannot be the name of a run: it names a folder and a file.\nUse letters, digits, "-" and "_".'
        )
    if train.prior.dop is True and not (data.trigger and data.class_word):
        raise BadInputError(
            "Preservation (train.prior.dop) needs data.trigger and data.class_word: it compares the two.\n"
            'Give both, e.g. trigger "ohwx dog" and class_word "dog", or set dop to auto.'
        )
    if adapter.type == "none" and not (adapter.queries or adapter.backbone_rank):
        raise BadInputError(
            'Nothing would learn: adapter.type is "none" and neither queries nor backbone_rank is set.\nChoose one.'
        )


def _check_schema(tree: Mapping[str, Any]) -> None:
    schema = tree.get("schema", SCHEMA)
    if schema != SCHEMA:
        raise BadInputError(
            f"This configuration has schema {quote(schema)}, but this program reads schema {SCHEMA}.\n"
            "Update ComfyUI-BLIP3o, or make the configuration anew with: blip3o lora new"
        )


def _override(tree: dict[str, Any], override: str) -> None:
    name, sign, text = override.partition("=")
    if not sign or not name:
        raise BadInputError(
            f"{quote(override)} sets nothing.\nWrite it as section.key=value, e.g. train.steps=300."
        )
    *sections, key = name.strip().split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            raise BadInputError(f'"{section}" in {quote(override)} has no settings of its own.')
    try:
        tree[key] = parse_yaml(text)
    except ValueError as error:
        raise BadInputError(
            f'The value of "{name.strip()}" cannot be read: {error}.\nWrite it as section.key=value, e.g. train.steps=300.'
        ) from error


def _merge(below: Any, above: Any) -> Any:
    """`above` where it speaks, else `below`."""
    if not isinstance(below, Mapping) or not isinstance(above, Mapping):
        return above
    return {**below, **{key: _merge(below.get(key), value) for key, value in above.items()}}


def _deep_copy(tree: Any) -> Any:
    return {key: _deep_copy(value) for key, value in tree.items()} if isinstance(tree, Mapping) else tree


def _resolve_paths(config: LoraConfig, base: Path) -> LoraConfig:
    """Relative paths of a configuration file count from its folder."""
    tree = to_tree(config)
    places = [("run", "dir"), ("data", "path"), ("adapter", "start_from")]
    places += [("model", "image_encoder"), ("model", "decoder")]
    if config.model.root != BUILT_IN:
        places.append(("model", "root"))
    for section, key in places:
        if tree[section][key] is not None:
            tree[section][key] = str(base / Path(tree[section][key]).expanduser())
    if tree["train"]["prior"]["reg_path"] is not None:
        tree["train"]["prior"]["reg_path"] = str(base / Path(tree["train"]["prior"]["reg_path"]).expanduser())
    return _build(LoraConfig, tree, "")
