"""Names of tensors: published checkpoint -> component and key of our module, and back.

A published checkpoint uses the names of transformers 4.51; later transformers nest the text model one level deeper.
Both are read, with whatever wrappers a trainer left around them; the published names are written.
"""

from __future__ import annotations

import re
from typing import NamedTuple

COMPONENTS = ("backbone", "dit", "image_encoder", "decoder")
IMAGE_ENCODER_PREFIX = "model.gen_vision_tower.vision_tower.model."
DIT_PREFIX = "model.dit.model."
# Left around all names by DeepSpeed, torch.compile and PEFT.
WRAPPERS = re.compile(r"^(?:module\.|base_model\.model\.)+|_orig_mod\.|(?<=\.)base_layer\.")
# Around the names inside one network: EVA-CLIP's own files and their relatives differ in them.
INNER_WRAPPERS = re.compile(r"^(?:module\.|model\.|visual\.|vision_tower\.)+")

# First match wins: (file prefix, component, our prefix).
READ_TABLE: tuple[tuple[str, str, str], ...] = (
    ("model.dit.", "dit", ""),
    ("model.gen_vision_tower.", "image_encoder", ""),
    ("model.latent_queries", "backbone", "latent_queries"),
    ("model.visual.", "backbone", "visual."),  # transformers >= 4.52
    ("visual.", "backbone", "visual."),
    ("lm_head.", "backbone", "lm_head."),
    ("model.language_model.dit.", "dit", ""),
    ("model.language_model.gen_vision_tower.", "image_encoder", ""),
    ("model.language_model.latent_queries", "backbone", "latent_queries"),
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
# What published and older code saves beside the networks and nothing here needs: (where in the name, what it is called).
# The 8B was saved by code that held FLUX's VAE as a submodule; projectors and newline belong to LLaVA, from which it stems;
# rotary tables are computed from the configuration.
LEFTOVERS: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"(?:^|\.)rotary_(?:pos_)?emb\.inv_freq$"), "rotary tables"),
    (re.compile(r"(?:^|\.)freqs_cis$"), "rotary tables"),
    (re.compile(r"^model\.(?:language_model\.)?vae\."), "model.vae"),
    (re.compile(r"^(?:model\.)?mm_projector\b"), "mm_projector"),
    (re.compile(r"^(?:model\.)?gen_projector\b"), "gen_projector"),
    (re.compile(r"^(?:model\.)?down_projector\b"), "down_projector"),
    (re.compile(r"^(?:model\.)?image_newline$"), "image_newline"),
)


class Place(NamedTuple):
    """Where a tensor of a checkpoint belongs: a component and our key; or, without a component, what the leftover is called."""

    component: str | None
    key: str


def to_component_key(file_key: str) -> Place | None:
    """Where a tensor belongs by its name in the file; None = unknown name."""
    name = WRAPPERS.sub("", file_key)
    for pattern, words in LEFTOVERS:
        if pattern.search(name):
            return Place(None, words)
    for prefix, component, ours in READ_TABLE:
        if name.startswith(prefix):
            rest = name[len(prefix) :]
            return Place(component, ours + (rest if component == "backbone" else inner_key(rest)))
    return None


def inner_key(key: str) -> str:
    """Key inside a network that has a file of its own, without the wrappers that such files put around it."""
    return INNER_WRAPPERS.sub("", WRAPPERS.sub("", key))


def to_published_key(component: str, key: str) -> str:
    """Published name of our tensor `key` of a component."""
    for owner, ours, published in WRITE_TABLE:
        if owner == component and key.startswith(ours):
            return published + key[len(ours) :]
    raise AssertionError(f"no published name for {component} tensor {key}")
