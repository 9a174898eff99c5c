"""Does the installed transformers keep what a backbone has read? Asked of a tiny network, once, before a real one answers.

A forward that takes arguments of any name says nothing when one of them has lost its meaning: answers would be nonsense.

Letters: L tokens, C width.
"""

from __future__ import annotations

from functools import cache

import torch
import transformers
from torch import Tensor
from transformers import DynamicCache

from ..errors import Blip3oError
from .backbone import Backbone

TOKENS, READ_AT_ONCE, PADDING = 6, 3, 2
# Between float32 sums of a few numbers in another order; a token that sees only itself differs by about 1.
TOLERANCE = 1e-3
CONFIG = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "hidden_act": "silu",
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "rope_scaling": {"type": "default", "rope_type": "default", "mrope_section": [2, 1, 1]},
    "vision_config": {
        "depth": 1,
        "hidden_size": 16,
        "hidden_act": "silu",
        "intermediate_size": 16,
        "num_heads": 2,
        "patch_size": 14,
        "out_hidden_size": 16,
        "fullatt_block_indexes": [0],
    },
}


@cache
def require_working_cache() -> None:
    """Compare reading token by token, and beside padding that either kind of mask hides, with reading all at once.

    Raises:
        Blip3oError: the numbers differ.
    """
    with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.inference_mode(False), torch.no_grad():
        torch.manual_seed(0)
        backbone = Backbone(CONFIG, vocab_size=32, queries=1, tie_head=False).float().eval()
        for parameter in backbone.text.parameters():
            if parameter.ndim > 1:
                # Larger than a new network's, so that attention looks at some tokens more than at others.
                parameter.normal_(0, 2 * parameter.shape[-1] ** -0.5)
        embeddings = 3 * torch.randn(1, TOKENS, 16)
        whole = backbone(embeddings, _positions(0, TOKENS))
        kept = DynamicCache()
        steps = [backbone(embeddings[:, :READ_AT_ONCE], _positions(0, READ_AT_ONCE), None, kept)]
        for place in range(READ_AT_ONCE, TOKENS):
            steps.append(backbone(embeddings[:, place : place + 1], _positions(place, 1), None, kept))
        padded = torch.cat([torch.randn(1, PADDING, 16), embeddings], dim=1)
        mask = torch.cat([torch.zeros(1, PADDING), torch.ones(1, TOKENS)], dim=1).long()
        positions = _positions(-PADDING, PADDING + TOKENS).clamp(min=0)
        beside_padding = backbone(padded, positions, mask)[:, PADDING:]
        # The same, as recorded answers say it: by what is added to the attention's scores.
        places = torch.arange(PADDING + TOKENS)
        is_seen = (places <= places[:, None]) & mask.bool()
        bias = torch.zeros(is_seen.shape).masked_fill(~is_seen, torch.finfo().min)[None, None]
        beside_masked = backbone(padded, positions, bias)[:, PADDING:]
    for words, found in (
        ("what it has read", torch.cat(steps, dim=1)),
        ("padding", beside_padding),
        ("masked tokens", beside_masked),
    ):
        if not torch.allclose(found, whole, rtol=0, atol=TOLERANCE):
            raise Blip3oError(
                f"The installed transformers {transformers.__version__} does not treat {words} as this program expects: answers "
                "and pictures would be wrong.\nInstall a version that it was tested with (blip3o doctor lists them), or update "
                "ComfyUI-BLIP3o."
            )


def _positions(first: int, count: int) -> Tensor:
    return torch.arange(first, first + count).expand(3, 1, -1)
