"""Stage c: the backbone, Qwen2.5-VL in miniature, learns captions, questions and what prompts mean; then stays frozen.

Letters: B rows, L tokens, C hidden width, T = 64 cells, V vocabulary.

Every row is one shared beginning (a picture, or a prompt to draw) followed by several branches that see the beginning
but not each other: one forward pass answers six questions about a picture. Three kinds of branch:
- an answer in words, as the published chat templates ask for it;
- the full description of the scene that a prompt to draw asks for;
- the latent queries behind `[IMG]`, which say cell by cell what the picture would show, so that the hidden states at
  the queries already mean something when the DiT begins to read them.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...blip3o_core.images import CLIP_MEAN, CLIP_STD
from ...blip3o_core.language.prompts import IMAGE_PAD, VISION_END, Message, chat_text, generation_text
from ..trainer import Batch
from ..world.captions import (
    Question,
    canonical_caption,
    caption_is_held_out,
    describe_question,
    draw_caption_and_request,
    draw_questions,
    match_question,
)
from ..world.pool import ScenePool, rows_of_step
from ..world.scenes import COLOURS, KINDS, Scenes, place
from ..world.vocabulary import WordIds
from .encoder import CODE_SLICES, CODE_WIDTH, GRID, owners, semantic_code

PATCH = 16
MERGE = 2
PICTURE_TOKENS = (GRID // MERGE) ** 2
# A chat with one picture and no words, cut where the picture's tokens and where the question go.
BEFORE_PICTURE, _REST = chat_text([Message("user", "", images=1)]).split(IMAGE_PAD)
ANSWER = _REST.removeprefix(VISION_END)
TYPE_WEIGHTS = {
    "describe": 2.0,
    "match": 1.5,
    "relation": 1.5,
    "where": 1.5,
    "exist": 1.5,
    "count": 1.3,
    "draw": 1.0,
}
OTHER_QUESTIONS = 4
MENTION_WIDTH = 15


@dataclass
class BackboneSizes:
    """Numbers of the miniature; `head_dim` is hidden / heads and mrope_section must sum to half of it."""

    hidden: int = 128
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    ffn: int = 384
    visual_hidden: int = 96
    visual_layers: int = 4
    visual_heads: int = 4
    visual_ffn: int = 256
    queries: int = 64


def backbone_config(sizes: BackboneSizes, vocabulary: WordIds, gen_vision: dict[str, Any]) -> dict[str, Any]:
    """config.json of the checkpoint, in the published flat layout.

    Args:
        gen_vision: the image encoder's `gen_vision_config`.
    """
    half = sizes.hidden // sizes.heads // 2
    time_part = half // 4
    space_part = (half - time_part) // 2
    ids = vocabulary.ids
    return {
        "architectures": ["blip3oQwenForCausalLM"],
        "model_type": "blip3o_qwen",
        "vocab_size": vocabulary.size,
        "hidden_size": sizes.hidden,
        "intermediate_size": sizes.ffn,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.kv_heads,
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "max_window_layers": sizes.layers,
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "rope_scaling": {
            "type": "default",
            "rope_type": "default",
            "mrope_section": [half - 2 * space_part, space_part, space_part],
        },
        "attention_dropout": 0.0,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "bos_token_id": ids["<|endoftext|>"],
        "pad_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
        "vision_token_id": ids["<|vision_pad|>"],
        "vision_config": {
            "model_type": "qwen2_5_vl",
            "depth": sizes.visual_layers,
            "hidden_size": sizes.visual_hidden,
            "num_heads": sizes.visual_heads,
            "intermediate_size": sizes.visual_ffn,
            "hidden_act": "silu",
            "in_channels": 3,
            "in_chans": 3,
            "patch_size": PATCH,
            "spatial_patch_size": PATCH,
            "spatial_merge_size": MERGE,
            "temporal_patch_size": 2,
            "tokens_per_second": 2,
            "window_size": PATCH * GRID,
            "fullatt_block_indexes": list(range(sizes.visual_layers)),
            "out_hidden_size": sizes.hidden,
        },
        "gen_vision_tower": "eva-clip-E-14-plus",
        "gen_pooling": "early_pool2d_1",
        "gen_hidden_size": gen_vision["width"],
        "gen_vision_config": gen_vision,
        "n_query": sizes.queries,
    }


def build_backbone(config: dict[str, Any]) -> nn.Module:
    """transformers' Qwen2.5-VL from the flat published config, freshly initialised."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    text_keys = (
        "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads hidden_act "
        "max_position_embeddings max_window_layers rms_norm_eps rope_theta rope_scaling attention_dropout "
        "use_sliding_window tie_word_embeddings bos_token_id pad_token_id eos_token_id"
    ).split()
    top_keys = (
        "image_token_id video_token_id vision_start_token_id vision_end_token_id tie_word_embeddings".split()
    )
    text = {key: config[key] for key in text_keys}
    vision = {key: value for key, value in config["vision_config"].items() if key != "model_type"}
    model = Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(text_config=text, vision_config=vision, **{key: config[key] for key in top_keys})
    )
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            scale = 0.5 if name.endswith(("o_proj", "down_proj")) else 1.0
            nn.init.normal_(module.weight, std=scale / math.sqrt(module.in_features))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.3)
    patch = model.model.visual.patch_embed.proj
    nn.init.normal_(patch.weight, std=1 / math.sqrt(patch.weight[0].numel()))
    return model


def encode_text(
    model: nn.Module, embeddings: Tensor, positions: Tensor, mask: Tensor, states: list[Tensor] | None = None
) -> Tensor:
    """The text model on ready embeddings, with any attention pattern; a batched twin of transformers' own forward.

    Args:
        embeddings: (B, L, C).
        positions: M-RoPE positions, (3, B, L).
        mask: True where row i may look at column j, (B, L, L).
        states: gets the hidden states after each layer.

    Returns:
        Hidden states after the final norm, (B, L, C).
    """
    text = model.model.language_model
    config = text.config
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    head_dim = config.hidden_size // heads
    cos, sin = _text_rotary(config, head_dim, positions)
    mask = mask[:, None]
    hidden_states = embeddings
    for layer in text.layers:
        attention = layer.self_attn
        normed = layer.input_layernorm(hidden_states)
        query = attention.q_proj(normed).unflatten(-1, (heads, head_dim)).transpose(1, 2)
        key = attention.k_proj(normed).unflatten(-1, (kv_heads, head_dim)).transpose(1, 2)
        value = attention.v_proj(normed).unflatten(-1, (kv_heads, head_dim)).transpose(1, 2)
        query, key = _rotate(query, cos, sin), _rotate(key, cos, sin)
        key, value = (t.repeat_interleave(heads // kv_heads, dim=1) for t in (key, value))
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        hidden_states = hidden_states + attention.o_proj(attended.transpose(1, 2).flatten(2))
        hidden_states = hidden_states + layer.mlp(layer.post_attention_layernorm(hidden_states))
        if states is not None:
            states.append(hidden_states)
    return text.norm(hidden_states)


def encode_picture(model: nn.Module, pixels: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The vision tower on CLIP-normalised pixels (B, 3, 128, 128), all windows being one.

    Returns:
        Merged tokens (B, 16, C), row major, and the hidden states of all blocks (B, T, c), row major.
    """
    visual = model.model.visual
    batch = len(pixels)
    patches = pixels.unflatten(3, (GRID, PATCH)).unflatten(2, (GRID, PATCH))  # (B, 3, g, p, g, p)
    patches = patches.permute(0, 2, 4, 1, 3, 5).reshape(batch, GRID * GRID, -1)
    # A still picture fills both frames of the temporal patch, so the two kernels add up.
    hidden_states = patches @ visual.patch_embed.proj.weight.sum(2).flatten(1).T
    heads = visual.blocks[0].attn.num_heads
    cos, sin = _picture_rotary(hidden_states.shape[-1] // heads, visual.config)
    states = []
    for block in visual.blocks:
        qkv = block.attn.qkv(block.norm1(hidden_states)).unflatten(-1, (3, heads, -1))
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(_rotate(query, cos, sin), _rotate(key, cos, sin), value)
        hidden_states = hidden_states + block.attn.proj(attended.transpose(1, 2).flatten(2))
        hidden_states = hidden_states + block.mlp(block.norm2(hidden_states))
        states.append(hidden_states)
    normed = visual.merger.ln_q(hidden_states)
    half = GRID // MERGE
    normed = (
        normed.reshape(batch, half, MERGE, half, MERGE, -1).transpose(2, 3).reshape(batch, half * half, -1)
    )
    return visual.merger.mlp(normed), states


class UnderstandingStage(nn.Module):
    """Backbone, latent queries and the heads that help it learn.

    Args:
        anchor_weight: above 0, hidden states at the queries stay where `set_anchor` found them, so that a DiT that
            already reads them need not be trained again while answers still improve.
    """

    def __init__(
        self, backbone: nn.Module, vocabulary: WordIds, queries: int, anchor_weight: float = 0.0
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.vocabulary = vocabulary
        hidden = backbone.model.language_model.config.hidden_size
        visual_hidden = backbone.model.visual.config.hidden_size
        self.latent_queries = nn.Parameter(0.3 * torch.randn(1, queries, hidden))
        self.visual_heads = nn.ModuleList([nn.Linear(visual_hidden, CODE_WIDTH) for _ in range(2)])
        self.merged_head = nn.Linear(hidden, MERGE**2 * CODE_WIDTH)
        self.layout_head = nn.Linear(hidden, CODE_WIDTH)
        self.mention_heads = nn.ModuleList(
            [nn.Sequential(nn.LayerNorm(hidden), nn.Linear(hidden, MENTION_WIDTH)) for _ in range(2)]
        )
        self.register_buffer(
            "kind_words", torch.tensor([vocabulary.ids[kind] for kind in KINDS]), persistent=False
        )
        self.register_buffer(
            "colour_words", torch.tensor([vocabulary.ids[c] for c in COLOURS]), persistent=False
        )
        self.anchor_weight = anchor_weight
        self._anchor: list[nn.Module] = []  # a list hides it from state_dict and parameters
        self.picture_token = vocabulary.ids["<|image_pad|>"]
        self.query_token = vocabulary.ids["[/IMG]"]
        self.register_buffer("mean", torch.tensor(CLIP_MEAN).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(CLIP_STD).view(1, 3, 1, 1))

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        picture_loss, numbers = self.picture_loss(batch)
        prompt_loss, more = self.prompt_loss(batch)
        return picture_loss + prompt_loss, {**numbers, **more}

    def picture_states(
        self, batch: Batch, text_states: list[Tensor] | None = None
    ) -> tuple[Tensor, list[Tensor], Tensor]:
        """Hidden states of the picture rows, of the vision tower's blocks, and the merged picture tokens."""
        merged, states = encode_picture(self.backbone, (batch["pixels"] - self.mean) / self.std)
        ids = batch["picture_ids"]
        embeddings = self.backbone.model.language_model.embed_tokens(ids)
        embeddings = embeddings.masked_scatter((ids == self.picture_token)[..., None], merged)
        positions = batch["picture_positions"].permute(1, 0, 2)
        mask = branch_mask(batch["picture_branch"])
        return encode_text(self.backbone, embeddings, positions, mask, text_states), states, merged

    def prompt_states(self, batch: Batch) -> Tensor:
        """Hidden states of the rows that hold a prompt to draw."""
        ids = batch["prompt_ids"]
        embeddings = self.backbone.model.language_model.embed_tokens(ids)
        queries = self.latent_queries.expand(len(ids), -1, -1)
        embeddings = embeddings.masked_scatter((ids == self.query_token)[..., None], queries)
        positions = batch["prompt_positions"].permute(1, 0, 2)
        return encode_text(self.backbone, embeddings, positions, branch_mask(batch["prompt_branch"]))

    def picture_loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        text_states: list[Tensor] = []
        hidden_states, states, merged = self.picture_states(batch, text_states)
        words = self._word_loss(hidden_states, batch["picture_targets"], batch["picture_weights"])
        code = batch["code"]
        helper = words.new_zeros(())
        for head, state in zip(self.visual_heads, (states[-3], states[-1]), strict=True):
            guess = head(state)
            helper = helper + 0.5 * (guess - code).square().mean() + 0.3 * _kind_loss(guess, batch["kind"])
        helper = helper + 0.5 * (self.merged_head(merged) - merge_cells(code)).square().mean()
        named = self._naming_loss(merged, batch)
        mentioned = sum(
            self._mention_loss(head(state), batch)
            for head, state in zip(self.mention_heads, text_states[-3:-1], strict=True)
        )
        loss = words + helper + 0.3 * named + 0.3 * mentioned
        return loss, {"answers": words, "visual": helper, "naming": named, "mentions": mentioned}

    def _mention_loss(self, guess: Tensor, batch: Batch) -> Tensor:
        """Words that name an object know, two layers before the end, whether it is there, what and where it is."""
        target = batch[
            "picture_mentions"
        ]  # (B, L, MENTION_WIDTH); the first is 0 = no mention, 1 = there, -1 = not
        mentioned = target[..., 0] != 0
        guess, target = guess[mentioned], target[mentioned]
        there = target[:, 0] > 0
        loss = F.binary_cross_entropy_with_logits(guess[:, 0], there.float())
        guess, target = guess[there], target[there]
        loss = (
            loss
            + F.cross_entropy(guess[:, 1:7], target[:, 1:7])
            + F.cross_entropy(guess[:, 7:13], target[:, 7:13])
        )
        return loss + 2 * (guess[:, 13:] - target[:, 13:]).square().mean()

    def _naming_loss(self, merged: Tensor, batch: Batch) -> Tensor:
        """Picture tokens lie near the embeddings of the words for what they show.

        Without it, finding the object a question names is learned thousands of steps later than describing the scene.
        """
        words = F.normalize(self.backbone.model.language_model.embed_tokens.weight, dim=-1)
        tokens = F.normalize(merged, dim=-1)
        loss = merged.new_zeros(())
        for ids, name in ((self.kind_words, "kind"), (self.colour_words, "colour")):
            label = merge_cells(batch[name][..., None]).amax(-1)  # -1 where no cell has an object
            there = label >= 0
            loss = loss + F.cross_entropy(12.0 * (tokens @ words[ids].T)[there], label[there])
        return loss

    def prompt_loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        hidden_states = self.prompt_states(batch)
        words = self._word_loss(hidden_states, batch["prompt_targets"], batch["prompt_weights"])
        guess = self.read_layout(hidden_states, batch)
        weight = batch["layout_weight"]
        anchor = words.new_zeros(())
        if self._anchor:
            with torch.no_grad():
                before = self._anchor[0].prompt_states(batch)
            anchor = self.at_queries(hidden_states - before, batch).square().mean()
        layout = ((guess - batch["layout"]).square() * weight).sum() / weight.sum()
        kind = _kind_loss(guess, batch["layout_kind"])
        loss = 0.5 * words + layout + 0.3 * kind + self.anchor_weight * anchor
        return loss, {"prompts": words, "layout": layout, "layout_kind": kind, "anchor": anchor}

    def set_anchor(self, state_dict: dict[str, Tensor]) -> None:
        """Hold the conditioning where these earlier weights of this stage put it."""
        frozen = copy.deepcopy(self)
        frozen.load_state_dict(state_dict)
        self._anchor = [frozen.eval().requires_grad_(False)]

    def read_layout(self, hidden_states: Tensor, batch: Batch) -> Tensor:
        """What the hidden states at the queries say per cell, (B, T, D)."""
        return self.layout_head(self.at_queries(hidden_states, batch))

    def at_queries(self, hidden_states: Tensor, batch: Batch) -> Tensor:
        """Hidden states of prompt rows at the latent queries, (B, Q, C): the conditioning."""
        there = (batch["prompt_ids"] == self.query_token)[..., None]
        return hidden_states.masked_select(there).view(len(hidden_states), -1, hidden_states.shape[-1])

    def _word_loss(self, hidden_states: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        learn = weights > 0
        logits = self.backbone.lm_head(hidden_states[learn])
        loss = F.cross_entropy(logits, targets[learn], reduction="none")
        return (loss * weights[learn]).sum() / weights.sum()


def branch_mask(branch: Tensor) -> Tensor:
    """Who sees whom, (B, L, L): the past of the own branch and of the beginning (0); padding is -1."""
    length = branch.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=branch.device).tril()
    own = (branch[:, :, None] == branch[:, None, :]) | (branch[:, None, :] == 0)
    return causal & own


def merge_cells(cells: Tensor) -> Tensor:
    """Values of cells (B, T, D) side by side as the vision tower merges them, (B, T / 4, 4 D)."""
    half = GRID // MERGE
    squares = cells.reshape(len(cells), half, MERGE, half, MERGE, -1).transpose(2, 3)
    return squares.reshape(len(cells), half * half, -1)


class Rows:
    """Collects token rows made of a beginning and branches, then pads them to tensors."""

    def __init__(self) -> None:
        self.rows: list[dict[str, list]] = []

    def begin(self, ids: list[int], positions: np.ndarray, next_position: int) -> None:
        """Start a row; `positions` are (3, l)."""
        self.start = next_position
        self.row = {"ids": list(ids), "positions": [positions], "branch": [0] * len(ids)}
        self.row.update(targets=[0] * len(ids), weights=[0.0] * len(ids), number=1, mentions=[])
        self.rows.append(self.row)

    def branch(
        self,
        asked: list[int],
        answer: list[int],
        weight: float,
        mentions: Sequence[tuple[int, np.ndarray]] = (),
    ) -> None:
        """Add a branch whose `answer` is to be learned with this total weight.

        Args:
            mentions: token ids in `asked` that name objects, in order, each with what to know there (MENTION_WIDTH,).
        """
        ids = asked + answer
        after = 0
        for token, known in mentions:
            after = asked.index(token, after) + 1
            self.row["mentions"].append((len(self.row["ids"]) + after - 1, known))
        positions = np.arange(self.start, self.start + len(ids))
        first = len(asked) - 1
        targets, weights = [0] * len(ids), [0.0] * len(ids)
        for k, token in enumerate(answer):
            targets[first + k], weights[first + k] = token, weight / len(answer)
        row = self.row
        row["ids"] += ids
        row["positions"].append(np.stack([positions] * 3))
        row["branch"] += [row["number"]] * len(ids)
        row["targets"] += targets
        row["weights"] += weights
        row["number"] += 1

    def tensors(self, prefix: str) -> Batch:
        """Padded on the right: ids, branch, targets, weights (B, L) and positions (B, 3, L)."""
        longest = max(len(row["ids"]) for row in self.rows)
        filled = {}
        for name, empty, kind in (
            ("ids", 0, np.int64),
            ("branch", -1, np.int64),
            ("targets", 0, np.int64),
            ("weights", 0, np.float32),
        ):
            array = np.full((len(self.rows), longest), empty, dtype=kind)
            for n, row in enumerate(self.rows):
                array[n, : len(row[name])] = row[name]
            filled[f"{prefix}_{name}"] = torch.from_numpy(array)
        positions = np.zeros((len(self.rows), 3, longest), dtype=np.int64)
        for n, row in enumerate(self.rows):
            joined = np.concatenate(row["positions"], axis=1)
            positions[n, :, : joined.shape[1]] = joined
        filled[f"{prefix}_positions"] = torch.from_numpy(positions)
        known = np.zeros((len(self.rows), longest, MENTION_WIDTH), dtype=np.float32)
        for n, row in enumerate(self.rows):
            for column, values in row["mentions"]:
                known[n, column] = values
        filled[f"{prefix}_mentions"] = torch.from_numpy(known)
        return filled


def picture_start(vocabulary: WordIds) -> tuple[list[int], np.ndarray, int]:
    """Chat beginning with a picture: ids, their M-RoPE positions (3, l), and the next free position."""
    before = vocabulary(BEFORE_PICTURE)
    ids = before + [vocabulary.ids["<|image_pad|>"]] * PICTURE_TOKENS + [vocabulary.ids[VISION_END]]
    start, side = len(before), GRID // MERGE
    grid = np.stack(
        [np.zeros(PICTURE_TOKENS), np.repeat(np.arange(side), side), np.tile(np.arange(side), side)]
    ).astype(int)
    positions = np.concatenate(
        [np.stack([np.arange(start)] * 3), start + grid, np.full((3, 1), start + side)], axis=1
    )
    return ids, positions, start + side + 1


def question_rows(vocabulary: WordIds, questions: list[list[Question]], scenes: Scenes | None = None) -> Rows:
    """One row per picture with all its questions as branches.

    Args:
        scenes: what the pictures show, to learn what mentioned objects are.
    """
    rows = Rows()
    ids, positions, following = picture_start(vocabulary)
    end = [vocabulary.ids["<|im_end|>"]]
    for n, asked in enumerate(questions):
        rows.begin(ids, positions, following)
        for question in asked:
            mentions = []
            if scenes is not None:
                mentions = [(vocabulary.ids[word], known_of(scenes, n, k)) for word, k in question.mentions]
            weight = TYPE_WEIGHTS.get(question.type, 1.0)
            rows.branch(
                vocabulary(question.text + ANSWER), vocabulary(question.answer) + end, weight, mentions
            )
    return rows


def known_of(scenes: Scenes, n: int, k: int) -> np.ndarray:
    """What a word that names object k of scene n should know: there or not, kind, colour, place (MENTION_WIDTH,)."""
    known = np.zeros(MENTION_WIDTH, dtype=np.float32)
    known[0] = 1.0 if k >= 0 else -1.0
    if k >= 0:
        known[1 + scenes.kind[n, k]] = 1.0
        known[7 + scenes.colour[n, k]] = 1.0
        known[13:] = (scenes.x[n, k] / 64 - 1, scenes.y[n, k] / 64 - 1)
    return known


def prompt_rows(
    vocabulary: WordIds, prompts: Sequence[str | None], answers: Sequence[str | None], queries: int
) -> Rows:
    """One row per prompt: its description as one branch, `[IMG]` and the latent queries as the other.

    Args:
        prompts: None = the bare prompt of the decoder's negative features: no chat template, no word.
        answers: descriptions to learn; None = no such branch.
    """
    rows = Rows()
    end = [vocabulary.ids["<|im_end|>"]]
    behind = [vocabulary.ids["[IMG]"]] + [vocabulary.ids["[/IMG]"]] * queries
    for prompt, answer in zip(prompts, answers, strict=True):
        if prompt is None:
            rows.begin(behind, np.stack([np.arange(len(behind))] * 3), len(behind))
            continue
        ids = vocabulary(generation_text(prompt))
        rows.begin(ids[:-1], np.stack([np.arange(len(ids) - 1)] * 3), len(ids) - 1)
        if answer is not None:
            rows.branch(ids[-1:], vocabulary(answer) + end, TYPE_WEIGHTS["draw"])
        rows.branch(ids[-1:] + behind, [], 0.0)
    return rows


def pick_questions(scenes: Scenes, n: int, rng: np.random.Generator) -> list[Question]:
    """A description, two matches and a few others."""
    others = draw_questions(scenes, n, rng)
    chosen = [others[k] for k in rng.permutation(len(others))[:OTHER_QUESTIONS]]
    return [
        describe_question(scenes, n, rng),
        match_question(scenes, n, rng),
        match_question(scenes, n, rng),
        *chosen,
    ]


def layout_targets(scenes: Scenes) -> tuple[np.ndarray, np.ndarray]:
    """Codes (B, T, D) and kinds (B, T), -1 = ground, of the scenes with every object in the middle of its slot."""
    centred = scenes.take(slice(None))
    for name in ("x", "y", "radius"):
        setattr(centred, name, getattr(centred, name).copy())
    place(centred, _Middle())
    code = semantic_code(centred, np.zeros((len(scenes), 32, 32), np.uint8))
    return code, of_cells(centred, centred.kind)


def of_cells(scenes: Scenes, values: np.ndarray) -> np.ndarray:
    """A value (N, K) of the object that each cell belongs to, (N, T), -1 = ground."""
    owner = owners(scenes)
    return np.where(owner >= 0, values[np.arange(len(scenes))[:, None], owner], -1)


def draw_prompt(
    scenes: Scenes, n: int, rng: np.random.Generator, *, held_out: bool = False, colourless: float = 0.15
) -> tuple[str, bool]:
    """A prompt for scene n in a wording of the wanted side, and whether it leaves the colours open."""
    for _ in range(50):
        caption, request = draw_caption_and_request(scenes, n, rng, colourless=colourless)
        if caption_is_held_out(caption) == held_out:
            return caption, request.things[0].colour is None
    return canonical_caption(scenes, n), False


def prompt_batch(
    vocabulary: WordIds, scenes: Scenes, rng: np.random.Generator, queries: int, *, held_out: bool = False
) -> Batch:
    """Prompts to draw with their descriptions and layouts."""
    drawn = [draw_prompt(scenes, n, rng, held_out=held_out) for n in range(len(scenes))]
    answers = [
        None if open_colours else canonical_caption(scenes, n) for n, (_, open_colours) in enumerate(drawn)
    ]
    layout, kind = layout_targets(scenes)
    weight = np.ones((len(scenes), 1, CODE_WIDTH), dtype=np.float32)
    weight[:, :, CODE_SLICES["cover"]] = 0
    for n, (_, open_colours) in enumerate(drawn):
        if open_colours:
            weight[n, :, CODE_SLICES["colour"]] = 0
    return {
        **prompt_rows(vocabulary, [caption for caption, _ in drawn], answers, queries).tensors("prompt"),
        "layout": torch.from_numpy(layout),
        "layout_kind": torch.from_numpy(kind),
        "layout_weight": torch.from_numpy(weight).expand(-1, GRID * GRID, -1),
    }


def understanding_batches(
    pool: ScenePool, vocabulary: WordIds, batch_size: int, prompts: int, seed: int, queries: int
) -> Callable[[int], Batch]:
    """Pictures with questions, and `prompts` prompts to draw."""

    def batch_of(step: int) -> Batch:
        rng = np.random.default_rng((seed, step, 2))
        pictures = picture_batch(pool, rows_of_step(len(pool), batch_size, seed, step), vocabulary, rng)
        prompt_scenes = pool.scenes.take(rows_of_step(len(pool), prompts, seed + 1, step))
        return {**pictures, **prompt_batch(vocabulary, prompt_scenes, rng, queries)}

    return batch_of


def picture_batch(pool: ScenePool, rows: np.ndarray, vocabulary: WordIds, rng: np.random.Generator) -> Batch:
    """These pictures with questions, and what the helpers of the stage read off them."""
    scenes = pool.scenes.take(rows)
    questions = [pick_questions(scenes, n, rng) for n in range(len(rows))]
    return {
        "pixels": pool.pixels(rows),
        "code": torch.from_numpy(semantic_code(scenes, pool.coverage[rows])),
        "kind": torch.from_numpy(of_cells(scenes, scenes.kind)),
        "colour": torch.from_numpy(of_cells(scenes, scenes.colour)),
        **question_rows(vocabulary, questions, scenes).tensors("picture"),
    }


class _Middle:
    """Stands in for a random generator: every draw is the middle of its range."""

    def uniform(self, low: float, high: float, size: tuple[int, ...]) -> np.ndarray:
        return np.full(size, 0.5 * (low + high))


def _kind_loss(guess: Tensor, kind: Tensor) -> Tensor:
    """Cross entropy of the kind part on cells that belong to an object."""
    there = kind >= 0
    return F.cross_entropy(2.0 * guess[..., CODE_SLICES["kind"]][there], kind[there])


def _rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = states.chunk(2, dim=-1)
    return states * cos + torch.cat([-second, first], dim=-1) * sin


def _text_rotary(config: Any, head_dim: int, positions: Tensor) -> tuple[Tensor, Tensor]:
    # transformers 5 keeps in one table what was in two places before.
    table = config.rope_parameters if hasattr(config, "rope_parameters") else config.rope_scaling
    theta = table["rope_theta"] if "rope_theta" in table else config.rope_theta
    sections = table["mrope_section"]
    frequencies = 1.0 / theta ** (torch.arange(0, head_dim, 2, device=positions.device).float() / head_dim)
    axis = torch.repeat_interleave(torch.arange(3), torch.tensor(sections))  # which axis turns each frequency
    angles = positions.float()[axis].permute(1, 2, 0) * frequencies  # (B, L, d / 2)
    angles = torch.cat([angles, angles], dim=-1)[:, None]
    return angles.cos(), angles.sin()


def _picture_rotary(head_dim: int, config: Any) -> tuple[Tensor, Tensor]:
    frequencies = 1.0 / 10000.0 ** (torch.arange(0, head_dim // 2, 2).float() / (head_dim // 2))
    rows = torch.arange(GRID).repeat_interleave(GRID)[:, None] * frequencies
    columns = torch.arange(GRID).repeat(GRID)[:, None] * frequencies
    angles = torch.cat([rows, columns], dim=-1)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()
