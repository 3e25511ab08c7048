"""The delta formats of csrc/kernels.h, value by value in numpy: slow, and independent of the
kernels' code.

A step "rounded once" is an operation on numpy float32; whatever the contract calls exact is done in
float64 or in Python's integers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

F32 = np.float32
FORMATS = ("fp32", "bf16", "int8", "int4", "int2", "topk")
CODES = {"int8": (8, 127), "int4": (4, 7), "int2": (2, 3)}  # bits; largest factor of the step
CHUNK, SHARE = 4096, 64
TINY = 2.0**-90
MASK = (1 << 32) - 1


@dataclass(frozen=True)
class Format:
    """How values are encoded: `block` for int8, int4 and int2; seed None = to nearest."""

    name: str
    block: int = 64
    seed: int | None = None

    @property
    def number(self) -> int:
        return FORMATS.index(self.name)

    def payload_bytes(self, numel: int) -> int:
        if self.name in ("fp32", "bf16"):
            return numel * (4 if self.name == "fp32" else 2)
        if self.name == "topk":
            sizes = [min(CHUNK, numel - at) for at in range(0, numel, CHUNK)]
            kept = [math.ceil(size / SHARE) for size in sizes]
            return sum(2 + math.ceil(12 * k / 8) + math.ceil(2 * k / 8) for k in kept)
        blocks = [min(self.block, numel - at) for at in range(0, numel, self.block)]
        return sum(2 + math.ceil(size * CODES[self.name][0] / 8) for size in blocks)


def to_bf16(x: float, rounding: str = "nearest", limit: float = math.inf) -> float:
    """The bf16 next to x >= 0, not above limit; ties to even, or the next one up."""
    if x == 0:
        return 0.0
    exponent = max(math.frexp(x)[1] - 1, -126)
    unit = 2.0 ** (exponent - 7)
    steps = math.ceil(x / unit) if rounding == "up" else float(np.rint(x / unit))
    result = steps * unit
    if result <= limit:
        return result
    exponent = math.frexp(limit)[1] - 1
    return math.floor(limit / 2.0 ** (exponent - 7)) * 2.0 ** (exponent - 7)


def bf16_bytes(x: float) -> bytes:
    """A number that bf16 holds, little endian."""
    return np.array([x], dtype=F32).tobytes()[2:]


def bf16_of_bytes(data: bytes) -> np.float32:
    return np.frombuffer(b"\0\0" + data, dtype=F32)[0]


def step_limit(factor: int) -> float:
    """What a step may be so that factor * step is finite."""
    return float(np.finfo(F32).max) / factor


def pack(codes: list[int], bits: int) -> bytes:
    number = sum((code & ((1 << bits) - 1)) << (bits * i) for i, code in enumerate(codes))
    return number.to_bytes(math.ceil(len(codes) * bits / 8), "little")


def unpack(data: bytes, bits: int, count: int) -> list[int]:
    number = int.from_bytes(data, "little")
    return [(number >> (bits * i)) & ((1 << bits) - 1) for i in range(count)]


def mix(x: int) -> int:
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & MASK
    x = ((x ^ (x >> 15)) * 0x846CA68B) & MASK
    return x ^ (x >> 16)


def uniform(seed: int, index: int) -> float:
    """In [0, 1): the number of the generator at an index."""
    inner = mix((index ^ seed) & MASK)
    return (mix((inner + (seed >> 32) + (index >> 32)) & MASK) >> 8) * 2.0**-24


def exponent_of(x: float) -> int:
    return math.frexp(x)[1] - 1


def int_codes(v: np.ndarray, form: Format, first: int) -> tuple[float, list[int]]:
    """Step and codes of a block."""
    largest = float(np.abs(v).max())
    if largest < TINY:
        return 0.0, [0] * len(v)
    _, factor = CODES[form.name]
    four = form.name == "int2"
    if four:
        k = exponent_of(largest)
        squares = [int(np.rint(abs(float(x)) * 2.0 ** (10 - k))) ** 2 for x in v]
        mean = np.sqrt(F32(sum(squares)) / F32(len(v))) * F32(2.0 ** (k - 10))
        step = to_bf16(float(F32(0.498) * mean), limit=step_limit(factor))
        t = v * (F32(0.5) / F32(step)) + F32(1.5)
    else:
        step = to_bf16(float(F32(largest) / F32(factor)), "up", step_limit(factor))
        t = v * (F32(1) / F32(step))
    if form.seed is None:
        q = np.rint(t)
    else:
        q = np.floor(
            t + np.array([uniform(form.seed, first + i) for i in range(len(v))], dtype=F32)
        )
    return step, [int(c) for c in np.clip(q, 0 if four else -factor, factor)]


def topk_codes(v: np.ndarray) -> tuple[float, list[int], list[int]]:
    """Unit, kept indices and codes of a chunk."""
    kept = math.ceil(len(v) / SHARE)
    largest = float(np.abs(v).max())
    if largest < TINY:
        return 0.0, list(range(kept)), [0] * kept
    indices = sorted(sorted(range(len(v)), key=lambda i: (-abs(v[i]), i))[:kept])
    k = exponent_of(largest)
    total = sum(int(np.rint(abs(float(v[i])) * 2.0 ** (20 - k))) for i in indices)
    mean = F32(total) / F32(kept) * F32(2.0 ** (k - 20))
    unit = to_bf16(float(mean * F32(0.125)), limit=step_limit(10))
    large = F32(8.5) * F32(unit)
    return unit, indices, [int(abs(v[i]) > large) + 2 * int(v[i] < 0) for i in indices]


def encode(v: np.ndarray, form: Format, first: int = 0) -> bytes:
    """The payload of fp32 values [n]."""
    assert v.dtype == F32 and v.ndim == 1
    if form.name == "fp32":
        return v.tobytes()
    if form.name == "bf16":
        rounded = [math.copysign(to_bf16(abs(float(x))), float(x)) for x in v]
        with np.errstate(over="ignore"):
            return b"".join(bf16_bytes(x) for x in rounded)
    data = b""
    if form.name == "topk":
        for at in range(0, len(v), CHUNK):
            unit, indices, codes = topk_codes(v[at : at + CHUNK])
            data += bf16_bytes(unit) + pack(indices, 12) + pack(codes, 2)
        return data
    for at in range(0, len(v), form.block):
        step, codes = int_codes(v[at : at + form.block], form, first + at)
        data += bf16_bytes(step) + pack(codes, CODES[form.name][0])
    return data


def decode(payload: bytes, form: Format, numel: int) -> np.ndarray:
    """The fp32 values [numel] of a payload."""
    assert len(payload) == form.payload_bytes(numel)
    if form.name == "fp32":
        return np.frombuffer(payload, dtype=F32)
    if form.name == "bf16":
        pairs = np.frombuffer(payload, dtype=np.uint16).astype(np.uint32)
        return (pairs << 16).view(F32)
    values = np.zeros(numel, dtype=F32)
    offset = 0

    def take(size: int) -> bytes:
        nonlocal offset
        offset += size
        return payload[offset - size : offset]

    with np.errstate(invalid="ignore", over="ignore"):
        for at in range(0, numel, CHUNK if form.name == "topk" else form.block):
            step = bf16_of_bytes(take(2))
            if form.name == "topk":
                kept = math.ceil(min(CHUNK, numel - at) / SHARE)
                indices = unpack(take(math.ceil(12 * kept / 8)), 12, kept)
                codes = unpack(take(math.ceil(2 * kept / 8)), 2, kept)
                for index, code in zip(indices, codes, strict=True):
                    factor = (10 if code & 1 else 7) * (-1 if code & 2 else 1)
                    values[at + index] = F32(factor) * step
                continue
            size = min(form.block, numel - at)
            bits, _ = CODES[form.name]
            codes = unpack(take(math.ceil(bits * size / 8)), bits, size)
            if form.name == "int2":
                factors = [2 * code - 3 for code in codes]
            else:
                factors = [code - (1 << bits) * (code >> (bits - 1)) for code in codes]
            values[at : at + size] = np.array(factors, dtype=F32) * step
    return values


def hash_bits(data: bytes) -> int:
    """The 64-bit hash of bytes."""
    words = np.frombuffer(data + b"\0" * (-len(data) % 4), dtype=np.uint32)
    total = len(data)
    for i, word in enumerate(words):
        x = int(word) + (i << 32)
        for _ in range(2):
            x = ((x ^ (x >> 32)) * 0xD6E8FEB86659FD93) % 2**64
        total += x ^ (x >> 32)
    return total % 2**64


KINDS = ("normal", "outliers", "zeros", "tiny", "huge", "ties", "mixed")


def make_values(numel: int, kind: str, seed: int) -> np.ndarray:
    """fp32 values of one kind: typical for deltas, or hard to encode."""
    rng = np.random.default_rng(seed)
    v = rng.standard_normal(numel)
    if kind == "outliers":
        v = rng.standard_cauchy(numel) * 1e-3
    elif kind == "zeros":  # runs, and zeros of both signs
        v *= np.repeat(rng.random(numel // 40 + 1) < 0.5, 40)[:numel]
        v[rng.random(numel) < 0.3] = -0.0
    elif kind == "tiny":  # around 2^-90, under which blocks are dropped, and subnormal
        v *= 2.0 ** rng.choice([-149, -140, -130, -91, -90, -89], numel)
    elif kind == "huge":
        v = rng.choice([3.4e38, 3e38, 1e38, 1.0], numel) * np.sign(v)
    elif kind == "ties":
        v = rng.integers(-3, 4, numel) * 0.5
    elif kind == "mixed":  # another scale in every block
        v *= np.repeat(10.0 ** rng.uniform(-20, 20, numel // 64 + 1), 64)[:numel]
    return v.astype(np.float32)
