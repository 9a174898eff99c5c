"""The package that pip builds holds what the checkout holds, and every list of dependencies agrees."""

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

tomllib = pytest.importorskip("tomllib", reason="needs Python 3.11")

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
# Folders of the checkout that are not part of the package.
OUTSIDE = {"tests", "benchmarks", "docs", "locks", ".ci", ".github"}


def tracked_files() -> list[str]:
    listing = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listing.returncode:
        pytest.skip("not a git checkout")
    return listing.stdout.splitlines()


def test_requirements_equal_the_dependencies():
    lines = (ROOT / "requirements.txt").read_text("utf-8").split()
    assert lines == PROJECT["project"]["dependencies"]


def test_no_dependency_is_pinned_or_capped():
    groups = [PROJECT["project"]["dependencies"], *PROJECT["project"]["optional-dependencies"].values()]
    for requirement in (item for group in groups for item in group):
        assert not re.search(r"==|<|~=", requirement), requirement


def test_torch_is_left_to_comfyui_but_comes_with_the_command():
    assert not any(item.startswith("torch>") for item in PROJECT["project"]["dependencies"])
    assert any(item.startswith("torch>") for item in PROJECT["project"]["optional-dependencies"]["cli"])


def test_every_folder_with_code_is_in_the_package_list():
    listed = set(PROJECT["tool"]["setuptools"]["packages"])
    for path in tracked_files():
        parts = Path(path).parts
        if path.endswith(".py") and parts[0] not in OUTSIDE and path != "dev.py":
            assert ".".join(["comfyui_blip3o", *parts[:-1]]) in listed, path


@pytest.mark.slow
def test_the_wheel_holds_every_tracked_file_of_the_package(tmp_path: Path):
    # From a clean copy: a stale build folder in the checkout would hide a missing package.
    copy = tmp_path / "copy"
    files = [path for path in tracked_files() if (ROOT / path).is_file()]
    for path in files:
        target = copy / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((ROOT / path).read_bytes())
    command = [
        sys.executable,
        "-m",
        "build",
        "--wheel",
        "--no-isolation",
        "--outdir",
        str(tmp_path),
        str(copy),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    wheel = next(tmp_path.glob("*.whl"))
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("comfyui_blip3o/")}
    at_root = {"__init__.py", "dev.py", "py.typed"}  # every module beside __init__.py travels with it
    expected = {
        f"comfyui_blip3o/{path}"
        for path in files
        if path in at_root or (len(Path(path).parts) > 1 and Path(path).parts[0] not in OUTSIDE)
    }
    assert packed == expected
