"""`blip3o lora`, run in this process on a tiny checkpoint; the signal in a process of its own."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_models
import yaml
from comfyui_blip3o.cli import main
from comfyui_blip3o.lora_training import cli as lora_cli
from comfyui_blip3o.lora_training.config import read_config
from comfyui_blip3o.lora_training.data.captioning import MODES
from comfyui_blip3o.lora_training.files.convert import FORMATS
from comfyui_blip3o.lora_training.records import EVENTS
from lora_runs import write_run
from PIL import Image
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = (
    "new", "check", "caption", "cache", "fit", "resume", "prove", "run", "sample", "sweep", "convert", "merge",
    "resize", "extract", "inspect",
)  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.write_checkpoint(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def trained(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of a finished run."""
    root = tmp_path_factory.mktemp("trained")
    assert main(["lora", "run", str(write_run(root, model)), "--quiet"]) == 0
    return root / "runs" / "it" / "final" / "it.safetensors"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["lora", command, "--help"])
    assert ended.value.code == 0 and "usage: " in capsys.readouterr().out


def test_help_needs_neither_torch_nor_peft() -> None:
    code = (
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('comfyui_blip3o', {str(ROOT / '__init__.py')!r},"
        f" submodule_search_locations=[{str(ROOT)!r}])\n"
        "sys.modules['comfyui_blip3o'] = package = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(package)\n"
        "from comfyui_blip3o.cli import build_parser\n"
        "build_parser().format_help()\n"
        "print(sorted({'torch', 'peft', 'transformers'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_new_writes_a_configuration_that_is_read_back_and_never_replaces_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = [
        "lora",
        "new",
        "my_dog",
        "--data",
        "my pictures",
        "--trigger",
        'ohwx: "dog"',
        "--class",
        "dog",
    ]
    assert main(arguments) == 0
    config = read_config(tmp_path / "my_dog.yaml")
    assert (config.data.trigger, config.data.class_word) == ('ohwx: "dog"', "dog")
    assert config.data.path == tmp_path / "my pictures" and config.adapter.rank == 32
    capsys.readouterr()
    assert main(arguments) == 2 and "--force" in capsys.readouterr().err
    assert main([*arguments, "--force", "--preset", "light"]) == 0
    assert read_config(tmp_path / "my_dog.yaml").adapter.targets == "cross"


def test_check_names_what_is_wrong_and_ends_with_two(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_run(tmp_path, model)
    assert main(["lora", "check", str(config)]) == 0
    assert "3 pictures" in capsys.readouterr().out
    (tmp_path / "pictures" / "picture_2.txt").unlink()
    assert main(["lora", "check", str(config), "--json"]) == 2
    problems = json.loads(capsys.readouterr().out)["problems"]
    assert ["picture_2.png"] in [problem["names"] for problem in problems if problem["level"] == "error"]
    assert main(["lora", "run", str(config), "--quiet"]) == 2
    assert "picture_2.png" in capsys.readouterr().err


def test_an_unknown_setting_is_answered_with_the_nearest(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["lora", "run", str(write_run(tmp_path, model)), "--set", "train.optimiser.lr=1"]) == 2
    assert "optimizer" in capsys.readouterr().err


def test_check_shows_ceiling_and_separability(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sheet = tmp_path / "ceiling.png"
    config = write_run(tmp_path, model)
    assert main(["lora", "check", str(config), "--ceiling", str(sheet), "--trigger", "--quiet"]) == 0
    said = capsys.readouterr().out
    assert "Ceiling: " in said and "Trigger: " in said
    assert Image.open(sheet).width > 300


def test_a_dry_run_computes_nothing(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lora", "run", str(write_run(tmp_path, model)), "--dry-run", "--set", "train.steps=77"]) == 0
    assert "77 steps" in capsys.readouterr().out
    assert not (tmp_path / "runs").exists()


def test_phases_one_by_one_make_the_same_file_as_one_run(
    trained: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = str(write_run(tmp_path, model))
    for command in ("cache", "fit", "prove"):
        assert main(["lora", command, config, "--quiet"]) == 0
    ours, theirs = load_file(tmp_path / "runs/it/final/it.safetensors"), load_file(trained)
    assert all((ours[key] == theirs[key]).all() for key in theirs)
    capsys.readouterr()
    assert main(["lora", "cache", config, "--verify"]) == 0
    assert "Every entry is right" in capsys.readouterr().out


def test_events_come_as_json_lines_of_known_kinds(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_run(tmp_path, model)
    assert main(["lora", "run", str(config), "--events", "jsonl", "--set", "train.steps=1"]) == 0
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {event["event"] for event in events} <= set(EVENTS) and events[-1]["event"] == "done"
    target = tmp_path / "log.jsonl"
    assert main(["lora", "resume", str(tmp_path / "runs" / "it"), "--events", str(target), "--quiet"]) == 0
    assert json.loads(target.read_text("utf-8").splitlines()[-1])["event"] == "done"


def test_the_first_signal_finishes_the_step_saves_and_ends_with_three(model: Path, tmp_path: Path) -> None:
    config = write_run(tmp_path, model, train__steps=5000)
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", RUN_CLI, "lora", "run", str(config), "--events", "jsonl"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    for line in process.stdout:
        if json.loads(line)["event"] == "step":
            process.send_signal(signal.SIGTERM)
            break
    events = [json.loads(line) for line in process.stdout]
    assert process.wait() == 3, process.stderr.read()
    assert events[-1]["event"] == "error" and events[-1]["code"] == 3
    assert (tmp_path / "runs/it/final/it_interrupted.safetensors").is_file()


def test_a_sweep_trains_every_combination_and_compares_them(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = str(write_run(tmp_path, model, train__steps=1))
    grid = ["--grid", "adapter.rank=1,2", "train.optimizer.lr=1e-3"]
    assert main(["lora", "sweep", config, *grid, "--dry-run"]) == 0
    assert not (tmp_path / "runs").exists()
    assert main(["lora", "sweep", config, *grid, "--quiet"]) == 0
    table = (tmp_path / "runs" / "it_sweep.md").read_text("utf-8")
    assert "it_00" in table and "it_01" in table and "adapter.rank=2" in table
    ranks = [
        yaml.safe_load((tmp_path / f"runs/it_0{n}/config.yaml").read_text())["adapter"]["rank"]
        for n in (0, 1)
    ]
    assert ranks == [1, 2]


def test_combinations_are_every_choice_and_lists_stay_whole() -> None:
    found = list(lora_cli._combinations(["a.b=1,2", "c=[0.1,0.2]"]))
    assert found == [["a.b=1", "c=[0.1, 0.2]"], ["a.b=2", "c=[0.1, 0.2]"]]


def test_a_sample_sheet_has_a_column_for_every_strength(
    trained: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "grid.png"
    arguments = [
        "lora",
        "sample",
        str(trained),
        "a red cute cat",
        "--strengths",
        "0",
        "1",
        "--model",
        str(model),
    ]
    assert main([*arguments, "-o", str(out), "--quiet", "--preset", "fast"]) == 0
    sheet = Image.open(out)
    half = (sheet.width - 4) // 2
    left, right = (sheet.crop((x, 16, x + half, sheet.height)) for x in (0, half + 4))
    assert left.tobytes() != right.tobytes()


def test_files_are_inspected_converted_merged_and_resized(
    trained: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["lora", "inspect", str(trained), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["trigger"] == "red cute" and found["steps"] == 3
    kohya, back = tmp_path / "kohya.safetensors", tmp_path / "back.safetensors"
    assert main(["lora", "convert", str(trained), str(kohya), "--to", "kohya"]) == 0
    assert main(["lora", "convert", str(kohya), str(back), "--to", "comfy"]) == 0
    ours, theirs = load_file(back), load_file(trained)
    assert ours.keys() == theirs.keys() and all((ours[key] == theirs[key]).all() for key in theirs)
    merged, small = tmp_path / "merged.safetensors", tmp_path / "small.safetensors"
    assert main(["lora", "merge", f"{trained}:0.5", str(trained), "-o", str(merged), "--dtype", "fp32"]) == 0
    assert main(["lora", "resize", str(merged), "--rank", "1", "-o", str(small)]) == 0
    assert small.stat().st_size < merged.stat().st_size
    assert main(["lora", "inspect", str(tmp_path / "none.safetensors")]) == 2


RUN_CLI = (
    "import importlib.util, sys\n"
    f"spec = importlib.util.spec_from_file_location('comfyui_blip3o', {str(ROOT / '__init__.py')!r},"
    f" submodule_search_locations=[{str(ROOT)!r}])\n"
    "sys.modules['comfyui_blip3o'] = package = importlib.util.module_from_spec(spec)\n"
    "spec.loader.exec_module(package)\n"
    "from comfyui_blip3o.cli import main\n"
    "sys.exit(main(sys.argv[1:]))\n"
)


def test_the_choices_that_are_known_without_importing_torch_are_all_there_are():
    assert set(lora_cli.MODES) == set(MODES)
    assert set(lora_cli.FORMATS) == set(FORMATS)
