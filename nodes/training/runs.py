"""What Train LoRA does: settings to a configuration, a child process, and its finished LoRA into models/loras."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.model_management as memory

from ...blip3o_core.errors import BadInputError, Blip3oError
from ...blip3o_core.lora.files import read_lora
from ...blip3o_core.untrusted import parse_yaml, quote
from ...lora_training.config import LoraConfig, parse_config, to_tree
from ...lora_training.proof.plot import EVENTS_NAME, read_history
from ..native import host
from ..native.sockets import LoraModel, TrainingPictures, TrainingRun
from .data import raise_for_errors
from .folders import check_name, checkpoint_root, content_hash, publish_lora, run_digest, runs_folder
from .progress import Chart, Outcome, TrainingWatcher, watch

logger = logging.getLogger(__name__)
MINUTE = 60
# Folder of a run's finished files.
FINAL = "final"


# Settings that lead to a file or a device.
PLACES = (
    *(
        "run.dir",
        "run.name",
        "data.path",
        "model.root",
        "model.image_encoder",
        "model.decoder",
        "model.device",
    ),
    *("adapter.start_from", "train.prior.reg_path"),
)


@dataclass(frozen=True)
class Trained:
    """What came out of a training.

    Attributes:
        losses: of every step.
        lora_name: file in models/loras.
        chart: what the node's chart shows.
    """

    lora: LoraModel
    losses: list[float]
    run: TrainingRun
    lora_name: str
    scorecard: str
    chart: dict[str, Any]


def training_settings(as_preset: str, **choices: Any) -> dict[str, Any]:
    """A partial configuration tree of what Training Settings says; what it leaves to the preset is absent.

    Raises:
        BadInputError: a line of `more` sets something unknown.
    """
    adapter: dict[str, Any] = {"queries": choices["tune_queries"]}
    if choices["adapter"] != as_preset:
        adapter["type"] = choices["adapter"]
    if choices["rank"]:
        adapter |= {"rank": choices["rank"], "alpha": float(choices["rank"])}
    if choices["targets"] != as_preset:
        adapter["targets"] = choices["targets"]
    preservation = {"auto": "auto", "on": True, "off": False}[choices["preservation"]]
    sample: dict[str, Any] = {"every": choices["sample_every"]}
    prompts = [line.strip() for line in choices["sample_prompts"].splitlines() if line.strip()]
    if prompts:
        sample["prompts"] = prompts
    tree: dict[str, Any] = {
        "run": {"seed": choices["seed"]},
        "model": {"base_dtype": choices["base_dtype"]},
        "adapter": adapter,
        "train": {
            "batch": choices["batch_size"] or "auto",
            "optimizer": {"name": choices["optimizer"], "lr": choices["learning_rate"]},
            "schedule": {"type": choices["schedule"]},
            "prior": {"dop": preservation, "weight": choices["preservation_weight"]},
        },
        "sample": sample,
    }
    more = [line.strip() for line in choices.get("more", "").splitlines() if line.strip()]
    for line in more:
        check_setting(line)
    # Read once with stand-ins for what the other nodes say, so that a mistake shows on this node.
    parse_config({**tree, "run": {"name": "settings"}, "data": {"path": "."}}, more)
    return {"tree": tree, "more": more}


def check_setting(line: str) -> None:
    """Refuse a line of the settings text that says where something lies: a workflow of a stranger must not lead anywhere.

    Raises:
        BadInputError: it sets a path, a device, a whole section or a pattern, or its value cannot be read.
    """
    name, _, text = (part.strip() for part in line.partition("="))
    if name in PLACES or name.split(".")[0] == "run":
        raise BadInputError(
            f'"{name}" cannot be set on this node: a workflow must not say where files lie or what computes.\n'
            "Leave that line out. Folders and models are chosen on the nodes; a configuration of your own in a shell can say it."
        )
    try:
        value = parse_yaml(text)
    except ValueError as error:
        raise BadInputError(
            f'The value of "{name}" cannot be read ({error}).\nWrite it like train.ema=0.99'
        ) from error
    if isinstance(value, dict) or "." not in name:
        raise BadInputError(
            f'"{quote(line)}" sets a whole section.\nSet one value a line, like train.ema=0.99'
        )
    if name == "adapter.targets" and not re.fullmatch(r"[\w.|-]+", str(value), re.ASCII):
        raise BadInputError(
            f"adapter.targets is {quote(value)}; on this node it names layers, like attn1.to_q, with | between several."
        )


def run_configuration(
    dataset: TrainingPictures,
    checkpoint: str,
    *,
    name: str,
    preset: str,
    steps: int,
    settings: Mapping[str, Any] | None,
) -> LoraConfig:
    """The configuration of a run; its folder's name tells it from every other one.

    Raises:
        BadInputError: the name, or a setting.
    """
    name = check_name(name)
    tree = dict(settings["tree"]) if settings else {}
    tree["run"] = {**tree.get("run", {}), "name": name, "dir": runs_folder().as_posix(), "preset": preset}
    tree["data"] = to_tree(dataset.config)
    tree["model"] = {**tree.get("model", {}), "root": checkpoint_root(checkpoint)}
    tree["train"] = {**tree.get("train", {}), "steps": steps or "auto"}
    more = settings["more"] if settings else []
    for line in more:
        check_setting(line)
    config = parse_config(tree, more)
    plain = parse_config(tree)
    for place in PLACES:
        # Once more where it counts, whatever way a text may find around the check of its names.
        if _at(config, place) != _at(plain, place):
            raise BadInputError(f'"{place}" cannot be set on this node.\nLeave it out of the settings text.')
    digest = run_digest(config, content_hash(dataset.config.path), host.checkpoint_fingerprint(checkpoint))
    # Where it computes does not count for the name: a run may go on elsewhere.
    return parse_config(
        {
            **to_tree(config),
            "run": {**to_tree(config.run), "name": f"{name}-{digest}"},
            "model": {**to_tree(config.model), "device": str(memory.get_torch_device())},
        }
    )


def _at(config: LoraConfig, place: str) -> Any:
    value: Any = config
    for name in place.split("."):
        value = getattr(value, name)
    return value


def train_lora(
    dataset: TrainingPictures,
    checkpoint: str,
    *,
    name: str,
    preset: str,
    steps: int,
    minutes: float,
    settings: Mapping[str, Any] | None,
    node_id: str | None,
) -> Trained:
    """Train in a process of its own, or take the finished run of the same inputs.

    Args:
        minutes: 0 = no limit.

    Raises:
        InterruptProcessingException: the user pressed cancel; what was learned lies in models/loras.
        TrainingDataError: there are errors in the dataset.
        Blip3oError: what the training ended with.
    """
    from ...lora_training.check import check

    config = run_configuration(dataset, checkpoint, name=name, preset=preset, steps=steps, settings=settings)
    finished = config.folder / FINAL / f"{config.run.name}.safetensors"
    if not is_finished(config.folder, finished):
        raise_for_errors(check(config))
        watcher = TrainingWatcher(node_id)
        outcome = _run(config, watcher, minutes * MINUTE if minutes else None)
        if outcome.is_interrupted or outcome.is_out_of_time:
            finished = _interrupted(finished)
        if outcome.is_interrupted:
            _leave(config, check_name(name), finished, watcher)
        if not finished.is_file():
            raise Blip3oError(
                f"{minutes:g} minutes were too short to learn anything.\nAllow more, or 0 for no limit."
            )
    history = read_history(config.folder)
    file = read_lora(finished)
    return Trained(
        lora=LoraModel(file.canonical, file.metadata),
        losses=[event["loss"] for event in history.steps.values() if event["loss"] is not None],
        run=TrainingRun(config.folder),
        lora_name=publish_lora(finished, check_name(name), config.run.name),
        scorecard=scorecard_text(config.folder),
        chart=Chart.of_history(history).as_dict(),
    )


def is_finished(folder: Path, lora: Path) -> bool:
    """Whether a run has come to its end; its folder's name stands for all of its inputs."""
    if not lora.is_file():
        return False
    events = (folder / EVENTS_NAME).read_text("utf-8", "replace").splitlines()
    # Looked for as text: a killed run may leave half a line.
    return bool(events) and '"event": "done"' in events[-1]


def _run(config: LoraConfig, watcher: TrainingWatcher, seconds: float | None) -> Outcome:
    """Train in a child process.

    Raises:
        Blip3oError: what it ended with, unless it was asked to stop.
    """
    from ...lora_training.child import start_training

    # The training needs the memory that ComfyUI's models hold.
    memory.unload_all_models()
    memory.soft_empty_cache()
    with start_training(config) as training:
        outcome = watch(training, watcher, seconds)
        if not (outcome.is_interrupted or outcome.is_out_of_time):
            training.result()
    return outcome


def _interrupted(finished: Path) -> Path:
    """The file that a run leaves when it is stopped; the finished one if it was just through."""
    return finished if finished.is_file() else finished.with_stem(f"{finished.stem}_interrupted")


def _leave(config: LoraConfig, name: str, lora: Path, watcher: TrainingWatcher) -> None:
    """After a cancel: put what was learned into models/loras, say so, and hand the cancel on to ComfyUI."""
    kept = ""
    if lora.is_file():
        kept = f' What was learned so far is "{publish_lora(lora, name, config.run.name)}" in models/loras.'
    watcher.say(f"Stopped.{kept} The same inputs go on from there.")
    logger.info("Training %s stopped.%s", config.run.name, kept)
    raise memory.InterruptProcessingException()


def scorecard_text(folder: Path) -> str:
    """What a run has proven, in words and numbers; a run that was stopped has proven nothing yet."""
    from ...lora_training.proof.report import MEANINGS, SCORECARD_NAME

    path = folder / SCORECARD_NAME
    if not path.is_file():
        return "Stopped before it was measured; the same inputs without a time limit go on."
    card = json.loads(path.read_text("utf-8"))
    numbers = [f"{name} {card[name]:.3f}: {meaning}" for name, meaning in MEANINGS.items()]
    return "\n".join([*card["verdicts"], f"Best step: {card['step']} of {card['steps']}", *numbers])
