"""What the image encoder and the backbone say about a training set, kept on disk by content.

An entry's name is made of everything that went into it, so nothing in the cache can be out of date: an edited caption
or a new picture has another name, a renamed file has the same. Entries are shared by all runs of a folder.

Letters: M pictures, V views, K captions, N features, C their width, Q latent queries, D width of the conditioning.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ...blip3o_core.checkpoints.fingerprints import component_fingerprint
from ...blip3o_core.checkpoints.keys import COMPONENTS
from ...blip3o_core.checkpoints.layout import CheckpointFiles
from ...blip3o_core.checkpoints.safetensor_files import write_safetensors
from ...blip3o_core.devices import free_memory, pick_device, pick_dtype
from ...blip3o_core.errors import MissingFilesError, TrainingDataError
from ...blip3o_core.language.prompts import IMAGE_BEGIN, generation_text
from ...blip3o_core.pipeline import Blip3oPipeline, load_pipeline
from ..config import LoraConfig
from ..memory import OVERHEAD_BYTES
from ..plan import open_base, parameters_of
from ..records import EventSink, Interrupted, Sample, StopCheck, TrainingData
from .crops import choose_views, cut, describe_transform, grid_weights, read_mask
from .dataset import DIGEST_DIGITS, Dataset, Item, Problem

CACHE_NAME = "cache"
SCHEMA = "1"
# What two calls on the same input may differ by where a device does not compute the same bits twice.
SAME_COSINE = 0.9999
SECONDS_PER_DAY = 86400
_ONE_BY_ONE = (
    "does not fit into the GPU's free memory: its layers visit it one after another, which takes longer."
)
TOO_LARGE = {
    "image_encoder": f"The image encoder {_ONE_BY_ONE}",
    "backbone": f"The language model {_ONE_BY_ONE}",
}


@dataclass(frozen=True)
class Counts:
    """What filling a part of the cache did.

    Attributes:
        computed: entries made now, among them `repaired` that were damaged.
        reused: entries that were there.
    """

    computed: int
    reused: int
    repaired: int = 0


@dataclass(frozen=True)
class Garbage:
    """What was removed from a cache."""

    files: int
    bytes: int


@dataclass(frozen=True)
class CacheKeys:
    """Names of entries: of which networks, settings and numbers they are made."""

    config: LoraConfig
    files: CheckpointFiles
    dtype: torch.dtype

    @cached_property
    def backbone(self) -> str:
        return component_fingerprint(self.files, "backbone")

    @cached_property
    def image_encoder(self) -> str:
        return component_fingerprint(self.files, "image_encoder")

    @cached_property
    def template(self) -> str:
        return template_hash()

    @cached_property
    def transform(self) -> str:
        return describe_transform(self.config.data)

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def features(self, item: Item) -> str:
        """Name of the entry with a picture's features."""
        digest = item.digest
        if self.config.data.crop.mode == "smart" and item.mask is not None:
            # The mask says where a smart crop lies.
            digest = _hash(item.digest.encode() + item.mask.read())
        return f"features/{digest}-{_hash(self.transform.encode(), 12)}-{self.image_encoder}-{self.dtype_name}.safetensors"

    def conditioning(self, prompt: str) -> str:
        """Name of the entry with a prompt's conditioning."""
        return f"conditioning/{_hash(prompt.encode())}-{self.backbone}-{self.template}-{self.dtype_name}.safetensors"

    def all(self, dataset: Dataset, extra_prompts: Iterable[str] = ()) -> tuple[str, ...]:
        """Names of every entry that a run reads."""
        prompts = dict.fromkeys((*dataset.prompts, *extra_prompts))
        names = [self.features(item) for item in dataset.used] + [self.conditioning(each) for each in prompts]
        return tuple(dict.fromkeys(names))


def template_hash() -> str:
    """Hash of the chat template in which prompts are encoded for drawing, 12 hex digits."""
    return _hash(f"{generation_text('{prompt}')}{IMAGE_BEGIN}".encode(), 12)


def encoding_dtype(config: LoraConfig) -> torch.dtype:
    """The numbers in which image encoder and backbone compute for a run: never the reduced ones of the fit."""
    device = pick_device(config.model.device)
    name = config.model.base_dtype
    size = sum(open_base(config).component_bytes.values())
    return pick_dtype(name if name in ("fp32", "bf16") else "auto", device, size)


def open_pipeline(config: LoraConfig) -> Blip3oPipeline:
    """The model of a run, in the numbers that its cache is made with; nothing is loaded yet."""
    return load_pipeline(
        config.checkpoint,
        dtype=encoding_dtype(config),
        device=config.model.device,
        image_encoder_path=config.model.image_encoder,
        decoder_path=config.model.decoder,
    )


def cache_keys(config: LoraConfig) -> CacheKeys:
    """Names of a run's entries; reads a few rows of the checkpoint, loads nothing."""
    return CacheKeys(config, open_base(config), encoding_dtype(config))


def cache_features(
    config: LoraConfig,
    dataset: Dataset,
    pipeline: Blip3oPipeline,
    folder: Path,
    on_event: EventSink | None = None,
    should_stop: StopCheck | None = None,
) -> Counts:
    """Encode the pictures whose features are not in the cache; the image encoder is alone in memory meanwhile.

    Args:
        dataset: see dataset.scan_run.
        folder: the cache.
        should_stop: asked before each picture.

    Raises:
        TrainingDataError: features of some pictures are not numbers; all are named, the others are kept.
        Interrupted: asked to stop; what is done is kept.
    """
    keys = CacheKeys(config, pipeline.files, pipeline.dtype)
    wanted = {folder / keys.features(item): item for item in dataset.used}

    def encode(item: Item) -> Tensor:
        picture = item.open()
        views = choose_views(item, picture, config.data, read_mask(item, picture, config.data))
        # One by one: whatever else is encoded must not change a bit of it.
        return torch.cat([pipeline.encode_images([cut(picture, view, config.data)]) for view in views])

    def about(item: Item) -> dict[str, str]:
        return {"picture": item.name, "transform": keys.transform, "image_encoder": keys.image_encoder}

    return _fill(
        config,
        "features",
        "image_encoder",
        {path: (lambda item=item: encode(item)) for path, item in wanted.items()},
        {path: item.name for path, item in wanted.items()},
        {path: about(item) for path, item in wanted.items()},
        pipeline,
        on_event,
        should_stop,
    )


def cache_conditioning(
    config: LoraConfig,
    dataset: Dataset,
    extra_prompts: Sequence[str],
    pipeline: Blip3oPipeline,
    folder: Path,
    on_event: EventSink | None = None,
    should_stop: StopCheck | None = None,
) -> Counts:
    """Encode the prompts that are not in the cache, as for drawing; the backbone is alone in memory meanwhile.

    Args:
        extra_prompts: those that are no captions: samples, drift, preservation.

    Raises: as cache_features.
    """
    keys = CacheKeys(config, pipeline.files, pipeline.dtype)
    prompts = dict.fromkeys((*dataset.prompts, *extra_prompts))
    wanted = {folder / keys.conditioning(prompt): prompt for prompt in prompts}
    about = {"backbone": keys.backbone, "template": keys.template}
    return _fill(
        config,
        "conditioning",
        "backbone",
        # One by one: padding beside a longer prompt would change the last bits.
        {path: (lambda prompt=prompt: pipeline.encode_prompts(prompt)[0]) for path, prompt in wanted.items()},
        {path: f'prompt "{prompt}"' for path, prompt in wanted.items()},
        {path: {"prompt": prompt, **about} for path, prompt in wanted.items()},
        pipeline,
        on_event,
        should_stop,
    )


def load_data(
    config: LoraConfig, dataset: Dataset, extra_prompts: Sequence[str], folder: Path
) -> TrainingData:
    """Everything a fit reads, from the cache alone.

    Raises:
        MissingFilesError: entries are missing or damaged; what they are of is named.
    """
    keys = cache_keys(config)
    prompts = tuple(dict.fromkeys((*dataset.prompts, *extra_prompts)))
    missing: list[str] = []

    def read(name: str, label: str) -> Tensor:
        try:
            return read_entry(folder / name)
        except (OSError, DamagedEntry):
            missing.append(label)
            return torch.zeros(1)

    conditioning = {prompt: read(keys.conditioning(prompt), f'prompt "{prompt}"') for prompt in prompts}
    features = {item: read(keys.features(item), item.name) for item in dataset.used}
    if missing:
        raise MissingFilesError(
            f"The cache lacks {len(missing)} of {len(prompts) + len(features)} entries, or they are damaged: "
            f"{', '.join(missing)}.\nFill it again with: blip3o lora cache"
        )

    def sample(item: Item) -> Sample:
        shown = features[item].float()
        return Sample(
            name=item.name,
            features=shown,
            conditioning=torch.stack([conditioning[prompt] for prompt in item.prompts]),
            class_conditioning=(
                torch.stack([conditioning[prompt] for prompt in item.class_prompts])
                if item.class_prompts
                else None
            ),
            prompts=item.prompts,
            class_prompts=item.class_prompts,
            weights=feature_weights(item, config, shown.shape[1]),
            repeats=item.repeats,
            weight=item.weight,
        )

    return TrainingData(
        train=tuple(sample(item) for item in dataset.train),
        held_out=tuple(sample(item) for item in dataset.held_out),
        regularisation=tuple(sample(item) for item in dataset.regularisation if item.prompts),
        prompts={prompt: conditioning[prompt] for prompt in dict.fromkeys(extra_prompts)},
        fingerprint={
            "checkpoint": keys.files.name,
            "backbone": keys.backbone,
            "image_encoder": keys.image_encoder,
            "dit": component_fingerprint(keys.files, "dit"),
            "template": keys.template,
            "transform": keys.transform,
            "dtype": keys.dtype_name,
            "dataset": dataset.fingerprint,
        },
    )


def feature_weights(item: Item, config: LoraConfig, count: int) -> Tensor | None:
    """How much each of `count` features of each view counts, (V, count); None = all alike.

    The share of each cell that the mask leaves; bars of a letterbox count nothing.
    """
    data = config.data
    has_mask = item.mask is not None or (data.mask == "alpha" and item.has_alpha)
    has_bars = data.crop.mode == "letterbox" and item.width != item.height
    if not has_mask and not has_bars:
        return None
    side = round(count**0.5)
    # Just the size counts, unless the picture itself is the mask: decoding large photographs takes long.
    is_own_mask = data.mask == "alpha" and item.has_alpha
    picture = item.open() if is_own_mask else Image.new("L", (item.width, item.height))
    mask = read_mask(item, picture, data)
    views = choose_views(item, picture, data, mask)
    return torch.stack([grid_weights(view, picture.size, mask, side) for view in views])


class DamagedEntry(Exception):
    """An entry of the cache is not what was written."""


def read_entry(path: Path) -> Tensor:
    """The tensor of an entry, in the dtype in which it was computed.

    Raises:
        OSError: there is no such entry.
        DamagedEntry: it is cut short, changed or holds values that are not numbers.
    """
    if not path.is_file():
        raise FileNotFoundError(path)
    try:
        with safe_open(str(path), framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            # Copied out of the file's mapping, so that the entry can be replaced.
            tensor = file.get_tensor("value").clone()
    except (SafetensorError, OSError, ValueError) as error:
        raise DamagedEntry(str(error)) from error
    if metadata.get("sha256") != _tensor_hash(tensor):
        raise DamagedEntry("its content does not match its checksum")
    if not tensor.isfinite().all():
        raise DamagedEntry("it holds values that are not numbers")
    return tensor


def is_too_large(pipeline: Blip3oPipeline, component: str) -> bool:
    """Whether a network does not fit into what is free of the pipeline's GPU."""
    if pipeline.device.type != "cuda":
        return False
    needed = parameters_of(pipeline.files, component) * pipeline.dtype.itemsize + OVERHEAD_BYTES
    return needed > free_memory(pipeline.device)


def verify_cache(
    config: LoraConfig,
    dataset: Dataset,
    extra_prompts: Sequence[str],
    folder: Path,
    pipeline: Blip3oPipeline | None = None,
    samples: int = 2,
) -> tuple[Problem, ...]:
    """Missing, damaged and wrong entries of a run.

    Args:
        pipeline: also encode `samples` pictures and as many prompts anew and compare; None = only read.
    """
    keys = cache_keys(config)
    prompts = dict.fromkeys((*dataset.prompts, *extra_prompts))
    labels = {keys.features(item): item.name for item in dataset.used}
    labels |= {keys.conditioning(prompt): f'prompt "{prompt}"' for prompt in prompts}
    missing, damaged, sound = [], [], {}
    for name, label in labels.items():
        try:
            sound[name] = read_entry(folder / name)
        except OSError:
            missing.append(label)
        except DamagedEntry:
            damaged.append(label)
    problems = []
    remedy = "Fill the cache again with: blip3o lora cache"
    if missing:
        problems.append(Problem("error", "missing entry", f"Not in the cache. {remedy}", tuple(missing)))
    if damaged:
        problems.append(Problem("error", "damaged entry", f"Damaged in the cache. {remedy}", tuple(damaged)))
    if pipeline is not None:
        wrong = _compare_anew(config, keys, dataset, prompts, sound, pipeline, samples)
        if wrong:
            text = f'The model now says something else of these. Delete the folder "{CACHE_NAME}". {remedy}'
            problems.append(Problem("error", "wrong entry", text, tuple(wrong)))
    return tuple(problems)


def collect_garbage(folder: Path, keep: Iterable[str] = (), *, unused_days: float = 30.0) -> Garbage:
    """Remove entries that no run has used for some days, and what a killed run left half written.

    Args:
        keep: names that stay, see CacheKeys.all.
        unused_days: 0 = every entry that is not kept.
    """
    kept = {folder / name for name in keep}
    oldest = time.time() - unused_days * SECONDS_PER_DAY
    files, size = 0, 0
    for part in ("features", "conditioning"):
        for path in sorted((folder / part).glob("*")):
            is_entry = path.suffix == ".safetensors"
            if not path.is_file() or path in kept or not (is_entry or path.suffix == ".part"):
                continue
            if path.stat().st_mtime <= oldest:
                files, size = files + 1, size + path.stat().st_size
                path.unlink()
    return Garbage(files, size)


def _fill(
    config: LoraConfig,
    phase: str,
    component: str,
    work: dict[Path, Callable[[], Tensor]],
    labels: dict[Path, str],
    about: dict[Path, dict[str, str]],
    pipeline: Blip3oPipeline,
    on_event: EventSink | None,
    should_stop: StopCheck | None,
) -> Counts:
    """Compute the entries that are missing or damaged, with one network in memory."""
    tell = on_event or (lambda event: None)
    computed, reused, repaired = 0, 0, 0
    refused: list[str] = []
    assert not pipeline.loras, "the cache holds what the checkpoint says, not a LoRA on it"
    # Only what is computed here may fill the memory.
    pipeline.unload(*(other for other in COMPONENTS if other != component))
    try:
        for done, (path, compute) in enumerate(work.items()):
            tell({"event": "phase", "phase": phase, "done": done, "total": len(work)})
            if should_stop is not None and should_stop():
                raise Interrupted(
                    f"Stopped after {done} of {len(work)} entries of the {phase} cache; they are kept.\n"
                    "Start again to go on from there."
                )
            try:
                read_entry(path)
                # When it was last used; a cache that may not be written still serves.
                with suppress(OSError):
                    os.utime(path)
                reused += 1
                continue
            except FileNotFoundError:
                pass
            except DamagedEntry as error:
                message = f"The cache entry of {labels[path]} was damaged ({error}) and is computed again."
                tell({"event": "warning", "message": message})
                repaired += 1
            if not computed and is_too_large(pipeline, component):
                tell({"event": "warning", "message": TOO_LARGE[component]})
                pipeline.networks.stream(component)
            tensor = compute().cpu()
            if not tensor.isfinite().all():
                refused.append(labels[path])
                continue
            _write_entry(path, tensor, about[path])
            computed += 1
    finally:
        pipeline.unload(component)
        if pipeline.device.type == "cuda":
            torch.cuda.empty_cache()
    tell({"event": "phase", "phase": phase, "done": len(work), "total": len(work)})
    if refused:
        raise TrainingDataError(
            f"The model gives values that are not numbers (NaN or infinity) for {', '.join(refused)}.\n"
            "Look at these files; if there is nothing wrong with them, set model.base_dtype to bf16 or fp32."
        )
    return Counts(computed, reused, repaired)


def _compare_anew(
    config: LoraConfig,
    keys: CacheKeys,
    dataset: Dataset,
    prompts: Iterable[str],
    sound: dict[str, Tensor],
    pipeline: Blip3oPipeline,
    samples: int,
) -> list[str]:
    """Labels of the sampled entries that differ from what the model says now."""
    wrong = []
    # The entries with the smallest names: by hash, so a sample of all, and the same each time.
    by_name = {keys.features(item): item for item in dataset.used}
    for name in sorted(by_name.keys() & sound.keys())[:samples]:
        item = by_name[name]
        picture = item.open()
        views = choose_views(item, picture, config.data, read_mask(item, picture, config.data))
        fresh = pipeline.encode_images([cut(picture, views[0], config.data)])[0]
        if not _is_same(fresh, sound[name][0]):
            wrong.append(item.name)
    pipeline.unload("image_encoder")
    prompt_of = {keys.conditioning(prompt): prompt for prompt in prompts}
    for name in sorted(prompt_of.keys() & sound.keys())[:samples]:
        if not _is_same(pipeline.encode_prompts(prompt_of[name])[0], sound[name]):
            wrong.append(f'prompt "{prompt_of[name]}"')
    pipeline.unload("backbone")
    return wrong


def _is_same(left: Tensor, right: Tensor) -> bool:
    cosine = torch.cosine_similarity(left.flatten().double().cpu(), right.flatten().double(), dim=0)
    return left.shape == right.shape and cosine.item() > SAME_COSINE


def _write_entry(path: Path, tensor: Tensor, about: dict[str, str]) -> None:
    try:
        metadata = {"schema": SCHEMA, "sha256": _tensor_hash(tensor), "torch": torch.__version__, **about}
        write_safetensors({"value": tensor}, path, metadata)
    except (OSError, SafetensorError) as error:
        raise TrainingDataError(
            f'"{path.name}" cannot be written into the cache "{path.parent.parent}" ({error}).\n'
            "Check that the disk is not full and that you may write there; everything so far is kept."
        ) from error


def _tensor_hash(tensor: Tensor) -> str:
    header = f"{tensor.dtype}:{tuple(tensor.shape)}:".encode()
    return hashlib.sha256(header + tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def _hash(data: bytes, digits: int = DIGEST_DIGITS) -> str:
    return hashlib.sha256(data).hexdigest()[:digits]
