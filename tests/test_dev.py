"""dev.py installs what the locks say, and the locks say what pyproject.toml allows."""

import importlib.util
import os
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

tomllib = pytest.importorskip("tomllib", reason="needs Python 3.11")

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
SYSTEMS = {
    "Linux": {"sys_platform": "linux", "os_name": "posix", "platform_machine": "x86_64"},
    "Windows": {"sys_platform": "win32", "os_name": "nt", "platform_machine": "AMD64"},
    "Darwin": {"sys_platform": "darwin", "os_name": "posix", "platform_machine": "arm64"},
}
PYTHONS = ("3.10", "3.11", "3.12", "3.13")


@pytest.fixture
def dev() -> ModuleType:
    spec = importlib.util.spec_from_file_location("dev", ROOT / "dev.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def asked_for() -> list[Requirement]:
    groups = [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()]
    return [Requirement(item) for group in groups for item in group]


def locked(name: str) -> list[Requirement]:
    lines = (ROOT / "locks" / name).read_text("utf-8").splitlines()
    return [Requirement(line) for line in lines if not line.startswith("#")]


def version_of(requirement: Requirement) -> Version:
    (specifier,) = requirement.specifier
    assert specifier.operator == "==", requirement
    return Version(specifier.version)


def test_the_oldest_versions_are_the_lower_bounds(dev: ModuleType) -> None:
    floors = {}
    for requirement in asked_for():
        (specifier,) = requirement.specifier
        assert specifier.operator == ">=", requirement
        # An environment with everything in it has the highest of the bounds a name is given.
        floor = Version(specifier.version)
        name = canonicalize_name(requirement.name)
        floors[name] = max(floor, floors.get(name, floor))
    floors["torch"] = Version(dev.TORCH.partition("==")[2])
    assert {each.name: version_of(each) for each in locked("oldest.txt")} == floors


@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize("python", PYTHONS)
def test_the_lock_has_one_version_of_every_dependency(dev: ModuleType, python: str, system: str) -> None:
    place = {
        **SYSTEMS[system],
        "platform_system": system,
        "python_version": python,
        "python_full_version": f"{python}.9",
        "implementation_name": "cpython",
        "platform_python_implementation": "CPython",
    }
    versions: dict[str, Version] = {}
    for requirement in locked("tested.txt"):
        if requirement.marker is None or requirement.marker.evaluate(place):
            assert requirement.name not in versions, requirement
            versions[requirement.name] = version_of(requirement)
    for requirement in (*asked_for(), Requirement(dev.TORCH), Requirement("uv")):
        assert versions[canonicalize_name(requirement.name)] in requirement.specifier


@pytest.mark.parametrize("name", ["tested.txt", "oldest.txt"])
def test_the_locks_name_no_place_and_no_build(name: str) -> None:
    text = (ROOT / "locks" / name).read_text("utf-8")
    assert not re.search(r"://|--|sha256|\+|@|/", text)


@pytest.mark.parametrize("changed", ["pyproject.toml", "lock.txt", "torch", None])
def test_a_change_of_the_lock_or_of_pyproject_installs_again(
    dev: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: str | None
) -> None:
    environment = dev.Environment(tmp_path / "venv", tmp_path / "lock.txt")
    environment.folder.mkdir()
    for name in ("pyproject.toml", "lock.txt"):
        (tmp_path / name).write_text("first", "utf-8")
    commands: list[list[str]] = []
    monkeypatch.setattr(dev, "ROOT", tmp_path)
    monkeypatch.setattr(dev, "make", lambda environment: None)
    monkeypatch.setattr(dev, "has_torch", lambda environment: True)
    monkeypatch.setattr(dev, "must", lambda command: commands.append([str(part) for part in command]))
    dev.install(environment, "test")
    assert all(["--constraint", str(tmp_path / "lock.txt")] == command[5:7] for command in commands)
    assert commands[-1][-2:] == [f"{tmp_path}[test]", dev.TORCH]
    first = len(commands)
    if changed == "torch":
        monkeypatch.setattr(dev, "TORCH", "torch==9.9")
    elif changed:
        (tmp_path / changed).write_text("second", "utf-8")
    dev.install(environment, "test")
    assert (len(commands) > first) == (changed is not None)


def test_the_newest_releases_are_looked_for_each_time_but_for_torch(
    dev: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = dev.Environment(tmp_path, None)
    commands: list[list[str]] = []
    monkeypatch.setattr(dev, "has_torch", lambda environment: True)
    monkeypatch.setattr(dev, "make", lambda environment: None)
    monkeypatch.setattr(dev, "must", lambda command: commands.append([str(part) for part in command]))
    dev.install(environment, "test")
    dev.install(environment, "test")
    assert len(commands) == 4
    assert all("--upgrade" in command and "--constraint" not in command for command in commands)
    assert commands[1][-1] == commands[3][-1] == dev.TORCH


@pytest.mark.parametrize(
    ("arguments", "folder", "has_ruff"),
    [
        (["-k", "x"], ".venv", True),
        (["--latest", "-k", "x"], ".venv-latest", False),
        (["-k", "--oldest", "x"], ".venv-oldest", False),
    ],
)
def test_other_arguments_go_to_pytest_of_the_chosen_environment(
    dev: ModuleType, monkeypatch: pytest.MonkeyPatch, arguments: list[str], folder: str, has_ruff: bool
) -> None:
    commands, installed = [], []
    monkeypatch.setattr(dev, "sys", SimpleNamespace(version_info=(3, 11)))
    monkeypatch.setattr(dev, "install", lambda environment, extra: installed.append((environment, extra)))
    monkeypatch.setattr(
        dev, "run", lambda command, **where: commands.append([str(part) for part in command]) or 0
    )
    monkeypatch.setattr(dev, "check_types", lambda environment: commands.append(["mypy"]) or 0)
    assert dev.main(["test", *arguments]) == 0
    (environment, extra) = installed[0]
    assert (environment.folder, extra, len(installed)) == (ROOT / folder, "test", 1)
    assert commands[-1] == [str(environment.python), "-m", "pytest", "-k", "x"]
    assert any("ruff" in command for command in commands) is has_ruff
    assert (["mypy"] in commands) is has_ruff


def test_only_one_end_of_the_ranges_is_tried_at_a_time(
    dev: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(dev, "install", lambda environment, extra: pytest.fail("installed"))
    assert dev.main(["test", "--latest", "--oldest"]) == 2
    assert "Choose one" in capsys.readouterr().err


def test_types_of_every_package_are_checked(
    dev: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("mypy")
    checkout = tmp_path / "ComfyUI-BLIP3o"  # no name of a package
    checkout.mkdir()
    (checkout / "pyproject.toml").write_text("[tool.mypy]\npackages = ['comfyui_blip3o']\n", "utf-8")
    (checkout / "__init__.py").touch()
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]["packages"]
    for name in {name.split(".")[1] for name in listed if "." in name}:
        (checkout / name).mkdir()
        (checkout / name / "__init__.py").write_text("COUNT: int = 'three'\n", "utf-8")
    monkeypatch.setattr(dev, "ROOT", checkout)
    monkeypatch.setattr(dev.Environment, "python", Path(sys.executable))
    environment = dev.Environment(tmp_path / "venv", None)
    assert dev.check_types(environment) != 0
    found = capfd.readouterr().out
    for path in sorted(checkout.glob("*/__init__.py")):
        assert f"{path.parent.name}{os.sep}__init__.py:1" in found
        path.write_text("COUNT: int = 3\n", "utf-8")
    assert dev.check_types(environment) == 0


def test_the_oldest_versions_are_not_tried_where_they_have_no_builds(
    dev: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(dev, "install", lambda environment, extra: pytest.fail("installed"))
    monkeypatch.setattr(dev, "sys", SimpleNamespace(version_info=(3, 12, 1), stderr=sys.stderr))
    assert dev.main(["test", "--oldest"]) == 2
    assert "use 3.10 or 3.11" in capsys.readouterr().err
