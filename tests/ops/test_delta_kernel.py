"""delta_encode with more parts than a launch takes, and the delta ops in a CUDA graph. What they
compute is tested in test_delta.py, on every device alike.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fomoe_ext.ops import native
from fomoe_ext.placement.wire import wire_bytes

FORMATS = ["fp32", "bf16", "int8", "int4", "int2", "topk"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def parts_of(numel: int, count: int, seed: int) -> tuple[list[Tensor], list[int], list[float]]:
    """local, begins and weights of parts of uneven lengths, some without values."""
    generator = torch.Generator().manual_seed(seed)
    inner = torch.randperm(numel - 1, generator=generator)[: count - 1] + 1
    begins = [0, *sorted(inner.tolist())]
    local = []
    for part, (begin, end) in enumerate(zip(begins, [*begins[1:], numel], strict=True)):
        size = 0 if part % 7 == 6 else end - begin
        local.append(torch.randn(size, generator=generator).to(DTYPES[part % 3]))
    return local, begins, [1.0 if part % 2 == 0 else 0.3 for part in range(count)]


@pytest.mark.parametrize("count", [64, 65, 128, 129, 1000])
@pytest.mark.parametrize("anchored", [True, False], ids=["anchor", "no-anchor"])
def test_more_parts_than_a_launch_takes(device: Any, count: int, anchored: bool) -> None:
    """The result is the same as with a launch per part."""
    numel = 5000
    local, begins, weights = parts_of(numel, count, seed=count)
    anchor = torch.randn(numel, generator=torch.Generator().manual_seed(1)) if anchored else None
    on = lambda t: None if t is None else t.to(device.tensors)
    encode = device.op("delta_encode")

    def payload_of(
        a: Tensor | None, parts: list[Tensor], at: list[int], w: list[float], size: int
    ) -> Tensor:
        payload = torch.full((4 * size,), 0x5A, dtype=torch.uint8, device=device.tensors)
        encode(on(a), [on(p) for p in parts], at, w, None, size, 0, 64, False, 0, 0, payload)
        return payload.cpu()

    alone = []
    for part, begin, end, weight in zip(local, begins, [*begins[1:], numel], weights, strict=True):
        own = None if anchor is None else anchor[begin:end]
        alone.append(payload_of(own, [part], [0], [weight], end - begin))
    assert torch.equal(payload_of(anchor, local, begins, weights, numel), torch.cat(alone))


@pytest.mark.skipif(not native.cuda_loaded, reason="no GPU, or fomoe_ext was built without CUDA")
@pytest.mark.parametrize("number", range(6), ids=FORMATS)
def test_replay_on_new_values(number: int) -> None:
    """Encode, reduce and hash captured in one graph: no op synchronises with the host."""
    numel, ops = 9001, torch.ops.fomoe
    size = wire_bytes(FORMATS[number], numel)
    generator = torch.Generator().manual_seed(number)
    values = torch.zeros(4, numel, device="cuda")
    errors, sums = torch.zeros(4, numel, device="cuda"), torch.empty(numel, device="cuda")
    payloads = torch.empty(4, size, dtype=torch.uint8, device="cuda")
    anchor = torch.ones(numel, device="cuda")

    def meeting(on: Any) -> Tensor:
        v, e, p, s, a = on
        for row in range(4):
            ops.delta_encode(
                a, [v[row]], [0], [1.0], e[row], numel, number, 64, False, 0, 0, p[row]
            )
        ops.delta_reduce(p, None, 0, None, numel, number, 64, False, 0, 0, None, s)
        return ops.hash_bits([p, s])

    there = (values, errors, payloads, sums, anchor)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        meeting(there)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        hashes = meeting(there)
    for _ in range(3):
        values.copy_(torch.randn(4, numel, generator=generator))
        here = tuple(tensor.cpu() for tensor in there)
        graph.replay()
        assert torch.equal(hashes.cpu(), meeting(here))
        assert all(torch.equal(a.cpu(), b) for a, b in zip(there, here, strict=True))
