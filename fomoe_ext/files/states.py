"""A state of tensors and plain values, in nested dicts, as one safetensors file.

A tensor's name is the JSON list of the keys that lead to it. All other values are JSON in the
file's header, with a SHA-256 of the whole content. There is no pickle in it.
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
    """Writes a state to a file, atomically.

    Keys of dicts with tensors must be strings. Raises TypeError, naming the place, for values that
    `json_values.to_json` does not support, and OSError naming the file.
    """
    tensors: dict[str, Tensor] = {}
    plain = json.dumps(to_json(_without_tensors(state, (), tensors)), allow_nan=False)
    metadata = {_PLAIN: plain, _DIGEST: _digest(plain, tensors)}
    with replace_file(path) as temporary:
        try:
            save_file(tensors, temporary, metadata=metadata)
        except SafetensorError as error:  # a full disk, for example
            raise OSError(f"could not write {path}: {error}") from error


def _digest(plain: str, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of a file's whole content."""
    digest = hashlib.sha256(plain.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        if tensor.numel():
            digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _without_tensors(value: Any, keys: tuple[Any, ...], tensors: dict[str, Tensor]) -> Any:
    """The value without its tensors, which are copied to `tensors`."""
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
    """The state in a file of `write_state`, with tensors on the CPU. Raises ValueError, naming the
    file, for other content, and OSError if it cannot be read."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = from_json(loads(metadata[_PLAIN]))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  no dict
            # Files of earlier versions have no digest.
            if metadata.get(_DIGEST, "") not in ("", _digest(metadata[_PLAIN], tensors)):
                raise ValueError("its content is not what was written")
            for name, tensor in tensors.items():
                *boxes, last = loads(name)
                box = state
                for key in boxes:
                    box = box[key]
                if last in box:
                    raise ValueError(f"{name} occurs twice")
                box[last] = tensor
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} must be a state file, got another or a damaged one ({error!r})"
        ) from None
    if not isinstance(state, dict):
        raise ValueError(f"{path} must be a state file, got another or a damaged one")
    return state
