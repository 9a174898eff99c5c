"""The decoder's loop against a plain loop written with diffusers alone."""

from collections.abc import Callable

import pytest
import tiny_models
import torch
from comfyui_blip3o.blip3o_core.drawing.decoding import (
    PIXEL_SAMPLERS,
    PixelSettings,
    PixelStart,
    decode_features,
    denoise_latents,
    picture_size,
)
from comfyui_blip3o.blip3o_core.errors import BadInputError
from comfyui_blip3o.blip3o_core.models.decoder import Decoder
from originals import plain_loop
from torch import Tensor

CHANNELS, TOKENS = 16, 16


@pytest.fixture(scope="module", params=["default", "deep"])
def decoder(request: pytest.FixtureRequest) -> Decoder:
    """A two-level epsilon decoder and a three-level one that predicts v."""
    return tiny_models.build_decoder(tiny_models.VARIANTS[request.param])


@pytest.fixture(scope="module")
def small_decoder() -> Decoder:
    return tiny_models.build_decoder()


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def size_of(decoder: Decoder, settings: PixelSettings) -> tuple[int, int]:
    return picture_size(decoder.unet.config, decoder.vae.config, settings)


def features(batch: int = 2, seed: int = 1) -> Tensor:
    return random(batch, TOKENS, CHANNELS, seed=seed)


def assert_same(ours: Tensor, expected: Tensor) -> None:
    scale = expected.std().item()
    assert (ours - expected).abs().max().item() <= 2e-4 * scale
    assert scale > 0.1


@pytest.mark.parametrize("sampler", PIXEL_SAMPLERS)
@pytest.mark.parametrize("steps", [1, 7])
def test_equals_a_plain_loop(decoder: Decoder, sampler: str, steps: int) -> None:
    noise, negative = random(2, 4, 8, 8), features(1, seed=2)
    ours = denoise_latents(
        decoder,
        features(),
        noise=noise,
        settings=PixelSettings(steps=steps, sampler=sampler, guidance_scale=2.5),
        negative_features=negative,
    )
    assert_same(
        ours,
        plain_loop(
            decoder.unet,
            decoder.scheduler_config,
            decoder.vae_scale,
            sampler,
            steps,
            2.5,
            features(),
            negative,
            noise,
        ),
    )


@pytest.mark.parametrize("sampler", PIXEL_SAMPLERS)
def test_a_start_picture_equals_a_plain_loop_from_there(decoder: Decoder, sampler: str) -> None:
    noise, start = random(2, 4, 8, 8), random(2, 4, 8, 8, seed=5)
    ours = denoise_latents(
        decoder,
        features(),
        noise=noise,
        settings=PixelSettings(steps=8, sampler=sampler, guidance_scale=2.0),
        start=PixelStart(start, 0.5),
    )
    zeros = torch.zeros_like(features())
    assert_same(
        ours,
        plain_loop(
            decoder.unet,
            decoder.scheduler_config,
            decoder.vae_scale,
            sampler,
            8,
            2.0,
            features(),
            zeros,
            noise,
            start,
            skipped=4,
        ),
    )


def test_published_schedule_numbers() -> None:
    """Section 4.4: leading spacing with offset 1; initial scale sqrt(sigma_max^2 + 1)."""
    scheduler = tiny_models.build_decoder().scheduler("euler")
    scheduler.set_timesteps(12)
    assert scheduler.timesteps.tolist() == [914, 831, 748, 665, 582, 499, 416, 333, 250, 167, 84, 1]
    assert float(scheduler.init_noise_sigma) == pytest.approx(9.047176361083984, rel=1e-6)


def test_the_condition_is_the_mean_token_and_the_published_sizes(small_decoder: Decoder) -> None:
    tokens = features()
    condition = small_decoder.condition(tokens, 48, 80)
    added = condition["added_cond_kwargs"]
    assert torch.equal(condition["encoder_hidden_states"], tokens)
    torch.testing.assert_close(added["text_embeds"], tokens.mean(dim=1))
    assert added["time_ids"].tolist() == [[1024, 1024, 0, 0, 48, 80]] * 2


# Guidance


def count_calls(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    sizes: list[int] = []
    real = type(decoder.unet).forward

    def forward(self: object, sample: Tensor, *arguments: object, **options: object) -> object:
        sizes.append(sample.shape[0])
        return real(self, sample, *arguments, **options)

    monkeypatch.setattr(type(decoder.unet), "forward", forward)
    return sizes


def test_guidance_of_one_skips_the_negative_pass(
    small_decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = count_calls(small_decoder, monkeypatch)
    noise = random(2, 4, 8, 8)
    plain = denoise_latents(
        small_decoder,
        features(),
        noise=noise,
        settings=PixelSettings(steps=3, guidance_scale=1.0),
        negative_features=features(1, 9),
    )
    assert sizes == [2] * 3
    guided = denoise_latents(small_decoder, features(), noise=noise, settings=PixelSettings(steps=3))
    assert sizes[3:] == [4] * 3
    assert (plain - guided).abs().max() > 1e-3


def test_guidance_acts_in_its_part_of_the_run_only(
    small_decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = count_calls(small_decoder, monkeypatch)
    settings = PixelSettings(steps=5, guidance_interval=(0.35, 0.85))
    denoise_latents(small_decoder, features(), noise=random(2, 4, 8, 8), settings=settings)
    assert sizes == [2, 4, 4, 4, 2]  # positions 1, 0.8, 0.6, 0.4, 0.2


def test_negative_features_steer_away(small_decoder: Decoder) -> None:
    noise = random(2, 4, 8, 8)
    settings = PixelSettings(steps=3)

    def run(negative: Tensor | None) -> Tensor:
        return denoise_latents(
            small_decoder, features(), noise=noise, settings=settings, negative_features=negative
        )

    torch.testing.assert_close(run(torch.zeros(1, TOKENS, CHANNELS)), run(None))
    assert (run(features(1, 9)) - run(None)).abs().max() > 1e-3
    # Steering away from the same features is no guidance at all.
    plain = denoise_latents(
        small_decoder, features(), noise=noise, settings=PixelSettings(steps=3, guidance_scale=1.0)
    )
    torch.testing.assert_close(run(features()), plain, rtol=1e-3, atol=1e-4)


# Batches, starts, callbacks


@pytest.mark.parametrize("sampler", PIXEL_SAMPLERS)
def test_a_batch_equals_its_items_alone(decoder: Decoder, sampler: str) -> None:
    noise, settings = random(3, 4, 8, 8), PixelSettings(steps=4, sampler=sampler)
    batch = decode_features(decoder, features(3), noise=noise, settings=settings)
    for row in range(3):
        part = slice(row, row + 1)
        alone = decode_features(decoder, features(3)[part], noise=noise[part], settings=settings)
        torch.testing.assert_close(batch[part], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sampler", PIXEL_SAMPLERS)
def test_strength_of_zero_keeps_the_start(small_decoder: Decoder, sampler: str) -> None:
    start = random(1, 4, 8, 8, seed=5)
    settings = PixelSettings(steps=5, sampler=sampler)
    kept = denoise_latents(
        small_decoder,
        features(),
        noise=random(2, 4, 8, 8),
        settings=settings,
        start=PixelStart(start, 0.0),
    )
    assert torch.equal(kept, start.expand(2, -1, -1, -1))


@pytest.mark.parametrize("sampler", PIXEL_SAMPLERS)
def test_a_weaker_run_stays_nearer_to_the_start(small_decoder: Decoder, sampler: str) -> None:
    start = random(2, 4, 8, 8, seed=5)

    def distance(strength: float) -> float:
        settings = PixelSettings(steps=10, sampler=sampler, guidance_scale=1.0)
        result = denoise_latents(
            small_decoder,
            features(),
            noise=random(2, 4, 8, 8),
            settings=settings,
            start=PixelStart(start, strength),
        )
        return (result - start).square().mean().item()

    assert distance(0.1) < distance(0.4) < distance(0.9)


@pytest.mark.parametrize("sampler", PIXEL_SAMPLERS)
def test_the_last_predicted_latents_are_the_result(decoder: Decoder, sampler: str) -> None:
    seen: list[tuple[int, int, Tensor]] = []
    result = denoise_latents(
        decoder,
        features(),
        noise=random(2, 4, 8, 8),
        settings=PixelSettings(steps=6, sampler=sampler),
        on_step=lambda *arguments: seen.append(arguments),
    )
    assert [(step, total) for step, total, _ in seen] == [(step, 6) for step in range(1, 7)]
    torch.testing.assert_close(seen[-1][2], result, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("sampler", PIXEL_SAMPLERS)
def test_predicted_latents_of_a_perfect_network_are_the_picture(
    sampler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A network that knows the clean latents must be reported as predicting them at every step."""
    for prediction in ("epsilon", "v_prediction"):
        decoder = tiny_models.build_decoder(
            tiny_models.TinySizes(prediction_type=prediction, unet_widths=(16, 32))
        )
        clean = random(1, 4, 8, 8, seed=7)
        alphas = decoder.scheduler(sampler).alphas_cumprod

        def perfect(
            sample: Tensor, timestep: Tensor, *_: object, _kind: str = prediction, **__: object
        ) -> object:
            alpha = alphas[int(timestep)]  # noqa: B023
            noise = (sample - alpha.sqrt() * clean) / (1 - alpha).sqrt()  # noqa: B023
            value = noise if _kind == "epsilon" else alpha.sqrt() * noise - (1 - alpha).sqrt() * clean  # noqa: B023
            return type("Output", (), {"sample": value})

        monkeypatch.setattr(decoder.unet, "forward", perfect)
        seen: list[Tensor] = []
        result = denoise_latents(
            decoder,
            features(1),
            noise=random(1, 4, 8, 8),
            settings=PixelSettings(steps=6, sampler=sampler, guidance_scale=1.0),
            on_step=lambda _, __, predicted: seen.append(predicted),  # noqa: B023
        )
        for predicted in [*seen, result]:
            torch.testing.assert_close(predicted, clean, rtol=1e-3, atol=1e-3)


def test_an_error_in_the_callback_stops_the_run(
    small_decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = count_calls(small_decoder, monkeypatch)

    def on_step(step: int, *_: object) -> None:
        if step == 2:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        denoise_latents(small_decoder, features(), noise=random(2, 4, 8, 8), on_step=on_step)
    assert len(sizes) == 2


# Sizes and the VAE


@pytest.mark.parametrize(("height", "width"), [(32, 32), (40, 24), (56, 8), (8, 8)])
def test_any_multiple_of_the_vae_factor_can_be_drawn(decoder: Decoder, height: int, width: int) -> None:
    settings = PixelSettings(steps=2, width=width, height=height)
    assert size_of(decoder, settings) == (height, width)
    latent = random(1, 4, height // decoder.vae_scale, width // decoder.vae_scale)
    drawn = decode_features(decoder, features(1), noise=latent, settings=settings)
    assert drawn.shape == (1, 3, height, width)
    assert drawn.min() >= 0
    assert drawn.max() <= 1


def test_the_default_size_is_the_one_the_unet_was_trained_at(decoder: Decoder) -> None:
    side = decoder.unet.config.sample_size * decoder.vae_scale
    assert size_of(decoder, PixelSettings()) == (side, side)
    assert size_of(decoder, PixelSettings(width=2 * side)) == (side, 2 * side)


@pytest.mark.parametrize(
    ("size", "fragment"),
    [
        ({"width": 37}, "width is 37.*multiples of 2.*36 or 38"),
        ({"height": 1}, "height is 1.*Use 2 or 4"),
        ({"width": -8}, "width is -8"),
    ],
)
def test_other_sizes_are_refused(small_decoder: Decoder, size: dict[str, int], fragment: str) -> None:
    with pytest.raises(BadInputError, match=fragment):
        size_of(small_decoder, PixelSettings(**size))


def test_the_published_decoder_draws_multiples_of_eight() -> None:
    sizes = tiny_models.TinySizes(vae_widths=(4, 4, 4, 4), sample_size=128)
    decoder = tiny_models.build_decoder(sizes)
    assert size_of(decoder, PixelSettings()) == (1024, 1024)
    with pytest.raises(BadInputError, match="width is 1020.*multiples of 8 pixels. Use 1016 or 1024"):
        size_of(decoder, PixelSettings(width=1020))


def test_tiled_decoding_equals_untiled(small_decoder: Decoder) -> None:
    vae = small_decoder.vae
    latents = 0.2 * random(1, 4, 24, 40)
    whole = small_decoder.decode_latents(latents)
    before = vae.tile_sample_min_size, vae.tile_latent_min_size
    # Tiles overlap by a quarter and blend; each sees only its part, so the two agree roughly, not exactly.
    vae.tile_sample_min_size, vae.tile_latent_min_size = 32, 16
    try:
        calls = []
        real = vae.decoder.forward
        vae.decoder.forward = lambda *arguments, **options: calls.append(1) or real(*arguments, **options)
        tiled = small_decoder.decode_latents(latents, tiled=True)
    finally:
        vae.decoder.forward = real
        vae.tile_sample_min_size, vae.tile_latent_min_size = before
    assert len(calls) > 2
    assert tiled.shape == whole.shape
    assert (tiled - whole).abs().mean() < 0.25 * whole.std()
    assert not vae.use_tiling


def test_latents_of_a_picture_are_the_scaled_mean(small_decoder: Decoder) -> None:
    pixels = random(2, 3, 16, 16).clamp(-1, 1)
    expected = small_decoder.vae.encode(pixels).latent_dist.mean * 0.5
    torch.testing.assert_close(small_decoder.encode_latents(pixels), expected)


def test_pixels_come_from_the_unscaled_latents(small_decoder: Decoder) -> None:
    latents = 0.1 * random(1, 4, 8, 8)
    expected = (small_decoder.vae.decode(latents / 0.5).sample / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(small_decoder.decode_latents(latents), expected)


@pytest.mark.parametrize(
    ("fields", "fragment"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"guidance_scale": -2.0}, "guidance_scale is -2"),
        ({"sampler": "ddim"}, '"ddim"; choose one of euler, dpmpp_2m'),
        ({"guidance_interval": (0.5, 1.5)}, "guidance_interval is 0.5 to 1.5"),
    ],
)
def test_impossible_settings_are_refused(fields: dict[str, object], fragment: str) -> None:
    with pytest.raises(BadInputError, match=fragment):
        PixelSettings(**fields)


def test_a_strength_beyond_one_is_refused(small_decoder: Decoder) -> None:
    run: Callable[[], Tensor] = lambda: denoise_latents(  # noqa: E731
        small_decoder,
        features(1),
        noise=random(1, 4, 8, 8),
        start=PixelStart(random(1, 4, 8, 8), -0.1),
    )
    with pytest.raises(BadInputError, match="strength is -0.1"):
        run()
