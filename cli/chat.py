"""`blip3o chat`: several turns about words and pictures, in a terminal or from a script."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..blip3o_core.errors import BadInputError, Blip3oError
from .options import (
    add_answer_options,
    add_model_options,
    answer_options,
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
        """Write the chat as JSON or Markdown, by the ending of the name."""
        from ..blip3o_core.checkpoints.save import write_text

        if path.suffix.lower() == ".json":
            write_text(path, json.dumps(self.record(), indent=2, ensure_ascii=False) + "\n")
            return
        parts = []
        for said in self.record():
            pictures = "".join(f"![]({name})\n\n" for name in said["pictures"])
            parts.append(f"**{said['role']}**\n\n{pictures}{said['text']}\n")
        write_text(path, "\n".join(parts))


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
    for line in _lines("> " if is_terminal else ""):
        try:
            if line.startswith("/"):
                if not _obey(line, chat):
                    break
            elif line:
                _turn(line, chat, pipeline, options, is_streaming=not arguments.json)
        except (Blip3oError, OSError) as error:
            # In a terminal a mistake does not end a long talk; a script must not go on as if nothing had happened.
            if not is_terminal or isinstance(error, BrokenPipeError):
                raise
            print(error, file=sys.stderr)
    if arguments.json:
        print(json.dumps(chat.record(), indent=2, ensure_ascii=False))


def _lines(prompt: str) -> Iterator[str]:
    """What is typed, or comes from a script, line by line, until its end."""
    while True:
        try:
            yield input(prompt).strip()
        except EOFError:
            return
        except UnicodeDecodeError as error:
            raise BadInputError("The input is no UTF-8 text.\nSave it as UTF-8.") from error


def _obey(line: str, chat: Chat) -> bool:
    """Do what a line for the program says; False = end."""
    word, _, rest = line.partition(" ")
    rest = rest.strip()
    if word in ("/image", "/save") and not rest:
        raise BadInputError(f"{word} needs the name of a file.")
    if word == "/image":
        chat.show(rest)
    elif word == "/save":
        chat.save(Path(rest))
        print(f"Wrote {rest}", file=sys.stderr)
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


def _turn(
    line: str, chat: Chat, pipeline: Blip3oPipeline, options: dict[str, Any], *, is_streaming: bool
) -> None:
    chat.ask(line)
    written = ""

    def on_text(_: int, text: str) -> None:
        nonlocal written
        # A character of several tokens decodes to a replacement sign until it is whole.
        if not text.endswith("\ufffd"):
            if is_streaming:
                print(text[len(written) :], end="", flush=True)
            written = text

    try:
        answer = pipeline.chat([chat.turns], on_text=on_text, **options)[0]
    except KeyboardInterrupt:
        answer = written
    except BaseException:
        chat.take_back()
        raise
    finally:
        if is_streaming:
            print()
    chat.answer(answer)
