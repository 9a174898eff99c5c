"""Files that appear complete or not at all."""

import os
from pathlib import Path

import pytest
from comfyui_blip3o.blip3o_core.files import replacing


def test_a_file_appears_when_its_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "note.txt"
    with replacing(path) as temporary:
        temporary.write_text("a red circle", "utf-8")
        assert temporary.parent == path.parent and not path.exists()
    assert path.read_text("utf-8") == "a red circle"
    assert os.listdir(path.parent) == ["note.txt"]


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "note.txt"
    path.write_text("old", "utf-8")
    with pytest.raises(KeyboardInterrupt), replacing(path) as temporary:
        temporary.write_text("half", "utf-8")
        raise KeyboardInterrupt
    assert path.read_text("utf-8") == "old"
    assert os.listdir(tmp_path) == ["note.txt"]


def test_two_writers_of_one_file_do_not_mix(tmp_path: Path) -> None:
    path = tmp_path / "note.txt"
    with replacing(path) as first:
        first.write_text("one", "utf-8")
        with replacing(path) as second:
            second.write_text("two", "utf-8")
        assert first.read_text("utf-8") == "one"
    assert path.read_text("utf-8") == "one"


@pytest.mark.skipif(os.name == "nt", reason="Windows has no permission bits")
def test_the_file_has_the_permissions_of_any_new_file(tmp_path: Path) -> None:
    plain, path = tmp_path / "plain", tmp_path / "replaced"
    plain.touch()
    with replacing(path) as temporary:
        temporary.touch()
    assert path.stat().st_mode == plain.stat().st_mode
