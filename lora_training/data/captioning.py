"""Captions for a training set, written by the backbone that the model already carries."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from ...blip3o_core.checkpoints.keys import COMPONENTS
from ...blip3o_core.checkpoints.save import write_text
from ...blip3o_core.errors import BadInputError, Blip3oError, TrainingDataError
from ...blip3o_core.images import to_rgb
from ...blip3o_core.language.answers import AnswerSettings
from ...blip3o_core.language.prompts import CAPTION_STYLES
from ...blip3o_core.pipeline import Blip3oPipeline
from ..config import DataConfig
from ..records import EventSink, Interrupted, StopCheck
from .dataset import TRIGGER_PLACE, Item, scan_dataset

# What is left out of every caption is what the trigger comes to mean.
ALL_BUT = {
    "all but the subject": (
        "Describe this image in one or two plain sentences, as a caption for training a picture generator. "
        'Call the main subject just "{subject}" and say nothing about how it looks. '
        "Describe what it does, its surroundings, the light, the viewpoint and the medium. Do not guess at names or feelings."
    ),
    "all but the style": (
        "Describe this image in one or two plain sentences, as a caption for training a picture generator. "
        "Say what is shown, where it is and what it does. "
        "Say nothing about style, medium, technique, choice of colours or mood. Do not guess at names or feelings."
    ),
}
MODES = (*CAPTION_STYLES, *ALL_BUT)
STYLE_MODE = "all but the style"
DEFAULT_SUBJECT = "the subject"
CAPTION_TOKENS = 160


@dataclass(frozen=True)
class Captions:
    """What captioning a training set did.

    Attributes:
        written: picture -> its new caption.
        kept: pictures whose caption was left as it is.
        failed: picture -> why it got none.
    """

    written: dict[str, str] = field(default_factory=dict)
    kept: tuple[str, ...] = ()
    failed: dict[str, str] = field(default_factory=dict)


def caption_dataset(
    config: DataConfig,
    pipeline: Blip3oPipeline,
    mode: str = "training",
    overwrite: bool = False,
    *,
    settings: AnswerSettings | None = None,
    on_event: EventSink | None = None,
    should_stop: StopCheck | None = None,
) -> Captions:
    """Write a caption beside each picture that has none; the backbone is alone in memory meanwhile.

    Where a caption names the class word, `[trigger]` takes its place, except in mode "all but the style".

    Args:
        mode: a name in MODES.
        overwrite: also replace captions that are there.
        should_stop: asked before each picture.

    Raises:
        BadInputError: an unknown mode, or a tar, into which nothing can be written.
        MissingFilesError: there is no training set.
        TrainingDataError: a caption cannot be written.
        Interrupted: asked to stop; the captions so far are kept.
    """
    tell = on_event or (lambda event: None)
    question = caption_question(mode, config)
    if config.path.is_file():
        raise BadInputError(
            f'"{config.path.name}" is a tar: captions cannot be written into it.\nUnpack it and name the folder.'
        )
    dataset = scan_dataset(config)
    written, failed = {}, {}
    for problem in dataset.problems:
        if problem.kind == "unreadable":
            failed |= dict.fromkeys(problem.names, problem.text)
    wanted = [item for item in dataset.items if item.caption_path and (overwrite or not item.captions)]
    kept = tuple(item.name for item in dataset.items if item not in wanted)
    pipeline.unload(*(each for each in COMPONENTS if each != "backbone"))
    try:
        for done, item in enumerate(wanted):
            tell({"event": "phase", "phase": "captions", "done": done, "total": len(wanted)})
            if should_stop is not None and should_stop():
                raise Interrupted(
                    f"Stopped after {done} of {len(wanted)} captions; those written are kept.\n"
                    "Start again to write the others."
                )
            try:
                caption = _caption(item, question, mode, config, pipeline, settings)
            except Blip3oError as error:
                failed[item.name] = str(error)
                tell({"event": "warning", "message": f"No caption for {item.name}: {error}"})
                continue
            _write(item, caption)
            written[item.name] = caption
            tell({"event": "caption", "name": item.name, "caption": caption})
    finally:
        pipeline.unload("backbone")
    tell({"event": "phase", "phase": "captions", "done": len(wanted), "total": len(wanted)})
    return Captions(written, kept, failed)


def caption_question(mode: str, config: DataConfig) -> str:
    """What the backbone is asked in a mode.

    Raises:
        BadInputError: there is no such mode.
    """
    if mode not in MODES:
        raise BadInputError(f'There is no caption mode "{mode}"; choose one of {", ".join(MODES)}.')
    if mode in CAPTION_STYLES:
        return CAPTION_STYLES[mode]
    return ALL_BUT[mode].format(subject=config.class_word.strip() or DEFAULT_SUBJECT)


def place_trigger(caption: str, config: DataConfig) -> str:
    """The caption with `[trigger]` for the first mention of the class word, if there is a trigger and a mention."""
    class_word = " ".join(config.class_word.split())
    if not config.trigger.strip() or not class_word or TRIGGER_PLACE in caption:
        return caption
    pattern = re.compile(rf"(?<!\w){re.escape(class_word)}(?!\w)", re.IGNORECASE)
    return pattern.sub(lambda _: TRIGGER_PLACE, caption, count=1)


def _caption(
    item: Item,
    question: str,
    mode: str,
    config: DataConfig,
    pipeline: Blip3oPipeline,
    settings: AnswerSettings | None,
) -> str:
    picture = to_rgb(item.open(), config.background)
    settings = settings or AnswerSettings(max_new_tokens=CAPTION_TOKENS)
    answer = pipeline.ask(question, [[picture]], settings=settings)[0]
    # A text file holds one caption a line.
    caption = " ".join(answer.split())
    if not caption:
        raise TrainingDataError("The model said nothing about it.\nWrite its caption yourself.")
    return caption if mode == STYLE_MODE else place_trigger(caption, config)


def _write(item: Item, caption: str) -> None:
    try:
        write_text(item.caption_path, caption + "\n")
    except OSError as error:
        raise TrainingDataError(
            f'The caption of "{item.name}" cannot be written ({error.strerror}).\n'
            "Check that the disk is not full and that you may write into the training set; captions so far are kept."
        ) from error
