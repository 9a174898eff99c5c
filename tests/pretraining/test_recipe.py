"""The whole recipe at toy size: every stage runs, resumes, is gated, and the result loads like a published checkpoint."""

import copy
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from comfyui_blip3o.blip3o_core.errors import BadInputError, MissingFilesError
from comfyui_blip3o.blip3o_core.pipeline import load_pipeline
from comfyui_blip3o.pretraining.cli import main
from comfyui_blip3o.pretraining.evaluation.compare import Drawer, check_rows, comparison_rows, variety
from comfyui_blip3o.pretraining.evaluation.geneval import CATEGORIES
from comfyui_blip3o.pretraining.recipe import CONFIGS, STAGES, Recipe, read_config
from comfyui_blip3o.pretraining.world.scenes import COLOUR_RGB
from PIL import Image

TOY = {
    "encoder": {"network": {"width": 48, "layers": 3, "head_width": 16, "mlp_dim": 64}},
    "vae": {"network": {"block_out_channels": [8, 8, 8, 8], "latent_channels": 4}, "full_from": 2},
    "decoder": {"network": {"channels": [8, 16], "heads": [1, 2]}},
    "understanding": {
        "network": {
            "hidden": 32, "layers": 3, "heads": 2, "kv_heads": 1, "ffn": 32,
            "visual_hidden": 24, "visual_layers": 3, "visual_heads": 2, "visual_ffn": 32,
        },
        "prompts": 2,
    },
    "generation": {"network": {"dim": 32, "layers": 1, "heads": 2, "kv_heads": 2, "ffn_dim": 32, "time_dim": 32}},
    "tuning": {"network": {"dim": 32, "layers": 1, "heads": 2, "kv_heads": 2, "ffn_dim": 32, "time_dim": 32}},
}  # fmt: skip


def toy(stage):
    config = read_config(CONFIGS / f"{stage}.yaml")
    for key, value in copy.deepcopy(TOY[stage]).items():
        config[key] = {**config[key], **value} if isinstance(value, dict) else value
    config["data"] = {
        "scenes": 12,
        "seed": 1,
        **({"extra_singles": 12} if stage in ("decoder", "generation", "tuning") else {}),
    }
    config["loop"] = {"steps": 2, "batch_size": 4, "warmup": 1, "log_every": 1, "ema": 0.9}
    return config


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder in which one command has trained all stages."""
    folder = tmp_path_factory.mktemp("pretraining")
    paths = [folder / f"{stage}.yaml" for stage in STAGES]
    for stage, path in zip(STAGES, paths, strict=True):
        path.write_text(yaml.safe_dump(toy(stage)))
    files = [str(path) for path in paths]
    assert main(["pretrain", "all", "--run", str(folder / "run"), "--no-gate", "--config", *files]) == 0
    return folder / "run"


def test_one_command_trains_all_stages_to_a_checkpoint_that_draws_and_answers(run):
    for stage in STAGES:
        assert torch.load(run / stage / "state.pt", weights_only=True)["step"] == 2
        assert (run / stage / "loss.png").is_file()
    pipeline = load_pipeline(run / "checkpoint", device="cpu")
    drawn = pipeline.generate("a red circle", preset="fast")
    assert drawn.images.shape == (1, 128, 128, 3)
    assert isinstance(pipeline.ask("what is this?", [[drawn.pictures[0]]])[0], str)
    assert pipeline.encode_images(drawn.pictures).shape == (1, 64, 48)
    tuned = torch.load(run / "tuning" / "state.pt", weights_only=True)["average"]
    for name, tensor in pipeline.dit.state_dict().items():
        assert torch.equal(tensor, tuned[f"dit.{name}"].bfloat16().to(tensor)), name


def test_a_run_remembers_the_configurations_it_was_trained_with(run):
    recipe = Recipe(run)
    assert recipe.configs["generation"]["network"] == TOY["generation"]["network"]
    assert recipe.drawing()[1].config.dim == 32


def test_another_run_builds_on_the_earlier_stages(run, tmp_path):
    config = {**toy("generation"), "learn": "queries"}
    (tmp_path / "queries.yaml").write_text(yaml.safe_dump(config))
    mine = ["--run", str(tmp_path / "mine"), "--earlier", str(run)]
    assert main(["pretrain", "generation", *mine, "--config", str(tmp_path / "queries.yaml")]) == 0
    assert main(["pretrain", "assemble", *mine]) == 0
    before, after = (
        load_pipeline(path, device="cpu") for path in (run / "checkpoint", tmp_path / "mine/checkpoint")
    )
    old, new = before.backbone.state_dict(), after.backbone.state_dict()
    assert {name for name in old if not torch.equal(old[name], new[name])} == {"latent_queries"}
    assert not (tmp_path / "mine" / "encoder").exists()


def test_an_earlier_stage_is_not_trained_into_another_run(run, tmp_path, capsys):
    assert main(["pretrain", "vae", "--run", str(tmp_path), "--earlier", str(run)]) == 2
    assert 'Stage "vae" is taken from the run' in capsys.readouterr().err


def test_a_dit_of_latents_cannot_become_a_checkpoint(run, tmp_path):
    recipe = Recipe(tmp_path, {"generation": {**toy("generation"), "target": "latents"}}, earlier=run)
    assert recipe.job("generation").batch_of(0)["clean"].shape == (4, 64, 16)
    with pytest.raises(BadInputError, match="draws VAE latents"):
        recipe.assemble(tmp_path / "checkpoint")


def test_a_stage_without_its_forerunner_says_which_command_is_missing(tmp_path):
    recipe = Recipe(tmp_path, {stage: toy(stage) for stage in STAGES})
    with pytest.raises(
        MissingFilesError, match='Stage "encoder" has not been trained.*\n.*blip3o pretrain encoder'
    ):
        recipe.job("decoder")


def test_a_stage_below_its_gate_stops_the_command(tmp_path, capsys):
    path = tmp_path / "encoder.yaml"
    path.write_text(yaml.safe_dump(toy("encoder")))
    assert main(["pretrain", "encoder", "--run", str(tmp_path / "run"), "--config", str(path)]) == 2
    assert 'Stage "encoder" is not good enough' in capsys.readouterr().err
    assert (tmp_path / "run" / "encoder" / "loss.png").is_file()
    assert (
        main(["pretrain", "encoder", "--run", str(tmp_path / "run"), "--config", str(path), "--no-gate"]) == 0
    )


def test_every_shipped_configuration_names_its_own_stage():
    for stage in STAGES:
        assert read_config(CONFIGS / f"{stage}.yaml")["stage"] == stage


def test_foreign_configurations_are_refused(tmp_path):
    (tmp_path / "x.yaml").write_text("stage: nonsense\n")
    with pytest.raises(BadInputError, match="names no stage"):
        read_config(tmp_path / "x.yaml")
    with pytest.raises(BadInputError, match='no stage "nonsense"'):
        Recipe(tmp_path).job("nonsense")


def compared(run, table, prompts, capsys):
    command = ["pretrain", "compare", "--run", str(run), "--table", table, "--steps", "2", "--scenes", "3"]
    assert main([*command, "--prompts", str(prompts)]) == 0
    return capsys.readouterr(), json.loads((run / table / "comparison.json").read_text())


@pytest.mark.slow
def test_every_design_trains_and_is_scored_alike_once(run, capsys, monkeypatch):
    monkeypatch.setattr("comfyui_blip3o.pretraining.evaluation.compare.comparison_rows", toy_rows)
    said, result = compared(run, "designs", 1, capsys)
    assert set(result["rows"]) == set(toy_rows())
    for name, row in result["rows"].items():
        assert set(row["prompts"]["categories"]) == set(CATEGORIES)
        assert f"| {row['title']} |" in said.out and f"Row {name}" in said.err
        assert row["questions"]["overall"] == result["understanding before"]
    again, _ = compared(run, "designs", 1, capsys)
    assert "Row" not in again.err and again.out == said.out


def test_a_backbone_that_learns_is_asked_before_and_after(run, capsys, monkeypatch):
    monkeypatch.setattr("comfyui_blip3o.pretraining.evaluation.compare.comparison_rows", toy_rows)
    said, result = compared(run, "joint", 0, capsys)
    assert "single object" not in said.out and "| questions |" in said.out
    rows = result["rows"]
    for name in ("sequential", "queries"):
        assert rows[name]["questions"]["overall"] == result["understanding before"]
    sizes = [rows[name]["learning parameters"] for name in ("sequential", "queries", "unfrozen", "joint")]
    assert sizes == sorted(sizes) and len(set(sizes)) == 4


def test_a_drawer_draws_what_the_assembled_checkpoint_draws(run):
    drawn = Drawer(Recipe(run)).generate(
        ["a red circle", "two stars"], images_per_prompt=1, seed=4, preset="fast", batch_size=2
    )
    checkpoint = load_pipeline(run / "checkpoint", device="cpu", dtype="fp32")
    expected = checkpoint.generate(["a red circle", "two stars"], seed=4, preset="fast", pixel_negative=None)
    assert drawn.seeds == expected.seeds
    for ours, theirs in zip(drawn.pictures, expected.pictures, strict=True):
        # The checkpoint's weights were rounded to bf16.
        assert np.abs(np.asarray(ours, dtype=int) - np.asarray(theirs)).mean() < 3


def test_a_row_that_does_not_exist_is_refused():
    with pytest.raises(BadInputError, match='no row "nonsense".*clip-mse, clip-flow'):
        check_rows(comparison_rows("designs"), ["clip-flow", "nonsense"])
    assert list(check_rows(comparison_rows("joint"), None)) == ["sequential", "queries", "joint", "unfrozen"]


def toy_rows(table="designs"):
    return {
        name: {**row, **{key: toy("generation")[key] for key in ("data", "network", "loop")}}
        for name, row in comparison_rows(table).items()
    }


@pytest.mark.parametrize(
    ("colour_of", "expected"),
    [
        (lambda seed: (COLOUR_RGB[seed % 4],) * 2, {"pure": 1.0, "colours": 4.0}),
        (lambda seed: (COLOUR_RGB[0],) * 2, {"pure": 1.0, "colours": 1.0}),
        (lambda seed: (COLOUR_RGB[0], COLOUR_RGB[3]), {"pure": 0.0, "colours": 0.0}),
    ],
    ids=["four", "one", "blended"],
)
def test_variety_counts_the_pure_colours_of_a_prompt(colour_of, expected):
    class Painter:
        def generate(self, prompts, *, images_per_prompt, seed, preset, batch_size):
            pictures = []
            for n in range(images_per_prompt):
                pixels = np.full((128, 128, 3), 255, np.uint8)
                left, right = colour_of(seed + n)
                pixels[40:88, 40:64], pixels[40:88, 64:88] = left, right
                pictures.append(Image.fromarray(pixels))
            return SimpleNamespace(pictures=pictures)

    assert variety(Painter(), 0, "fast") == expected
