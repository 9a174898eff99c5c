"""A real ComfyUI for these tests; without one they are skipped, and say so."""

import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from api_graphs import BUILT_IN
from comfyui_server import COMFYUI, ROOT, Server, make_base_folder
from reference_set import build_reference

MISSING = (
    f"NO COMFYUI AT {COMFYUI}: the tests against the real server and page did NOT run (set COMFYUI_PATH)"
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    ours = [item for item in items if here in item.path.parents]
    for item in ours:
        item.add_marker(pytest.mark.comfyui)
        item.add_marker(pytest.mark.slow)
    if ours and not (COMFYUI / "main.py").is_file():
        warnings.warn(MISSING, stacklevel=1)
        for item in ours:
            item.add_marker(pytest.mark.skip(reason=MISSING))


def new_base(folder: Path, checkpoint: Path) -> Path:
    """A base folder whose models hold a checkpoint under the name "reference"."""
    base = make_base_folder(folder)
    (base / "models" / "blip3o" / "reference").symlink_to(checkpoint)
    return base


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ComfyUI base folder with the pack, and the published layout with random weights as checkpoint "reference"."""
    folder = tmp_path_factory.mktemp("comfyui")
    build_reference(folder / "published")
    return new_base(folder, folder / "published" / "checkpoint")


@pytest.fixture
def another_base(tmp_path: Path, base: Path) -> Path:
    """A second base folder: two servers on one would clear each other's temporary files."""
    return new_base(tmp_path, base / "published" / "checkpoint")


@pytest.fixture(scope="session")
def server(base: Path) -> Iterator[Server]:
    """ComfyUI with its default cache, shared by tests that leave it as they find it."""
    running = Server(base)
    yield running
    running.stop()


@pytest.fixture(scope="session")
def checkpoint() -> str:
    """The built-in model, or random weights where a checkout does not carry it yet."""
    built_in = ROOT / "blip3o_core" / "assets" / "tiny" / "config.json"
    return BUILT_IN if built_in.is_file() else "reference"
