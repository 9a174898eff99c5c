"""What rows share is computed once, and every number stays what it is without that."""

from pathlib import Path

import pytest
import tiny_models
import torch
from comfyui_blip3o.blip3o_core.language import answers as understanding
from comfyui_blip3o.blip3o_core.language import prefixes
from comfyui_blip3o.blip3o_core.language.answers import AnswerSettings, Turn
from comfyui_blip3o.blip3o_core.language.prefixes import cached_layers, common_length, move_cache, split_row
from comfyui_blip3o.blip3o_core.language.rows import EncodedRow
from comfyui_blip3o.blip3o_core.pipeline import Blip3oPipeline, load_pipeline
from transformers import DynamicCache

PAD, MERGE = 9, 2
SHORT = AnswerSettings(max_new_tokens=6)
ONE, TWO = (tiny_models.picture(80, 60, seed=seed) for seed in (1, 2))
PROMPTS = ["a red circle", "a cute cat left of two yellow dogs", "a photo of grass"]


class Counter:
    """Counts the backbone's calls, the tokens it reads and the images its vision tower sees."""

    def __init__(self, pipeline: Blip3oPipeline) -> None:
        self.calls = self.tokens = self.images = 0
        self.handles = [
            pipeline.backbone.visual.register_forward_hook(self._see),
            pipeline.backbone.text.register_forward_hook(self._read, with_kwargs=True),
        ]

    def _see(self, module: torch.nn.Module, inputs: tuple, output: object) -> None:
        self.images += len(inputs[1])

    def _read(self, module: torch.nn.Module, inputs: tuple, options: dict, output: object) -> None:
        self.calls += 1
        self.tokens += options["inputs_embeds"].shape[:2].numel()


@pytest.fixture
def own_pipeline(tiny_folder: Path) -> Blip3oPipeline:
    return load_pipeline(tiny_folder, dtype="fp32", device="cpu")


@pytest.fixture
def counter(own_pipeline: Blip3oPipeline) -> Counter:
    return Counter(own_pipeline)


def picture_row(*tokens: int, patches: torch.Tensor | None = None) -> EncodedRow:
    """A row whose image takes four tokens."""
    shown = torch.ones(16, 3) if patches is None else patches
    return EncodedRow(list(tokens), [shown], [(1, 4, 4)])


def test_a_row_is_split_beside_its_image() -> None:
    row = picture_row(1, PAD, PAD, PAD, PAD, 2)
    before, after = split_row(row, 1, PAD, MERGE)
    assert (before.token_ids, len(before.patches), len(after.patches)) == ([1], 0, 1)
    before, after = split_row(row, 5, PAD, MERGE)
    assert (after.token_ids, len(before.patches), len(after.patches)) == ([2], 1, 0)
    with pytest.raises(AssertionError, match="inside an image"):
        split_row(row, 3, PAD, MERGE)


def test_rows_share_an_image_only_when_it_is_the_same() -> None:
    row = picture_row(1, PAD, PAD, PAD, PAD, 2, 3)
    same = picture_row(1, PAD, PAD, PAD, PAD, 2, 4)
    other = picture_row(1, PAD, PAD, PAD, PAD, 2, 3, patches=torch.zeros(16, 3))
    cut = EncodedRow([1, PAD, PAD], [], [])
    assert common_length(row, same, PAD, MERGE) == 6
    assert common_length(row, other, PAD, MERGE) == 1
    assert common_length(row, cut, PAD, MERGE) == 3


@pytest.mark.parametrize("has_picture", [False, True])
def test_prompts_of_a_batch_share_their_beginning(
    own_pipeline: Blip3oPipeline, has_picture: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = [[ONE]] * 3 if has_picture else None
    monkeypatch.setattr(prefixes, "WORTHWHILE_TOKENS", 10**9)
    plain_counter = Counter(own_pipeline)
    plain = own_pipeline.encode_prompts(PROMPTS, images)
    monkeypatch.setattr(prefixes, "WORTHWHILE_TOKENS", 1)
    counter = Counter(own_pipeline)
    ours = own_pipeline.encode_prompts(PROMPTS, images)
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)
    assert counter.calls == 2
    assert counter.tokens < plain_counter.tokens - counter.tokens
    alone = torch.cat([own_pipeline.encode_prompts(prompt, images and [[ONE]]) for prompt in PROMPTS])
    torch.testing.assert_close(ours, alone, rtol=1e-5, atol=1e-5)


def test_choices_share_the_question(own_pipeline: Blip3oPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    question = ("What is this ?", ["red", "a blue square", "two dogs"], [ONE])
    monkeypatch.setattr(prefixes, "WORTHWHILE_TOKENS", 10**9)
    plain = own_pipeline.choose(*question)
    monkeypatch.setattr(prefixes, "WORTHWHILE_TOKENS", 1)
    counter = Counter(own_pipeline)
    ours = own_pipeline.choose(*question)
    assert ours == pytest.approx(plain, abs=1e-5)
    assert (counter.calls, counter.images) == (2, 1)
    assert own_pipeline.choose(question[0], question[1], [TWO]) != pytest.approx(plain, abs=1e-5)


def test_an_image_in_several_rows_is_looked_at_once(
    own_pipeline: Blip3oPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefixes, "WORTHWHILE_TOKENS", 10**9)
    counter = Counter(own_pipeline)
    own_pipeline.choose("What is this ?", ["red", "blue"], [ONE, TWO])
    assert (counter.calls, counter.images) == (1, 2)


def chat(pipeline: Blip3oPipeline, *turns: Turn, **options: object) -> str:
    return pipeline.chat([list(turns)], settings=SHORT, **options)[0]


def test_the_next_turn_of_a_chat_computes_only_what_is_new(
    own_pipeline: Blip3oPipeline, counter: Counter, tiny_folder: Path
) -> None:
    first = Turn("user", "What is this ?", (ONE,))
    answer = chat(own_pipeline, first)
    assert counter.images == 1
    read = counter.tokens
    turns = (first, Turn("assistant", answer), Turn("user", "What color is this ?"))
    second = chat(own_pipeline, *turns)
    assert counter.images == 1
    fresh = load_pipeline(tiny_folder, dtype="fp32", device="cpu")
    fresh_counter = Counter(fresh)
    assert second == chat(fresh, *turns)
    assert counter.tokens - read < fresh_counter.tokens / 2
    with_another = (*turns, Turn("assistant", second), Turn("user", "and this ?", (TWO,)))
    assert chat(own_pipeline, *with_another) == chat(fresh, *with_another)
    assert counter.images == 2


def test_with_offload_a_chat_waits_in_main_memory(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    places: list[str] = []
    original = prefixes.move_cache

    def move(cache: DynamicCache, device: torch.device) -> None:
        places.append(device.type)
        original(cache, torch.device("cpu"))

    monkeypatch.setattr(prefixes, "move_cache", move)
    pipeline = load_pipeline(tiny_folder, dtype="fp32", device="cpu", offload=True)
    counter = Counter(pipeline)
    first = Turn("user", "What is this ?", (ONE,))
    turns = (first, Turn("assistant", chat(pipeline, first)), Turn("user", "What color is this ?"))
    assert places == ["cpu"]
    second = chat(pipeline, *turns)
    assert places == ["cpu", "cpu", "cpu"]
    assert counter.images == 1
    assert second == chat(load_pipeline(tiny_folder, dtype="fp32", device="cpu"), *turns)


def test_a_cache_moves_with_all_its_keys_and_values(own_pipeline: Blip3oPipeline) -> None:
    cache = DynamicCache()
    embeddings = own_pipeline.backbone.embed(torch.tensor([[1, 2, 3]]))
    own_pipeline.backbone(embeddings, torch.arange(3).expand(3, 1, -1), None, cache)
    move_cache(cache, torch.device("meta"))
    layers = cached_layers(cache)
    assert len(layers) == len(own_pipeline.backbone.text.layers)
    assert {tensor.device.type for pair in layers for tensor in pair} == {"meta"}
    assert cache.get_seq_length() == 3


def test_kept_states_are_those_of_a_fresh_chat(
    own_pipeline: Blip3oPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits rather than words: a toy model says the same to many questions."""
    seen: list[torch.Tensor] = []

    def spy(settings: AnswerSettings, prompts: list[list[int]]):
        def choose(logits: torch.Tensor, answers: list[list[int]]) -> torch.Tensor:
            seen.append(logits)
            return logits.argmax(dim=-1)

        return choose

    monkeypatch.setattr(understanding, "_token_chooser", spy)
    first = Turn("user", "What is this ?", (ONE,))
    turns = (first, Turn("assistant", chat(own_pipeline, first)), Turn("user", "Describe this ."))
    seen.clear()
    chat(own_pipeline, *turns)
    kept = torch.cat(seen)
    own_pipeline._kept_chat = None
    seen.clear()
    chat(own_pipeline, *turns)
    torch.testing.assert_close(kept, torch.cat(seen), rtol=1e-4, atol=1e-4)
    seen.clear()
    chat(own_pipeline, Turn("user", "What is this ?", (TWO,)))
    assert (seen[0] - kept[0]).abs().max() > 1e-3


@pytest.mark.parametrize("change", ["weights", "picture", "system prompt", "unload"])
def test_nothing_stale_is_reused(own_pipeline: Blip3oPipeline, change: str) -> None:
    first = Turn("user", "What is this ?", (ONE,))
    chat(own_pipeline, first)
    options = {}
    if change == "weights":
        own_pipeline.backbone.text.layers[0].mlp.up_proj.weight.mul_(1.5)
    if change == "picture":
        first = Turn("user", "What is this ?", (TWO,))
    if change == "system prompt":
        options["system_prompt"] = "You are a cute cat"
    if change == "unload":
        own_pipeline.unload("backbone")
    counter = Counter(own_pipeline)
    chat(own_pipeline, first, **options)
    assert counter.images == 1


def test_an_interrupted_answer_leaves_nothing_behind(own_pipeline: Blip3oPipeline, counter: Counter) -> None:
    first = Turn("user", "What is this ?", (ONE,))
    chat(own_pipeline, first)

    def stop(row: int, text: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        chat(own_pipeline, first, on_text=stop)
    chat(own_pipeline, first)
    assert counter.images == 2
