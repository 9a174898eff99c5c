"""Which prompts come with the program for which model."""

import dataclasses
from pathlib import Path

import pytest
import tiny_models
from comfyui_blip3o.blip3o_core.config import BUILT_IN_MODEL
from comfyui_blip3o.blip3o_core.language.prompts import TextTokenizer
from comfyui_blip3o.lora_training import prompts
from comfyui_blip3o.lora_training.prompts import drift_prompts, knows, preservation_prompts
from tiny_training import lora_config


def test_the_model_s_words_decide_which_prompts_are_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = lora_config(tmp_path, train__prior={"dop": True})
    assert drift_prompts(config) == prompts.DRIFT_SCENES
    assert preservation_prompts(config) == prompts.PRESERVED_SCENES
    # A model of another name that knows "house" and "dogs" beside what these prompts need.
    other = tiny_models.write_checkpoint(tmp_path / "other")
    known = dataclasses.replace(config, model=dataclasses.replace(config.model, root=str(other)))
    assert drift_prompts(known) == prompts.DRIFT_SCENES
    monkeypatch.setattr(prompts, "knows", lambda tokenizer, text: True)
    prompts._knows_the_world.cache_clear()
    assert drift_prompts(known) == prompts.DRIFT and preservation_prompts(known) == prompts.PRESERVED
    prompts._knows_the_world.cache_clear()


def test_the_built_in_model_knows_every_word_that_it_is_measured_with() -> None:
    tokenizer = TextTokenizer(BUILT_IN_MODEL)
    for prompt in (*prompts.PRESERVED_SCENES, *prompts.DRIFT_SCENES):
        assert knows(tokenizer, prompt), prompt
    assert not knows(tokenizer, prompts.DRIFT[0])


def test_drift_is_never_measured_on_what_preservation_saw() -> None:
    for kept, measured in (
        (prompts.PRESERVED, prompts.DRIFT),
        (prompts.PRESERVED_SCENES, prompts.DRIFT_SCENES),
    ):
        assert not set(kept) & set(measured) and len(set(kept)) == len(kept)


def test_prompts_of_the_configuration_come_first(tmp_path: Path) -> None:
    config = lora_config(
        tmp_path, train__prior={"dop": True, "prompts": ["x"]}, validate__drift_prompts=["y"]
    )
    assert preservation_prompts(config) == ("x",) and drift_prompts(config) == ("y",)
    assert preservation_prompts(lora_config(tmp_path, train__prior={"dop": False})) == ()
