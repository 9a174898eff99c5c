"""Files that appear complete or not at all."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from comfyui_blip3o.blip3o_core import files
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


def test_what_a_killed_process_left_is_gone_when_the_next_one_writes(tmp_path: Path) -> None:
    write = (
        "import sys, time; sys.path.insert(0, {tests!r}); import conftest; "
        "from comfyui_blip3o.blip3o_core.files import replacing\n"
        "with replacing({path!r}) as temporary:\n"
        "    temporary.write_bytes(bytes(1000)); print(temporary.name, flush=True); time.sleep(60)"
    )
    tests = str(Path(__file__).parents[1])
    command = write.format(tests=tests, path=str(tmp_path / "weights.safetensors"))
    writer = subprocess.Popen([sys.executable, "-c", command], stdout=subprocess.PIPE, text=True)
    assert writer.stdout is not None
    name = writer.stdout.readline().strip()
    other = tmp_path / "other"
    with replacing(other) as temporary:
        temporary.touch()
        assert (tmp_path / name).exists(), "a file that is being written is left alone"
    writer.kill()
    writer.wait()
    writer.stdout.close()
    files._tidied.clear()  # as in a new process
    (tmp_path / "mine.part").touch()
    with replacing(other) as temporary:
        temporary.touch()
    assert sorted(os.listdir(tmp_path)) == ["mine.part", "other"]


def test_a_name_as_long_as_systems_allow_can_be_written(tmp_path: Path) -> None:
    path = tmp_path / ("集" * 80 + ".txt")
    with replacing(path) as temporary:
        temporary.touch()
    assert path.exists()
