"""Nothing that another library says reaches a user's terminal."""

import logging
import os
import pickle
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import tiny_models
from comfyui_blip3o.blip3o_core import quiet
from comfyui_blip3o.blip3o_core.checkpoints.pickles import read_pickle
from comfyui_blip3o.blip3o_core.errors import WrongCheckpointError

ROOT = Path(__file__).resolve().parents[2]
# The checkout as a package, as tests/conftest.py loads it, then the command.
COMMAND = (
    "import sys; sys.path.insert(0, {tests!r}); import conftest; del sys.path[0];"
    "from comfyui_blip3o.cli import main; sys.exit(main())"
).format(tests=str(ROOT / "tests"))


def terminal(folder: Path, *arguments: str) -> tuple[str, str]:
    """(standard output, standard error) of a command started as a user starts it, with Python's own filters."""
    surroundings = {key: value for key, value in os.environ.items() if key != "PYTHONWARNINGS"}
    done = subprocess.run(
        [sys.executable, "-c", COMMAND, *arguments],
        cwd=folder,
        env=surroundings,
        capture_output=True,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A picture, a training set of it and the configuration of a LoRA run."""
    folder = tmp_path_factory.mktemp("work")
    tiny_models.picture(128, 128).save(folder / "given.png")
    (folder / "set").mkdir()
    tiny_models.picture(128, 128).save(folder / "set" / "one.png")
    (folder / "set" / "one.txt").write_text("a red circle", "utf-8")
    (folder / "run.yaml").write_text("run: {name: it}\ndata: {path: set}\nmodel: {device: cpu}\n", "utf-8")
    return folder


FEW = ["--steps", "2", "--pixel-steps", "2"]
SHORT_FIT = [
    *("--set", "train.steps=2"),
    *("--set", "train.prior.prompts=[a blue square]"),
    *("--set", "validate.drift_prompts=[a green star]"),
    *("--set", "validate.sigmas=[0.5]"),
    *("--set", "validate.noise_seeds=1"),
    *("--set", "sample.prompts=[a red circle]"),
    *("--set", "sample.steps=2"),
]


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", "a red circle", "-o", "drawn.png", *FEW, "--quiet"],
        ["generate", "a red circle", "-o", "sde.png", *FEW, "--pixel-sampler", "dpmpp_2m", "--quiet"],
        ["vary", "given.png", "-o", "varied.png", *FEW, "--quiet"],
        ["ask", "What is this?", "given.png", "--quiet"],
        ["caption", "given.png", "--quiet"],
        ["info"],
        ["doctor"],
        ["lora", "check", "run.yaml", "--quiet"],
        pytest.param(["lora", "run", "run.yaml", *SHORT_FIT, "--quiet"], marks=pytest.mark.slow),
    ],
    ids=lambda arguments: " ".join(arguments[:2] if arguments[0] == "lora" else arguments[:1]),
)
def test_a_quiet_command_leaves_standard_error_empty(folder: Path, arguments: list[str]) -> None:
    printed, errors = terminal(folder, *arguments)
    assert errors == ""
    assert printed


def test_without_quiet_only_our_progress_is_shown(folder: Path) -> None:
    _, errors = terminal(folder, "generate", "a red circle", "-o", "bars.png", *FEW)
    lines = [line for line in errors.replace("\r", "\n").splitlines() if line.strip()]
    assert lines and all("step" in line for line in lines), lines


def test_a_refused_pickle_brings_our_sentence_and_no_remark_of_pytorch(tmp_path: Path) -> None:
    path = tmp_path / "tower.bin"
    path.write_bytes(pickle.dumps({"a": 1.0}, protocol=4))

    def remarks() -> list[str]:
        with pytest.raises(WrongCheckpointError, match="tower.bin"):
            read_pickle(path)
        return [str(each.message) for each in heard]

    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        assert "pickle protocol 4" in remarks()[0]
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        quiet.silence()
        assert remarks() == []


def test_other_messages_of_the_same_logger_are_still_printed(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("transformers.modeling_rope_utils")
    logger.propagate, before = True, logger.propagate
    try:
        logger.addHandler(caplog.handler)
        logger.warning("Unrecognized keys in `rope_scaling` for 'rope_type'='default': {'rope_theta'}")
        logger.warning("Unrecognized keys in `rope_scaling` for 'rope_type'='default': {'another'}")
    finally:
        logger.removeHandler(caplog.handler)
        logger.propagate = before
    assert caplog.messages and all("another" in message for message in caplog.messages)
