"""The blip3o command, run in this process on a tiny checkpoint."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_models
import torch
from comfyui_blip3o import cli
from comfyui_blip3o.blip3o_core.checkpoints.layout import open_checkpoint
from comfyui_blip3o.blip3o_core.checkpoints.load import load_dit
from comfyui_blip3o.blip3o_core.drawing.sampling import FeatureSettings
from comfyui_blip3o.blip3o_core.picture_files import read_note
from comfyui_blip3o.blip3o_core.pipeline import Blip3oPipeline
from comfyui_blip3o.cli import main
from comfyui_blip3o.cli import options as cli_options
from PIL import Image
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = (
    "generate",
    "vary",
    "ask",
    "caption",
    "chat",
    "info",
    "download",
    "convert",
    "doctor",
    "verify-reference",
)
QUICK = ["--steps", "2", "--pixel-steps", "2", "--quiet"]


def run_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> object:
    capsys.readouterr()
    assert main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def pixels_of(path: str | Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


# generate


def test_generate_writes_numbered_pictures_and_never_overwrites(
    model: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "pictures"
    assert main(["generate", "red", "two dogs", "-o", str(out), *QUICK, *model]) == 0
    assert capsys.readouterr().out.splitlines() == [str(out / f"blip3o_0000{n}.png") for n in (1, 2)]
    first = (out / "blip3o_00001.png").read_bytes()
    assert main(["generate", "red", "-o", str(out), "--seed", "9", *QUICK, *model]) == 0
    assert (out / "blip3o_00003.png").is_file()
    assert (out / "blip3o_00001.png").read_bytes() == first


def test_generate_to_a_named_file(model: list[str], tmp_path: Path) -> None:
    out = tmp_path / "mine.png"
    assert main(["generate", "red", "-o", str(out), *QUICK, *model]) == 0
    assert Image.open(out).size == (32, 32)
    assert main(["generate", "red", "-n", "2", "-o", str(out), *QUICK, *model]) == 0
    assert sorted(path.name for path in tmp_path.glob("mine_*.png")) == ["mine_00.png", "mine_01.png"]


def test_generate_draws_what_the_pipeline_draws(
    model: list[str], tmp_path: Path, pipeline: Blip3oPipeline
) -> None:
    out = tmp_path / "a.png"
    arguments = ["--seed", "5", "--cfg", "2", "--sampler", "heun", "--pixel-sampler", "dpmpp_2m"]
    assert main(["generate", "red", "-o", str(out), *arguments, *QUICK, *model]) == 0
    from comfyui_blip3o.blip3o_core.drawing.decoding import PixelSettings

    expected = pipeline.generate(
        "red",
        seed=5,
        features=FeatureSettings(steps=2, guidance_scale=2.0, sampler="heun"),
        pixels=PixelSettings(steps=2, sampler="dpmpp_2m"),
    )
    assert np.abs(pixels_of(out) - np.asarray(expected.pictures[0]).astype(int)).max() <= 1


def test_every_option_reaches_the_picture(
    model: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    described = run_json(
        capsys,
        *["generate", "red", "-o", str(tmp_path), "--seed", "4", "--pixel-seed", "8", "--preset", "fast"],
        *["--size", "24x42", "--cfg", "2.5", "--shift", "1.5", "--guidance-interval", "0.1", "0.9"],
        *["--pixel-cfg", "1.5", "--tiled", "--negative", "blue", "--pixel-negative", "zeros", *QUICK, *model],
    )[0]
    assert (described["seed"], described["pixel_seed"], described["preset"]) == (4, 8, "fast")
    assert described["features"] == {
        "steps": 2,
        "guidance_scale": 2.5,
        "sampler": "ab2",
        "shift": 1.5,
        "guidance_interval": [0.1, 0.9],
    }
    assert described["pixels"] == {
        "steps": 2,
        "guidance_scale": 1.5,
        "sampler": "dpmpp_2m",
        "width": 24,
        "height": 42,
        "guidance_interval": [0.0, 1.0],
        "tiled": True,
    }
    assert (described["negative_prompt"], described["pixel_negative"]) == ("blue", None)
    assert Image.open(described["file"]).size == (24, 42)


def test_pictures_in_the_prompt_and_to_start_from(model: list[str], tmp_path: Path, picture: str) -> None:
    outs = [tmp_path / f"{name}.png" for name in ("plain", "inside", "start")]
    for out, options in zip(
        outs, ([], ["--image", picture], ["--start-image", picture, "--strength", "0.5"]), strict=True
    ):
        assert main(["generate", "red", *options, "-o", str(out), *QUICK, *model]) == 0
    plain, inside, start = (pixels_of(out) for out in outs)
    assert np.abs(plain - inside).max() > 2
    assert np.abs(plain - start).max() > 2


# --like


@pytest.mark.parametrize(
    "options",
    [
        ["--seed", "3"],
        ["--seed", "3", "--pixel-seed", "11", "--negative", "blue", "--pixel-negative", "zeros"],
        ["--sampler", "ab2", "--shift", "2", "--size", "40x24", "--pixel-negative", "yellow"],
        ["--preset", "fast", "--cfg", "1"],
    ],
)
def test_like_draws_every_picture_of_a_batch_again(
    model: list[str], tmp_path: Path, options: list[str]
) -> None:
    assert main(["generate", "red", "two dogs", "-o", str(tmp_path), *options, *QUICK, *model]) == 0
    for number in (1, 2):
        source, again = tmp_path / f"blip3o_0000{number}.png", tmp_path / f"again{number}.png"
        assert main(["generate", "--like", str(source), "-o", str(again), "--quiet", *model]) == 0
        assert np.abs(pixels_of(source) - pixels_of(again)).max() <= 1
        assert read_note(again) == read_note(source)


def test_like_keeps_a_negative_seed_that_python_chose(
    model: list[str], tmp_path: Path, pipeline: Blip3oPipeline
) -> None:
    from comfyui_blip3o.blip3o_core.drawing.decoding import PixelSettings
    from comfyui_blip3o.blip3o_core.picture_files import describe_picture, save_png

    made = pipeline.generate(
        "red",
        pixel_negative_seed=77,
        features=FeatureSettings(steps=2),
        pixels=PixelSettings(steps=2, guidance_scale=6.0),
    )
    source, again = tmp_path / "source.png", tmp_path / "again.png"
    save_png(made.pictures[0], source, describe_picture(made, 0, "tiny", ""))
    assert main(["generate", "--like", str(source), "-o", str(again), "--quiet", *model]) == 0
    assert np.abs(pixels_of(source) - pixels_of(again)).max() <= 1
    assert read_note(again)["pixel_negative_seed"] == 77


def test_like_can_be_changed(model: list[str], tmp_path: Path) -> None:
    source, other = tmp_path / "source.png", tmp_path / "other.png"
    assert main(["generate", "red", "--seed", "3", "-o", str(source), *QUICK, *model]) == 0
    changed = ["two dogs", "--seed", "6", "--cfg", "1"]
    assert main(["generate", *changed, "--like", str(source), "-o", str(other), "--quiet", *model]) == 0
    described = read_note(other)
    assert (described["prompt"], described["seed"], described["pixel_seed"]) == ("two dogs", 6, 6)
    assert (described["features"]["guidance_scale"], described["features"]["steps"]) == (1.0, 2)


def test_like_warns_that_published_pictures_depend_on_the_first_of_their_run(
    model: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    published = ["generate", "red", "two dogs", "--preset", "published"]
    assert main([*published, "-o", str(tmp_path), *QUICK, *model]) == 0
    differences = []
    for number in (1, 2):
        source, again = tmp_path / f"blip3o_0000{number}.png", tmp_path / f"again{number}.png"
        capsys.readouterr()
        assert main(["generate", "--like", str(source), "-o", str(again), "--quiet", *model]) == 0
        assert "first picture" in capsys.readouterr().err
        differences.append(np.abs(pixels_of(source) - pixels_of(again)).max())
    assert differences[0] <= 1
    assert differences[1] > 1


def test_like_says_when_the_picture_cannot_come_out_the_same(
    model: list[str], tmp_path: Path, picture: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "source.png"
    options = ["--image", picture, "-o", str(source), *QUICK]
    assert main(["generate", "red", *options, *model]) == 0
    other = tiny_models.write_checkpoint(tmp_path / "other", dtype=torch.bfloat16)
    again = ["generate", "--like", str(source), "-o", str(tmp_path / "again.png"), "--quiet"]
    capsys.readouterr()
    assert main([*again, "--model", str(other), "--device", "cpu"]) == 0
    noted = capsys.readouterr().err
    assert 'made with checkpoint "tiny"' in noted
    assert "--image" in noted
    assert main([*again, "--image", picture, *model]) == 0
    assert capsys.readouterr().err == ""
    assert np.abs(pixels_of(source) - pixels_of(tmp_path / "again.png")).max() <= 1


# vary


def test_vary_draws_new_pictures_from_old_ones(
    model: list[str], tmp_path: Path, picture: str, capsys: pytest.CaptureFixture[str]
) -> None:
    made = run_json(capsys, "vary", picture, "-n", "2", "-o", str(tmp_path / "out"), *QUICK, *model)
    assert [each["pixel_seed"] for each in made] == [0, 1]
    assert np.abs(pixels_of(made[0]["file"]) - pixels_of(made[1]["file"])).max() > 2
    towards = ["--prompt", "red", "--strength", "0.5"]
    moved = run_json(capsys, "vary", picture, *towards, "-o", str(tmp_path / "out"), *QUICK, *model)
    assert (moved[0]["prompt"], moved[0]["strength"]) == ("red", 0.5)
    assert main(["generate", "--like", made[0]["file"], "-o", str(tmp_path), "--quiet", *model]) == 2
    assert "vary" in capsys.readouterr().err


# ask and caption


def test_ask_prints_the_answer_as_it_comes(
    model: list[str], picture: str, capsys: pytest.CaptureFixture[str], pipeline: Blip3oPipeline
) -> None:
    assert main(["ask", "What is this ?", picture, "--max-tokens", "5", *model]) == 0
    from comfyui_blip3o.blip3o_core.language.answers import AnswerSettings

    expected = pipeline.ask(
        "What is this ?", [[Image.open(picture)]], settings=AnswerSettings(max_new_tokens=5)
    )[0]
    assert capsys.readouterr().out.strip() == expected


def test_ask_about_pictures_one_by_one_or_together(
    model: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [str(tmp_path / f"{name}.png") for name in "ab"]
    for seed, path in enumerate(paths):
        tiny_models.picture(seed=seed).save(path)
    question = ["ask", "What color is this ?", *paths, "--max-tokens", "4", *model]
    each = run_json(capsys, *question)
    assert [row["pictures"] for row in each] == [[path] for path in paths]
    assert all(isinstance(row["answer"], str) for row in each)
    assert [row["pictures"] for row in run_json(capsys, *question, "--together")] == [paths]
    assert main(question) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed == [f"{row['pictures'][0]}: {row['answer']}" for row in each]


def test_ask_without_a_picture(model: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    rows = run_json(capsys, "ask", "What is red ?", "--max-tokens", "3", *model)
    assert rows[0]["pictures"] == []


def test_ask_for_probabilities(model: list[str], picture: str, capsys: pytest.CaptureFixture[str]) -> None:
    chosen = run_json(capsys, "ask", "What color is this ?", picture, *model, "--choices", "red", "blue")
    assert sum(chosen[0]["answer"].values()) == pytest.approx(1.0)
    yes = run_json(capsys, "ask", "Does this picture show a cat ?", picture, "--yes-no", *model)
    assert 0 <= yes[0]["answer"]["yes"] <= 1
    assert main(["ask", "red ?", picture, "--yes-no", *model]) == 0
    assert capsys.readouterr().out.startswith("yes 0.")


def test_caption_writes_text_files_and_keeps_old_ones(
    model: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for seed, name in enumerate(("a", "b", "c")):
        tiny_models.picture(seed=seed).save(folder / f"{name}.png")
    (folder / "b.txt").write_text("mine\n", "utf-8")
    (folder / "notes.md").write_text("no picture", "utf-8")
    short = ["--max-tokens", "4", "--batch-size", "2", *model]
    captions = run_json(capsys, "caption", str(folder), "--write", *short)
    assert sorted(Path(path).name for path in captions) == ["a.png", "c.png"]
    assert (folder / "a.txt").read_text("utf-8") == captions[str(folder / "a.png")] + "\n"
    assert (folder / "b.txt").read_text("utf-8") == "mine\n"
    assert sorted(path.suffix for path in folder.iterdir()) == [".md", *[".png"] * 3, *[".txt"] * 3]
    assert main(["caption", str(folder / "b.png"), "--write", "--overwrite", "--quiet", *short]) == 0
    assert (folder / "b.txt").read_text("utf-8") != "mine\n"


def test_a_caption_that_cannot_be_written_leaves_the_old_one(
    model: list[str], tmp_path: Path, picture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = Path(picture).with_suffix(".txt")
    text.write_text("mine", "utf-8")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    options = ["--write", "--overwrite", "--quiet", "--max-tokens", "2", *model]
    assert main(["caption", picture, *options]) == 2
    assert text.read_text("utf-8") == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["given.png", "given.txt"]


def test_caption_stays_the_same_whatever_the_batch(
    model: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed in range(3):
        tiny_models.picture(80, 40 + 30 * seed, seed=seed).save(tmp_path / f"{seed}.png")
    results = [
        run_json(
            capsys,
            "caption",
            str(tmp_path),
            "--style",
            "tags",
            "--max-tokens",
            "4",
            "--batch-size",
            size,
            *model,
        )
        for size in ("1", "3")
    ]
    assert results[0] == results[1]


# info, convert


def test_info_tells_what_is_in_a_folder(tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    described = run_json(capsys, "info", str(tiny_folder))
    assert set(described["components"]) == {"backbone", "dit", "image_encoder", "decoder"}
    assert main(["info", str(tiny_folder)]) == 0
    printed = capsys.readouterr().out
    assert described["fingerprint"] in printed
    for name in described["components"]:
        assert name in printed
    assert "To draw:" in printed


def test_convert_writes_a_folder_in_another_dtype(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "half"
    assert main(["convert", str(tiny_folder), str(target), "--dtype", "fp16"]) == 0
    assert str(target) in capsys.readouterr().out
    assert next(load_dit(open_checkpoint(target)).parameters()).dtype == torch.float16


def test_convert_writes_a_pickled_image_encoder_as_safetensors(tmp_path: Path) -> None:
    source, target = tmp_path / "pytorch_model.bin", tmp_path / "tower.safetensors"
    tensors = dict(tiny_models.build_image_encoder().state_dict())
    torch.save(tensors, source)
    assert main(["convert", str(source), str(target), "--dtype", "fp32"]) == 0
    written = load_file(str(target))
    assert set(written) == set(tensors)
    assert all(torch.equal(written[key], tensors[key]) for key in tensors)


# Everything


@pytest.mark.parametrize("command", [None, *COMMANDS])
def test_help_explains_each_command(command: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(([command] if command else []) + ["--help"])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    assert "usage: blip3o" in printed
    if command is None:
        assert all(name in printed for name in COMMANDS)


def test_every_option_has_a_help_text() -> None:
    commands = next(
        action for action in cli.build_parser()._actions if isinstance(action.choices, dict)
    ).choices
    assert set(commands) >= set(COMMANDS)
    for name, parser in commands.items():
        for action in parser._actions:
            if action.option_strings:
                assert action.help, f"{name} {action.option_strings}"


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        (["generate"], "There is no prompt"),
        (["generate", "red", "--preset", "nice"], 'preset is "nice"; choose one of standard'),
        (["generate", "red", "--steps", "0"], "steps is 0"),
        (["generate", "red", "--sampler", "dpm"], "choose one of euler"),
        (["generate", "red", "--size", "big"], '"big" is no size'),
        (["generate", "red", "--size", "33x32"], "width is 33"),
        (["generate", "red", "--seed", "-3"], "seed is -3"),
        (["generate", "red", "--device", "warp"], '"warp" is no device'),
        (["generate", "red", "--dtype", "int4"], '"int4" is no dtype'),
        (["generate", "red", "-o", "picture.jpg"], "only PNG keeps"),
        (["generate", "red", "-n", "0"], "--count is 0"),
        (["generate", "red", "--image", "nowhere.png"], "nowhere.png"),
        (["generate", "--like", "nowhere.png"], "nowhere.png"),
        (["generate", "red", "--image-encoder", "nowhere", "--start-image", "nowhere.png"], "nowhere.png"),
        (["vary", "nowhere.png"], "nowhere.png"),
        (["ask", "red ?", "nowhere.png"], "nowhere.png"),
        (["ask", "red ?", "--choices", "red"], "at least two"),
        (["ask", "red ?", "--temperature", "-1"], "temperature is -1"),
        (["ask", "red ?", "--max-pixels", "-1"], "--max-pixels is -1"),
        (["caption", "nowhere.png", "--style", "short"], "nowhere.png"),
    ],
)
def test_mistakes_end_with_a_message_and_code_two(
    model: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], fragment: str
) -> None:
    options = [] if {"--device", "--dtype"} & set(arguments) else model[2:]
    assert main([*arguments, *model[:2], *options]) == 2
    printed = capsys.readouterr()
    assert fragment in printed.err
    assert "Traceback" not in printed.err
    assert not list(tmp_path.glob("*.png"))


@pytest.mark.parametrize(
    "arguments",
    [
        ["info", "nowhere"],
        ["generate", "red", "--model", "nowhere"],
        ["convert", "nowhere", "target"],
        ["verify-reference", "nowhere"],
    ],
)
def test_missing_folders_are_named(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    assert main(arguments) == 2
    assert "nowhere" in capsys.readouterr().err


def test_conversions_that_make_no_sense_are_refused(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", str(tiny_folder), str(tmp_path / "out"), "--dtype", "auto"]) == 2
    assert main(["convert", str(tiny_folder), str(tiny_folder)]) == 2
    assert "same folder" in capsys.readouterr().err
    (tmp_path / "file.bin").write_bytes(b"no pickle")
    assert main(["convert", str(tmp_path / "file.bin"), str(tmp_path / "out.safetensors")]) == 2
    assert "file.bin" in capsys.readouterr().err


@pytest.mark.parametrize("target", ["file/in.png", "file", "file/deeper/folder", "picture.jpg"])
@pytest.mark.parametrize("command", ["generate", "vary"])
def test_a_target_that_cannot_be_written_is_told_before_drawing(
    model: list[str],
    tmp_path: Path,
    picture: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: str,
    target: str,
) -> None:
    def draw(*_: object, **__: object) -> None:
        raise AssertionError("drawn for nothing")

    monkeypatch.setattr(Blip3oPipeline, command, draw)
    (tmp_path / "file").write_text("in the way", "utf-8")
    given = picture if command == "vary" else "red"
    assert main([command, given, "-o", str(tmp_path / target), *QUICK, *model]) == 2
    assert target.split("/")[0] in capsys.readouterr().err


def test_a_full_disk_is_a_message_not_a_traceback(
    model: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    assert main(["generate", "red", "-o", str(tmp_path / "a.png"), *QUICK, *model]) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_ends_with_its_own_code(
    model: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Blip3oPipeline, "draw", interrupt)
    assert main(["generate", "red", *model]) == 130
    assert "Stopped" in capsys.readouterr().err


def test_the_built_in_model_serves_when_none_is_named(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli_options, "BUILT_IN_MODEL", tiny_folder)
    assert main(["generate", "red", "-o", str(tmp_path / "a.png"), *QUICK]) == 0
    assert main(["info"]) == 0
    monkeypatch.setattr(cli_options, "BUILT_IN_MODEL", tmp_path)
    assert main(["ask", "red ?"]) == 2
    assert "built-in tiny model is missing" in capsys.readouterr().err


def test_progress_goes_to_the_error_stream(
    model: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", "red", "-o", str(tmp_path), *QUICK[:-1], *model]) == 0
    printed = capsys.readouterr()
    assert len(printed.out.splitlines()) == 1
    assert "pixels" in printed.err


def test_help_does_not_wait_for_torch() -> None:
    code = (
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('comfyui_blip3o', {str(ROOT / '__init__.py')!r})\n"
        "sys.modules['comfyui_blip3o'] = package = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(package)\n"
        "from comfyui_blip3o import cli\n"
        "cli.build_parser().format_help()\n"
        "print('torch' in sys.modules, 'transformers' in sys.modules, 'PIL' in sys.modules)\n"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.split() == ["False", "False", "False"]
