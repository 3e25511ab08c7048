"""route and its backward on every device: the CUDA kernels choose what the CPU kernel chooses, to
the last bit. That the CPU kernel is right is shown in test_route.py, against fp64.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fomoe_ext import ops

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CPU = torch.ops.fomoe


def make_logits(tokens, experts, dtype, kind, generator):
    """Random logits of one kind: typical for routers, or hard."""
    logits = 2 * torch.randn(tokens, experts, generator=generator)
    if kind == "ties":
        logits = torch.randint(-1, 2, (tokens, experts), generator=generator).float()
    elif kind == "one hot expert":
        logits[:, experts // 2] += 20
    elif kind == "equal":
        logits = torch.zeros(tokens, experts)
    elif kind == "extreme":
        logits *= 40
        logits[torch.rand(tokens, experts, generator=generator) < 0.2] = -torch.inf
        logits[:, -1] = 1.0  # softmax wants a finite largest one
    return logits.to(dtype)


def on(device, *tensors):
    return [t.to(device.tensors) if isinstance(t, torch.Tensor) else t for t in tensors]


def check(device, logits, top_k, scoring, bias, allowed, groups, kept, renormalize, statistics):
    """Forward and backward on the device against the CPU ops."""
    number = ops.SCORINGS[scoring]
    options = (groups, kept, renormalize, 1.5, statistics)
    wanted = CPU.route(logits, top_k, number, bias, allowed, *options)
    got = device.op("route")(*on(device, logits, top_k, number, bias, allowed), *options)
    weights, experts, sums = (t.cpu() for t in got)
    assert torch.equal(experts, wanted[1])
    assert torch.equal(weights, wanted[0])
    if statistics:
        assert torch.equal(sums[:-1], wanted[2][:-1])
        # The entropy uses another logarithm than the CPU's.
        assert abs(sums[-1] - wanted[2][-1]) <= 1e-5 * 2**32 * max(len(logits), 1)
    generator = torch.Generator().manual_seed(top_k)
    grad = torch.randn(len(logits), top_k, generator=generator)
    arguments = (grad, logits, wanted[1], allowed)
    backward = device.op("route_backward")(*on(device, *arguments), number, renormalize, 1.5)
    assert torch.equal(backward.cpu(), CPU.route_backward(*arguments, number, renormalize, 1.5))


@settings(max_examples=250, deadline=None)
@given(st.data())
def test_chooses_as_the_cpu(device, data):
    experts = data.draw(
        st.one_of(
            st.integers(2, 96), st.sampled_from([113, 128, 160, 256, 257, 384, 512, 1000, 1024])
        ),
        label="experts",
    )
    tokens = data.draw(st.sampled_from([0, 1, 2, 3, 7, 13]), label="tokens")
    kinds = ["normal", "ties", "one hot expert", "equal", "extreme"]
    kind = data.draw(st.sampled_from(kinds), label="kind")
    dtype = data.draw(st.sampled_from(DTYPES), label="dtype")
    scoring = data.draw(st.sampled_from(["sigmoid", "softmax"]), label="scoring")
    divisors = [g for g in range(1, experts + 1) if experts % g == 0]
    groups = data.draw(st.one_of(st.just(1), st.sampled_from(divisors)), label="groups")
    kept = data.draw(st.integers(1, groups), label="groups kept")
    most = min(64, experts // groups * kept)
    top_k = data.draw(st.integers(1, most), label="top_k")
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1 << 20), label="seed"))
    bias = allowed = None
    if data.draw(st.booleans(), label="biased"):
        bias = 0.3 * torch.randn(experts, generator=generator)
    if data.draw(st.booleans(), label="restricted"):
        allowed = torch.rand(experts, generator=generator) < 0.5
        allowed[-1] = True
    check(
        device,
        make_logits(tokens, experts, dtype, kind, generator),
        top_k,
        scoring,
        bias,
        allowed,
        groups,
        kept,
        data.draw(st.booleans(), label="renormalize"),
        data.draw(st.booleans(), label="statistics"),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scoring", ["sigmoid", "softmax"])
@pytest.mark.parametrize(
    "experts, top_k, groups, kept",
    [
        (64, 8, 1, 1),  # OLMoE
        (128, 8, 1, 1),  # Qwen3-30B-A3B
        (8, 2, 1, 1),  # Mixtral
        (256, 8, 8, 4),  # DeepSeek-V3
        (64, 16, 1, 1),  # FoMoE, 13.3B
        (1024, 64, 1, 1),  # the limits
    ],
)
def test_shapes_of_models(device, experts, top_k, groups, kept, scoring, dtype):
    generator = torch.Generator().manual_seed(experts)
    logits = make_logits(37, experts, dtype, "normal", generator)
    bias = 0.1 * torch.randn(experts, generator=generator) if groups > 1 else None
    check(device, logits, top_k, scoring, bias, None, groups, kept, groups > 1, True)


@pytest.mark.parametrize("offset", [1, 2, 3])
def test_storage_that_starts_anywhere(device, offset):
    logits = make_logits(9, 128, torch.bfloat16, "normal", torch.Generator().manual_seed(offset))
    shifted = torch.cat([logits.new_zeros(offset), logits.flatten()]).to(device.tensors)
    shifted = shifted[offset:].view(9, 128)
    got = device.op("route")(shifted, 8, 0, None, None, 1, 1, False, 1.0, False)
    wanted = CPU.route(logits, 8, 0, None, None, 1, 1, False, 1.0, False)
    assert torch.equal(got[0].cpu(), wanted[0]) and torch.equal(got[1].cpu(), wanted[1])


@pytest.mark.parametrize("scoring", ["sigmoid", "softmax"])
def test_nan_reaches_the_weights(device, scoring):
    """On CUDA a bad token raises no error, as that would synchronise: its weights are NaN."""
    if device.name == "cpu":
        pytest.skip("the CPU op raises: test_route.py")
    logits = make_logits(5, 40, torch.float32, "normal", torch.Generator().manual_seed(0))
    wanted = CPU.route(logits, 4, ops.SCORINGS[scoring], None, None, 1, 1, False, 1.0, True)
    logits[2, 33] = torch.nan
    arguments = (logits.to(device.tensors), 4, ops.SCORINGS[scoring], None, None)
    got = device.op("route")(*arguments, 1, 1, False, 1.0, True)
    weights, experts, sums = (t.cpu() for t in got)
    assert experts[2].tolist() == [0, 1, 2, 3] and weights[2].isnan().all()
    others = [0, 1, 3, 4]
    assert torch.equal(experts[others], wanted[1][others])
    assert torch.equal(weights[others], wanted[0][others])
    assert sums[:40].sum() == 4 * 4  # the bad token is not counted


def test_limits_are_named(device):
    if device.name == "cpu":
        pytest.skip("the CPU kernel has none")
    route = device.op("route")
    for experts, top_k, message in [
        (1025, 2, r"logits\.shape\[1\] \(experts\) must be at most 1024 on CUDA, got 1025"),
        (128, 65, "top_k must be at most 64.*, got 65"),
    ]:
        with pytest.raises(ValueError, match=message):
            logits = torch.zeros(1, experts, device=device.tensors)
            route(logits, top_k, 0, None, None, 1, 1, False, 1.0, False)


def test_same_bits_every_time(device):
    logits = make_logits(600, 48, torch.float32, "normal", torch.Generator().manual_seed(1))
    arguments = (logits.to(device.tensors), 6, 1, None, None, 1, 1, True, 1.0, True)
    first = device.op("route")(*arguments)
    for _ in range(3):
        again = device.op("route")(*arguments)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
