"""Pictures with captions: folders and streamed tars, shared by processes, with messages that name the file."""

import io
import tarfile

import pytest
from comfyui_blip3o.blip3o_core.errors import TrainingDataError
from comfyui_blip3o.pretraining.data import find_tars, folder_samples, read_folder, read_tars, tar_samples
from PIL import Image


def png(colour):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(buffer, "PNG")
    return buffer.getvalue()


def write_tar(path, keys, suffix="png"):
    with tarfile.open(path, "w") as tar:
        for n, key in enumerate(keys):
            for name, content in (
                (f"{key}.{suffix}", png((n, 0, 0))),
                (f"{key}.txt", f"caption {key}\n".encode()),
            ):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return path


def write_folder(folder, number):
    folder.mkdir(exist_ok=True)
    for n in range(number):
        (folder / f"{n}.png").write_bytes(png((n, n, n)))
        (folder / f"{n}.txt").write_text(f"grey {n}", encoding="utf-8")
    return folder


def test_a_tar_gives_its_pairs_in_order(tmp_path):
    samples = list(tar_samples(write_tar(tmp_path / "a.tar", ["x/001", "x/002"])))
    assert [sample.caption for sample in samples] == ["caption x/001", "caption x/002"]
    assert samples[1].picture.getpixel((0, 0)) == (1, 0, 0)


def test_processes_share_tars_without_overlap_and_miss_nothing(tmp_path):
    tars = [write_tar(tmp_path / f"{t}.tar", [f"{t}{n}" for n in range(5)]) for t in range(4)]
    assert find_tars(tmp_path) == sorted(tars)
    parts = [{s.caption for s in read_tars(tars, seed=1, rank=r, world=2, epochs=1)} for r in (0, 1)]
    assert not parts[0] & parts[1]
    assert len(parts[0] | parts[1]) == 20


def test_fewer_tars_than_processes_are_shared_by_sample(tmp_path):
    tars = [write_tar(tmp_path / "one.tar", [str(n) for n in range(6)])]
    parts = [{s.caption for s in read_tars(tars, seed=1, rank=r, world=3, epochs=1)} for r in range(3)]
    assert [len(part) for part in parts] == [2, 2, 2]
    assert len(set.union(*parts)) == 6


def test_streams_are_shuffled_the_same_way_for_the_same_seed(tmp_path):
    tars = [write_tar(tmp_path / "one.tar", [str(n) for n in range(30)])]
    order = [[s.caption for s in read_tars(tars, seed=seed, epochs=1, buffer=10)] for seed in (1, 1, 2)]
    assert order[0] == order[1] != order[2]
    assert sorted(order[0]) == sorted(order[2])


def test_a_folder_is_read_once_per_epoch_in_new_orders(tmp_path):
    folder = write_folder(tmp_path / "set", 6)
    captions = [sample.caption for sample in read_folder(folder, seed=3, epochs=2)]
    assert sorted(captions[:6]) == sorted(captions[6:]) == [f"grey {n}" for n in range(6)]
    assert captions[:6] != captions[6:]


def test_missing_captions_are_counted_and_named(tmp_path):
    folder = write_folder(tmp_path / "set", 3)
    (folder / "1.txt").unlink()
    with pytest.raises(TrainingDataError, match=r'No caption for 1 of 3 pictures.*"1\.png"'):
        folder_samples(folder)


def test_broken_pictures_and_tars_are_named(tmp_path):
    folder = write_folder(tmp_path / "set", 1)
    (folder / "0.png").write_bytes(b"no picture")
    with pytest.raises(TrainingDataError, match="0.png"):
        list(read_folder(folder, seed=0, epochs=1))
    (tmp_path / "bad.tar").write_bytes(b"no tar" * 200)
    with pytest.raises(TrainingDataError, match="bad.tar"):
        list(tar_samples(tmp_path / "bad.tar"))


def test_a_tar_without_captions_is_refused(tmp_path):
    with tarfile.open(tmp_path / "bare.tar", "w") as tar:
        member = tarfile.TarInfo("1.png")
        content = png("red")
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))
    with pytest.raises(TrainingDataError, match="no pair of picture and caption"):
        list(tar_samples(tmp_path / "bare.tar"))
