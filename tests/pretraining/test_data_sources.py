"""Streams and pools of real pictures: every sample once, the same order, exact resume, clear words about bad files."""

import io
import itertools
import json
import logging
import tarfile
from pathlib import Path

import numpy as np
import pytest
from comfyui_blip3o.blip3o_core.errors import MissingFilesError, TrainingDataError
from comfyui_blip3o.pretraining.data_sources import (
    Position,
    SampleStream,
    find_shards,
    load_caption_pool,
)
from comfyui_blip3o.pretraining.stages.vae import vae_batches
from PIL import Image


def jpeg(number: int, suffix: str = "JPEG", size: tuple[int, int] = (24, 16)) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", size, (number % 256, 7 * number % 256, 90)).save(content, suffix)
    return content.getvalue()


def write_tar(path: Path, files: list[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def pairs(numbers: range) -> list[tuple[str, bytes]]:
    return [
        part
        for n in numbers
        for part in ((f"{n:06d}.jpg", jpeg(n)), (f"{n:06d}.txt", f"picture {n}\n".encode()))
    ]


@pytest.fixture
def tars(tmp_path: Path) -> Path:
    """Three tars of unequal length, 17 samples in all."""
    folder = tmp_path / "tars"
    for name, numbers in (("a", range(0, 4)), ("b", range(4, 9)), ("sub/c", range(9, 17))):
        write_tar(folder / f"{name}.tar", pairs(numbers))
    return folder


ALL = [f"picture {n}" for n in range(17)]


def captions(stream: SampleStream, number: int | None = None) -> list[str]:
    return [sample.caption for sample in itertools.islice(stream, number)]


def test_every_sample_comes_once_in_an_epoch_with_its_own_picture(tars: Path):
    samples = list(SampleStream(tars, seed=1, epochs=1, buffer_size=5))
    assert sorted(s.caption for s in samples) == sorted(ALL)
    for sample in samples:
        number = int(sample.caption.split()[1])
        assert sample.picture.mode == "RGB" and sample.picture.size == (24, 16)
        # JPEG keeps a plain colour to a shade or two.
        assert np.abs(np.asarray(sample.picture)[8, 8].astype(int) - (number, 7 * number, 90)).max() <= 3
        assert sample.key.endswith(f"{number:06d}")


def test_the_order_follows_the_seed_and_changes_with_the_epoch(tars: Path):
    def order(seed: int) -> list[str]:
        return captions(SampleStream(tars, seed=seed, epochs=2, buffer_size=5))

    assert order(3) == order(3)
    assert order(3) != order(4)
    assert order(3)[:17] != order(3)[17:]
    assert sorted(order(3)[17:]) == sorted(ALL)


def test_a_buffer_of_one_keeps_the_order_within_a_tar_and_a_large_one_does_not(tars: Path):
    in_order = captions(SampleStream(tars / "sub", epochs=1, buffer_size=1))
    assert in_order == ALL[9:]
    assert captions(SampleStream(tars / "sub", epochs=1, buffer_size=100)) != in_order


@pytest.mark.parametrize("world_size", [2, 3, 20])
def test_what_all_processes_use_is_what_one_uses(tars: Path, world_size: int):
    steps = 5
    one = captions(SampleStream(tars, seed=2, buffer_size=4), steps * world_size)
    shares = [
        captions(SampleStream(tars, seed=2, buffer_size=4, rank=rank, world_size=world_size), steps)
        for rank in range(world_size)
    ]
    # Round by round, also across the end of the epoch of 17.
    assert [share[step] for step in range(steps) for share in shares] == one


def test_one_epoch_of_two_processes_holds_every_sample_once(tars: Path):
    shares = [captions(SampleStream(tars, seed=2, epochs=1, rank=rank, world_size=2)) for rank in range(2)]
    assert sorted(shares[0] + shares[1]) == sorted(ALL)
    assert not set(shares[0]) & set(shares[1])


@pytest.mark.parametrize("seen", [1, 8, 16, 17, 18, 40])
def test_a_resumed_stream_goes_on_as_the_uninterrupted_one(tars: Path, seen: int):
    whole = captions(SampleStream(tars, seed=5, buffer_size=6), 50)
    first = SampleStream(tars, seed=5, buffer_size=6)
    assert captions(first, seen) == whole[:seen]
    saved = json.loads(json.dumps(first.position.as_dict()))
    again = SampleStream(tars, seed=5, buffer_size=6, start=Position(**saved))
    assert captions(again, 50 - seen) == whole[seen:]


@pytest.mark.parametrize("saved_by", [0, 1, 2])
@pytest.mark.parametrize("later", [1, 3, 4])
def test_the_position_of_any_process_resumes_with_any_number_of_processes(
    tars: Path, saved_by: int, later: int
):
    whole = captions(SampleStream(tars, seed=5, buffer_size=6), 60)
    stream = SampleStream(tars, seed=5, buffer_size=6, rank=saved_by, world_size=3)
    captions(stream, 6)  # round 6 of 3 processes: 18 samples, one past the epoch of 17
    again = [
        captions(
            SampleStream(tars, seed=5, buffer_size=6, rank=rank, world_size=later, start=stream.position), 4
        )
        for rank in range(later)
    ]
    assert [share[step] for step in range(4) for share in again] == whole[18 : 18 + 4 * later]


def test_skipping_comes_to_the_same_sample_as_reading_and_reads_nothing(
    tars: Path, monkeypatch: pytest.MonkeyPatch
):
    def stream() -> SampleStream:
        return SampleStream(tars, seed=5, buffer_size=6, rank=1, world_size=2)

    whole = captions(stream(), 30)
    skipping = stream()
    samples = iter(skipping)
    opened = []
    real = Image.open
    monkeypatch.setattr(Image, "open", lambda file: opened.append(1) or real(file))
    skipping.skip(12)  # across the end of the epoch of 17
    assert [next(samples).caption for _ in range(3)] == whole[12:15]
    skipping.skip(5)
    assert next(samples).caption == whole[20]
    assert len(opened) == 4
    again = SampleStream(tars, seed=5, buffer_size=6, rank=1, world_size=2, start=skipping.position)
    assert captions(again, 9) == whole[21:]


def test_samples_of_other_processes_are_not_read(tars: Path, monkeypatch: pytest.MonkeyPatch):
    opened = []
    real = Image.open
    monkeypatch.setattr(Image, "open", lambda file: opened.append(1) or real(file))
    assert len(captions(SampleStream(tars, epochs=1, rank=1, world_size=4))) == len(opened) == 4


def test_a_folder_gives_pictures_with_their_txt_or_caption_files(tmp_path: Path):
    for name, suffix in (("one", ".txt"), ("two.v2", ".caption"), ("sub/three", ".txt")):
        path = tmp_path / f"{name}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(jpeg(1, "PNG"))
        path.with_name(path.stem + suffix).write_text(f"caption of {name}", "utf-8-sig")
    (tmp_path / "._one.png").write_bytes(b"what a file manager leaves")
    found = {Path(s.key).name: s.caption for s in SampleStream(tmp_path, epochs=1)}
    assert found == {
        "one.png": "caption of one",
        "two.v2.png": "caption of two.v2",
        "three.png": "caption of sub/three",
    }


def test_names_in_a_tar_follow_webdatasets_rule(tmp_path: Path):
    files = [
        ("./v1.0/7.json", b"{}"),
        ("./v1.0/7.seg.png", b"no picture"),
        ("./v1.0/7.PNG", jpeg(3, "PNG")),
        ("./v1.0/7.txt", b"seven"),
        ("./v1.0/._8.jpg", b"no picture"),
        ("./v1.0/8.jpg", jpeg(4)),
        ("./v1.0/8.txt", b"eight"),
    ]
    tar = write_tar(tmp_path / "x.tar", files)
    assert sorted(captions(SampleStream([tar], epochs=1))) == ["eight", "seven"]


def test_pictures_are_turned_upright_and_transparency_becomes_white(tmp_path: Path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    content = io.BytesIO()
    Image.new("RGB", (24, 16)).save(content, "JPEG", exif=exif)
    clear = io.BytesIO()
    Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(clear, "PNG")
    files = [("a.jpg", content.getvalue()), ("a.txt", b"a"), ("b.png", clear.getvalue()), ("b.txt", b"b")]
    found = {s.caption: s.picture for s in SampleStream(write_tar(tmp_path / "x.tar", files), epochs=1)}
    assert found["a"].size == (16, 24)
    assert found["b"].getpixel((4, 4)) == (255, 255, 255)


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    """Six samples of which three are bad: half a picture, no caption, no picture."""
    files = pairs(range(3))
    files += [("half.jpg", jpeg(9, size=(200, 200))[:700]), ("half.txt", b"half")]
    files += [("bare.jpg", jpeg(8)), ("lonely.txt", b"lonely")]
    return write_tar(tmp_path / "damaged.tar", files)


@pytest.mark.parametrize("key", ["half", "bare", "lonely"])
def test_a_bad_sample_stops_the_stream_with_its_name(damaged: Path, key: str):
    messages = set()
    for seed in range(30):
        with pytest.raises(TrainingDataError) as caught:
            list(SampleStream(damaged, seed=seed, epochs=1))
        messages.add(str(caught.value).splitlines()[0])
    assert any(f"damaged.tar:{key}" in message for message in messages)


def test_bad_samples_are_passed_over_named_and_counted_never_replaced(
    damaged: Path, caplog: pytest.LogCaptureFixture
):
    stream = SampleStream(damaged, epochs=2, on_bad="skip")
    with caplog.at_level(logging.WARNING):
        found = captions(stream)
    assert sorted(found) == sorted(2 * [f"picture {n}" for n in range(3)])
    assert sorted(key.rpartition(":")[2] for key in stream.bad) == ["bare", "half", "lonely"]
    assert "no caption" in next(reason for key, reason in stream.bad.items() if key.endswith("bare"))
    assert len(caplog.records) == 3  # once each, not once per epoch


def test_a_stream_of_nothing_but_bad_samples_ends_with_an_error(tmp_path: Path):
    tar = write_tar(tmp_path / "x.tar", [("a.jpg", jpeg(1)), ("b.jpg", jpeg(2))])
    with pytest.raises(TrainingDataError, match="2 are bad"):
        next(iter(SampleStream(tar, on_bad="skip")))


@pytest.mark.parametrize("cut", [100, 512, 700, 10_240 - 512, "members"])
def test_a_tar_cut_off_anywhere_is_an_error(tmp_path: Path, cut: int | str):
    tar = write_tar(tmp_path / "cut.tar", pairs(range(8)))
    with tarfile.open(tar) as whole:
        members = whole.getmembers()
    between = members[10].offset  # behind five whole samples, where tarfile alone sees a whole tar
    tar.write_bytes(tar.read_bytes()[: between if cut == "members" else cut])
    with pytest.raises(TrainingDataError, match="cut.tar.*(is cut off|cannot be read as a tar)"):
        list(SampleStream(tar, epochs=1))


def test_a_compressed_tar_and_one_without_pictures_are_errors(tmp_path: Path):
    with tarfile.open(tmp_path / "packed.tar", "w:gz"):
        pass
    with pytest.raises(TrainingDataError, match="decompressed"):
        list(SampleStream(tmp_path / "packed.tar", epochs=1))
    with pytest.raises(TrainingDataError, match="holds no picture"):
        list(SampleStream(write_tar(tmp_path / "x.tar", [("a.txt", b"a")]), epochs=1))


def test_two_files_of_one_kind_in_a_sample_are_an_error(tmp_path: Path):
    tar = write_tar(tmp_path / "x.tar", [("a.jpg", jpeg(1)), ("a.JPG", jpeg(2)), ("a.txt", b"a")])
    with pytest.raises(TrainingDataError, match="twice"):
        list(SampleStream(tar, epochs=1))


def test_wrong_paths_are_named(tmp_path: Path, tars: Path):
    with pytest.raises(MissingFilesError, match="nowhere"):
        find_shards(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(TrainingDataError, match="empty"):
        find_shards(tmp_path / "empty")
    (tmp_path / "list.csv").write_text("a")
    with pytest.raises(TrainingDataError, match="list.csv"):
        find_shards([tmp_path / "list.csv"])
    with pytest.raises(TrainingDataError, match="named twice"):
        find_shards([tars, tars / "a.tar"])


def test_a_pool_gives_pixels_and_captions_by_number(tars: Path, tmp_path: Path):
    pool = load_caption_pool(tars, 16, tmp_path / "cache")
    assert len(pool) == 17
    rows = np.array([3, 0, 3])
    pixels = pool.pixels(rows)
    assert pixels.shape == (3, 3, 16, 16)
    for row, sample, caption in zip(rows, pixels, pool.captions(rows), strict=True):
        number = int(pool.texts[row].split()[1])
        assert caption == f"picture {number}"
        expected = np.array([number, 7 * number, 90]) / 255
        assert np.abs(sample.mean((1, 2)).numpy() - expected).max() < 3 / 255


def test_a_pool_is_decoded_once_and_again_when_a_caption_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.png").write_bytes(jpeg(1, "PNG"))
    (tmp_path / "data" / "a.txt").write_text("before")
    first = load_caption_pool(tmp_path / "data", 8, tmp_path / "cache")
    opened = []
    real = Image.open
    monkeypatch.setattr(Image, "open", lambda file: opened.append(1) or real(file))
    again = load_caption_pool(tmp_path / "data", 8, tmp_path / "cache")
    assert not opened and np.array_equal(first.images, again.images)
    (tmp_path / "data" / "a.txt").write_text("afterwards")
    assert load_caption_pool(tmp_path / "data", 8, tmp_path / "cache").texts == ["afterwards"]


def test_a_pool_leaves_bad_samples_out_only_when_told(damaged: Path, tmp_path: Path):
    with pytest.raises(TrainingDataError, match="half"):
        load_caption_pool(damaged, 8, tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())
    pool = load_caption_pool(damaged, 8, tmp_path / "cache", on_bad="skip")
    assert pool.texts == [f"picture {n}" for n in range(3)]
    with pytest.raises(TrainingDataError, match="half"):  # also when the pool is there already
        load_caption_pool(damaged, 8, tmp_path / "cache")


def test_the_vae_stage_trains_on_a_pool(tars: Path, tmp_path: Path):
    pool = load_caption_pool(tars, 32, tmp_path / "cache")
    batch_of = vae_batches(pool, 4, 0, 16, 4, 10)
    assert batch_of(0)["pixels"].shape == (4, 3, 16, 16)
    assert batch_of(10)["pixels"].shape == (1, 3, 32, 32)
    assert batch_of(3)["pixels"].equal(batch_of(3)["pixels"])
