"""Benchmark folders file by file, resumed and shared, and answers through lmms-eval's interface."""

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from comfyui_blip3o.blip3o_core.drawing.presets import Generation
from comfyui_blip3o.blip3o_core.errors import BadInputError, MissingFilesError
from comfyui_blip3o.blip3o_core.picture_files import read_note
from comfyui_blip3o.pretraining.evaluation.benchmarks import main, read_tasks, write_benchmark_images
from PIL import Image
from tiny_models import write_checkpoint

SIDE = 8


@dataclass
class FakePipeline:
    """Draws plain pictures whose colour is a function of prompt and seed; counts its calls."""

    folder: Path
    stop_after: int | None = None
    calls: list[tuple[list[str], int]] = field(default_factory=list)

    @property
    def files(self) -> SimpleNamespace:
        return SimpleNamespace(
            name="fake", tensors={}, folder=self.folder, decoder_folder=self.folder / "decoder"
        )

    def generate(
        self, prompts: list[str], *, images_per_prompt: int, seed: int, preset: str, batch_size: int
    ) -> Generation:
        if len(self.calls) == self.stop_after:
            raise KeyboardInterrupt
        self.calls.append((list(prompts), seed))
        each = [prompt for prompt in prompts for _ in range(images_per_prompt)]
        seeds = [seed + n for n in range(len(each))]
        images = torch.stack([colour(p, s).expand(SIDE, SIDE, 3) for p, s in zip(each, seeds, strict=True)])
        features = torch.zeros(len(each), 4, 2)
        return Generation(images, features, each, seeds, seeds, {"preset": preset})


def colour(prompt: str, seed: int) -> torch.Tensor:
    return torch.tensor([sum(prompt.encode()) % 256, seed % 256, seed // 256]) / 255


@pytest.fixture
def pipeline(tmp_path: Path) -> FakePipeline:
    return FakePipeline(tmp_path)


@pytest.fixture
def geneval(tmp_path: Path) -> Path:
    rows = [
        {"tag": "counting", "include": [{"class": "cat", "count": n}], "prompt": f"a photo of {n} cats – ñ"}
        for n in range(7)
    ]
    path = tmp_path / "evaluation_metadata.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n", "utf-8")
    return path


@pytest.fixture
def dpg(tmp_path: Path) -> Path:
    folder = tmp_path / "prompts"
    folder.mkdir()
    for name in ("partiprompts10", "COCOval2014000000000042", "stanford5"):
        (folder / f"{name}.txt").write_text(f"A long description, {name}.\n")
    return folder


@pytest.fixture
def wise(tmp_path: Path) -> Path:
    rows = [{"Prompt": f"riddle {n}", "prompt_id": n, "Explanation": "x"} for n in (401, 402, 407)]
    path = tmp_path / "natural_science.json"
    path.write_text(json.dumps(rows))
    return path


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def colour_of(picture: Image.Image) -> list[int]:
    return list(picture.getpixel((SIDE // 2, SIDE // 2)))


def expected_colour(prompt: str, seed: int) -> list[int]:
    return (colour(prompt, seed) * 255).round().int().tolist()


def test_geneval_gets_its_layout_file_by_file(pipeline: FakePipeline, geneval: Path, tmp_path: Path):
    out = tmp_path / "out"
    written = write_benchmark_images(pipeline, "geneval", geneval, out, samples=2, seed=100, batch_size=5)
    assert (written.drawn, written.skipped, written.side) == (7, 0, SIDE)
    assert sorted(files(out)) == sorted(
        f"{n:05d}/{name}"
        for n in range(7)
        for name in ("metadata.jsonl", "samples/00000.png", "samples/00001.png")
    )
    rows = [json.loads(line) for line in geneval.read_text("utf-8").splitlines() if line]
    for n, row in enumerate(rows):
        # As the scorer reads it: one JSON object in the whole file.
        with (out / f"{n:05d}" / "metadata.jsonl").open(encoding="utf-8") as file:
            assert json.load(file) == row
        for sample in range(2):
            path = out / f"{n:05d}" / "samples" / f"{sample:05d}.png"
            assert colour_of(Image.open(path)) == expected_colour(row["prompt"], 100 + 2 * n + sample)
            note = read_note(path)
            assert (note["prompt"], note["seed"]) == (row["prompt"], 100 + 2 * n + sample)


def test_geneval_draws_four_pictures_by_default_and_a_grid_when_asked(
    pipeline: FakePipeline, geneval: Path, tmp_path: Path
):
    write_benchmark_images(pipeline, "geneval", geneval, tmp_path / "out", with_grid=True)
    assert len(list((tmp_path / "out" / "00003" / "samples").iterdir())) == 4
    assert Image.open(tmp_path / "out" / "00003" / "grid.png").size == (2 * SIDE, 2 * SIDE)


def test_dpg_gets_one_grid_per_prompt_that_its_scorer_can_cut(
    pipeline: FakePipeline, dpg: Path, tmp_path: Path
):
    out = tmp_path / "out"
    side = write_benchmark_images(pipeline, "dpg", dpg, out, seed=7).side
    names = ["COCOval2014000000000042", "partiprompts10", "stanford5"]
    assert sorted(files(out)) == [f"{name}.png" for name in names]
    corners = [(0, 0), (side, 0), (0, side), (side, side)]
    for index, name in enumerate(names):
        grid = Image.open(out / f"{name}.png")
        assert grid.size == (2 * side, 2 * side)
        for sample, (left, top) in enumerate(corners):
            cut = grid.crop((left, top, left + side, top + side))
            assert colour_of(cut) == expected_colour(f"A long description, {name}.", 7 + 4 * index + sample)


def test_wise_gets_pictures_named_by_prompt_id(pipeline: FakePipeline, wise: Path, tmp_path: Path):
    write_benchmark_images(pipeline, "wise", wise, tmp_path / "out")
    assert sorted(files(tmp_path / "out")) == ["401.png", "402.png", "407.png"]
    assert colour_of(Image.open(tmp_path / "out" / "407.png")) == expected_colour("riddle 407", 2)


@pytest.mark.parametrize(("world_size", "batch_size"), [(2, 4), (3, 1), (9, 100)])
def test_processes_together_write_what_one_writes(
    pipeline: FakePipeline, geneval: Path, tmp_path: Path, world_size: int, batch_size: int
):
    write_benchmark_images(pipeline, "geneval", geneval, tmp_path / "one", samples=2, batch_size=8)
    drawn = [
        write_benchmark_images(
            pipeline,
            "geneval",
            geneval,
            tmp_path / "many",
            samples=2,
            batch_size=batch_size,
            rank=rank,
            world_size=world_size,
        ).drawn
        for rank in range(world_size)
    ]
    assert sum(drawn) == 7  # nothing twice
    assert files(tmp_path / "many") == files(tmp_path / "one")


def test_an_interrupted_run_goes_on_and_ends_like_an_uninterrupted_one(
    pipeline: FakePipeline, geneval: Path, tmp_path: Path
):
    write_benchmark_images(pipeline, "geneval", geneval, tmp_path / "whole", samples=2, batch_size=4)
    stopped = FakePipeline(tmp_path, stop_after=2)
    with pytest.raises(KeyboardInterrupt):
        write_benchmark_images(stopped, "geneval", geneval, tmp_path / "out", samples=2, batch_size=4)
    assert len(list((tmp_path / "out").glob("*/samples/*.png"))) == 8
    again = FakePipeline(tmp_path)
    written = write_benchmark_images(again, "geneval", geneval, tmp_path / "out", samples=2, batch_size=4)
    assert (written.drawn, written.skipped) == (3, 4)
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    once_more = FakePipeline(tmp_path)
    assert write_benchmark_images(once_more, "geneval", geneval, tmp_path / "out", samples=2).drawn == 0
    assert once_more.calls == []


@pytest.mark.parametrize("damage", ["sample", "metadata", "cut"])
def test_a_hole_is_filled_with_the_same_picture(
    pipeline: FakePipeline, geneval: Path, tmp_path: Path, damage: str
):
    out = tmp_path / "out"
    write_benchmark_images(pipeline, "geneval", geneval, out, samples=2)
    before = files(out)
    picture = out / "00003" / "samples" / "00001.png"
    if damage == "cut":
        picture.write_bytes(picture.read_bytes()[:-20])
    else:
        (picture if damage == "sample" else out / "00003" / "metadata.jsonl").unlink()
    again = FakePipeline(tmp_path)
    assert write_benchmark_images(again, "geneval", geneval, out, samples=2).drawn == 1
    assert files(out) == before and len(again.calls) == 1


def test_holes_apart_in_one_batch_are_filled_with_the_same_pictures(
    pipeline: FakePipeline, geneval: Path, tmp_path: Path
):
    out = tmp_path / "out"
    write_benchmark_images(pipeline, "geneval", geneval, out, samples=2, batch_size=14)
    before = files(out)
    for name in ("00001", "00004", "00005"):
        shutil.rmtree(out / name)
    again = FakePipeline(tmp_path)
    assert write_benchmark_images(again, "geneval", geneval, out, samples=2, batch_size=14).drawn == 3
    assert files(out) == before
    assert [len(prompts) for prompts, _ in again.calls] == [1, 2]


@pytest.mark.parametrize("change", [{"seed": 5}, {"samples": 3}, {"preset": "fast"}])
def test_a_folder_made_another_way_is_refused(
    pipeline: FakePipeline, geneval: Path, tmp_path: Path, change: dict[str, Any]
):
    settings = {"samples": 2, "seed": 0, "preset": "standard"}
    write_benchmark_images(pipeline, "geneval", geneval, tmp_path / "out", **settings)
    before = files(tmp_path / "out")
    with pytest.raises(BadInputError, match="new folder"):
        write_benchmark_images(pipeline, "geneval", geneval, tmp_path / "out", **{**settings, **change})
    assert files(tmp_path / "out") == before


def test_fewer_samples_than_lie_there_are_refused_even_where_seeds_agree(
    pipeline: FakePipeline, geneval: Path, tmp_path: Path
):
    geneval.write_text(geneval.read_text("utf-8").splitlines()[0], "utf-8")
    write_benchmark_images(pipeline, "geneval", geneval, tmp_path / "out", samples=4)
    # The scorer counts every picture of a folder, so two left over would count as asked for.
    with pytest.raises(BadInputError, match="samples 4, now 2"):
        write_benchmark_images(pipeline, "geneval", geneval, tmp_path / "out", samples=2)


def test_pictures_of_other_prompts_or_programs_are_refused(
    pipeline: FakePipeline, wise: Path, tmp_path: Path
):
    write_benchmark_images(pipeline, "wise", wise, tmp_path / "out")
    wise.write_text(wise.read_text().replace("riddle 402", "another riddle"))
    with pytest.raises(BadInputError, match="402.png.*another riddle"):
        write_benchmark_images(pipeline, "wise", wise, tmp_path / "out")
    Image.new("RGB", (8, 8)).save(tmp_path / "out" / "401.png")
    with pytest.raises(BadInputError, match="401.png.*does not say.*\nChoose a new folder"):
        write_benchmark_images(pipeline, "wise", wise, tmp_path / "out")


def test_progress_counts_prompts_of_this_process(pipeline: FakePipeline, geneval: Path, tmp_path: Path):
    seen = []
    write_benchmark_images(
        pipeline,
        "geneval",
        geneval,
        tmp_path / "out",
        batch_size=8,
        rank=1,
        world_size=2,
        on_progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(2, 3), (3, 3)]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("geneval", '{"tag": "x", "prompt": "a"}\n{"tag": 1', "line 2 is not JSON"),
        ("geneval", '{"prompt": "a"}', "line 1 has no tag"),
        ("geneval", '"a prompt"', "line 1 is not an object"),
        ("geneval", '{"tag": "x", "prompt": " "}', "line 1 has an empty prompt"),
        ("geneval", "\n", "there is no prompt"),
        ("wise", '{"Prompt": "a", "prompt_id": 1}', "not a list"),
        ("wise", '[{"prompt": "a", "prompt_id": 1}]', "entry 1 has no Prompt"),
        ("wise", '[{"Prompt": "a", "prompt_id": "../1"}]', "no number"),
        ("wise", '[{"Prompt": "a", "prompt_id": 1}, {"Prompt": "b", "prompt_id": 1}]', "1 occurs twice"),
        ("wise", "Prompt", "no prompt file of WISE"),
    ],
)
def test_a_wrong_prompt_file_is_explained(tmp_path: Path, name: str, content: str, message: str):
    path = tmp_path / "prompts.json"
    path.write_text(content)
    with pytest.raises(BadInputError, match=message) as caught:
        read_tasks(name, path)
    assert "prompts.json" in str(caught.value) and "Expected" in str(caught.value)


def test_wrong_places_of_prompts_are_explained(tmp_path: Path, geneval: Path, dpg: Path):
    with pytest.raises(MissingFilesError, match="not part of this package"):
        read_tasks("geneval", tmp_path / "nowhere.jsonl")
    with pytest.raises(BadInputError, match="is a folder"):
        read_tasks("geneval", dpg)
    with pytest.raises(BadInputError, match="is a file"):
        read_tasks("dpg", geneval)
    with pytest.raises(BadInputError, match="choose one of dpg, geneval, wise"):
        read_tasks("mme", geneval)
    (dpg / "v1.2.txt").write_text("a dot in the name")
    with pytest.raises(BadInputError, match="v1.2.txt"):
        read_tasks("dpg", dpg)


def test_numbers_that_cannot_be_are_refused(pipeline: FakePipeline, wise: Path, tmp_path: Path):
    with pytest.raises(BadInputError, match="WISE takes 1 picture"):
        write_benchmark_images(pipeline, "wise", wise, tmp_path / "out", samples=4)
    with pytest.raises(BadInputError, match="Process 2 of 2"):
        write_benchmark_images(pipeline, "wise", wise, tmp_path / "out", rank=2, world_size=2)


def test_the_parser_of_the_command_needs_no_torch():
    code = (
        f"import sys, argparse; sys.path.insert(0, {str(Path(__file__).resolve().parents[1])!r}); import conftest;"
        "from comfyui_blip3o.pretraining.evaluation.benchmarks import add_benchmark_arguments;"
        "add_benchmark_arguments(argparse.ArgumentParser());"
        "print([m for m in ('torch', 'PIL', 'numpy') if m in sys.modules])"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"))


def test_the_command_draws_with_a_checkpoint_and_fills_holes_with_equal_pictures(
    checkpoint: Path,
    wise: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
):
    out = tmp_path / "out"
    arguments = ["wise", str(wise), "--model", str(checkpoint), "--out", str(out), "--preset", "fast"]
    arguments += ["--device", "cpu", "--quiet"]
    assert main([*arguments, "--batch-size", "3"]) == 0
    assert "3 prompts drawn" in capsys.readouterr().out
    before = {path.name: np.asarray(Image.open(path)).astype(int) for path in out.iterdir()}
    assert len({picture.tobytes() for picture in before.values()}) == 3
    shutil.rmtree(out)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        assert main([*arguments, "--batch-size", "1"]) == 0
    assert {path.name for path in out.iterdir()} == set(before)
    for path in out.iterdir():
        # Another batch size may round the last bit otherwise, which a shade of 8 bits can show.
        assert np.abs(np.asarray(Image.open(path)).astype(int) - before[path.name]).max() <= 1
