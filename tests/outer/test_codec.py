"""Codecs: their errors, noise and sums, and the same bytes from all instruction sets and numbers of
threads. The format of the bytes is tested in test_delta.py.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np
import pytest
import torch
from delta_reference import KINDS, Format, make_values
from delta_reference import encode as reference_encode
from new_process import OTHER_ISAS, told_with_isa
from torch import Tensor

from fomoe_ext.outer.codec import Codec, DeltaPart, get_codec, hash_bits
from fomoe_ext.placement import wire

QUANTIZED = [name for name in wire.CODECS if name.startswith("int")]


def normal(numel: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(make_values(numel, "normal", seed))


def relative_error(values: Tensor, decoded: Tensor) -> float:
    return ((decoded - values).double().norm() / values.double().norm()).item()


@pytest.mark.parametrize("name", wire.CODECS)
def test_payloads_are_as_long_as_wire_bytes_says(name: str) -> None:
    codec = Codec(name)
    for numel in (0, 1, 2, 3, 4, 5, 63, 64, 65, 127, 128, 129, 4095, 4096, 4097, 4160, 9000):
        payload = codec.encode(normal(numel))
        assert payload.dtype == torch.uint8 and payload.dim() == 1
        assert payload.numel() == codec.wire_bytes(numel) == wire.wire_bytes(name, numel)
        base, _, block = name.partition("-")
        assert payload.numel() == Format(base, int(block or 64)).payload_bytes(numel)
        assert codec.decode(payload, numel).shape == (numel,)


def test_wire_bytes_of_known_sizes() -> None:
    million = {name: wire.wire_bytes(name, 1 << 20) for name in wire.CODECS}
    assert million == {
        "fp32": 1 << 22,
        "bf16": 1 << 21,
        "int8": (1 << 20) + (1 << 15),
        "int8-128": (1 << 20) + (1 << 14),
        "int4": (1 << 19) + (1 << 15),
        "int4-128": (1 << 19) + (1 << 14),
        "int2": (1 << 18) + (1 << 15),
        "int2-128": (1 << 18) + (1 << 14),
        "topk": 256 * (2 + 96 + 16),
    }
    with pytest.raises(ValueError, match=r"codec must be one of fp32, bf16, int8, .* got 'int3'"):
        wire.wire_bytes("int3", 4)
    with pytest.raises(ValueError, match="numel must be at least 0, got -1"):
        wire.wire_bytes("int8", -1)


@pytest.mark.parametrize("name", wire.CODECS)
def test_the_error_is_what_is_missing(name: str) -> None:
    codec, values = Codec(name), normal(5000)
    error = torch.zeros(5000)
    decoded = codec.decode(codec.encode(values, error=error), 5000)
    assert torch.equal(error, values - decoded)
    assert codec.lossy == bool(error.any()) == (name != "fp32")


# ---- errors of normal values, by theory ----------------------------------------------------------


def mean_square_of_largest(count: int) -> float:
    """The mean square of the largest of so many normal values: the integral over t of the
    probability that the square exceeds t."""
    t = np.linspace(0, 60, 20001)
    under = np.array([math.erf(math.sqrt(x / 2)) ** count for x in t])
    return float(np.trapezoid(1 - under, t))


def uniform_error(most: int, block: int) -> float:
    """Uniform rounding errors over a step of largest / most; the largest value has none.
    Rounding the step up makes it 1 + 2^-8 / 1.44 times larger on average."""
    step = math.sqrt(mean_square_of_largest(block)) / most * (1 + 2**-8 / 1.44)
    return step * math.sqrt((1 - 1 / block) / 12)


def topk_error(kept: float) -> float:
    """The error if a share `kept` of the energy of the largest 1/64 is decoded. Beyond its quantile
    z a normal distribution has 2 z pdf(z) + 1/64 of its energy."""
    z = 2.41756
    energy = 2 * z * math.exp(-z * z / 2) / math.sqrt(2 * math.pi) + 1 / 64
    return math.sqrt(1 - kept * energy)


# Four even levels for a normal distribution leave 0.1188 of the variance (Max, 1960).
FOUR_LEVELS = math.sqrt(0.1188)
BOUNDS = {
    "bf16": (2**-9.5, 2**-9),  # at most 2^-9, on average less
    **{
        f"int{bits}{suffix}": tuple(uniform_error(most, block) * f for f in (0.985, 1.015))
        for bits, most in ((8, 127), (4, 7))
        for suffix, block in (("", 64), ("-128", 128))
    },
    "int2": (FOUR_LEVELS * 0.98, FOUR_LEVELS * 1.02),
    "int2-128": (FOUR_LEVELS * 0.99, FOUR_LEVELS * 1.01),
    "topk": (topk_error(1.0), topk_error(0.95)),
}


@pytest.mark.parametrize("name", BOUNDS)
def test_errors_of_normal_values_are_as_in_theory(name: str) -> None:
    codec, values = Codec(name), normal(1 << 20)
    low, high = BOUNDS[name]
    assert low < relative_error(values, codec.decode(codec.encode(values), 1 << 20)) < high


@pytest.mark.parametrize("name", ["int8", "int8-128", "int4", "int4-128"])
@pytest.mark.parametrize("kind", [k for k in KINDS if k != "tiny"])
def test_no_value_is_further_off_than_half_a_step(name: str, kind: str) -> None:
    codec, numel = Codec(name), 3001
    values = torch.from_numpy(make_values(numel, kind, 1))
    block, most = codec.wire_bytes(1 << 7) == codec.wire_bytes(1 << 6) * 2, name[3]
    size = 64 if block else 128
    blocks = torch.nn.functional.pad(values, (0, -numel % size)).view(-1, size).double()
    step = blocks.abs().amax(1, keepdim=True) / {"8": 127, "4": 7}[most] * (1 + 1 / 128)
    decoded = codec.decode(codec.encode(values), numel)
    off = torch.nn.functional.pad(decoded, (0, -numel % size)).view(-1, size).double() - blocks
    assert bool((off.abs() <= step * (0.5 + 2**-15)).all())


@pytest.mark.parametrize("name", QUANTIZED)
def test_stochastic_rounding_is_right_on_average(name: str) -> None:
    """The mean over seeds of each value of a block is within five standard deviations."""
    codec, seeds = Codec(name, "stochastic"), 2000
    values = normal(128, 4)
    decoded = torch.stack(
        [codec.decode(codec.encode(values, seed=seed), 128) for seed in range(seeds)]
    ).double()
    off = (decoded.mean(0) - values).abs()
    inside = values.abs() < values.abs().max() if "int2" not in name else values.abs() < 1.0
    deviation = decoded.std(0) / math.sqrt(seeds)
    assert bool((off <= 5 * deviation + 1e-6)[inside].all())
    # And the roundings of two values are uncorrelated.
    correlation = torch.corrcoef(decoded[:, deviation > 0].T)
    assert (correlation - torch.eye(len(correlation))).abs().max() < 0.15
    nearest = Codec(name)
    biased = (nearest.decode(nearest.encode(values), 128) - values).abs()
    assert bool((biased > 5 * deviation)[inside].any())  # what this test would see


@pytest.mark.parametrize("name", QUANTIZED)
def test_seeds_and_numbers_choose_the_noise(name: str) -> None:
    codec, values = Codec(name, "stochastic"), normal(1000)
    payload = codec.encode(values, seed=3, first=100)
    assert torch.equal(payload, codec.encode(values, seed=3, first=100))
    for seed, first in ((4, 100), (3, 101), (3 + 2**32, 100), (3, 100 + 2**32), (2**63 - 1, 0)):
        assert not torch.equal(payload, codec.encode(values, seed=seed, first=first))
    # Values get the same random bits wherever a call begins.
    size = codec.wire_bytes(128)
    rest = codec.encode(values[128:], seed=3, first=228)
    assert torch.equal(payload[size:], rest)


@pytest.mark.parametrize("name", [n for n in wire.CODECS if n != "fp32"])
def test_with_error_feedback_nothing_is_lost(name: str) -> None:
    """Over rounds with the same mean, the decoded values sum to the given ones up to one error."""
    codec, numel, rounds = Codec(name), 4096, 200
    mean = normal(numel, 9)
    error, given, decoded = torch.zeros(numel), torch.zeros(numel).double(), 0.0
    for r in range(rounds):
        values = mean + 0.1 * normal(numel, 100 + r)
        given += values
        decoded = decoded + codec.decode(codec.encode(values, error=error), numel).double()
    left = (given - decoded - error).abs().max().item()
    assert left < rounds * 64 * 2**-22  # roundings to fp32 of values under 64
    share = relative_error(given.float(), decoded.float())
    without = relative_error(mean, codec.decode(codec.encode(mean), numel))
    assert share < without / 3


@pytest.mark.parametrize("name", wire.CODECS)
def test_sums_and_reductions(name: str) -> None:
    codec, numel = Codec(name), 4300
    values = [normal(numel, seed) for seed in range(3)]
    payloads = torch.stack([codec.encode(v) for v in values])
    kept = payloads.clone()
    decoded = [codec.decode(p, numel) for p in payloads]
    for given in (payloads, list(payloads)):
        assert torch.equal(codec.decode_sum(given, numel), decoded[0] + decoded[1] + decoded[2])
    out = torch.full((numel,), torch.nan)
    total = codec.decode_sum(payloads[::2], numel, own=values[1], own_rank=1, out=out)
    assert total is out and torch.equal(out, decoded[0] + values[1] + decoded[2])
    assert torch.equal(codec.decode_sum([], numel, own=values[0]), values[0])
    assert codec.decode(payloads[1], numel, out) is out and torch.equal(out, decoded[1])

    error, room = normal(numel, 7), torch.full((codec.wire_bytes(numel) + 3,), 7).byte()
    wanted = codec.encode(decoded[0] + values[1] + decoded[2], error=(rest := error.clone()))
    codec.reduce(payloads[::2], numel, room[3:], own=values[1], own_rank=1, error=error)
    assert torch.equal(room[3:], wanted) and torch.equal(error, rest)
    assert torch.equal(room[:3], torch.full((3,), 7).byte()) and torch.equal(payloads, kept)


def test_deltas_of_parts() -> None:
    codec, anchor = Codec("fp32"), normal(10)
    out = torch.empty(40, dtype=torch.uint8)
    parts = [
        DeltaPart(torch.ones(3), 0),
        DeltaPart(torch.empty(0), 3),  # no values: passed over
        DeltaPart(None, 3),
        DeltaPart(torch.ones(5).bfloat16(), 5, 0.5),
    ]
    codec.encode_delta(parts, 10, out, anchor=anchor)
    wanted = anchor - 1
    wanted[3:5] = 0
    wanted[5:] = 0.5 * (anchor[5:].bfloat16().float() - 1)
    assert torch.equal(out.view(torch.float32), wanted)
    codec.encode_delta([], 0, out[:0])


# ------------------------------------------------------------------------------ the same on any CPU


def digest() -> str:
    """A hash of every codec's output for every kind of values, with parts, errors and sums."""
    sha = hashlib.sha256()
    for name in wire.CODECS:
        for rounding in ("nearest", "stochastic"):
            codec = Codec(name, rounding)
            for kind in KINDS:
                if kind == "huge" and name == "bf16":
                    continue
                # 40000 values are divided among threads.
                for numel in (77, 4096 + 777, *([40000] if kind == "outliers" else [])):
                    values = torch.from_numpy(make_values(numel, kind, numel))
                    error = torch.zeros(numel)
                    payload = codec.encode(values, error=error, seed=12345, first=7)
                    decoded = codec.decode(payload, numel)
                    parts = [
                        DeltaPart(values[:33].clamp(-1e4, 1e4).half(), 0),
                        DeltaPart(values[33:70].bfloat16().nan_to_num(), 33, 0.3),
                        DeltaPart(values[70:], 70, -1.0),
                    ]
                    delta, small = torch.empty_like(payload), 1e-5 * error
                    anchor = decoded.clamp(-1e4, 1e4) * 1e-3
                    codec.encode_delta(parts, numel, delta, anchor=anchor, error=small, seed=9)
                    out = torch.empty_like(payload)
                    if kind != "huge":  # whose sums are infinite
                        codec.reduce([payload, delta], numel, out, error=small)
                    else:
                        out.zero_()
                    for tensor in (payload, error, decoded, delta, small, out):
                        sha.update(tensor.view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def test_threads_do_not_show() -> None:
    before = torch.get_num_threads()
    try:
        digests = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            digests.append(digest())
    finally:
        torch.set_num_threads(before)
    assert len(set(digests)) == 1


@pytest.mark.parametrize("isa", OTHER_ISAS)
def test_instruction_sets_do_not_show(isa: str) -> None:
    code = """
import test_codec as t
print(t.digest())
"""
    assert told_with_isa(isa, code) == digest()


# ---------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("name", wire.CODECS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("index", [0, 100, 4099, 50000])
def test_values_that_are_not_finite_are_named(name: str, bad: float, index: int) -> None:
    codec, values = Codec(name), normal(50001)
    values[index] = bad
    message = f"element {index}.*, which is NaN or infinite"
    with pytest.raises(ValueError, match=message):
        codec.encode(values)
    error = torch.zeros(50001)
    error[index] = bad
    with pytest.raises(ValueError, match=message):
        codec.encode(normal(50001), error=error)
    payloads = codec.encode(normal(50001))[None]
    with pytest.raises(ValueError, match=message):
        codec.reduce(payloads, 50001, torch.empty_like(payloads[0]), own=values, own_rank=1)
    with pytest.raises(ValueError, match=message):
        codec.decode_sum(payloads, 50001, own=values)


@pytest.mark.parametrize("bits", [0x7FFFFFFF, 0x7F800001, 0xFFFFFFFF])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_nan_is_seen(bits: int, dtype: torch.dtype) -> None:
    """Also a NaN in an anchor whose bits overflow when rounded."""
    anchor = torch.zeros(70)
    anchor[69:].view(torch.int32).fill_(bits - (1 << 32) * (bits >> 31))
    part = DeltaPart(torch.zeros(70, dtype=dtype), 0)
    with pytest.raises(ValueError, match=r"element 69 .*is NaN or infinite"):
        Codec("int8").encode_delta([part], 70, torch.empty(74, dtype=torch.uint8), anchor=anchor)


def test_the_first_of_many_bad_values_is_named() -> None:
    values = normal(200000)
    values[150::977] = math.nan
    for name in wire.CODECS:
        with pytest.raises(ValueError, match="element 150 "):
            Codec(name).encode(values)


def test_codecs_refuse_bad_input() -> None:
    codec = get_codec("bf16")
    for values in (torch.zeros(2, dtype=torch.float64), torch.zeros(2, 2)):
        with pytest.raises(ValueError, match="values must be a flat float32 tensor"):
            codec.encode(values)
    for payload in (torch.zeros(4), torch.zeros(2, 2, dtype=torch.uint8)):
        with pytest.raises(ValueError, match="payload must be a flat uint8 tensor"):
            codec.decode(payload, 2)
    with pytest.raises(ValueError, match=r"payloads must have shape \[\*, 4\], got \[1, 3\]"):
        codec.decode(torch.zeros(3, dtype=torch.uint8), 2)
    with pytest.raises(ValueError, match="payloads must not be empty"):
        codec.decode_sum([], 2)
    with pytest.raises(ValueError, match=r"codec must be one of fp32, bf16, .* got 'int3'"):
        get_codec("int3")
    with pytest.raises(ValueError, match="rounding must be nearest or stochastic, got 'up'"):
        Codec("int8", "up")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"seed must .*, got -1"):
        codec.encode(torch.zeros(2), seed=-1)
    assert get_codec(codec) is codec


def test_ops_do_what_their_schemas_say() -> None:
    """The ops write the arguments that their schemas say, and torch can trace them."""
    ops, values = torch.ops.fomoe, normal(200)
    payload = Codec("int8").encode(values)
    numbers = (200, 2, 64, False, 0, 0)
    encode = (values, [values], [0], [1.0], torch.zeros(200), *numbers, payload.clone())
    torch.library.opcheck(ops.delta_encode.default, encode)
    for out in ((payload.clone(), None), (None, torch.zeros(200))):
        error = None if out[0] is None else torch.zeros(200)
        reduce = (payload[None], values, 1, error, *numbers, *out)
        torch.library.opcheck(ops.delta_reduce.default, reduce)
    torch.library.opcheck(ops.hash_bits.default, ([values, payload],))


def test_codecs_compare_by_what_they_make() -> None:
    assert Codec("int8") == Codec("int8") and hash(Codec("int8")) == hash(Codec("int8"))
    assert Codec("int8") != Codec("int8-128") and Codec("int8") != Codec("int8", "stochastic")
    assert Codec("topk") == Codec("topk", "stochastic") and Codec("int8") != "int8"
    assert repr(Codec("int4", "stochastic")) == "Codec('int4', rounding='stochastic')"


def test_hashes_are_unsigned_and_see_every_bit() -> None:
    tensor = normal(1000)
    (before,) = hash_bits([tensor])
    seen = {before}
    flat = tensor.view(torch.int32)
    for index in (0, 1, 499, 999):
        for bit in (0, 13, 31):
            flat[index] ^= -(1 << 31) if bit == 31 else 1 << bit
            seen.add(hash_bits([tensor])[0])
            flat[index] ^= -(1 << 31) if bit == 31 else 1 << bit
    assert len(seen) == 13 and hash_bits([tensor]) == [before]
    assert hash_bits([tensor.flip(0).contiguous()]) != [before]
    assert all(0 <= h < 2**64 for h in seen) and max(seen) >= 2**63
    assert hash_bits([]) == []
    assert hash_bits([torch.zeros(4)]) != hash_bits([torch.zeros(5)])


def test_the_bytes_are_those_of_the_format() -> None:
    """One known block, by hand."""
    values = torch.zeros(64)
    values[:4] = torch.tensor([127.0, -1.0, 2.5, -0.4])
    payload = Codec("int8").encode(values)
    assert payload[:6].tolist() == [0x80, 0x3F, 127, 255, 2, 0]  # step 1 as bf16; 2.5 to even
    wanted = reference_encode(values.numpy(), Format("int8"))
    assert payload.numpy().tobytes() == wanted and not np.frombuffer(wanted[6:], np.uint8).any()
