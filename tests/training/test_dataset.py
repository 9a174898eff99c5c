"""Training sets: what is read, which prompts come of it, which pictures are held out, and that nothing bad stops it."""

import io
import json
import os
import tarfile
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from comfyui_blip3o.blip3o_core.errors import MissingFilesError
from comfyui_blip3o.blip3o_core.images import to_rgb
from comfyui_blip3o.lora_training.config import DataConfig
from comfyui_blip3o.lora_training.data.dataset import (
    Dataset,
    assemble_prompts,
    fill_in,
    reachable,
    scan_dataset,
    scan_run,
)
from PIL import Image
from training_sets import FAULTS, caption, config_of, drawing, write_set


def scan(folder: Path, *overrides: str, **data: object) -> Dataset:
    return scan_dataset(config_of(folder, *overrides, **data).data)


def names_of(dataset: Dataset, kind: str) -> set[str]:
    return {name for problem in dataset.problems if problem.kind == kind for name in problem.names}


# Prompts


@pytest.mark.parametrize(
    ("caption", "prompt", "class_prompt"),
    [
        ("a [trigger] on grass", "a ohwx dog on grass", "a dog on grass"),
        ("[trigger] and [trigger]", "ohwx dog and ohwx dog", "dog and dog"),
        ("[trigger] beside an ohwx dog", "ohwx dog beside an ohwx dog", "dog beside an dog"),
        ("on grass", "ohwx dog, on grass", "dog, on grass"),
        ("a photo of ohwx dog asleep", "a photo of ohwx dog asleep", "a photo of dog asleep"),
        ("An Ohwx Dog asleep", "An ohwx dog asleep", "An dog asleep"),
        ("ohwx doggy", "ohwx dog, ohwx doggy", "dog, ohwx doggy"),
        ("  two\tspaces ", "ohwx dog, two spaces", "dog, two spaces"),
        ("", "ohwx dog", "dog"),
    ],
)
def test_the_trigger_takes_its_place_or_stands_in_front(caption: str, prompt: str, class_prompt: str):
    config = DataConfig(Path("."), trigger="ohwx dog", class_word="dog")
    assert assemble_prompts(caption, config) == (prompt, class_prompt)


def test_a_prefix_comes_first_and_may_hold_the_trigger():
    config = config_of(
        Path("x"), "data.caption.prefix=a drawing of [trigger],", trigger="ohwx", class_word="cat"
    ).data
    assert assemble_prompts("asleep", config) == ("a drawing of ohwx, asleep", "a drawing of cat, asleep")


def test_without_a_trigger_the_caption_is_the_prompt():
    assert assemble_prompts("a cat", DataConfig(Path("."), class_word="cat")) == ("a cat", "")


def test_the_configurations_prompts_name_trigger_and_class():
    config = DataConfig(Path("."), trigger="ohwx dog", class_word="dog")
    assert fill_in("{trigger} beside a {class}", config) == "ohwx dog beside a dog"


# Folders


def test_pictures_are_sorted_whatever_the_order_of_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = write_set(tmp_path / "set", 4)
    walk = os.walk
    monkeypatch.setattr(
        os,
        "walk",
        lambda *args, **options: ((top, subs, names[::-1]) for top, subs, names in walk(*args, **options)),
    )
    assert [item.name for item in scan(folder).items] == ["p00.png", "p01.png", "p02.png", "p03.png"]


def test_each_line_of_a_text_is_a_caption(tmp_path: Path):
    folder = write_set(tmp_path / "set", 1)
    (folder / "p00.txt").write_text("one\n\n  two  \n", "utf-8")
    assert scan(folder).items[0].prompts == ("one", "two")


def test_caption_files_count_and_a_text_file_counts_before_them(tmp_path: Path):
    folder = write_set(tmp_path / "set", 2, captions=False)
    (folder / "p00.caption").write_text("from caption", "utf-8")
    (folder / "p01.caption").write_text("from caption", "utf-8")
    (folder / "p01.TXT").write_text("from text", "utf-8")
    dataset = scan(folder)
    assert [item.prompts for item in dataset.items] == [("from caption",), ("from text",)]
    assert names_of(dataset, "caption") == {"p01.png"}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_captions_of_any_editor_are_read(tmp_path: Path, encoding: str):
    folder = write_set(tmp_path / "set", 1)
    (folder / "p00.txt").write_text("ein grüner Kreis 🟢", encoding)
    assert scan(folder).items[0].prompts == ("ein grüner Kreis 🟢",)


def test_a_caption_that_is_no_unicode_is_named(tmp_path: Path):
    folder = write_set(tmp_path / "set", 2)
    (folder / "p01.txt").write_text("grün", "latin-1")
    assert names_of(scan(folder), "caption") == {"p01.png"}


def test_numbered_folders_repeat_their_pictures(tmp_path: Path):
    folder = write_set(tmp_path / "10_set", 1)
    write_set(folder / "3_close ups", 1)
    write_set(folder / "3_close ups" / "more", 1)
    write_set(folder / "portraits", 1)
    assert {item.name: item.repeats for item in scan(folder).items} == {
        "p00.png": 1,
        "3_close ups/p00.png": 3,
        "3_close ups/more/p00.png": 3,
        "portraits/p00.png": 1,
    }


def test_metadata_gives_texts_weight_split_and_mask(tmp_path: Path):
    folder = write_set(tmp_path / "set", 3)
    (folder / "m.png").write_bytes((folder / "p00.png").read_bytes())
    rows = [
        {"file_name": "p00.png", "text": "first", "weight": 0.5},
        {"file_name": "p01.png", "texts": ["second", "[trigger] again"], "split": "held_out"},
        {"file_name": "p02.png", "mask": "m.png"},
    ]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)), "utf-8")
    dataset = scan(folder, trigger="ohwx", mask="files")
    items = {item.name: item for item in dataset.items}
    assert items["p00.png"].prompts == ("ohwx, first",)
    assert items["p00.png"].weight == 0.5
    assert items["p01.png"].prompts == ("ohwx, second", "ohwx again")
    assert items["p02.png"].prompts == (f"ohwx, {caption(2)}",)
    assert items["p02.png"].mask.path.name == "m.png"
    assert [item.name for item in dataset.held_out] == ["p01.png"]


def test_every_bad_line_of_the_metadata_is_named_and_the_good_ones_count(tmp_path: Path):
    folder = write_set(tmp_path / "set", 2)
    lines = [
        '{"file_name": "p00.png", "text": "fine"}',
        "not json",
        '{"text": "no name"}',
        '{"file_name": "../outside.png", "text": "x"}',
        '{"file_name": "gone.png", "text": "x"}',
        '{"file_name": "p01.png", "weight": "heavy", "split": "maybe", "colour": "red"}',
    ]
    (folder / "metadata.jsonl").write_text("\n".join(lines), "utf-8")
    dataset = scan(folder)
    assert dataset.items[0].prompts == ("fine",)
    assert names_of(dataset, "metadata") == {"line 2", "line 3", "../outside.png", "gone.png", "p01.png"}
    text = "\n".join(map(str, dataset.problems))
    for fragment in ('"weight" must be a number', '"split" must be one of', 'the key "colour"'):
        assert fragment in text


def test_files_that_are_no_pictures_of_the_set_are_left_alone_or_reported(tmp_path: Path):
    folder = write_set(tmp_path / "set", 1)
    for hidden in (".hidden.png", "__MACOSX/p00.png", ".cache/p00.png"):
        (folder / hidden).parent.mkdir(exist_ok=True)
        drawing(0).save(folder / hidden)
    (folder / "phone.HEIC").write_bytes(b"x")
    (folder / "p99.txt").write_text("nothing", "utf-8")
    drawing(0).save(folder / "p00_mask.png")
    dataset = scan(folder)
    assert [item.name for item in dataset.items] == ["p00.png"]
    assert names_of(dataset, "format") == {"phone.HEIC"}
    assert names_of(dataset, "caption without picture") == {"p99.txt"}
    assert names_of(dataset, "mask") == {"p00_mask.png"}


def test_a_missing_or_empty_folder_says_so(tmp_path: Path):
    with pytest.raises(MissingFilesError, match="nowhere"):
        scan(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert [problem.kind for problem in scan(tmp_path / "empty").problems] == ["empty"]


@pytest.mark.parametrize(
    ("missing", "prompts", "level"),
    [("error", (), "error"), ("skip", (), "warning"), ("trigger", ("ohwx",), "warning")],
)
def test_pictures_without_captions_follow_the_setting(
    tmp_path: Path, missing: str, prompts: tuple[str, ...], level: str
):
    folder = write_set(tmp_path / "set", 3)
    (folder / "p00.txt").unlink()
    (folder / "p01.txt").write_text(" \n", "utf-8")
    dataset = scan(folder, f"data.caption.missing={missing}", trigger="ohwx")
    assert dataset.items[0].prompts == dataset.items[1].prompts == prompts
    assert len(dataset.train) == (3 if prompts else 1)
    assert names_of(dataset, "missing caption") == {"p00.png"}
    assert names_of(dataset, "empty caption") == {"p01.png"}
    assert {problem.level for problem in dataset.problems} == {level}


def test_the_trigger_cannot_stand_for_a_caption_when_there_is_none(tmp_path: Path):
    dataset = scan(write_set(tmp_path / "set", 1, captions=False), "data.caption.missing=trigger")
    assert [problem.level for problem in dataset.problems] == ["error"]
    assert not dataset.train


def test_a_place_for_a_trigger_that_is_not_given_is_an_error(tmp_path: Path):
    folder = write_set(tmp_path / "set", 2)
    (folder / "p01.txt").write_text("a [trigger] here", "utf-8")
    assert names_of(scan(folder), "trigger") == {"p01.png"}


# Odd pictures


def test_every_fault_is_named_and_the_sound_pictures_stay(tmp_path: Path):
    folder = write_set(tmp_path / "set", 2)
    for name, write in FAULTS.items():
        write(folder / name)
    dataset = scan(folder)
    assert names_of(dataset, "unreadable") == set(FAULTS)
    assert [item.name for item in dataset.items] == ["p00.png", "p01.png"]
    assert all(problem.level == "error" for problem in dataset.problems if problem.kind == "unreadable")
    skipped = scan(folder, bad_image="skip")
    assert names_of(skipped, "unreadable") == set(FAULTS)
    assert not any(problem.level == "error" for problem in skipped.problems)


def test_each_fault_says_its_cause(tmp_path: Path):
    folder = write_set(tmp_path / "set", 1)
    for name, write in FAULTS.items():
        write(folder / name)
    causes = {name: problem.text for problem in scan(folder).problems for name in problem.names}
    assert "cut short" in causes["truncated.jpg"]
    assert "0 bytes" in causes["empty.png"]
    assert "no pictures" in causes["text.jpg"]


def colour_of(dataset: Dataset, index: int = 0, background: str = "white") -> list[int]:
    picture = to_rgb(dataset.items[index].open(), background)
    return np.asarray(picture)[picture.height // 2, picture.width // 2].tolist()


def test_cmyk_16_bit_palette_and_one_bit_pictures_are_read(tmp_path: Path):
    folder = tmp_path / "set"
    folder.mkdir()
    size = (64, 48)
    Image.new("CMYK", size, (0, 255, 255, 0)).save(folder / "cmyk.jpg", quality=95)
    Image.fromarray(np.full((48, 64), 32768, np.uint16)).save(folder / "deep.png")
    palette = Image.new("P", size, 1)
    palette.putpalette([0, 0, 0, 0, 200, 0])
    palette.save(folder / "palette.png", transparency=1)
    Image.new("LA", size, (10, 0)).save(folder / "grey_alpha.png")
    Image.new("1", size, 1).save(folder / "ink.png")
    dataset = scan(folder, "data.caption.missing=skip")
    assert [item.name for item in dataset.items] == [
        "cmyk.jpg",
        "deep.png",
        "grey_alpha.png",
        "ink.png",
        "palette.png",
    ]
    red, green, blue = colour_of(dataset, 0)
    assert red > 200 and green < 60 and blue < 60
    assert colour_of(dataset, 1) == [128, 128, 128]
    assert colour_of(dataset, 2, "blue") == [0, 0, 255]
    assert colour_of(dataset, 3) == [255, 255, 255]
    assert colour_of(dataset, 4, "#102030") == [16, 32, 48]
    assert [item.has_alpha for item in dataset.items] == [False, False, True, False, True]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_turned_photos_stand_upright(tmp_path: Path, orientation: int):
    folder = tmp_path / "set"
    folder.mkdir()
    upright = drawing(3, (96, 64))
    turned_back = {
        1: None,
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }[orientation]
    stored = upright if turned_back is None else upright.transpose(turned_back)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(folder / "photo.png", exif=exif)
    stored.save(folder / "photo.jpg", exif=exif, quality=100, subsampling=0)
    for item in scan(folder, "data.caption.missing=skip").items:
        assert (item.width, item.height) == (96, 64)
        difference = np.asarray(to_rgb(item.open()), int) - np.asarray(upright, int)
        assert np.abs(difference).mean() < 2


def test_unicode_emoji_and_very_long_paths_are_read(tmp_path: Path):
    folder = write_set(tmp_path / "набор 🐕", 1)
    deep = folder
    while len(str(deep)) < 300:
        deep /= "a long folder name " * 4
    write_set(deep, 1)
    (folder / "ほげ 🦊 [1] #%.txt").write_text("a fox", "utf-8")
    drawing(1).save(folder / "ほげ 🦊 [1] #%.png")
    dataset = scan(folder)
    assert not dataset.problems
    assert len(dataset.items) == 3
    assert "a fox" in dataset.prompts


def test_accents_match_however_they_are_written(tmp_path: Path):
    folder = tmp_path / "set"
    folder.mkdir()
    drawing(0).save(folder / unicodedata.normalize("NFD", "café.png"))
    (folder / unicodedata.normalize("NFC", "café.txt")).write_text("coffee", "utf-8")
    dataset = scan(folder)
    assert dataset.prompts == ("coffee",)
    assert not dataset.problems


@pytest.mark.skipif(os.name == "nt", reason="links need rights on Windows")
def test_files_that_lead_nowhere_are_named(tmp_path: Path):
    folder = write_set(tmp_path / "set", 2)
    (folder / "p01.txt").unlink()
    (folder / "p01.txt").symlink_to(tmp_path / "gone.txt")
    (folder / "link.png").symlink_to(tmp_path / "gone.png")
    dataset = scan(folder)
    assert names_of(dataset, "caption") == {"p01.png"}
    assert names_of(dataset, "unreadable") == {"link.png"}
    assert [item.name for item in dataset.train] == ["p00.png"]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such names")
def test_a_name_that_is_no_text_can_still_be_shown(tmp_path: Path):
    folder = write_set(tmp_path / "set", 1)
    os.rename(folder / "p00.png", os.path.join(os.fsencode(folder), b"caf\xe9.png"))
    name = scan(folder).items[0].name
    assert name.encode("utf-8").decode() == "caf\ufffd.png"


def test_windows_gets_its_prefix_for_long_paths():
    long = Path("x" * 200)
    assert str(reachable(long, "nt")).startswith("\\\\?\\")
    assert reachable(long, "posix") == long
    assert reachable(Path("short"), "nt") == Path("short")


# Tars


def test_a_tar_holds_the_same_as_the_folder(tmp_path: Path):
    folder = write_set(tmp_path / "set", 4)
    with tarfile.open(tmp_path / "set.tar", "w") as tar:
        for path in sorted(folder.iterdir(), reverse=True):
            tar.add(path, path.name)
    ours, packed = scan(folder), scan(tmp_path / "set.tar")
    for one, other in zip(ours.items, packed.items, strict=True):
        assert (one.name, one.digest, one.prompts, one.look) == (
            other.name,
            other.digest,
            other.prompts,
            other.look,
        )
    assert ours.fingerprint == packed.fingerprint


def test_a_broken_tar_is_reported(tmp_path: Path):
    folder = write_set(tmp_path / "set", 3)
    with tarfile.open(tmp_path / "set.tar.gz", "w:gz") as tar:
        tar.add(folder, ".")
    assert "uncompressed" in scan(tmp_path / "set.tar.gz").problems[0].text
    picture = (folder / "p00.png").read_bytes()
    with tarfile.open(tmp_path / "bad.tar", "w") as tar:
        for name, data in (
            ("ok.png", picture),
            ("ok.txt", b"fine"),
            ("cut.png", picture[:90]),
            ("cut.txt", b"x"),
        ):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    dataset = scan(tmp_path / "bad.tar")
    assert [item.name for item in dataset.items] == ["ok.png"]
    assert names_of(dataset, "unreadable") == {"cut.png"}


# Held-out pictures


def held_out(folder: Path, **data: object) -> set[str]:
    return {item.digest for item in scan(folder, **data).held_out}


def test_one_in_ten_is_held_out_from_ten_pictures_on(tmp_path: Path):
    assert not held_out(write_set(tmp_path / "nine", 9))
    assert len(held_out(write_set(tmp_path / "ten", 10))) == 1
    assert len(held_out(write_set(tmp_path / "thirty", 30))) == 3
    assert not held_out(tmp_path / "thirty", holdout="none")
    assert len(held_out(tmp_path / "thirty", holdout=0.5)) == 15
    assert len(held_out(tmp_path / "nine", holdout=0.01)) == 1


def test_the_held_out_choice_depends_on_content_alone(tmp_path: Path):
    folder = write_set(tmp_path / "set", 20)
    before = held_out(folder)
    for index in range(20):
        for suffix in (".png", ".txt"):
            (folder / f"p{index:02}{suffix}").rename(folder / f"{19 - index:02}_other{suffix}")
    assert held_out(folder) == before


def test_an_added_picture_changes_the_held_out_choice_by_one_at_most(tmp_path: Path):
    folder = write_set(tmp_path / "set", 20)
    before = held_out(folder)
    for index in range(20, 30):
        drawing(index).save(folder / f"p{index}.png")
        (folder / f"p{index}.txt").write_text(f"more {index}", "utf-8")
        after = held_out(folder)
        assert len(before - after) <= 1
        before = after


def test_copies_are_held_out_together(tmp_path: Path):
    folder = write_set(tmp_path / "set", 10)
    (chosen,) = scan(folder).held_out
    (folder / "copy.png").write_bytes((folder / chosen.name).read_bytes())
    (folder / "copy.txt").write_text("again", "utf-8")
    assert {item.name for item in scan(folder).held_out} == {chosen.name, "copy.png"}


# The whole


def test_the_fingerprint_follows_what_is_trained_on(tmp_path: Path):
    folder = write_set(tmp_path / "set", 3)
    before = scan(folder).fingerprint
    (folder / "notes.md").write_text("unrelated", "utf-8")
    assert scan(folder).fingerprint == before
    (folder / "p01.txt").write_text("other words", "utf-8")
    after_caption = scan(folder).fingerprint
    drawing(5).save(folder / "p01.png")
    assert len({before, after_caption, scan(folder).fingerprint}) == 3


def test_regularisation_pictures_get_no_trigger_and_none_is_held_out(tmp_path: Path):
    folder, other = write_set(tmp_path / "set", 2), write_set(tmp_path / "others", 12)
    (other / "p03.txt").unlink()
    config = config_of(folder, f"train.prior.reg_path={other}", trigger="ohwx", class_word="cat")
    dataset = scan_run(config)
    assert len(dataset.regularisation) == 12
    assert dataset.regularisation[0].prompts == (caption(0),)
    assert not any(item.is_held_out or item.class_prompts for item in dataset.regularisation)
    assert any(problem.text.startswith("Regularisation: ") for problem in dataset.problems)


@pytest.mark.parametrize("split", [[], {}, 5, None])
def test_a_split_of_another_kind_is_named(tmp_path: Path, split: object):
    folder = write_set(tmp_path / "set", 2)
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": "p00.png", "split": split}), "utf-8")
    dataset = scan(folder)
    assert names_of(dataset, "metadata") == {"p00.png"}
    assert len(dataset.items) == 2


def test_a_metadata_line_nested_without_end_is_named(tmp_path: Path):
    folder = write_set(tmp_path / "set", 2)
    (folder / "metadata.jsonl").write_text("[" * 100_000, "utf-8")
    assert names_of(scan(folder), "metadata") == {"line 1"}


def test_a_linked_caption_counts_only_with_the_picture_it_belongs_to(tmp_path: Path):
    originals = write_set(tmp_path / "originals", 1)
    folder = write_set(tmp_path / "set", 1)
    for name in ("p00.png", "p00.txt"):
        (folder / f"x{name}").symlink_to(originals / f"{name}")
    (folder / "xp00.png").rename(folder / "p01.png")
    (folder / "xp00.txt").rename(folder / "p01.txt")
    assert {item.name: item.captions for item in scan(folder).items}["p01.png"] == (caption(0),)
    secret = tmp_path / "secret.txt"
    secret.write_text("the words of somebody else", "utf-8")
    (folder / "p01.txt").unlink()
    (folder / "p01.txt").symlink_to(secret)
    dataset = scan(folder)
    assert names_of(dataset, "caption") == {"p01.png"}
    assert "somebody" not in str(dataset.prompts)


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="this system has no endless file")
def test_links_to_endless_files_are_named(tmp_path: Path):
    folder = write_set(tmp_path / "set", 2)
    for name in ("p00.png", "p01.txt"):
        (folder / name).unlink()
        (folder / name).symlink_to("/dev/zero")
    dataset = scan(folder)
    assert names_of(dataset, "caption") == {"p01.png"}
    assert "p00.png" in names_of(dataset, "unreadable")


def test_a_tar_member_larger_than_the_tar_is_named(tmp_path: Path):
    path = tmp_path / "set.tar"
    header = tarfile.TarInfo("a.txt")
    header.size = 8 * 2**30
    picture = tarfile.TarInfo("a.png")
    picture.size = 8 * 2**30
    path.write_bytes(header.tobuf() + b"x" * 512 + picture.tobuf() + b"x" * 512)
    dataset = scan(path)
    assert "unreadable" in {problem.kind for problem in dataset.problems}
    header.size = 10
    path.write_bytes(header.tobuf() + b"a red disc".ljust(512, b"\0") + picture.tobuf() + b"x" * 512)
    problems = "\n".join(map(str, scan(path).problems))
    assert "a.png" in problems and "the archive ends before" in problems


def test_a_picture_of_one_endless_line_is_named(tmp_path: Path):
    folder = write_set(tmp_path / "set", 2)
    Image.new("L", (1, 100_000)).save(folder / "p00.png")
    dataset = scan(folder)
    assert names_of(dataset, "unreadable") == {"p00.png"}
    assert "65,535" in str(dataset.problems[0])


@pytest.mark.parametrize("number", ["99999", "9" * 200])
def test_a_folder_that_repeats_its_pictures_without_end_is_named(tmp_path: Path, number: str):
    write_set(tmp_path / "set", 1)
    write_set(tmp_path / "set" / f"{number}_dog", 1)
    dataset = scan(tmp_path / "set")
    assert len(names_of(dataset, "repeats")) == 1
    assert {item.repeats for item in dataset.items} == {1}
