"""Messages between processes that are not tensors: JSON, never a pickle.

A message is a value of `json_values.to_json` as UTF-8 text. Its length is sent first and checked
before memory is allocated. A received message is only data: a malicious sender can send wrong
values but cannot make the receiver execute anything.
"""

from __future__ import annotations

import json
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fomoe_ext.files.json_values import from_json, loads, to_json
from fomoe_ext.launch.waiting import wait_for

MESSAGE_BYTES = 1 << 28
"""The longest message that is sent or accepted. The longest in use, the tensor names of a large
model, has about 20 MB."""
_NO_MESSAGE = -1
"""Announced in place of a length by a process whose value cannot be sent; it raises the reason."""


class MessageError(ValueError):
    """A received message is malformed, or a message is too long."""


def encode(value: Any) -> bytes:
    """A value as bytes.

    Raises TypeError, naming the place, for a value that `to_json` does not take, MessageError for
    one that takes more than MESSAGE_BYTES.
    """
    try:
        text = json.dumps(to_json(value, "message"), allow_nan=False, separators=(",", ":"))
    except ValueError as error:
        raise MessageError(f"a message must be a value that JSON can hold: {error}") from None
    raw = text.encode()
    if len(raw) > MESSAGE_BYTES:
        raise MessageError(f"a message must have at most {MESSAGE_BYTES} bytes, got {len(raw)}")
    return raw


def decode(raw: bytes, sender: str) -> Any:
    """The value that was given to `encode`. Raises MessageError, naming the sender, for other
    bytes."""
    check_length(len(raw), sender)
    try:
        return from_json(loads(raw))
    except ValueError as error:
        raise MessageError(f"{sender} sent a malformed message ({error})") from None


def check_length(length: int, sender: str) -> None:
    """Raises MessageError, naming the sender, for a length that no message may have."""
    if length == _NO_MESSAGE:
        raise MessageError(f"{sender} could not send its value, and reports the reason itself")
    if not 0 < length <= MESSAGE_BYTES:
        raise MessageError(
            f"{sender}: the length of a message must be in [1, {MESSAGE_BYTES}], got {length}"
        )


def gather_objects(value: Any, size: int, group: Any = None, who: str = "process") -> list[Any]:
    """The values of all processes, by rank; a collective of the `size` processes of a group.

    Values must be ones that `to_json` takes; they are returned unchanged. `group`: None = all
    processes. `who`: the word for a process in errors. With one process the value itself is
    returned. If a process passes another kind of value, it raises TypeError and the others raise
    MessageError. All raise MessageError for a message that is too long or malformed.
    """
    if size == 1:
        return [value]
    raw, problem = _encoded(value)
    device = _device(group)
    own = torch.tensor([_NO_MESSAGE if problem else len(raw)], dtype=torch.int64, device=device)
    announced = [torch.empty_like(own) for _ in range(size)]
    wait_for(dist.all_gather(announced, own, group=group, async_op=True))
    if problem:
        raise problem
    lengths = [int(length) for length in announced]
    for rank, length in enumerate(lengths):
        check_length(length, f"{who} {rank}")
    padded = torch.zeros(max(lengths), dtype=torch.uint8, device=device)
    padded[: len(raw)] = _as_tensor(raw)
    rows = [torch.empty_like(padded) for _ in range(size)]
    wait_for(dist.all_gather(rows, padded, group=group, async_op=True))
    return [
        decode(_as_bytes(row[:length]), f"{who} {rank}")
        for rank, (row, length) in enumerate(zip(rows, lengths, strict=True))
    ]


def broadcast(value: Any, leads: bool, group: Any = None, who: str = "process 0") -> Any:
    """The value of the first process of a group; a collective of the group.

    `leads`: whether this is the first process; the `value` of others is ignored. `who`: the word
    for the first process in errors. Raises as `gather_objects`.
    """
    device = _device(group)
    raw, problem = _encoded(value) if leads else (b"", None)
    length = torch.tensor([_NO_MESSAGE if problem else len(raw)], dtype=torch.int64, device=device)
    dist.broadcast(length, group=group, group_src=0)
    if problem:
        raise problem
    check_length(int(length), who)
    body = torch.empty(int(length), dtype=torch.uint8, device=device)
    if leads:
        body.copy_(_as_tensor(raw))
    dist.broadcast(body, group=group, group_src=0)
    return value if leads else decode(_as_bytes(body), who)


def _encoded(value: Any) -> tuple[bytes, Exception | None]:
    try:
        return encode(value), None
    except (TypeError, MessageError) as error:
        return b"", error


def _device(group: Any) -> torch.device:
    """The device for messages: the CPU if the group has a backend for it, else the GPU."""
    on_cpu = "cpu:" in dist.get_backend_config(group)
    return torch.device("cpu") if on_cpu else torch.device("cuda", torch.cuda.current_device())


def _as_tensor(raw: bytes) -> Tensor:
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8)


def _as_bytes(tensor: Tensor) -> bytes:
    return tensor.cpu().numpy().tobytes()
