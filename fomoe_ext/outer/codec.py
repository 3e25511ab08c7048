"""Codecs: encoding deltas as bytes for the wire and decoding them, and hashes of bits.

The formats are described in csrc/kernels.h. The ops `delta_encode` and `delta_reduce` implement
them in one pass over the data each. Stochastic rounding takes its random bits from a counter: value
i of a call uses number first + i of the stream `seed`, so that the same seed gives the same bytes
anywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fomoe_ext.ops.schemas import by_name
from fomoe_ext.ops.shapes import register_shapes
from fomoe_ext.placement import wire

__all__ = ["Codec", "DeltaPart", "get_codec", "hash_bits"]

Rounding = Literal["nearest", "stochastic"]

_FORMATS = {"fp32": 0, "bf16": 1, "int8": 2, "int4": 3, "int2": 4, "topk": 5}
_delta_encode = by_name("delta_encode")
_delta_reduce = by_name("delta_reduce")
_hash_bits = by_name("hash_bits")


class DeltaPart(NamedTuple):
    """The values that one tensor contributes: those from `begin` to the next part's `begin`.

    `local` is flat, float32, bfloat16 or float16; None = these values are zero.
    """

    local: Tensor | None
    begin: int
    weight: float = 1.0


class Codec:
    """Turns flat fp32 values into payloads (flat uint8) and back, on any device that has the ops.

    The size of a payload depends only on the number of values. Decoding depends only on the payload
    and that number, so everyone who decodes the same bytes gets the same bits. Codecs are equal if
    they produce the same bytes.

    Args:
        name: one of `fomoe_ext.placement.wire.CODECS`. "fp32", "bf16": the values, rounded to
            nearest even. "int8", "int4", "int2": blocks of 64 values (with "-128" of 128) that
            share a step.
            "topk": of every 4096 values the 64 largest, as one of two magnitudes with a sign.
        rounding: how int8, int4 and int2 round: "nearest", or "stochastic", with the exact value as
            expected value.

    Attributes:
        lossy: whether decoding may give other values than were encoded; False for "fp32" only.

    Methods raise ValueError for bad arguments and, on the CPU, for a value that is NaN or infinite,
    which they name; their output is undefined then. On CUDA NaN is encoded as NaN.

    Error feedback (Seide et al., 2014; Karimireddy et al., arXiv 1901.09847): `error` is added to
    the values, and then set to the difference between that sum and what the payload decodes to.
    """

    def __init__(self, name: str, rounding: Rounding = "nearest") -> None:
        wire.wire_bytes(name, 0)  # refuses unknown names
        if rounding not in ("nearest", "stochastic"):
            raise ValueError(f"rounding must be nearest or stochastic, got {rounding!r}")
        self.name, self.rounding, self.lossy = name, rounding, name != "fp32"
        base, _, block = name.partition("-")
        stochastic = rounding == "stochastic" and base.startswith("int")
        self._format = {
            "format": _FORMATS[base],
            "block": int(block or 64),
            "stochastic": stochastic,
        }

    def __repr__(self) -> str:
        return f"Codec({self.name!r}, rounding={self.rounding!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Codec) and self._format == other._format

    def __hash__(self) -> int:
        return hash(tuple(self._format.values()))

    def wire_bytes(self, numel: int) -> int:
        """Bytes of the payload of `numel` values."""
        return wire.wire_bytes(self.name, numel)

    def encode(
        self, values: Tensor, *, error: Tensor | None = None, seed: int = 0, first: int = 0
    ) -> Tensor:
        """Flat fp32 [n] (plus `error`, fp32 [n], updated in place) -> uint8 [wire_bytes(n)]."""
        if values.dtype != torch.float32 or values.dim() != 1:
            raise ValueError(
                f"values must be a flat float32 tensor, got {values.dtype} {list(values.shape)}"
            )
        numel = values.numel()
        out = torch.empty(self.wire_bytes(numel), dtype=torch.uint8, device=values.device)
        part = DeltaPart(values.contiguous(), 0)
        self.encode_delta([part], numel, out, error=error, seed=seed, first=first)
        return out

    def encode_delta(
        self,
        parts: Sequence[DeltaPart],
        numel: int,
        out: Tensor,
        *,
        anchor: Tensor | None = None,
        error: Tensor | None = None,
        seed: int = 0,
        first: int = 0,
    ) -> None:
        """Encodes weight * (anchor - local), or weight * local without an anchor, plus `error`.

        Args:
            parts: the tensors with the values, `begin` ascending from 0. The anchor is rounded to
                a part's dtype first, so that the delta of an unchanged parameter is exactly 0.
            numel: number of values.
            out: uint8 [wire_bytes(numel)], written; may be a view at any offset.
            anchor: fp32 [numel].
            error: fp32 [numel], updated in place.
            seed: 0 .. 2^63 - 1, chooses the random bits of stochastic rounding.
            first: the index of value 0 in their stream.
        """
        ends = [*(part.begin for part in parts[1:]), numel]
        given = [(p, end) for p, end in zip(parts, ends, strict=False) if p.begin != end]
        nothing = out.new_empty(0, dtype=torch.float32)
        _delta_encode(
            anchor=anchor,
            local=[nothing if part.local is None else part.local for part, _ in given],
            begins=[part.begin for part, _ in given],
            weights=[float(part.weight) for part, _ in given],
            error=error,
            numel=numel,
            seed=seed,
            first=first,
            payload=out,
            **self._format,
        )

    def decode(self, payload: Tensor, numel: int, out: Tensor | None = None) -> Tensor:
        """Payload uint8 [wire_bytes(numel)] -> fp32 [numel], a new tensor or `out`."""
        if payload.dtype != torch.uint8 or payload.dim() != 1:
            raise ValueError(
                f"payload must be a flat uint8 tensor, got {payload.dtype} {list(payload.shape)}"
            )
        return self.decode_sum(payload[None], numel, out=out)

    def decode_sum(
        self,
        payloads: Tensor | Sequence[Tensor],
        numel: int,
        *,
        own: Tensor | None = None,
        own_rank: int = 0,
        out: Tensor | None = None,
    ) -> Tensor:
        """The sum of the members' values, fp32 [numel], added in rank order.

        `payloads`: uint8 [members, wire_bytes(numel)], or as many flat ones; with `own`, fp32
        [numel], they are those of the others and member `own_rank` gives `own` as it is.
        """
        rows = self._rows(payloads, numel, own)
        if out is None:
            out = torch.empty(numel, dtype=torch.float32, device=rows.device)
        _delta_reduce(
            payloads=rows,
            own=own,
            own_rank=own_rank,
            error=None,
            numel=numel,
            seed=0,
            first=0,
            payload=None,
            sum=out,
            **self._format,
        )
        return out

    def reduce(
        self,
        payloads: Tensor | Sequence[Tensor],
        numel: int,
        out: Tensor,
        *,
        own: Tensor | None = None,
        own_rank: int = 0,
        error: Tensor | None = None,
        seed: int = 0,
        first: int = 0,
    ) -> None:
        """Encodes the sum of the members' values (as in `decode_sum`), plus `error`, into `out`.

        In one pass, so the sum is never stored. `error`, `seed`, `first` as in `encode_delta`;
        `out` must not overlap `payloads`.
        """
        rows = self._rows(payloads, numel, own)
        _delta_reduce(
            payloads=rows,
            own=own,
            own_rank=own_rank,
            error=error,
            numel=numel,
            seed=seed,
            first=first,
            payload=out,
            sum=None,
            **self._format,
        )

    def _rows(self, payloads: Tensor | Sequence[Tensor], numel: int, own: Tensor | None) -> Tensor:
        if isinstance(payloads, Tensor):
            return payloads
        if len(payloads):
            return torch.stack(list(payloads))
        if own is None:
            raise ValueError("payloads must not be empty where own is not given")
        return torch.empty(0, self.wire_bytes(numel), dtype=torch.uint8, device=own.device)


def get_codec(name: str | Codec, rounding: Rounding = "nearest") -> Codec:
    """The codec of a name in `fomoe_ext.placement.wire.CODECS`, or the codec given, as it is.

    ValueError for an unknown name.
    """
    return name if isinstance(name, Codec) else Codec(name, rounding)


def hash_bits(tensors: Sequence[Tensor]) -> list[int]:
    """A 64-bit hash of the bits of each tensor, unsigned: equal bits, equal hashes on any device.

    Any dtype and shape, contiguous, all on one device. Shapes and dtypes are not part of the hash.
    It detects accidental damage, not tampering.
    """
    if not len(tensors):
        return []
    return [h & 0xFFFFFFFFFFFFFFFF for h in _hash_bits(tensors=list(tensors)).tolist()]


@register_shapes("delta_encode")
def _() -> None:
    return None


@register_shapes("delta_reduce")
def _() -> None:
    return None


@register_shapes("hash_bits")
def _(tensors: list[Tensor]) -> Tensor:
    return tensors[0].new_empty(len(tensors), dtype=torch.int64)
