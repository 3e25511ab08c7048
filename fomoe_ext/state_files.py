"""A state of tensors and plain values, in nested dicts, as one safetensors file.

Tensors are named by the JSON list of the keys that lead to them; what is no tensor is JSON in the
file's header. Nothing in it is a pickle.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fomoe_ext.files import replace_file
from fomoe_ext.json_values import from_json, loads, to_json

_PLAIN = "state"


def write_state(path: Path, state: Mapping[str, Any]) -> None:
    """Writes a file, whole or not at all.

    Keys of dicts with tensors are strings. Raises TypeError, naming the place, for what
    `json_values.to_json` does not take.
    """
    tensors: dict[str, Tensor] = {}
    plain = json.dumps(to_json(_without_tensors(state, (), tensors)), allow_nan=False)
    with replace_file(path) as temporary:
        save_file(tensors, temporary, metadata={_PLAIN: plain})


def _without_tensors(value: Any, keys: tuple[Any, ...], tensors: dict[str, Tensor]) -> Any:
    """The value, whose tensors go to `tensors`, as copies of their own."""
    if not isinstance(value, Mapping):
        return value
    rest = {}
    for key, item in value.items():
        where = (*keys, key)
        if isinstance(item, Tensor):
            tensors[json.dumps(where)] = item.detach().cpu().clone().contiguous()
        else:
            rest[key] = _without_tensors(item, where, tensors)
    return rest


def read_state(path: Path) -> dict[str, Any]:
    """What `write_state` wrote, its tensors on the CPU. Raises ValueError, naming the file, for
    any other content; OSError where it cannot be read."""
    try:
        with safe_open(path, framework="pt") as file:
            state = from_json(loads((file.metadata() or {})[_PLAIN]))
            for name in file.keys():  # noqa: SIM118  it is no dict
                *boxes, last = loads(name)
                box = state
                for key in boxes:
                    box = box[key]
                if last in box:
                    raise ValueError(f"{name} is there twice")
                box[last] = file.get_tensor(name)
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no file of a state, or damaged ({error!r})") from None
    if not isinstance(state, dict):
        raise ValueError(f"{path} is no file of a state, or damaged")
    return state
