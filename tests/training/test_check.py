"""The report before a run: everything wrong at once, by file name, quickly, without touching anything."""

import errno
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from comfyui_blip3o.blip3o_core.config import BUILT_IN_MODEL
from comfyui_blip3o.blip3o_core.errors import TrainingDataError
from comfyui_blip3o.lora_training.check import Report, check, duplicates
from comfyui_blip3o.lora_training.data.dataset import scan_dataset
from PIL import Image, ImageDraw, ImageEnhance
from training_sets import COLOURS, FAULTS, caption, config_of, drawing, write_set


def names_of(report: Report, kind: str) -> set[str]:
    return {name for problem in report.problems if problem.kind == kind for name in problem.names}


def photo(seed: int, size: tuple[int, int] = (300, 200)) -> Image.Image:
    """Smooth noise: as different from another as two photographs."""
    coarse = np.random.default_rng(seed).integers(0, 255, (6, 9, 3), np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def test_a_sound_set_has_nothing_wrong(tmp_path: Path):
    report = check(config_of(write_set(tmp_path / "set", 6), "train.steps=40"))
    assert report.problems == ()
    assert "Nothing is wrong." in report.text()
    assert "6 pictures to train on, none held out." in report.text()
    assert "40 steps of 8." in report.text()
    assert f'p00.png: "{caption(0)}"' in report.text()
    report.raise_for_errors()


def test_one_report_names_everything(tmp_path: Path):
    folder = write_set(tmp_path / "sét 🐈", 6)
    for name, write in FAULTS.items():
        write(folder / name)
    for name, picture in (
        ("dot.png", Image.new("RGB", (1, 1))),
        ("small 🐁.png", photo(1, (60, 50))),
        ("ribbon.png", photo(2, (900, 200))),
        ("copy.jpg", drawing(3).resize((140, 140))),
        ("wordy.png", photo(3)),
    ):
        picture.save(folder / name)
        (folder / name).with_suffix(".txt").write_text(f"about {name}", "utf-8")
    (folder / "wordy.txt").write_text("red " * 500, "utf-8")
    (folder / "p00.txt").unlink()
    (folder / "p01.txt").write_text("", "utf-8")
    (folder / "p02.txt").write_text("about dot.png", "utf-8")
    report = check(config_of(folder))
    expected = {
        "unreadable": set(FAULTS),
        "tiny": {"dot.png"},
        "small": {"small 🐁.png"},
        "aspect": {"ribbon.png"},
        "duplicate": {"p03.png"},
        "long caption": {"wordy.png"},
        "missing caption": {"p00.png"},
        "empty caption": {"p01.png"},
        "identical captions": {"dot.png", "p02.png"},
    }
    assert {kind: names_of(report, kind) for kind in expected} == expected
    assert {problem.kind for problem in report.problems} == {*expected, "unknown words"}
    text = report.text()
    for names in expected.values():
        assert all(name in text for name in names)
    for detail in ("60 x 50, enlarged 2.6 times", "900 x 200, 78% cut away", "as copy.jpg", "tokens"):
        assert detail in text
    with pytest.raises(TrainingDataError) as caught:
        report.raise_for_errors()
    errors = ("unreadable", "tiny", "missing caption", "empty caption")
    assert all(name in str(caught.value) for kind in errors for name in expected[kind])
    assert "ribbon.png" not in str(caught.value)


def test_fifty_large_photographs_are_looked_at_in_five_seconds(tmp_path: Path):
    folder = tmp_path / "set"
    folder.mkdir()
    for index in range(50):
        # Copies but for a comment at the end: encoding fifty would take longer than the test.
        if index == 0:
            photo(0, (3000, 2000)).save(folder / "p00.jpg", quality=92)
        else:
            data = (folder / "p00.jpg").read_bytes()
            (folder / f"p{index:02}.jpg").write_bytes(data + b"%d" % index)
        (folder / f"p{index:02}.txt").write_text(f"photo {index}", "utf-8")
    config = config_of(folder)
    start = time.perf_counter()
    report = check(config)
    assert time.perf_counter() - start < 5
    assert len(names_of(report, "duplicate")) == 49


def test_checking_writes_nothing(tmp_path: Path):
    folder = write_set(tmp_path / "set", 3)
    before = sorted(tmp_path.rglob("*"))
    check(config_of(folder))
    assert sorted(tmp_path.rglob("*")) == before


# Duplicates


def test_the_same_picture_is_found_whatever_was_done_to_its_file(tmp_path: Path):
    for index in range(6):
        photo(index).save(tmp_path / f"photo{index}.png")
    photo(2).save(tmp_path / "compressed.jpg", quality=40)
    photo(2).resize((150, 100)).save(tmp_path / "small.webp")
    ImageEnhance.Brightness(photo(4)).enhance(1.05).save(tmp_path / "brighter.png")
    items = scan_dataset(config_of(tmp_path, "data.caption.missing=skip").data).items
    found = {frozenset(item.name for item in group) for group in duplicates(items)}
    assert found == {
        frozenset({"compressed.jpg", "photo2.png", "small.webp"}),
        frozenset({"brighter.png", "photo4.png"}),
    }


def test_flat_drawings_of_different_things_are_no_duplicates(tmp_path: Path):
    for index in range(12):
        picture = Image.new("RGB", (128, 128), "white")
        left = 6 * index
        ImageDraw.Draw(picture).ellipse((left, 40, left + 40, 80), fill=COLOURS[index % 2])
        picture.save(tmp_path / f"p{index}.png")
    items = scan_dataset(config_of(tmp_path, "data.caption.missing=skip").data).items
    assert duplicates(items) == []


def test_a_copy_of_a_held_out_picture_is_told(tmp_path: Path):
    folder = write_set(tmp_path / "set", 10)
    (chosen,) = scan_dataset(config_of(folder).data).held_out
    Image.open(folder / chosen.name).resize((150, 150)).save(folder / "again.png")
    (folder / "again.txt").write_text("again", "utf-8")
    report = check(config_of(folder))
    (held_out,) = report.dataset.held_out
    assert names_of(report, "held out") == {held_out.name}


# Captions and masks


def test_captions_that_lack_the_trigger_others_have_are_named(tmp_path: Path):
    folder = write_set(tmp_path / "set", 6)
    (folder / "p00.txt").write_text("a [trigger] asleep", "utf-8")
    report = check(config_of(folder, trigger="ohwx cat", class_word="cat"))
    assert names_of(report, "trigger") == {f"p{index:02}.png" for index in range(1, 6)}
    assert '"ohwx cat" is named in 1 of 6 captions' in report.text()
    (folder / "p00.txt").write_text("asleep", "utf-8")
    assert names_of(check(config_of(folder, trigger="ohwx cat", class_word="cat")), "trigger") == set()


def test_a_trigger_that_is_the_class_word_teaches_nothing(tmp_path: Path):
    report = check(config_of(write_set(tmp_path / "set", 6), trigger="Ring ", class_word="ring"))
    assert [problem.kind for problem in report.problems] == ["trigger"]


def test_words_that_the_model_does_not_know_are_told(tmp_path: Path):
    report = check(config_of(write_set(tmp_path / "set", 6), trigger="Ohwx", class_word="circle"))
    (problem,) = report.problems
    assert (problem.kind, problem.level, len(problem.names)) == ("unknown words", "warning", 6)
    assert set(problem.details) == {"Ohwx"}


def test_mirrored_sides_are_told(tmp_path: Path):
    folder = write_set(tmp_path / "set", 6)
    (folder / "p02.txt").write_text("a cat on the left", "utf-8")
    assert names_of(check(config_of(folder, crop={"flip": True})), "flip") == {"p02.png"}
    assert names_of(check(config_of(folder)), "flip") == set()


def test_a_caption_with_the_models_own_signs_is_named(tmp_path: Path):
    folder = write_set(tmp_path / "set", 6)
    (folder / "p02.txt").write_text("a cat <|image_pad|>", "utf-8")
    assert names_of(check(config_of(folder)), "caption") == {"p02.png"}


def test_each_kind_of_bad_mask_is_named(tmp_path: Path):
    folder = write_set(tmp_path / "set", 6)
    Image.new("L", (128, 128), 255).save(folder / "p00_mask.png")
    Image.new("L", (128, 128), 0).save(folder / "p01_mask.png")
    Image.new("L", (128, 64), 255).save(folder / "p02_mask.png")
    (folder / "p03_mask.png").write_bytes((folder / "p00_mask.png").read_bytes()[:80])
    report = check(config_of(folder, mask="files"))
    by_text = {problem.text.split(":")[0].split(".")[0]: problem.names for problem in report.problems}
    assert by_text == {
        "The masks of these are damaged": ("p03.png",),
        "The masks of these leave nothing that counts": ("p01.png",),
        "The masks of these have another shape than their pictures": ("p02.png",),
        "These have no mask, so all of them counts": ("p04.png", "p05.png"),
    }


def test_pictures_of_one_problem_can_be_asked_for(tmp_path: Path):
    folder = write_set(tmp_path / "set", 6)
    (folder / "p02.txt").unlink()
    report = check(config_of(folder))
    assert [problem.kind for problem in report.problems_of("p02.png")] == ["missing caption"]
    assert report.problems_of("p01.png") == ()


# Model, disk and memory


def test_a_missing_model_and_a_missing_set_are_told_together(tmp_path: Path):
    report = check(config_of(tmp_path / "nowhere", f"model.root={tmp_path / 'no model'}"))
    assert {problem.kind for problem in report.errors} == {"model", "empty"}
    assert "nowhere" in report.text() and "no model" in report.text()


def test_a_model_without_image_encoder_is_told(tmp_path: Path):
    target = tmp_path / "model"
    shutil.copytree(BUILT_IN_MODEL, target)
    config = config_of(write_set(tmp_path / "set", 6), f"model.image_encoder={tmp_path / 'eva.bin'}")
    report = check(config)
    assert [problem.kind for problem in report.errors] == ["model"]
    assert "eva.bin" in report.errors[0].text


def test_a_full_disk_is_an_error_before_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config = config_of(write_set(tmp_path / "set", 6))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10**7))
    (problem,) = check(config).errors
    assert problem.kind == "disk" and "9.5 MB are free" in problem.text


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config = config_of(write_set(tmp_path / "set", 6))

    def refuse(**options: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    (problem,) = check(config).errors
    assert problem.kind == "write" and "Permission denied" in problem.text


def test_too_little_memory_is_told_with_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config = config_of(write_set(tmp_path / "set", 6))
    memory = psutil.virtual_memory()._replace(available=2**29)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    report = check(config)
    assert {problem.kind for problem in report.problems} == {"memory"}
    assert all("512.0 MB are free" in problem.text for problem in report.problems)
    assert "Memory, estimated (512.0 MB free):" in report.text()


def test_a_device_that_is_not_there_is_told(tmp_path: Path):
    config = config_of(write_set(tmp_path / "set", 6), "model.device=warp")
    assert [problem.kind for problem in check(config).errors] == ["device"]
