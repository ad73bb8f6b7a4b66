"""Breaks things at random: plain JSON values, and bytes."""

from __future__ import annotations

import copy
import json
from random import Random
from typing import Any

JUNK: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 10**30, -(2**63), 0.0, -0.0, 1e308, "", "nan", "inf", "x" * 300, "\x00", "é\ud7ff",
    "<script>alert(1)</script>", "../../etc/passwd", [], {}, [[]], [None], {"": None}, [1, "a"], {"a": {"b": []}},
)  # fmt: skip


def places(value: Any) -> list[tuple[Any, Any]]:
    """(container, key) of everything inside a JSON value."""
    found: list[tuple[Any, Any]] = []
    todo = [value]
    while todo:
        item = todo.pop()
        keys = list(item) if isinstance(item, dict) else range(len(item)) if isinstance(item, list) else []
        for key in keys:
            found.append((item, key))
            todo.append(item[key])
    return found


def _walked(value: Any, random: Random) -> tuple[Any, Any]:
    """(container, key) of one thing inside: at each level each is as likely as the others, large or small."""
    while True:
        key = random.choice(list(value) if isinstance(value, dict) else range(len(value)))
        if not value[key] or not isinstance(value[key], (dict, list)) or random.random() < 0.25:
            return value, key
        value = value[key]


def mutated(value: Any, random: Random, most: int = 3) -> Any:
    """A copy with one to ``most`` things deleted, replaced, exchanged, doubled or added."""
    value = copy.deepcopy(value)
    for _ in range(random.randint(1, most)):
        here = places(value)
        if not here:
            return random.choice(JUNK)
        # Three in four from the top down, so that the one key counts as much as the 40,000 samples beside it.
        container, key = _walked(value, random) if random.random() < 0.75 else random.choice(here)
        what = random.randrange(5)
        if what == 0:
            del container[key]
        elif what == 1:
            container[key] = copy.deepcopy(random.choice(JUNK))
        elif what == 2:
            other, where = random.choice(here)
            container[key] = copy.deepcopy(other[where]) if isinstance(other, dict) or where < len(other) else None
        elif what == 3 and isinstance(container, list):
            container.insert(key, copy.deepcopy(container[key]))
        elif isinstance(container, dict):
            container[random.choice(("new", "__class__", "schema", ""))] = copy.deepcopy(random.choice(JUNK))
    return value


def mutated_bytes(data: bytes, random: Random, most: int = 4) -> bytes:
    """A copy with one to ``most`` cuts, flips, insertions, deletions or repetitions."""
    changed = bytearray(data)
    for _ in range(random.randint(1, most)):
        at = random.randrange(len(changed) + 1)
        span = random.choice((1, 1, 2, 7, 64, 4096))
        what = random.randrange(6)
        if what == 0:
            del changed[at:]
        elif what == 1 and at < len(changed):
            changed[at] ^= 1 << random.randrange(8)
        elif what == 2:
            changed[at:at] = random.randbytes(span)
        elif what == 3:
            del changed[at : at + span]
        elif what == 4:
            changed[at:at] = changed[at : at + span]
        else:
            changed[at : at + span] = bytes(len(changed[at : at + span]))
    return bytes(changed)


def mutated_json(value: Any, random: Random) -> bytes:
    """A JSON text, broken as a value or, one time in four, as bytes."""
    if random.random() < 0.25:
        return mutated_bytes(json.dumps(value).encode(), random)
    return json.dumps(mutated(value, random)).encode()
