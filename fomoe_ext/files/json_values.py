"""Values as JSON and back, including tuples, dicts with any keys and all floats."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from typing import Any, NoReturn

MOST_NESTED = 100
"""Limit of nested lists, tuples and dicts. Libraries change Python's own recursion limit, so this
one is independent of it."""
_TOO_DEEP = f"a value is nested too deeply, more than {MOST_NESTED} times"


def to_json(value: Any, where: str = "state") -> Any:
    """A value of None, bools, ints, floats, strings, lists, tuples and dicts as JSON values.

    `from_json` returns floats bit for bit and dicts with keys of the same types. Raises TypeError,
    naming the place, for other values, and ValueError for nesting deeper than MOST_NESTED.
    """
    return _plain(value, where, MOST_NESTED)


def _plain(value: Any, where: str, depth: int) -> Any:
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"$float": struct.pack(">d", value).hex()}
    if depth == 0 and isinstance(value, list | tuple | Mapping):
        raise ValueError(_TOO_DEEP)
    if isinstance(value, list | tuple):
        items = [_plain(item, f"{where}[{i}]", depth - 1) for i, item in enumerate(value)]
        return items if isinstance(value, list) else {"$tuple": items}
    if isinstance(value, Mapping):
        items = [
            [
                _plain(key, f"a key of {where}", depth - 1),
                _plain(item, f"{where}[{key!r}]", depth - 1),
            ]
            for key, item in value.items()
        ]
        plain = all(isinstance(key, str) and not key.startswith("$") for key in value)
        return dict(items) if plain else {"$items": items}
    raise TypeError(f"{where} must be of numbers, strings, lists and dicts, got {type(value)}")


def from_json(value: Any) -> Any:
    """The value that `to_json` was called with. Raises ValueError for any other JSON."""
    return _value(value, MOST_NESTED)


def _value(value: Any, depth: int) -> Any:
    if depth == 0 and isinstance(value, list | dict):
        raise ValueError(_TOO_DEEP)
    depth -= 1
    if isinstance(value, list):
        return [_value(item, depth) for item in value]
    if not isinstance(value, dict):
        return value
    marks = [key for key in value if key.startswith("$")]
    if not marks:
        return {key: _value(item, depth) for key, item in value.items()}
    mark, content = marks[0], value[marks[0]]
    if len(value) == 1:
        # The mark and its content are one value: the content does not count as another level.
        if mark == "$float" and isinstance(content, str):
            return _special_float(content)
        if mark == "$tuple" and isinstance(content, list):
            return tuple(_value(item, depth) for item in content)
        if mark == "$items" and isinstance(content, list):
            return _dict_of(content, depth)
    raise ValueError(f"{mark} must stand alone with its content, got {value!r:.60}")


def _special_float(digits: str) -> float:
    try:
        return struct.unpack(">d", bytes.fromhex(digits))[0]
    except (ValueError, struct.error):
        raise ValueError(f"$float must be 16 hexadecimal digits, got {digits!r:.60}") from None


def _dict_of(items: list[Any], depth: int) -> dict[Any, Any]:
    if not all(isinstance(item, list) and len(item) == 2 for item in items):
        raise ValueError(f"$items must be pairs of key and value, got {items!r:.60}")
    try:
        return {_value(key, depth): _value(item, depth) for key, item in items}
    except TypeError as error:  # a list or dict as key
        raise ValueError(f"$items must have keys that can be hashed ({error})") from None


def loads(text: str | bytes, *, nan: bool = False) -> Any:
    """Parses JSON text or UTF-8 bytes strictly; used for everything from disk or network.

    As `json.loads`, but it raises nothing except ValueError, also for nesting that is too deep and,
    without `nan`, for NaN and Infinity, which are not JSON.
    """
    try:
        content = text if isinstance(text, str) else text.decode("utf-8")
        return json.loads(content, parse_constant=None if nan else _refuse)
    except RecursionError:
        raise ValueError("JSON is nested too deeply") from None


def _refuse(name: str) -> NoReturn:
    raise ValueError(f"JSON has no {name}")
