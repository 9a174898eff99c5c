"""The command line as people use it: what is known beforehand is told beforehand, what is done is kept."""

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_models
from comfyui_blip3o.blip3o_core.drawing.request import DrawRequest
from comfyui_blip3o.blip3o_core.errors import Blip3oError
from comfyui_blip3o.blip3o_core.pipeline import Blip3oPipeline
from comfyui_blip3o.cli import main
from command_line import LAUNCH
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parents[2]
QUICK = ["--steps", "2", "--pixel-steps", "2", "--quiet"]


def given(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), encoding="utf-8"))


# Known beforehand


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        (["--size", "100000x100000"], "--size: the width is 100000"),
        (["--size", "0x0"], "--size: the width is 0"),
        (["--size", "7x7"], "--size: the width is 7; this decoder draws multiples of 2 pixels"),
        (["--size", "٣x٣"], "is no size"),
        (["--count", "0"], "--count is 0"),
        (["--cfg", "nan"], "--cfg is nan"),
        (["--pixel-cfg", "nan"], "--pixel-cfg is nan"),
        (["--steps", "0"], "--steps is 0"),
        (["--pixel-steps", "0"], "--pixel-steps is 0"),
        (["--pixel-sampler", "heun"], '--pixel-sampler is "heun"'),
        (["--guidance-interval", "0.9", "0.1"], "--guidance-interval is 0.9 to 0.1"),
        (["--batch-size", "0"], "--batch-size is 0"),
        (["--seed", "-1"], "--seed is -1"),
        (["--preset", "nice"], '--preset is "nice"'),
        (["--start-image", "GIVEN", "--strength", "2"], "--strength is 2"),
        (["--start-image", "nowhere.png"], 'There is no picture "nowhere.png"'),
        (["--image", "https://example.com/a.png"], '"https://example.com/a.png" is an address'),
        (["--like", "nowhere.png"], 'There is no picture "nowhere.png"'),
        (["--out", ""], "--out is empty"),
        (["--out", "GIVEN/inside"], "is a file"),
        (["--prompts", "nowhere.txt"], '"nowhere.txt" cannot be read'),
        (["--decoder", "nowhere"], '"nowhere" is no complete decoder'),
    ],
    ids=str,
)
def test_what_cannot_be_drawn_is_told_before_anything_is_read(
    model: list[str],
    picture: str,
    nothing_computes: None,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    fragment: str,
) -> None:
    arguments = [word.replace("GIVEN", picture) for word in arguments]
    assert main(["generate", "red", *arguments, *model]) == 2
    assert fragment in capsys.readouterr().err


def test_a_picture_too_large_for_the_memory_is_told_with_the_arithmetic(
    model: list[str],
    nothing_computes: None,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("comfyui_blip3o.blip3o_core.pipeline.total_memory", lambda device: 2**20)
    assert main(["generate", "red", "--size", "4096x4096", *model]) == 2
    message = capsys.readouterr().err
    assert "4096 x 4096 pixels needs about" in message and "1.0 MB in all" in message and "tiles" in message


def test_a_full_disk_is_told_before_anything_is_read(
    model: list[str],
    nothing_computes: None,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import shutil

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage._replace(free=1000))
    assert main(["generate", "red", "-o", str(tmp_path), *model]) == 2
    assert "1 pictures of 32 x 32 pixels may need 3.0 KB" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_told_before_anything_is_read(
    model: list[str],
    nothing_computes: None,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def denied(**_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryFile", denied)
    assert main(["generate", "red", "-o", str(tmp_path / "new"), *model]) == 2
    assert f'Nothing can be written into "{tmp_path}" (Permission denied)' in capsys.readouterr().err


@pytest.mark.parametrize("question", ["", "  "])
def test_an_empty_question_is_asked_for(
    model: list[str], nothing_computes: None, capsys: pytest.CaptureFixture[str], question: str
) -> None:
    assert main(["ask", question, *model]) == 2
    assert "There is no question" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "value"), [("--temperature", "-1"), ("--max-tokens", "0"), ("--top-p", "3")]
)
def test_answer_settings_are_named_as_typed(
    model: list[str], nothing_computes: None, capsys: pytest.CaptureFixture[str], option: str, value: str
) -> None:
    for command in (["ask", "What ?"], ["chat"]):
        assert main([*command, option, value, *model]) == 2
        assert capsys.readouterr().err.startswith(option)


# What is done is kept


@pytest.mark.parametrize("error", [KeyboardInterrupt(), Blip3oError("broken")])
@pytest.mark.parametrize("is_json", [False, True])
def test_pictures_that_are_drawn_stay_when_a_later_one_fails(
    model: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    is_json: bool,
) -> None:
    decode, calls = Blip3oPipeline.decode, []

    def failing(self: Blip3oPipeline, *arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise error
        return decode(self, *arguments, **options)

    monkeypatch.setattr(Blip3oPipeline, "decode", failing)
    arguments = ["generate", "red", "-n", "5", "--batch-size", "2", "-o", str(tmp_path), *QUICK, *model]
    code = main([*arguments, *(["--json"] if is_json else [])])
    assert code == (130 if isinstance(error, KeyboardInterrupt) else 2)
    saved = sorted(str(path) for path in tmp_path.glob("*.png"))
    assert len(saved) == 4
    out, err = capsys.readouterr()
    assert ([each["file"] for each in json.loads(out)] if is_json else out.splitlines()) == saved
    assert "4 of 5 pictures are saved." in err


def test_a_picture_is_saved_before_the_next_one_is_drawn(
    model: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample, seen = Blip3oPipeline.sample_features, []

    def watched(self: Blip3oPipeline, *arguments: Any, **options: Any) -> Any:
        seen.append(len(list(tmp_path.glob("*.png"))))
        return sample(self, *arguments, **options)

    monkeypatch.setattr(Blip3oPipeline, "sample_features", watched)
    monkeypatch.setattr(Blip3oPipeline, "_decoder_negative", lambda self, request, noise: None)
    assert main(["generate", "red", "-n", "3", "--batch-size", "1", "-o", str(tmp_path), *QUICK, *model]) == 0
    assert seen == [0, 1, 2]


# Prompts from elsewhere


def test_prompts_come_from_a_file(
    model: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    listed = tmp_path / "prompts.txt"
    listed.write_bytes("\ufeffred\n\n# not this\r\n two dogs \n".encode())
    assert main(["generate", "--prompts", str(listed), "-o", str(tmp_path), "--json", *QUICK, *model]) == 0
    described = json.loads(capsys.readouterr().out)
    assert [(each["prompt"], each["seed"]) for each in described] == [("red", 0), ("two dogs", 1)]


@pytest.mark.parametrize("arguments", [["-"], ["--prompts", "-"]])
def test_prompts_come_from_standard_input(
    model: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
) -> None:
    given(monkeypatch, b"red\nblue\n")
    assert main(["generate", *arguments, "-n", "2", "-o", str(tmp_path), "--json", *QUICK, *model]) == 0
    prompts = [each["prompt"] for each in json.loads(capsys.readouterr().out)]
    assert prompts == ["red", "red", "blue", "blue"]


def test_an_empty_list_of_prompts_is_told(
    model: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given(monkeypatch, b"\n# nothing\n")
    assert main(["generate", "-", *model]) == 2
    assert "standard input holds no prompt" in capsys.readouterr().err


# Places of pictures


@pytest.mark.parametrize("mark", ["<image>\n", "<image>\\n", "<image>"])
def test_published_prompts_name_the_place_of_a_picture(
    model: list[str], tmp_path: Path, picture: str, mark: str
) -> None:
    for name, prompt in (("ours.png", "reconstruct"), ("published.png", f"{mark}reconstruct")):
        out = ["-o", str(tmp_path / name)]
        assert main(["generate", prompt, "--image", picture, *out, *QUICK, *model]) == 0
    ours, published = (pixels_of(tmp_path / name) for name in ("ours.png", "published.png"))
    assert ours == published


def pixels_of(path: Path) -> bytes:
    from PIL import Image

    with Image.open(path) as image:
        return image.tobytes()


@pytest.mark.parametrize("pictures", [0, 2])
def test_a_wrong_number_of_places_is_told_in_the_words_that_were_typed(
    model: list[str], picture: str, capsys: pytest.CaptureFixture[str], pictures: int
) -> None:
    images = ["--image", picture] * pictures
    assert main(["generate", "<image>\nred", *images, *QUICK, *model]) == 2
    assert f'says "<image>" 1 time(s), but {pictures} picture(s) are given' in capsys.readouterr().err


def test_a_question_may_name_the_place_of_its_picture(
    model: list[str], picture: str, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = []
    for question in ("What is this ?", "<image>\nWhat is this ?"):
        assert main(["ask", question, picture, "--max-tokens", "5", "--json", *model]) == 0
        answers.append(json.loads(capsys.readouterr().out)[0]["answer"])
    assert answers[0] == answers[1]


# Checkpoints with more or less inside


def test_a_checkpoint_with_leftovers_draws_answers_and_varies(
    tiny_folder: Path, tmp_path: Path, picture: str, capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil

    import torch

    folder = Path(shutil.copytree(tiny_folder, tmp_path / "Published"))
    shard = folder / "model-00001-of-00001.safetensors"
    extra = {f"model.vae.{part}.conv_in.weight": torch.ones(2, 2) for part in ("encoder", "decoder")}
    save_file(load_file(str(shard)) | extra, str(shard))
    model = ["--model", str(folder), "--device", "cpu"]
    for command in (["generate", "red"], ["vary", picture]):
        assert main([*command, "-o", str(tmp_path), *QUICK, *model]) == 0
    assert main(["ask", "What is this ?", picture, "--max-tokens", "3", *model]) == 0
    capsys.readouterr()
    assert main(["info", str(folder)]) == 0
    assert "left out: 2 tensors of model.vae, 32 B" in capsys.readouterr().out
    assert main(["generate", "red", "--strict", *QUICK, *model]) == 2
    assert "model.vae" in capsys.readouterr().err


def test_a_decoder_elsewhere_is_named(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil

    folder = Path(shutil.copytree(tiny_folder, tmp_path / "deep" / "Finetune"))
    shutil.rmtree(folder / "diffusion-decoder")
    arguments = ["generate", "red", "-o", str(tmp_path / "a.png"), "--model", str(folder), *QUICK]
    assert main(arguments) == 2
    assert "--decoder FOLDER" in capsys.readouterr().err
    assert main([*arguments, "--decoder", str(tiny_folder)]) == 0


# Pipes and bytes


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [["info", "--json"], ["info"], ["generate", "red", "-n", "2"]], ids=str)
def test_a_reader_that_has_enough_ends_a_command_quietly(tmp_path: Path, arguments: list[str]) -> None:
    if arguments[0] == "generate":
        arguments = [*arguments, "-o", str(tmp_path), *QUICK]
    process = subprocess.Popen(
        [sys.executable, "-c", LAUNCH, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 141


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="arguments are bytes on Linux alone")
@pytest.mark.parametrize("arguments", [[b"ask", b"caf\xe9"], [b"generate", b"caf\xe9"]], ids=str)
def test_bytes_that_are_no_text_are_told(arguments: list[bytes]) -> None:
    done = subprocess.run([sys.executable.encode(), b"-c", LAUNCH.encode(), *arguments], capture_output=True)
    assert done.returncode == 2
    assert b"not UTF-8" in done.stderr and b"Traceback" not in done.stderr


# Chat


def chat(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, lines: str, *arguments: str
) -> Any:
    given(monkeypatch, lines.encode())
    assert main(["chat", "--max-tokens", "5", "--json", *arguments]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_chat_keeps_what_was_said_and_shown(
    model: list[str],
    picture: str,
    pipeline: Blip3oPipeline,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from comfyui_blip3o.blip3o_core.language.answers import AnswerSettings, Turn

    said = chat(capsys, monkeypatch, f"/image {picture}\nWhat is this ?\nand this ?\n", *model)
    assert [turn["role"] for turn in said] == ["user", "assistant"] * 2
    assert said[0]["pictures"] == [picture] and said[2]["pictures"] == []
    settings = AnswerSettings(max_new_tokens=5)
    turns = [Turn("user", "What is this ?", (tiny_models.picture(),))]
    first = pipeline.chat([turns], settings=settings)[0]
    second = pipeline.chat(
        [[*turns, Turn("assistant", first), Turn("user", "and this ?")]], settings=settings
    )[0]
    assert [said[1]["text"], said[3]["text"]] == [first, second]


def test_a_chat_is_reset_and_saved(
    model: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    notes, record = tmp_path / "chat.md", tmp_path / "chat.json"
    lines = f"What is this ?\n/reset\nand this ?\n/save {notes}\n/save {record}\n/quit\nnot said\n"
    said = chat(capsys, monkeypatch, lines, *model)
    assert [turn["text"] for turn in said if turn["role"] == "user"] == ["and this ?"]
    assert json.loads(record.read_text("utf-8")) == said
    assert notes.read_text("utf-8").startswith("**user**\n\nand this ?\n")


@pytest.mark.parametrize(
    ("line", "fragment"),
    [("/image nowhere.png", "There is no picture"), ("/image", "needs the name"), ("/sing", "not a command")],
)
def test_a_script_that_chats_ends_at_its_first_mistake(
    model: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    line: str,
    fragment: str,
) -> None:
    given(monkeypatch, f"{line}\nWhat is this ?\n".encode())
    assert main(["chat", *model]) == 2
    assert fragment in capsys.readouterr().err


def test_ctrl_c_stops_an_answer_and_the_chat_goes_on(
    model: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = Blip3oPipeline.chat, []

    def once(self: Blip3oPipeline, *arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 1:
            options["on_text"](0, "half an answ")
            raise KeyboardInterrupt
        return original(self, *arguments, **options)

    monkeypatch.setattr(Blip3oPipeline, "chat", once)
    said = chat(capsys, monkeypatch, "What is this ?\nand this ?\n", *model)
    assert said[1]["text"] == "half an answ"
    assert len(said) == 4


# One record


def test_a_request_is_read_back_from_its_note() -> None:
    from comfyui_blip3o.blip3o_core.drawing.decoding import PixelSettings
    from comfyui_blip3o.blip3o_core.drawing.sampling import FeatureSettings

    request = DrawRequest(
        ("red",),
        seed=5,
        pixel_seed=9,
        preset="fast",
        features=FeatureSettings(steps=7, guidance_interval=(0.1, 0.8)),
        pixels=PixelSettings(steps=3, width=24, height=32),
        negative_prompt="blue",
        pixel_negative=None,
    )
    note = {"prompt": "red", "seed": 5, "pixel_seed": 9, **request.note((32, 24))}
    read = DrawRequest(**DrawRequest.options_of_note(json.loads(json.dumps(note))))
    assert read == request
