"""`blip3o lora`: from a folder of pictures to a proven LoRA, and what one does with LoRA files."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..blip3o_core.config import BUILT_IN_MODEL
from ..blip3o_core.errors import BadInputError, Blip3oError, MissingFilesError
from ..blip3o_core.units import format_bytes
from ..blip3o_core.untrusted import parse_yaml
from .config import PRESET_FOLDER, LoraConfig, parse_config, read_config, to_tree

EXIT_BAD = 2
FORMATS = ("comfy", "peft", "kohya", "diffusers")
MODES = (
    "short", "detailed", "tags", "training", "all but the subject", "all but the style",
)  # fmt: skip
EPILOG = """Your first LoRA:
  blip3o lora new my_dog --data pictures --trigger "ohwx dog" --class dog
  blip3o lora caption my_dog.yaml
  blip3o lora check my_dog.yaml
  blip3o lora run my_dog.yaml
  blip3o lora sample runs/my_dog/final/my_dog.safetensors "ohwx dog on a beach"

Several GPUs or machines:
  blip3o lora cache my_dog.yaml
  accelerate launch -m comfyui_blip3o.lora_training fit my_dog.yaml
  blip3o lora prove my_dog.yaml

Exit codes: 0 done, 2 settings or pictures need mending, 3 stopped and saved, 4 went wrong but the best is kept,
5 too little memory. Ctrl-C finishes the step and saves; a second one ends at once."""
NEW_FILE = """# A LoRA run; what is not set here has its default. blip3o lora check FILE says what is wrong before you train.
schema: 1
run: {{name: {name}, dir: {dir}, preset: {preset}, seed: 0}}
model: {{root: {root}}}
data:
  path: {data}
  trigger: {trigger}
  class_word: {class_word}
sample:
  prompts: {prompts}
"""


def add_lora(parser: argparse.ArgumentParser) -> None:
    """Commands of `blip3o lora`."""
    parser.epilog = EPILOG
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_new(commands)
    check = _run_command(
        commands, "check", run_check, "Say everything that is wrong, before anything is computed."
    )
    check.add_argument(
        "--ceiling",
        type=Path,
        metavar="PNG",
        help="also draw what the frozen decoder can show of the pictures",
    )
    check.add_argument(
        "--trigger",
        action="store_true",
        help="also measure how well the model tells trigger and class word apart",
    )
    check.add_argument("--json", action="store_true", help="print JSON for scripts")
    caption = _run_command(
        commands, "caption", run_caption, "Write a caption beside each picture without one."
    )
    caption.add_argument("--mode", default="training", choices=MODES, help="default: training")
    caption.add_argument("--overwrite", action="store_true", help="replace captions that are there")
    cache = _run_command(commands, "cache", run_cache, "Encode pictures and prompts; what is there is kept.")
    cache.add_argument(
        "--verify", action="store_true", help="read every entry and compare some with the model"
    )
    cache.add_argument("--clean", action="store_true", help="remove entries that no run has used for 30 days")
    for name, text in (
        ("fit", "Train from the cache alone."),
        ("prove", "Measure what was learned, draw, write the report and the finished file again."),
        ("run", "All of it: check, encode, train, prove, export. Goes on where it was stopped."),
    ):
        command = _run_command(commands, name, run_train, text)
        command.set_defaults(only={"fit": ["fit"], "prove": ["prove", "export"], "run": None}[name])
        if name != "prove":
            command.add_argument(
                "--fresh", action="store_true", help="forget what this run has learned so far"
            )
            command.add_argument("--dry-run", action="store_true", help="print the plan only")
    resume = _command(commands, "resume", run_resume, "Go on with a run, by its folder.")
    resume.add_argument("folder", type=Path, help="folder of the run")
    _add_run_options(resume)
    sweep = _run_command(
        commands, "sweep", run_sweep, "Train every combination of some settings and compare."
    )
    sweep.add_argument(
        "--grid",
        nargs="+",
        required=True,
        metavar="SETTING=A,B",
        help="e.g. train.optimizer.lr=1e-4,3e-4 adapter.rank=8,32",
    )
    sweep.add_argument("--dry-run", action="store_true", help="print the combinations only")
    _add_sample(commands)
    _add_files(commands)


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m comfyui_blip3o.lora_training`, for accelerate launch."""
    parser = argparse.ArgumentParser(prog="blip3o lora", formatter_class=argparse.RawDescriptionHelpFormatter)
    add_lora(parser)
    arguments = parser.parse_args(argv)
    try:
        return arguments.run_command(arguments) or 0
    except Blip3oError as error:
        print(error, file=sys.stderr)
        return EXIT_BAD


# Declaring


def _command(commands: Any, name: str, run: Callable[[argparse.Namespace], int | None], text: str) -> Any:
    parser = commands.add_parser(name, help=text, description=text)
    parser.set_defaults(run_command=lambda arguments: _with_exit_code(run, arguments))
    return parser


def _run_command(commands: Any, name: str, run: Callable[[argparse.Namespace], int | None], text: str) -> Any:
    parser = _command(commands, name, run, text)
    parser.add_argument("config", type=Path, help="YAML file of the run")
    _add_run_options(parser)
    return parser


def _add_run_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--set", action="append", default=[], metavar="SETTING=VALUE", dest="overrides",
        help="instead of the file's, e.g. train.optimizer.lr=1e-4; may be repeated",
    )  # fmt: skip
    parser.add_argument(
        "--events", metavar="jsonl|FILE", help="write events as JSON lines: jsonl = to standard output"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bars")


def _add_new(commands: Any) -> None:
    new = _command(commands, "new", run_new, "Write the configuration of a run.")
    new.add_argument("name", help="of the run and of its LoRA")
    new.add_argument("--data", required=True, help="folder of pictures, or a .tar")
    new.add_argument("--trigger", default="", help='words that will call it, e.g. "ohwx dog"')
    new.add_argument("--class", default="", dest="class_word", help="what it is a kind of, e.g. dog")
    presets = sorted(path.stem for path in PRESET_FOLDER.glob("*.yaml"))
    new.add_argument("--preset", default="subject", choices=presets, help="default: subject")
    new.add_argument(
        "--model", default="built-in", help="checkpoint folder (default: the built-in tiny model)"
    )
    new.add_argument("--dir", default="runs", help="folder of runs (default: runs)")
    new.add_argument("-o", "--out", type=Path, help="the file (default: NAME.yaml)")
    new.add_argument("--force", action="store_true", help="replace a file that is there")


def _add_sample(commands: Any) -> None:
    sample = _command(
        commands, "sample", run_sample, "Draw prompts with a LoRA at several strengths, same seeds."
    )
    sample.add_argument("lora", type=Path, help="LoRA file or PEFT folder")
    sample.add_argument("prompt", nargs="+")
    sample.add_argument(
        "--strengths",
        type=float,
        nargs="+",
        default=[0.0, 0.5, 1.0],
        help="one column each (default: 0 0.5 1)",
    )
    sample.add_argument("--seed", type=int, default=42, help="default: 42")
    sample.add_argument("--preset", default="standard", help="standard, published or fast")
    sample.add_argument("--model", type=Path, help="checkpoint folder (default: the built-in tiny model)")
    sample.add_argument("--device", default="auto", help="auto, cpu, cuda or mps (default: auto)")
    sample.add_argument("-o", "--out", type=Path, default=Path("lora_strengths.png"), help="PNG of the grid")
    sample.add_argument("--quiet", action="store_true", help="no progress bar")


def _add_files(commands: Any) -> None:
    convert = _command(commands, "convert", run_convert, "Write a LoRA in another program's naming.")
    convert.add_argument("source", type=Path)
    convert.add_argument("target", type=Path, help="file; for peft a folder")
    convert.add_argument("--to", required=True, choices=FORMATS)
    merge = _command(commands, "merge", run_merge, "Make one LoRA of several, or put them into a checkpoint.")
    merge.add_argument("loras", nargs="+", metavar="FILE[:STRENGTH]")
    merge.add_argument(
        "-o", "--out", type=Path, required=True, help="LoRA file, or the new checkpoint folder"
    )
    merge.add_argument(
        "--into", type=Path, metavar="CHECKPOINT", help="put them into a copy of this checkpoint"
    )
    merge.add_argument(
        "--mode", default="concat", choices=("concat", "svd"), help="concat is exact (default)"
    )
    merge.add_argument("--rank", type=int, help="of the merged LoRA, for svd")
    resize = _command(commands, "resize", run_resize, "Cut a LoRA down to a smaller rank.")
    resize.add_argument("source", type=Path)
    extract = _command(commands, "extract", run_extract, "A LoRA from the difference of two checkpoints.")
    extract.add_argument("base", type=Path, help="checkpoint folder before")
    extract.add_argument("tuned", type=Path, help="checkpoint folder after")
    for parser in (resize, extract):
        parser.add_argument("-o", "--out", type=Path, required=True)
        size = parser.add_mutually_exclusive_group(required=True)
        size.add_argument("--rank", type=int)
        size.add_argument("--share", type=float, help="share of the change to keep, 0 to 1")
    for parser in (convert, merge, resize):
        parser.add_argument("--model", type=Path, help="checkpoint folder; only some conversions need it")
    for parser in (merge, resize, extract):
        parser.add_argument("--dtype", default="bf16", choices=("bf16", "fp16", "fp32"), help="default: bf16")
    inspect = _command(commands, "inspect", run_inspect, "Say what is in a LoRA file.")
    inspect.add_argument("lora", type=Path)
    inspect.add_argument("--json", action="store_true", help="print JSON for scripts")


# Runs


def run_new(arguments: argparse.Namespace) -> None:
    path = arguments.out or Path(f"{arguments.name}.yaml")
    if path.exists() and not arguments.force:
        raise BadInputError(f'"{path}" is there already.\nName another file with --out, or add --force.')
    prompts = (
        ["{trigger}", "{class}"] if arguments.trigger else [f"a picture of {arguments.class_word or 'it'}"]
    )
    if arguments.trigger and not arguments.class_word:
        prompts = ["{trigger}"]

    def quoted(value: Any) -> str:
        return json.dumps(value, ensure_ascii=False)

    text = NEW_FILE.format(
        name=quoted(arguments.name),
        dir=quoted(arguments.dir),
        preset=arguments.preset,
        root=quoted(arguments.model),
        data=quoted(arguments.data),
        trigger=quoted(arguments.trigger),
        class_word=quoted(arguments.class_word),
        prompts=quoted(prompts),
    )
    parse_config(parse_yaml(text))
    from ..blip3o_core.checkpoints.save import write_text

    write_text(path, text)
    print(f"Wrote {path}. Next: blip3o lora check {path}")


def run_check(arguments: argparse.Namespace) -> int:
    from .check import check
    from .run import plan_text

    config = _config(arguments)
    report = check(config)
    if arguments.json:
        problems = [
            {"level": each.level, "kind": each.kind, "text": each.text, "names": list(each.names)}
            for each in report.problems
        ]
        print(json.dumps({"problems": problems, "notes": list(report.notes)}, indent=2, ensure_ascii=False))
    else:
        print(plan_text(config, report))
        print(report.text())
    if report.dataset is not None and not report.errors and (arguments.ceiling or arguments.trigger):
        _look_at_limits(arguments, config, report.dataset)
    return EXIT_BAD if report.errors else 0


def _look_at_limits(arguments: argparse.Namespace, config: LoraConfig, dataset: Any) -> None:
    from .data.cache import open_pipeline
    from .prompts import drift_prompts
    from .proof.ceiling import suggest_triggers, trigger_separability
    from .run import ceiling_of

    pipeline = open_pipeline(config)
    out = sys.stderr if arguments.json else sys.stdout
    if arguments.ceiling:
        with _bar(arguments.quiet, "ceiling") as bar:
            ceiling = ceiling_of(
                config, dataset, pipeline, on_progress=lambda done, total: _advance(bar, done, total)
            )
        ceiling.sheet().save(arguments.ceiling)
        print(f"{ceiling.text()}\nPairs of original and decoded: {arguments.ceiling}", file=out)
    pairs = [(item.prompts[0], item.class_prompts[0]) for item in dataset.train if item.class_prompts][:8]
    if arguments.trigger and pairs:
        prompts, class_prompts = zip(*pairs, strict=True)
        others = drift_prompts(config)
        found = trigger_separability(pipeline, prompts, class_prompts, others)
        print(found.text, file=out)
        if found.level != "clear":
            captions = [item.captions[0] for item in dataset.train if item.captions][:4]
            for trigger, score in suggest_triggers(pipeline, config.data, captions, others)[:5]:
                print(f'    {score:5.0%}  "{trigger}"', file=out)


def run_caption(arguments: argparse.Namespace) -> int:
    from .data.cache import open_pipeline
    from .data.captioning import caption_dataset

    config = _config(arguments)
    with _Watcher(arguments) as watcher:
        done = caption_dataset(
            config.data,
            open_pipeline(config),
            arguments.mode,
            arguments.overwrite,
            on_event=watcher.tell,
            should_stop=watcher.should_stop,
        )
    if arguments.events != "jsonl":
        print(f"{len(done.written)} captions written, {len(done.kept)} kept, {len(done.failed)} failed.")
        for name, reason in done.failed.items():
            print(f"    {name}: {reason}")
    return EXIT_BAD if done.failed else 0


def run_cache(arguments: argparse.Namespace) -> int:
    from .data.cache import cache_keys, collect_garbage, open_pipeline, verify_cache
    from .data.dataset import scan_run
    from .proof.judge import extra_prompts
    from .run import cache_folder, fill_cache

    config = _config(arguments)
    dataset = scan_run(config)
    folder, prompts = cache_folder(config), extra_prompts(config)
    if arguments.verify:
        problems = verify_cache(config, dataset, prompts, folder, open_pipeline(config))
        print("\n".join(map(str, problems)) or "Every entry is right.")
        return EXIT_BAD if problems else 0
    if arguments.clean:
        removed = collect_garbage(folder, cache_keys(config).all(dataset, prompts))
        print(f"{removed.files} files removed, {format_bytes(removed.bytes)}.")
        return 0
    with _Watcher(arguments) as watcher:
        fill_cache(config, dataset, open_pipeline(config), watcher.tell, watcher.should_stop)
    if arguments.events != "jsonl":
        print(f"Cached in {folder}")
    return 0


def run_train(arguments: argparse.Namespace) -> int:
    """Commands run, fit and prove."""
    config = _config(arguments)
    if getattr(arguments, "dry_run", False):
        from .check import check
        from .run import plan_text

        report = check(config)
        print(plan_text(config, report))
        print(report.text())
        return EXIT_BAD if report.errors else 0
    return _train(arguments, config, arguments.only, getattr(arguments, "fresh", False))


def run_resume(arguments: argparse.Namespace) -> int:
    from .run import CONFIG_NAME

    path = arguments.folder / CONFIG_NAME
    if not path.is_file():
        raise MissingFilesError(
            f'"{arguments.folder}" is no run: it has no {CONFIG_NAME}.\nName the folder of a run.'
        )
    config = read_config(path, arguments.overrides)
    # The folder may have moved since.
    config = replace(config, run=replace(config.run, dir=arguments.folder.resolve().parent))
    return _train(arguments, config, None, False)


def run_sweep(arguments: argparse.Namespace) -> int:
    from ..blip3o_core.checkpoints.save import write_text
    from .run import train_lora

    config = _config(arguments)
    combinations = list(_combinations(arguments.grid))
    configs = []
    for number, overrides in enumerate(combinations):
        name = f"{config.run.name}_{number:02d}"
        configs.append(parse_config(to_tree(config), [*overrides, f"run.name={json.dumps(name)}"]))
    for each, overrides in zip(configs, combinations, strict=True):
        print(f"{each.run.name}: {' '.join(overrides)}", file=sys.stderr)
    if arguments.dry_run:
        return 0
    rows = []
    for each, overrides in zip(configs, combinations, strict=True):
        with _Watcher(arguments) as watcher:
            result = train_lora(each, on_event=watcher.tell, should_stop=watcher.should_stop)
        rows.append((each.run.name, " ".join(overrides), result.scorecard or {}, result.seconds))
    names = ("gain", "concept", "drift", "leak", "copy")
    lines = [
        f"| run | settings | {' | '.join(names)} | s |",
        "|---|---|" + "---|" * (len(names) + 1),
        *(
            f"| {name} | {settings} | {' | '.join(f'{card[key]:.3f}' for key in names)} | {seconds:.0f} |"
            for name, settings, card, seconds in rows
        ),
    ]
    path = config.run.dir / f"{config.run.name}_sweep.md"
    write_text(path, "\n".join(lines) + "\n")
    out = sys.stderr if arguments.events == "jsonl" else sys.stdout
    print("\n".join(lines), file=out)
    print(f"Written to {path}", file=out)
    return 0


def _combinations(grid: Sequence[str]) -> Iterator[list[str]]:
    """Every choice of one value for each SETTING=A,B; a value with commas of its own stands in [ ] or quotes."""
    axes = []
    for entry in grid:
        name, sign, text = entry.partition("=")
        try:
            values = parse_yaml(f"[{text}]") if sign else None
        except ValueError:
            values = None
        if not values:
            raise BadInputError(
                f'"{entry}" names no values.\nWrite it as SETTING=A,B, e.g. adapter.rank=8,32.'
            )
        axes.append([f"{name}={json.dumps(value)}" for value in values])
    for choice in itertools.product(*axes):
        yield list(choice)


def _train(arguments: argparse.Namespace, config: LoraConfig, only: Sequence[str] | None, fresh: bool) -> int:
    from .run import train_lora

    with _Watcher(arguments) as watcher:
        result = train_lora(
            config, on_event=watcher.tell, should_stop=watcher.should_stop, only=only, fresh=fresh
        )
    if arguments.events != "jsonl" and result.lora is not None:
        for verdict in (result.scorecard or {}).get("verdicts", ()):
            print(verdict)
        print(f"LoRA: {result.lora}")
        if result.report is not None:
            print(f"Report: {result.report}")
    return 0


# Files


def run_sample(arguments: argparse.Namespace) -> None:
    from PIL import Image, ImageDraw

    from ..blip3o_core.pipeline import load_pipeline
    from .proof.ceiling import GAP, picture_sheet

    pipeline = load_pipeline(arguments.model or BUILT_IN_MODEL, device=arguments.device)
    columns = []
    with _bar(arguments.quiet, "strengths") as bar:
        for done, strength in enumerate(arguments.strengths):
            pipeline.unload_loras()
            if strength:
                pipeline.load_lora(arguments.lora, strength)
            drawn = [
                pipeline.generate(prompt, seed=arguments.seed, preset=arguments.preset).pictures[0]
                for prompt in arguments.prompt
            ]
            columns.append(drawn)
            _advance(bar, done + 1, len(arguments.strengths))
    grid = picture_sheet(
        [column[row] for row in range(len(arguments.prompt)) for column in columns], len(columns)
    )
    sheet = Image.new("RGB", (grid.width, grid.height + 16), "white")
    sheet.paste(grid, (0, 16))
    for number, strength in enumerate(arguments.strengths):
        ImageDraw.Draw(sheet).text(
            (number * (columns[0][0].width + GAP) + 3, 2), f"{strength:g}", fill="black"
        )
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(arguments.out)
    print(arguments.out)


def run_convert(arguments: argparse.Namespace) -> None:
    from .files.convert import convert_lora

    print(
        f"Wrote {convert_lora(arguments.source, arguments.target, arguments.to, checkpoint=_checkpoint(arguments))}"
    )


def run_merge(arguments: argparse.Namespace) -> None:
    from ..blip3o_core.lora.files import read_lora, split_strength
    from .files.convert import base_weights
    from .files.merge import merge_into_checkpoint, merge_loras
    from .files.write import save_lora

    loras = [split_strength(text) for text in arguments.loras]
    if arguments.into is not None:
        print(f"Wrote {merge_into_checkpoint(arguments.into, arguments.out, loras)}")
        return
    checkpoint = _checkpoint(arguments)
    merged = merge_loras(
        [(read_lora(path), strength) for path, strength in loras],
        mode=arguments.mode,
        rank=arguments.rank,
        base=base_weights(checkpoint) if checkpoint else None,
    )
    print(f"Wrote {save_lora(arguments.out, merged.tensors, merged.metadata, arguments.dtype)}")


def run_resize(arguments: argparse.Namespace) -> None:
    from ..blip3o_core.lora.files import read_lora
    from .files.convert import base_weights
    from .files.merge import resize_lora
    from .files.write import save_lora

    checkpoint = _checkpoint(arguments)
    file, kept = resize_lora(
        read_lora(arguments.source),
        rank=arguments.rank,
        share=arguments.share,
        base=base_weights(checkpoint) if checkpoint else None,
    )
    print(f"Wrote {save_lora(arguments.out, file.tensors, file.metadata, arguments.dtype)}\n{kept}")


def run_extract(arguments: argparse.Namespace) -> None:
    from .files.merge import extract_lora
    from .files.write import save_lora

    file, kept = extract_lora(arguments.base, arguments.tuned, rank=arguments.rank, share=arguments.share)
    print(f"Wrote {save_lora(arguments.out, file.tensors, file.metadata, arguments.dtype)}\n{kept}")


def run_inspect(arguments: argparse.Namespace) -> int:
    from .files.write import describe, inspect_lora

    found = inspect_lora(arguments.lora)
    print(json.dumps(found, indent=2, ensure_ascii=False) if arguments.json else describe(found))
    return EXIT_BAD if found["problems"] else 0


def _checkpoint(arguments: argparse.Namespace) -> Any:
    from ..blip3o_core.checkpoints.layout import open_checkpoint

    return open_checkpoint(arguments.model) if arguments.model else None


# Inside


def _config(arguments: argparse.Namespace) -> LoraConfig:
    return read_config(arguments.config, arguments.overrides)


def _with_exit_code(run: Callable[[argparse.Namespace], int | None], arguments: argparse.Namespace) -> int:
    """The exit codes of runs beside those of every command."""
    from .records import Diverged, Interrupted, OutOfMemory

    try:
        return run(arguments) or 0
    except (Interrupted, Diverged, OutOfMemory) as error:
        from .run import exit_code

        print(error, file=sys.stderr)
        return exit_code(error)


class _Watcher:
    """Shows events as progress bars or JSON lines, and turns the first Ctrl-C or SIGTERM into a wish to stop."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.is_stopped = False
        self._to_stdout = arguments.events == "jsonl"
        self._path = Path(arguments.events) if arguments.events and not self._to_stdout else None
        self._is_quiet = arguments.quiet or self._to_stdout or int(os.environ.get("RANK", "0")) > 0
        self._bars: dict[str, Any] = {}
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> _Watcher:
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self._handlers[number] = signal.signal(number, self._on_signal)
            except ValueError:
                pass  # not the main thread: whoever called from there stops it another way
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        for bar in self._bars.values():
            bar.close()

    def should_stop(self) -> bool:
        return self.is_stopped

    def _on_signal(self, number: int, _: Any) -> None:
        if self.is_stopped:
            os._exit(128 + number)
        self.is_stopped = True
        print("Stopping after this step; everything is saved. Once more ends at once.", file=sys.stderr)

    def tell(self, event: dict[str, Any]) -> None:
        if self._to_stdout or self._path:
            line = json.dumps(event, ensure_ascii=False, default=str)
            if self._to_stdout:
                print(line, flush=True)
            else:
                with self._path.open("a", encoding="utf-8") as file:
                    file.write(line + "\n")
        if not self._is_quiet:
            self._show(event)

    def _show(self, event: dict[str, Any]) -> None:
        kind = event["event"]
        if kind == "phase":
            _advance(self._bar(event["phase"]), event["done"], event["total"])
        elif kind == "step":
            bar = self._bar("fit")
            bar.set_postfix_str(
                f"loss {_shown(event['loss'])}, {_minutes(event['seconds_left'])} left", refresh=False
            )
            _advance(bar, event["step"], event["total"])
        elif kind == "working":
            from .records import working_text

            bar = self._bar("fit")
            bar.set_postfix_str(working_text(event), refresh=False)
            _advance(bar, max(0, event["step"] - 1), event["total"])
        elif kind == "validation":
            numbers = ", ".join(
                f"{name} {_shown(event[name])}" for name in ("gain", "concept", "drift", "leak")
            )
            self._write(f"step {event['step']}: {numbers}")
        elif kind == "warning":
            self._write(event["message"])
        elif kind == "sample":
            self._write(f"step {event['step']}: {event['path']}")

    def _bar(self, name: str) -> Any:
        from tqdm import tqdm

        if name not in self._bars:
            self._bars[name] = tqdm(desc=name, unit="step" if name == "fit" else "item")
        return self._bars[name]

    def _write(self, text: str) -> None:
        from tqdm import tqdm

        tqdm.write(text, file=sys.stderr)


def _advance(bar: Any, done: int, total: int) -> None:
    bar.total = total
    bar.n = done
    bar.refresh()


@contextmanager
def _bar(is_quiet: bool, name: str) -> Iterator[Any]:
    from tqdm import tqdm

    with tqdm(desc=name, disable=is_quiet) as bar:
        yield bar


def _shown(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.3f}"


def _minutes(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
