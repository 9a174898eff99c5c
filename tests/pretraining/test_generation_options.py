"""The designs the paper compares: latents as the target, regression, latent queries and backbone that learn, questions."""

import numpy as np
import pytest
import torch
from comfyui_blip3o.blip3o_core.config import NextDiTConfig
from comfyui_blip3o.blip3o_core.drawing.sampling import FeatureSettings, sample_features, to_tokens
from comfyui_blip3o.blip3o_core.errors import BadInputError
from comfyui_blip3o.blip3o_core.models.nextdit import NextDiT
from comfyui_blip3o.pretraining.stages import generation
from comfyui_blip3o.pretraining.stages.decoder import decoder_batches
from comfyui_blip3o.pretraining.stages.generation import GenerationOptions, GenerationStage
from comfyui_blip3o.pretraining.stages.understanding import (
    BackboneSizes,
    UnderstandingStage,
    backbone_config,
    build_backbone,
)
from comfyui_blip3o.pretraining.trainer import LoopConfig, train_stage
from comfyui_blip3o.pretraining.world.pool import ScenePool, draw_singles
from comfyui_blip3o.pretraining.world.scenes import COLOURS, SIZES, coverage_maps, draw_scenes, render
from comfyui_blip3o.pretraining.world.vocabulary import WordIds

VOCABULARY = WordIds()
BACKBONE = BackboneSizes(
    hidden=32,
    layers=3,
    heads=2,
    kv_heads=1,
    ffn=48,
    visual_hidden=24,
    visual_layers=3,
    visual_heads=2,
    visual_ffn=32,
)
GEN_VISION = {
    "width": 16,
    "layers": 2,
    "head_width": 16,
    "mlp_ratio": 2.0,
    "image_size": 128,
    "patch_size": 16,
}
LEARNERS = {
    "queries": GenerationOptions(learn="queries"),
    "backbone": GenerationOptions(learn="backbone"),
    "joint": GenerationOptions(learn="backbone", questions=3),
}


@pytest.fixture(scope="module")
def pool():
    scenes = draw_scenes(16, 43)
    cover = np.rint(255 * coverage_maps(scenes, 32)).astype(np.uint8)
    return ScenePool(scenes, render(scenes), cover)


def understanding():
    torch.manual_seed(0)
    return UnderstandingStage(
        build_backbone(backbone_config(BACKBONE, VOCABULARY, GEN_VISION)), VOCABULARY, BACKBONE.queries
    )


def dit(channels=16):
    torch.manual_seed(1)
    sizes = {"dim": 32, "layers": 1, "heads": 2, "kv_heads": 2, "ffn_dim": 48, "time_dim": 32}
    network = NextDiT(NextDiTConfig(in_channels=channels, conditioning_dim=32, **sizes))
    generation.initialise(network)
    return network


def targets(width=16, number=16):
    return np.random.default_rng(0).standard_normal((number, 64, width)).astype(np.float32)


def worded(pool, options, **changes):
    settings = {"batch_size": 6, "seed": 0, "drop": 0.1, "questions": options.questions, **changes}
    return generation.worded_batches(targets(), pool, VOCABULARY, BACKBONE.queries, **settings)


def test_latents_become_tokens_and_come_back():
    latents = torch.randn(3, 8, 16, 16)
    tokens = torch.from_numpy(generation.latent_tokens(latents.numpy()))
    assert tokens.shape == (3, 64, 32)
    torch.testing.assert_close(
        tokens, to_tokens(torch.nn.functional.pixel_unshuffle(latents, 2)), rtol=0, atol=0
    )
    torch.testing.assert_close(generation.tokens_to_latents(tokens), latents, rtol=0, atol=0)


@pytest.mark.parametrize("objective", ["flow", "mse"])
def test_a_dit_of_latent_tokens_learns(objective):
    options = GenerationOptions(target="latents", objective=objective)
    stage = GenerationStage(dit(32), options)
    batch_of = generation.generation_batches(targets(32), targets(32), 8, 0, 0.0)
    optimizer = torch.optim.AdamW(stage.parameters(), lr=3e-3)
    losses = []
    for _ in range(30):
        loss, _ = stage(batch_of(0))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_the_loss_of_regression_is_the_error_of_one_step_without_guidance():
    network = dit()
    torch.nn.init.normal_(
        network.norm_out.linear_2.weight, std=0.1
    )  # zero at the start: it would draw its noise
    batch = generation.generation_batches(targets(), targets(32), 4, 0, 0.0)(3)
    with torch.no_grad():
        loss, _ = GenerationStage(network, GenerationOptions(objective="mse"))(batch)
    drawn = sample_features(
        network,
        batch["conditioning"],
        noise=batch["noise"].transpose(1, 2).unflatten(2, (8, 8)),
        settings=FeatureSettings(steps=1, guidance_scale=1),
    )
    assert loss.item() == pytest.approx((drawn - batch["clean"]).square().mean().item(), rel=1e-4)


def test_worded_prompts_give_the_conditioning_that_the_backbone_reads(pool):
    reader = understanding().eval()
    batch = worded(pool, LEARNERS["queries"], bare_share=0.5)(2)
    with torch.no_grad():
        ours = reader.at_queries(reader.prompt_states(batch), batch)
        bare = generation.encode_prompts(reader, VOCABULARY, [None])[0]
    is_bare = (batch["clean"] == 0).flatten(1).all(dim=1)
    assert 0 < is_bare.sum() < len(is_bare)
    for row, empty in zip(ours, is_bare, strict=True):
        assert torch.allclose(row, bare, atol=1e-4) == bool(empty)


@pytest.mark.parametrize("name", LEARNERS)
def test_what_shall_learn_gets_a_gradient_and_nothing_else_does(pool, name):
    options = LEARNERS[name]
    stage = GenerationStage(dit(), options, understanding())
    torch.nn.init.normal_(stage.dit.norm_out.linear_2.weight, std=0.1)
    loss, numbers = stage(worded(pool, options, bare_share=0.0)(0))
    loss.backward()
    learning = {key for key, p in stage.named_parameters() if p.requires_grad}
    assert learning == {
        key for key, p in stage.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0
    }
    inside = {key.removeprefix("understanding.") for key in learning if key.startswith("understanding.")}
    if name == "queries":
        assert inside == {"latent_queries"}
    elif name == "backbone":
        rest = inside - {"latent_queries"}
        assert rest and all(key.startswith("backbone.model.language_model.") for key in rest)
    else:
        assert any("visual" in key for key in inside) and "backbone.lm_head.weight" in inside
    assert ("answers" in numbers) == (name == "joint")


@pytest.mark.parametrize("name", LEARNERS)
def test_a_resumed_run_equals_a_whole_one_and_saves_only_what_learns(tmp_path, pool, name):
    options = LEARNERS[name]
    loop = LoopConfig(steps=4, batch_size=6, warmup=1, log_every=1, ema=0.9)

    def train(folder, stop_at=None):
        stage = GenerationStage(dit(), options, understanding())
        train_stage(stage, worded(pool, options), loop, folder, stop_at=stop_at)
        return torch.load(folder / "state.pt", weights_only=True)["model"]

    whole = train(tmp_path / "whole")
    train(tmp_path / "parts", 2)
    parts = train(tmp_path / "parts")
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[key], parts[key]) for key in whole)
    assert "understanding.latent_queries" in whole
    assert any("visual" in key for key in whole) == (name == "joint")


def test_impossible_options_are_refused():
    with pytest.raises(BadInputError, match='target is "pixels"; choose one of features, latents'):
        GenerationOptions(target="pixels")
    with pytest.raises(BadInputError, match='questions is 4 while learn is "queries"'):
        GenerationOptions(learn="queries", questions=4)


def test_extra_singles_can_favour_small_objects():
    plain, small = draw_singles(400, 3), draw_singles(400, 3, 0.6)
    shares = [float((pool.scenes.size == SIZES.index("small")).mean()) for pool in (plain, small)]
    assert shares[0] < 0.45 and shares[1] == pytest.approx(0.6, abs=0.01)
    assert (small.scenes.count == 1).all() and len(small.images) == len(small)
    with pytest.raises(BadInputError, match="no single object to add"):
        draw_singles(1, 1, 0.5)


def test_extra_singles_fill_their_share_of_a_batch():
    """Of generation by ready conditioning, of generation by words, and of the decoder."""
    extra = np.full((5, 64, 16), 9.0, np.float32)
    ready = generation.generation_batches(targets(), targets(32), 20, 0, 0.1, singles=(extra, targets(32, 5)))
    features = ready(0)["clean"]
    latents = np.full((5, 4, 16, 16), 9.0, np.float32)
    decoder = decoder_batches(
        targets(), np.zeros((16, 4, 16, 16), np.float32), 20, 0, 0.1, singles=(extra, latents)
    )
    drawn = decoder(0)
    for values in (features, drawn["features"], drawn["latents"]):
        assert (values == 9).flatten(1).all(dim=1).tolist() == [True] * 7 + [False] * 13


def test_prompts_of_extra_singles_leave_their_colour_open_as_often_as_asked(pool):
    singles = draw_singles(60, 3)
    more = (targets(number=len(singles)), singles.scenes)
    colours = torch.tensor([VOCABULARY.ids[colour] for colour in COLOURS])

    def coloured(share):
        batch = worded(
            pool, LEARNERS["queries"], batch_size=30, bare_share=0.0, singles=more, open_colours=share
        )(0)
        return torch.isin(batch["prompt_ids"][:10], colours).any(dim=1).tolist()

    assert coloured(1.0) == [False] * 10
    assert coloured(0.0) == [True] * 10
