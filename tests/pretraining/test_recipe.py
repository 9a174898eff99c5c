"""The whole recipe at toy size: every stage runs, resumes, is gated, and the result loads like a published checkpoint."""

import copy

import pytest
import yaml
from comfyui_blip3o.blip3o_core.errors import BadInputError, MissingFilesError
from comfyui_blip3o.blip3o_core.pipeline import load_pipeline
from comfyui_blip3o.pretraining.cli import main
from comfyui_blip3o.pretraining.recipe import CONFIGS, STAGES, Recipe, read_config

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
        **({"extra_singles": 12} if stage in ("generation", "tuning") else {}),
    }
    config["loop"] = {"steps": 2, "batch_size": 4, "warmup": 1, "log_every": 1, "ema": 0.9}
    return config


def test_all_stages_run_in_order_and_make_a_checkpoint_that_draws_and_answers(tmp_path):
    from comfyui_blip3o.pretraining.trainer import train_stage

    recipe = Recipe(tmp_path / "run", {stage: toy(stage) for stage in STAGES})
    for stage in STAGES:
        job = recipe.job(stage)
        train_stage(job.module, job.batch_of, job.loop, tmp_path / "run" / stage)
    folder = recipe.assemble(tmp_path / "checkpoint")
    pipeline = load_pipeline(folder, device="cpu")
    drawn = pipeline.generate("a red circle", preset="fast")
    assert drawn.images.shape == (1, 128, 128, 3)
    assert isinstance(pipeline.ask("what is this?", [[drawn.pictures[0]]])[0], str)
    assert pipeline.encode_images(drawn.pictures).shape == (1, 64, 48)


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
