"""The loop: exact resume, averaged weights, and many processes that train what one would."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from comfyui_blip3o.pretraining.trainer import LoopConfig, load_trained, train_stage
from torch import nn

ROOT = Path(__file__).resolve().parents[2]


class Line(nn.Module):
    """Least squares, small enough to follow by hand."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(3, 1)

    def forward(self, batch):
        loss = (self.layer(batch["x"]) - batch["y"]).square().mean()
        return loss, {"twice": 2 * loss}


def batch_of(step):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(8, 3, generator=generator)
    return {"x": x, "y": x.sum(dim=1, keepdim=True)}


def config(**changes):
    return LoopConfig(**{"steps": 4, "batch_size": 8, "warmup": 2, "log_every": 1, "ema": 0.9, **changes})


def weights(folder, key="model"):
    return torch.load(folder / "state.pt", weights_only=True)[key]


def test_two_and_two_steps_equal_four(tmp_path):
    train_stage(Line(), batch_of, config(), tmp_path / "whole")
    train_stage(Line(), batch_of, config(), tmp_path / "parts", stop_at=2)
    assert torch.load(tmp_path / "parts" / "state.pt", weights_only=True)["step"] == 2
    train_stage(Line(), batch_of, config(), tmp_path / "parts")
    for key in ("model", "average"):
        whole, parts = weights(tmp_path / "whole", key), weights(tmp_path / "parts", key)
        assert whole.keys() == parts.keys() and whole
        for name in whole:
            assert torch.equal(whole[name], parts[name])


def test_a_finished_run_trains_no_further(tmp_path):
    train_stage(Line(), batch_of, config(), tmp_path)
    before = weights(tmp_path)["layer.weight"].clone()
    train_stage(Line(), batch_of, config(), tmp_path)
    assert torch.equal(before, weights(tmp_path)["layer.weight"])


def test_the_loss_falls_and_every_step_is_logged(tmp_path):
    train_stage(Line(), batch_of, config(steps=60, learning_rate=0.05), tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 61))
    assert lines[-1]["loss"] < 0.2 * lines[0]["loss"]
    assert lines[0]["twice"] == pytest.approx(2 * lines[0]["loss"], rel=1e-4)
    assert list((tmp_path / "tensorboard").iterdir())


def test_averaged_weights_are_loaded_and_differ_from_the_last_ones(tmp_path):
    train_stage(Line(), batch_of, config(steps=20, learning_rate=0.05), tmp_path)
    stage = Line()
    assert load_trained(stage, tmp_path) == 20
    assert torch.equal(stage.layer.weight, weights(tmp_path, "average")["layer.weight"])
    assert not torch.allclose(stage.layer.weight, weights(tmp_path)["layer.weight"])


def test_the_rate_warms_up_and_falls_to_its_floor():
    loop = config(steps=100, warmup=10, learning_rate=1.0, final_learning_rate=0.1)
    assert loop.rate(0) == pytest.approx(0.1)
    assert loop.rate(10) == pytest.approx(1.0)
    assert loop.rate(55) == pytest.approx(0.55)
    assert loop.rate(100) == pytest.approx(0.1)


PROGRAM = """
import importlib.util, sys, torch
spec = importlib.util.spec_from_file_location("comfyui_blip3o", sys.argv[1] + "/__init__.py")
sys.modules["comfyui_blip3o"] = package = importlib.util.module_from_spec(spec)
spec.loader.exec_module(package)
spec = importlib.util.spec_from_file_location("line", sys.argv[1] + "/tests/pretraining/test_trainer.py")
line = importlib.util.module_from_spec(spec)
spec.loader.exec_module(line)
from pathlib import Path
line.train_stage(line.Line(), line.batch_of, line.config(steps=6), Path(sys.argv[2]))
"""


@pytest.mark.slow
def test_two_processes_train_what_one_would(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    for processes in (1, 2):
        environment = dict(
            os.environ, OMP_NUM_THREADS="1", ACCELERATE_USE_CPU="true", MASTER_ADDR="127.0.0.1"
        )
        environment.update(MASTER_PORT=str(29500 + os.getpid() % 1000), WORLD_SIZE=str(processes))
        running = []
        for rank in range(processes):
            ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {}
            if processes == 1:
                environment.pop("WORLD_SIZE", None)
            arguments = [sys.executable, str(program), str(ROOT), str(tmp_path / str(processes))]
            running.append(subprocess.Popen(arguments, env={**environment, **ranks}))
        assert [process.wait(timeout=120) for process in running] == [0] * processes
    logs = [
        [json.loads(line)["loss"] for line in (tmp_path / str(n) / "log.jsonl").read_text().splitlines()]
        for n in (1, 2)
    ]
    assert logs[0] == pytest.approx(logs[1], rel=1e-4)
    one, two = weights(tmp_path / "1"), weights(tmp_path / "2")
    torch.testing.assert_close(one["layer.weight"], two["layer.weight"], rtol=1e-4, atol=1e-5)
