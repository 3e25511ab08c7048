"""route, compact and combine on the CPU, each against plain torch ops.

They do hardly any arithmetic, so their lower bound on time is bytes over memory bandwidth.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import common
import pytest
import torch
from common import Problem, Shape
from torch import Tensor

from fomoe_ext import ops

CASES = pytest.mark.parametrize("shape", common.SHAPES, ids=str)


def measure(
    benchmark: Any,
    verb: str,
    case: common.Case,
    least_bytes: int,
    ours: Callable[[], tuple[Tensor, ...]],
    torch_ops: Callable[[], tuple[Tensor, ...]],
) -> None:
    common.assert_same(ours(), torch_ops(), case[1])
    # Several calls per round, because one is too short to be timed well.
    calls = max(1, min(20, int(0.05 / common.seconds_of(torch_ops))))

    def repeat(run: Callable[[], Any]) -> None:
        for _ in range(calls):
            run()

    seconds, others = common.interleave(
        benchmark,
        lambda: repeat(ours),
        {"torch": lambda: common.seconds_of(lambda: repeat(torch_ops)) / calls},
    )
    if not seconds:
        return
    seconds /= calls
    floor = least_bytes / common.memory_bandwidth()
    result = {
        "seconds": seconds,
        "torch_seconds": others["torch"],
        "memory_floor_seconds": floor,
        "fraction_of_floor": floor / seconds,
    }
    benchmark.extra_info.update(result, calls_per_round=calls)
    common.verb_results[verb, case] = result


@CASES
def test_route(benchmark: Any, shape: Shape) -> None:
    """Sigmoid scores, top-k and the gradient of the logits."""
    problem = common.make_problem(shape, torch.float32, "all")
    logits = problem.logits
    grad = torch.randn(shape.tokens, shape.top_k, generator=torch.Generator().manual_seed(1))

    def ours() -> tuple[Tensor, ...]:
        weights, _ = ops.route(logits, shape.top_k)
        return weights, *torch.autograd.grad(weights, logits, grad)

    def torch_ops() -> tuple[Tensor, ...]:
        scores = logits.sigmoid()
        weights, _ = scores.topk(shape.top_k, dim=1)
        return weights, *torch.autograd.grad(weights, logits, grad)

    moved = 3 * logits.nbytes + 3 * problem.weights.nbytes + 2 * problem.experts.nbytes
    measure(benchmark, "route", (shape, torch.float32, "all"), moved, ours, torch_ops)


@pytest.mark.parametrize("residency", common.RESIDENCIES)
@CASES
def test_compact(benchmark: Any, shape: Shape, residency: str) -> None:
    """Row tables from the chosen experts; the rival sorts with torch."""
    problem = common.make_problem(shape, torch.float32, residency)

    def ours() -> tuple[Tensor, ...]:
        table = ops.compact(problem.experts, problem.resident_index, problem.residents)
        return table.slot_of_row[: problem.rows], table.offsets[1:]

    def torch_ops() -> tuple[Tensor, ...]:
        rows = problem.resident_index[problem.experts.long()].flatten()
        kept = torch.nonzero(rows >= 0).flatten()
        order = kept[torch.argsort(rows[kept], stable=True)]
        counts = torch.bincount(rows[order], minlength=problem.residents)
        return order.int(), counts.cumsum(0).int()

    moved = problem.experts.nbytes + sum(t.nbytes for t in problem.table)
    measure(benchmark, "compact", (shape, torch.float32, residency), moved, ours, torch_ops)


@pytest.mark.parametrize("residency", common.RESIDENCIES)
@pytest.mark.parametrize("dtype", common.DTYPES, ids=common.dtype_name)
@CASES
def test_combine(benchmark: Any, shape: Shape, dtype: torch.dtype, residency: str) -> None:
    """The weighted sum per token, and the unweighted sum of row gradients in the backward pass."""
    problem = common.make_problem(shape, dtype, residency)
    generator = torch.Generator().manual_seed(2)
    slots = shape.tokens * shape.top_k
    rows = torch.randn(slots, shape.hidden, generator=generator).to(dtype)
    weights = problem.weights.detach()
    slot_of_row = problem.table.slot_of_row[: problem.rows].long()
    token_of_row = problem.table.token_of_row[: problem.rows].long()

    def ours() -> tuple[Tensor, ...]:
        return ops.combine(rows, weights, problem.table), ops.combine(rows, None, problem.table)

    def torch_ops() -> tuple[Tensor, ...]:
        live, zeros = rows[: problem.rows], torch.zeros_like(problem.x, requires_grad=False)
        weighted = live * weights.flatten()[slot_of_row, None].to(dtype)
        return (
            zeros.index_add(0, token_of_row, weighted),
            zeros.index_add(0, token_of_row, live),
        )

    moved = 2 * (_row_bytes(problem) + problem.x.nbytes + problem.table.row_of_slot.nbytes)
    measure(benchmark, "combine", (shape, dtype, residency), moved, ours, torch_ops)


def _row_bytes(problem: Problem) -> int:
    return problem.rows * problem.shape.hidden * problem.x.element_size()
