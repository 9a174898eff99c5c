"""Ways to spoil a file: its bytes, the tree of values in it, and the header of a safetensors file."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from random import Random
from typing import Any

DEEP = "[" * 50_000
NASTY: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2, 7, 2**31, 2**63, 10**30, -(10**30), 1e29, 0.5, -0.0),
    *(float("nan"), float("inf"), "", "x", "0", "1e9", "é集", "\0", "../x", "/etc/passwd", "C:\\x", "CON"),
    *(
        "x" * 10_000,
        "(a+)+$",
        "*",
        "${HOME}",
        "__import__('os').system('x')",
        [],
        {},
        [[]],
        [None],
        {"": None},
    ),
    *(
        [1] * 1000,
        {"a": {"a": {"a": 1}}},
        ["../x"],
        [-1, -1],
        [2**40, 2**40],
        [0],
        [1, 2, 3, 4, 5, 6, 7, 8, 9],
    ),
)


def spoil_bytes(data: bytes, random: Random) -> bytes:
    """The bytes with one to three changes: flipped, cut, doubled, zeroed, lengthened, or others put in."""
    for _ in range(random.randint(1, 3)):
        size = len(data)
        start = random.randrange(size + 1)
        length = random.choice((1, 2, 8, 100, 4096))
        what = random.randrange(6)
        if what == 0 and size:
            place = random.randrange(min(size, random.choice((16, 300, size))))
            data = data[:place] + bytes([data[place] ^ (1 << random.randrange(8))]) + data[place + 1 :]
        elif what == 1:
            data = data[:start]
        elif what == 2:
            data = data[:start] + data[start : start + length] * 2 + data[start + length :]
        elif what == 3:
            data = data[:start] + bytes(min(length, size - start)) + data[start + length :]
        elif what == 4:
            data += random.randbytes(length)
        else:
            data = data[:start] + random.randbytes(length) + data[start:]
    return data


def spoil_tree(tree: Any, random: Random) -> Any:
    """A copy of a tree of plain values with one to three places changed, left out, doubled or swapped."""
    tree = copy.deepcopy(tree)
    for _ in range(random.randint(1, 3)):
        places = list(_places(tree))
        if not places:
            return random.choice(NASTY)
        parent, key = random.choice(places)
        what = random.randrange(8)
        if what == 0:
            del parent[key]
        elif what == 1 and isinstance(parent, dict):
            parent[random.choice(("", "x", "__proto__", "../x", f"{key}x"))] = parent.pop(key)
        elif what == 2:
            other, other_key = random.choice(places)
            try:
                parent[key] = copy.deepcopy(other[other_key])
            except (KeyError, IndexError):  # it went with its parent
                continue
        elif what == 3 and isinstance(parent, list):
            parent.insert(0, parent[key])
        elif what == 4 and isinstance(parent[key], (int, float)) and not isinstance(parent[key], bool):
            parent[key] = random.choice(
                (-parent[key], parent[key] + 1, parent[key] * 2, str(parent[key]), [parent[key]])
            )
        else:
            parent[key] = copy.deepcopy(random.choice(NASTY))
    return tree


def spoil_json(data: bytes, random: Random) -> bytes:
    """A JSON text spoilt as a tree, as bytes, or nested without end."""
    what = random.randrange(10)
    if what == 0:
        return spoil_bytes(data, random)
    if what == 1:
        return random.choice(
            (DEEP.encode(), b'{"a":' * 50_000, b"", b"null", b"5", b"[]", b'"x"', b"\xff\xfe", b"9" * 9999)
        )
    return json.dumps(spoil_tree(json.loads(data), random)).encode()


def spoil_safetensors(data: bytes, random: Random) -> bytes:
    """A safetensors file spoilt in its bytes, the length of its header, or the header's values."""
    what = random.randrange(6)
    if what == 0:
        return spoil_bytes(data, random)
    if what == 1:
        return random.choice((0, 1, 7, 2**20, 2**40, 2**63, 2**64 - 1)).to_bytes(8, "little") + data[8:]
    end = 8 + int.from_bytes(data[:8], "little")
    header = spoil_json(data[8:end], random)
    return len(header).to_bytes(8, "little") + header + data[end:]


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """(parent, key) of every value below a tree."""
    pairs = (
        list(tree.items())
        if isinstance(tree, dict)
        else list(enumerate(tree))
        if isinstance(tree, list)
        else []
    )
    for key, value in pairs:
        yield tree, key
        yield from _places(value)
