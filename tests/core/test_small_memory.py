"""Fewer bits and layers that visit the device: what changes and what must not."""

from pathlib import Path

import pytest
import tiny_models
import torch
from comfyui_blip3o.blip3o_core import offload
from comfyui_blip3o.blip3o_core.errors import Blip3oError
from comfyui_blip3o.blip3o_core.pipeline import load_pipeline

CPU = torch.device("cpu")


def test_streamed_layers_compute_the_same(tiny_folder: Path) -> None:
    pytest.importorskip("diffusers.hooks")
    plain = load_pipeline(tiny_folder, dtype="fp32", device="cpu")
    streamed = load_pipeline(tiny_folder, dtype="fp32", device="cpu", stream=True)
    shown = [[tiny_models.picture()], []]
    prompts = ["a red circle", "a cute cat"]
    torch.testing.assert_close(streamed.encode_prompts(prompts, shown), plain.encode_prompts(prompts, shown))
    assert streamed.ask("What is this ?", [[tiny_models.picture()]]) == plain.ask(
        "What is this ?", [[tiny_models.picture()]]
    )
    pictures = [tiny_models.picture()]
    torch.testing.assert_close(streamed.encode_images(pictures), plain.encode_images(pictures))


def test_an_old_diffusers_cannot_stream_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "diffusers.hooks", None)
    with pytest.raises(Blip3oError, match=r"diffusers 0\.33"):
        offload.stream_layers(torch.nn.Linear(2, 2), CPU)
