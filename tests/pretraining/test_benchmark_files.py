"""Benchmark folders: the layouts the scorers read, resumed and shared."""

import json
from types import SimpleNamespace

import pytest
from comfyui_blip3o.blip3o_core.errors import BadInputError, MissingFilesError
from comfyui_blip3o.pretraining.benchmark_files import draw_benchmark, read_shard, read_tasks
from PIL import Image


class Painter:
    """Stands where a pipeline does; paints the seed, so that a picture tells how it was asked for."""

    def __init__(self):
        self.asked = []

    def generate(self, prompt, *, images_per_prompt, seed, preset):
        self.asked.append(prompt)
        return SimpleNamespace(
            pictures=[Image.new("RGB", (4, 4), ((seed + n) % 256, 0, 0)) for n in range(images_per_prompt)]
        )


@pytest.fixture
def geneval(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(json.dumps({"tag": "x", "prompt": f"prompt {n}"}) for n in range(5)) + "\n")
    return path


def test_geneval_gets_numbered_folders_with_samples_and_metadata(tmp_path, geneval):
    assert draw_benchmark(Painter(), "geneval", geneval, tmp_path / "out", samples=2) == 5
    assert sorted(p.name for p in (tmp_path / "out" / "00003" / "samples").iterdir()) == [
        "00000.png",
        "00001.png",
    ]
    assert json.loads((tmp_path / "out" / "00003" / "metadata.jsonl").read_text())["prompt"] == "prompt 3"


def test_a_second_run_draws_only_what_is_missing(tmp_path, geneval):
    draw_benchmark(Painter(), "geneval", geneval, tmp_path / "out", samples=2)
    (tmp_path / "out" / "00001" / "samples" / "00001.png").unlink()
    painter = Painter()
    assert draw_benchmark(painter, "geneval", geneval, tmp_path / "out", samples=2) == 1
    assert painter.asked == ["prompt 1"]


def test_shards_draw_each_prompt_once_with_the_seeds_of_a_whole_run(tmp_path, geneval):
    draw_benchmark(Painter(), "geneval", geneval, tmp_path / "whole", samples=1)
    asked = []
    for part in (0, 1):
        painter = Painter()
        draw_benchmark(painter, "geneval", geneval, tmp_path / "parts", samples=1, shard=(part, 2))
        asked += painter.asked
    assert sorted(asked) == [f"prompt {n}" for n in range(5)]
    for n in range(5):
        name = f"{n:05d}/samples/00000.png"
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()


def test_dpg_gets_one_sheet_of_four_and_wise_one_picture_by_id(tmp_path):
    prompts = tmp_path / "dpg"
    prompts.mkdir()
    (prompts / "cat_1.txt").write_text("a cat\n")
    draw_benchmark(Painter(), "dpg", prompts, tmp_path / "d")
    assert Image.open(tmp_path / "d" / "cat_1.png").size == (8, 8)
    (tmp_path / "wise.json").write_text(json.dumps([{"prompt_id": 17, "Prompt": "a thing"}]))
    draw_benchmark(Painter(), "wise", tmp_path / "wise.json", tmp_path / "w")
    assert Image.open(tmp_path / "w" / "17.png").size == (4, 4)


def test_wrong_files_are_named(tmp_path):
    with pytest.raises(MissingFilesError, match="nowhere.jsonl"):
        read_tasks("geneval", tmp_path / "nowhere.jsonl")
    (tmp_path / "wrong.jsonl").write_text('{"text": "x"}\n')
    with pytest.raises(BadInputError, match="wrong.jsonl.*no prompt file of geneval"):
        read_tasks("geneval", tmp_path / "wrong.jsonl")


@pytest.mark.parametrize("text", ["4/4", "1", "a/b", "-1/2"])
def test_impossible_shards_are_refused(text):
    with pytest.raises(BadInputError, match="k/n"):
        read_shard(text)
