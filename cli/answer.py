"""`blip3o ask` and `blip3o caption`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from ..blip3o_core.errors import BadInputError, check_range
from .options import (
    ANSWER_NAMES,
    add_answer_options,
    add_model_options,
    answer_options,
    as_typed,
    check_writable,
    command,
    open_picture,
    open_pipeline,
    picture_paths,
)

MOST_AT_ONCE = 1000


def add_ask(commands: Any) -> None:
    parser = command(commands, "ask", run_ask, "Ask about pictures.")
    parser.add_argument("question")
    parser.add_argument("picture", nargs="*", help="pictures, asked about one by one")
    parser.add_argument("--together", action="store_true", help="one question about all the pictures at once")
    parser.add_argument(
        "--choices", nargs="+", metavar="CHOICE", help="answer with the probability of each of these"
    )
    parser.add_argument("--yes-no", action="store_true", help="answer with the probability of yes")
    add_answer_options(parser)
    add_model_options(parser)


def add_caption(commands: Any) -> None:
    parser = command(
        commands, "caption", run_caption, "Describe pictures; optionally write a text file next to each."
    )
    parser.add_argument("picture", nargs="+", help="picture files or folders of them")
    parser.add_argument("--style", default="short", help="short, detailed, tags or training (default: short)")
    parser.add_argument(
        "--write", action="store_true", help="write NAME.txt next to NAME.png; existing files are kept"
    )
    parser.add_argument("--overwrite", action="store_true", help="with --write: replace existing text files")
    parser.add_argument("--batch-size", type=int, default=4, help="pictures looked at together (default: 4)")
    add_answer_options(parser)
    add_model_options(parser)


def run_ask(arguments: argparse.Namespace) -> None:
    if not arguments.question.strip():
        raise BadInputError(
            'There is no question.\nWrite one, e.g. blip3o ask "What is in this picture?" picture.png'
        )
    options = answer_options(arguments)
    paths = arguments.picture
    pictures = [open_picture(path) for path in paths]
    pipeline = open_pipeline(arguments)
    together = arguments.together or not paths
    groups = [pictures] if together else [[picture] for picture in pictures]
    limits = {"min_pixels": arguments.min_pixels, "max_pixels": arguments.max_pixels}
    with as_typed(ANSWER_NAMES):
        if arguments.choices:
            answers: list[Any] = [
                pipeline.choose(arguments.question, arguments.choices, each, **limits) for each in groups
            ]
        elif arguments.yes_no:
            answers = [{"yes": pipeline.ask_yes_no(arguments.question, each, **limits)} for each in groups]
        elif len(groups) > 1 or arguments.json:
            answers = pipeline.ask(arguments.question, groups, **options)
        else:
            with Streamed() as streamed:
                pipeline.ask(arguments.question, groups, on_text=streamed, **options)
            return
    labels = [[str(path) for path in paths]] if together else [[str(path)] for path in paths]
    if arguments.json:
        rows = zip(labels, answers, strict=True)
        print(
            json.dumps(
                [{"pictures": each, "answer": answer} for each, answer in rows], indent=2, ensure_ascii=False
            )
        )
        return
    for each, answer in zip(labels, answers, strict=True):
        if isinstance(answer, dict):
            answer = "  ".join(f"{choice} {probability:.3f}" for choice, probability in answer.items())
        print(answer if len(labels) == 1 else f"{each[0]}: {answer}")


def run_caption(arguments: argparse.Namespace) -> None:
    from tqdm import tqdm

    from ..blip3o_core.checkpoints.save import write_text

    options = answer_options(arguments)
    with as_typed(ANSWER_NAMES):
        check_range("batch_size", arguments.batch_size, 1, MOST_AT_ONCE)
    paths = picture_paths(arguments.picture)
    is_single = len(paths) == 1
    if arguments.write and not arguments.overwrite:
        paths = [path for path in paths if not Path(path).with_suffix(".txt").exists()]
    for folder in {Path(path).parent for path in paths if arguments.write}:
        check_writable(folder, "Copy the pictures into a folder of your own, or leave --write away.")
    pipeline = open_pipeline(arguments)
    captions: dict[str, str] = {}
    try:
        with tqdm(total=len(paths), unit="picture", disable=arguments.quiet or arguments.json) as bar:
            for start in range(0, len(paths), arguments.batch_size):
                batch = paths[start : start + arguments.batch_size]
                with as_typed(ANSWER_NAMES):
                    written = pipeline.caption(
                        [open_picture(path) for path in batch], arguments.style, **options
                    )
                for path, caption in zip(batch, written, strict=True):
                    captions[path] = caption
                    if arguments.write:
                        write_text(Path(path).with_suffix(".txt"), caption + "\n")
                    if not arguments.json:
                        bar.write(caption if is_single else f"{path}: {caption}")
                bar.update(len(batch))
    finally:
        if arguments.json:
            print(json.dumps(captions, indent=2, ensure_ascii=False))


class Streamed:
    """Prints an answer while it is written, and ends its line; on_text of Blip3oPipeline.ask and chat.

    Attributes:
        text: what is there so far.
    """

    def __init__(self, *, is_shown: bool = True) -> None:
        self.text = ""
        self._is_shown = is_shown

    def __call__(self, _: int, text: str) -> None:
        # A character of several tokens decodes to a replacement sign until it is whole.
        if not text.endswith("\ufffd"):
            if self._is_shown:
                print(text[len(self.text) :], end="", flush=True)
            self.text = text

    def __enter__(self) -> Streamed:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._is_shown and (self.text or kind is None):
            print()
