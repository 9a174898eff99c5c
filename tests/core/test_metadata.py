"""What a picture file remembers of its making."""

import shutil
from pathlib import Path

import pytest
import tiny_models
import torch
from comfyui_blip3o.blip3o_core.checkpoints.fingerprints import checkpoint_fingerprint, component_fingerprint
from comfyui_blip3o.blip3o_core.checkpoints.layout import open_checkpoint
from comfyui_blip3o.blip3o_core.drawing.decoding import PixelSettings
from comfyui_blip3o.blip3o_core.drawing.presets import Generation
from comfyui_blip3o.blip3o_core.drawing.sampling import FeatureSettings
from comfyui_blip3o.blip3o_core.errors import BadInputError
from comfyui_blip3o.blip3o_core.lora.files import dit_fingerprint
from comfyui_blip3o.blip3o_core.picture_files import PNG_KEY, describe_picture, read_note, save_png
from comfyui_blip3o.blip3o_core.pipeline import Blip3oPipeline
from PIL import Image
from PIL.PngImagePlugin import PngInfo

SHARD = "model-00001-of-00001.safetensors"


def test_a_description_survives_the_file(tmp_path: Path) -> None:
    description = {
        "version": 1,
        "prompt": 'ein "rotes" Café 猫\n🙂',
        "seed": 2**64 - 1,
        "pixels": {"tiled": False},
    }
    path = tmp_path / "new" / "picture.png"
    save_png(tiny_models.picture(), path, description)
    assert read_note(path) == description
    assert Image.open(path).tobytes() == tiny_models.picture().tobytes()
    assert [child.name for child in path.parent.iterdir()] == ["picture.png"]


def test_a_generation_describes_each_of_its_pictures(pipeline: Blip3oPipeline) -> None:
    made = pipeline.generate(
        ["red", "two dogs"],
        seed=3,
        pixel_seed=9,
        negative_prompt="blue",
        features=FeatureSettings(steps=2, sampler="heun"),
        pixels=PixelSettings(steps=2, width=24),
    )
    described = describe_picture(made, 1, "tiny", "abc")
    assert {
        key: described[key] for key in ("prompt", "seed", "pixel_seed", "checkpoint", "checkpoint_hash")
    } == {
        "prompt": "two dogs",
        "seed": 4,
        "pixel_seed": 10,
        "checkpoint": "tiny",
        "checkpoint_hash": "abc",
    }
    assert (described["preset"], described["negative_prompt"]) == ("standard", "blue")
    assert FeatureSettings(**described["features"]) == FeatureSettings(steps=2, sampler="heun")
    assert PixelSettings(**described["pixels"]) == PixelSettings(steps=2, width=24, height=32)


@pytest.mark.parametrize(
    ("inputs", "expected"),
    [
        ({}, []),
        ({"images": [[tiny_models.picture()]]}, ["prompt"]),
        ({"start_images": [tiny_models.picture()], "strength": 0.5}, ["start"]),
        ({"start_features": torch.zeros(1, 16, 16), "strength": 0.5}, ["features"]),
    ],
)
def test_pictures_that_went_in_are_mentioned(
    pipeline: Blip3oPipeline, inputs: dict[str, object], expected: list[str]
) -> None:
    quick = {"features": FeatureSettings(steps=2), "pixels": PixelSettings(steps=2)}
    assert pipeline.generate("red", **inputs, **quick).settings["made_from_pictures"] == expected


def test_a_varied_picture_is_made_from_its_features(pipeline: Blip3oPipeline) -> None:
    varied = pipeline.vary([tiny_models.picture()], pixels=PixelSettings(steps=2))
    assert varied.settings["made_from_pictures"] == ["features"]


def test_pictures_of_a_generation_are_rounded_to_eight_bits() -> None:
    images = torch.tensor([0.0, 0.5, 1.0]).view(1, 1, 1, 3)
    generation = Generation(images, torch.zeros(1, 4, 2), ["red"], [0], [0])
    assert generation.pictures[0].getpixel((0, 0)) == (0, 128, 255)


def test_a_picture_of_another_program_is_refused(tmp_path: Path) -> None:
    for name in ("plain.png", "plain.jpg"):
        tiny_models.picture().save(tmp_path / name)
        with pytest.raises(BadInputError, match=f"(?s){name}.*does not say how it was made"):
            read_note(tmp_path / name)


@pytest.mark.parametrize(
    ("text", "fragment"),
    [
        ('{"version": 2, "prompt": "red"}', "newer version"),
        ('{"version": 1, "prompt"', "cannot be understood"),
        ("[1, 2]", "cannot be understood"),
        ('{"version": "two"}', "cannot be understood"),
        ('{"version": 1, "features": {"steps": 3, "wonder": true}}', None),
    ],
)
def test_descriptions_that_cannot_be_understood(tmp_path: Path, text: str, fragment: str | None) -> None:
    info = PngInfo()
    info.add_itxt(PNG_KEY, text)
    tiny_models.picture().save(tmp_path / "odd.png", pnginfo=info)
    if fragment is None:
        assert read_note(tmp_path / "odd.png")["features"]["wonder"]
        return
    with pytest.raises(BadInputError, match=f"(?s)odd.png.*{fragment}"):
        read_note(tmp_path / "odd.png")


def test_a_missing_or_damaged_picture_is_named(tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"no picture")
    for name in ("nothing.png", "broken.png"):
        with pytest.raises(BadInputError, match=name):
            read_note(tmp_path / name)


def test_a_failed_save_leaves_the_old_picture_and_no_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "picture.png"
    save_png(tiny_models.picture(seed=1), path, {"version": 1})
    before = path.read_bytes()
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        save_png(tiny_models.picture(seed=2), path, {"version": 1})
    assert path.read_bytes() == before
    assert [child.name for child in tmp_path.iterdir()] == ["picture.png"]


# Fingerprint


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_folder, tmp_path / "copy"))


def fingerprint(folder: Path) -> str:
    return checkpoint_fingerprint(open_checkpoint(folder))


def test_a_copy_has_the_same_fingerprint(tiny_folder: Path, folder: Path) -> None:
    assert fingerprint(folder) == fingerprint(tiny_folder)
    assert len(fingerprint(folder)) == 16
    (folder / "README.md").write_text("notes", "utf-8")
    assert fingerprint(folder) == fingerprint(tiny_folder)


@pytest.mark.parametrize("name", [SHARD, "diffusion-decoder/unet/diffusion_pytorch_model.safetensors"])
def test_other_weights_have_another_fingerprint(tiny_folder: Path, folder: Path, name: str) -> None:
    content = bytearray((folder / name).read_bytes())
    content[-1] ^= 1
    (folder / name).write_bytes(content)
    assert fingerprint(folder) != fingerprint(tiny_folder)


def test_a_network_keeps_its_fingerprint_whatever_else_changes(tiny_folder: Path, folder: Path) -> None:
    names = ("backbone", "dit", "image_encoder")

    def fingerprints() -> list[str]:
        return [component_fingerprint(open_checkpoint(folder), name) for name in names]

    before = fingerprints()
    assert len(set(before)) == 3
    dit = tiny_models.build_dit()
    assert before[1] == dit_fingerprint(dit.state_dict())
    path = folder / "tokenizer.json"
    path.write_text(path.read_text("utf-8") + " ", "utf-8")
    after = fingerprints()
    assert (after[0] == before[0], after[1:] == before[1:]) == (False, True)


def test_a_separate_image_encoder_has_its_own_fingerprint(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "eva.bin"
    torch.save(tiny_models.build_image_encoder().state_dict(), path)

    def fingerprint(image_encoder: Path | None) -> str:
        return component_fingerprint(open_checkpoint(folder, image_encoder=image_encoder), "image_encoder")

    inside, separate = fingerprint(None), fingerprint(path)
    assert inside != separate
    torch.save(tiny_models.build_image_encoder(seed=9).state_dict(), path)
    assert fingerprint(path) not in (inside, separate)
