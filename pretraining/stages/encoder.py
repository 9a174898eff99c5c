"""Stage a: the image encoder. A miniature EVA-CLIP learns features that name what is where, then stays frozen.

Letters: B pictures, T = 64 tokens (8 x 8 cells of 16 pixels), W feature width, K objects, D code width.

CLIP features work as a target of the flow because they are semantic: what a thing is carries most of their variance.
A few thousand small pictures do not give that by contrast with captions alone, so a dense term asks every token for a
code of what it sees (kind, colour, offset and size of the object there, ground, coverage, its own place), through a
fixed orthonormal map. The features then have about unit variance, in directions that mean something.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...blip3o_core.images import CLIP_MEAN, CLIP_STD
from ...blip3o_core.models.eva_clip import EvaClip
from ..trainer import Batch
from ..world.pool import ScenePool, rows_of_step
from ..world.scenes import SIDE, Scenes

GRID = 8
CELL = SIDE // GRID
KIND_SCALE, COLOUR_SCALE, OFFSET_SCALE, SIZE_SCALE = 3.0, 3.0, 2.0, 1.0
PRESENCE_SCALE, GROUND_SCALE, COVER_SCALE, PLACE_SCALE = 1.5, 1.5, 1.0, 0.7
PLACE_FREQUENCIES = (1.0, 2.0)
CODE_SLICES = {
    "kind": slice(0, 6),
    "colour": slice(6, 12),
    "offset": slice(12, 14),
    "size": slice(14, 15),
    "presence": slice(15, 16),
    "ground": slice(16, 17),
    "cover": slice(17, 33),
    "place": slice(33, 41),
}
CODE_WIDTH = 41


def owners(scenes: Scenes) -> np.ndarray:
    """The object each cell belongs to, (N, T); -1 = ground. The nearest one whose box reaches the cell."""
    centre = (np.arange(GRID) + 0.5) * CELL
    cell_x = np.tile(centre, GRID)[None, :, None]  # (1, T, 1), row major
    cell_y = np.repeat(centre, GRID)[None, :, None]
    dx = abs(cell_x - scenes.x[:, None])  # (N, T, K)
    dy = abs(cell_y - scenes.y[:, None])
    gap = np.maximum(dx, dy) - CELL / 2 - scenes.radius[:, None]
    gap = np.where(scenes.kind[:, None] >= 0, gap, np.inf)
    distance = np.where(scenes.kind[:, None] >= 0, np.hypot(dx, dy), np.inf)
    return np.where(gap.min(axis=2) < 0, distance.argmin(axis=2), -1)


def semantic_code(scenes: Scenes, coverage: np.ndarray) -> np.ndarray:
    """What every cell should say, (N, T, D) float32.

    Args:
        coverage: (N, 32, 32) uint8 of the pool.
    """
    number = len(scenes)
    owner = owners(scenes)
    row = np.arange(number)[:, None]
    there = owner >= 0
    kind = np.where(there, scenes.kind[row, owner], 0)
    colour = np.where(there, scenes.colour[row, owner], 0)
    code = np.zeros((number, GRID * GRID, CODE_WIDTH), dtype=np.float32)
    code[..., CODE_SLICES["kind"]] = KIND_SCALE * (np.eye(6)[kind] - 1 / 6) * there[..., None]
    code[..., CODE_SLICES["colour"]] = COLOUR_SCALE * (np.eye(6)[colour] - 1 / 6) * there[..., None]
    centre = (np.arange(GRID) + 0.5) * CELL
    dx = np.where(there, np.tile(centre, GRID)[None] - scenes.x[row, owner], 0.0)
    dy = np.where(there, np.repeat(centre, GRID)[None] - scenes.y[row, owner], 0.0)
    code[..., CODE_SLICES["offset"]] = OFFSET_SCALE * np.stack([dx, dy], axis=-1) / CELL
    code[..., 14] = SIZE_SCALE * np.where(there, (scenes.radius[row, owner] - 19.0) / 5.0, 0.0)
    code[..., 15] = PRESENCE_SCALE * np.where(there, 1.0, -1.0)
    code[..., 16] = GROUND_SCALE * (1.0 - 2.0 * scenes.background)[:, None]
    cover = coverage.astype(np.float32).reshape(number, GRID, 4, GRID, 4) / 255
    code[..., CODE_SLICES["cover"]] = COVER_SCALE * cover.transpose(0, 1, 3, 2, 4).reshape(
        number, GRID * GRID, 16
    )
    code[..., CODE_SLICES["place"]] = PLACE_SCALE * place_code()[None]
    return code


def place_code() -> np.ndarray:
    """Where each cell lies: sines and cosines of column and row, (T, 8)."""
    angle = (np.arange(GRID) + 0.5) / GRID * math.pi
    waves = np.stack([f(k * angle) for k in PLACE_FREQUENCIES for f in (np.cos, np.sin)], axis=1)  # (8, 4)
    return math.sqrt(2) * np.concatenate([np.tile(waves, (GRID, 1)), np.repeat(waves, GRID, axis=0)], axis=1)


def frame(width: int) -> Tensor:
    """Fixed orthonormal map from codes to features, (D, W)."""
    generator = torch.Generator().manual_seed(20250514)
    return torch.linalg.qr(torch.randn(width, width, generator=generator))[0][:CODE_WIDTH]


def initialise(encoder: EvaClip) -> None:
    """Start values that a post-norm tower learns from: quiet branches and wave-shaped positions."""
    width = encoder.config.width
    for module in encoder.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=1 / math.sqrt(module.in_features))
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            nn.init.constant_(module.weight, 0.25)
    angle = (torch.arange(GRID) + 0.5) / GRID * math.pi
    waves = torch.cat(
        [f(k * angle)[:, None] for k in range(1, width // 4 + 1) for f in (torch.cos, torch.sin)], dim=1
    )
    waves = waves[:, : width // 2]
    places = torch.cat([waves.repeat(GRID, 1), waves.repeat_interleave(GRID, dim=0)], dim=1)
    with torch.no_grad():
        encoder.pos_embed[0, 1:] = 0.5 * places
        nn.init.normal_(encoder.cls_token, std=0.02)


class TextTower(nn.Module):
    """Small transformer that reads a caption for the contrastive term; thrown away afterwards."""

    def __init__(self, vocabulary: int, width: int = 64, layers: int = 2, length: int = 40) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.place = nn.Parameter(0.1 * torch.randn(length, width))
        layer = nn.TransformerEncoderLayer(
            width, 4, 2 * width, dropout=0.0, batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)

    def forward(self, ids: Tensor) -> Tensor:
        """Caption ids (B, L), 0 = padding: (B, width)."""
        padding = ids == 0
        hidden_states = self.embed(ids) + self.place[: ids.shape[1]]
        hidden_states = self.blocks(hidden_states, src_key_padding_mask=padding)
        weight = (~padding).float()[..., None]
        return (hidden_states * weight).sum(1) / weight.sum(1)


class EncoderStage(nn.Module):
    """Dense term on every token, mask heads on the way, and contrast with captions."""

    def __init__(self, encoder: EvaClip, vocabulary: int, contrast_weight: float = 0.1) -> None:
        super().__init__()
        self.encoder = encoder
        width = encoder.config.width
        self.register_buffer("frame", frame(width))
        self.middle_heads = nn.ModuleList([nn.Linear(width, CODE_WIDTH + 16) for _ in range(2)])
        self.text = TextTower(vocabulary)
        self.image_projection = nn.Linear(2 * width, 64)
        self.scale = nn.Parameter(torch.tensor(math.log(10.0)))
        self.contrast_weight = contrast_weight
        self.register_buffer("mean", torch.tensor(CLIP_MEAN).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(CLIP_STD).view(1, 3, 1, 1))

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        encoder = self.encoder
        tokens = encoder.patch_embed((batch["pixels"] - self.mean) / self.std)
        tokens = torch.cat([encoder.cls_token.expand(len(tokens), -1, -1), tokens], dim=1) + encoder.pos_embed
        middle = []
        for block in encoder.blocks:
            tokens = block(tokens)
            middle.append(tokens[:, 1:])
        features = middle[-1]
        code, mask = batch["code"], batch["mask"]
        feature_error = (features - code @ self.frame).square().sum(-1).mean() / CODE_WIDTH
        helpers = features.new_zeros(())
        for head, hidden_states in zip(self.middle_heads, middle[-3:-1], strict=True):
            guess = head(hidden_states)
            helpers = helpers + 0.3 * (guess[..., :CODE_WIDTH] - code).square().mean()
            helpers = helpers + 0.5 * F.binary_cross_entropy_with_logits(guess[..., CODE_WIDTH:], mask)
        read = features @ self.frame.T
        there = batch["there"]
        kind_logits = 3.0 * read[..., CODE_SLICES["kind"]][there]
        kind_loss = F.cross_entropy(kind_logits, batch["kind"][there])
        colour_loss = F.cross_entropy(3.0 * read[..., CODE_SLICES["colour"]][there], batch["colour"][there])
        pooled = torch.cat([features.mean(1), features.amax(1)], dim=1)
        image = F.normalize(self.image_projection(pooled), dim=-1)
        text = F.normalize(self.text(batch["ids"]), dim=-1)
        logits = self.scale.exp().clamp(max=50.0) * image @ text.T
        # Equal captions are no negatives of each other.
        same = (batch["ids"][:, None] == batch["ids"][None]).all(-1) & ~torch.eye(
            len(logits), dtype=torch.bool
        )
        logits = logits.masked_fill(same, -30.0)
        target = torch.arange(len(logits))
        contrast = 0.5 * (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target))
        loss = feature_error + helpers + 0.1 * (kind_loss + colour_loss) + self.contrast_weight * contrast
        with torch.no_grad():
            kind_right = (kind_logits.argmax(-1) == batch["kind"][there]).float().mean()
            cover_error = (read - code)[..., CODE_SLICES["cover"]].square().mean()
        return loss, {
            "feature_error": feature_error,
            "kind_accuracy": kind_right,
            "cover_error": cover_error,
            "contrast": contrast,
        }


def encoder_batches(
    pool: ScenePool, caption_ids: Callable[[Scenes, int], Tensor], batch_size: int, seed: int
) -> Callable[[int], Batch]:
    """Pictures with codes, masks and captions."""

    def batch_of(step: int) -> Batch:
        rows = rows_of_step(len(pool), batch_size, seed, step)
        scenes, coverage = pool.scenes.take(rows), pool.coverage[rows]
        owner = owners(scenes)
        there = owner >= 0
        row = np.arange(batch_size)[:, None]
        fine = coverage.astype(np.float32).reshape(batch_size, GRID, 4, GRID, 4) / 255
        fine = fine.transpose(0, 1, 3, 2, 4).reshape(batch_size, GRID * GRID, 16)
        return {
            "pixels": pool.pixels(rows),
            "code": torch.from_numpy(semantic_code(scenes, coverage)),
            "mask": torch.from_numpy(fine),
            "there": torch.from_numpy(there),
            "kind": torch.from_numpy(np.where(there, scenes.kind[row, owner], 0)),
            "colour": torch.from_numpy(np.where(there, scenes.colour[row, owner], 0)),
            "ids": caption_ids(scenes, step),
        }

    return batch_of


@torch.no_grad()
def rescale(encoder: EvaClip, factor: float) -> None:
    """Multiply the features by a factor, exactly, by moving it into the weights.

    Everything that writes to the token stream is multiplied, everything that reads it is divided.
    """
    for parameter in (
        encoder.cls_token,
        encoder.pos_embed,
        encoder.patch_embed.proj.weight,
        encoder.patch_embed.proj.bias,
    ):
        parameter.mul_(factor)
    for block in encoder.blocks:
        for norm in (block.norm1, block.norm2):
            norm.weight.mul_(factor)
            norm.bias.mul_(factor)
        block.attn.qkv.weight.div_(factor)
        block.mlp.fc1.weight.div_(factor)
