"""Captions written by the model: only where none is, never lost, with the trigger in its place."""

import errno
import tarfile
from pathlib import Path
from typing import Any

import pytest
from comfyui_blip3o.blip3o_core.config import BUILT_IN_MODEL
from comfyui_blip3o.blip3o_core.errors import BadInputError, TrainingDataError
from comfyui_blip3o.blip3o_core.images import load_image
from comfyui_blip3o.blip3o_core.language.prompts import CAPTION_STYLES
from comfyui_blip3o.blip3o_core.pipeline import Blip3oPipeline, load_pipeline
from comfyui_blip3o.lora_training.config import DataConfig
from comfyui_blip3o.lora_training.data import captioning
from comfyui_blip3o.lora_training.data.captioning import (
    ALL_BUT,
    MODES,
    caption_dataset,
    caption_question,
    place_trigger,
)
from comfyui_blip3o.lora_training.data.dataset import scan_dataset
from comfyui_blip3o.lora_training.records import Interrupted
from PIL import Image
from training_sets import config_of, drawing, write_set


@pytest.fixture
def pipeline() -> Blip3oPipeline:
    return load_pipeline(BUILT_IN_MODEL, dtype="fp32", device="cpu")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A red, a blue and a green disc without captions."""
    return write_set(tmp_path / "set", 3, captions=False)


def texts(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text("utf-8") for path in sorted(folder.rglob("*.txt"))}


def test_the_model_says_what_it_sees(folder: Path, pipeline: Blip3oPipeline):
    captions = caption_dataset(config_of(folder).data, pipeline, "short")
    assert list(captions.written) == ["p00.png", "p01.png", "p02.png"]
    for colour, caption in zip(("red", "blue", "green"), captions.written.values(), strict=True):
        assert colour in caption and "circle" in caption
    assert texts(folder) == {
        f"p0{index}.txt": f"{text}\n" for index, text in enumerate(captions.written.values())
    }
    assert scan_dataset(config_of(folder).data).prompts == tuple(captions.written.values())
    expected = pipeline.caption([load_image(folder / "p01.png")], "short")
    assert [captions.written["p01.png"]] == expected


def test_captions_that_are_there_are_kept_and_empty_ones_written(folder: Path, pipeline: Blip3oPipeline):
    (folder / "p00.txt").write_text("mine\n", "utf-8")
    (folder / "p01.caption").write_text("\n", "utf-8")
    captions = caption_dataset(config_of(folder).data, pipeline)
    assert captions.kept == ("p00.png",)
    assert set(captions.written) == {"p01.png", "p02.png"}
    assert (folder / "p00.txt").read_text("utf-8") == "mine\n"
    # Written where it was empty: two files for one picture would contradict each other.
    assert "blue" in (folder / "p01.caption").read_text("utf-8")
    assert not (folder / "p01.txt").exists()


def test_overwriting_is_explicit(folder: Path, pipeline: Blip3oPipeline):
    (folder / "p00.txt").write_text("mine\n", "utf-8")
    captions = caption_dataset(config_of(folder).data, pipeline, overwrite=True)
    assert len(captions.written) == 3 and captions.kept == ()
    assert "red" in (folder / "p00.txt").read_text("utf-8")


def test_captions_of_the_metadata_are_never_replaced(folder: Path, pipeline: Blip3oPipeline):
    (folder / "metadata.jsonl").write_text('{"file_name": "p00.png", "text": "mine"}', "utf-8")
    captions = caption_dataset(config_of(folder).data, pipeline, overwrite=True)
    assert captions.kept == ("p00.png",)
    assert "p00.txt" not in texts(folder)


@pytest.mark.parametrize("done", [0, 2])
def test_a_stop_keeps_the_captions_so_far_and_the_rest_can_follow(
    folder: Path, pipeline: Blip3oPipeline, done: int
):
    asked = iter([False] * done + [True])
    with pytest.raises(Interrupted, match=f"after {done} of 3"):
        caption_dataset(config_of(folder).data, pipeline, should_stop=lambda: next(asked))
    assert len(texts(folder)) == done
    assert len(caption_dataset(config_of(folder).data, pipeline).written) == 3 - done


def test_pictures_that_cannot_be_looked_at_are_named_and_the_others_described(
    folder: Path, pipeline: Blip3oPipeline
):
    Image.new("RGB", (900, 2), "red").save(folder / "ribbon.png")
    (folder / "broken.png").write_bytes(b"x")
    events: list[dict[str, Any]] = []
    captions = caption_dataset(config_of(folder).data, pipeline, on_event=events.append)
    assert len(captions.written) == 3
    assert set(captions.failed) == {"ribbon.png", "broken.png"}
    assert "too narrow" in captions.failed["ribbon.png"]
    assert any("ribbon.png" in event.get("message", "") for event in events)
    shown = {event["name"]: event["caption"] for event in events if event["event"] == "caption"}
    assert shown == captions.written


def test_a_silent_model_writes_no_file(
    folder: Path, pipeline: Blip3oPipeline, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(pipeline, "ask", lambda *args, **options: [" \n"])
    captions = caption_dataset(config_of(folder).data, pipeline)
    assert len(captions.failed) == 3
    assert texts(folder) == {}


def test_an_answer_of_several_lines_is_one_caption(
    folder: Path, pipeline: Blip3oPipeline, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(pipeline, "ask", lambda *args, **options: ["- a cat\n- a mat\n"])
    caption_dataset(config_of(folder).data, pipeline)
    assert scan_dataset(config_of(folder).data).items[0].prompts == ("- a cat - a mat",)


def test_the_backbone_is_alone_in_memory_and_then_gone(
    folder: Path, pipeline: Blip3oPipeline, monkeypatch: pytest.MonkeyPatch
):
    ask, loaded = pipeline.ask, []

    def watched(*args: Any, **options: Any) -> list[str]:
        answers = ask(*args, **options)
        loaded.append(set(pipeline.networks.loaded))
        return answers

    monkeypatch.setattr(pipeline, "ask", watched)
    pipeline.load("dit", "image_encoder")
    caption_dataset(config_of(folder).data, pipeline)
    assert loaded == [{"backbone"}] * 3
    assert not pipeline.networks.loaded


def test_a_full_disk_is_told_and_leaves_no_half_file(
    folder: Path, pipeline: Blip3oPipeline, monkeypatch: pytest.MonkeyPatch
):
    def write(path: Path, text: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(captioning, "write_text", write)
    with pytest.raises(TrainingDataError, match=r"p00\.png.*No space left"):
        caption_dataset(config_of(folder).data, pipeline)
    assert texts(folder) == {}


def test_a_tar_and_an_unknown_mode_are_refused(tmp_path: Path, folder: Path, pipeline: Blip3oPipeline):
    with tarfile.open(tmp_path / "set.tar", "w") as tar:
        tar.add(folder / "p00.png", "p00.png")
    with pytest.raises(BadInputError, match="Unpack it"):
        caption_dataset(config_of(tmp_path / "set.tar").data, pipeline)
    with pytest.raises(BadInputError, match='no caption mode "poem".*all but the subject'):
        caption_dataset(config_of(folder).data, pipeline, "poem")


# What is asked, and the trigger


def test_every_style_of_the_core_is_a_mode_and_leaving_out_has_questions_of_its_own():
    config = DataConfig(Path("."), class_word="tea pot")
    assert set(MODES) == {*CAPTION_STYLES, *ALL_BUT}
    for mode, question in CAPTION_STYLES.items():
        assert caption_question(mode, config) == question
    assert '"tea pot"' in caption_question("all but the subject", config)
    assert '"the subject"' in caption_question("all but the subject", DataConfig(Path(".")))
    assert "nothing about style" in caption_question("all but the style", config)


@pytest.mark.parametrize(
    ("caption", "placed"),
    [
        ("a red dog beside a dog", "a red [trigger] beside a dog"),
        ("A Dog asleep", "A [trigger] asleep"),
        ("a hotdog stand", "a hotdog stand"),
        ("grass", "grass"),
        ("[trigger] and a dog", "[trigger] and a dog"),
    ],
)
def test_the_trigger_takes_the_place_of_the_class_word(caption: str, placed: str):
    assert place_trigger(caption, DataConfig(Path("."), trigger="ohwx dog", class_word="dog")) == placed


def test_without_trigger_or_class_word_captions_stay_as_they_are():
    for config in (DataConfig(Path("."), class_word="dog"), DataConfig(Path("."), trigger="ohwx")):
        assert place_trigger("a dog", config) == "a dog"


def test_written_captions_lead_to_prompts_with_the_trigger_and_class_prompts_without(
    folder: Path, pipeline: Blip3oPipeline
):
    config = config_of(folder, trigger="ohwx disc", class_word="circle").data
    written = caption_dataset(config, pipeline, "short").written
    assert all("[trigger]" in caption for caption in written.values())
    item = scan_dataset(config).items[0]
    assert "ohwx disc" in item.prompts[0]
    assert item.class_prompts[0] == item.prompts[0].replace("ohwx disc", "circle")
    styled = caption_dataset(config, pipeline, "all but the style", overwrite=True).written
    assert not any("[trigger]" in caption for caption in styled.values())


def test_transparent_pictures_are_seen_on_the_background(
    folder: Path, pipeline: Blip3oPipeline, monkeypatch: pytest.MonkeyPatch
):
    seen = []
    monkeypatch.setattr(
        pipeline, "ask", lambda question, images, **options: seen.append(images[0][0]) or ["x"]
    )
    drawing(0).convert("RGBA").save(folder / "p00.png")
    clear = Image.new("RGBA", (50, 50), (255, 0, 0, 0))
    clear.save(folder / "p01.png")
    caption_dataset(config_of(folder, background="blue").data, pipeline)
    assert seen[1].getpixel((5, 5)) == (0, 0, 255)
