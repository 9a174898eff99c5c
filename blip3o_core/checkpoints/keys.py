"""Names of tensors: published checkpoint -> component and key of our module, and back.

A published checkpoint uses the names of transformers 4.51; later transformers nest the text model one level deeper.
Both are read; the published names are written.
"""

from __future__ import annotations

import re

COMPONENTS = ("backbone", "dit", "image_encoder", "decoder")
IMAGE_ENCODER_PREFIX = "model.gen_vision_tower.vision_tower.model."
DIT_PREFIX = "model.dit.model."

# First match wins: (file prefix, component, our prefix). Component None = dropped on purpose.
READ_TABLE: tuple[tuple[str, str | None, str], ...] = (
    (DIT_PREFIX, "dit", ""),
    (IMAGE_ENCODER_PREFIX, "image_encoder", ""),
    ("model.latent_queries", "backbone", "latent_queries"),
    ("model.visual.", "backbone", "visual."),  # transformers >= 4.52
    ("visual.", "backbone", "visual."),
    ("lm_head.", "backbone", "lm_head."),
    ("model.language_model.", "backbone", "text."),  # transformers >= 4.52
    ("model.embed_tokens.", "backbone", "text.embed_tokens."),
    ("model.layers.", "backbone", "text.layers."),
    ("model.norm.", "backbone", "text.norm."),
)
WRITE_TABLE: tuple[tuple[str, str, str], ...] = (
    ("backbone", "text.", "model."),
    ("backbone", "latent_queries", "model.latent_queries"),
    ("backbone", "visual.", "visual."),
    ("backbone", "lm_head.", "lm_head."),
    ("dit", "", DIT_PREFIX),
    ("image_encoder", "", IMAGE_ENCODER_PREFIX),
)
# Recomputed from the configuration; old savers stored them.
DROPPED = re.compile(r"\.rotary_emb\.inv_freq$|\.rotary_pos_emb\.inv_freq$")


def to_component_key(file_key: str) -> tuple[str | None, str] | None:
    """(component, our key) of a tensor in a checkpoint; (None, "") = dropped on purpose; None = unknown name."""
    if DROPPED.search(file_key):
        return None, ""
    for prefix, component, ours in READ_TABLE:
        if file_key.startswith(prefix):
            return component, ours + file_key[len(prefix) :]
    return None


def to_published_key(component: str, key: str) -> str:
    """Published name of our tensor `key` of a component."""
    for owner, ours, published in WRITE_TABLE:
        if owner == component and key.startswith(ours):
            return published + key[len(ours) :]
    raise AssertionError(f"no published name for {component} tensor {key}")
