"""Captions, questions and answers about scenes, in several phrasings.

The conventions that keep the world easy to learn: a caption that names no ground means the white one, one that names
no size means the medium one, and "a X and a Y" lists what stands side by side from left to right.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np

from ...blip3o_core.language.prompts import CAPTION_STYLES, MATCH_QUESTION
from .scenes import BACKGROUNDS, COLOURS, KINDS, OPPOSITE, RELATIONS, SIZES, Scenes

NUMBERS = ("zero", "one", "two", "three")
OPENINGS = ("", "", "", "a picture of ", "a photo of ", "an image of ", "a drawing of ", "there is ")
GROUND_PHRASES = (" on a {} background", " on {}", " in front of a {} background", " , {} background")
RELATION_PHRASES = {
    "left of": ("left of", "to the left of", "on the left of"),
    "right of": ("right of", "to the right of", "on the right of"),
    "above": ("above", "over", "on top of"),
    "below": ("below", "under", "beneath"),
}
HELD_OUT_EVERY = 6
DESCRIBE_TEXTS = (
    "describe the picture.",
    "describe this image.",
    "what is in the picture?",
    "what does this picture show?",
)


@dataclass(frozen=True)
class Thing:
    """One kind of object a prompt asks for; None = any colour, any size."""

    kind: str
    colour: str | None = None
    number: int = 1


@dataclass(frozen=True)
class Request:
    """What a caption asks a picture to show: for the checker."""

    things: tuple[Thing, ...]
    relation: str | None = None
    background: str | None = None
    size: str | None = None


@dataclass(frozen=True)
class Question:
    """One question about a picture with its only right answer.

    Attributes:
        mentions: words of the text that name objects, in order, each with the number of the object, -1 = not there.
    """

    type: str
    text: str
    answer: str
    mentions: tuple[tuple[str, int], ...] = ()


def caption_is_held_out(caption: str) -> bool:
    """Captions no stage trains on: one wording in six, by its checksum."""
    return zlib.crc32(caption.encode()) % HELD_OUT_EVERY == 0


def plural(kind: str) -> str:
    """ "crosses", "circles"."""
    return kind + ("es" if kind.endswith("s") else "s")


def article(words: str) -> str:
    """Words with "a" or "an" before them."""
    return ("an " if words[0] in "aeiou" else "a ") + words


def canonical_caption(scenes: Scenes, n: int) -> str:
    """The one full description of a scene; the answer to "describe the picture"."""
    ground = f" on a {BACKGROUNDS[scenes.background[n]]} background"
    first = _name(scenes, n, 0)
    if scenes.group[n] == 0:
        size = SIZES[scenes.size[n]]
        return article(first if size == "medium" else f"{size} {first}") + ground
    if scenes.group[n] == 2:
        count = int(scenes.count[n])
        colour, kind = first.split()
        return f"{NUMBERS[count]} {colour} {plural(kind)}{ground}"
    second, relation = _name(scenes, n, 1), RELATIONS[scenes.relation[n]]
    if relation in ("right of", "below"):
        first, second, relation = second, first, OPPOSITE[relation]
    return f"{article(first)} {relation} {article(second)}{ground}"


def draw_caption(scenes: Scenes, n: int, rng: np.random.Generator, *, held_out: bool | None = False) -> str:
    """A caption of scene n in a random wording.

    Args:
        held_out: False = a wording training may use, True = one it never uses, None = any.
    """
    for _ in range(200):
        caption, _ = draw_caption_and_request(scenes, n, rng)
        if held_out is None or caption_is_held_out(caption) == held_out:
            return caption
    return canonical_caption(scenes, n)


def draw_caption_and_request(
    scenes: Scenes, n: int, rng: np.random.Generator, *, colourless: float = 0.15, plain: float = 0.45
) -> tuple[str, Request]:
    """A random wording for scene n, with what it asks for.

    Args:
        colourless: share of captions that leave the colours open.
        plain: share of captions of objects side by side that say "and" instead of their relation.
    """
    group = int(scenes.group[n])
    ground = BACKGROUNDS[scenes.background[n]]
    tail = ""
    if ground != "white" or rng.random() < 0.3:
        tail = GROUND_PHRASES[rng.choice(4, p=(0.4, 0.3, 0.2, 0.1))].format(ground)
    kinds = [KINDS[k] for k in scenes.kind[n, : scenes.count[n]]]
    colours = [COLOURS[k] for k in scenes.colour[n, : scenes.count[n]]]
    open_colours = rng.random() < colourless and (group != 1 or kinds[0] != kinds[1])
    size = None
    opening = OPENINGS[rng.integers(len(OPENINGS))]
    if group == 0:
        size = SIZES[scenes.size[n]]
        words = ([] if size == "medium" else [size]) + ([] if open_colours else [colours[0]]) + [kinds[0]]
        body = article(" ".join(words))
        if rng.random() < 0.1:
            body = "one " + " ".join(words)
        things = (Thing(kinds[0], None if open_colours else colours[0]),)
    elif group == 2:
        if opening == "there is ":
            opening = "there are "
        number = len(kinds)
        colour = "" if open_colours else colours[0] + " "
        body = f"{NUMBERS[number]} {colour}{plural(kinds[0])}"
        things = (Thing(kinds[0], None if open_colours else colours[0], number),)
    else:
        return _pair_caption(scenes, n, rng, opening, tail, open_colours, plain)
    return opening + body + tail, Request(things, None, ground, size)


def draw_questions(scenes: Scenes, n: int, rng: np.random.Generator) -> list[Question]:
    """One question of every type that scene n can answer."""
    count = int(scenes.count[n])
    group = int(scenes.group[n])
    objects = scene_objects(scenes, n)
    chosen = int(rng.integers(count))
    kind, colour = objects[chosen]
    kinds, colours = {k for k, _ in objects}, {c for _, c in objects}
    spelling = ("colour", "color")[rng.integers(2)]
    questions = [
        Question("background", f"what {spelling} is the background?", BACKGROUNDS[scenes.background[n]]),
        _count_question(objects, rng),
        _exist_question(objects, rng),
    ]
    if group == 2:
        questions.append(
            Question("colour", f"what {spelling} are the {plural(kind)}?", colour, ((plural(kind), 0),))
        )
        questions.append(Question("shape", "what shape are the objects?", kind, (("objects", 0),)))
    else:
        if sum(k == kind for k, _ in objects) == 1:
            questions.append(Question("colour", f"what {spelling} is the {kind}?", colour, ((kind, chosen),)))
        if sum(c == colour for _, c in objects) == 1:
            text = (
                "what shape is the object?"
                if group == 0 and rng.random() < 0.4
                else f"what shape is the {colour} object?"
            )
            questions.append(Question("shape", text, kind, (("object", chosen),)))
    if group == 0:
        questions.append(Question("size", f"how big is the {kind}?", SIZES[scenes.size[n]], ((kind, 0),)))
    if group == 1:
        questions.extend(_pair_questions(scenes, n, objects, kinds, colours, rng))
    return questions


def match_question(scenes: Scenes, n: int, rng: np.random.Generator) -> Question:
    """ "Does this picture show ...?", half of the time with a caption that is wrong in one place."""
    wrong = rng.random() < 0.5
    other, change = corrupt(scenes, n, rng) if wrong else (scenes.take(slice(n, n + 1)), "")
    # A caption with a plain "and" would be true of a scene whose order alone was changed.
    plain = 0.0 if change in ("swap", "turn") else 0.45
    caption, request = draw_caption_and_request(other, 0, rng, colourless=0.0 if wrong else 0.1, plain=plain)
    caption = caption.removeprefix("there is ").removeprefix("there are ")
    text = match_text(caption)
    if rng.random() < 0.3:
        text = text.removesuffix(" Answer yes or no.")
    objects = scene_objects(scenes, n)
    mentions = tuple(
        (
            plural(thing.kind) if thing.number > 1 else thing.kind,
            find_object(objects, thing.kind, thing.colour),
        )
        for thing in request.things
    )
    return Question("match", text, "no" if wrong else "yes", mentions)


def scene_objects(scenes: Scenes, n: int) -> list[tuple[str, str]]:
    """Kind and colour of every object of scene n."""
    return [(KINDS[scenes.kind[n, k]], COLOURS[scenes.colour[n, k]]) for k in range(int(scenes.count[n]))]


def find_object(objects: list[tuple[str, str]], kind: str | None, colour: str | None) -> int:
    """The first object of this kind and colour (None = any), -1 = none."""
    return next(
        (
            k
            for k, (its_kind, its_colour) in enumerate(objects)
            if kind in (None, its_kind) and colour in (None, its_colour)
        ),
        -1,
    )


def match_text(caption: str) -> str:
    """The yes/no question that scores a picture against a prompt; with or without its closing request."""
    return MATCH_QUESTION.format(statement=caption)


def describe_question(scenes: Scenes, n: int, rng: np.random.Generator) -> Question:
    """A request for the full description."""
    texts = DESCRIBE_TEXTS if rng.random() < 0.5 else tuple(CAPTION_STYLES.values())
    return Question("describe", texts[rng.integers(len(texts))], canonical_caption(scenes, n))


def corrupt(scenes: Scenes, n: int, rng: np.random.Generator) -> tuple[Scenes, str]:
    """Scene n with one thing changed that a caption tells, and what: kind, colour, order, number, size or ground."""
    scene = scenes.take(np.array([n]))
    group = int(scene.group[0])
    choices = ["kind", "colour", "ground"]
    choices += {0: ["size"], 1: ["swap", "swap", "turn"], 2: ["number", "number"]}[group]
    change = choices[rng.integers(len(choices))]
    rows = range(int(scene.count[0])) if group == 2 else [int(rng.integers(scene.count[0]))]
    if change in ("kind", "colour"):
        values, total = (scene.kind, len(KINDS)) if change == "kind" else (scene.colour, len(COLOURS))
        values[0, list(rows)] = (values[0, rows[0]] + rng.integers(1, total)) % total
        if group == 1 and (scene.kind[0, 0], scene.colour[0, 0]) == (scene.kind[0, 1], scene.colour[0, 1]):
            scene.background[0] = 1 - scene.background[0]
    elif change == "swap":
        scene.kind[0, :2] = scene.kind[0, 1::-1]
        scene.colour[0, :2] = scene.colour[0, 1::-1]
    elif change == "turn":
        scene.relation[0] = (scene.relation[0] + 2) % len(RELATIONS)
    elif change == "number":
        fewer = scene.count[0] == 3
        scene.kind[0, 2] = -1 if fewer else scene.kind[0, 0]
        scene.colour[0, 2] = -1 if fewer else scene.colour[0, 0]
    elif change == "size":
        scene.size[0] = (scene.size[0] + rng.integers(1, 3)) % 3
    else:
        scene.background[0] = 1 - scene.background[0]
    return scene, change


def _name(scenes: Scenes, n: int, k: int) -> str:
    return f"{COLOURS[scenes.colour[n, k]]} {KINDS[scenes.kind[n, k]]}"


def _pair_caption(
    scenes: Scenes,
    n: int,
    rng: np.random.Generator,
    opening: str,
    tail: str,
    open_colours: bool,
    plain_share: float,
) -> tuple[str, Request]:
    relation = RELATIONS[scenes.relation[n]]
    order = [0, 1]
    plain = relation in ("left of", "right of") and rng.random() < plain_share
    if rng.random() < 0.5 or plain:
        # Name the other object first; a plain "and" always goes from left to right.
        if not plain or relation == "right of":
            order, relation = [1, 0], OPPOSITE[relation]
    kinds = [KINDS[scenes.kind[n, k]] for k in order]
    colours = [None if open_colours else COLOURS[scenes.colour[n, k]] for k in order]
    names = [
        article(kind if colour is None else f"{colour} {kind}")
        for kind, colour in zip(kinds, colours, strict=True)
    ]
    link = "and" if plain else RELATION_PHRASES[relation][rng.choice(3, p=(0.5, 0.3, 0.2))]
    things = tuple(Thing(kind, colour) for kind, colour in zip(kinds, colours, strict=True))
    request = Request(things, None if plain else relation, BACKGROUNDS[scenes.background[n]])
    return f"{opening}{names[0]} {link} {names[1]}{tail}", request


def _count_question(objects: list[tuple[str, str]], rng: np.random.Generator) -> Question:
    kind, colour = objects[rng.integers(len(objects))]
    if rng.random() < 0.4:
        return Question("count", "how many objects are there?", NUMBERS[len(objects)])
    if rng.random() < 0.3:
        kind = KINDS[rng.integers(len(KINDS))]
    if rng.random() < 0.5:
        number = sum(k == kind for k, _ in objects)
        mentions = ((plural(kind), find_object(objects, kind, None)),)
        return Question("count", f"how many {plural(kind)} are there?", NUMBERS[number], mentions)
    number = sum((k, c) == (kind, colour) for k, c in objects)
    mentions = ((plural(kind), find_object(objects, kind, colour)),)
    return Question("count", f"how many {colour} {plural(kind)} are there?", NUMBERS[number], mentions)


def _exist_question(objects: list[tuple[str, str]], rng: np.random.Generator) -> Question:
    kind, colour = objects[rng.integers(len(objects))]
    form = rng.integers(3)
    if rng.random() < 0.5:
        if form == 0 or (form == 2 and rng.random() < 0.5):
            kind = KINDS[rng.integers(len(KINDS))]
        else:
            colour = COLOURS[rng.integers(len(COLOURS))]
    text, word, wanted = (
        (f"is there {article(kind)}?", kind, (kind, None)),
        (f"is there something {colour}?", colour, (None, colour)),
        (f"is there {article(colour + ' ' + kind)}?", kind, (kind, colour)),
    )[form]
    found = find_object(objects, *wanted)
    return Question("exist", text, _yes(found >= 0), ((word, found),))


def _pair_questions(
    scenes: Scenes,
    n: int,
    objects: list[tuple[str, str]],
    kinds: set[str],
    colours: set[str],
    rng: np.random.Generator,
) -> list[Question]:
    """Where an object is, and whether a relation holds, of objects named without doubt."""
    if len(kinds) == 2 and rng.random() < 0.5:
        names = [kind for kind, _ in objects]
    elif len(colours) == 2 and rng.random() < 0.4:
        names = [f"{colour} object" for _, colour in objects]
    else:
        names = [f"{colour} {kind}" for kind, colour in objects]
    relation = RELATIONS[scenes.relation[n]]
    sides = {"left of": "left", "right of": "right", "above": "top", "below": "bottom"}
    first = int(rng.integers(2))
    stated = relation if first == 0 else OPPOSITE[relation]
    words = [name.split()[-1] for name in names]
    where = Question("where", f"where is the {names[first]}?", sides[stated], ((words[first], first),))
    asked = stated if rng.random() < 0.5 else RELATIONS[rng.integers(len(RELATIONS))]
    link = RELATION_PHRASES[asked][rng.choice(3, p=(0.5, 0.3, 0.2))]
    relation_question = Question(
        "relation",
        f"is the {names[first]} {link} the {names[1 - first]}?",
        _yes(asked == stated),
        ((words[first], first), (words[1 - first], 1 - first)),
    )
    return [where, relation_question]


def _yes(right: bool) -> str:
    return "yes" if right else "no"
