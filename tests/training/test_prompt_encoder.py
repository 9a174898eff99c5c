"""Conditioning while the backbone learns equals the inference path, values and gradients."""

from pathlib import Path

import pytest
import torch
from comfyui_blip3o.blip3o_core.language.conditioning import encode_prompts
from comfyui_blip3o.blip3o_core.language.prompts import TextTokenizer
from comfyui_blip3o.blip3o_core.models.backbone import Backbone
from comfyui_blip3o.lora_training.fit.prompt_encoder import PromptEncoder
from tiny_models import VARIANTS, build_backbone, write_tokenizer

PROMPTS = ["a red circle", "A photo of a cute cat on the grass", "a red circle", "big"]


@pytest.fixture
def tokenizer(tmp_path: Path) -> TextTokenizer:
    write_tokenizer(tmp_path)
    return TextTokenizer(tmp_path)


def learning_queries(name: str = "default") -> Backbone:
    backbone = build_backbone(VARIANTS[name])
    backbone.latent_queries.requires_grad_(True)
    return backbone


@pytest.mark.parametrize("name", ["default", "grouped"])
@pytest.mark.parametrize("are_layers_fixed", [True, False])
def test_conditioning_equals_that_of_inference(
    name: str, are_layers_fixed: bool, tokenizer: TextTokenizer
) -> None:
    backbone = learning_queries(name)
    expected = encode_prompts(backbone, tokenizer, PROMPTS, device=torch.device("cpu"))
    encoder = PromptEncoder(backbone, tokenizer, are_layers_fixed=are_layers_fixed)
    for _ in range(2):  # the second time from the kept keys and values
        assert torch.allclose(encoder(PROMPTS), expected, atol=1e-5)


def test_gradients_after_kept_prefixes_equal_those_through_the_whole_prompt(tokenizer: TextTokenizer) -> None:
    backbone = learning_queries()
    target = torch.randn(4, 16, 32, generator=torch.Generator().manual_seed(0))
    gradients = []
    for are_layers_fixed in (True, False):
        encoder = PromptEncoder(backbone, tokenizer, are_layers_fixed=are_layers_fixed)
        (gradient,) = torch.autograd.grad(((encoder(PROMPTS) - target) ** 2).sum(), backbone.latent_queries)
        gradients.append(gradient)
    assert gradients[1].abs().max() > 1
    assert torch.allclose(*gradients, rtol=1e-4, atol=1e-4)


def test_changed_queries_are_seen_without_reading_the_prompts_again(tokenizer: TextTokenizer) -> None:
    backbone = learning_queries()
    encoder = PromptEncoder(backbone, tokenizer, are_layers_fixed=True)
    encoder(PROMPTS)
    with torch.no_grad():
        backbone.latent_queries += 0.1 * torch.randn_like(backbone.latent_queries)
    expected = encode_prompts(backbone, tokenizer, PROMPTS, device=torch.device("cpu"))
    lengths = []
    forward = backbone.text.forward
    backbone.text.forward = lambda **given: (
        lengths.append(given["inputs_embeds"].shape[1]),
        forward(**given),
    )[1]
    assert torch.allclose(encoder(PROMPTS), expected, atol=1e-5)
    assert lengths == [backbone.latent_queries.shape[1]]
