"""Everything that is wrong with a run, found before it begins: files, pictures, captions, disk and memory."""

from __future__ import annotations

import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..blip3o_core.checkpoints.keys import COMPONENTS
from ..blip3o_core.checkpoints.layout import CheckpointFiles
from ..blip3o_core.checkpoints.match import match_network
from ..blip3o_core.config import EvaClipConfig
from ..blip3o_core.devices import free_memory, pick_device
from ..blip3o_core.errors import BadInputError, Blip3oError, MissingFilesError, TrainingDataError
from ..blip3o_core.language.prompts import (
    IMAGE_PAD,
    TRAINED_PROMPT_TOKENS,
    TextTokenizer,
    count_prompt_tokens,
)
from ..blip3o_core.units import format_bytes
from .config import LoraConfig
from .data.crops import open_mask, share_cut_away
from .data.dataset import LOOK_SIZE, TRIGGER_PLACE, Dataset, Item, Problem, names_trigger, scan_run
from .plan import PhaseMemory, dit_without_weights, learning_parameters, open_base, plan_phases

# Smaller pictures hold nothing to learn from.
SMALLEST_SIDE = 16
EXTREME_ASPECT = 2.0
# Differing bits of two looks' dHash (of 256), and largest difference of a colour (of 255), of one and the same picture.
# Flat drawings share most bits whatever they show: only the colours tell them apart.
SAME_HASH_BITS = 12
# A step between neighbours that makes a bit: less is compression, not content.
HASH_STEP = 6
SAME_COLOUR = 40
MASK_ASPECT_TOLERANCE = 0.02
FEW_PICTURES = 5
PROMPTS_SHOWN = 3
# What stands for every word that is not in a model's list.
UNKNOWN_TOKEN = "<unk>"
SIDE_WORDS = ("left", "right")
SLOWER = (
    "Its layers will visit the GPU one after another, which takes longer; close other programs to avoid it."
)
# States, samples and finished files that are kept beside the cache, at least.
SPARE_BYTES = 100 * 2**20


@dataclass(frozen=True)
class Report:
    """What was found.

    Attributes:
        dataset: None when there is none.
        notes: what is worth knowing, one line each.
        memory: estimated peaks.
        free_bytes: of the device that computes; None = unknown.
    """

    dataset: Dataset | None
    problems: tuple[Problem, ...]
    notes: tuple[str, ...] = ()
    memory: tuple[PhaseMemory, ...] = ()
    free_bytes: int | None = None

    @property
    def errors(self) -> tuple[Problem, ...]:
        return tuple(problem for problem in self.problems if problem.level == "error")

    @property
    def warnings(self) -> tuple[Problem, ...]:
        return tuple(problem for problem in self.problems if problem.level == "warning")

    def problems_of(self, name: str) -> tuple[Problem, ...]:
        """Those that one picture has."""
        return tuple(problem for problem in self.problems if name in problem.names)

    def text(self) -> str:
        """All of it, for reading."""
        lines = list(self.notes)
        if self.memory:
            free = "unknown" if self.free_bytes is None else format_bytes(self.free_bytes)
            lines.append(f"Memory, estimated ({free} free):")
            lines += [
                f"    {each.phase:<12} {format_bytes(each.bytes):>9}  {each.what}" for each in self.memory
            ]
        lines += [str(problem) for problem in (*self.errors, *self.warnings)]
        lines.append(
            f"{_count(len(self.errors), 'error')}, {_count(len(self.warnings), 'warning')}."
            if self.problems
            else "Nothing is wrong."
        )
        return "\n".join(lines)

    def raise_for_errors(self) -> None:
        """Raise TrainingDataError with every error at once, if there is one."""
        if self.errors:
            raise TrainingDataError("\n".join(str(problem) for problem in self.errors))


def check(config: LoraConfig, *, tokenizer: TextTokenizer | None = None) -> Report:
    """Look at everything that a run needs; nothing is raised, loaded or written.

    Args:
        tokenizer: of the model; None = read from its folder.
    """
    problems: list[Problem] = []
    files, encoder = _check_model(config, problems)
    is_usable = all(problem.level != "error" for problem in problems)
    if tokenizer is None and files is not None:
        try:
            tokenizer = TextTokenizer(files.folder)
        except Blip3oError as error:
            problems.append(Problem("error", "model", str(error)))
    dataset = _scan(config, problems)
    notes: tuple[str, ...] = ()
    if dataset is not None:
        problems += dataset.problems
        problems += _check_pictures(dataset, encoder.image_size if encoder else None)
        problems += _check_duplicates(dataset)
        problems += _check_masks(dataset)
        problems += _check_captions(dataset, tokenizer)
        notes = tuple(_notes(dataset, config))
    plan, free = (), None
    if is_usable and files is not None and encoder is not None:
        plan, free = _check_memory(config, files, encoder, problems)
    problems += _check_disk(config, dataset, files if is_usable else None)
    return Report(dataset, tuple(problems), notes, plan, free)


def duplicates(items: Sequence[Item]) -> list[tuple[Item, ...]]:
    """Groups of pictures that are the same but for scale, compression or slight changes of colour."""
    if len(items) < 2:
        return []
    columns, rows = LOOK_SIZE
    looks = np.stack([np.frombuffer(item.look, np.uint8) for item in items]).reshape(-1, rows, columns, 3)
    grey = looks.astype(np.float32).mean(axis=3)
    bits = (np.diff(grey, axis=2) > HASH_STEP).reshape(len(items), -1)
    flat = looks.reshape(len(items), -1).astype(np.float32)
    group = list(range(len(items)))
    for index in range(1, len(items)):
        is_close = (bits[:index] != bits[index]).sum(axis=1) <= SAME_HASH_BITS
        for other in np.flatnonzero(is_close):
            if np.abs(flat[other] - flat[index]).max() <= SAME_COLOUR:
                group[index] = group[other]
                break
    members: dict[int, list[Item]] = {}
    for item, first in zip(items, group, strict=True):
        members.setdefault(first, []).append(item)
    return [tuple(each) for each in members.values() if len(each) > 1]


def _check_model(
    config: LoraConfig, problems: list[Problem]
) -> tuple[CheckpointFiles | None, EvaClipConfig | None]:
    try:
        files = open_base(config)
    except Blip3oError as error:
        problems.append(Problem("error", "model", str(error)))
        return None, None
    encoder: EvaClipConfig | None = None
    for component in COMPONENTS:
        try:
            network = match_network(files, component).network
        except Blip3oError as error:
            # A LoRA can be trained without pictures being drawn.
            is_absent = component == "decoder" and not files.has_component(component)
            level = "warning" if is_absent else "error"
            problems.append(Problem(level, "model", str(error)))
            continue
        if component == "image_encoder":
            encoder = network.config
    return files, encoder


def _scan(config: LoraConfig, problems: list[Problem]) -> Dataset | None:
    try:
        return scan_run(config)
    except MissingFilesError as error:
        problems.append(Problem("error", "empty", str(error)))
        return None


def _check_pictures(dataset: Dataset, image_size: int | None) -> Iterator[Problem]:
    items = dataset.items
    ruined = [item for item in items if min(item.width, item.height) < SMALLEST_SIDE]
    yield from _about(
        "error",
        "tiny",
        f"These pictures are too small to learn from (a side below {SMALLEST_SIDE} pixels). Remove them.",
        ruined,
        [_size(item) for item in ruined],
    )
    if image_size is not None:
        small = [item for item in items if SMALLEST_SIDE <= min(item.width, item.height) < image_size]
        yield from _about(
            "warning",
            "small",
            f"These pictures are smaller than the {image_size} pixels that the image encoder looks at; enlarged ones are "
            "soft, and so is what is learned from them. Use larger ones if you have them.",
            small,
            [
                f"{_size(item)}, enlarged {image_size / min(item.width, item.height):.1f} times"
                for item in small
            ],
        )
    crop = dataset.config.crop
    long = [
        item
        for item in items
        if item not in ruined
        and max(item.width, item.height) > EXTREME_ASPECT * min(item.width, item.height)
        and crop.mode != "letterbox"
    ]
    yield from _about(
        "warning",
        "aspect",
        "Much of these long pictures is cut away. Crop them yourself, or set data.crop.mode to letterbox, smart or views.",
        long,
        [f"{_size(item)}, {share_cut_away(item, crop):.0%} cut away" for item in long],
    )
    usable = dataset.train + dataset.held_out
    if items and not dataset.train:
        text = (
            "No picture is left to train on: see the other problems."
            if not usable
            else "Every picture is held out, none is left to train on. Set data.holdout lower or change metadata.jsonl."
        )
        yield Problem("error", "empty", text)
    elif 0 < len(usable) < FEW_PICTURES:
        yield Problem(
            "warning",
            "few",
            f"There are only {_count(len(usable), 'picture')}: they will be learned by heart. "
            f"{FEW_PICTURES} to 50 different ones are better.",
        )


def _check_duplicates(dataset: Dataset) -> Iterator[Problem]:
    same = duplicates(dataset.items)
    yield from _about(
        "warning",
        "duplicate",
        "These pictures are the same as others, so they count more. Remove all but one of each, or say so with a folder "
        '"2_NAME".',
        [item for group in same for item in group[1:]],
        [f"as {group[0].name}" for group in same for _ in group[1:]],
    )
    split = [group for group in same if len({item.is_held_out for item in group}) == 2]
    yield from _about(
        "warning",
        "held out",
        "These are held out to measure what is learned, but nearly the same pictures are trained on: the measure will be "
        "too good. Remove the copies.",
        [item for group in split for item in group if item.is_held_out],
    )


def _check_masks(dataset: Dataset) -> Iterator[Problem]:
    kind = dataset.config.mask
    if kind == "none":
        return
    empty, other_shape, broken, without = [], [], [], []
    for item in dataset.items:
        if (item.mask is None) if kind == "files" else not item.has_alpha:
            without.append(item)
            continue
        try:
            mask = open_mask(item) if kind == "files" else item.open().convert("RGBA").getchannel("A")
        except TrainingDataError:
            broken.append(item)
            continue
        if abs(mask.width * item.height / (mask.height * item.width) - 1) > MASK_ASPECT_TOLERANCE:
            other_shape.append(item)
        elif mask.getextrema()[1] == 0:
            empty.append(item)
    yield from _about("error", "mask", "The masks of these are damaged. Save them again.", broken)
    text = "The masks of these leave nothing that counts: they are all black or transparent. Mend or remove them."
    yield from _about("error", "mask", text, empty)
    text = "The masks of these have another shape than their pictures. Save them in the picture's size."
    yield from _about("error", "mask", text, other_shape)
    yield from _about("warning", "mask", "These have no mask, so all of them counts.", without)


def _check_captions(dataset: Dataset, tokenizer: TextTokenizer | None) -> Iterator[Problem]:
    config, usable = dataset.config, dataset.train + dataset.held_out
    times = Counter(item.captions for item in usable if item.captions)
    same = [item for item in usable if times[item.captions] > 1]
    yield from _about(
        "warning",
        "identical captions",
        "These pictures share their caption with others: what differs between them goes into the trigger. Describe what "
        "differs.",
        same,
        [f'"{item.captions[0]}"' for item in same],
    )
    if config.trigger.strip():
        absent = [item for item in usable if any(not names_trigger(each, config) for each in item.captions)]
        if len(absent) < len(usable):
            yield from _about(
                "warning",
                "trigger",
                f'Other captions say where "{config.trigger}" belongs, these do not; it is put in front of them. Write '
                "[trigger] where it should stand.",
                absent,
            )
        if config.trigger.strip().lower() == config.class_word.strip().lower():
            yield Problem(
                "warning",
                "trigger",
                "data.trigger and data.class_word are the same, so nothing can tell them apart. Give the trigger a word of "
                'its own, e.g. "ohwx dog" for the class word "dog".',
            )
    if config.crop.flip:
        sided = [
            item
            for item in usable
            if any(word in prompt.lower().split() for prompt in item.prompts for word in SIDE_WORDS)
        ]
        text = 'Mirrored views make "left" and "right" in these captions wrong. Set data.crop.flip to false.'
        yield from _about("warning", "flip", text, sided)
    if tokenizer is not None:
        counts: dict[Item, int] = {}
        strange = []
        for item in usable:
            try:
                counts[item] = max(count_prompt_tokens(tokenizer, each) for each in item.prompts)
            except BadInputError:
                strange.append(item)
        text = f'These captions hold "{IMAGE_PAD}", which stands for a picture in the model. Take it out.'
        yield from _about("error", "caption", text, strange)
        unknown = {item: _unknown_words(item.prompts, tokenizer) for item in counts}
        text = "The model does not know these words: they all mean the same to it. Use words that it knows."
        strangers = [item for item, words in unknown.items() if words]
        yield from _about(
            "warning", "unknown words", text, strangers, [", ".join(unknown[item]) for item in strangers]
        )
        long = [item for item, count in counts.items() if count > TRAINED_PROMPT_TOKENS]
        yield from _about(
            "warning",
            "long caption",
            f"These captions are longer than the {TRAINED_PROMPT_TOKENS} tokens that BLIP3-o was trained on; the rest may be "
            "ignored. Shorten them.",
            long,
            [f"{counts[item]} tokens" for item in long],
        )


def _unknown_words(prompts: Sequence[str], tokenizer: TextTokenizer) -> list[str]:
    """Words that a model with a fixed list of words has never seen; large models have none."""
    unknown = tokenizer.token_id(UNKNOWN_TOKEN)
    words = {word.strip(".,:;!?\"'()") for prompt in prompts for word in prompt.split()}
    return sorted(word for word in words if unknown is not None and unknown in tokenizer.encode(word))


def _notes(dataset: Dataset, config: LoraConfig) -> Iterator[str]:
    train, held_out = dataset.train, dataset.held_out
    shown = sum(item.repeats for item in train)
    repeated = f" ({shown} with repeats)" if shown != len(train) else ""
    held = f", {len(held_out)} held out" if held_out else ", none held out"
    regularisation = f", {len(dataset.regularisation)} for regularisation" if dataset.regularisation else ""
    yield f"{_count(len(train), 'picture')} to train on{repeated}{held}{regularisation}."
    captions = sum(len(item.prompts) for item in train)
    if captions != len(train):
        yield f"{captions} captions, several for some pictures."
    if config.data.trigger.strip():
        # Where a caption is missing, the trigger itself is the prompt.
        placed = sum(
            names_trigger(each, config.data) for item in train for each in item.captions or (TRIGGER_PLACE,)
        )
        others = " and put in front of the others" if placed < captions else ""
        yield f'"{config.data.trigger}" is named in {placed} of {captions} captions{others}.'
    if train:
        yield f"{config.steps(len(train))} steps of {config.batch}."
        yield "Prompts that are trained, for example:"
        for item in train[:PROMPTS_SHOWN]:
            versus = f'   (kept apart from "{item.class_prompts[0]}")' if item.class_prompts else ""
            yield f'    {item.name}: "{item.prompts[0]}"{versus}'


def _check_memory(
    config: LoraConfig, files: CheckpointFiles, encoder: EvaClipConfig, problems: list[Problem]
) -> tuple[tuple[PhaseMemory, ...], int | None]:
    try:
        device = pick_device(config.model.device)
    except Blip3oError as error:
        problems.append(Problem("error", "device", str(error)))
        return (), None
    free = free_memory(device)
    try:
        # On the CPU the fit does not cut its calls: main memory is not as hard a limit.
        plan = plan_phases(config, files, encoder, device, free if device.type == "cuda" else None)
    except Blip3oError as error:
        problems.append(Problem("error", "model", str(error)))
        return (), free
    for each in plan:
        if free is not None and each.bytes > free:
            remedy = {
                "features": SLOWER,
                "conditioning": SLOWER,
                "fit": "Close other programs, or set model.base_dtype to fp8 or adapter.rank lower.",
                "prove": "Close other programs.",
            }[each.phase]
            text = (
                f'The phase "{each.phase}" needs about {format_bytes(each.bytes)} ({each.what}), but {format_bytes(free)} '
                f"are free. {remedy}"
            )
            problems.append(Problem("warning", "memory", text))
    return plan, free


def _check_disk(
    config: LoraConfig, dataset: Dataset | None, files: CheckpointFiles | None
) -> Iterator[Problem]:
    place = next(
        (each for each in (config.folder, *config.folder.absolute().parents) if each.is_dir()), Path(".")
    )
    try:
        # Asking for permission is answered wrongly on some systems; trying is not.
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        yield Problem(
            "error",
            "write",
            f'Nothing can be written into "{place}" ({error.strerror}). Set run.dir to a folder of yours.',
        )
        return
    needed = SPARE_BYTES
    if dataset is not None and files is not None:
        needed += _cache_bytes(dataset, files)
        needed += (config.save.keep + 2) * _state_bytes(config, files)
    free = shutil.disk_usage(place).free
    if needed > free:
        yield Problem(
            "error",
            "disk",
            f'The run needs about {format_bytes(needed)} in "{place}", but {format_bytes(free)} are free. Make room, or set '
            "run.dir to another disk.",
        )


def _cache_bytes(dataset: Dataset, files: CheckpointFiles) -> int:
    sizes = dit_without_weights(files).config
    crop = dataset.config.crop
    views = (crop.views if crop.mode == "views" else 1) * (2 if crop.flip else 1)
    # 64 features and as many queries; features are kept in fp32.
    features = len(dataset.used) * views * 64 * sizes.in_channels * 4
    return features + len(dataset.prompts) * 64 * sizes.conditioning_dim * 4


def _state_bytes(config: LoraConfig, files: CheckpointFiles) -> int:
    """Weights, average and the optimiser's two moments in fp32."""
    return 16 * learning_parameters(config, dit_without_weights(files))


def _about(
    level: str, kind: str, text: str, items: Sequence[Item], details: Sequence[str] = ()
) -> Iterable[Problem]:
    if items:
        yield Problem(level, kind, text, tuple(item.name for item in items), tuple(details))


def _size(item: Item) -> str:
    return f"{item.width} x {item.height}"


def _count(number: int, word: str) -> str:
    return f"{number} {word}{'' if number == 1 else 's'}"
