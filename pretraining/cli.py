"""`blip3o pretrain` and `blip3o eval`: train the stages, put the checkpoint together, score it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..blip3o_core.config import BUILT_IN_MODEL

STAGE_NAMES = ("encoder", "vae", "decoder", "understanding", "generation", "tuning")
COMPARISONS = ("designs", "joint")
PARTS = ("prompts", "questions", "reconstruction")


def add_pretrain(parser: argparse.ArgumentParser) -> None:
    """Arguments of `blip3o pretrain`."""
    parser.add_argument(
        "stage",
        choices=(*STAGE_NAMES, "all", "assemble", "compare", "image-text"),
        help="a stage of the recipe, all of them, the checkpoint put together, the published designs compared, or DiT "
        "and latent queries on real data",
    )
    parser.add_argument(
        "--run", type=Path, default=Path("pretraining-run"), help="folder of the run (default: %(default)s)"
    )
    parser.add_argument(
        "--config",
        type=Path,
        nargs="+",
        default=[],
        help="YAML files of stages; default: those of the run, else the embedded model's",
    )
    parser.add_argument(
        "--earlier", type=Path, help="build on encoder, VAE, decoder and backbone of this other run"
    )
    parser.add_argument("--steps", type=int, help="steps of the stage instead of the configuration's")
    parser.add_argument(
        "--stop-at", type=int, help="stop after this step with a checkpoint; run again to go on"
    )
    parser.add_argument("--no-gate", action="store_true", help="go on although a stage is below its gate")
    parser.add_argument("--seed", type=int, help="seed of weights and batches instead of the configuration's")
    parser.add_argument("--out", type=Path, help="the checkpoint folder to write (default: RUN/checkpoint)")
    comparison = parser.add_argument_group("compare")
    comparison.add_argument(
        "--table",
        choices=COMPARISONS,
        default=COMPARISONS[0],
        help="designs: CLIP + MSE, CLIP + flow, VAE + flow; joint: what learns besides the DiT (default: designs)",
    )
    comparison.add_argument("--rows", nargs="+", help="rows of the table (default: all)")
    comparison.add_argument(
        "--prompts",
        type=int,
        default=60,
        help="unseen prompts per category, 0 = questions alone (default: %(default)s)",
    )
    comparison.add_argument(
        "--scenes", type=int, default=100, help="unseen pictures asked about (default: %(default)s)"
    )
    real = parser.add_argument_group("image-text")
    real.add_argument("--model", type=Path, default=BUILT_IN_MODEL, help="the checkpoint to start from")
    real.add_argument(
        "--data", type=Path, help="folder of pictures with .txt captions, or of webdataset .tar files"
    )
    real.add_argument("--batch-size", type=int, default=16, help="samples of a step over all processes")
    real.add_argument("--learning-rate", type=float, default=1e-4, help="peak (default: %(default)s)")
    real.add_argument(
        "--objective",
        choices=("flow", "mse"),
        default="flow",
        help="what the DiT learns: the paper compares both",
    )
    parser.set_defaults(run_command=run_pretrain)


def add_eval(parser: argparse.ArgumentParser) -> None:
    """Arguments of `blip3o eval`."""
    parser.add_argument("--model", type=Path, default=BUILT_IN_MODEL, help="checkpoint folder")
    parser.add_argument("--out", type=Path, default=Path("scores"), help="folder for scores and pictures")
    parser.add_argument("--seed", type=int, default=0, help="of prompts, scenes and pictures (default: 0)")
    parser.add_argument("--preset", default="standard", help="standard, fast or published")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps (default: auto)")
    parser.add_argument("--prompts", type=int, default=60, help="scene world: unseen prompts per category")
    parser.add_argument("--scenes", type=int, default=100, help="scene world: unseen pictures")
    parser.add_argument(
        "--best-of", type=int, default=1, help="pictures per prompt; the model's own yes/no score picks"
    )
    parser.add_argument(
        "--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what to score (default: all)"
    )
    parser.set_defaults(run_command=run_eval)


def run_pretrain(arguments: argparse.Namespace) -> int:
    """Train one stage, all of them, write the checkpoint, or train on real pictures with captions."""
    if arguments.stage == "image-text":
        return _train_image_text(arguments)
    from ..blip3o_core.errors import BadInputError
    from .recipe import EARLIER, STAGES, Recipe, read_config

    overrides = {config["stage"]: config for config in map(read_config, arguments.config)}
    if arguments.stage == "compare":
        return _compare(arguments, overrides)
    recipe = Recipe(arguments.run, overrides, arguments.earlier)
    if arguments.stage == "assemble":
        folder = recipe.assemble(arguments.out or arguments.run / "checkpoint")
        print(f"Checkpoint written to {folder}")
        return 0
    own = [stage for stage in STAGES if arguments.earlier is None or stage not in EARLIER]
    if arguments.stage not in (*own, "all"):
        raise BadInputError(
            f'Stage "{arguments.stage}" is taken from the run "{arguments.earlier}" given with --earlier.\n'
            f"Train it there (--run {arguments.earlier}), or leave --earlier away."
        )
    for stage in own if arguments.stage == "all" else (arguments.stage,):
        _train(recipe, stage, arguments)
    if arguments.stage == "all":
        print(f"Checkpoint written to {recipe.assemble(arguments.out or arguments.run / 'checkpoint')}")
    return 0


def run_eval(arguments: argparse.Namespace) -> int:
    """Score a checkpoint on the scene world."""
    from tqdm import tqdm

    from ..blip3o_core.pipeline import load_pipeline
    from .evaluation.scores import evaluate, to_markdown

    pipeline = load_pipeline(arguments.model, device=arguments.device)
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
    """Train one stage to its end and hold it against its gate.

    Raises:
        TrainingDataError: the finished stage stays below its gate.
    """
    from accelerate import PartialState

    from ..blip3o_core.errors import TrainingDataError
    from .evaluation.gates import measure
    from .loss_plot import plot_log
    from .trainer import train_stage

    loop = recipe.configs[stage]["loop"]
    if arguments.steps is not None:
        loop["steps"] = arguments.steps
    if arguments.seed is not None:
        loop["seed"] = arguments.seed
    job = recipe.job(stage)
    if PartialState().is_main_process:
        recipe.record(stage)
    folder = recipe.stage_folder(stage)
    train_stage(job.module, job.batch_of, job.loop, folder, stop_at=arguments.stop_at)
    if not PartialState().is_main_process:
        return
    plot_log(folder / "log.jsonl", folder / "loss.png")
    if arguments.stop_at is not None or arguments.no_gate:
        return
    found = measure(recipe, stage)
    wanted = recipe.configs[stage].get("gate", {})
    for name, value in found.items():
        print(f"{stage}: {name} {value:.3f} (gate {wanted.get(name, 0.0):.2f})")
    low = [name for name, least in wanted.items() if found[name] < least]
    if low:
        raise TrainingDataError(
            f'Stage "{stage}" is not good enough for the next one: '
            + ", ".join(f"{name} {found[name]:.3f}, needed {wanted[name]:.2f}" for name in low)
            + f".\nTrain it longer (--steps above {loop['steps']}), or go on with --no-gate."
        )


def _compare(arguments: argparse.Namespace, overrides: dict[str, dict[str, Any]]) -> int:
    from .evaluation.compare import check_rows, compare, comparison_rows, to_markdown

    rows = check_rows(comparison_rows(arguments.table), arguments.rows)
    for config in rows.values():
        if arguments.steps is not None:
            config["loop"] = {**config["loop"], "steps": arguments.steps}
        if arguments.seed is not None:
            config["loop"] = {**config["loop"], "seed": arguments.seed}
    result = compare(
        arguments.run,
        arguments.run / arguments.table,
        rows,
        prompts=arguments.prompts,
        scenes=arguments.scenes,
        seed=arguments.seed or 0,
        overrides=overrides,
        on_row=lambda name: print(f"Row {name}", file=sys.stderr),
    )
    print(to_markdown(result))
    return 0


def _train_image_text(arguments: argparse.Namespace) -> int:
    from accelerate import PartialState

    from ..blip3o_core.errors import TrainingDataError
    from ..blip3o_core.pipeline import load_pipeline
    from .data_sources import SampleStream
    from .loss_plot import plot_log
    from .stages.image_text import ImageTextBatches, ImageTextStage, save_trained
    from .trainer import LoopConfig, train_stage

    if arguments.data is None:
        raise TrainingDataError("image-text needs pictures with captions.\nGive their folder with --data.")
    state = PartialState()
    seed = arguments.seed or 0
    pipeline = load_pipeline(arguments.model, device=str(state.device), dtype="fp32")
    stage = ImageTextStage(pipeline, arguments.objective)
    loop = LoopConfig(
        steps=arguments.steps or 10_000,
        batch_size=arguments.batch_size,
        learning_rate=arguments.learning_rate,
        final_learning_rate=0.1 * arguments.learning_rate,
        ema=0.999,
        seed=seed,
    )
    batches = ImageTextBatches(
        SampleStream(arguments.data, seed=seed, rank=state.process_index, world_size=state.num_processes),
        pipeline.tokenizer,
        image_size=pipeline.image_encoder.config.image_size,
        noise_shape=pipeline.noise_shape,
        batch_size=max(1, arguments.batch_size // state.num_processes),
        drop=0.1,
        seed=seed * 1009 + state.process_index,
    )
    folder = arguments.run / "image-text"
    train_stage(stage, batches, loop, folder, stop_at=arguments.stop_at, is_local=True)
    if state.is_main_process:
        plot_log(folder / "log.jsonl", folder / "loss.png")
        out = save_trained(pipeline, stage, folder, arguments.out or arguments.run / "checkpoint")
        print(f"Checkpoint written to {out}")
    return 0


def _advance(bar: Any, done: int, total: int) -> None:
    bar.total = total
    bar.update(done - bar.n)


if __name__ == "__main__":
    sys.exit(main())
