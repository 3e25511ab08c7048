"""Damages valid inputs: bytes anywhere, and values within JSON and numbers within text."""

from __future__ import annotations

import copy
import json
import random
import re
from collections.abc import Callable, Sequence
from typing import Any

_NUMBERS = (0, -1, 1, 2, 3, 255, 2**31, 2**32 - 1, 2**63, -(2**63), 10**12, 10**30, 0.5, -0.0)
_VALUES = (*_NUMBERS, None, True, False, "", "x", "../../x", "\0", "é", "\ud800", [], [[]], {}, [0])
_VALUES += ({"$float": "7ff8000000000000"}, {"$tuple": [1]}, {"$items": [[{"$tuple": []}, 1]]})
_TOKENS = tuple(json.dumps(value).encode() for value in _VALUES)
_TOKENS += (b"NaN", b"-Infinity", b"1e999", b"nan", b"inf", b"1" * 5000, b"[" * 2000)
_TOKENS += (b"{", b"}", b"]", b'"', b"\\", b"\n", b"\0", b"\xff\xfe", b"'''", b"=", b",")
_NUMBER = re.compile(rb"-?\d+(\.\d+)?")
_WORD = re.compile(rb"\w+")

Mutator = Callable[[random.Random, Sequence[bytes]], bytes]


def _damaged(chance: random.Random, raw: bytes, others: Sequence[bytes]) -> bytes:
    """One change of some bytes."""
    at = chance.randint(0, len(raw))
    end = min(len(raw), at + 1 + chance.choice((0, 0, 1, 7, chance.randrange(64))))
    kind = chance.randrange(9)
    if kind == 0 and at < len(raw):
        return raw[:at] + bytes((raw[at] ^ 1 << chance.randrange(8),)) + raw[at + 1 :]
    if kind == 1:
        return raw[:at] + chance.randbytes(end - at) + raw[end:]
    if kind == 2:
        return raw[:at] + raw[end:]
    if kind == 3:
        return raw[:at]
    if kind == 4:
        return raw[:end] + raw[at:]
    if kind == 5:
        other = chance.choice(others)
        return raw[:at] + other[chance.randint(0, len(other)) :]
    if kind == 6:
        return raw[:at] + chance.choice(_TOKENS) + raw[end:]
    found = list((_NUMBER if kind == 7 else _WORD).finditer(raw[at : at + 400]))
    if not found:
        return chance.randbytes(chance.randrange(40))
    one = chance.choice(found)
    return raw[: at + one.start()] + chance.choice(_TOKENS) + raw[at + one.end() :]


def of_bytes(chance: random.Random, corpus: Sequence[bytes]) -> bytes:
    """A valid input with one to four changes of its bytes."""
    raw = chance.choice(corpus)
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        raw = _damaged(chance, raw, corpus)
    return raw


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every container and key within a value of JSON."""
    found = []
    todo = [value]
    while todo:
        box = todo.pop()
        keys = box if isinstance(box, dict) else range(len(box)) if isinstance(box, list) else ()
        for key in keys:
            found.append((box, key))
            todo.append(box[key])
    return found


def _some(chance: random.Random) -> Any:
    """One of the values, a copy of its own."""
    return copy.deepcopy(chance.choice(_VALUES))


def changed(chance: random.Random, value: Any) -> Any:
    """A changed JSON value, in place if possible: another value, or a key added or removed."""
    places = _places(value)
    if not places:
        return _some(chance)
    box, key = chance.choice(places)
    kind = chance.randrange(6)
    if kind == 0:
        del box[key]
    elif kind == 1:
        other, name = chance.choice(places)
        box[key] = copy.deepcopy(other[name]) if name in _keys(other) else None
    elif kind == 2 and isinstance(box, dict):
        box[chance.choice(("$tuple", "$float", "", "x", "a" * 40, "../x", "\0"))] = box.pop(key)
    elif kind == 3 and isinstance(box, list):
        box.append(_some(chance))
    else:
        box[key] = _some(chance)
    return value


def _keys(box: Any) -> Any:
    return box if isinstance(box, dict) else range(len(box))


def of_json(chance: random.Random, corpus: Sequence[bytes]) -> bytes:
    """A valid JSON text with changed values or, one time in three, with changed bytes."""
    if chance.randrange(3) == 0:
        return of_bytes(chance, corpus)
    value = json.loads(chance.choice(corpus))
    for _ in range(chance.choice((1, 1, 2, 3))):
        value = changed(chance, value)
    return json.dumps(value).encode()


def of_safetensors(chance: random.Random, corpus: Sequence[bytes]) -> bytes:
    """A safetensors file with a changed header, or with other bytes."""
    if chance.randrange(3) == 0:
        return of_bytes(chance, corpus)
    raw = chance.choice(corpus)
    end = 8 + int.from_bytes(raw[:8], "little")
    header = of_json(chance, [raw[8:end]])
    length = chance.choice((len(header),) * 8 + (0, end, 2**63, 2**64 - 1, len(raw)))
    return length.to_bytes(8, "little") + header + raw[end:]
