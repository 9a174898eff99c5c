"""The published sizes on a pretended GPU: the memory plan's promises, and loops that never wait for the device."""

import pytest
import torch
from comfyui_blip3o.blip3o_core.checkpoints.layout import CheckpointFiles, open_checkpoint
from comfyui_blip3o.blip3o_core.checkpoints.memory_plan import (
    CONTEXT_BYTES,
    PROMPT_TOKENS,
    QUESTION_TOKENS,
    plan_memory,
)
from comfyui_blip3o.blip3o_core.drawing.decoding import PixelSettings, decode_features
from comfyui_blip3o.blip3o_core.drawing.sampling import (
    CachedDiT,
    FeatureSettings,
    PrepareRun,
    sample_features,
)
from comfyui_blip3o.blip3o_core.performance.fused_dit import PreparedRuns
from comfyui_blip3o.blip3o_core.units import GIB
from pretended_device import DEVICE, Watch, like_a_gpu
from published_shapes import published_networks, write_published_shapes
from torch import Tensor, nn
from transformers import DynamicCache

QUERIES, CONDITIONING, CHANNELS = 64, 3584, 1792


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> CheckpointFiles:
    return open_checkpoint(write_published_shapes(tmp_path_factory.mktemp("published") / "8B"))


@pytest.fixture
def networks() -> dict[str, nn.Module]:
    return published_networks()


def allowed(files: CheckpointFiles, use: str, phase: str, card: int = 48) -> int:
    """Bytes that the plan for a card of so many GiB allows a step of the work beside the weights."""
    plan = plan_memory(files, card * GIB, use)
    weights = {each.component: each.device_bytes for each in plan.placements}
    (peak,) = (each.peak_bytes for each in plan.phases if each.name == phase)
    return peak - CONTEXT_BYTES - (weights["decoder"] if plan.way.offload else sum(weights.values()))


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device=DEVICE)


def sample(dit: nn.Module, steps: int = 4, prepare: PrepareRun | None = None) -> Watch:
    watch = Watch(dit)
    with like_a_gpu(), watch:
        sample_features(
            *(dit, empty(1, QUERIES, CONDITIONING)),
            noise=empty(1, CHANNELS, 8, 8, dtype=torch.float32),
            settings=FeatureSettings(steps=steps),
            prepare=prepare or PreparedRuns(),
        )
    return watch


def test_sampling_never_waits_and_stays_within_the_plan(
    published: CheckpointFiles, networks: dict[str, nn.Module]
) -> None:
    watch = sample(networks["dit"])
    assert watch.weights == pytest.approx(2.73e9, rel=0.01)
    room = allowed(published, "draw", "sampling features")
    assert 0.2 * room < watch.working_bytes < room


def test_joined_projections_leave_no_second_copy(networks: dict[str, nn.Module]) -> None:
    watch = sample(networks["dit"])
    kept = sum(parameter.nbytes for parameter in networks["dit"].parameters())
    assert watch.bytes == pytest.approx(kept, rel=0.001)


def test_a_prepared_step_launches_less_than_the_network(networks: dict[str, nn.Module]) -> None:
    def launches(prepare: PrepareRun) -> int:
        fewer, more = (sample(networks["dit"], steps, prepare).operations for steps in (2, 3))
        return more - fewer

    sample(networks["dit"])  # joins weights, which are then left as they are
    assert 24 * 10 < launches(PreparedRuns()) < 0.75 * launches(CachedDiT)


@pytest.mark.parametrize("is_tiled", [False, True])
def test_painting_never_waits_and_stays_within_the_plan(
    published: CheckpointFiles, networks: dict[str, nn.Module], is_tiled: bool
) -> None:
    decoder = networks["decoder"].to(memory_format=torch.channels_last)
    watch = Watch(decoder)
    timesteps: list[Tensor] = []
    decoder.unet.register_forward_pre_hook(lambda unet, inputs: timesteps.append(inputs[1]))
    with like_a_gpu(), watch:
        decode_features(
            *(decoder, empty(1, QUERIES, CHANNELS)),
            noise=empty(1, 4, 128, 128, dtype=torch.float32),
            settings=PixelSettings(steps=3, sampler="dpmpp_2m", tiled=is_tiled),
        )
    assert {timestep.device for timestep in timesteps} == {DEVICE}  # from the CPU, each would be waited for
    assert watch.weights == pytest.approx(5.22e9, rel=0.01)
    room = allowed(published, "draw", "painting", 6 if is_tiled else 48)
    assert 0.5 * room < watch.working_bytes < room


@pytest.mark.parametrize(
    ("use", "phase", "tokens"),
    [("draw", "reading the prompt", PROMPT_TOKENS), ("answer", "answering", QUESTION_TOKENS)],
)
def test_reading_stays_within_the_plan(
    published: CheckpointFiles, networks: dict[str, nn.Module], use: str, phase: str, tokens: int
) -> None:
    backbone = networks["backbone"]
    cache = DynamicCache() if use == "answer" else None
    watch = Watch(backbone)
    with like_a_gpu(), watch:
        positions = torch.empty(3, 1, tokens, dtype=torch.long, device=DEVICE)
        hidden_states = backbone(empty(1, tokens, CONDITIONING), positions, None, cache)
        backbone.lm_head(hidden_states[:, -1]).float()
    assert watch.weights == pytest.approx(16.58e9, rel=0.01)
    room = allowed(published, use, phase)
    assert 0.3 * room < watch.working_bytes < room
