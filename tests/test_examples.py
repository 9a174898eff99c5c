"""The scripts in examples/ do what their first line says, with settings that take seconds."""

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@pytest.fixture(autouse=True)
def one_thread():
    """The networks are tiny: two threads that wait for each other are slower than one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def mean_colour(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"), np.float64).mean((0, 1))


def difference(first: Path, second: Path) -> float:
    """Mean absolute difference of two pictures, 0 to 255."""
    with Image.open(first) as one, Image.open(second) as other:
        return float(np.abs(np.asarray(one, np.float64) - np.asarray(other, np.float64)).mean())


def test_draw_and_ask_prints_what_the_picture_shows(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    example("draw_and_ask").main(
        ["a red circle", "--preset", "fast", "--count", "1", "--out", str(tmp_path / "out")]
    )
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("00.png  a red circle  ->  a") and "red circle" in line.partition("->")[2]
    red, green, blue = mean_colour(tmp_path / "out" / "00.png")
    assert red > green + 5 and red > blue + 5


def test_vary_and_blend_walks_from_one_picture_to_the_other(tmp_path: Path):
    example("vary_and_blend").main(["--preset", "fast", "--between", "1", "--out", str(tmp_path)])
    names = ["first", "again", "towards_second", "between_0", "between_1", "between_2"]
    assert sorted(path.stem for path in tmp_path.iterdir()) == sorted(names)
    red_start, _, blue_start = mean_colour(tmp_path / "between_0.png")
    red_end, _, blue_end = mean_colour(tmp_path / "between_2.png")
    assert red_start > blue_start + 5 and blue_end > red_end + 5
    assert difference(tmp_path / "first.png", tmp_path / "again.png") < difference(
        tmp_path / "first.png", tmp_path / "between_2.png"
    )


@pytest.mark.slow
def test_train_lora_writes_a_file_that_changes_what_is_drawn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    quick = [
        "train.batch=2",
        "train.prior.prompts=[a green star]",
        "validate.every=0",
        "validate.sigmas=[0.5]",
    ]
    quick += ["validate.noise_seeds=1", "validate.drift_prompts=[a green star]"]
    arguments = [
        "--steps",
        "2",
        "--rank",
        "2",
        "--draw-steps",
        "2",
        "--preset",
        "fast",
        "--out",
        str(tmp_path),
    ]
    example("train_lora").main([*arguments, *(part for each in quick for part in ("--set", each))])
    printed = capsys.readouterr().out.splitlines()
    lora, report = Path(printed[-2]), Path(printed[-1])
    assert lora.suffix == ".safetensors" and lora.is_file() and report.name == "report.md"
    assert difference(tmp_path / "without.png", tmp_path / "with.png") > 0
