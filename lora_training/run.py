"""A run from pictures to a proven LoRA: check, features, conditioning, fit, prove, export; each can be done again alone.

Image encoder, backbone, DiT and decoder are never needed together: on a GPU one of them is there at a time. (Where the
backbone itself learns, it stays beside the DiT.)
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from ..blip3o_core.checkpoints.safetensor_files import write_safetensors
from ..blip3o_core.checkpoints.save import write_json, write_text
from ..blip3o_core.drawing.noise import seeded_noise
from ..blip3o_core.drawing.sampling import FeatureSettings
from ..blip3o_core.errors import BadInputError, Blip3oError, MissingFilesError, WrongAdapterError
from ..blip3o_core.images import to_rgb
from ..blip3o_core.picture_files import FORMAT_VERSION, save_png
from ..blip3o_core.pipeline import PUBLISHED_NEGATIVE_PROMPT, Blip3oPipeline
from ..blip3o_core.untrusted import parse_object, parse_yaml
from .check import Report, check
from .config import LoraConfig, to_tree, to_yaml
from .data.cache import CACHE_NAME, cache_conditioning, cache_features, cache_keys, load_data, open_pipeline
from .data.crops import choose_views, cut, read_mask
from .data.dataset import Dataset, scan_run
from .files.convert import convert_lora
from .files.write import lora_metadata, lora_tensors, save_lora
from .fit.adapters import Adapter, attach
from .fit.loop import FitResult, fit, load_result
from .prompts import drift_prompts
from .proof.ceiling import Ceiling, decode_pictures, measure_ceiling, picture_sheet, separability
from .proof.judge import (
    Judge,
    Scorecard,
    conditioning_of,
    draw_features,
    extra_prompts,
    known_conditioning,
    sample_prompts,
    verdicts,
)
from .proof.plot import EVENTS_NAME, read_history, write_metrics, write_plot
from .proof.report import REPORT_NAME, SCORECARD_NAME, write_report
from .records import (
    PASSING,
    PHASES,
    Diverged,
    EventSink,
    Interrupted,
    OutOfMemory,
    StopCheck,
    TrainingData,
)

CONFIG_NAME, DATA_NAME, FINAL = "config.yaml", "data.json", "final"
CEILING_PICTURES, SHOWN_OTHERS = 6, 2
# Settings that a begun run may change: they do not change what it learns, or say how long.
CHANGEABLE = (
    "run.dir", "model.root", "model.image_encoder", "model.decoder", "model.device", "model.compile", "data.path", "adapter.start_from",
    "train.prior.reg_path", "train.steps", "train.micro_batch", "train.grad_checkpoint", "validate", "sample", "save",
    "monitor",
)  # fmt: skip
EXIT_DONE, EXIT_BAD, EXIT_INTERRUPTED, EXIT_DIVERGED, EXIT_MEMORY = 0, 2, 3, 4, 5
# Largest difference between trainer and finished file, in standard deviations of the velocity, by what is rounded.
SAME_EXACT, SAME_ROUNDED, SAME_QUANTISED = 1e-4, 5e-2, 0.5


@dataclass(frozen=True)
class RunResult:
    """What a run ended with.

    Attributes:
        lora: the finished file; None when the phase "export" was not asked for.
        last: the weights after the last step, beside it.
        scorecard: see prove.Scorecard; None when nothing was proven yet.
    """

    folder: Path
    lora: Path | None
    last: Path | None
    scorecard: dict[str, Any] | None
    best_step: int
    steps: int
    seconds: float
    report: Path | None


def exit_code(error: BaseException) -> int:
    """Exit code of a program that a run ended with this error."""
    for kind, code in (
        (Interrupted, EXIT_INTERRUPTED),
        (Diverged, EXIT_DIVERGED),
        (OutOfMemory, EXIT_MEMORY),
    ):
        if isinstance(error, kind):
            return code
    return EXIT_BAD


def train_lora(
    config: LoraConfig,
    *,
    on_event: EventSink = lambda event: None,
    should_stop: StopCheck = lambda: False,
    only: Sequence[str] | None = None,
    fresh: bool = False,
) -> RunResult:
    """Train a LoRA; a run that was stopped or killed goes on where it was.

    Args:
        on_event: gets every event of records.EVENTS; they are also appended to events.jsonl.
        should_stop: asked after every step and picture; True = save and raise Interrupted.
        only: phases of records.PHASES to do; None = all.
        fresh: forget what an earlier run of this name has learned.

    Raises:
        TrainingDataError: the preflight found errors; all are named.
        BadInputError: the run was begun with other settings or pictures, or a phase is unknown.
        MissingFilesError: a phase needs what an earlier one has not made.
        Interrupted: asked to stop; the weights so far are in final/NAME_interrupted.safetensors.
        Diverged, OutOfMemory: see fit.
    """
    phases = PHASES if only is None else tuple(only)
    unknown = [phase for phase in phases if phase not in PHASES]
    if unknown:
        raise BadInputError(f'There is no phase "{unknown[0]}"; choose from {", ".join(PHASES)}.')
    run = _Run(config, on_event, should_stop)
    try:
        return run.go(phases, fresh)
    except Blip3oError as error:
        run.tell({"event": "error", "message": str(error), "code": exit_code(error)})
        raise


def read_result(config: LoraConfig, seconds: float = 0.0) -> RunResult:
    """What a finished run left in its folder.

    Raises:
        MissingFilesError: it has learned nothing yet.
    """
    run = _Run(config, lambda event: None, lambda: False)
    reached = run.earlier()
    lora, last, report = run.final, run.path_of("last"), run.folder / REPORT_NAME
    return RunResult(
        run.folder,
        lora if lora.is_file() else None,
        last if last.is_file() else None,
        _read_json(run.folder / SCORECARD_NAME),
        reached.best_step,
        reached.steps,
        seconds,
        report if report.is_file() else None,
    )


def cache_folder(config: LoraConfig) -> Path:
    """Where features and conditioning of all runs beside this one are kept."""
    return config.run.dir / CACHE_NAME


def fill_cache(
    config: LoraConfig,
    dataset: Dataset,
    pipeline: Blip3oPipeline,
    on_event: EventSink,
    should_stop: StopCheck,
    phases: Sequence[str] = PHASES,
) -> None:
    """Phases "features" and "conditioning". Raises: see cache_features."""
    folder = cache_folder(config)
    if "features" in phases:
        cache_features(config, dataset, pipeline, folder, on_event, should_stop)
    if "conditioning" in phases:
        _cache_negative(config, pipeline)
        cache_conditioning(config, dataset, extra_prompts(config), pipeline, folder, on_event, should_stop)


class _Run:
    def __init__(self, config: LoraConfig, on_event: EventSink, should_stop: StopCheck) -> None:
        self.config, self.should_stop = config, should_stop
        self.folder = config.folder
        self._on_event = on_event
        self.is_main = int(os.environ.get("RANK", "0")) == 0
        self.started = time.monotonic()
        self._unwritten: list[str] = []
        self._pipeline: Blip3oPipeline | None = None
        self._data: TrainingData | None = None

    @property
    def pipeline(self) -> Blip3oPipeline:
        if self._pipeline is None:
            self._pipeline = open_pipeline(self.config)
        return self._pipeline

    @property
    def final(self) -> Path:
        return self.folder / FINAL / f"{self.config.run.name}.safetensors"

    def tell(self, event: dict[str, Any]) -> None:
        """Write an event down, then pass it on."""
        if not self.is_main:
            return
        event = {key: _finite(value) for key, value in event.items()}
        if event["event"] not in PASSING:
            self._unwritten.append(json.dumps({**event, "time": round(time.time(), 3)}, default=str))
        # Before its folder is there nothing has been done that is worth keeping.
        if self._unwritten and self.folder.is_dir():
            with (self.folder / EVENTS_NAME).open("a", encoding="utf-8") as file:
                file.write("\n".join(self._unwritten) + "\n")
            self._unwritten.clear()
        self._on_event(event)

    def go(self, phases: Sequence[str], fresh: bool) -> RunResult:
        config = self.config
        if config.monitor.tensorboard and self.is_main:
            self._on_event = _with_tensorboard(self.folder, self._on_event)
        if self.is_main:
            dataset = self._prepare(phases, fresh)
            fill_cache(config, dataset, self.pipeline, self.tell, self.should_stop, phases)
        _wait_for_all()
        if not self.is_main:
            dataset = scan_run(config)
        result = None
        if "fit" in phases:
            result = self._fit(dataset)
        if not self.is_main:
            return RunResult(self.folder, None, None, None, 0, 0, self._seconds(), None)
        if not {"prove", "export"} & set(phases):
            steps = result.steps if result else 0
            return RunResult(self.folder, None, None, None, 0, steps, self._seconds(), None)
        return self._finish(phases, dataset, result or self.earlier())

    # Phases

    def _prepare(self, phases: Sequence[str], fresh: bool) -> Dataset:
        config = self.config
        if "check" in phases:
            self.tell({"event": "phase", "phase": "check", "done": 0, "total": 1})
            report = check(config)
            report.raise_for_errors()
            assert report.dataset is not None, "a report without errors has a dataset"
            dataset = report.dataset
        else:
            report, dataset = None, scan_run(config)
        if fresh and self.folder.is_dir():
            shutil.rmtree(self.folder / "state", ignore_errors=True)
            for name in (EVENTS_NAME, CONFIG_NAME, DATA_NAME):
                (self.folder / name).unlink(missing_ok=True)
        self._compare_settings()
        self.folder.mkdir(parents=True, exist_ok=True)
        write_text(self.folder / CONFIG_NAME, to_yaml(config))
        if report is not None:
            for problem in report.warnings:
                self.tell({"event": "warning", "message": str(problem)})
            self.tell({"event": "phase", "phase": "check", "done": 1, "total": 1})
        return dataset

    def _compare_settings(self) -> None:
        """Raise where the folder holds states of a run with other settings: going on would mix the two."""
        known = self.folder / CONFIG_NAME
        if not known.is_file() or load_result(self.folder) is None:
            return
        try:
            before = parse_yaml(known.read_text("utf-8"))
        except ValueError as error:
            raise self._damaged(known, error) from error
        changed = [
            name for name in _differences(before, to_tree(self.config)) if not name.startswith(CHANGEABLE)
        ]
        if changed:
            raise BadInputError(
                f'The run "{self.config.run.name}" was begun with other settings: {", ".join(changed)}.\n'
                "Choose another run.name, set them back, or begin anew with --fresh."
            )

    def _damaged(self, path: Path, error: ValueError) -> BadInputError:
        return BadInputError(
            f'"{path}" is damaged ({error}), so nobody can tell whether this run may go on.\n'
            "Choose another run.name, or begin again with --fresh."
        )

    def _compare_data(self, data: TrainingData) -> None:
        path = self.folder / DATA_NAME
        if path.is_file() and load_result(self.folder) is not None:
            try:
                before = parse_object(path.read_bytes())
            except ValueError as error:
                raise self._damaged(path, error) from error
            changed = [name for name, value in data.fingerprint.items() if before.get(name) != value]
            if changed:
                raise BadInputError(
                    f'Since the run "{self.config.run.name}" was begun, this has changed: {", ".join(changed)}.\n'
                    "Choose another run.name, or begin anew with --fresh."
                )
        write_json(path, data.fingerprint)

    def _load(self, dataset: Dataset) -> TrainingData:
        if self._data is None:
            self._data = load_data(
                self.config, dataset, extra_prompts(self.config), cache_folder(self.config)
            )
        return self._data

    def _fit(self, dataset: Dataset) -> FitResult:
        config = self.config
        data = self._load(dataset)
        if self.is_main:
            self._compare_data(data)
        judge = Judge(config, data)
        learns_backbone = config.needs_backbone
        try:
            return fit(
                config,
                data,
                self.pipeline.networks.take("dit"),
                backbone=self.pipeline.networks.take("backbone") if learns_backbone else None,
                tokenizer=self.pipeline.tokenizer if learns_backbone else None,
                folder=self.folder,
                on_event=self.tell,
                should_stop=self.should_stop,
                validate=judge.validate,
                sample=lambda adapter, step: self._draw_samples(adapter, step, data),
            )
        except Blip3oError as error:
            reached = load_result(self.folder) if self.is_main else None
            if reached is not None and reached.steps > 0:
                word = "interrupted" if isinstance(error, Interrupted) else "best"
                self._save(reached.best, word, reached.best_step, None, data)
            raise

    def earlier(self) -> FitResult:
        result = load_result(self.folder)
        if result is None or result.steps == 0:
            raise MissingFilesError(
                f'The run "{self.config.run.name}" has learned nothing yet.\nTrain it first: blip3o lora run'
            )
        return result

    def _finish(self, phases: Sequence[str], dataset: Dataset, result: FitResult) -> RunResult:
        config, data = self.config, self._load(dataset)
        adapter = result.adapter or self._attach(result)
        known = known_conditioning(data)
        report = lora = last = None
        scorecard = _read_json(self.folder / SCORECARD_NAME)
        expected = self._fixed_velocity(adapter.dit, conditioning_of(adapter, _two(known), known), adapter)
        base = proof = None
        if "prove" in phases:
            self.tell({"event": "phase", "phase": "prove", "done": 0, "total": 3})
            numbers = Judge(config, data, is_final=True).validate(adapter, result.best_step)
            drawn = self._before_and_after(adapter, known)
            self.tell({"event": "phase", "phase": "prove", "done": 1, "total": 3})
            proof = numbers, drawn
        if config.adapter.type == "full":
            with adapter.enabled(False):
                base = {name: tensor.clone() for name, tensor in adapter.dit.state_dict().items()}
        adapter.remove()
        del adapter
        result.adapter = None
        self.pipeline.unload()
        if proof is not None:
            try:
                scorecard, report = self._prove(dataset, data, result, *proof)
            except Interrupted:
                self._save(result.best, "interrupted", result.best_step, None, data, base)
                raise
        if "export" in phases:
            self.tell({"event": "phase", "phase": "export", "done": 0, "total": 1})
            lora = self._save(result.best, "", result.best_step, scorecard, data, base)
            last = self._save(result.last, "last", result.steps, None, data, base)
            self._compare_file(lora, expected, _two(known), known)
            for kind in config.save.formats:
                target = self.folder / FINAL / kind
                target = target if kind == "peft" else target / lora.name
                target.parent.mkdir(parents=True, exist_ok=True)
                convert_lora(lora, target, kind, checkpoint=self.pipeline.files)
            self.path_of("interrupted").unlink(missing_ok=True)
            self.tell({"event": "phase", "phase": "export", "done": 1, "total": 1})
        self.pipeline.unload()
        seconds = self._seconds()
        self.tell({"event": "done", "lora": str(lora or ""), "scorecard": scorecard, "seconds": seconds})
        return RunResult(self.folder, lora, last, scorecard, result.best_step, result.steps, seconds, report)

    def _prove(
        self, dataset: Dataset, data: TrainingData, result: FitResult, numbers: Any, drawn: _Drawn
    ) -> tuple[dict[str, Any], Path]:
        """Decode, measure the ceiling and write the report; no network is loaded before or after."""
        config = self.config
        pictures: dict[str, str] = {}
        if "decoder" in self.pipeline.files.component_bytes:
            sheets = [
                decode_pictures(
                    self.pipeline, features, [config.sample.seed] * len(features), away, "standard"
                )
                for features, away in (drawn.before, drawn.after)
            ]
            pairs = [picture for pair in zip(*sheets, strict=True) for picture in pair]
            picture_sheet(pairs, 4).save(self.folder / "before_and_after.png")
            pictures["Without and with the LoRA, same seeds"] = "before_and_after.png"
        self.tell({"event": "phase", "phase": "prove", "done": 2, "total": 3})
        ceiling = None
        if pictures:
            ceiling = ceiling_of(config, dataset, self.pipeline, self.should_stop)
            ceiling.sheet(3).save(self.folder / "ceiling.png")
            pictures["Training pictures and what the decoder can show of them"] = "ceiling.png"
        write_metrics(self.folder)
        notes = list(dict.fromkeys(read_history(self.folder).warnings))
        write_plot(self.folder)
        pictures["Loss and scores"] = "loss.png"
        separable = separability_of(data)
        card = Scorecard(
            numbers,
            result.steps,
            len(data.held_out),
            verdicts(numbers, config, has_held_out=bool(data.held_out)),
            ceiling=ceiling.mean if ceiling else None,
            separability=separable.score if separable else None,
        )
        if separable and separable.level != "clear":
            notes.append(separable.text)
        if ceiling:
            notes.append(ceiling.text())
        notes.append("Words drawn above: " + "; ".join(f'"{prompt}"' for prompt in drawn.prompts))
        report = write_report(self.folder, config, card, pictures, notes)
        self.tell({"event": "phase", "phase": "prove", "done": 3, "total": 3})
        return card.to_tree(), report

    # Pictures

    def _draw_samples(self, adapter: Adapter, step: int, data: TrainingData) -> None:
        """Pictures of the sample prompts, as `blip3o generate` draws them with this LoRA and seed."""
        prompts = sample_prompts(self.config)
        if not prompts or "decoder" not in self.pipeline.files.component_bytes:
            return
        features, away = self._features(adapter, prompts, known_conditioning(data))
        seed = self.config.sample.seed
        with self._room(adapter):
            pictures = decode_pictures(self.pipeline, features, [seed] * len(prompts), away, "standard")
        for number, (prompt, picture) in enumerate(zip(prompts, pictures, strict=True)):
            path = self.folder / "samples" / f"step_{step:06d}_{number}.png"
            save_png(
                picture,
                path,
                {
                    "version": FORMAT_VERSION,
                    "prompt": prompt,
                    "seed": seed,
                    "features": asdict(self._settings),
                    "run": self.config.run.name,
                    "step": step,
                },
            )
            self.tell({"event": "sample", "step": step, "prompt": prompt, "path": str(path)})
        write_plot(self.folder)

    @property
    def _settings(self) -> FeatureSettings:
        return FeatureSettings(steps=self.config.sample.steps, guidance_scale=self.config.sample.cfg)

    def _features(
        self, adapter: Adapter, prompts: Sequence[str], known: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Features (B, N, C) of prompts, all from the run's sample seed, and of the decoder's negative (1, N, C)."""
        conditioning = conditioning_of(adapter, prompts, known)
        features = draw_features(
            adapter, conditioning, [self.config.sample.seed] * len(prompts), self._settings
        )
        negative = _read_negative(self.config, self.pipeline).to(conditioning)
        return features, draw_features(adapter, negative, [0], self._settings)

    def _before_and_after(self, adapter: Adapter, known: dict[str, Tensor]) -> _Drawn:
        others = [prompt for prompt in drift_prompts(self.config) if prompt in known][:SHOWN_OTHERS]
        prompts = tuple(dict.fromkeys((*sample_prompts(self.config), *others))) or tuple(_two(known))
        after = self._features(adapter, prompts, known)
        with adapter.enabled(False):
            before = self._features(adapter, prompts, known)
        return _Drawn(prompts, before, after)

    @contextmanager
    def _room(self, adapter: Adapter) -> Iterator[None]:
        """Within it a GPU is free for the decoder."""
        place = next(adapter.dit.parameters()).device
        networks = [network for network in (adapter.dit, adapter.backbone) if network is not None]
        if place.type == "cpu":
            yield
            return
        for network in networks:
            network.to("cpu")
        if place.type == "cuda":
            torch.cuda.empty_cache()
        try:
            yield
        finally:
            for network in networks:
                network.to(place)

    # Files

    def path_of(self, word: str) -> Path:
        return self.final.with_stem(f"{self.final.stem}_{word}") if word else self.final

    def _save(
        self,
        state: dict[str, Tensor],
        word: str,
        step: int,
        scorecard: dict[str, Any] | None,
        data: TrainingData,
        base: dict[str, Tensor] | None = None,
    ) -> Path:
        path = self.path_of(word)
        path.parent.mkdir(parents=True, exist_ok=True)
        if self.config.adapter.type == "full" and base is None:
            base = dict(open_pipeline(self.config).dit.state_dict())
        tensors = lora_tensors(state, base)
        metadata = lora_metadata(
            self.config,
            self.pipeline.files,
            tensors,
            pictures=len(data.train),
            steps=step,
            scorecard=scorecard,
            captions=[prompt for sample in data.train for prompt in sample.prompts],
        )
        save_lora(path, tensors, metadata, self.config.save.dtype)
        self.tell({"event": "saved", "step": step, "path": str(path)})
        return path

    def _attach(self, result: FitResult) -> Adapter:
        config, pipeline = self.config, self.pipeline
        learns_backbone = config.needs_backbone
        dit = pipeline.networks.take("dit")
        if pipeline.device.type == "cpu":
            dit.float()
        adapter = attach(
            dit,
            config.adapter,
            seed=config.run.seed,
            backbone=pipeline.networks.take("backbone") if learns_backbone else None,
            tokenizer=pipeline.tokenizer if learns_backbone else None,
        )
        adapter.load_state_dict(result.best)
        return adapter

    @torch.no_grad()
    def _fixed_velocity(self, dit: Any, conditioning: Tensor, adapter: Adapter | None) -> Tensor:
        """One forward that only depends on the weights."""
        side = math.isqrt(conditioning.shape[1])
        place = next(dit.parameters()).device
        noise = seeded_noise(range(len(conditioning)), (dit.config.in_channels, side, side)).to(place)
        timesteps = torch.linspace(250, 750, len(conditioning), device=place).round()
        if adapter is None:
            dtype = next(dit.parameters()).dtype
            return dit(noise.to(dtype), timesteps, conditioning.to(place, dtype)).float().cpu()
        with adapter.autocast():
            return dit(noise, timesteps, conditioning).float().cpu()

    def _compare_file(
        self, path: Path, expected: Tensor, prompts: Sequence[str], known: dict[str, Tensor]
    ) -> None:
        """Raise unless the file, loaded as for drawing, gives the trainer's velocity."""
        self.pipeline.load_lora(path)
        try:
            if self.config.needs_backbone:
                conditioning = self.pipeline.encode_prompts(prompts).float()
                self.pipeline.unload("backbone")
            else:
                conditioning = torch.stack([known[prompt] for prompt in prompts]).float()
            dit = self.pipeline.networks.take("dit")
            if self.pipeline.device.type == "cpu":
                dit.float()
            found = self._fixed_velocity(dit, conditioning, None)
        finally:
            self.pipeline.unload_loras()
        off = ((found - expected).abs().max() / expected.std()).item()
        if self.config.model.base_dtype in ("fp8", "nf4"):
            limit = SAME_QUANTISED
        elif self.config.save.dtype == "fp32" and self.pipeline.device.type == "cpu":
            limit = SAME_EXACT
        else:
            limit = SAME_ROUNDED
        if not off <= limit:
            raise WrongAdapterError(
                f'The finished file "{path.name}" does not do what the trainer did (off by {off:.2g}, allowed {limit:g}).\n'
                "Save with save.dtype fp32; if it happens again, report it with config.yaml."
            )

    def _seconds(self) -> float:
        return round(time.monotonic() - self.started, 2)


@dataclass(frozen=True)
class _Drawn:
    """Features of prompts and of the decoder's negative, without and with the LoRA."""

    prompts: tuple[str, ...]
    before: tuple[Tensor, Tensor]
    after: tuple[Tensor, Tensor]


def training_pictures(config: LoraConfig, dataset: Dataset, limit: int | None = None) -> list[Image.Image]:
    """The first view of each training picture, RGB, cut as the encoder gets it."""
    pictures = []
    for item in dataset.train[:limit]:
        picture = item.open()
        view = choose_views(item, picture, config.data, read_mask(item, picture, config.data))[0]
        pictures.append(to_rgb(cut(picture, view, config.data)))
    return pictures


def ceiling_of(
    config: LoraConfig,
    dataset: Dataset,
    pipeline: Blip3oPipeline,
    should_stop: StopCheck | None = None,
    limit: int = CEILING_PICTURES,
    on_progress: Callable[[int, int], None] | None = None,
) -> Ceiling:
    """The ceiling of a run's first training pictures. Raises: see measure_ceiling."""
    return measure_ceiling(
        pipeline,
        training_pictures(config, dataset, limit),
        names=[item.name for item in dataset.train[:limit]],
        should_stop=should_stop,
        on_progress=on_progress,
    )


def separability_of(data: TrainingData) -> Any:
    """How far the trigger moves the conditioning of the captions; None without trigger or class word."""
    pairs = [sample for sample in data.train if sample.class_conditioning is not None]
    if not pairs:
        return None
    usual = {sample.class_prompts[0]: sample.class_conditioning[0] for sample in pairs} | data.prompts
    return separability(
        torch.stack([sample.conditioning[0] for sample in pairs]),
        torch.stack([sample.class_conditioning[0] for sample in pairs]),
        torch.stack(list(usual.values())),
    )


def plan_text(config: LoraConfig, report: Report) -> str:
    """What a run would do, for people."""
    dataset = report.dataset
    pictures = len(dataset.train) if dataset else 0
    steps = config.steps(pictures) if pictures else 0
    held_out = len(dataset.held_out) if dataset else 0
    adapter = config.adapter
    lines = [
        f"Run {config.run.name}: {pictures} pictures, {held_out} held out, {steps} steps of {config.batch} samples.",
        f"Adapter: {adapter.type}, rank {adapter.rank}, {adapter.targets}"
        f"{', queries' if adapter.queries else ''}; {config.train.optimizer.name} at {config.train.optimizer.lr:g}; "
        f"preservation {'on' if config.uses_preservation else 'off'}.",
        f"Folder: {config.folder}",
    ]
    return "\n".join(lines)


def _two(known: dict[str, Tensor]) -> list[str]:
    return list(known)[:2]


def _negative_path(config: LoraConfig) -> Path:
    keys = cache_keys(config)
    return cache_folder(config) / "negative" / f"{keys.backbone}-{keys.dtype_name}.safetensors"


def _cache_negative(config: LoraConfig, pipeline: Blip3oPipeline) -> None:
    """Keep the conditioning (1, Q, D) of what the decoder steers away from; as published it has no chat template."""
    path = _negative_path(config)
    if path.is_file():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    pipeline.unload()
    encoded = pipeline.encode_prompts(PUBLISHED_NEGATIVE_PROMPT, use_template=False)
    write_safetensors({"value": encoded.cpu().contiguous()}, path)


def _read_negative(config: LoraConfig, pipeline: Blip3oPipeline) -> Tensor:
    path = _negative_path(config)
    if not path.is_file():
        raise MissingFilesError(
            f'"{path.name}" is missing in the cache.\nFill it again with: blip3o lora cache'
        )
    return load_file(str(path))["value"]


def _with_tensorboard(folder: Path, on_event: EventSink) -> EventSink:
    """Also write steps and validations where TensorBoard looks.

    Raises:
        MissingFilesError: TensorBoard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise MissingFilesError(
            "monitor.tensorboard is on, but TensorBoard is not installed.\n"
            "Install it with: pip install tensorboard, or set monitor.tensorboard to false."
        ) from error
    writer = SummaryWriter(str(folder / "tensorboard"))

    def sink(event: dict[str, Any]) -> None:
        if event["event"] in ("step", "validation"):
            for name, value in event.items():
                if isinstance(value, float):
                    writer.add_scalar(f"{event['event']}/{name}", value, event["step"])
        if event["event"] in ("validation", "done", "error"):
            writer.flush()
        on_event(event)

    return sink


def _wait_for_all() -> None:
    """Until the first process has filled the cache."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from accelerate import PartialState

        PartialState().wait_for_everyone()


def _differences(before: Any, now: Any, name: str = "") -> list[str]:
    """Names of settings whose values differ."""
    if isinstance(before, dict) and isinstance(now, dict):
        return [
            found
            for key in dict.fromkeys((*before, *now))
            for found in _differences(before.get(key), now.get(key), f"{name}.{key}" if name else key)
        ]
    return [] if before == now else [name]


def _finite(value: Any) -> Any:
    """JSON has no NaN."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _read_json(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text("utf-8")) if path.is_file() else None
