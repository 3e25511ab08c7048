"""Codecs: how fp32 values become bytes on the wire and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from fomoe_ext import wire


class Codec(Protocol):
    """Turns flat fp32 tensors into payloads (flat uint8) and back, on any device.

    A payload's size depends on the number of elements alone, and decoding on nothing but the
    payload, so that all who decode the same bytes get the same bits.
    """

    name: str

    def wire_bytes(self, numel: int) -> int:
        """Bytes of the payload of `numel` elements."""
        ...

    def encode(self, values: Tensor) -> Tensor:
        """Flat fp32 [n] -> uint8 [wire_bytes(n)]; may share memory with `values`."""
        ...

    def decode(self, payload: Tensor) -> Tensor:
        """Payload uint8 [wire_bytes(n)] -> fp32 [n]; may share memory with `payload`."""
        ...

    def decode_sum(self, payloads: Sequence[Tensor]) -> Tensor:
        """Payloads of equal size, in rank order -> their sum, fp32 [n], added in that order."""
        ...


class _CastCodec:
    """A codec that stores every value in another float type."""

    def __init__(self, name: str, dtype: torch.dtype) -> None:
        self.name, self._dtype = name, dtype

    def wire_bytes(self, numel: int) -> int:
        return wire.wire_bytes(self.name, numel)

    def encode(self, values: Tensor) -> Tensor:
        if values.dtype != torch.float32 or values.dim() != 1:
            raise ValueError(
                f"values must be a flat float32 tensor, got {values.dtype} {list(values.shape)}"
            )
        return values.contiguous().to(self._dtype).view(torch.uint8)

    def decode(self, payload: Tensor) -> Tensor:
        if payload.dtype != torch.uint8 or payload.dim() != 1:
            raise ValueError(
                f"payload must be a flat uint8 tensor, got {payload.dtype} {list(payload.shape)}"
            )
        if payload.numel() % self._dtype.itemsize:
            raise ValueError(
                f"payload of codec {self.name} must be a multiple of {self._dtype.itemsize} bytes, "
                f"got {payload.numel()}"
            )
        return payload.contiguous().view(self._dtype).float()

    def decode_sum(self, payloads: Sequence[Tensor]) -> Tensor:
        if not len(payloads):
            raise ValueError("payloads must not be empty")
        total = self.decode(payloads[0]).clone()
        for payload in payloads[1:]:
            total += self.decode(payload)
        return total


class Fp32Codec(_CastCodec):
    """The values as they are, four bytes each."""

    def __init__(self) -> None:
        super().__init__("fp32", torch.float32)


class Bf16Codec(_CastCodec):
    """bfloat16, two bytes each, rounded to nearest, ties to even (as torch converts)."""

    def __init__(self) -> None:
        super().__init__("bf16", torch.bfloat16)


_CODECS: dict[str, type[_CastCodec]] = {"fp32": Fp32Codec, "bf16": Bf16Codec}


def get_codec(name: str | Codec) -> Codec:
    """The codec of a name ("fp32", "bf16"), or the codec given. ValueError for an unknown name."""
    if not isinstance(name, str):
        return name
    if name not in _CODECS:
        raise ValueError(f"codec must be one of {', '.join(_CODECS)}, got {name!r}")
    return _CODECS[name]()
