"""Fewer bits and layers that visit the device: what changes and what must not."""

from contextlib import nullcontext
from pathlib import Path

import pytest
import tiny_models
import torch
from comfyui_blip3o.blip3o_core.errors import Blip3oError
from comfyui_blip3o.blip3o_core.performance import offload
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


@pytest.mark.parametrize("error", [None, "in the work", "on the way"])
def test_what_visits_a_device_are_copies_and_the_weights_stay_where_they_lie(
    error: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The device holds shapes without numbers: weights copied back from it would be lost."""
    device = torch.device("meta")
    network = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 3))
    network[2].weight = torch.nn.Parameter(network[0].weight.data.T)
    before = {key: (tensor.data_ptr(), tensor.clone()) for key, tensor in network.state_dict().items()}
    if error == "on the way":
        monkeypatch.setattr(network[2], "_apply", lambda move: (_ for _ in ()).throw(RuntimeError("no room")))
    with nullcontext() if error is None else pytest.raises(RuntimeError):
        with offload.visit(network, device):
            assert {tensor.device for tensor in network.state_dict().values()} == {device}
            if error:
                raise RuntimeError(error)
    for key, tensor in network.state_dict().items():
        assert tensor.data_ptr() == before[key][0]
        assert torch.equal(tensor, before[key][1])
