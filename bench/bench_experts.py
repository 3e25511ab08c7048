"""The experts of a layer, forward and backward, against plain torch, on the CPU and on a GPU.

Routing is given. Ours runs compact, expand, contract, combine and their backward passes; the rivals
also include sorting or searching the slots.

On a GPU the sizes are those of real models: each grouped GEMM and the whole layer, against a dense
GEMM of as many FLOPs and against other packages if they are installed. Lower bounds on time
("floors"): FLOPs over the rate of a dense bf16 GEMM, and bytes over the rate of a copying kernel,
both measured in the same run.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import common
import expert_cases as cases
import expert_work as work
import machine
import pytest
import rivals
import torch
from bench_token_kernels import copy_bandwidth
from common import Problem, Shape
from torch import Tensor

from fomoe_ext import _C, ops
from fomoe_ext.ops import native

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
    """Same arguments and result as `rivals.loop_experts`."""
    table = ops.compact(experts, resident_index, expand_weight.shape[0])
    return ops.moe_experts(x, weights, table, expand_weight, contract_weight)


def forward_backward(layer: Layer, problem: Problem) -> tuple[Tensor, ...]:
    """y and the gradients of x, the routing weights and both expert weights."""
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


# ---- the sizes of real models on a GPU -----------------------------------------------------------

Call = Callable[[], Any]
TASKS = (
    "expand",
    "contract",
    "contract_backward",
    "grouped_rows",
    "expand_weight_grad",
    "contract_weight_grad",
    "forward",
    "forward_backward",
    "layer",
)
DENSE = {"cuda": 8192, "cpu": 256}  # size of the square matmul that gives the rate of the machine
DTYPE = torch.bfloat16


@dataclass
class Task:
    """What one benchmark times: ours, rivals with the same result, and variants of ours."""

    kernels: list[work.Kernel]
    ours: Call
    rivals: dict[str, Call] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)  # what could not run, and why
    others: dict[str, Call] = field(default_factory=dict)  # variants: CUDA graph, fewer residents
    facts: dict[str, Any] = field(default_factory=dict)

    def add_rival(self, name: str, make: Callable[[], Call], wanted: Sequence[Tensor]) -> None:
        """Adds the rival if it runs here and its result equals `wanted`."""
        try:
            call = make()
            common.assert_same(call(), wanted, DTYPE)
        except AssertionError:
            self.absent[name] = "its result differs"
        except rivals.Absent as reason:
            self.absent[name] = str(reason)
        except Exception as error:  # other packages may raise anything; it is recorded
            self.absent[name] = f"{type(error).__name__}: {error}"[:200]
        else:
            self.rivals[name] = call


def verb_task(inputs: cases.Inputs, name: str) -> Task:
    """One grouped GEMM, all experts resident."""
    verbs = cases.Verbs(inputs)
    wanted = verbs.theirs(name, rivals.LoopProducts())
    common.assert_same(verbs.our_rows(name), wanted, DTYPE)
    task = Task([work.gemms(inputs.model, inputs.load)[name]], lambda: verbs.ours(name))
    task.add_rival("grouped_mm", lambda: lambda: verbs.theirs(name, rivals.GroupedMM()), wanted)
    task.rivals["dense"] = verbs.dense(name)
    return task


def experts_task(inputs: cases.Inputs, backward: bool) -> Task:
    """compact and moe_experts, with all, half and a quarter of the experts resident."""

    def call(layer: Callable[[cases.Inputs], Tensor], inputs: cases.Inputs = inputs) -> Call:
        return cases.with_mode(layer, inputs, backward)

    wanted = call(lambda i: cases.torch_experts(i, rivals.loop_experts))()
    ours = call(cases.our_experts)
    common.assert_same(ours(), wanted, DTYPE)
    task = Task(work.experts_kernels(inputs.model, inputs.load, backward), ours)
    task.add_rival("grouped_mm", lambda: call(cases.torch_experts), wanted)
    task.add_rival("compiled", lambda: call(cases.compiled_experts(inputs)), wanted)
    for name in rivals.OTHERS:
        task.add_rival(name, lambda name=name: call(cases.other_experts(inputs, name)), wanted)
    del wanted
    if backward:
        task.facts["memory"] = memory_of(ours, call(cases.torch_experts), inputs)
    add_parts(task, inputs, lambda part: call(cases.our_experts, part))
    return task


def layer_task(inputs: cases.Inputs) -> Task:
    """MoELayer forward and backward, with its router."""
    layers = cases.make_layers(inputs)
    loop = rivals.routed(rivals.loop_experts, *layers.router)
    wanted = replace(layers, theirs=loop).run_theirs()
    common.assert_same(layers.run_ours(), wanted, DTYPE)
    kernels = work.experts_kernels(inputs.model, inputs.load, True)
    kernels += work.router_kernels(inputs.model, inputs.load)
    task = Task(kernels, layers.run_ours)
    task.add_rival("grouped_mm", lambda: layers.run_theirs, wanted)
    del wanted
    task.facts["memory"] = memory_of(layers.run_ours, layers.run_theirs, inputs)
    add_parts(task, inputs, lambda part: cases.make_layers(part).run_ours)
    return task


def add_parts(task: Task, inputs: cases.Inputs, call: Callable[[cases.Inputs], Call]) -> None:
    """Adds variants: with fewer resident experts, and replayed from a CUDA graph."""
    shares = {}
    for name, parts in work.PARTS.items():
        if parts > 1:
            part = inputs.part(parts)
            task.others[name] = call(part)
            shares[name] = part.rows / inputs.rows
    task.facts["rows_share"] = shares
    if inputs.x.is_cuda:
        try:
            task.others["graph"] = common.captured(task.ours)
        except RuntimeError as error:  # everything else can still be measured
            torch.cuda.synchronize()
            task.absent["replay in a graph"] = str(error)[:200]


def memory_of(ours: Call, theirs: Call, inputs: cases.Inputs) -> dict[str, dict[str, int | None]]:
    """Bytes that are kept for the backward, and peak bytes of both passes, of ours and grouped_mm.

    The peak is also given without the gradients of the expert weights, which both return.
    """
    grads = sum(t.nbytes for t in inputs.parameters if t is not None)
    found: dict[str, dict[str, int | None]] = {}
    for name, run in (("ours", ours), ("grouped_mm", theirs)):
        peak = common.peak_bytes(run) if inputs.x.is_cuda else None
        found[name] = {
            "kept": common.kept_bytes(run, inputs.leaves),
            "peak": peak,
            "peak_without_weight_gradients": None if peak is None else peak - grads,
        }
    return found


def make_task(inputs: cases.Inputs, name: str) -> Task:
    if name == "layer":
        return layer_task(inputs)
    if name in ("forward", "forward_backward"):
        return experts_task(inputs, name == "forward_backward")
    return verb_task(inputs, name)


def measure(
    task: Task, device: str, copy_rate: float, rounds: int = common.INTERLEAVED_ROUNDS
) -> dict[str, Any]:
    """Times all calls of the task in turn. Returns the figures for `extra_info`."""
    size = DENSE[device]
    square = torch.randn(size, size, device=device, dtype=DTYPE)
    calls = {"ours": task.ours, "square": lambda: square @ square}
    calls |= {f"rival {name}": call for name, call in task.rivals.items()} | task.others
    seconds = common.interleaved_seconds(calls, device, rounds)
    dense_rate = 2 * size**3 / seconds["square"]
    floors = work.floors(task.kernels, dense_rate, copy_rate)
    flops, ours = sum(kernel.flops for kernel in task.kernels), seconds["ours"]
    result = {
        "seconds": ours,
        "flops": flops,
        "least_bytes": sum(kernel.bytes for kernel in task.kernels),
        "flops_per_second": flops / ours,
        "dense_flops_per_second": dense_rate,
        "copy_bytes_per_second": copy_rate,
        "copy_call": common.COPY_CALLS[device],
        "compute_floor_seconds": floors.compute,
        "memory_floor_seconds": floors.memory,
        "kernel_floor_seconds": floors.kernels,
        "fraction_of_floor": floors.larger / ours,
        "rivals": {
            name: {
                "seconds": seconds[f"rival {name}"],
                "ratio": seconds[f"rival {name}"] / ours,
            }
            for name in task.rivals
        },
        "absent": task.absent,
        **task.facts,
    }
    for name in task.others:
        result[f"{name}_seconds"] = seconds[name]
    return result


def tiles_of(task: Task, hopper: bool) -> dict[str, str]:
    """The tile that each grouped GEMM uses."""
    return {
        kernel.name: _C.expert_tile(
            kernel.verb, common.dtype_name(DTYPE), kernel.columns, kernel.terms, hopper
        )
        for kernel in task.kernels
        if isinstance(kernel, work.Gemm)
    }


class Held:
    """Caches the inputs of the last benchmark: the next one mostly needs the same, and memory may
    not hold two."""

    key: tuple[work.Model, int, str] | None = None
    inputs: cases.Inputs | None = None

    @classmethod
    def get(cls, model: work.Model, tokens: int, routing: str) -> cases.Inputs:
        if cls.key != (model, tokens, routing) or cls.inputs is None:
            cls.key = cls.inputs = None
            gc.collect()
            torch.cuda.empty_cache()
            needed, free = work.needed_bytes(model, tokens), torch.cuda.mem_get_info()[0]
            if needed > free:
                pytest.skip(
                    f"needs about {needed / 1e9:.0f} GB of device memory, {free / 1e9:.0f} are free"
                )
            cls.inputs = cases.make_inputs(model, tokens, routing, "cuda", DTYPE)
            cls.key = (model, tokens, routing)
        return cls.inputs


@pytest.mark.skipif(not native.cuda_loaded, reason="there is no GPU, or no CUDA kernels are built")
@pytest.mark.parametrize("task_name", TASKS)  # varies fastest, so that inputs are reused
@pytest.mark.parametrize("routing", work.ROUTINGS)
@pytest.mark.parametrize("tokens", work.TOKENS)
@pytest.mark.parametrize("model", work.MODELS, ids=lambda model: model.name)
def test_experts_on_gpu(
    benchmark: Any, model: work.Model, tokens: int, routing: str, task_name: str
) -> None:
    inputs = Held.get(model, tokens, routing)
    hopper = torch.cuda.get_device_capability()[0] == 9
    watch = machine.Watch("cuda")
    task = make_task(inputs, task_name)
    result = measure(task, "cuda", copy_bandwidth())
    result |= {
        "task": task_name,
        "model": asdict(model),
        "tokens": tokens,
        "routing": routing,
        "rows": inputs.rows,
        "largest_group": max(inputs.load.groups),
        "forced_tile": os.environ.get("FOMOE_EXPERTS_TILE", ""),
        "tiles": tiles_of(task, hopper),
    }
    benchmark.extra_info.update(result, machine=watch.facts())

    def run() -> None:
        task.ours()
        torch.cuda.synchronize()

    benchmark.pedantic(run, rounds=3)
