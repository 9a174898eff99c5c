"""What a fit survives: kills, cancels, broken numbers, too little memory, a full disk."""

import errno
import json
import logging
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from comfyui_blip3o.blip3o_core.units import GIB
from comfyui_blip3o.lora_training.config import AdapterConfig
from comfyui_blip3o.lora_training.fit import loop as fit_module
from comfyui_blip3o.lora_training.fit import state as state_module
from comfyui_blip3o.lora_training.fit.adapters import Adapter, attach
from comfyui_blip3o.lora_training.fit.loop import fit, load_result
from comfyui_blip3o.lora_training.fit.state import NoSpace, newest_state
from comfyui_blip3o.lora_training.memory import needed_bytes, plan_step
from comfyui_blip3o.lora_training.records import Diverged, Interrupted, OutOfMemory
from safetensors.torch import load_file
from tiny_models import build_dit
from tiny_training import lora_config, run_fit, same, stop_after, training_data, validation
from torch import Tensor

SCRIPT = Path(__file__).parents[1] / "support" / "forked_fits.py"


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(sys, "getdlopenflags"), reason="needs os.fork")
def test_fifty_kills_at_random_moments_and_writes_change_nothing(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, str(SCRIPT), "kills", str(tmp_path), "50"],
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.splitlines()[-1])
    assert found["killed"] == 50 and not found["others"], run.stderr
    assert found["states_lost"] == 0
    assert found["deepest"] > 20
    assert found["equal"] == [True, True, True] and found["losses_equal"]
    assert found["best_steps"] == [21, 21]


def break_loss(monkeypatch: pytest.MonkeyPatch, is_broken: Callable[[int], bool]) -> list[int]:
    """Make the loss NaN at chosen calls, one a step; the list counts them."""
    real, calls = fit_module.velocity_loss, []

    def loss(*given: object) -> Tensor:
        calls.append(len(calls) + 1)
        return real(*given) * (math.nan if is_broken(len(calls)) else 1.0)

    monkeypatch.setattr(fit_module, "velocity_loss", loss)
    return calls


def test_cancel_finishes_the_step_and_leaves_a_usable_lora(tmp_path: Path) -> None:
    dit = build_dit()
    keys = list(dit.state_dict())
    with pytest.raises(Interrupted, match="after step 2 of 6"):
        fit(lora_config(tmp_path), training_data(), dit, should_stop=stop_after(2))
    assert list(dit.state_dict()) == keys  # the adapter is off again
    result = load_result(tmp_path / "run")
    assert (result.steps, result.stopped_because, len(result.losses)) == (2, "interrupted", 2)
    adapter = attach(dit, AdapterConfig(rank=4, alpha=4.0))
    adapter.load_state_dict(load_file(tmp_path / "run" / "state" / "step_000002" / "adapter.safetensors"))
    assert adapter.problems() == []
    assert same(adapter.state_dict(), result.last)


def test_states_are_saved_as_often_as_asked_and_only_so_many_kept(tmp_path: Path) -> None:
    run_fit(tmp_path, save__every_seconds=0, save__keep=2)
    states = tmp_path / "run" / "state"
    assert sorted(path.name for path in states.iterdir()) == ["step_000005", "step_000006"]


def test_a_step_that_is_not_finite_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights: list[dict[str, Tensor]] = []

    def look(adapter: Adapter, step: int) -> object:
        weights.append(adapter.weights())
        return validation(step)

    events: list[dict[str, object]] = []
    break_loss(monkeypatch, lambda call: call == 3)
    result = run_fit(
        tmp_path, validate=look, on_event=events.append, validate__every=1, train__ema=0, train__clip=0.0
    )
    assert same(weights[1], weights[2]) and not same(weights[2], weights[3])
    assert [math.isnan(loss) for loss in result.losses] == [False, False, True, False, False, False]
    assert [event["message"] for event in events if event["event"] == "warning"] == [
        "Step 3: the loss or its gradient is not finite; the step is skipped."
    ]


def test_three_broken_steps_roll_back_to_the_last_state_with_half_the_rate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = break_loss(monkeypatch, lambda call: call in (3, 4, 5))
    events: list[dict[str, object]] = []
    result = run_fit(tmp_path, on_event=events.append, train__schedule={"type": "constant", "warmup": 0})
    steps = [(event["step"], event["rate"]) for event in events if event["event"] == "step"]
    assert steps == [(step, 2e-4) for step in range(1, 6)] + [(step, 1e-4) for step in range(1, 7)]
    assert len(calls) == 11 and result.steps == 6 and all(map(math.isfinite, result.losses))
    assert "Back to step 0 with 0.5" in [e for e in events if e["event"] == "warning"][-1]["message"]


def test_the_halved_rate_survives_a_restart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    break_loss(monkeypatch, lambda call: call in (3, 4, 5))
    asked = 0

    def stop() -> bool:
        nonlocal asked
        asked += 1
        return asked == 7

    constant = {"type": "constant", "warmup": 0}
    with pytest.raises(Interrupted):
        run_fit(tmp_path, should_stop=stop, train__schedule=constant)
    events: list[dict[str, object]] = []
    run_fit(tmp_path, on_event=events.append, train__schedule=constant)
    assert {event["rate"] for event in events if event["event"] == "step"} == {1e-4}


def test_a_run_that_stays_broken_ends_after_two_roll_backs_and_keeps_the_best(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = break_loss(monkeypatch, lambda call: call > 4)
    options = {"save__every_seconds": 0, "train__steps": 20}
    with pytest.raises(Diverged, match="third time(?s:.*)best weights so far are saved"):
        run_fit(tmp_path, validate=lambda adapter, step: validation(step, gain=step), **options)
    assert len(calls) == 4 + 9
    result = load_result(tmp_path / "run")
    assert result.best_step == 6  # skipped steps leave the weights of step 4
    assert all(torch.isfinite(tensor).all() for tensor in result.best.values())


def test_a_gradient_far_above_the_usual_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = fit_module.velocity_loss, []

    def loss(*given: object) -> Tensor:
        calls.append(1)
        return real(*given) * (1000.0 if len(calls) == 15 else 1.0)

    monkeypatch.setattr(fit_module, "velocity_loss", loss)
    events: list[dict[str, object]] = []
    run_fit(tmp_path, on_event=events.append, train__steps=16)
    (warning,) = [event["message"] for event in events if event["event"] == "warning"]
    assert warning.startswith("Step 15: the gradient's norm is")


def limit_rows(monkeypatch: pytest.MonkeyPatch, limit: int, checkpointed_limit: int) -> None:
    """A DiT that runs out of memory above so many rows, while gradients are kept."""
    real = type(build_dit()).forward

    def forward(self: torch.nn.Module, grid: Tensor, *given: object, **named: object) -> Tensor:
        is_checkpointed = "forward" in vars(self.layers[0])
        if torch.is_grad_enabled() and len(grid) > (checkpointed_limit if is_checkpointed else limit):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return real(self, grid, *given, **named)

    monkeypatch.setattr(type(build_dit()), "forward", forward)


@pytest.mark.parametrize(
    ("limit", "checkpointed_limit", "told"),
    [
        (1, 1, ["micro batches of 2", "micro batches of 1"]),
        (0, 1, ["micro batches of 2", "micro batches of 1", "gradient checkpointing"]),
    ],
)
def test_too_little_memory_shrinks_the_calls_and_not_the_batch(
    limit: int, checkpointed_limit: int, told: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = run_fit(tmp_path / "enough")
    limit_rows(monkeypatch, limit, checkpointed_limit)
    events: list[dict[str, object]] = []
    result = run_fit(tmp_path / "little", on_event=events.append)
    warnings = [event["message"] for event in events if event["event"] == "warning"]
    assert [warning.removeprefix("Out of memory: going on with ") for warning in warnings] == [
        f"{t}." for t in told
    ]
    assert result.losses == pytest.approx(expected.losses, rel=1e-5)
    for key, value in expected.last.items():
        assert torch.allclose(result.last[key], value, atol=2e-5)


def test_memory_that_is_never_enough_ends_with_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit_rows(monkeypatch, 0, 0)
    with pytest.raises(OutOfMemory, match="even for one sample with gradient checkpointing(?s:.*)2.00 GiB"):
        run_fit(tmp_path)
    assert newest_state(tmp_path / "run" / "state").step == 0


def test_other_errors_of_the_network_are_not_taken_for_lack_of_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> Tensor:
        raise RuntimeError("shapes cannot be multiplied")

    monkeypatch.setattr(fit_module, "velocity_loss", broken)
    with pytest.raises(RuntimeError, match="multiplied"):
        run_fit(tmp_path)


def test_a_full_disk_ends_the_run_with_the_older_state_intact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight = run_fit(tmp_path / "straight")
    real, calls = state_module.save_file, []

    def full(*given: object, **named: object) -> None:
        calls.append(1)
        if len(calls) > 4:  # two files a state
            raise OSError(errno.ENOSPC, "No space left on device")
        real(*given, **named)

    monkeypatch.setattr(state_module, "save_file", full)
    with pytest.raises(NoSpace, match="No space left on device(?s:.*)make room"):
        run_fit(tmp_path / "full", save__every_seconds=0)
    assert newest_state(tmp_path / "full" / "run" / "state").step == 1
    monkeypatch.undo()
    assert same(run_fit(tmp_path / "full").last, straight.last)


def test_a_damaged_newest_state_costs_one_interval_only(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    straight = run_fit(tmp_path / "straight")
    with pytest.raises(Interrupted):
        run_fit(tmp_path / "damaged", should_stop=stop_after(4), save__every_seconds=0)
    file = tmp_path / "damaged" / "run" / "state" / "step_000004" / "optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with caplog.at_level(logging.WARNING):
        resumed = run_fit(tmp_path / "damaged")
    assert "step_000004" in caplog.text
    assert same(resumed.last, straight.last) and resumed.losses == straight.losses


def test_weights_that_never_moved_are_not_called_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = fit_module.velocity_loss
    monkeypatch.setattr(fit_module, "velocity_loss", lambda *given: real(*given) * 0.0)
    with pytest.raises(Diverged, match="lora_B.weight is still zero"):
        run_fit(tmp_path, train__optimizer={"weight_decay": 0.0})


def test_the_memory_plan_takes_the_largest_micro_batch_that_fits() -> None:
    dit = build_dit()
    given = {"features": 64, "ema": True, "device": torch.device("cpu")}

    def needs(size: int, is_checkpointed: bool) -> int:
        return needed_bytes(dit, 1000, size, features=64, grad_checkpoint=is_checkpointed, ema=True)

    assert plan_step(dit, 1000, 8, **given).micro_batch == 8
    assert plan_step(dit, 1000, 8, free=needs(4, False), **given).micro_batch == 4
    tight = plan_step(dit, 1000, 8, free=needs(1, False) - 1, **given)
    assert tight.grad_checkpoint and tight.needed <= needs(1, False)
    assert " free" in tight.text() and "gradient checkpointing" in tight.text()
    chosen = plan_step(dit, 1000, 8, free=needs(1, False), micro_batch=6, grad_checkpoint=False, **given)
    assert (chosen.micro_batch, chosen.grad_checkpoint) == (6, False)


def test_the_memory_plan_of_the_published_network_is_that_of_its_parts() -> None:
    from comfyui_blip3o.blip3o_core.config import NextDiTConfig
    from comfyui_blip3o.blip3o_core.models.nextdit import NextDiT

    with torch.device("meta"):
        dit = NextDiT(NextDiTConfig()).to(torch.bfloat16)
    weights = needed_bytes(dit, 0, 0, features=64, grad_checkpoint=False, ema=False)
    assert weights == 2 * 1_365_010_336
    whole = needed_bytes(dit, 17_444_864, 8, features=64, grad_checkpoint=False, ema=False)
    assert whole / GIB == pytest.approx(2.54 + 0.26 + 8 * 275 / 1024, abs=0.1)
    recomputed = needed_bytes(dit, 17_444_864, 8, features=64, grad_checkpoint=True, ema=False)
    assert recomputed / GIB == pytest.approx(2.54 + 0.26 + 8 * 17 / 1024, abs=0.1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_planned_activations_are_those_that_autograd_keeps(dtype: torch.dtype) -> None:
    from comfyui_blip3o.blip3o_core.config import NextDiTConfig
    from comfyui_blip3o.blip3o_core.models.nextdit import NextDiT

    kept: dict[int, int] = {}
    planned: dict[int, int] = {}
    for layers in (1, 2):
        sizes = NextDiTConfig(
            dim=256, layers=layers, heads=4, kv_heads=4, in_channels=256, conditioning_dim=512, ffn_dim=695,
            time_dim=146,
        )  # fmt: skip
        dit = NextDiT(sizes).to(dtype)
        adapter = attach(dit, AdapterConfig(rank=2))
        weights = {tensor.untyped_storage().data_ptr() for tensor in dit.parameters()}
        storages: dict[int, Tensor] = {}

        def keep(tensor: Tensor, storages: dict[int, Tensor] = storages) -> Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with adapter.autocast(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            dit(torch.randn(4, 256, 8, 8), torch.full((4,), 500.0), torch.randn(4, 64, 512))
        kept[layers] = sum(
            tensor.untyped_storage().nbytes() for place, tensor in storages.items() if place not in weights
        )
        options = {"features": 64, "grad_checkpoint": False, "ema": False}
        planned[layers] = needed_bytes(dit, 0, 4, **options) - needed_bytes(dit, 0, 0, **options)
    assert planned[2] - planned[1] == pytest.approx(kept[2] - kept[1], rel=0.15)
