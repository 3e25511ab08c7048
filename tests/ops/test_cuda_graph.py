"""The verbs, and a whole layer, captured in a CUDA graph and replayed on new inputs: no op
synchronises with the host, or needs on the host a size that only the device knows.
"""

from __future__ import annotations

import pytest
import torch

from fomoe_ext import MoELayer, ops
from fomoe_ext.ops import native

pytestmark = pytest.mark.skipif(
    not native.cuda_loaded, reason="no GPU, or fomoe_ext was built without CUDA"
)

TOKENS, EXPERTS, TOP_K, HIDDEN = 512, 64, 8, 256


def make_inputs(seed, skew):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(TOKENS, EXPERTS, generator=generator)
    logits[:, :4] += skew
    x = torch.randn(TOKENS, HIDDEN, generator=generator).bfloat16()
    return logits, x


def layer(logits, x, resident_index, num_resident):
    weights, experts, statistics = ops.route(
        logits, TOP_K, renormalize=True, return_statistics=True
    )
    table = ops.compact(experts, resident_index, num_resident, 128)
    y = ops.combine(ops.gather(x, table), weights, table)
    return experts, weights, statistics.load, y, table.offsets, table.tiles


def test_replay_on_new_inputs():
    index = torch.full((EXPERTS,), -1, dtype=torch.int32)
    index[::2] = torch.arange(EXPERTS // 2, dtype=torch.int32)
    logits, x = (t.cuda() for t in make_inputs(0, 0.0))
    index_there = index.cuda()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        layer(logits, x, index_there, EXPERTS // 2)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = layer(logits, x, index_there, EXPERTS // 2)
    for seed, skew in [(1, 0.0), (2, 3.0), (3, -3.0), (4, 30.0)]:
        new_logits, new_x = make_inputs(seed, skew)
        logits.copy_(new_logits)
        x.copy_(new_x)
        graph.replay()
        wanted = layer(new_logits, new_x, index, EXPERTS // 2)
        for got, want in zip(results, wanted, strict=True):
            assert torch.equal(got.cpu(), want)


def test_replay_of_a_layer_and_its_backward():
    """Forward and backward of a layer with half of its experts resident, in one graph, for inputs
    that are routed otherwise than those of the capture.
    """
    layer_there = MoELayer(
        *(HIDDEN, 96, EXPERTS, TOP_K),
        resident_experts=range(0, EXPERTS, 2),
        router_renormalize=True,
        dtype=torch.bfloat16,
        device="cuda",
    )
    parameters = list(layer_there.parameters())
    x = make_inputs(0, 0.0)[1].cuda().requires_grad_()
    grad_y = torch.randn_like(x)

    def step():
        y = layer_there(x)
        return y, *torch.autograd.grad(y, [x, *parameters], grad_y)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    for seed, scale in [(1, 1.0), (2, 0.0), (3, 5.0)]:
        # Scale 0: all tokens are the same, so that some experts get all tokens and others none.
        with torch.no_grad():
            x.copy_(scale * make_inputs(seed, 0.0)[1] + (seed == 2))
        graph.replay()
        got = [t.clone() for t in results]
        for mine, again in zip(got, step(), strict=True):
            assert torch.equal(mine, again)
