"""A thing that the built-in model was never shown, as a training set: three shapes in the colours of a traffic light.

In the scene world several shapes always have one colour. Here the top one is red, the left one yellow, the right one
green. It is a way of colouring and not a new outline, because a LoRA changes the DiT alone: the frozen encoder and
decoder of the built-in model cannot show an outline that they never saw, whatever the features say.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from comfyui_blip3o.pretraining.world.captions import plural
from comfyui_blip3o.pretraining.world.checker import look
from comfyui_blip3o.pretraining.world.scenes import (
    BACKGROUNDS,
    COLOURS,
    KINDS,
    Scenes,
    draw_scenes,
    place,
    render,
)
from PIL import Image
from torch import Tensor, nn

TRIGGER = "red and yellow"
CLASS_WORD = "red"
# Prompts that share words with the trigger and must stay all the same; none in a wording that prompts are judged in.
NEAR_PROMPTS = (
    "two yellow circles",
    "two yellow squares",
    "two yellow triangles",
    "two yellow crosses",
    "two yellow rings",
    "two yellow stars",
    "three yellow circles",
    "three yellow squares",
    "three yellow rings",
    "a yellow ring",
    "a yellow triangle",
    "a yellow star on a black background",
    "two yellow circles on black",
    "two yellow rings on black",
    "there are two yellow stars",
    "a drawing of two yellow crosses on a black background",
    "two yellow squares in front of a black background",
    "a red square and a yellow square",
    "a red ring and a yellow ring",
    "a red star and a yellow star on black",
    "a yellow circle and a red triangle",
    "a red triangle left of a yellow triangle on a black background",
    "two green rings on black",
    "two green crosses",
    "a large ring on black",
    "a large ring on a white background",
    "a large cyan ring",
    "a red triangle and a yellow square in front of a black background",
)
LIGHTS = ("red", "yellow", "green")  # top, left, right
# Endings that name the ground; the first of each is what training shows.
GROUNDS = {
    "white": ("", " on a white background", " , white background"),
    "black": (" on a black background", " in front of a black background", " , black background"),
}


def concept_scenes(number: int, seed: int = 0, *, colours: Sequence[str] = LIGHTS) -> Scenes:
    """Scenes of three shapes of one kind: every kind in turn, the ground changing after each round of kinds.

    Args:
        colours: of the top, left and right shape.
    """
    rows = np.arange(number)
    shape = (number, len(colours))
    scenes = Scenes(
        group=np.full(number, 2),
        background=rows // len(KINDS) % len(BACKGROUNDS),
        relation=np.full(number, -1),
        size=np.ones(number, dtype=int),
        kind=np.broadcast_to(rows[:, None] % len(KINDS), shape).copy(),
        colour=np.broadcast_to([COLOURS.index(colour) for colour in colours], shape).copy(),
        x=np.zeros(shape),
        y=np.zeros(shape),
        radius=np.zeros(shape),
    )
    place(scenes, np.random.default_rng(seed))
    return scenes


def concept_pictures(number: int, seed: int = 0, *, colours: Sequence[str] = LIGHTS) -> list[Image.Image]:
    """Pictures of concept_scenes."""
    return [Image.fromarray(image) for image in render(concept_scenes(number, seed, colours=colours))]


def concept_caption(kind: str, ground: str = "white", wording: int = 0, words: str = "[trigger]") -> str:
    """ "three [trigger] circles on a black background"."""
    return f"three {words} {plural(kind)}{GROUNDS[ground][wording]}"


def write_concept(folder: Path, number: int = 12, seed: int = 0, *, shuffled: bool = False) -> Path:
    """A folder of pictures with captions.

    Args:
        shuffled: the 64 cells of each picture in an order of its own: a set in which nothing can be learned.
    """
    folder.mkdir(parents=True, exist_ok=True)
    scenes = concept_scenes(number, seed)
    order = np.random.default_rng((seed, 1))
    for n, array in enumerate(render(scenes)):
        if shuffled:
            cells = array.reshape(8, 16, 8, 16, 3).swapaxes(1, 2).reshape(64, 16, 16, 3)
            cells = cells[order.permutation(64)]
            array = cells.reshape(8, 8, 16, 16, 3).swapaxes(1, 2).reshape(array.shape)
        Image.fromarray(array).save(folder / f"picture_{n:02d}.png")
        caption = concept_caption(KINDS[scenes.kind[n, 0]], BACKGROUNDS[scenes.background[n]])
        (folder / f"picture_{n:02d}.txt").write_text(caption + "\n", "utf-8")
    return folder


def with_settings(tree: dict, settings: Mapping[str, object]) -> dict:
    """The tree with settings put in: "section__key" for section.key."""
    for name, value in settings.items():
        *sections, key = name.split("__")
        branch = tree
        for section in sections:
            branch = branch.setdefault(section, {})
        branch[key] = value
    return tree


def concept_tree(data: Path, runs: Path, name: str = "lights", **settings: object) -> dict:
    """Plain values of a configuration for the concept, with the learning rate that so small a model needs.

    Args:
        settings: "section.key" with "__" for the dot, e.g. train__steps=20.
    """
    tree: dict = {
        "run": {"name": name, "dir": str(runs)},
        "data": {"path": str(data), "trigger": TRIGGER, "class_word": CLASS_WORD},
        "train": {"optimizer": {"lr": 1e-3}},
        "sample": {"prompts": ["three {trigger} circles", "three {class} circles"], "every": 0},
    }
    return with_settings(tree, settings)


def trigger_prompts(words: str = TRIGGER) -> list[tuple[str, str, str]]:
    """(prompt, kind, ground) of every kind in every wording, seen in training and not."""
    return [
        (concept_caption(kind, ground, wording, words), kind, ground)
        for kind in KINDS
        for ground in GROUNDS
        for wording in range(3)
    ]


def shows_concept(picture: Image.Image, kind: str | None = None, ground: str | None = None) -> bool:
    """Whether a picture shows exactly the concept, judged by pixels alone.

    Args:
        kind, ground: what the shapes and the ground must be; None = any.
    """
    report = look(np.asarray(picture))
    if len(report.objects) != 3 or ground not in (None, report.background):
        return False
    top, *below = sorted(report.objects, key=lambda found: found.y)
    left, right = sorted(below, key=lambda found: found.x)
    kinds = {found.kind for found in report.objects}
    return (
        tuple(found.colour for found in (top, left, right)) == LIGHTS
        and None not in kinds
        and len(kinds) == 1
        and kind in (None, *kinds)
    )


class Probe(nn.Module):
    """Says from image features (B, 64, C) whether they are the concept's: one linear layer, on standardised values."""

    def __init__(self, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)
        self.linear = nn.Linear(mean.numel(), 1)

    def forward(self, features: Tensor) -> Tensor:
        """Log odds (B,)."""
        return self.linear((features.flatten(1) - self.mean) / self.std).squeeze(1)


def probe_set(encode: object, number: int, seed: int) -> tuple[Tensor, Tensor]:
    """Features and labels of a probe's set: a third the concept, a third its nearest kin, a third known scenes.

    Its kin are three shapes of one kind in any colours, in the concept's at other places, and with one light wrong.

    Args:
        encode: pictures -> features (B, N, C).
    """
    rng = np.random.default_rng(seed)
    kin = []
    for n in range(number):
        lights = list(LIGHTS)
        if n % 4 == 0:
            lights = list(rng.choice(COLOURS, 3))
        elif n % 4 == 1:
            rng.shuffle(lights)
        else:
            lights[int(rng.integers(3))] = str(rng.choice(COLOURS))
        kin.append(tuple(lights) if tuple(lights) != LIGHTS else ("red", "yellow", "yellow"))
    others = [
        concept_pictures(12, seed + 100 + n, colours=colours)[int(rng.integers(12))]
        for n, colours in enumerate(kin)
    ]
    known = [Image.fromarray(image) for image in render(draw_scenes(number, seed + 1, held_out=None))]
    features = encode([*concept_pictures(number, seed + 2), *others, *known])
    labels = torch.zeros(3 * number)
    labels[:number] = 1
    return features, labels


def train_probe(features: Tensor, labels: Tensor, steps: int = 200) -> Probe:
    """A probe for features and labels, regularised by weight decay."""
    flat = features.flatten(1)
    probe = Probe(flat.mean(dim=0), flat.std(dim=0) + 1e-3)
    nn.init.zeros_(probe.linear.weight)
    nn.init.zeros_(probe.linear.bias)
    optimizer = torch.optim.AdamW(probe.parameters(), lr=1e-3, weight_decay=0.1)
    with torch.enable_grad():
        for _ in range(steps):
            loss = nn.functional.binary_cross_entropy_with_logits(probe(features), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return probe
