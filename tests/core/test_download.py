"""Downloads from a hub on 127.0.0.1: what is fetched, continued, checked, refused, and what people are told."""

import hashlib
import json
import socket
import threading
from pathlib import Path

import huggingface_hub
import pytest
from comfyui_blip3o.blip3o_core.errors import (
    BadInputError,
    Blip3oError,
    MissingFilesError,
    WrongCheckpointError,
)
from comfyui_blip3o.blip3o_core.hub import client as hub_module
from comfyui_blip3o.blip3o_core.hub import download
from comfyui_blip3o.blip3o_core.hub.download import plan_download, progress_bars, resolve_repo, run_download
from comfyui_blip3o.blip3o_core.hub.needed_files import IMAGE_ENCODER_REPO
from comfyui_blip3o.blip3o_core.units import format_bytes
from fake_hub import SHARD_BYTES, FakeRepo, noise, published_repo, running_hub, single_file_repo

REPO = "artist/tiny-blip3o"
SHARD_1, SHARD_2, SHARD_3, SHARD_4 = (f"model-{number:05d}-of-00004.safetensors" for number in range(1, 5))
UNET = "diffusion-decoder/unet/diffusion_pytorch_model.bf16.safetensors"
FOR_GENERATE = {
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "model.safetensors.index.json",
    "diffusion-decoder/model_index.json",
    "diffusion-decoder/scheduler/scheduler_config.json",
    "diffusion-decoder/unet/config.json",
    UNET,
    "diffusion-decoder/vae/config.json",
    "diffusion-decoder/vae/diffusion_pytorch_model.bf16.safetensors",
    SHARD_1,
    SHARD_2,
    SHARD_4,
}


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A fake hub with one published checkpoint, no token, no waiting between tries."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_ENDPOINT", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub_module, "RETRY_SECONDS", 0)
    with running_hub() as hub:
        hub.repos[REPO] = published_repo()
        yield hub


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "models" / "tiny"


def plan(hub, folder, **options):
    return plan_download(REPO, folder, endpoint=hub.endpoint, **options)


def files_below(folder: Path) -> set[str]:
    return {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and path.name not in (download.LOCK_NAME, download.ORIGIN_NAME)
    }


def part_of(folder: Path, name: str) -> Path:
    (part,) = folder.glob(f"{name}.*.part")
    return part


class Stop(Exception):
    """What a person's stop button raises."""


def stop_at(name: str, count: int):
    def on_progress(file: str, done: int, size: int) -> None:
        if file == name and done >= count:
            raise Stop

    return on_progress


def test_the_fake_hub_serves_huggingface_hub_itself(hub, folder):
    for name in ("config.json", SHARD_1):
        path = huggingface_hub.hf_hub_download(REPO, name, local_dir=folder, endpoint=hub.endpoint)
        assert Path(path).read_bytes() == hub.repos[REPO].files[name]


@pytest.mark.parametrize(
    ("name", "repo"),
    [("8b", "BLIP3o/BLIP3o-Model-8B"), ("4B", "BLIP3o/BLIP3o-Model-4B"), ("a.b/c-d_e", "a.b/c-d_e")],
)
def test_aliases_and_repository_names_are_understood(name, repo):
    assert resolve_repo(name) == repo


@pytest.mark.parametrize(
    "name", ["7b", "", "a/b/c", "../b", "a/..", "a b/c", "https://example.org/a/b", "/a", "a\\b"]
)
def test_other_names_are_refused_with_the_choices(name):
    with pytest.raises(BadInputError, match="8b or 4b"):
        resolve_repo(name)


def test_a_plan_for_generating_leaves_out_what_only_image_encoding_reads(hub, folder):
    planned = plan(hub, folder)
    assert {file.path for file in planned.files} == FOR_GENERATE
    assert [file.source for file in planned.left_out] == [SHARD_3]
    files = hub.repos[REPO].files
    assert planned.total_bytes == planned.missing_bytes == sum(len(files[name]) for name in FOR_GENERATE)
    sums = {file.path: file.remote.checksum for file in planned.files}
    assert sums[SHARD_1] == hashlib.sha256(files[SHARD_1]).hexdigest()


def test_a_plan_writes_nothing_and_reads_only_the_list_and_the_index(hub, folder):
    plan(hub, folder)
    assert not folder.parent.exists()
    assert {request.path for request in hub.requests} == {"model.safetensors.index.json"}


def test_the_table_tells_the_size_first_and_what_is_left_out(hub, folder):
    lines = str(plan(hub, folder)).splitlines()
    assert lines[0].startswith("2.3 MB in 15 files: artist/tiny-blip3o, for text-to-image and understanding")
    assert lines[1].startswith("2.3 MB to fetch from http://127.0.0.1")
    assert str(folder) in lines[2]
    assert any(line.split()[:3] == ["585.9", "KB", UNET] for line in lines)
    assert lines[-1].startswith(
        "Left out: 585.9 KB of weight files that this use does not need (the EVA-CLIP"
    )


def test_a_plan_for_encoding_takes_all_shards(hub, folder):
    planned = plan(hub, folder, use="encode")
    assert {file.path for file in planned.files} == FOR_GENERATE | {SHARD_3}
    assert not planned.left_out


def test_encoding_fetches_the_separate_image_encoder_when_the_shards_hold_none(hub, folder):
    hub.repos[REPO] = published_repo(has_image_encoder=False)
    pickle = noise(300_000, 42)
    hub.repos[IMAGE_ENCODER_REPO] = FakeRepo(
        {"pytorch_model.bin": pickle, "README.md": b"#"}, commit="d" * 40
    )
    assert not any("eva_clip" in file.path for file in plan(hub, folder).files)
    run_download(plan(hub, folder, use="encode"))
    assert (folder / "eva_clip_vision_tower" / "pytorch_model.bin").read_bytes() == pickle


def test_a_converted_image_encoder_in_the_folder_is_not_fetched_again(hub, folder):
    hub.repos[REPO] = published_repo(has_image_encoder=False)
    hub.repos[IMAGE_ENCODER_REPO] = FakeRepo({"pytorch_model.bin": b"pickle"})
    converted = folder / "eva_clip_vision_tower" / "model.safetensors"
    converted.parent.mkdir(parents=True)
    converted.write_bytes(b"weights")
    assert not any("eva_clip" in file.path for file in plan(hub, folder, use="encode").files)


@pytest.mark.parametrize("has_image_encoder", [True, False])
def test_a_single_weight_file_tells_by_its_header_whether_the_image_encoder_is_inside(
    hub, folder, has_image_encoder
):
    hub.repos[REPO] = single_file_repo(has_image_encoder=has_image_encoder)
    hub.repos[IMAGE_ENCODER_REPO] = FakeRepo({"pytorch_model.bin": b"pickle"})
    paths = {file.path for file in plan(hub, folder, use="encode").files}
    assert "model.safetensors" in paths
    assert ("eva_clip_vision_tower/pytorch_model.bin" in paths) is not has_image_encoder


def test_a_download_brings_exactly_the_planned_files(hub, folder):
    seen = []
    planned = plan(hub, folder)
    assert run_download(planned, on_progress=lambda *step: seen.append(step)) == folder
    assert files_below(folder) == FOR_GENERATE
    for name in FOR_GENERATE:
        assert (folder / name).read_bytes() == hub.repos[REPO].files[name]
    last = {file: (done, size) for file, done, size in seen}
    assert last == {file.path: (file.size, file.size) for file in planned.files}
    steps = [done for file, done, _ in seen if file == SHARD_1]
    assert steps[0] == 0 and steps == sorted(steps) and len(steps) > 3


def test_a_second_run_fetches_nothing(hub, folder):
    run_download(plan(hub, folder))
    hub.requests.clear()
    planned = plan(hub, folder)
    assert planned.missing_bytes == 0 and planned.present_bytes == planned.total_bytes
    run_download(planned)
    assert hub.requests == []


def test_a_cut_connection_is_continued_from_the_bytes_that_arrived(hub, folder):
    hub.cuts[SHARD_1] = [SHARD_BYTES // 2]
    run_download(plan(hub, folder))
    first, second = hub.ranges(SHARD_1)
    start = int(second.removeprefix("bytes=").removesuffix("-"))
    assert first is None and 0 < start <= SHARD_BYTES // 2
    assert hub.sent(SHARD_1) == SHARD_BYTES // 2 + SHARD_BYTES - start
    assert (folder / SHARD_1).read_bytes() == hub.repos[REPO].files[SHARD_1]


def test_a_stopped_download_is_continued_by_the_next_run(hub, folder):
    with pytest.raises(Stop):
        run_download(plan(hub, folder), on_progress=stop_at(SHARD_1, 200_000))
    arrived = part_of(folder, SHARD_1).stat().st_size
    assert 200_000 <= arrived < SHARD_BYTES and not (folder / SHARD_1).exists()
    planned = plan(hub, folder)
    assert planned.partial_bytes == arrived
    assert f"continues at {format_bytes(arrived)}" in str(planned)
    hub.requests.clear()
    run_download(planned)
    assert hub.ranges(SHARD_1) == [f"bytes={arrived}-"]
    assert hub.sent(SHARD_1) == SHARD_BYTES - arrived
    assert (folder / SHARD_1).read_bytes() == hub.repos[REPO].files[SHARD_1]
    assert files_below(folder) == FOR_GENERATE


def test_a_connection_that_keeps_breaking_ends_with_a_sentence_and_keeps_what_arrived(hub, folder):
    hub.cuts[SHARD_1] = [100_000] + [0] * 20
    with pytest.raises(MissingFilesError, match=f'"{SHARD_1}".*the connection failed'):
        run_download(plan(hub, folder))
    assert part_of(folder, SHARD_1).stat().st_size > 0


def test_a_server_that_cannot_continue_a_file_sends_it_whole_again(hub, folder):
    hub.has_ranges = False
    hub.cuts[SHARD_1] = [SHARD_BYTES // 2]
    run_download(plan(hub, folder))
    first, second = hub.ranges(SHARD_1)
    assert first is None and second.startswith("bytes=")
    assert (folder / SHARD_1).read_bytes() == hub.repos[REPO].files[SHARD_1]


def test_a_server_that_never_gets_past_the_same_point_is_given_up(hub, folder):
    hub.has_ranges = False
    hub.cuts[SHARD_1] = [SHARD_BYTES // 2] * 50
    with pytest.raises(MissingFilesError, match="the connection failed"):
        run_download(plan(hub, folder))
    assert len(hub.ranges(SHARD_1)) < 15


def test_the_part_of_another_version_is_not_continued(hub, folder):
    with pytest.raises(Stop):
        run_download(plan(hub, folder), on_progress=stop_at(SHARD_1, 200_000))
    hub.repos[REPO] = published_repo(seed=1000)
    hub.requests.clear()
    run_download(plan(hub, folder))
    assert hub.ranges(SHARD_1) == [None]
    assert files_below(folder) == FOR_GENERATE


@pytest.mark.parametrize("name", [SHARD_1, "tokenizer.json"])
def test_a_file_that_arrives_damaged_is_fetched_once_more(hub, folder, name):
    hub.corrupt[name] = 1
    run_download(plan(hub, folder))
    assert (folder / name).read_bytes() == hub.repos[REPO].files[name]
    assert len(hub.ranges(name)) == 2


@pytest.mark.parametrize("name", [SHARD_1, "tokenizer.json"])
def test_a_file_damaged_twice_is_deleted_and_named(hub, folder, name):
    hub.corrupt[name] = 2
    with pytest.raises(MissingFilesError, match=f'"{name}".*damaged twice'):
        run_download(plan(hub, folder))
    assert not any(found.startswith(name) for found in files_below(folder))


def test_without_verification_a_damaged_file_goes_unnoticed(hub, folder):
    hub.corrupt[SHARD_1] = 1
    run_download(plan(hub, folder), verify=False)
    assert (folder / SHARD_1).read_bytes() != hub.repos[REPO].files[SHARD_1]


def test_a_file_damaged_on_the_disk_is_noticed_and_replaced(hub, folder):
    run_download(plan(hub, folder))
    data = bytearray((folder / SHARD_2).read_bytes())
    data[1000] ^= 1
    (folder / SHARD_2).write_bytes(data)
    planned = plan(hub, folder)
    assert [file.path for file in planned.files if not file.is_present] == [SHARD_2]
    assert "replaces another version" in str(planned)
    run_download(planned)
    assert (folder / SHARD_2).read_bytes() == hub.repos[REPO].files[SHARD_2]


def test_an_index_damaged_twice_stops_the_plan(hub, folder):
    hub.corrupt["model.safetensors.index.json"] = 2
    with pytest.raises(MissingFilesError, match="model.safetensors.index.json"):
        plan(hub, folder)


def test_a_mirror_that_lists_names_only_is_asked_file_by_file(hub, folder):
    hub.lists_metadata = False
    planned = plan(hub, folder)
    files = hub.repos[REPO].files
    assert planned.total_bytes == sum(len(files[name]) for name in FOR_GENERATE)
    assert all(file.remote.checksum for file in planned.files)
    hub.corrupt[SHARD_1] = 2
    with pytest.raises(MissingFilesError, match="damaged"):
        run_download(planned)


def test_files_in_xet_storage_come_over_http_from_the_same_hub(hub, folder):
    hub.xet = True
    hub.cuts[UNET] = [SHARD_BYTES // 2]
    run_download(plan(hub, folder))
    assert (folder / UNET).read_bytes() == hub.repos[REPO].files[UNET]
    assert not any("xet" in call for call in hub.calls)


@pytest.mark.parametrize(
    "name",
    ["../../evil.safetensors", "/tmp/evil.safetensors", "a\\..\\..\\evil.safetensors", "C:evil.safetensors"],
)
def test_file_names_from_the_server_cannot_leave_the_folder(hub, folder, name):
    repo = hub.repos[REPO]
    repo.files[name] = noise(1000, 66)
    repo.files["model.safetensors.index.json"] = (
        b'{"weight_map": {"model.norm.weight": "' + name.replace("\\", "\\\\").encode() + b'"}}'
    )
    with pytest.raises(WrongCheckpointError, match="outside the target folder"):
        run_download(plan(hub, folder))
    assert not folder.parent.exists()


def test_names_outside_the_folder_that_nothing_needs_are_ignored(hub, folder):
    hub.repos[REPO].files["../config.json"] = b"{}"
    run_download(plan(hub, folder))
    assert files_below(folder.parent) == {f"tiny/{name}" for name in FOR_GENERATE}


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", SHARD_1, UNET, "diffusion-decoder/vae/config.json"]
)
def test_a_repository_without_a_needed_file_is_refused_before_anything_is_fetched(hub, folder, name):
    del hub.repos[REPO].files[name]
    # Without the bf16 file the plain one serves, as loading does.
    hub.repos[REPO].files.pop(UNET.replace(".bf16", ""))
    with pytest.raises(WrongCheckpointError, match=f"not a complete BLIP3-o checkpoint: it has no {name}"):
        plan(hub, folder)


def test_a_file_of_leftovers_alone_is_never_fetched(hub, folder):
    repo = hub.repos[REPO]
    index = json.loads(repo.files["model.safetensors.index.json"])
    shard = "model-00005-of-00005.safetensors"
    index["weight_map"] |= {"model.vae.encoder.conv_in.weight": shard, "mystery.weight": shard}
    repo.files["model.safetensors.index.json"] = json.dumps(index).encode()
    repo.files[shard] = noise(1000, 7)
    for use in ("generate", "encode"):
        planned = plan(hub, folder, use=use)
        assert shard not in {file.path for file in planned.files}
        assert shard in {file.source for file in planned.left_out}


def test_a_finetune_without_a_decoder_is_fetched_with_a_word_about_it(hub, folder):
    repo = hub.repos[REPO]
    for name in [name for name in repo.files if name.startswith("diffusion-decoder/")]:
        del repo.files[name]
    planned = plan(hub, folder)
    run_download(planned)
    assert files_below(folder) == {name for name in FOR_GENERATE if not name.startswith("diffusion-decoder/")}
    assert "holds no decoder" in str(planned) and "--decoder FOLDER" in str(planned)


def other_plan(hub, folder, **options):
    hub.repos["stranger/tiny-blip3o"] = published_repo(seed=500)
    return plan_download("stranger/tiny-blip3o", folder, endpoint=hub.endpoint, **options)


def test_a_strangers_repository_never_takes_a_models_place_unasked(hub, folder):
    run_download(plan(hub, folder))
    before = (folder / SHARD_1).read_bytes()
    with pytest.raises(
        WrongCheckpointError, match=f'(?s)holds files of "{REPO}", not of "stranger.*--replace'
    ):
        other_plan(hub, folder)
    assert (folder / SHARD_1).read_bytes() == before
    run_download(other_plan(hub, folder, replace=True))
    assert (folder / SHARD_1).read_bytes() != before
    with pytest.raises(WrongCheckpointError, match='holds files of "stranger/tiny-blip3o"'):
        plan(hub, folder)


def test_files_of_unknown_origin_are_not_replaced_unasked(hub, folder):
    run_download(plan(hub, folder))
    (folder / download.ORIGIN_NAME).unlink()
    with pytest.raises(WrongCheckpointError, match="holds other weights than"):
        other_plan(hub, folder)
    assert not plan(hub, folder).missing_bytes


def test_a_folder_remembers_repository_and_commit(hub, folder):
    run_download(plan(hub, folder))
    origin = json.loads((folder / download.ORIGIN_NAME).read_text("utf-8"))
    assert origin["repository"] == REPO and origin["commit"]


def test_a_folder_with_other_weights_is_refused(hub, folder):
    folder.mkdir(parents=True)
    (folder / "model-00001-of-00009.safetensors").write_bytes(b"other")
    with pytest.raises(WrongCheckpointError, match=r"model-00001-of-00009\.safetensors.*\n.*another folder"):
        plan(hub, folder)


def test_offline_mode_says_so_and_asks_nothing(hub, folder, monkeypatch):
    planned = plan(hub, folder)
    hub.calls.clear()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(MissingFilesError, match="Offline mode is on"):
        plan(hub, folder)
    with pytest.raises(MissingFilesError, match="Unset HF_HUB_OFFLINE"):
        run_download(planned)
    assert hub.calls == []


def test_the_librarys_own_offline_mode_counts_too(hub, folder, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(MissingFilesError, match="Offline mode is on"):
        plan(hub, folder)


def test_the_endpoint_comes_from_the_environment(hub, folder, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint + "/")
    run_download(plan_download(REPO, folder))
    assert files_below(folder) == FOR_GENERATE


def test_an_unknown_repository_is_named(hub, folder):
    with pytest.raises(BadInputError, match='no repository "nobody/nothing"'):
        plan_download("nobody/nothing", folder, endpoint=hub.endpoint)


def test_an_unknown_revision_is_named(hub, folder):
    with pytest.raises(BadInputError, match='no revision "summer"'):
        plan(hub, folder, revision="summer")


def test_a_gated_repository_says_where_to_ask_and_opens_with_a_token(hub, folder, monkeypatch):
    hub.repos[REPO].is_gated = True
    with pytest.raises(MissingFilesError, match=f"gated(.|\n)*{hub.endpoint}/{REPO}(.|\n)*HF_TOKEN"):
        plan(hub, folder)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    run_download(plan(hub, folder))
    assert files_below(folder) == FOR_GENERATE


def test_the_token_goes_to_the_hub_but_not_to_other_servers(hub, folder, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    run_download(plan(hub, folder))
    assert {request.authorization for request in hub.requests if not request.by_cdn} == {"Bearer hf_secret"}
    assert {request.authorization for request in hub.requests if request.by_cdn} == {None}


def test_no_network_is_a_sentence(hub, folder):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{unused.getsockname()[1]}"
        with pytest.raises(
            MissingFilesError, match=f"{address}: the connection failed(.|\n)*internet connection"
        ):
            plan_download(REPO, folder, endpoint=address)


@pytest.mark.parametrize("name", [SHARD_1, "tokenizer.json", "model.safetensors.index.json"])
def test_a_hub_that_is_busy_for_a_moment_is_asked_again(hub, folder, name):
    hub.statuses[name] = [503, 429]
    run_download(plan(hub, folder))
    assert (folder / name).read_bytes() == hub.repos[REPO].files[name]


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (500, "with error 500"),
        (429, "slow down"),
        (403, "refused access(.|\n)*HF_TOKEN"),
        (404, "does not have it"),
    ],
)
def test_a_hub_that_refuses_a_file_for_good_is_a_sentence(hub, folder, status, words):
    hub.statuses[SHARD_1] = [status] * 9
    with pytest.raises(MissingFilesError, match=words):
        run_download(plan(hub, folder))
    assert len(hub.statuses[SHARD_1]) == (4 if status in (429, 500) else 8), (
        "only passing trouble is tried again"
    )


def test_a_login_page_in_between_is_a_sentence(hub, folder):
    hub.is_login_page = True
    with pytest.raises(MissingFilesError, match="does not answer like a model hub"):
        plan(hub, folder)


def test_a_hub_that_goes_away_during_the_download_is_a_sentence(hub, folder):
    planned = plan(hub, folder)
    hub.repos.clear()
    with pytest.raises(Blip3oError, match=REPO):
        run_download(planned)


@pytest.mark.parametrize("endpoint", ["example.org", "ftp://127.0.0.1"])
def test_an_endpoint_that_is_no_web_address_is_refused(folder, endpoint):
    with pytest.raises(BadInputError, match="HF_ENDPOINT"):
        plan_download(REPO, folder, endpoint=endpoint)


def test_an_unknown_use_and_a_file_as_folder_are_refused(hub, tmp_path):
    with pytest.raises(BadInputError, match='"generate".*"encode"'):
        plan(hub, tmp_path, use="everything")
    (tmp_path / "note.txt").write_text("hello")
    with pytest.raises(BadInputError, match="is a file"):
        plan(hub, tmp_path / "note.txt")


def test_too_little_room_is_told_before_anything_is_fetched(hub, folder, monkeypatch):
    planned = plan(hub, folder)
    hub.requests.clear()
    monkeypatch.setattr(download, "_free_bytes", lambda folder: planned.total_bytes - 1)
    with pytest.raises(Blip3oError, match="2.3 MB are needed, 2.3 MB are free"):
        run_download(planned)
    assert hub.requests == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs the device that is always full")
def test_a_disk_that_fills_up_on_the_way_is_a_sentence(hub, folder):
    planned = plan(hub, folder)
    (remote,) = (file.remote for file in planned.files if file.path == SHARD_1)
    folder.mkdir(parents=True)
    (folder / f"{SHARD_1}.{remote.checksum[:12]}.part").symlink_to("/dev/full")
    with pytest.raises(Blip3oError, match="The disk is full"):
        run_download(planned)


def test_a_folder_that_cannot_be_made_is_a_sentence(hub, folder):
    folder.parent.write_text("a file where a folder should be")
    with pytest.raises(Blip3oError, match="may write to"):
        run_download(plan(hub, folder))


def test_two_downloads_into_one_folder_do_not_run_at_once(hub, folder):
    planned, inside, leave = plan(hub, folder), threading.Event(), threading.Event()

    def hold(*step: object) -> None:
        inside.set()
        leave.wait(5)

    first = threading.Thread(target=run_download, args=(planned,), kwargs={"on_progress": hold})
    first.start()
    try:
        assert inside.wait(5)
        with pytest.raises(Blip3oError, match="Another download"):
            run_download(planned)
    finally:
        leave.set()
        first.join()
    assert files_below(folder) == FOR_GENERATE


def test_the_bars_end_at_the_total(hub, folder, capsys):
    planned = plan(hub, folder)
    with progress_bars(planned) as on_progress:
        run_download(planned, on_progress=on_progress)
    assert "all files: 100%" in capsys.readouterr().err
    with progress_bars() as on_check:
        plan(hub, folder, on_check=on_check)
    assert SHARD_1 in capsys.readouterr().err


@pytest.mark.parametrize(
    "info",
    [
        {"entry": {"size": "x"}},
        {"entry": {"size": 1.5}},
        {"entry": {"size": -1}},
        {"entry": {"lfs": 5}},
        {"entry": {"lfs": {"sha256": 5, "size": "x", "pointerSize": 1}}},
        {"entry": {"rfilename": 5}},
        {"entry": {"rfilename": None}},
        {"sha": 5},
        {"sha": ["x"]},
        {"siblings": 5},
        {"siblings": [5]},
        {"siblings": {"a": 1}},
        {"lastModified": "yesterday"},
        {"createdAt": 5},
    ],
    ids=str,
)
def test_an_answer_of_the_wrong_kinds_is_no_hubs(hub, folder, info):
    hub.info = info
    with pytest.raises(
        Blip3oError, match="does not answer like a model hub|not a complete BLIP3-o checkpoint"
    ):
        plan(hub, folder)
    assert not files_below(folder)


@pytest.mark.parametrize("entry", [{"blobId": 5}, {"blobId": "zz"}])
def test_a_checksum_of_the_wrong_kind_is_none(hub, folder, entry):
    hub.info = {"entry": entry}
    run_download(plan(hub, folder))
    assert files_below(folder) == FOR_GENERATE


@pytest.mark.parametrize(
    "index",
    [
        b"[" * 100_000,
        b"5",
        b'{"weight_map": 5}',
        b'{"weight_map": {"a": 5}}',
        b'{"weight_map": {"a": ["x.safetensors"]}}',
        b'{"weight_map": {"a": "pytorch_model.bin"}}',
        b'{"weight_map": {"a": "modeling.py"}}',
    ],
    ids=lambda index: index[:40].decode(),
)
def test_an_index_that_names_no_weights_is_refused(hub, folder, index):
    hub.repos[REPO].files["model.safetensors.index.json"] = index
    with pytest.raises(WrongCheckpointError, match="does not say which weights"):
        plan(hub, folder)
    assert not files_below(folder)


def test_an_index_too_large_to_be_one_is_not_fetched(hub, folder, monkeypatch):
    monkeypatch.setattr("comfyui_blip3o.blip3o_core.hub.needed_files.MAX_JSON_BYTES", 100)
    with pytest.raises(WrongCheckpointError, match="does not say which weights"):
        plan(hub, folder)
    assert not hub.sent("model.safetensors.index.json")
