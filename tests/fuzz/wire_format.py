"""Parsers of what comes from other sites."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

from fomoe_ext.fault.membership import read_current
from fomoe_ext.files.json_values import from_json, loads
from fomoe_ext.launch import messages
from fomoe_ext.layer.mesh import SiteRanks
from fomoe_ext.outer.announce import require_good
from fomoe_ext.outer.codec import get_codec
from fomoe_ext.outer.errors import MeetingError
from fomoe_ext.outer.reduce import broken_seals, seal
from fomoe_ext.placement import Placement, wire

from . import mutate
from .parser import Parser, as_json


def _status(raw: bytes) -> object:
    """What site 1 tells before a meeting."""
    row = torch.zeros(wire.STATUS_BYTES, dtype=torch.uint8)
    cut = raw[: wire.STATUS_BYTES]
    row[: len(cut)] = torch.frombuffer(bytearray(cut), dtype=torch.uint8) if cut else 0
    group = SimpleNamespace(size=2, gather_now=lambda own: (torch.stack([own, row]), 0))
    site: Any = SimpleNamespace(everyone=group, ranks=SiteRanks(), index=0)
    return require_good(site, _MEETING, "")


_MEETING = "3.0 0123abcd"
_GUARD = 64


def _payload_reader(name: str) -> Callable[[bytes], object]:
    """A parser of payloads: two bytes that tell the number of values and whether the payload is cut
    to its right size, then the payload."""
    codec = get_codec(name)

    def read(raw: bytes) -> object:
        raw = raw.ljust(2, b"\0")
        numel, fits = 1 + raw[0] + (4000 if raw[1] & 1 else 0), raw[1] & 6
        size = codec.wire_bytes(numel)
        body = raw[2:]
        if fits:
            body = (body * (1 + size // max(1, len(body))) + bytes(size))[:size]
        payload = (
            torch.frombuffer(bytearray(body), dtype=torch.uint8)
            if body
            else torch.empty(0, dtype=torch.uint8)
        )
        kept = torch.full((numel + 2 * _GUARD,), 7.0)
        try:
            codec.decode(payload, numel, out=kept[_GUARD:-_GUARD])
        except ValueError as error:
            if len(body) == size and "NaN or infinite" not in str(error):
                raise AssertionError(f"a payload of {size} bytes is refused: {error}") from error
            raise
        if len(body) != size:
            raise AssertionError(f"a payload of {len(body)} bytes is taken for {size}")
        guards = torch.cat([kept[:_GUARD], kept[-_GUARD:]])
        if not bool((guards == 7).all()):
            raise AssertionError("decoding wrote past its values")
        own = torch.ones(numel)
        codec.decode_sum(torch.stack([payload, payload]), numel, own=own, own_rank=1)
        codec.reduce(payload[None], numel, torch.empty_like(payload), own=own)
        return kept

    return read


def _seal(raw: bytes) -> object:
    """A payload with its hash; its size is that of the bucket, whatever was sent."""
    row = torch.frombuffer(bytearray(raw.ljust(wire.HASH_BYTES, b"\0")), dtype=torch.uint8)
    if broken_seals([row]):
        raise ValueError("damaged")
    return row


def _sealed(values: torch.Tensor) -> bytes:
    row = torch.cat([values.view(torch.uint8), torch.zeros(wire.HASH_BYTES, dtype=torch.uint8)])
    seal(row[None])
    return bytes(row.tolist())


_MESSAGES = [
    {
        "placement": Placement.cyclic(
            num_sites=2, num_experts=4, num_layers=1, replication=1
        ).to_dict(),
        "codec": "int4",
        "seed": 0,
    },
    [("", {"a.weight": (48, "torch.float32 of shape [3, 4]")})],
    {(0, 1): 2**64 - 1, (1,): 3},
    [float("nan"), 0.1, None, True],
]


def wire_parsers() -> list[Parser]:
    chance = torch.Generator().manual_seed(0)
    encoded = [messages.encode(value) for value in _MESSAGES]
    parsers = [
        Parser("JSON values", lambda raw: from_json(loads(raw)), (ValueError,), encoded, share=3.0),
        Parser(
            "messages",
            lambda raw: messages.decode(raw, "site 1"),
            (messages.MessageError,),
            encoded,
            share=3.0,
        ),
        Parser(
            "membership record",
            lambda raw: read_current(raw, 4),
            (ValueError,),
            as_json({"name": "7.2.1-1-3", "members": [0, 1, 3]}, {"name": "1.1.", "members": []}),
        ),
        Parser(
            "statuses",
            _status,
            (MeetingError,),
            [f"{_MEETING} ".encode(), f"{_MEETING} the value of a is NaN".encode()],
            mutate.of_bytes,
        ),
        Parser(
            "seals",
            _seal,
            (ValueError,),
            [_sealed(torch.randn(n, generator=chance)) for n in (1, 30)],
            mutate.of_bytes,
        ),
    ]
    for name in wire.CODECS:
        codec, corpus = get_codec(name), []
        for extra, count in ((0, 70), (0, 200), (1, 96)):
            values = torch.randn(1 + count + 4000 * extra, generator=chance)
            payload = codec.encode(values)
            corpus.append(bytes((count, 2 + extra)) + bytes(payload.tolist()))
            corpus.append(bytes((count, extra)) + bytes(payload.tolist()))
        reader = _payload_reader(name)
        parsers.append(Parser(f"payload {name}", reader, (ValueError,), corpus, mutate.of_bytes))
    return parsers
