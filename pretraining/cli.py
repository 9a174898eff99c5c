"""`blip3o pretrain` and `blip3o eval`: train the stages, put the checkpoint together, score it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

STAGE_NAMES = ("encoder", "vae", "decoder", "understanding", "generation", "tuning")
PARTS = ("prompts", "questions", "reconstruction")
BENCHMARKS = ("geneval", "dpg", "wise")


def add_pretrain(parser: argparse.ArgumentParser) -> None:
    """Arguments of `blip3o pretrain`."""
    parser.add_argument(
        "stage", choices=(*STAGE_NAMES, "all", "assemble"), help="what to train, or put together"
    )
    parser.add_argument(
        "--run", type=Path, default=Path("pretraining-run"), help="folder of the run (default: %(default)s)"
    )
    parser.add_argument("--config", type=Path, help="YAML file of the stage; default: the embedded model's")
    parser.add_argument("--steps", type=int, help="steps of the stage instead of the configuration's")
    parser.add_argument(
        "--stop-at", type=int, help="stop after this step with a checkpoint; run again to go on"
    )
    parser.add_argument("--seed", type=int, help="seed of weights and batches instead of the configuration's")
    parser.add_argument(
        "--out", type=Path, help="assemble: the checkpoint folder to write (default: RUN/checkpoint)"
    )
    parser.set_defaults(run_command=run_pretrain)


def add_eval(parser: argparse.ArgumentParser) -> None:
    """Arguments of `blip3o eval`."""
    parser.add_argument("--model", type=Path, required=True, help="checkpoint folder")
    parser.add_argument("--out", type=Path, default=Path("scores"), help="folder for scores and pictures")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--preset", default="standard", help="standard, fast or published")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--prompts", type=int, default=60, help="scene world: unseen prompts per category")
    parser.add_argument("--scenes", type=int, default=100, help="scene world: unseen pictures")
    parser.add_argument(
        "--best-of", type=int, default=1, help="pictures per prompt; the model's own yes/no score picks"
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument(
        "--benchmark", choices=BENCHMARKS, help="draw a benchmark's pictures instead, for its own scorer"
    )
    parser.add_argument(
        "--prompt-file", type=Path, help="the benchmark's prompts: jsonl, json, or a folder of txt files"
    )
    parser.add_argument("--samples", type=int, default=4, help="benchmark: pictures per prompt")
    parser.add_argument("--shard", default="0/1", help="benchmark: this process draws part k of n, e.g. 0/4")
    parser.set_defaults(run_command=run_eval)


def run_pretrain(arguments: argparse.Namespace) -> int:
    """Train one stage, all of them, or write the checkpoint."""
    from .recipe import STAGES, Recipe, read_config

    overrides: dict[str, dict[str, Any]] = {}
    if arguments.config is not None:
        config = read_config(arguments.config)
        overrides[config["stage"]] = config
    recipe = Recipe(arguments.run, overrides)
    if arguments.stage == "assemble":
        folder = recipe.assemble(arguments.out or arguments.run / "checkpoint")
        print(f"Checkpoint written to {folder}")
        return 0
    for stage in STAGES if arguments.stage == "all" else (arguments.stage,):
        _train(recipe, stage, arguments)
    if arguments.stage == "all":
        print(f"Checkpoint written to {recipe.assemble(arguments.out or arguments.run / 'checkpoint')}")
    return 0


def run_eval(arguments: argparse.Namespace) -> int:
    """Score a checkpoint on the scene world, or draw the pictures of a benchmark."""
    from tqdm import tqdm

    from ..blip3o_core.pipeline import load_pipeline
    from .benchmark_files import draw_benchmark, read_shard
    from .scores import evaluate, to_markdown

    pipeline = load_pipeline(arguments.model, device=arguments.device)
    if arguments.benchmark is not None:
        from ..blip3o_core.errors import BadInputError

        if arguments.prompt_file is None:
            raise BadInputError(
                f"The {arguments.benchmark} prompts are not part of this package.\n"
                "Download them from the benchmark and give --prompt-file."
            )
        with tqdm(desc=arguments.benchmark) as bar:
            drawn = draw_benchmark(
                pipeline,
                arguments.benchmark,
                arguments.prompt_file,
                arguments.out,
                samples=arguments.samples,
                seed=arguments.seed,
                preset=arguments.preset,
                shard=read_shard(arguments.shard),
                on_done=lambda done, total: _advance(bar, done, total),
            )
        print(f"{drawn} pictures in {arguments.out}")
        return 0
    bars: dict[str, Any] = {}

    def on_progress(part: str, done: int, total: int) -> None:
        bar = bars.setdefault(part, tqdm(desc=part, total=total))
        _advance(bar, done, total)

    result = evaluate(
        pipeline,
        arguments.out,
        prompts=arguments.prompts,
        scenes=arguments.scenes,
        seed=arguments.seed,
        preset=arguments.preset,
        best_of=arguments.best_of,
        parts=tuple(arguments.parts),
        on_progress=on_progress,
    )
    for bar in bars.values():
        bar.close()
    print(to_markdown(result))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """`pretrain ...` or `eval ...`."""
    from ..blip3o_core.errors import Blip3oError

    parser = argparse.ArgumentParser(prog="blip3o")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    add: dict[str, Callable[[argparse.ArgumentParser], None]] = {"pretrain": add_pretrain, "eval": add_eval}
    for name, fill in add.items():
        fill(commands.add_parser(name))
    arguments = parser.parse_args(argv)
    try:
        return arguments.run_command(arguments)
    except Blip3oError as error:
        print(error, file=sys.stderr)
        return 2


def _train(recipe: Any, stage: str, arguments: argparse.Namespace) -> None:
    from .loss_plot import plot_log
    from .trainer import train_stage

    loop = recipe.configs[stage]["loop"]
    if arguments.steps is not None:
        loop["steps"] = arguments.steps
    if arguments.seed is not None:
        loop["seed"] = arguments.seed
    job = recipe.job(stage)
    folder = arguments.run / stage
    train_stage(job.module, job.batch_of, job.loop, folder, stop_at=arguments.stop_at)
    plot_log(folder / "log.jsonl", folder / "loss.png")


def _advance(bar: Any, done: int, total: int) -> None:
    bar.total = total
    bar.update(done - bar.n)


if __name__ == "__main__":
    sys.exit(main())
