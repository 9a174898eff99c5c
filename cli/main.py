"""The `blip3o` command: draw, ask, caption, chat, vary, inspect, download, convert, verify, check, train, pretrain and score."""

from __future__ import annotations

import argparse
import io
import logging
import os
import sys
from collections.abc import Sequence

from ..blip3o_core.errors import Blip3oError
from ..lora_training.cli import add_lora
from ..pretraining.cli import add_eval, add_pretrain, run_eval, run_pretrain
from ..pretraining.evaluation.benchmarks import add_benchmark_arguments, run_benchmark
from .answer import add_ask, add_caption
from .chat import add_chat
from .doctor import add_doctor
from .draw import add_generate, add_vary
from .folders import add_convert, add_download, add_info, add_verify
from .options import command

EXIT_ERROR = 2
EXIT_INTERRUPTED = 130
# 128 + SIGPIPE, as the shell's own commands end.
EXIT_BROKEN_PIPE = 141


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0 done, 1 something is wrong, 2 a user can mend it, 130 interrupted, 141 cut off."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    _show_every_character()
    arguments = build_parser().parse_args(argv)
    if not getattr(arguments, "quiet", False):
        # What is left out of a checkpoint is worth a word, not a warning.
        logging.getLogger(f"{__package__.rpartition('.')[0]}.blip3o_core.checkpoints.match").setLevel(
            logging.INFO
        )
    try:
        code = arguments.run_command(arguments) or 0
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # Whoever read the output (`| head -1`) has enough. What is left in the buffer has nowhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE
    except Blip3oError as error:
        print(error, file=sys.stderr)
        return EXIT_ERROR
    except OSError as error:
        print(
            f"A file cannot be read or written: {error}.\nCheck the path, its permissions and the free space.",
            file=sys.stderr,
        )
        return EXIT_ERROR
    except KeyboardInterrupt:
        print("Stopped.", file=sys.stderr)
        return EXIT_INTERRUPTED


def _show_every_character() -> None:
    """Let standard output take names that are no text as they came in, and any character that its encoding lacks."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        is_utf_8 = sys.stdout.encoding.lower().replace("-", "") == "utf8"
        sys.stdout.reconfigure(errors="surrogateescape" if is_utf_8 else "backslashreplace")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="blip3o",
        description="BLIP3-o draws pictures from prompts and answers questions about pictures.",
        epilog='Without --model the small built-in model is used. "blip3o COMMAND --help" tells more.',
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    add_generate(commands)
    add_vary(commands)
    add_ask(commands)
    add_caption(commands)
    add_chat(commands)
    add_info(commands)
    add_download(commands)
    add_convert(commands)
    add_verify(commands)
    add_doctor(commands)
    add_lora(
        command(
            commands, "lora", None, "Teach the model something of your own: train, prove and manage LoRAs."
        )
    )
    add_pretrain(
        command(
            commands,
            "pretrain",
            run_pretrain,
            "Train a BLIP3-o, stage by stage; the recipe of the built-in model.",
        )
    )
    add_eval(command(commands, "eval", run_eval, "Score a checkpoint on the scene world."))
    add_benchmark_arguments(
        command(
            commands,
            "benchmark",
            run_benchmark,
            "Draw the pictures of GenEval, DPG-Bench or WISE for their own scorers.",
        )
    )
    return parser
