"""The download node against a hub on this machine: nothing unasked, then a folder that loads."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import api_graphs
import pytest
from api_graphs import node
from comfyui_server import Server, Socket, error_of
from fake_hub import FakeHub, FakeRepo, running_hub

REPOSITORY = "someone/BLIP3o-mini"
# Both parts of the name: a stranger's repository never lands where another one's files lie.
FOLDER = "someone--BLIP3o-mini"
SHOW, FETCH = "show what would be fetched", "download"


@pytest.fixture(scope="module")
def hub(base: Path) -> Iterator[FakeHub]:
    source = base / "published" / "checkpoint"
    files = {
        path.relative_to(source).as_posix(): path.read_bytes() for path in source.rglob("*") if path.is_file()
    }
    with running_hub() as running:
        running.repos[REPOSITORY] = FakeRepo(files)
        yield running


@pytest.fixture(scope="module")
def online(hub: FakeHub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of its own, whose hub is the one on this machine."""
    from comfyui_server import make_base_folder

    variables = {"HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    running = Server(make_base_folder(tmp_path_factory.mktemp("online")), environment=variables)
    yield running
    running.stop()


def graph(action: str, repository: str = REPOSITORY) -> dict[str, Any]:
    choices = {
        "model": "another repository",
        "use": "draw, answer and encode images",
        "repository": repository,
    }
    return {"1": node("BLIP3oDownload", action=action, **choices)}


def test_asking_what_would_be_fetched_fetches_nothing(online: Server, hub: FakeHub):
    (text,) = online.run(graph(SHOW))["1"]["text"]
    assert REPOSITORY in text and "to fetch" in text and "model-00001-of-00002.safetensors" in text
    assert not (online.base / "models" / "blip3o" / FOLDER).exists()
    assert hub.sent("model-00001-of-00002.safetensors") == 0


def test_a_download_reports_progress_and_gives_a_folder_that_draws(online: Server):
    watcher = Socket(online)
    prompt_id = online.queue(graph(FETCH), watcher.client)
    kinds = [data["type"] if kind == "json" else kind for kind, data in watcher.until_done(prompt_id)]
    watcher.close()
    entry = online.wait(prompt_id)
    assert entry["status"]["status_str"] == "success", error_of(entry)
    assert "text" in kinds and "progress" in kinds
    assert "complete" in entry["outputs"]["1"]["text"][0]
    assert online.run(api_graphs.text_to_image(FOLDER))["5"]["images"]


def test_running_it_again_fetches_nothing(online: Server, hub: FakeHub):
    online.run(graph(FETCH))
    before = len(hub.requests)
    online.run(graph(FETCH))
    assert not [request for request in hub.requests[before:] if request.by_cdn and request.sent]


def test_a_repository_that_does_not_exist_is_named(online: Server):
    entry = online.wait(online.queue(graph(SHOW, "someone/nothing")))
    assert 'There is no repository "someone/nothing"' in error_of(entry)


@pytest.mark.parametrize("name", ["", "someone/..", "../.."])
def test_a_name_that_would_leave_the_folder_is_refused(online: Server, name: str):
    entry = online.wait(online.queue(graph(SHOW, name)))
    assert "No repository is named" in error_of(entry) or "is no repository name" in error_of(entry)
