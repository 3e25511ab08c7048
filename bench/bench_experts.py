"""The expert layer, forward and backward, against two ways to compute it in plain torch.

Routing is given; ours is compact, expand, contract, combine and their backward. The rivals sort or
search the slots themselves, as we do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import common
import pytest
import rivals
import torch
from common import Problem, Shape
from torch import Tensor

from fomoe_ext import ops

Layer = Callable[..., Tensor]
RIVALS: dict[str, Layer] = {"loop": rivals.loop_experts, "grouped_mm": rivals.grouped_mm_experts}


def our_experts(
    x: Tensor,
    weights: Tensor,
    experts: Tensor,
    resident_index: Tensor,
    expand_weight: Tensor,
    contract_weight: Tensor,
) -> Tensor:
    """Arguments and result as `rivals.loop_experts`."""
    table = ops.compact(experts, resident_index, expand_weight.shape[0])
    return ops.moe_experts(x, weights, table, expand_weight, contract_weight)


def forward_backward(layer: Layer, problem: Problem) -> tuple[Tensor, ...]:
    """y and its gradients to x, the combine weights and both expert weights."""
    y = layer(
        problem.x,
        problem.weights,
        problem.experts,
        problem.resident_index,
        problem.expand_weight,
        problem.contract_weight,
    )
    return y, *torch.autograd.grad(y, problem.leaves, problem.grad_y)


@pytest.mark.parametrize("residency", common.RESIDENCIES)
@pytest.mark.parametrize("dtype", common.DTYPES, ids=common.dtype_name)
@pytest.mark.parametrize("shape", common.SHAPES, ids=str)
def test_experts(benchmark: Any, shape: Shape, dtype: torch.dtype, residency: str) -> None:
    problem = common.make_problem(shape, dtype, residency)
    tokens = common.affordable_tokens(problem, dtype)
    subset = problem if tokens == shape.tokens else None
    subset = subset or common.make_problem(shape, dtype, residency, tokens)
    wanted = forward_backward(our_experts, subset)
    for layer in RIVALS.values():
        common.assert_same(wanted, forward_backward(layer, subset), dtype)
    del wanted

    def rate_of(layer: Layer) -> float:
        return subset.flops / common.seconds_of(lambda: forward_backward(layer, subset))

    dense = common.dense_dtype(dtype)
    others: dict[str, Callable[[], float]] = {"dense": lambda: common.dense_rate(dense)}
    for name, layer in RIVALS.items():
        others[name] = lambda layer=layer: rate_of(layer)
    seconds, rates = common.interleave(
        benchmark, lambda: forward_backward(our_experts, problem), others
    )
    if not seconds:
        return
    compute_floor = problem.flops / rates["dense"]
    memory_floor = problem.least_bytes / common.memory_bandwidth()
    result = {
        "seconds": seconds,
        "flops_per_second": problem.flops / seconds,
        "dense_flops_per_second": rates["dense"],
        "loop_flops_per_second": rates["loop"],
        "grouped_mm_flops_per_second": rates["grouped_mm"],
        "rival_tokens": tokens,
        "compute_floor_seconds": compute_floor,
        "memory_floor_seconds": memory_floor,
        "fraction_of_floor": max(compute_floor, memory_floor) / seconds,
    }
    benchmark.extra_info.update(result, dense_dtype=common.dtype_name(dense), rows=problem.rows)
    common.layer_results[shape, dtype, residency] = result
