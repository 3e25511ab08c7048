"""delta_encode, delta_reduce and hash_bits on every device, bit for bit against delta_reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import delta_reference as ref
import numpy as np
import pytest
import torch
from delta_reference import KINDS, Format, make_values
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

FORMS = [Format(n, b) for n in ref.CODES for b in (64, 128)] + [
    Format(n) for n in ("fp32", "bf16", "topk")
]
IDS = [f"{form.name}-{form.block}" for form in FORMS]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
POISON = 0xA5

lengths = st.one_of(
    st.sampled_from([0, 1, 2, 63, 64, 65, 127, 128, 129, 1024, 4095, 4096, 4097]),
    st.integers(0, 700),
    st.integers(0, 9000),
)


class Buffer:
    """A tensor inside a larger one, `shift` elements in; writes around it are noticed."""

    def __init__(self, numel: int, dtype: torch.dtype, tensors: str, shift: int = 0) -> None:
        size = dtype.itemsize
        self._all = torch.full(((numel + 32) * size,), POISON, dtype=torch.uint8, device=tensors)
        self._ends = (16 + shift) * size, (16 + shift + numel) * size
        self.tensor = self._all[slice(*self._ends)].view(dtype)

    def filled(self, values: np.ndarray) -> Tensor:
        self.tensor.copy_(torch.from_numpy(values.copy()))
        return self.tensor

    def result(self) -> np.ndarray:
        """Its values; fails if anything around it was written."""
        before, after = self._all[: self._ends[0]], self._all[self._ends[1] :]
        assert bool((before == POISON).all()) and bool((after == POISON).all())
        return self.tensor.cpu().numpy().copy()


def codec_arguments(form: Format, first: int) -> tuple[int, int, bool, int, int]:
    return form.number, form.block, form.seed is not None, form.seed or 0, first


class Part(NamedTuple):
    local: Tensor | None
    begin: int
    weight: float


def encode(
    device: Any,
    form: Format,
    parts: list[Part],
    numel: int,
    anchor: np.ndarray | None = None,
    error: np.ndarray | None = None,
    first: int = 0,
    shift: int = 0,
) -> tuple[bytes, np.ndarray | None]:
    """Payload and new error of delta_encode."""
    on = device.tensors
    payload = Buffer(form.payload_bytes(numel), torch.uint8, on, shift)
    held = [Buffer(numel, torch.float32, on, shift) for _ in range(2)]
    device.op("delta_encode")(
        None if anchor is None else held[0].filled(anchor),
        [torch.empty(0, device=on) if p.local is None else p.local.to(on) for p in parts],
        [p.begin for p in parts],
        [p.weight for p in parts],
        None if error is None else held[1].filled(error),
        numel,
        *codec_arguments(form, first),
        payload.tensor,
    )
    return payload.result().tobytes(), None if error is None else held[1].result()


def delta_of(
    parts: list[Part], numel: int, anchor: np.ndarray | None, error: np.ndarray | None
) -> np.ndarray:
    """The delta "v" of csrc/kernels.h."""
    v = np.zeros(numel, dtype=np.float32)
    ends = [p.begin for p in parts[1:]] + [numel]
    for part, end in zip(parts, ends[: len(parts)], strict=True):
        if part.local is None:
            continue
        local = part.local.float().numpy()
        if anchor is not None:
            held = torch.from_numpy(anchor[part.begin : end].copy()).to(part.local.dtype)
            local = held.float().numpy() - local
        v[part.begin : end] = np.float32(part.weight) * local
    return v if error is None else v + error


def same_bits(got: np.ndarray, wanted: np.ndarray) -> bool:
    return got.tobytes() == wanted.tobytes()


def check_encode(device: Any, form: Format, parts: list[Part], numel: int, **given: Any) -> None:
    v = delta_of(parts, numel, given.get("anchor"), given.get("error"))
    with np.errstate(over="ignore"):
        wanted = ref.encode(v, form, given.get("first", 0))
    payload, error = encode(device, form, parts, numel, **given)
    assert payload == wanted
    if error is not None:
        with np.errstate(over="ignore"):
            assert same_bits(error, v - ref.decode(wanted, form, numel))


@pytest.mark.parametrize("form", FORMS, ids=IDS)
def test_encodes_values(device: Any, form: Format) -> None:
    """Plain values of every kind and length, at any address, with and without an error."""

    @settings(max_examples=60 if device.name == "cpu" else 20, deadline=None)
    @given(lengths, st.sampled_from(KINDS), st.integers(0, 99), st.integers(0, 3), st.booleans())
    def run(numel: int, kind: str, seed: int, shift: int, with_error: bool) -> None:
        values = Buffer(numel, torch.float32, "cpu", shift)
        values.filled(make_values(numel, kind, seed))
        error = make_values(numel, kind, seed + 100) if with_error else None
        if kind == "huge" and error is not None:
            error *= 1e-5  # the sum stays finite
        if form.name == "bf16" and kind == "huge":
            values.tensor.clamp_(-3e38, 3e38)
        parts = [Part(values.tensor, 0, 1.0)] if numel else []
        check_encode(device, form, parts, numel, error=error, shift=shift)

    run()


@pytest.mark.parametrize("form", FORMS, ids=IDS)
def test_encodes_deltas_of_many_parts(device: Any, form: Format) -> None:
    """Parts of any length and dtype, some absent, weighted, with and without anchor and error."""

    @settings(max_examples=40 if device.name == "cpu" else 15, deadline=None)
    @given(st.data(), st.integers(1, 3000), st.integers(0, 99))
    def run(data: st.DataObject, numel: int, seed: int) -> None:
        cuts = data.draw(st.sets(st.integers(1, numel), max_size=8))
        begins = [0, *sorted(cuts - {numel})]
        anchor = make_values(numel, "normal", seed) if data.draw(st.booleans()) else None
        error = make_values(numel, "normal", seed + 1) if data.draw(st.booleans()) else None
        parts = []
        for begin, end in zip(begins, [*begins[1:], numel], strict=True):
            dtype = data.draw(st.sampled_from([*DTYPES, None]))
            weight = data.draw(st.sampled_from([1.0, 0.5, 1 / 3, -2.0, 0.0]))
            local = None
            if dtype is not None:
                drawn = Buffer(end - begin, dtype, "cpu", data.draw(st.integers(0, 3)))
                local = drawn.filled(make_values(end - begin, "normal", seed + begin))
                if anchor is not None:
                    local += torch.from_numpy(anchor[begin:end].copy())
            parts.append(Part(local, begin, weight))
        shift = data.draw(st.integers(0, 3))
        check_encode(device, form, parts, numel, anchor=anchor, error=error, shift=shift)

    run()


@pytest.mark.parametrize("name", ref.CODES)
@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize("seed", [0, 1, 2**32 + 5, 2**63 - 1])
def test_rounds_by_the_generator(device: Any, name: str, block: int, seed: int) -> None:
    form = Format(name, block, seed)
    for numel, kind, first in ((333, "normal", 0), (1500, "outliers", 2**32 - 700)):
        values = make_values(numel, kind, 5)
        parts = [Part(torch.from_numpy(values), 0, 1.0)]
        error = np.zeros(numel, dtype=np.float32)
        check_encode(device, form, parts, numel, error=error, first=first)


@pytest.mark.parametrize("name", ["fp32", "bf16", "topk"])
def test_formats_without_steps_ignore_stochastic_rounding(device: Any, name: str) -> None:
    parts = [Part(torch.from_numpy(make_values(5000, "normal", 1)), 0, 1.0)]
    assert encode(device, Format(name, seed=9), parts, 5000) == encode(
        device, Format(name), parts, 5000
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_parameters_nobody_moved_have_no_delta(device: Any, dtype: torch.dtype) -> None:
    """All 65536 patterns of a 16-bit type, with fp32 anchors that round to them."""
    local = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    local = local[local.isfinite()]
    local = local[local.float() == (local.float() * (1 + 2.0**-14)).to(dtype).float()]
    anchor = (local.float() * (1 + 2.0**-14)).numpy()
    assert len(local) > 40000 and not np.array_equal(anchor, local.float().numpy())
    numel = len(local)
    payload, _ = encode(device, Format("fp32"), [Part(local, 0, 1.0)], numel, anchor=anchor)
    assert not np.frombuffer(payload, dtype=np.float32).any()


def test_every_value_rounds_to_bf16(device: Any) -> None:
    """Ties and their neighbours at every exponent, of both signs."""
    high = np.arange(0, 0x7F80, dtype=np.uint32)[::3]
    low = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], dtype=np.uint32)
    values = ((high[:, None] << 16) | low).ravel().view(np.float32)
    values = np.concatenate([values, -values])[np.abs(np.concatenate([values, values])) < 3.38e38]
    local = torch.from_numpy(values.copy())
    payload, _ = encode(device, Format("bf16"), [Part(local, 0, 1.0)], len(values))
    assert payload == local.to(torch.bfloat16).view(torch.uint8).numpy().tobytes()


# ------------------------------------------------------------------------------------------- reduce


def reduce(
    device: Any,
    form: Format,
    payloads: list[bytes],
    numel: int,
    own: np.ndarray | None = None,
    own_rank: int = 0,
    error: np.ndarray | None = None,
    first: int = 0,
    shift: int = 0,
    to_sum: bool = False,
) -> tuple[np.ndarray, np.ndarray | None]:
    """What delta_reduce writes, payload (uint8) or sum, and the new error."""
    on, size = device.tensors, form.payload_bytes(numel)
    table = Buffer(len(payloads) * (size + 5), torch.uint8, on, shift)
    rows = table.tensor.view(len(payloads), size + 5)[:, :size]
    for row, payload in zip(rows, payloads, strict=True):
        row.copy_(torch.from_numpy(np.frombuffer(payload, dtype=np.uint8).copy()))
    held = [Buffer(numel, torch.float32, on, shift) for _ in range(3)]
    out = held[2] if to_sum else Buffer(size, torch.uint8, on, shift)
    device.op("delta_reduce")(
        rows,
        None if own is None else held[0].filled(own),
        own_rank,
        None if error is None else held[1].filled(error),
        numel,
        *codec_arguments(form, first),
        None if to_sum else out.tensor,
        out.tensor if to_sum else None,
    )
    return out.result(), None if error is None else held[1].result()


@pytest.mark.parametrize("form", FORMS, ids=IDS)
def test_reduces(device: Any, form: Format) -> None:
    """The sum of the members' payloads and a site's own values, in rank order, or its payload."""

    @settings(max_examples=40 if device.name == "cpu" else 15, deadline=None)
    @given(st.data(), lengths, st.sampled_from([k for k in KINDS if k != "huge"]))
    def run(data: st.DataObject, numel: int, kind: str) -> None:
        members, seed = data.draw(st.integers(1, 4)), data.draw(st.integers(0, 99))
        own_rank = data.draw(st.integers(0, members - 1)) if data.draw(st.booleans()) else None
        values = [make_values(numel, kind, seed + member) for member in range(members)]
        sent = [ref.encode(v, form) for v in values]
        own = None
        given_by = [ref.decode(payload, form, numel) for payload in sent]
        if own_rank is not None:
            own = given_by[own_rank] = values[own_rank]
            del sent[own_rank]
        total = given_by[0].copy()
        for one in given_by[1:]:
            total += one
        shift = data.draw(st.integers(0, 3))
        common = {"own": own, "own_rank": own_rank or 0, "shift": shift}
        got, _ = reduce(device, form, sent, numel, to_sum=True, **common)
        assert same_bits(got, total)
        error = make_values(numel, kind, seed + 50) if data.draw(st.booleans()) else None
        out = form
        if form.name in ref.CODES and data.draw(st.booleans()):
            out = Format(form.name, form.block, seed + 7)
        if error is not None:
            total = total + error
        wanted = ref.encode(total, out, 11)
        got, rest = reduce(device, out, sent, numel, error=error, first=11, **common)
        assert got.tobytes() == wanted
        if rest is not None:
            assert same_bits(rest, total - ref.decode(wanted, form, numel))

    run()


@pytest.mark.parametrize("form", FORMS[:6], ids=IDS[:6])
def test_decodes_every_code(device: Any, form: Format) -> None:
    """Payloads that no encoder writes are decoded by the format too: any code with any step."""
    rng = np.random.default_rng(3)
    numel = 1000
    payload = bytearray(rng.integers(0, 256, form.payload_bytes(numel), dtype=np.uint8))
    stride = 2 + form.block * ref.CODES[form.name][0] // 8
    for at in range(0, len(payload), stride):
        payload[at + 1] &= 0xBF  # a finite step
    got, _ = reduce(device, form, [bytes(payload)], numel, to_sum=True)
    assert same_bits(got, ref.decode(bytes(payload), form, numel))


def test_topk_indices_past_a_short_chunk_write_nothing(device: Any) -> None:
    payload = ref.bf16_bytes(1.0) + ref.pack([1, 4095], 12) + ref.pack([1, 2], 2)
    got, _ = reduce(device, Format("topk"), [payload], 100, to_sum=True)
    wanted = np.zeros(100, dtype=np.float32)
    wanted[1] = 10.0
    assert same_bits(got, wanted)


def test_adds_in_rank_order(device: Any) -> None:
    """In fp32 (1 + 1e8) - 1e8 is 0 and (1e8 - 1e8) + 1 is 1: the order shows."""
    values = {rank: np.full(70, v, dtype=np.float32) for rank, v in enumerate((1, 1e8, -1e8))}
    form = Format("fp32")
    for order, wanted in (((0, 1, 2), 0.0), ((1, 2, 0), 1.0), ((1, 0, 2), 0.0)):
        for own_rank in (None, 0, 1, 2):
            sent = [values[m].tobytes() for r, m in enumerate(order) if r != own_rank]
            own = None if own_rank is None else values[order[own_rank]]
            got, _ = reduce(device, form, sent, 70, own=own, own_rank=own_rank or 0, to_sum=True)
            assert got.tolist() == [wanted] * 70


# --------------------------------------------------------------------------------------------- hash


def test_hashes_bits(device: Any) -> None:
    rng = np.random.default_rng(0)
    data = [rng.integers(0, 256, n, dtype=np.uint8) for n in (0, 1, 2, 3, 4, 5, 400, 4097, 140000)]
    shifted = []
    for bytes_ in data:
        buffer = Buffer(len(bytes_), torch.uint8, device.tensors, 3)
        shifted.append(buffer.filled(bytes_))
    hashes = device.op("hash_bits")(shifted)
    assert hashes.dtype == torch.int64 and hashes.shape == (len(data),)
    assert hashes.device == shifted[0].device
    wanted = [ref.hash_bits(d.tobytes()) for d in data]
    assert [h % 2**64 for h in hashes.tolist()] == wanted and len(set(wanted)) == len(data)


def test_hashes_of_any_dtype_and_shape(device: Any) -> None:
    tensors = [
        torch.arange(24, dtype=torch.float64).view(2, 3, 4),
        torch.arange(7, dtype=torch.bfloat16),
        torch.tensor(3, dtype=torch.int16),
        torch.tensor([True, False, True]),
    ]
    hashes = device.op("hash_bits")([t.to(device.tensors) for t in tensors]).tolist()
    raw = [t.reshape(-1).view(torch.uint8).numpy().tobytes() for t in tensors]
    assert [h % 2**64 for h in hashes] == [ref.hash_bits(r) for r in raw]


# ---------------------------------------------------------------------------------------- bad input


def encode_arguments(device: Any, **change: Any) -> tuple[Any, ...]:
    on = device.tensors
    arguments = {
        "anchor": torch.zeros(100, device=on),
        "local": [torch.zeros(60, device=on), torch.zeros(40, device=on)],
        "begins": [0, 60],
        "weights": [1.0, 1.0],
        "error": torch.zeros(100, device=on),
        "numel": 100,
        "format": 2,
        "block": 64,
        "stochastic": False,
        "seed": 0,
        "first": 0,
        "payload": torch.zeros(104, dtype=torch.uint8, device=on),
    }
    return tuple({**arguments, **change}.values())


def reduce_arguments(device: Any, **change: Any) -> tuple[Any, ...]:
    on = device.tensors
    arguments = {
        "payloads": torch.zeros(2, 104, dtype=torch.uint8, device=on),
        "own": torch.zeros(100, device=on),
        "own_rank": 2,
        "error": torch.zeros(100, device=on),
        "numel": 100,
        "format": 2,
        "block": 64,
        "stochastic": False,
        "seed": 0,
        "first": 0,
        "payload": torch.zeros(104, dtype=torch.uint8, device=on),
        "sum": None,
    }
    return tuple({**arguments, **change}.values())


Change = Callable[[], dict[str, Any]]
BAD_ENCODE: list[tuple[Change, str]] = [
    (lambda: {"anchor": torch.zeros(99)}, r"anchor must have shape \[100\], got \[99\]"),
    (
        lambda: {"anchor": torch.zeros(100, dtype=torch.float64)},
        "anchor must have dtype .*, got float64",
    ),
    (lambda: {"anchor": torch.zeros(200)[::2]}, "anchor must be contiguous"),
    (lambda: {"error": torch.zeros(101)}, r"error must have shape \[100\], got \[101\]"),
    (
        lambda: {"error": torch.zeros(100, dtype=torch.bfloat16)},
        "error must have dtype .*, got bfloat16",
    ),
    (
        lambda: {"local": [torch.zeros(60)]},
        "begins and weights must have 1 numbers, .*, got 2 and 2",
    ),
    (lambda: {"weights": [1.0]}, "begins and weights must have 2 numbers, .*, got 2 and 1"),
    (lambda: {"weights": [1.0, float("nan")]}, "weights must be finite, got nan"),
    (lambda: {"begins": [1, 60]}, "begins must start with 0, got 1"),
    (lambda: {"begins": [0, 0]}, "begins must be rising numbers under numel, got 0 before 0"),
    (
        lambda: {"local": [torch.zeros(100), torch.zeros(0)], "begins": [0, 100]},
        "begins must be rising numbers under numel, got 100 before 100",
    ),
    (
        lambda: {"local": [torch.zeros(60), torch.zeros(39)]},
        r"local\[1\] must have 40 values or none, got 39",
    ),
    (
        lambda: {"local": [torch.zeros(60), torch.zeros(40).int()]},
        r"local\[1\] must have dtype .*, got int32",
    ),
    (
        lambda: {"local": [torch.zeros(60), torch.zeros(4, 10)]},
        r"local\[1\] must have shape .*, got \[4, 10\]",
    ),
    (
        lambda: {"local": [], "begins": [], "weights": []},
        "local must have at least one tensor for 100 values, got 0",
    ),
    (lambda: {"numel": -1}, "numel must be at least 0.*, got -1"),
    (lambda: {"format": 6}, r"format must be the number of one of fp32, bf16, .*, got 6"),
    (lambda: {"block": 32}, "block must be 64 or 128.*, got 32"),
    (lambda: {"seed": -1}, "seed must .*, got -1"),
    (lambda: {"first": -1}, "first must .*, got -1"),
    (
        lambda: {"payload": torch.zeros(103, dtype=torch.uint8)},
        "payload must have 104 bytes for 100 values, got 103",
    ),
    (lambda: {"payload": torch.zeros(104)}, "payload must have dtype uint8.*, got float32"),
    (lambda: {"payload": torch.zeros(208, dtype=torch.uint8)[::2]}, "payload must be contiguous"),
]
BAD_REDUCE: list[tuple[Change, str]] = [
    (lambda: {"payloads": torch.zeros(2, 103, dtype=torch.uint8)}, "payloads must have shape"),
    (lambda: {"payloads": torch.zeros(2, 104)}, "payloads must have dtype uint8.*, got float32"),
    (
        lambda: {"payloads": torch.zeros(104, 2, dtype=torch.uint8).t()},
        "payloads must have contiguous rows, got stride 2",
    ),
    (lambda: {"own": torch.zeros(99)}, r"own must have shape \[100\], got \[99\]"),
    (lambda: {"own_rank": 3}, r"own_rank must be in 0 \.\. 2.*, got 3"),
    (lambda: {"own": None}, r"own_rank must be in 0 \.\. 0.*, got 2"),
    (
        lambda: {"own": None, "payloads": torch.zeros(0, 104, dtype=torch.uint8)},
        r"payloads \(number of members\) must be in 1 .*, got 0",
    ),
    (lambda: {"error": torch.zeros(99)}, r"error must have shape .*, got \[99\]"),
    (lambda: {"sum": torch.zeros(100)}, "payload or sum must be given, one of them, got both"),
    (lambda: {"payload": None}, "payload or sum must be given, one of them, got neither"),
    (
        lambda: {"payload": None, "sum": torch.zeros(100)},
        "error must be None with sum, got a tensor",
    ),
    (
        lambda: {"payload": None, "sum": torch.zeros(10), "error": None},
        r"sum must have shape \[100\], got \[10\]",
    ),
    (
        lambda: {"payload": torch.zeros(105, dtype=torch.uint8)},
        "payload must have 104 bytes for 100 values, got 105",
    ),
]


def moved(device: Any, value: Any) -> Any:
    """On the device, with the same strides: `to` leaves no gaps between a copy's values."""
    if isinstance(value, list):
        return [moved(device, one) for one in value]
    if not isinstance(value, Tensor):
        return value
    strides = value.stride()
    there = torch.empty_strided(value.shape, strides, dtype=value.dtype, device=device.tensors)
    return there.copy_(value)


@pytest.mark.parametrize(("change", "message"), BAD_ENCODE)
def test_encode_refuses(device: Any, change: Change, message: str) -> None:
    encode_op = device.op("delta_encode")
    encode_op(*encode_arguments(device))
    changed = {name: moved(device, value) for name, value in change().items()}
    with pytest.raises(ValueError, match=message):
        encode_op(*encode_arguments(device, **changed))


@pytest.mark.parametrize(("change", "message"), BAD_REDUCE)
def test_reduce_refuses(device: Any, change: Change, message: str) -> None:
    reduce_op = device.op("delta_reduce")
    reduce_op(*reduce_arguments(device))
    changed = {name: moved(device, value) for name, value in change().items()}
    with pytest.raises(ValueError, match=message):
        reduce_op(*reduce_arguments(device, **changed))


def test_hash_refuses(device: Any) -> None:
    hash_op = device.op("hash_bits")
    with pytest.raises(ValueError, match=r"tensors\[1\] must be contiguous"):
        hash_op([torch.zeros(2, device=device.tensors), torch.zeros(4, device=device.tensors)[::2]])
