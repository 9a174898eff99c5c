"""Numbers of the published code: every stage of ours against the reference set, in each layout it may come in."""

import json
from pathlib import Path

import pytest
import tiny_models
import torch
from comfyui_blip3o.blip3o_core.config import EvaClipConfig
from comfyui_blip3o.blip3o_core.errors import BadInputError, MissingFilesError
from comfyui_blip3o.blip3o_core.images import load_image, preprocess_for_image_encoder
from comfyui_blip3o.blip3o_core.verify import Check, report, verify_reference
from comfyui_blip3o.cli import main
from reference_set import copy_folder, nest_text_config, rewrite_weights, to_newer_layout
from safetensors.torch import load_file, save_file
from second_reference import build_second_reference

SINGLE_CALL, LOOP, EXACT = 2e-5, 2e-4, 0.0
TOLERANCES = {
    "prompt_ids": EXACT,
    "text.hidden_states": SINGLE_CALL,
    "negative.hidden_states": SINGLE_CALL,
    "i2i.pixel_values_mean": SINGLE_CALL,
    "i2i.hidden_states": SINGLE_CALL,
    "dit.velocity": SINGLE_CALL,
    "text.clip_features": LOOP,
    "negative.clip_features": LOOP,
    "i2i.clip_features": LOOP,
    "train.sigmas": SINGLE_CALL,
    "train.timesteps": SINGLE_CALL,
    "train.prediction": SINGLE_CALL,
    "train.loss": SINGLE_CALL,
    "decode.latents": LOOP,
    "decode.image": LOOP,
    "eva.pixels": SINGLE_CALL,
    "eva.pixels_mean": SINGLE_CALL,
    "eva.tokens_first64": SINGLE_CALL,
    "eva.pooled": SINGLE_CALL,
    "eva from its own file.pixels": SINGLE_CALL,
    "eva from its own file.pixels_mean": SINGLE_CALL,
    "eva from its own file.tokens_first64": SINGLE_CALL,
    "eva from its own file.pooled": SINGLE_CALL,
    "vqa_prompt_len": EXACT,
    "vqa.logits_last": SINGLE_CALL,
    "vqa.new_ids": EXACT,
}
# Golden tensors that are inputs, not results.
INPUTS = {
    "text.noise",
    "dit.x",
    "dit.timestep",
    "dit.z",
    "train.latents",
    "train.noise",
    "train.z",
    "train.indices",
    "decode.noise",
}


@pytest.fixture(scope="module")
def checks(reference: Path) -> dict[str, Check]:
    return {check.key: check for check in verify_reference(reference)}


@pytest.fixture(scope="module")
def newer_layout(reference: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights under the names of newer transformers, in one file without an index, and their nested config."""
    folder = copy_folder(reference, tmp_path_factory.mktemp("newer") / "reference")
    rewrite_weights(folder, lambda tensors: {to_newer_layout(key): value for key, value in tensors.items()})
    nest_text_config(folder)
    return folder


@pytest.mark.parametrize("key", TOLERANCES)
def test_equals_the_published_code(checks: dict[str, Check], key: str) -> None:
    check = checks[key]
    assert check.tolerance == TOLERANCES[key]
    assert check.max_abs_diff <= TOLERANCES[key] * (check.std or 1.0)
    assert check.passed


def test_no_reference_number_is_left_uncompared(reference: Path, checks: dict[str, Check]) -> None:
    golden = set(load_file(str(reference / "golden.safetensors")))
    assert golden - INPUTS == {key for key in checks if not key.startswith("eva from")} - {
        "prompt_ids",
        "vqa_prompt_len",
        "train.sigmas",
        "train.timesteps",
    } | (golden & {"train.sigmas", "train.timesteps"})
    assert set(checks) == set(TOLERANCES)


def test_the_newer_layout_gives_the_same_numbers(newer_layout: Path) -> None:
    checks = verify_reference(newer_layout)
    assert {check.key for check in checks} == set(TOLERANCES)
    assert [check.key for check in checks if not check.passed] == []


@pytest.mark.parametrize(
    ("tensor", "failing"),
    [
        ("model.latent_queries", {"text.hidden_states", "negative.hidden_states", "i2i.hidden_states"}),
        ("model.dit.model.layers.1.gate", {"dit.velocity", "text.clip_features", "train.prediction"}),
        ("model.gen_vision_tower.vision_tower.model.blocks.1.norm2.weight", {"eva.pooled"}),
        ("visual.merger.mlp.2.bias", {"i2i.hidden_states", "vqa.logits_last"}),
    ],
)
def test_a_changed_weight_fails_what_it_feeds(
    reference: Path, tmp_path: Path, tensor: str, failing: set[str]
) -> None:
    folder = copy_folder(reference, tmp_path / "reference")
    rewrite_weights(folder, lambda tensors: {**tensors, tensor: tensors[tensor] + 0.25})
    failed = {check.key for check in verify_reference(folder) if not check.passed}
    assert failing <= failed
    assert "prompt_ids" not in failed
    assert "decode.latents" not in failed


def test_the_command_prints_json_and_exits_with_0_when_all_pass(
    reference: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify-reference", str(reference)]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["passed"] is True
    assert set(printed["checks"]) == set(TOLERANCES)
    assert set(printed["checks"]["dit.velocity"]) == {"max_abs_diff", "std", "tolerance", "passed"}


def test_the_command_exits_with_1_when_a_number_differs_or_has_another_shape(
    reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copy_folder(reference, tmp_path / "reference")
    golden = load_file(str(folder / "golden.safetensors"))
    golden["dit.velocity"][0, 0, 0, 0] += 1e-3
    golden["eva.pooled"] = golden["eva.pooled"][:, :-1].contiguous()
    golden["train.prediction"][0, 0, 0, 0] = float("nan")
    (folder / "golden.safetensors").unlink()
    save_file(golden, str(folder / "golden.safetensors"))
    assert main(["verify-reference", str(folder)]) == 1
    printed = json.loads(capsys.readouterr().out)
    assert printed["passed"] is False
    failed = {key for key, check in printed["checks"].items() if not check["passed"]}
    assert failed == {"dit.velocity", "eva.pooled", "eva from its own file.pooled", "train.prediction"}
    assert printed["checks"]["eva.pooled"]["max_abs_diff"] is None
    assert printed["checks"]["dit.velocity"]["max_abs_diff"] == pytest.approx(1e-3, rel=0.01)


def test_other_answer_tokens_fail(reference: Path, tmp_path: Path) -> None:
    folder = copy_folder(reference, tmp_path / "reference")
    golden = {
        key: value
        for key, value in load_file(str(folder / "golden.safetensors")).items()
        if key.startswith("vqa")
    }
    golden["vqa.new_ids"][0, -1] += 1
    (folder / "golden.safetensors").unlink()
    save_file(golden, str(folder / "golden.safetensors"))
    failed = [check.key for check in verify_reference(folder) if not check.passed]
    assert failed == ["vqa.new_ids"]


def test_a_reference_that_compares_nothing_is_refused(reference: Path, tmp_path: Path) -> None:
    folder = copy_folder(reference, tmp_path / "reference")
    (folder / "golden.safetensors").unlink()
    save_file({"something.else": torch.zeros(2)}, str(folder / "golden.safetensors"))
    with pytest.raises(BadInputError, match="golden.safetensors"):
        verify_reference(folder)


@pytest.mark.parametrize("name", ["golden.safetensors", "golden.json"])
def test_a_folder_without_reference_numbers_is_refused(reference: Path, tmp_path: Path, name: str) -> None:
    folder = copy_folder(reference, tmp_path / "reference")
    (folder / name).unlink()
    with pytest.raises(MissingFilesError, match=name):
        verify_reference(folder)


def test_a_reference_of_other_sizes_passes_too(tmp_path: Path) -> None:
    """Computed by transformers, diffusers and plain arithmetic; nothing in it comes from our networks."""
    checks = verify_reference(build_second_reference(tmp_path / "second"))
    assert [(check.key, check.max_abs_diff / check.std) for check in checks if not check.passed] == []
    without_answers = {key for key in TOLERANCES if not key.startswith(("vqa", "train", "eva from"))}
    assert {check.key for check in checks} == without_answers


@pytest.mark.parametrize("size", [56, 98, 224, 252])
def test_every_sixteenth_pixel_is_compared_whatever_the_resolution(
    reference: Path, tmp_path: Path, size: int
) -> None:
    tower = EvaClipConfig(
        width=16, layers=1, head_width=8, mlp_dim=24, image_size=size, patch_size=14, pool=1
    )
    folder = tmp_path / "reference"
    tiny_models.write_checkpoint(folder / "checkpoint", tiny_models.TinySizes(tower=tower))
    picture = load_image(reference / "eva_image.png")
    picture.save(folder / "eva_image.png")
    pixels = preprocess_for_image_encoder(picture, size)[None]
    tensors = {"eva.pooled": torch.zeros(1, 16, 1, 1), "eva.pixels": pixels[:, :, ::16, ::16].contiguous()}
    save_file(tensors, str(folder / "golden.safetensors"))
    (folder / "golden.json").write_text("{}", "utf-8")
    checks = {check.key: check.passed for check in verify_reference(folder)}
    assert checks == {"eva.pixels": True, "eva.pooled": False}


def test_the_report_keeps_the_numbers() -> None:
    made = report([Check("a", 1e-7, 1.0, 2e-5, True), Check("b", float("inf"), 1.0, 2e-5, False)])
    assert made["passed"] is False
    assert made["checks"]["a"]["max_abs_diff"] == 1e-7
    assert made["checks"]["b"]["max_abs_diff"] is None
