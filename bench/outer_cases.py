"""Shared by the benchmarks of codecs and of the all-reduce: deltas, errors of means, lower bounds,
rivals, links and crossovers. Nothing here measures time.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from common import normalised_error
from torch import Tensor

from fomoe_ext.outer.codec import Codec
from fomoe_ext.placement import wire

CODECS = ("fp32", "bf16", "int8", "int4", "int2", "topk")
VERBS = ("encode values", "encode delta", "decode sum", "reduce")
MEMBERS = 4  # whose payloads are added up

codec_results: list[dict[str, Any]] = []
error_results: list[dict[str, Any]] = []
allreduce_results: list[dict[str, Any]] = []


def load() -> float | None:
    """Load average of the last minute: running and waiting processes, including this one."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


# ---- processes -----------------------------------------------------------------------------------

_TAIL_LINES = 15  # of the output of processes that failed


def run_processes(
    script: Path,
    number: int,
    folder: Path,
    *arguments: str,
    link: str | None = None,
    timeout_s: int,
) -> dict[str, Any]:
    """Runs a script in `number` processes (sites or ranks), with or without a slow link.

    Returns the JSON that the first one writes to its --out. When a process fails: RuntimeError with
    the end of the output."""
    found = folder / "found.json"
    command = [sys.executable, "-m", "fomoe_ext.link", "--sites", str(number)]
    if link:
        command += ["--link", link]
    command += ["--log-dir", str(folder), "--", sys.executable, str(script), "--out", str(found)]
    done = subprocess.run(
        [*command, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        timeout=timeout_s,
    )
    if done.returncode:
        tail = "\n".join(done.stdout.splitlines()[-_TAIL_LINES:])
        raise RuntimeError(
            f"{script.name}, {number} processes: exit code {done.returncode}\n{tail}"
        )
    return json.loads(found.read_text())


# ---- errors of means -----------------------------------------------------------------------------


def site_deltas(sites: int, rows: int, width: int, seed: int = 0) -> Tensor:
    """Random deltas, fp32 [sites, rows * width]. The scales of rows are log-normal, and half of the
    variance is common to all sites.
    """
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *sizes: torch.randn(*sizes, generator=generator)
    scales = draw(rows, 1).exp()
    common = draw(rows, width)
    deltas = [scales * (common + draw(rows, width)) * 0.5**0.5 for _ in range(sites)]
    return torch.stack([delta.flatten() for delta in deltas])


def _shares(numel: int, sites: int) -> list[slice]:
    share = wire.share_elements(numel, sites)
    return [slice(rank * share, min(numel, (rank + 1) * share)) for rank in range(sites)]


def our_mean(codec: Codec, deltas: Tensor) -> Tensor:
    """The mean as `fomoe_ext.outer.reduce` computes it, without error feedback.

    The owner of a share sums the others' payloads and its own values, and encodes the sum: a value
    is encoded twice. Sparse payloads are summed by every site.
    """
    sites, numel = deltas.shape
    if wire.is_sparse(codec.name):
        return codec.decode_sum([codec.encode(delta) for delta in deltas], numel) / sites
    mean = torch.empty(numel)
    for owner, share in enumerate(_shares(numel, sites)):
        size = share.stop - share.start
        others = [codec.encode(deltas[s, share]) for s in range(sites) if s != owner]
        total = torch.empty(codec.wire_bytes(size), dtype=torch.uint8)
        codec.reduce(others, size, total, own=deltas[owner, share].contiguous(), own_rank=owner)
        mean[share] = codec.decode(total, size) / sites
    return mean


def ring_mean(codec: Codec, deltas: Tensor) -> Tensor:
    """The mean by a ring all-reduce: a value is encoded at every hop, once per site."""
    sites, numel = deltas.shape
    mean = torch.empty(numel)
    for owner, share in enumerate(_shares(numel, sites)):
        size = share.stop - share.start
        total = torch.zeros(size)
        for hop in range(1, sites + 1):  # the owner adds its values last
            total += deltas[(owner + hop) % sites, share]
            total = codec.decode(codec.encode(total), size)
        mean[share] = total / sites
    return mean


def mean_errors(codec: Codec, deltas: Tensor) -> dict[str, float]:
    """Relative L2 errors of `our_mean` and `ring_mean`."""
    exact = deltas.double().mean(0)
    return {
        "ours": normalised_error(our_mean(codec, deltas), exact),
        "ring": normalised_error(ring_mean(codec, deltas), exact),
    }


# ---- floors --------------------------------------------------------------------------------------


def least_bytes(verb: str, codec: Codec, numel: int, members: int = MEMBERS) -> int:
    """Bytes of a verb if each input is read once and each output written once.

    "encode delta" and "reduce" of a lossy codec also read and write its error. ValueError for
    another verb.
    """
    payload, values = codec.wire_bytes(numel), 4 * numel
    error = 2 * values if codec.lossy else 0
    if verb == "encode values":
        return values + payload
    if verb == "encode delta":
        return 2 * values + error + payload
    if verb == "decode sum":
        return members * payload + values
    if verb == "reduce":
        return (members - 1) * payload + values + error + payload
    raise ValueError(f"verb must be one of {', '.join(VERBS)}, got {verb!r}")


# ---- rivals --------------------------------------------------------------------------------------


class Rival(NamedTuple):
    """Another codec for flat fp32 values."""

    name: str
    encode: Callable[[Tensor], Any]
    decode: Callable[[Any], Tensor]


def _torch_bf16() -> Rival:
    return Rival("torch", lambda values: values.bfloat16(), lambda payload: payload.float())


def _torch_int8() -> Rival:
    """quantize_per_tensor with one scale for all values; finding the scale is included."""

    def encode(values: Tensor) -> Tensor:
        low, high = values.aminmax()
        scale = max(-float(low), float(high)) / 127 or 1.0
        return torch.quantize_per_tensor(values, scale, 0, torch.qint8)

    return Rival("torch", encode, lambda payload: payload.dequantize())


def _torch_topk() -> Rival:
    """Chooses the same values as ours, and sends them in fp32 with 16-bit indices."""

    def encode(values: Tensor) -> tuple[Tensor, Tensor]:
        chunks = values.view(-1, 4096)
        kept = chunks.abs().topk(64, dim=1, sorted=False).indices
        return kept.short(), chunks.gather(1, kept)

    def decode(payload: tuple[Tensor, Tensor]) -> Tensor:
        kept, values = payload
        return values.new_zeros(len(kept), 4096).scatter_(1, kept.long(), values).flatten()

    return Rival("torch", encode, decode)


def _piquant(dtype: torch.dtype) -> Rival:
    import piquant
    from piquant import torch as ops

    context = piquant.Context(torch.get_num_threads())

    def encode(values: Tensor) -> tuple[Tensor, float, int]:
        scale, zero = ops.compute_quant_params(values, dtype=dtype, ctx=context)
        payload = ops.quantize(values, scale=scale, zero_point=zero, dtype=dtype, ctx=context)
        return payload, scale, zero

    def decode(payload: tuple[Tensor, float, int]) -> Tensor:
        codes, scale, zero = payload
        return ops.dequantize(codes, scale=scale, zero_point=zero, dtype=torch.float32, ctx=context)

    return Rival("pypiquant", encode, decode)


def _hivemind(name: str) -> Rival:
    from hivemind.compression import quantization

    if name == "blockwise":
        codec = quantization.BlockwiseQuantization()
        from bitsandbytes.functional import dequantize_blockwise

        def decode(payload: Any) -> Tensor:
            codes, (largest, codebook) = payload
            return dequantize_blockwise(
                torch.from_numpy(codes),
                absmax=torch.from_numpy(largest),
                code=torch.from_numpy(codebook),
                blocksize=4096,
                nested=False,
            ).flatten()

        return Rival("hivemind blockwise", codec.quantize, decode)
    uniform = quantization.Uniform8BitQuantization()
    return Rival(
        "hivemind uniform",
        uniform.quantize,
        lambda payload: torch.from_numpy(payload[1])[torch.from_numpy(payload[0]).long()],
    )


def _torchft() -> Rival:
    from torchft import quantization

    def decode(payload: tuple[Tensor, Tensor]) -> Tensor:
        codes, like = payload
        out = torch.empty_like(like)
        quantization.fused_dequantize_from_fp8([out], codes, 1)
        return out.flatten()

    def encode(values: Tensor) -> tuple[Tensor, Tensor]:
        rows = values.view(-1, 1024)  # a scale per row
        return quantization.fused_quantize_into_fp8([rows], 1), rows

    return Rival("torchft fp8", encode, decode)


_RIVALS: dict[str, dict[str, Callable[[], Rival]]] = {
    "bf16": {"torch": _torch_bf16},
    "int8": {
        "torch": _torch_int8,
        "pypiquant": lambda: _piquant(torch.quint8),
        "hivemind uniform": lambda: _hivemind("uniform"),
        "hivemind blockwise": lambda: _hivemind("blockwise"),
        "torchft fp8": _torchft,
    },
    "int4": {"pypiquant": lambda: _piquant(torch.quint4x2)},
    "int2": {"pypiquant": lambda: _piquant(torch.quint2x4)},
    "topk": {"torch": _torch_topk},
}
_TRIAL = 1 << 14  # values that a rival must encode and decode correctly before it is timed


def rivals_of(codec: str, device: str = "cpu") -> tuple[list[Rival], dict[str, str]]:
    """Rivals that work on this machine, and the reasons why others do not, by name."""
    found, absent = [], {}
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(_TRIAL, generator=generator).to(device)
    for name, make in _RIVALS.get(codec, {}).items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch's quantised dtypes are deprecated
                rival = make()
                error = normalised_error(rival.decode(rival.encode(values)), values)
        except Exception as failure:  # other packages may raise anything; it is recorded
            absent[name] = f"{type(failure).__name__}: {str(failure).splitlines()[0][:120]}"
            continue
        if not error < 1:
            absent[name] = f"its result differs (relative error {error:.2f})"
            continue
        found.append(rival)
    return found, absent


# ---- the four verbs ------------------------------------------------------------------------------


@dataclass
class Work:
    """Inputs of all verbs. "encode delta" and "reduce" change `error`."""

    codec: Codec
    anchor: Tensor
    local: Tensor
    error: Tensor | None
    given: Tensor  # fp32 [members, n], what the members encode

    @classmethod
    def make(cls, codec: Codec, numel: int, device: str = "cpu", members: int = MEMBERS) -> Work:
        generator = torch.Generator(device).manual_seed(0)
        draw = lambda *sizes: torch.randn(*sizes, generator=generator, device=device)
        anchor, given = draw(numel), 1e-3 * draw(members, numel)
        error = torch.zeros(numel, device=device) if codec.lossy else None
        return cls(codec, anchor, anchor - given[0], error, given)

    @property
    def numel(self) -> int:
        return self.anchor.numel()

    def ours(self, verb: str) -> Callable[[], Tensor]:
        """A call that runs the verb with our codec; it always returns the same output tensor."""
        from fomoe_ext.outer.codec import DeltaPart

        codec, numel, given = self.codec, self.numel, self.given
        payload = torch.empty(codec.wire_bytes(numel), dtype=torch.uint8, device=self.anchor.device)
        if verb == "encode values":
            values = [DeltaPart(given[0], 0)]
            return lambda: codec.encode_delta(values, numel, payload) or payload
        if verb == "encode delta":
            part = [DeltaPart(self.local, 0)]
            more = {"anchor": self.anchor, "error": self.error}
            return lambda: codec.encode_delta(part, numel, payload, **more) or payload
        if verb == "decode sum":
            payloads = torch.stack([codec.encode(row) for row in given])
            out = torch.empty_like(self.anchor)
            return lambda: codec.decode_sum(payloads, numel, out=out)
        if verb == "reduce":
            payloads = torch.stack([codec.encode(row) for row in given[1:]])
            more = {"own": given[0], "own_rank": 0, "error": self.error}
            return lambda: codec.reduce(payloads, numel, payload, **more) or payload
        raise ValueError(f"verb must be one of {', '.join(VERBS)}, got {verb!r}")

    def theirs(self, verb: str, rival: Rival) -> Callable[[], Any]:
        """A call that runs the verb with a rival's codec and plain torch ops."""
        given, error = self.given, self.error
        encode, decode = rival.encode, rival.decode
        if verb == "encode values":
            return lambda: encode(given[0])
        payloads = [encode(row) for row in given]

        def added_up(first: Tensor, others: Sequence[Any]) -> Tensor:
            for payload in others:
                first += decode(payload)
            return first

        def with_error(values: Tensor) -> Any:
            if error is None:
                return encode(values)
            values += error
            payload = encode(values)
            torch.sub(values, decode(payload), out=error)
            return payload

        if verb == "encode delta":
            return lambda: with_error(self.anchor - self.local)
        if verb == "decode sum":
            return lambda: added_up(decode(payloads[0]), payloads[1:])
        if verb == "reduce":
            return lambda: with_error(added_up(given[0].clone(), payloads[1:]))
        raise ValueError(f"verb must be one of {', '.join(VERBS)}, got {verb!r}")


# ---- links ---------------------------------------------------------------------------------------


class LinkCase(NamedTuple):
    """One run of bench/outer_site.py. `link` None: not made slow."""

    sites: int
    link: str | None
    numel: int
    rounds: int
    full: bool = False
    """Whether it only runs with --full."""

    @property
    def megabytes(self) -> int:
        """Size of the vector in MiB."""
        return 4 * self.numel >> 20

    def __str__(self) -> str:
        return f"{self.sites}-{self.link or 'unshaped'}-{self.megabytes}MB"

    @property
    def memory(self) -> int:
        """Bytes of memory that all sites need: six vectors each, and a process's own memory."""
        return self.sites * (6 * 4 * self.numel + (300 << 20))


LINK_CASES = (
    *(LinkCase(sites, None, 1 << 24, 3) for sites in (2, 4, 8)),
    *(LinkCase(sites, "1gbit", 1 << 24, 1) for sites in (2, 4)),
    *(LinkCase(sites, "200mbit", 1 << 24, 1) for sites in (2, 4, 8)),
    *(LinkCase(sites, "50mbit", 1 << 22, 1) for sites in (2, 4)),
    *(LinkCase(8, link, 1 << 22, 1, full=True) for link in ("1gbit", "50mbit")),
    *(LinkCase(sites, None, 1 << 26, 3, full=True) for sites in (2, 4)),
    *(LinkCase(sites, "200mbit", 1 << 26, 1, full=True) for sites in (2, 4)),
    LinkCase(2, None, 1 << 28, 2, full=True),
)


def link_share(bytes_sent: int, seconds: float, bandwidth: float) -> float:
    """Fraction of the link's bandwidth that was used."""
    return 8 * bytes_sent / (bandwidth * seconds)


def crossover(ours: tuple[float, int], theirs: tuple[float, int]) -> float:
    """The bandwidth in bits/s below which ours is faster. math.inf = always, 0 = never.

    Both are (seconds without a slow link, bytes sent); their time on a link is taken to be
    seconds + bits / bandwidth.
    """
    more_seconds, fewer_bits = ours[0] - theirs[0], 8 * (theirs[1] - ours[1])
    if fewer_bits >= 0 and more_seconds <= 0:
        return math.inf
    if fewer_bits <= 0:
        return 0.0
    return fewer_bits / more_seconds
