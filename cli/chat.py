"""`blip3o chat`: several turns about words and pictures, in a terminal or from a script."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..blip3o_core.errors import BadInputError, Blip3oError
from .answer import Streamed
from .options import (
    ANSWER_NAMES,
    add_answer_options,
    add_model_options,
    answer_options,
    as_typed,
    command,
    open_picture,
    open_pipeline,
)

if TYPE_CHECKING:  # torch takes seconds to import: only commands that compute do so
    from PIL import Image

    from ..blip3o_core.language.answers import Turn
    from ..blip3o_core.pipeline import Blip3oPipeline

HELP = """Write to the model. Lines that begin with / are for the program:
/image PATH   show a picture with what you write next; may be repeated
/reset        forget everything said so far
/save FILE    write the chat as Markdown, or as JSON if the name ends in .json
/help         this text
/quit         end (or Ctrl-D); Ctrl-C stops an answer"""

PROMPT = "> "


@dataclass
class Chat:
    """What was said so far, and the pictures that go with the next line.

    Attributes:
        turns: of user and assistant, in turn.
        names: files of the pictures of each turn.
        waiting: pictures for the next line, with their files.
    """

    turns: list[Turn] = field(default_factory=list)
    names: list[list[str]] = field(default_factory=list)
    waiting: list[tuple[str, Image.Image]] = field(default_factory=list)

    def show(self, path: str) -> None:
        self.waiting.append((path, open_picture(path)))

    def ask(self, text: str) -> None:
        from ..blip3o_core.language.answers import Turn

        self.turns.append(Turn("user", text, tuple(picture for _, picture in self.waiting)))
        self.names.append([name for name, _ in self.waiting])
        self.waiting = []

    def answer(self, text: str) -> None:
        from ..blip3o_core.language.answers import Turn

        self.turns.append(Turn("assistant", text))
        self.names.append([])

    def take_back(self) -> None:
        """Forget a question that was not answered; its pictures wait again."""
        turn, names = self.turns.pop(), self.names.pop()
        self.waiting = [*zip(names, turn.images, strict=True), *self.waiting]

    def record(self) -> list[dict[str, Any]]:
        """JSON-ready."""
        return [
            {"role": turn.role, "text": turn.text, "pictures": names}
            for turn, names in zip(self.turns, self.names, strict=True)
        ]

    def save(self, path: Path) -> None:
        """Write the chat as JSON or Markdown, by the ending of the name.

        Raises:
            BadInputError: it cannot be written there.
        """
        from ..blip3o_core.checkpoints.save import write_text

        parts = []
        for said in self.record():
            # In angle brackets a name may hold spaces.
            pictures = "".join(f"![](<{name}>)\n\n" for name in said["pictures"])
            parts.append(f"**{said['role']}**\n\n{pictures}{said['text']}\n")
        text = "\n".join(parts)
        if path.suffix.lower() == ".json":
            text = json.dumps(self.record(), indent=2, ensure_ascii=False) + "\n"
        try:
            write_text(path, text)
        except OSError as error:
            raise BadInputError(
                f'The chat cannot be written to "{path}" ({error.strerror}).\nName another file.'
            ) from error


def add_chat(commands: Any) -> None:
    parser = command(
        commands, "chat", run_chat, "Talk with the model, also about pictures; /help tells more."
    )
    parser.add_argument("picture", nargs="*", help="pictures that the first line is about")
    add_answer_options(parser)
    add_model_options(parser)


def run_chat(arguments: argparse.Namespace) -> None:
    options = answer_options(arguments)
    chat = Chat()
    for path in arguments.picture:
        chat.show(path)
    pipeline = open_pipeline(arguments)
    is_terminal = sys.stdin.isatty()
    if is_terminal and not arguments.quiet and not arguments.json:
        print("/help tells what can be done, /quit ends.", file=sys.stderr)
    try:
        for line in _typed_lines() if is_terminal else _script_lines():
            try:
                if line.startswith("/"):
                    if not _obey(line, chat):
                        break
                elif line:
                    _turn(line, chat, pipeline, options, is_shown=not arguments.json)
            except Blip3oError as error:
                # In a terminal a mistake does not end a long talk; a script must not go on as if nothing had happened.
                if not is_terminal:
                    raise
                print(error, file=sys.stderr)
    finally:
        if arguments.json:
            print(json.dumps(chat.record(), indent=2, ensure_ascii=False))


def _typed_lines() -> Iterator[str]:
    """What a person types, line by line, until Ctrl-D."""
    try:
        importlib.import_module("readline")  # arrow keys and earlier lines; Windows has them of its own
    except ImportError:
        pass
    while True:
        try:
            if sys.stdout.isatty():
                yield input(PROMPT).strip()
            else:
                # input() would write its prompt among what the chat hands over.
                print(PROMPT, end="", file=sys.stderr, flush=True)
                yield input().strip()
        except KeyboardInterrupt:
            print("  (/quit ends)", file=sys.stderr)
        except EOFError:
            print(file=sys.stderr)
            return


def _script_lines() -> Iterator[str]:
    """What comes from a file or another program, line by line; UTF-8 whatever the terminal's encoding."""
    for line in sys.stdin.buffer:
        try:
            yield line.decode("utf-8-sig").strip()
        except UnicodeDecodeError as error:
            raise BadInputError("The input is no UTF-8 text.\nSave it as UTF-8.") from error


def _obey(line: str, chat: Chat) -> bool:
    """Do what a line for the program says; False = end."""
    word, _, rest = line.partition(" ")
    path = _dropped_path(rest.strip())
    if word in ("/image", "/save") and not path:
        raise BadInputError(f"{word} needs the name of a file.")
    if word == "/image":
        chat.show(path)
    elif word == "/save":
        chat.save(Path(path))
        print(f"Wrote {path}", file=sys.stderr)
    elif word == "/reset":
        chat.turns.clear()
        chat.names.clear()
        chat.waiting.clear()
    elif word == "/help":
        print(HELP, file=sys.stderr)
    elif word in ("/quit", "/exit"):
        return False
    else:
        raise BadInputError(f'"{word}" is no command; /help lists them.')
    return True


def _dropped_path(text: str) -> str:
    """A path as people write it or drop it into a line: perhaps in quotes, perhaps below ~."""
    if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'":
        text = text[1:-1]
    return os.path.expanduser(text)


def _turn(
    line: str, chat: Chat, pipeline: Blip3oPipeline, options: dict[str, Any], *, is_shown: bool
) -> None:
    """Ask a line and keep its answer; Ctrl-C keeps what there is of it, an error nothing."""
    chat.ask(line)
    try:
        with Streamed(is_shown=is_shown) as written, as_typed(ANSWER_NAMES):
            answer = pipeline.chat([chat.turns], on_text=written, **options)[0]
    except KeyboardInterrupt:
        answer = written.text
        if not answer:
            chat.take_back()
            return
    except BaseException:
        chat.take_back()
        raise
    chat.answer(answer)
