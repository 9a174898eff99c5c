"""The stages: codes, exact twins of transformers' forward passes, branches that do not see each other, losses."""

import numpy as np
import pytest
import torch
from comfyui_blip3o.blip3o_core.config import EvaClipConfig, NextDiTConfig
from comfyui_blip3o.blip3o_core.models.eva_clip import EvaClip
from comfyui_blip3o.blip3o_core.models.nextdit import NextDiT
from comfyui_blip3o.pretraining.assemble import to_backbone
from comfyui_blip3o.pretraining.stages import encoder as encoding
from comfyui_blip3o.pretraining.stages import generation
from comfyui_blip3o.pretraining.stages.decoder import (
    DecoderStage,
    build_unet,
    decoder_batches,
    tiny_unet_config,
)
from comfyui_blip3o.pretraining.stages.understanding import (
    BackboneSizes,
    UnderstandingStage,
    backbone_config,
    branch_mask,
    build_backbone,
    question_rows,
    understanding_batches,
)
from comfyui_blip3o.pretraining.stages.vae import VaeStage, build_vae, vae_batches
from comfyui_blip3o.pretraining.world.captions import Question
from comfyui_blip3o.pretraining.world.pool import ScenePool
from comfyui_blip3o.pretraining.world.scenes import COLOURS, KINDS, coverage_maps, draw_scenes, render
from comfyui_blip3o.pretraining.world.vocabulary import WordIds

VOCABULARY = WordIds()
SIZES = BackboneSizes(
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
    "width": 48,
    "layers": 2,
    "head_width": 16,
    "mlp_ratio": 2.0,
    "image_size": 128,
    "patch_size": 16,
}
CONFIG = backbone_config(SIZES, VOCABULARY, GEN_VISION)


@pytest.fixture(scope="module")
def pool():
    scenes = draw_scenes(24, 41)
    cover = np.rint(255 * coverage_maps(scenes, 32)).astype(np.uint8)
    return ScenePool(scenes, render(scenes), cover)


@pytest.fixture(scope="module")
def stage():
    torch.manual_seed(0)
    return UnderstandingStage(build_backbone(CONFIG), VOCABULARY, SIZES.queries).eval()


def encoder():
    config = EvaClipConfig(
        width=48, layers=3, head_width=16, mlp_dim=64, image_size=128, patch_size=16, pool=1
    )
    torch.manual_seed(1)
    network = EvaClip(config)
    encoding.initialise(network)
    return network


def caption_ids(scenes, step):
    return torch.randint(12, VOCABULARY.size, (len(scenes), 5), generator=torch.Generator().manual_seed(step))


def test_codes_read_back_to_kind_and_colour_of_the_object_at_each_cell(pool):
    code = encoding.semantic_code(pool.scenes, pool.coverage)
    for n in range(len(pool)):
        for k in range(pool.scenes.count[n]):
            column, row = int(pool.scenes.x[n, k] // 16), int(pool.scenes.y[n, k] // 16)
            cell = code[n, 8 * row + column]
            assert cell[encoding.CODE_SLICES["kind"]].argmax() == pool.scenes.kind[n, k]
            assert cell[encoding.CODE_SLICES["colour"]].argmax() == pool.scenes.colour[n, k]
            assert cell[15] > 0
        assert code[n, 0, 15] < 0  # a corner is ground


def test_the_map_from_codes_to_features_loses_nothing():
    frame = encoding.frame(64)
    torch.testing.assert_close(frame @ frame.T, torch.eye(encoding.CODE_WIDTH), atol=1e-5, rtol=0)


def test_rescaling_multiplies_the_features_exactly():
    network, pixels = encoder(), torch.randn(2, 3, 128, 128)
    with torch.no_grad():
        before = network(pixels)
        encoding.rescale(network, 2.0)
        torch.testing.assert_close(network(pixels), 2 * before, rtol=1e-5, atol=1e-5)


def test_the_encoder_stage_learns_from_every_term(pool):
    stage = encoding.EncoderStage(encoder(), VOCABULARY.size)
    loss, numbers = stage(encoding.encoder_batches(pool, caption_ids, 6, 0)(0))
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in stage.encoder.blocks.parameters())
    assert stage.text.embed.weight.grad.abs().sum() > 0
    assert 0 <= numbers["kind_accuracy"] <= 1


def test_picture_rows_equal_the_core_backbone(stage, pool):
    """The batched training forward against transformers' own vision tower and text model behind the core's class."""
    from comfyui_blip3o.blip3o_core.images import to_patches
    from PIL import Image

    question = Question("background", "what colour is the background?", "white")
    batch = {
        "pixels": pool.pixels(np.arange(1)),
        **question_rows(VOCABULARY, [[question]]).tensors("picture"),
    }
    backbone = to_backbone(stage.backbone, stage.latent_queries, CONFIG).eval()
    patches, grid = to_patches(Image.fromarray(pool.images[0]), patch_size=16, merge_size=2)
    with torch.no_grad():
        ours = stage.picture_states(batch)[0]
        embeddings = backbone.embed(batch["picture_ids"])
        picture = backbone.encode_images(patches, torch.tensor([grid]))
        embeddings[batch["picture_ids"] == stage.picture_token] = picture
        theirs = backbone(embeddings, batch["picture_positions"].permute(1, 0, 2))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_prompt_conditioning_equals_the_core_backbone(stage):
    from comfyui_blip3o.blip3o_core.language.prompts import generation_text

    backbone = to_backbone(stage.backbone, stage.latent_queries, CONFIG).eval()
    ids = torch.tensor([VOCABULARY(generation_text("two red stars") + "[IMG]")])
    with torch.no_grad():
        theirs = backbone.encode_conditioning(backbone.embed(ids))
        ours = generation.encode_prompts(stage, VOCABULARY, ["two red stars"])
        other = generation.encode_prompts(stage, VOCABULARY, ["two blue stars"])
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(ours, other, atol=1e-3)


def test_a_bare_prompt_is_the_published_negative(stage):
    backbone = to_backbone(stage.backbone, stage.latent_queries, CONFIG).eval()
    ids = torch.tensor([[VOCABULARY.ids["[IMG]"]]])
    with torch.no_grad():
        theirs = backbone.encode_conditioning(backbone.embed(ids))[0]
        ours = generation.encode_prompts(stage, VOCABULARY, [None])[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_branches_do_not_see_each_other(stage, pool):
    first = Question("a", "what colour is the background?", "white")
    second = Question("b", "how many objects are there?", "two")
    pixels = pool.pixels(np.arange(1))
    both = {"pixels": pixels, **question_rows(VOCABULARY, [[first, second]]).tensors("picture")}
    alone = {"pixels": pixels, **question_rows(VOCABULARY, [[second]]).tensors("picture")}
    with torch.no_grad():
        together, single = stage.picture_states(both)[0], stage.picture_states(alone)[0]
    torch.testing.assert_close(
        together[both["picture_branch"] == 2], single[alone["picture_branch"] == 1], rtol=1e-4, atol=1e-5
    )


def test_a_branch_mask_hides_the_future_and_padding():
    mask = branch_mask(torch.tensor([[0, 0, 1, 1, 2, -1]]))[0]
    assert mask[3].tolist() == [True, True, True, True, False, False]
    assert mask[4].tolist() == [True, True, False, False, True, False]
    assert mask[1].tolist() == [True, True, False, False, False, False]


def test_understanding_batches_teach_answers_layouts_and_mentions(stage, pool):
    batch = understanding_batches(pool, VOCABULARY, 4, 3, 0, SIZES.queries)(5)
    assert (batch["picture_weights"] > 0).any(dim=1).all()
    assert ((batch["prompt_ids"] == stage.query_token).sum(dim=1) == SIZES.queries).all()
    named = batch["picture_mentions"][..., 0] > 0
    words = {*KINDS, *(k + ("es" if k.endswith("s") else "s") for k in KINDS), *COLOURS, "object", "objects"}
    spoken = {word for word, index in VOCABULARY.ids.items() if index in batch["picture_ids"][named]}
    assert spoken and spoken <= words
    stage.zero_grad()
    loss, _ = stage(batch)
    loss.backward()
    assert stage.latent_queries.grad.abs().sum() > 0
    assert stage.backbone.model.visual.patch_embed.proj.weight.grad.abs().sum() > 0


def test_the_anchor_is_zero_at_its_start_and_grows_with_distance(stage, pool):
    torch.manual_seed(0)
    anchored = UnderstandingStage(build_backbone(CONFIG), VOCABULARY, SIZES.queries, anchor_weight=1.0)
    anchored.set_anchor(anchored.state_dict())
    batch = understanding_batches(pool, VOCABULARY, 2, 2, 0, SIZES.queries)(0)
    with torch.no_grad():
        assert anchored.prompt_loss(batch)[1]["anchor"] < 1e-10
        anchored.latent_queries.add_(0.5)
        assert anchored.prompt_loss(batch)[1]["anchor"] > 1e-4
    assert not any("anchor" in name for name in anchored.state_dict())


def small_dit():
    return NextDiT(
        NextDiTConfig(
            dim=32,
            layers=2,
            heads=2,
            kv_heads=2,
            in_channels=16,
            conditioning_dim=32,
            ffn_dim=48,
            time_dim=32,
        )
    )


def test_generation_loss_is_zero_for_the_true_velocity_and_not_for_a_wrong_one():
    features, conditioning = (
        np.random.default_rng(0).standard_normal((8, 64, n)).astype(np.float32) for n in (16, 32)
    )
    batch = generation.generation_batches(features, conditioning, 4, 0, 0.1)(0)
    stage = generation.GenerationStage(small_dit())

    class Oracle(torch.nn.Module):
        def __init__(self, factor):
            super().__init__()
            self.factor = factor

        def forward(self, grid, timestep, conditioning):
            velocity = (batch["noise"] - batch["clean"]).transpose(1, 2).unflatten(2, (8, 8))
            return self.factor * velocity

    for factor, expected in ((1.0, 0.0), (0.0, (batch["noise"] - batch["clean"]).square().mean().item())):
        stage.dit = Oracle(factor)
        assert stage(batch)[0].item() == pytest.approx(expected, abs=1e-6)


def test_bare_prompts_are_taught_zero_features():
    features = np.ones((8, 64, 16), np.float32)
    conditioning = np.ones((8, 64, 32), np.float32)
    bare = np.full((64, 32), 7.0, np.float32)
    batch = generation.generation_batches(features, conditioning, 64, 0, 0.1, bare=bare, bare_share=0.5)(0)
    is_bare = batch["conditioning"][:, 0, 0] == 7
    assert 10 < is_bare.sum() < 54
    assert (batch["clean"][is_bare] == 0).all() and (batch["clean"][~is_bare] == 1).all()


def test_a_start_dit_learns_in_every_part():
    dit = small_dit()
    generation.initialise(dit)
    torch.nn.init.normal_(
        dit.norm_out.linear_2.weight, std=0.1
    )  # zero at the start: nothing behind it would learn yet
    features = np.random.default_rng(1).standard_normal((8, 64, 16)).astype(np.float32)
    conditioning = np.random.default_rng(2).standard_normal((8, 64, 32)).astype(np.float32)
    loss, _ = generation.GenerationStage(dit)(
        generation.generation_batches(features, conditioning, 4, 0, 0.0)(0)
    )
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in dit.parameters())


def test_the_decoder_stage_uses_the_schedule_of_its_scheduler(pool):
    """Noising as diffusers' scheduler does it, and the same velocity."""
    from comfyui_blip3o.pretraining.stages.decoder import SCHEDULER_CONFIG
    from diffusers import DDPMScheduler

    keys = ("beta_start", "beta_end", "beta_schedule", "num_train_timesteps", "prediction_type")
    scheduler = DDPMScheduler(**{key: SCHEDULER_CONFIG[key] for key in keys})
    unet = build_unet(tiny_unet_config(16, 4, (16, 16), (2, 2)))
    stage = DecoderStage(unet, 128, 0.0, 0.0)
    rng = np.random.default_rng(0)
    features, latents = (
        rng.standard_normal(shape).astype(np.float32) for shape in ((6, 64, 16), (6, 4, 16, 16))
    )
    batch = decoder_batches(features, latents, 4, 0, 0.0)(0)
    seen = {}

    class Spy(torch.nn.Module):
        def forward(self, noisy, timestep, **conditions):
            seen.update(noisy=noisy, **conditions)
            return type("Output", (), {"sample": torch.zeros_like(noisy)})

    stage.unet = Spy()
    loss, _ = stage(batch)
    expected = scheduler.add_noise(batch["latents"], batch["noise"], batch["timestep"])
    torch.testing.assert_close(seen["noisy"], expected, rtol=1e-4, atol=1e-5)
    velocity = scheduler.get_velocity(batch["latents"], batch["noise"], batch["timestep"])
    assert loss.item() == pytest.approx(velocity.square().mean().item(), rel=1e-4)
    assert seen["added_cond_kwargs"]["time_ids"][0].tolist() == [1024, 1024, 0, 0, 128, 128]


def test_vae_batches_switch_to_whole_pictures_and_the_stage_trains(pool):
    batch_of = vae_batches(pool, 4, 0, 64, 4, full_from=1)
    assert batch_of(0)["pixels"].shape == (4, 3, 64, 64)
    assert batch_of(1)["pixels"].shape == (1, 3, 128, 128)
    vae = build_vae(
        {
            "down_block_types": ["DownEncoderBlock2D"] * 4,
            "up_block_types": ["UpDecoderBlock2D"] * 4,
            "block_out_channels": [8, 8, 8, 8],
            "latent_channels": 4,
            "norm_num_groups": 4,
        }
    )
    loss, numbers = VaeStage(vae, 1e-4, 0.5)(batch_of(0))
    loss.backward()
    assert numbers["anchor"] > 0 and vae.encoder.conv_in.weight.grad.abs().sum() > 0
