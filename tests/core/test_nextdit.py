"""NextDiT against diffusers' LuminaNextDiT2DModel with the same random weights, and its shortcuts against the long way."""

from types import SimpleNamespace

import pytest
import tiny_models
import torch
from comfyui_blip3o.blip3o_core.config import NextDiTConfig
from comfyui_blip3o.blip3o_core.models.nextdit import NextDiT, rotary_table, timestep_frequencies
from diffusers import LuminaNextDiT2DModel
from diffusers.models.embeddings import PixArtAlphaTextProjection, get_2d_rotary_pos_embed_lumina
from originals import original_velocity
from torch import Tensor, nn

CHANNELS, CONDITIONING_DIM, TOKENS = 12, 20, 5
# dim, heads, kv_heads, layers, grid
SIZES = {
    "plain": (32, 4, 4, 2, (8, 8)),
    "grouped": (48, 6, 2, 3, (4, 4)),
    "one key head, wide grid": (32, 2, 1, 2, (3, 5)),
}


def build_pair(dim: int, heads: int, kv_heads: int, layers: int) -> tuple[NextDiT, nn.ModuleDict]:
    """Ours and the original with equal weights, handed over through a published state_dict."""
    original = nn.ModuleDict(
        {
            "caption_projection": PixArtAlphaTextProjection(CONDITIONING_DIM, dim),
            "transformer": LuminaNextDiT2DModel(
                patch_size=1,
                in_channels=CHANNELS,
                hidden_size=dim,
                num_layers=layers,
                num_attention_heads=heads,
                num_kv_heads=kv_heads,
                multiple_of=8,
                learn_sigma=False,
                cross_attention_dim=dim,
            ),
        }
    )
    tiny_models.randomise(original, seed=5)
    weights = {
        key.removeprefix("transformer."): tensor
        for key, tensor in original.state_dict().items()
        if key != "transformer.pad_token"  # the published network has none
    }
    ours = NextDiT(
        NextDiTConfig(
            dim=dim,
            layers=layers,
            heads=heads,
            kv_heads=kv_heads,
            in_channels=CHANNELS,
            conditioning_dim=CONDITIONING_DIM,
            ffn_dim=weights["layers.0.feed_forward.linear_1.weight"].shape[0],
            time_dim=dim,
        )
    )
    ours.load_state_dict(weights, strict=True)
    return ours.eval().requires_grad_(False), original.eval()


def inputs(grid: tuple[int, int], batch: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(11)
    return (
        torch.randn(batch, CHANNELS, *grid, generator=generator),
        torch.tensor([966.0, 333.0, 1.0, 1000.0][:batch]),
        torch.randn(batch, TOKENS, CONDITIONING_DIM, generator=generator),
    )


@pytest.mark.parametrize("name", SIZES)
def test_equals_diffusers(name: str) -> None:
    *sizes, grid = SIZES[name]
    ours, original = build_pair(*sizes)
    features, timestep, conditioning = inputs(grid)
    expected = original_velocity(original, features, timestep, conditioning)
    torch.testing.assert_close(ours(features, timestep, conditioning), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "key",
    [
        "caption_projection.linear_1.bias",
        "time_caption_embed.timestep_embedder.linear_2.weight",
        "time_caption_embed.caption_embedder.0.weight",
        "layers.1.gate",
        "layers.0.attn1.norm_k.bias",
        "layers.0.attn2.norm_q.weight",
        "layers.1.norm1_context.weight",
        "layers.1.ffn_norm2.weight",
        "norm_out.linear_1.bias",
    ],
)
def test_every_kind_of_weight_shows_in_the_velocity(key: str) -> None:
    ours, original = build_pair(32, 4, 2, 2)
    features, timestep, conditioning = inputs((4, 4))
    expected = original_velocity(original, features, timestep, conditioning)
    ours.state_dict()[key].add_(0.2)
    assert (ours(features, timestep, conditioning) - expected).abs().max() > 1e-4


@pytest.mark.parametrize("name", SIZES)
def test_the_cached_context_gives_the_same_velocity(name: str) -> None:
    *sizes, grid = SIZES[name]
    ours, _ = build_pair(*sizes)
    features, timestep, conditioning = inputs(grid)
    context = ours.encode_context(conditioning)
    for shift in (0, 1):
        moved = features + shift
        torch.testing.assert_close(
            ours(moved, timestep, context=context), ours(moved, timestep, conditioning), rtol=0, atol=0
        )


@pytest.mark.parametrize("name", SIZES)
def test_zero_rows_equal_a_conditioning_of_zeros(name: str) -> None:
    *sizes, grid = SIZES[name]
    ours, _ = build_pair(*sizes)
    features, timestep, conditioning = inputs(grid, batch=4)
    real = conditioning[:2]
    expected = ours(features, timestep, torch.cat([real, torch.zeros_like(real)]))
    shortened = ours(features, timestep, context=ours.encode_context(real, zero_rows=2))
    torch.testing.assert_close(shortened, expected, rtol=1e-5, atol=1e-5)
    # The two halves differ, so an exchange of them would show.
    assert (expected[:2] - ours(features, timestep, torch.zeros_like(conditioning))[:2]).abs().max() > 1e-3


def test_items_of_a_batch_do_not_mix() -> None:
    ours, _ = build_pair(32, 4, 2, 2)
    features, timestep, conditioning = inputs((4, 4))
    batch = ours(features, timestep, conditioning)
    for row in range(3):
        alone = ours(features[row : row + 1], timestep[row : row + 1], conditioning[row : row + 1])
        torch.testing.assert_close(batch[row : row + 1], alone, rtol=1e-5, atol=1e-5)


def test_a_longer_prompt_and_a_single_token_are_fine() -> None:
    ours, original = build_pair(32, 4, 2, 2)
    features, timestep, _ = inputs((4, 4))
    for tokens in (1, 33):
        conditioning = torch.randn(
            3, tokens, CONDITIONING_DIM, generator=torch.Generator().manual_seed(tokens)
        )
        expected = original_velocity(original, features, timestep, conditioning)
        torch.testing.assert_close(ours(features, timestep, conditioning), expected, rtol=1e-5, atol=1e-5)


def test_the_network_is_built_from_the_layers_it_is_given() -> None:
    class Linear(nn.Linear):
        pass

    ops = SimpleNamespace(Linear=Linear, LayerNorm=nn.LayerNorm, RMSNorm=nn.RMSNorm)
    dit = NextDiT(tiny_models.DEFAULT.dit, ops)
    assert not [
        name
        for name, module in dit.named_modules()
        if isinstance(module, nn.Linear) and type(module) is not Linear
    ]


def test_gradients_reach_every_weight() -> None:
    ours, _ = build_pair(32, 4, 2, 2)
    ours.requires_grad_(True)
    features, timestep, conditioning = inputs((4, 4))
    ours(features, timestep, conditioning).square().mean().backward()
    assert [name for name, parameter in ours.named_parameters() if not parameter.grad.abs().sum() > 0] == []


def test_the_rotary_table_is_the_one_of_diffusers() -> None:
    expected = get_2d_rotary_pos_embed_lumina(16, 3, 5).flatten(0, 1)
    ours = torch.view_as_complex(rotary_table(3, 5, 16, torch.device("cpu")))
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)


def test_timesteps_are_embedded_in_float32_with_cosines_first() -> None:
    embedded = timestep_frequencies(torch.tensor([0.0, 1000.0], dtype=torch.float16))
    assert embedded.dtype == torch.float32
    torch.testing.assert_close(embedded[0], torch.cat([torch.ones(128), torch.zeros(128)]))
    assert embedded[1, 0].item() == pytest.approx(torch.tensor(1000.0).double().cos().item(), abs=1e-4)


@pytest.mark.parametrize(
    "sizes", [{"dim": 30, "heads": 4}, {"dim": 24, "heads": 4}, {"dim": 32, "heads": 4, "kv_heads": 3}]
)
def test_sizes_that_cannot_be_are_refused(sizes: dict[str, int]) -> None:
    with pytest.raises(AssertionError):
        NextDiTConfig(**{"kv_heads": 4, **sizes})


def test_the_defaults_are_the_published_network() -> None:
    # Counted with diffusers 0.32: LuminaNextDiT2DModel of these sizes without pad_token, and the caption projection.
    with torch.device("meta"):
        dit = NextDiT(NextDiTConfig())
    assert sum(parameter.numel() for parameter in dit.parameters()) == 1_365_010_336
