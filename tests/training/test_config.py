"""A run's configuration: strict, complete, the same after a round trip."""

import pytest
import yaml
from comfyui_blip3o.blip3o_core.errors import BadInputError, MissingFilesError
from comfyui_blip3o.lora_training.config import (
    SCHEMA,
    LoraConfig,
    parse_config,
    preset_names,
    read_config,
    read_preset,
    to_tree,
    to_yaml,
)

MINIMAL = {"run": {"name": "my_dog"}, "data": {"path": "pictures"}}


def config_of(*overrides: str) -> LoraConfig:
    return parse_config(MINIMAL, overrides)


def test_a_name_and_a_folder_are_enough():
    config = config_of()
    assert config.run.name == "my_dog"
    assert config.train.optimizer.lr > 0


@pytest.mark.parametrize("preset", preset_names())
def test_every_preset_is_a_valid_configuration(preset: str):
    config = config_of(f"run.preset={preset}")
    assert parse_config(to_tree(config)) == config


def test_the_users_settings_win_over_the_preset():
    assert read_preset("subject")["adapter"]["rank"] != 5
    config = config_of("run.preset=subject", "adapter.rank=5")
    assert config.adapter.rank == 5
    assert config.adapter.alpha == read_preset("subject")["adapter"]["alpha"]


def test_written_yaml_reads_back_as_the_same_configuration(tmp_path):
    config = config_of(
        "train.steps=7", "adapter.rank_pattern={attn1: 4}", "data.holdout=0.25", "sample.prompts=[a, b]"
    )
    path = tmp_path / "run.yaml"
    path.write_text(to_yaml(config), "utf-8")
    again = read_config(path)
    assert again.data.path == tmp_path / "pictures"
    assert to_tree(again) | {"data": 0, "run": 0} == to_tree(config) | {"data": 0, "run": 0}


def test_relative_paths_count_from_the_configuration_file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        yaml.safe_dump(MINIMAL | {"train": {"prior": {"reg_path": "others"}}, "model": {"root": "8b"}}),
        "utf-8",
    )
    config = read_config(path)
    assert config.folder == tmp_path / "runs" / "my_dog"
    assert config.train.prior.reg_path == tmp_path / "others"
    assert config.checkpoint == tmp_path / "8b"


@pytest.mark.parametrize(
    ("override", "fragments"),
    [
        ("train.optimzer.lr=1", ('"train.optimzer"', 'did you mean "optimizer"')),
        ("train.optimizer.learning_rate=1", ("train.optimizer.learning_rate", "lr")),
        ("adaptor.rank=4", ("adaptor", 'did you mean "adapter"')),
        ("adapter.rank=high", ("adapter.rank", '"high"', "whole number")),
        ("adapter.rank=1.5", ("adapter.rank", "whole number")),
        ("adapter.rank=true", ("adapter.rank", "whole number")),
        ("adapter.rank=0", ("adapter.rank", "between 1 and")),
        ("data.crop.mode=center", ("data.crop.mode", "centre")),
        ("run.preset=styles", ("styles", 'did you mean "style"')),
        ("run.name=a/b", ("a/b", "folder")),
        ("train=5", ("train", "section")),
        ("train.ema=2", ("train.ema", "between")),
        ("train.prior.dop=true", ("trigger", "class_word")),
        ("adapter.type=none", ("Nothing would learn",)),
        (f"schema={SCHEMA + 1}", ("schema", "Update")),
        ("steps", ("sets nothing", "section.key=value")),
        ("validate.sigmas=[3, 0.5]", ("validate.sigmas[0]", "3")),
    ],
)
def test_a_mistake_is_named_with_its_remedy(override: str, fragments: tuple[str, ...]):
    with pytest.raises(BadInputError) as caught:
        config_of(override)
    for fragment in fragments:
        assert fragment in str(caught.value)


@pytest.mark.parametrize("missing", ["run", "data"])
def test_a_missing_section_is_named(missing: str):
    with pytest.raises(BadInputError, match=f'"{missing}" is missing'):
        parse_config({key: value for key, value in MINIMAL.items() if key != missing})


def test_exponents_without_a_point_are_numbers():
    assert config_of("train.optimizer.lr=1e-4").train.optimizer.lr == 1e-4


def test_a_missing_or_broken_file_is_named(tmp_path):
    with pytest.raises(MissingFilesError, match=r"run\.yaml"):
        read_config(tmp_path / "run.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("run: [", "utf-8")
    with pytest.raises(BadInputError, match=r"broken\.yaml"):
        read_config(broken)


def test_reading_does_not_change_the_given_tree():
    tree = {"run": {"name": "a"}, "data": {"path": "x"}}
    parse_config(tree, ["run.seed=3"])
    assert tree == {"run": {"name": "a"}, "data": {"path": "x"}}


@pytest.mark.parametrize(("pictures", "samples"), [(5, 1500), (20, 2400), (100, 6000)])
def test_automatic_steps_give_each_picture_its_share_within_bounds(pictures: int, samples: int):
    config = config_of()
    assert config.steps(pictures) == samples // config.batch


def test_preservation_follows_trigger_and_class_word():
    assert not config_of().uses_preservation
    assert config_of("data.trigger=zzz dog", "data.class_word=dog").uses_preservation
    assert not config_of(
        "data.trigger=zzz dog", "data.class_word=dog", "train.prior.dop=false"
    ).uses_preservation


@pytest.mark.parametrize(
    ("text", "fragment"),
    [
        ("a: &a [x, x]\nb: [*a, *a]", "refers to another place"),
        ("run: {name: x\n", "line 2"),
        ("run: 2026-13-45", "cannot be read as YAML"),
        ("[" * 50 + "]" * 50, "nested too deep"),
        ("run: -1\ndata: {path: x}", '"run" must be a section'),
        ("run: {name: 2026-11-27}\ndata: {path: x}", "run.name"),
        ("run: {name: x, preset: [1]}\ndata: {path: x}", "no preset"),
        ("run: {name: x, seed: 0x" + "f" * 9000 + "}\ndata: {path: x}", "run.seed"),
        ("run: {name: x}\ndata: {path: x}\nadapter: {alpha: 0x" + "f" * 9000 + "}", "adapter.alpha"),
        ("run: {name: x}\ndata: {path: x}\nadapter: {rank_pattern: 5}", "a table of names and values"),
        ("run: {name: x}\ndata: {path: x}\nadapter: {rank_pattern: [a]}", "a table of names and values"),
        ("run: {name: x}\ndata: {path: x}\nadapter: {rank_pattern: {a: b}}", "a whole number"),
        ("run: {name: x}\ndata: {path: x}\nvalidate: {sigmas: 5}", "a list"),
        ("? [a, b]\n: 5", "unknown|cannot be read"),
    ],
    ids=lambda text: text[:30],
)
def test_a_configuration_of_nonsense_is_one_short_sentence(tmp_path, text: str, fragment: str):
    path = tmp_path / "run.yaml"
    path.write_text(text, "utf-8")
    with pytest.raises(BadInputError, match=fragment) as caught:
        read_config(path)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    "override",
    [
        "train.ema=[1",
        "run.name=2026-13-45",
        "adapter.rank=*a",
        "adapter.rank=" + "[" * 50,
        "train.steps=&a [*a]",
    ],
)
def test_a_setting_that_is_no_yaml_is_named(override: str):
    with pytest.raises(BadInputError, match="cannot be read|must be"):
        config_of(override)
