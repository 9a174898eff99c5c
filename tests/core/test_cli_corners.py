"""Corners of the command line: two runs into one folder, scripts that fail half way, odd bytes, pictures named in a chat."""

import builtins
import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_models
from comfyui_blip3o.blip3o_core.errors import BadInputError
from comfyui_blip3o.blip3o_core.language.prompts import Message, chat_text
from comfyui_blip3o.blip3o_core.language.rows import pixel_limits
from comfyui_blip3o.blip3o_core.networks import Networks
from comfyui_blip3o.blip3o_core.pipeline import Blip3oPipeline
from comfyui_blip3o.cli import main
from command_line import LAUNCH

ROOT = Path(__file__).resolve().parents[2]
QUICK = ["--steps", "1", "--pixel-steps", "1", "--quiet"]
NO_TEXT = "caf\udce9"  # what Python makes of the bytes "caf\xe9" on a command line


def feed(monkeypatch: pytest.MonkeyPatch, content: bytes, encoding: str = "utf-8") -> None:
    """Give bytes as standard input, in a terminal's encoding."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), encoding=encoding))


def type_in(monkeypatch: pytest.MonkeyPatch, *typed: str | type[BaseException]) -> list[str]:
    """Let a person at a terminal type lines, or press keys that raise; returns the prompts they will have seen."""
    waiting, seen = list(typed), []

    class Terminal(io.TextIOWrapper):
        def isatty(self) -> bool:
            return True

    def read(prompt: str = "") -> str:
        seen.append(prompt)
        if not waiting:
            raise EOFError
        line = waiting.pop(0)
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr(sys, "stdin", Terminal(io.BytesIO()))
    monkeypatch.setattr(builtins, "input", read)
    return seen


def answers(monkeypatch: pytest.MonkeyPatch, answer: Callable[[list[Any], Callable[..., Any]], str]) -> None:
    """Let `answer` stand for the network: (turns of the chat, on_text) -> answer."""

    def chat(self: Blip3oPipeline, chats: Any, *, on_text: Any, **_: Any) -> list[str]:
        return [answer(list(chats[0]), on_text)]

    monkeypatch.setattr(Blip3oPipeline, "chat", chat)


# Pictures


def test_two_runs_into_one_folder_do_not_overwrite_each_other(
    model: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode, others = Blip3oPipeline.decode, []

    def meanwhile(self: Blip3oPipeline, *arguments: Any, **options: Any) -> Any:
        # Another run saves a picture under the next free number while each of this run is drawn.
        others.append(tmp_path / f"blip3o_0000{len(list(tmp_path.iterdir())) + 1}.png")
        others[-1].write_bytes(b"of another run")
        return decode(self, *arguments, **options)

    monkeypatch.setattr(Blip3oPipeline, "decode", meanwhile)
    count = ["-n", "3", "--batch-size", "1"]
    assert main(["generate", "red", *count, "-o", str(tmp_path), *QUICK, *model]) == 0
    assert [path.name for path in others] == [f"blip3o_0000{number}.png" for number in (1, 3, 5)]
    assert [path.read_bytes() for path in others] == [b"of another run"] * 3
    ours = [tmp_path / f"blip3o_0000{number}.png" for number in (2, 4, 6)]
    assert len({path.read_bytes() for path in ours}) == 3


def test_a_reader_that_has_enough_pictures_is_told_nothing(
    model: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    written: list[str] = []

    def cut_off(text: str) -> int:
        written.append(text)
        if len(written) > 2:  # a path and the end of its line
            raise BrokenPipeError(32, "Broken pipe")
        return len(text)

    monkeypatch.setattr(sys.stdout, "write", cut_off)
    monkeypatch.setattr("os.dup2", lambda *_: None)
    monkeypatch.setattr(sys.stdout, "fileno", lambda: 1)
    count = ["-n", "3", "--batch-size", "1"]
    assert main(["generate", "red", *count, "-o", str(tmp_path), *QUICK, *model]) == 141
    assert capsys.readouterr().err == ""


def test_a_disk_that_tells_no_size_is_not_called_full(
    model: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage._replace(total=0, used=0, free=0))
    assert main(["generate", "red", "-o", str(tmp_path), *QUICK, *model]) == 0


def test_prompts_of_a_file_are_split_at_line_breaks_alone(
    model: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    listed = tmp_path / "prompts.txt"
    listed.write_bytes("red\u2028circle\rblue\x0bsquare\r\n\nyellow".encode())
    assert main(["generate", "--prompts", str(listed), "-o", str(tmp_path), "--json", *QUICK, *model]) == 0
    prompts = [each["prompt"] for each in json.loads(capsys.readouterr().out)]
    assert prompts == ["red\u2028circle", "blue\x0bsquare", "yellow"]


@pytest.mark.parametrize("option", ["--like", "--image", "--start-image"])
def test_an_address_is_told_from_a_file_wherever_a_picture_is_named(
    model: list[str], nothing_computes: None, capsys: pytest.CaptureFixture[str], option: str
) -> None:
    assert main(["generate", "red", option, "https://example.com/a.png", *model]) == 2
    message = capsys.readouterr().err
    assert '"https://example.com/a.png" is an address' in message and "Download" in message


# What is known beforehand


def test_pictures_too_many_at_once_for_the_memory_are_told_with_the_arithmetic(
    model: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # Of one picture of 64 x 64 pixels the UNet holds 4 MB, of eight 30 MB.
    monkeypatch.setattr("comfyui_blip3o.blip3o_core.pipeline.total_memory", lambda device: 8 * 2**20)
    several = ["generate", "red", "-n", "8", "--size", "64x64", "-o", str(tmp_path), *QUICK, *model]
    assert main(several) == 2
    message = capsys.readouterr().err
    assert "8 pictures of 64 x 64 pixels at once need about 30.0 MB" in message and "fewer at once" in message
    assert not list(tmp_path.iterdir())
    assert main([*several, "--batch-size", "2"]) == 0


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        (["generate", "<image> red"], 'says "<image>" 1 time(s), but 0 picture(s)'),
        (["generate", "red", "--negative", "<image>"], 'says "<image>" 1 time(s), but 0 picture(s)'),
        (["generate", "red <|image_pad|>"], 'Write "<image>"'),
        (["generate", "red <|image_pad|>", "--image", "GIVEN"], 'Write "<image>"'),
        (["ask", "<image> <image> red ?", "GIVEN"], 'says "<image>" 2 time(s), but 1 picture(s)'),
        (["ask", "<image> red ?", "GIVEN", "--yes-no"], None),
        (["ask", "<image> <image> red ?", "GIVEN", "--yes-no"], 'says "<image>" 2 time(s)'),
        (["ask", "<image> red ?", "--choices", "red", "blue"], 'says "<image>" 1 time(s), but 0 picture(s)'),
        (["ask", "red ?", "--max-pixels", "-1"], "--max-pixels is -1"),
        (["ask", "red ?", "--min-pixels", "0"], "--min-pixels is 0"),
        (["ask", "red ?", "--min-pixels", "9000", "--max-pixels", "100"], "--max-pixels is 100"),
        (["ask", "red ?", "GIVEN", "--yes-no", "--min-pixels", "0"], "--min-pixels is 0"),
        (["caption", "GIVEN", "--batch-size", "0"], "--batch-size is 0"),
        (["caption", "GIVEN", "--max-pixels", "0"], "--max-pixels is 0"),
        (["caption", "GIVEN", "--style", "nice"], 'no caption style "nice"'),
    ],
    ids=str,
)
def test_what_cannot_be_asked_or_drawn_is_told_before_a_network_is_read(
    model: list[str],
    picture: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    fragment: str | None,
) -> None:
    if fragment is not None:
        monkeypatch.setattr(Networks, "get", lambda self, name: pytest.fail(f"{name} was read"))
    code = main([*(word.replace("GIVEN", picture) for word in arguments), *model])
    assert code == (0 if fragment is None else 2)
    assert (fragment or "") in capsys.readouterr().err


def test_pixel_limits_name_the_value_that_is_wrong(tmp_path: Path) -> None:
    for values, fragment in (((None, -1), "max_pixels is -1"), ((0, None), "min_pixels is 0")):
        with pytest.raises(BadInputError, match=fragment):
            pixel_limits(tmp_path, *values)


@pytest.mark.parametrize("words", [["ask", NO_TEXT], ["ask", "red ?", "--system", NO_TEXT]], ids=str)
def test_bytes_that_are_no_text_are_shown_without_the_model_s_own_words(
    model: list[str], nothing_computes: None, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    assert main([*words, *model]) == 2
    message = capsys.readouterr().err
    assert message.startswith('The text "caf?" holds bytes')
    assert "<|im_start|>" not in message


def test_a_folder_that_cannot_take_captions_is_told_before_a_network_is_read(
    model: list[str],
    picture: str,
    nothing_computes: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def denied(**_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryFile", denied)
    assert main(["caption", picture, "--write", *model]) == 2
    assert f'"{Path(picture).parent}" (Permission denied)' in capsys.readouterr().err


def test_a_folder_named_like_a_picture_is_told_before_a_network_is_read(
    model: list[str],
    nothing_computes: None,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    target = tmp_path / "cat.png"
    target.mkdir()
    assert main(["generate", "red", "-o", str(target), *QUICK, *model]) == 2
    assert f'"{target}" is a folder' in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "fragment"),
    [("nowhere.png", 'There is no picture "nowhere.png"'), ("https://a.b/c.png", '"https://a.b/c.png" is an address')],
)  # fmt: skip
def test_a_picture_that_is_not_there_is_told_before_any_is_described(
    model: list[str],
    picture: str,
    nothing_computes: None,
    capsys: pytest.CaptureFixture[str],
    name: str,
    fragment: str,
) -> None:
    assert main(["caption", picture, name, "--batch-size", "1", "--quiet", *model]) == 2
    assert fragment in capsys.readouterr().err


@pytest.mark.parametrize("is_json", [False, True])
def test_captions_that_are_written_are_shown_although_a_later_picture_is_broken(
    model: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], is_json: bool
) -> None:
    paths = [tmp_path / name for name in ("a.png", "b.png", "c.png")]
    for path in paths[:2]:
        tiny_models.picture().save(path)
    paths[2].write_bytes(b"no picture")
    options = ["--batch-size", "1", "--max-tokens", "3", "--quiet", *(["--json"] if is_json else [])]
    assert main(["caption", str(tmp_path), *options, *model]) == 2
    out, err = capsys.readouterr()
    shown = list(json.loads(out)) if is_json else [line.split(": ")[0] for line in out.splitlines()]
    assert shown == [str(path) for path in paths[:2]]
    assert "c.png" in err


# Output


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="names of files are bytes on Linux alone")
def test_a_name_that_is_no_text_goes_out_as_it_came_in(tiny_folder: Path, tmp_path: Path) -> None:
    target = bytes(tmp_path) + b"/caf\xe9.png"
    arguments = [b"generate", b"red", b"-o", target, *(word.encode() for word in QUICK)]
    arguments += [b"--model", bytes(tiny_folder)]
    done = subprocess.run(
        [sys.executable.encode(), b"-c", LAUNCH.encode(), *arguments],
        capture_output=True,
        env={"PYTHONIOENCODING": "utf-8:strict", "OMP_NUM_THREADS": "1"},
    )
    assert (done.returncode, done.stdout) == (0, target + b"\n"), done.stderr.decode()


def test_a_character_that_a_terminal_lacks_does_not_end_a_command(
    model: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, encoding="cp1252"))
    answers(monkeypatch, lambda turns, on_text: "猫")
    assert main(["ask", "What is this ?", "--json", *model]) == 0
    assert json.loads(shown.getvalue().decode("cp1252"))[0]["answer"] == "猫"


# Chat


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="a program's output is closed by a POSIX shell")
def test_a_command_works_although_its_output_is_closed() -> None:
    command = ["sh", "-c", 'exec "$@" >&-', "sh", sys.executable, "-c", LAUNCH, "info"]
    done = subprocess.run(command, capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")


def test_a_script_that_fails_half_way_still_hands_over_what_was_said(
    model: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    feed(monkeypatch, b"What is this ?\n/image nowhere.png\nand this ?\n")
    answers(monkeypatch, lambda turns, on_text: "red")
    assert main(["chat", "--json", *model]) == 2
    said = json.loads(capsys.readouterr().out)
    assert [turn["text"] for turn in said] == ["What is this ?", "red"]


def test_a_script_is_utf_8_whatever_the_terminal_s_encoding(
    model: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    feed(monkeypatch, "\ufeffgrün ?\r\n".encode(), encoding="cp1252")
    answers(monkeypatch, lambda turns, on_text: "red")
    assert main(["chat", "--json", *model]) == 0
    assert json.loads(capsys.readouterr().out)[0]["text"] == "grün ?"
    feed(monkeypatch, b"gr\xfcn ?\n", encoding="cp1252")
    assert main(["chat", *model]) == 2
    assert "not UTF-8" in capsys.readouterr().err


@pytest.mark.parametrize("written", ['"{}"', "'{}'", "~/my pictures/given.png", "{}"])
def test_a_picture_is_named_in_a_chat_as_it_is_dropped_there(
    model: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: str
) -> None:
    path = tmp_path / "my pictures" / "given.png"
    path.parent.mkdir()
    tiny_models.picture().save(path)
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(tmp_path))
    seen = []
    answers(monkeypatch, lambda turns, on_text: seen.append(turns[-1].images) or "red")
    feed(monkeypatch, f"/image {written.format(path)}\nWhat is this ?\n".encode())
    assert main(["chat", *model]) == 0
    assert [image.tobytes() for image in seen[0]] == [tiny_models.picture().tobytes()]


def test_a_person_who_errs_goes_on_talking(
    model: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "file").write_text("in the way", "utf-8")
    lines = ["/image nowhere.png", f"/save {tmp_path}/file/a.md", "/sing", "<image> this ?", "What ?"]
    type_in(monkeypatch, *lines)
    assert main(["chat", "--max-tokens", "3", "--json", *model]) == 0
    out, err = capsys.readouterr()
    assert [turn["text"] for turn in json.loads(out)][::2] == ["What ?"]
    for fragment in ("There is no picture", "cannot be written", "not a command", 'says "<image>" 1 time(s)'):
        assert fragment in err
    assert "Errno" not in err


def test_ctrl_c_at_the_prompt_ends_nothing(
    model: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    type_in(monkeypatch, KeyboardInterrupt, "What ?")
    answers(monkeypatch, lambda turns, on_text: "red")
    assert main(["chat", "--json", *model]) == 0
    assert len(json.loads(capsys.readouterr().out)) == 2


def test_an_answer_that_is_stopped_before_its_first_word_was_never_asked_for(
    model: list[str], picture: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = []

    def stopped_once(turns: list[Any], on_text: Any) -> str:
        seen.append([len(turn.images) for turn in turns])
        if len(seen) == 1:
            raise KeyboardInterrupt
        return "red"

    answers(monkeypatch, stopped_once)
    type_in(monkeypatch, "What is this ?", "Is it red ?")
    assert main(["chat", picture, "--json", *model]) == 0
    said = json.loads(capsys.readouterr().out)
    assert [turn["text"] for turn in said] == ["Is it red ?", "red"]
    assert seen == [[1], [1]]  # the picture waits for the next line


def test_the_prompt_of_a_chat_does_not_get_into_its_json(
    model: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = type_in(monkeypatch, "What ?")
    answers(monkeypatch, lambda turns, on_text: "red")
    assert main(["chat", "--json", *model]) == 0
    # input() writes its prompt to standard output, which here is not the terminal.
    assert set(seen) == {""}
    assert "> " in capsys.readouterr().err


def test_what_the_model_said_about_image_marks_is_no_place_for_a_picture() -> None:
    talk = [Message("user", "hello"), Message("assistant", "write <image> first"), Message("user", "why ?")]
    assert "write <image> first" in chat_text(talk)
    with pytest.raises(BadInputError, match='says "<image>"'):
        chat_text([Message("user", "write <image> first")])
