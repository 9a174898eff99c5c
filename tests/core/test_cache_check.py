"""A library that quietly computes something else is refused before it answers."""

import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from comfyui_blip3o.blip3o_core.checkpoints.layout import open_checkpoint
from comfyui_blip3o.blip3o_core.checkpoints.load import load_backbone
from comfyui_blip3o.blip3o_core.errors import Blip3oError
from comfyui_blip3o.blip3o_core.models import backbone as module
from comfyui_blip3o.blip3o_core.models import cache_check
from comfyui_blip3o.blip3o_core.models.cache_check import require_working_cache


@pytest.fixture(autouse=True)
def asked_again() -> Iterator[None]:
    require_working_cache.cache_clear()
    yield
    require_working_cache.cache_clear()


def change_text_model(monkeypatch: pytest.MonkeyPatch, change: Callable[[dict[str, Any]], None]) -> None:
    original = module.TEXT_MODEL.forward

    def forward(self: Any, **arguments: Any) -> Any:
        change(arguments)
        return original(self, **arguments)

    monkeypatch.setattr(module.TEXT_MODEL, "forward", forward)


def test_the_installed_library_passes_and_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    require_working_cache()
    monkeypatch.setattr(cache_check, "Backbone", None)
    require_working_cache()


def test_the_argument_is_the_one_that_the_library_offers() -> None:
    assert module.CACHE_ARGUMENT in inspect.signature(module.TEXT_MODEL.forward).parameters


def test_a_library_that_swallows_the_cache_is_refused_when_a_backbone_is_loaded(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change_text_model(monkeypatch, lambda arguments: arguments.update({module.CACHE_ARGUMENT: None}))
    with pytest.raises(Blip3oError, match=rf"(?s)transformers {transformers.__version__}.*has read.*doctor"):
        load_backbone(open_checkpoint(tiny_folder))


def test_a_library_that_ignores_padding_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    change_text_model(monkeypatch, lambda arguments: arguments.update(attention_mask=None))
    with pytest.raises(Blip3oError, match="padding"):
        require_working_cache()


def test_a_library_that_ignores_what_is_added_to_the_scores_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def ignore(arguments: dict[str, Any]) -> None:
        mask = arguments["attention_mask"]
        if mask is not None and mask.ndim == 4:
            arguments["attention_mask"] = None

    change_text_model(monkeypatch, ignore)
    with pytest.raises(Blip3oError, match="masked tokens"):
        require_working_cache()


def test_a_library_that_moves_positions_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def move(arguments: dict[str, Any]) -> None:
        if arguments["position_ids"].shape[-1] == 1:
            arguments["position_ids"] = arguments["position_ids"] * 0

    change_text_model(monkeypatch, move)
    with pytest.raises(Blip3oError, match="has read"):
        require_working_cache()


def test_the_question_leaves_the_random_numbers_of_others_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    require_working_cache()
    assert torch.equal(torch.rand(3), expected)
