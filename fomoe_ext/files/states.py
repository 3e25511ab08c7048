"""A state of tensors and plain values, in nested dicts, as one safetensors file.

Tensors are named by the JSON list of the keys that lead to them; what is no tensor is JSON in the
file's header, with the SHA-256 of all of it. Nothing in it is a pickle.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fomoe_ext.files.atomic import replace_file
from fomoe_ext.files.json_values import from_json, loads, to_json

_PLAIN, _DIGEST = "state", "sha256"


def write_state(path: Path, state: Mapping[str, Any]) -> None:
    """Writes a file, whole or not at all.

    Keys of dicts with tensors are strings. Raises TypeError, naming the place, for what
    `json_values.to_json` does not take, and OSError naming the file.
    """
    tensors: dict[str, Tensor] = {}
    plain = json.dumps(to_json(_without_tensors(state, (), tensors)), allow_nan=False)
    metadata = {_PLAIN: plain, _DIGEST: _digest(plain, tensors)}
    with replace_file(path) as temporary:
        try:
            save_file(tensors, temporary, metadata=metadata)
        except SafetensorError as error:  # a full disk, say
            raise OSError(f"could not write {path}: {error}") from error


def _digest(plain: str, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of all that a file holds."""
    digest = hashlib.sha256(plain.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        if tensor.numel():
            digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


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
            metadata = file.metadata() or {}
            state = from_json(loads(metadata[_PLAIN]))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  no dict
            # One of an earlier version has none.
            if metadata.get(_DIGEST, "") not in ("", _digest(metadata[_PLAIN], tensors)):
                raise ValueError("its content is not what was written")
            for name, tensor in tensors.items():
                *boxes, last = loads(name)
                box = state
                for key in boxes:
                    box = box[key]
                if last in box:
                    raise ValueError(f"{name} is there twice")
                box[last] = tensor
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no file of a state, or damaged ({error!r})") from None
    if not isinstance(state, dict):
        raise ValueError(f"{path} is no file of a state, or damaged")
    return state
