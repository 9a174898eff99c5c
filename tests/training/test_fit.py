"""The loop of a fit: it learns, keeps what it should, chooses the best step and goes on exactly."""

import dataclasses
import hashlib
import os
from pathlib import Path

import pytest
import torch
from comfyui_blip3o.blip3o_core.drawing.flow import mix
from comfyui_blip3o.blip3o_core.drawing.sampling import to_grid, to_tokens
from comfyui_blip3o.blip3o_core.errors import TrainingDataError
from comfyui_blip3o.blip3o_core.language.prompts import TextTokenizer
from comfyui_blip3o.blip3o_core.models.nextdit import NextDiT
from comfyui_blip3o.lora_training.config import AdapterConfig, TimestepConfig
from comfyui_blip3o.lora_training.fit.adapters import Adapter, attach
from comfyui_blip3o.lora_training.fit.loop import fit, is_better, load_result
from comfyui_blip3o.lora_training.fit.objective import draw_noise, draw_rows, draw_sigmas
from comfyui_blip3o.lora_training.records import Interrupted, TrainingData, Validation
from tiny_models import build_backbone, build_dit, write_tokenizer
from tiny_training import lora_config, run_fit, same, stop_after, training_data, validation
from torch import Tensor

FAST = {"train__optimizer": {"lr": 1e-2}, "train__schedule": {"warmup": 2}}


def velocities(dit: NextDiT, features: Tensor, noise: Tensor, sigmas: Tensor, conditioning: Tensor) -> Tensor:
    return to_tokens(dit(to_grid(mix(features, noise, sigmas), (4, 4)), sigmas * 1000, conditioning))


def test_the_first_step_is_the_published_loss_on_the_drawn_rows(tmp_path: Path) -> None:
    data = training_data()
    result = run_fit(tmp_path, data, train__steps=1, train__cond_drop=0.5)
    rows = draw_rows(data.train, (), 0, 0, 4, 0.5)
    features = torch.stack([row.features for row in rows])
    conditioning = torch.stack(
        [row.sample.conditioning[0] * (0.0 if row.is_dropped else 1.0) for row in rows]
    )
    noise, sigmas = draw_noise(0, 0, range(4), features.shape[1:]), draw_sigmas(TimestepConfig(), 0, 0, 4)
    predicted = velocities(build_dit(), features, noise, sigmas, conditioning)
    assert any(row.is_dropped for row in rows) and not all(row.is_dropped for row in rows)
    assert result.losses == [pytest.approx(((predicted - (noise - features)) ** 2).mean().item(), rel=1e-5)]


def test_a_picture_counts_as_much_as_its_weight(tmp_path: Path) -> None:
    def weighted(*weights: float) -> TrainingData:
        data = training_data(len(weights))
        train = [
            dataclasses.replace(sample, weight=weight)
            for sample, weight in zip(data.train, weights, strict=True)
        ]
        return dataclasses.replace(data, train=tuple(train))

    def first_loss(name: str, *weights: float) -> float:
        return run_fit(tmp_path / name, weighted(*weights), train__steps=1, train__cond_drop=0).losses[0]

    even = first_loss("even", 1, 1, 1, 1)
    assert first_loss("half", 0.5, 0.5, 0.5, 0.5) == pytest.approx(even / 2)
    parts = [first_loss(f"{place}", *(float(place == each) for each in range(4))) for place in range(4)]
    assert min(parts) > 0 and sum(parts) == pytest.approx(even)


def test_masks_and_weights_of_pictures_count_in_the_loss(tmp_path: Path) -> None:
    data = training_data()
    mask = torch.zeros(2, 16)
    mask[:, 5:9] = 1.0
    samples = (
        dataclasses.replace(data.train[0], weights=mask),
        dataclasses.replace(data.train[1], weight=0.25),
    )
    data = dataclasses.replace(data, train=(*samples, *data.train[2:]))
    result = run_fit(tmp_path, data, train__steps=1, train__cond_drop=0)
    rows = draw_rows(data.train, (), 0, 0, 4, 0.0)
    features = torch.stack([row.features for row in rows])
    conditioning = torch.stack([row.sample.conditioning[0] for row in rows])
    noise, sigmas = draw_noise(0, 0, range(4), features.shape[1:]), draw_sigmas(TimestepConfig(), 0, 0, 4)
    square = (velocities(build_dit(), features, noise, sigmas, conditioning) - (noise - features)) ** 2
    each = {
        "picture 0": lambda row: square[row, 5:9].mean(),
        "picture 1": lambda row: 0.25 * square[row].mean(),
    }
    losses = [each.get(row.sample.name, lambda row: square[row].mean())(i) for i, row in enumerate(rows)]
    assert result.losses == [pytest.approx(torch.stack(losses).mean().item(), rel=1e-5)]


def test_gradients_are_cut_to_the_asked_norm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    norms: list[float] = []
    step = torch.optim.AdamW.step

    def watched(self: torch.optim.Optimizer) -> None:
        grads = [parameter.grad for group in self.param_groups for parameter in group["params"]]
        norms.append(torch.cat([grad.flatten() for grad in grads]).norm().item())
        step(self)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    events: list[dict[str, object]] = []
    run_fit(tmp_path / "cut", on_event=events.append, train__clip=0.01, train__steps=2)
    assert norms == pytest.approx([0.01, 0.01], rel=1e-4)
    assert events[1]["grad_norm"] > 0.01  # what is told is the norm before
    norms.clear()
    run_fit(tmp_path / "whole", train__clip=0.0, train__steps=1)
    assert norms == [pytest.approx(events[1]["grad_norm"], rel=1e-5)]


def test_preservation_of_no_weight_is_told_and_changes_nothing(tmp_path: Path) -> None:
    events: list[dict[str, object]] = []
    free = run_fit(tmp_path / "free")
    weightless = {"train__prior": {"dop": True, "weight": 0.0, "prompts": []}}
    kept = run_fit(tmp_path / "kept", on_event=events.append, train__micro_batch=4, **weightless)
    assert all(torch.allclose(kept.last[key], value, atol=1e-6) for key, value in free.last.items())
    told = [event["preservation"] for event in events if event["event"] == "step"]
    assert told[0] == pytest.approx(0, abs=1e-12) and told[-1] > 0  # the adapter starts as the base


def test_after_the_first_step_every_zero_half_has_a_gradient_and_every_other_after_the_second(
    tmp_path: Path,
) -> None:
    moved: dict[int, set[str]] = {}
    start: dict[str, Tensor] = {}

    def look(adapter: Adapter, step: int) -> Validation:
        now = adapter.weights()
        if not start:
            start.update(attach(build_dit(), AdapterConfig(rank=4, alpha=4.0)).weights())
        moved[step] = {name for name, value in now.items() if not torch.equal(value, start[name])}
        return validation(step)

    options = {"train__ema": 0, "train__optimizer": {"weight_decay": 0.0}, "validate__every": 1}
    run_fit(tmp_path, validate=look, train__steps=2, **options)
    assert moved[1] == {name for name in start if name.endswith("lora_B.weight")}
    assert moved[2] == set(start)


def test_micro_batches_and_gradient_checkpointing_learn_the_same(tmp_path: Path) -> None:
    prior = {"dop": True, "prompts": ["a red circle"]}
    whole = run_fit(tmp_path / "whole", train__prior=prior)
    small = run_fit(tmp_path / "small", train__prior=prior, train__micro_batch=3)
    recomputed = run_fit(tmp_path / "recomputed", train__prior=prior, train__grad_checkpoint=True)
    assert same(recomputed.last, whole.last)
    assert not any("forward" in vars(block) for block in recomputed.adapter.dit.layers)
    for key, value in whole.last.items():
        assert torch.allclose(small.last[key], value, atol=2e-5), key


KINDS = {
    "lora with everything": {"train__prior": {"dop": True, "prompts": ["a red circle"]}, "train__ema": 0.9},
    "dora": {"adapter__type": "dora"},
    "lokr": {"adapter__type": "lokr", "adapter__alpha": 3.0},
    "full": {"adapter__type": "full"},
    "queries": {"adapter__type": "queries"},
    "backbone and queries": {"adapter__queries": True, "adapter__backbone_rank": 2},
    "prodigy": {"train__optimizer": {"name": "prodigy", "lr": 1.0}},
    "schedule-free": {"train__optimizer": {"name": "schedule_free"}},
}


NEEDS = {"prodigy": ("prodigyopt",), "schedule-free": ("schedulefree",)}


@pytest.mark.parametrize("kind", KINDS)
def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(kind: str, tmp_path: Path) -> None:
    for package in NEEDS.get(kind, ()):
        pytest.importorskip(package)
    write_tokenizer(tmp_path)
    tokenizer = TextTokenizer(tmp_path)
    options = {**KINDS[kind], "train__steps": 8}

    def go(name: str, **more: object) -> object:
        def judge(adapter: Adapter, step: int) -> Validation:
            return validation(step, gain=-abs(step - 4))

        return run_fit(
            tmp_path / name, backbone=build_backbone(), tokenizer=tokenizer, validate=judge, **options, **more
        )

    straight = go("straight")
    for stop in (3, 2):
        torch.manual_seed(stop)  # what other code drew in between must not matter
        with pytest.raises(Interrupted, match="go on"):
            go("stopped", should_stop=stop_after(stop))
    resumed = go("stopped")
    assert resumed.losses == straight.losses and len(straight.losses) == 8
    for part in ("best", "last", "ema"):
        assert same(getattr(resumed, part), getattr(straight, part)), part
    assert resumed.best_step == straight.best_step == 4
    stored = load_result(tmp_path / "stopped" / "run")
    assert (
        same(stored.best, straight.best)
        and same(stored.ema, straight.ema)
        and same(stored.last, straight.last)
    )
    assert stored.best_validation == straight.best_validation
    assert stored.stopped_because == "steps"


def test_a_finished_run_returns_at_once(tmp_path: Path) -> None:
    first = run_fit(tmp_path)
    events: list[dict[str, object]] = []
    again = run_fit(tmp_path, on_event=events.append)
    assert same(again.last, first.last) and again.losses == first.losses
    assert [event["event"] for event in events] == ["saved"]


def test_a_finished_run_goes_on_when_asked_for_more(tmp_path: Path) -> None:
    judge = {"validate": lambda adapter, step: validation(step), "validate__every": 1}
    constant = {"train__schedule": {"type": "constant", "warmup": 0}}
    run_fit(tmp_path / "longer", train__steps=4, **constant)
    straight = run_fit(tmp_path / "straight", train__steps=7, **constant)
    assert same(run_fit(tmp_path / "longer", train__steps=7, **constant).last, straight.last)
    patient = run_fit(tmp_path / "patient", validate__patience=2, **judge)
    assert (patient.steps, patient.stopped_because) == (3, "patience")
    assert run_fit(tmp_path / "patient", validate__patience=2, **judge).steps == 3
    assert run_fit(tmp_path / "patient", validate__patience=0, **judge).steps == 6


def test_the_same_seed_writes_the_same_bytes_whatever_lies_about(tmp_path: Path) -> None:
    hashes = []
    for name in ("first", "second"):
        folder = tmp_path / name
        folder.mkdir()
        if name == "second":
            (folder / "unrelated.txt").write_text("something")
            torch.manual_seed(77)
        run_fit(folder, training_data(), train__prior={"dop": True, "prompts": ["a red circle"]})
        states = folder / "run" / "state" / "step_000006"
        hashes.append([hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(states.iterdir())])
    assert hashes[0] == hashes[1]
    other = run_fit(tmp_path / "third", run__seed=1)
    assert not same(other.last, load_result(tmp_path / "first" / "run").last)


def test_a_step_that_teaches_nothing_is_no_fault(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    result = run_fit(
        tmp_path,
        backbone=build_backbone(),
        tokenizer=TextTokenizer(tmp_path),
        adapter__type="queries",
        train__batch=1,
        train__steps=8,
        train__cond_drop=0.5,
    )
    assert len(result.losses) == 8


def test_events_tell_the_course_of_the_run(tmp_path: Path) -> None:
    events: list[dict[str, object]] = []
    drawn: list[int] = []
    run_fit(
        tmp_path,
        on_event=events.append,
        validate=lambda adapter, step: validation(step),
        sample=lambda adapter, step: drawn.append(step),
        sample__every=4,
        train__prior={"dop": True, "prompts": []},
    )
    kinds = [event["event"] for event in events]
    assert kinds.count("step") == 6 and kinds.count("validation") == 3 and kinds.count("saved") == 2
    step = events[kinds.index("step")]
    assert step.keys() == {
        "event", "step", "total", "loss", "preservation", "rate", "grad_norm", "seconds_left",
    }  # fmt: skip
    assert (step["step"], step["total"]) == (1, 6)
    assert drawn == [4, 6]


def test_validation_sees_the_averaged_weights_and_the_best_of_them_is_kept(tmp_path: Path) -> None:
    seen: dict[int, dict[str, Tensor]] = {}

    def look(adapter: Adapter, step: int) -> Validation:
        seen[step] = adapter.state_dict()
        return validation(step, gain={2: 0.1, 4: 0.5, 6: 0.3}[step])

    result = run_fit(tmp_path, validate=look, **FAST)
    assert result.best_step == 4 and result.best_validation.gain == 0.5
    assert same(result.best, seen[4]) and same(result.ema, seen[6])
    assert not same(result.last, seen[6])
    assert same(result.adapter.state_dict(), seen[4])


def test_the_average_follows_its_formula(tmp_path: Path) -> None:
    weights: list[dict[str, Tensor]] = []

    def look(adapter: Adapter, step: int) -> Validation:
        weights.append(adapter.weights())
        return validation(step)

    run_fit(tmp_path / "raw", validate=look, train__ema=0, validate__every=1, **FAST)
    result = run_fit(tmp_path / "averaged", train__ema=0.3, **FAST)
    average = attach(build_dit(), AdapterConfig(rank=4, alpha=4.0)).weights()
    for step, now in enumerate(weights, start=1):
        decay = min(0.3, (1 + step) / (10 + step))
        average = {name: decay * value + (1 - decay) * now[name] for name, value in average.items()}
    for name, value in average.items():
        assert torch.allclose(result.ema[name], value, atol=1e-6)


def test_a_run_that_no_longer_gets_better_stops_by_itself(tmp_path: Path) -> None:
    gains = iter([0.1, 0.4, 0.3, 0.4, 0.2, 0.9])
    result = run_fit(
        tmp_path,
        validate=lambda adapter, step: validation(step, gain=next(gains)),
        train__steps=30,
        validate__every=1,
        validate__patience=3,
    )
    assert (result.stopped_because, result.steps, result.best_step) == ("patience", 5, 2)
    assert load_result(tmp_path / "run").stopped_because == "patience"


def test_the_best_step_gains_most_among_those_that_drift_little() -> None:
    calm, wild = validation(1, gain=0.2, drift=0.1), validation(2, gain=0.9, drift=0.3)
    assert is_better(calm, None, 0.15)
    assert not is_better(wild, calm, 0.15)
    assert is_better(calm, wild, 0.15)
    assert is_better(validation(3, gain=0.3, drift=0.15), calm, 0.15)
    assert not is_better(validation(3, gain=0.2, drift=0.0), calm, 0.15)  # a tie goes to the earlier
    assert is_better(validation(3, gain=0.1, drift=0.2), wild, 0.15)  # neither keeps: less drift


def test_training_goes_on_from_a_lora_file(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    first = run_fit(tmp_path / "first", **FAST)
    save_file(first.last, tmp_path / "start.safetensors")
    starts: list[dict[str, Tensor]] = []

    def look(adapter: Adapter, step: int) -> Validation:
        starts.append(adapter.state_dict())
        return validation(step)

    options = {"train__steps": 1, "train__optimizer": {"lr": 1e-8}, "validate__every": 1}
    run_fit(
        tmp_path / "second", validate=look, adapter__start_from=str(tmp_path / "start.safetensors"), **options
    )
    assert all(torch.allclose(starts[0][key], value, atol=1e-6) for key, value in first.last.items())


@pytest.mark.parametrize("kind", ["fp8", "nf4", "bf16"])
def test_narrow_bases_learn(kind: str, tmp_path: Path) -> None:
    data = training_data()
    result = run_fit(tmp_path, data, model__base_dtype=kind, train__steps=40, **FAST)
    assert sum(result.losses[-10:]) < 0.8 * sum(result.losses[:10])


def test_no_state_of_accelerate_is_made_in_a_process_that_trains_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from accelerate.state import AcceleratorState, PartialState

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("accelerate was asked for process-wide state")

    assert "WORLD_SIZE" not in os.environ
    for kind in (AcceleratorState, PartialState):
        monkeypatch.setattr(kind, "__init__", refuse)
    assert run_fit(tmp_path).steps == 6


def test_fitting_works_inside_inference_mode_with_tensors_made_there(tmp_path: Path) -> None:
    expected = run_fit(tmp_path / "outside")
    with torch.inference_mode():
        data, dit = training_data(), build_dit()
        result = fit(lora_config(tmp_path / "inside"), data, dit)
    assert same(result.last, expected.last)


def test_data_of_another_model_and_no_data_are_refused(tmp_path: Path) -> None:
    data = training_data()
    wrong = dataclasses.replace(data.train[0], features=torch.zeros(1, 16, 5))
    with pytest.raises(TrainingDataError, match='"picture 0" was encoded by another model'):
        run_fit(tmp_path, dataclasses.replace(data, train=(wrong,)))
    with pytest.raises(TrainingDataError, match="no picture to train on"):
        run_fit(tmp_path, TrainingData(()))
