"""What processes tell each other besides tensors: JSON, never a pickle.

A message is a value of `json_values.to_json` as UTF-8 text. Its length travels before it, so that
nothing is allocated for a length that nobody means. What comes is data and nothing else: whoever
sends bytes can give wrong values, but cannot make the receiver run anything.
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
"""The longest message that is sent or read; the longest known ones, names of a large model's
tensors, have some 20 MB."""
_NO_MESSAGE = -1
"""The length that a process announces whose value is no message; it raises the reason itself."""


class MessageError(ValueError):
    """What a process sent is no message, or longer than one may be."""


def encode(value: Any) -> bytes:
    """A value as bytes.

    Raises TypeError, naming the place, for a value that `to_json` does not take, MessageError for
    one that takes more than MESSAGE_BYTES.
    """
    try:
        text = json.dumps(to_json(value, "message"), allow_nan=False, separators=(",", ":"))
    except ValueError as error:
        raise MessageError(f"no message: {error}") from None
    raw = text.encode()
    if len(raw) > MESSAGE_BYTES:
        raise MessageError(f"a message must have at most {MESSAGE_BYTES} bytes, has {len(raw)}")
    return raw


def decode(raw: bytes, sender: str) -> Any:
    """The value that `encode` was given. MessageError, naming the sender, for any other bytes."""
    check_length(len(raw), sender)
    try:
        return from_json(loads(raw))
    except ValueError as error:
        raise MessageError(f"{sender} sent what is no message ({error})") from None


def check_length(length: int, sender: str) -> None:
    """MessageError, naming the sender, for a length that no message has."""
    if length == _NO_MESSAGE:
        raise MessageError(f"{sender} has nothing that could be sent, it says why itself")
    if not 0 < length <= MESSAGE_BYTES:
        raise MessageError(
            f"{sender} announces a message of {length} bytes, wanted 1 to {MESSAGE_BYTES}"
        )


def gather_objects(value: Any, size: int, group: Any = None, who: str = "process") -> list[Any]:
    """What every process passed, by rank; a collective of the `size` processes of a group.

    Values are those of `to_json` and come back as they were. `group`: None = all processes. `who`:
    what messages call a process. With one process nothing is sent and the value itself is returned.
    Raises TypeError for a value of this process that is none of these, and then MessageError on the
    others; MessageError on all for a message that is too long or cannot be read.
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
    """What the first process of a group passed, at all of them; a collective of the group.

    `leads`: whether this is the first; the others' `value` is not looked at. `who`: what messages
    call it. The first gets its value back as it is; raises as `gather_objects`.
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
    """Where tensors of messages must be: on the CPU wherever the group has a backend for it."""
    on_cpu = "cpu:" in dist.get_backend_config(group)
    return torch.device("cpu") if on_cpu else torch.device("cuda", torch.cuda.current_device())


def _as_tensor(raw: bytes) -> Tensor:
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8)


def _as_bytes(tensor: Tensor) -> bytes:
    return tensor.cpu().numpy().tobytes()
