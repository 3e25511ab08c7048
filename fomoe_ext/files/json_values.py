"""Values as JSON and back, with what JSON lacks: tuples, dicts of any keys, every float."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from typing import Any, NoReturn

MOST_NESTED = 100
"""Lists, tuples and dicts within each other; a limit of our own, for Python's own one is moved by
libraries."""
_TOO_DEEP = f"a value is nested too deeply, more than {MOST_NESTED} times"


def to_json(value: Any, where: str = "state") -> Any:
    """A value of None, bools, ints, floats, strings, lists, tuples and dicts as JSON has it.

    Floats come back bit for bit, dicts with their types of keys. Raises TypeError, naming the
    place, for anything else, ValueError for more than MOST_NESTED of them within each other.
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
    """What `to_json` was given. Raises ValueError for what it never makes."""
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
        # What stands with a mark is one value: its brackets do not count again.
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
    """JSON text, or its UTF-8 bytes, read strictly; what comes from disk or wire is read by this.

    As `json.loads`, but ValueError is all that it raises, whatever the text: also for one that is
    nested too deeply to be read and, without `nan`, for NaN and Infinity, which JSON has not.
    """
    try:
        content = text if isinstance(text, str) else text.decode("utf-8")
        return json.loads(content, parse_constant=None if nan else _refuse)
    except RecursionError:
        raise ValueError("JSON is nested too deeply") from None


def _refuse(name: str) -> NoReturn:
    raise ValueError(f"JSON has no {name}")
