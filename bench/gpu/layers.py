"""Expert layers against all rivals that run here: the expert loop, grouped_mm, Liger, SonicMoE.

Rivals that compile or tune themselves do so before this step's turn, while other steps run.
"""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import bench_experts
import common
import expert_cases as cases
import expert_work as work
import rivals
import torch
import torch.nn.functional as F
from bench_experts import Call, Task
from bench_token_kernels import copy_bandwidth
from torch import Tensor

from bench.gpu import measured
from bench.gpu.measured import Case, Results, Turn
from fomoe_ext import ops

COMPILED = ("liger",)  # of rivals.OTHERS: those that are worth their compilation
PREPARE_SECONDS = 45.0  # that one of them may take at one size
UNREADY = "not prepared: it is for SwiGLU, up to 128 experts, on a GPU"


def experts_task(
    inputs: cases.Inputs, backward: bool, unready: Mapping[str, str]
) -> tuple[Task, float]:
    """compact and moe_experts with given routing, rivals, and our relative error. `unready`: why
    rivals of COMPILED are left out, by name.
    """
    call = lambda layer: cases.with_mode(layer, inputs, backward)
    loop = call(lambda i: cases.torch_experts(i, rivals.loop_experts))
    wanted, ours = loop(), call(cases.our_experts)
    error = max(common.normalised_error(g, w) for g, w in zip(ours(), wanted, strict=True))
    task = Task(work.experts_kernels(inputs.model, inputs.load, backward), ours)
    task.rivals["loop"] = loop
    task.add_rival("grouped_mm", lambda: call(cases.torch_experts), wanted)
    for name in COMPILED:
        if reason := unready.get(name):
            task.absent[name] = reason
            continue
        task.add_rival(name, lambda name=name: call(cases.other_experts(inputs, name)), wanted)
    del wanted
    if backward:
        memory = bench_experts.memory_of(ours, call(cases.torch_experts), inputs)
        task.facts["memory"] = memory
    bench_experts.add_parts(
        task, inputs, lambda part: cases.with_mode(cases.our_experts, part, backward)
    )
    return task, error


# ---- SonicMoE ------------------------------------------------------------------------------------


@dataclass
class FromLogits:
    """A layer that routes by softmax and top-k of its own logits, by SonicMoE and by us."""

    inputs: cases.Inputs
    router: Tensor  # [E, D]
    ours_expand: Tensor  # [E, 2 N, D], all gates before all ups
    their_expand: Tensor  # the same with each gate beside its up

    @classmethod
    def make(cls, inputs: cases.Inputs) -> FromLogits:
        model = inputs.model
        generator = torch.Generator(inputs.x.device).manual_seed(1)
        router = torch.empty(model.experts, model.hidden, device=inputs.x.device)
        router.normal_(0, model.hidden**-0.5, generator=generator)
        gate, up = inputs.expand_weight.detach().chunk(2, dim=1)
        beside = torch.stack((gate, up), 2).flatten(1, 2).contiguous()
        return cls(
            inputs,
            router.to(inputs.x.dtype).requires_grad_(),
            inputs.expand_weight,
            beside.requires_grad_(),
        )

    def ours(self) -> Tensor:
        i = self.inputs
        weights, experts = ops.route(
            F.linear(i.x, self.router), i.model.top_k, scoring="softmax", renormalize=True
        )[:2]
        tile_rows = ops.TILE_ROWS if i.x.is_cuda else 0
        table = ops.compact(experts, i.resident_index, i.model.experts, tile_rows)
        weights_of = (self.ours_expand, i.contract_weight, i.model.activation)
        return ops.moe_experts(i.x, weights, table, *weights_of)

    def theirs(self, inference: bool) -> Tensor:
        i = self.inputs
        weights = (self.router, self.their_expand, i.contract_weight)
        return rivals.sonicmoe_layer(*weights, i.model.top_k)(i.x, inference)

    def call(self, ours: bool, backward: bool) -> Call:
        """The outputs that can be compared: y; the gradients of x, router and contract weight."""
        i = self.inputs
        run = self.ours if ours else lambda: self.theirs(not backward)
        if not backward:

            def forward() -> tuple[Tensor, ...]:
                with torch.no_grad():
                    return (run(),)

            return forward
        expand = self.ours_expand if ours else self.their_expand
        leaves = [i.x, self.router, i.contract_weight, expand]  # the last one differs in order

        def both() -> tuple[Tensor, ...]:
            y = run()
            return y, *torch.autograd.grad(y, leaves, i.grad_y)[:3]

        return both


def sonic_task(inputs: cases.Inputs, backward: bool, unready: str) -> Task:
    """The whole layer from the logits on; without SonicMoE if it is absent or not ready."""
    kernels = work.experts_kernels(inputs.model, inputs.load, backward)
    router = work.router_kernels(inputs.model, inputs.load)
    kernels += router if backward else router[:3]
    layer = FromLogits.make(inputs)
    ours = layer.call(True, backward)
    task = Task(kernels, ours)
    if unready:
        task.absent["sonicmoe"] = unready
    else:
        task.add_rival("sonicmoe", lambda: layer.call(False, backward), ours())
    return task


# ---- the step ------------------------------------------------------------------------------------


def sonic_cases(device: str) -> list[Case]:
    """Cases that SonicMoE supports, with the largest number of tokens."""
    first = [case for case in measured.cases_of(device) if case.routing == "balanced"]
    most = max(case.tokens for case in first)
    plain = lambda model: model.activation == "swiglu" and not model.bias
    return [case for case in first if case.tokens == most and plain(case.model)][:2]


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises TimeoutError inside after so many seconds: other compilers may take very long."""

    def over(number: int, frame: object) -> None:
        raise TimeoutError(f"not ready after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def prepare(device: str, turn: Turn) -> dict[str, str]:
    """Calls each rival that compiles once at each size, until it is this step's turn.

    Returns "" for each that is ready, else the reason why not.
    """
    said: dict[str, str] = {}

    def attempt(name: str, run: Callable[[], Any]) -> None:
        if turn.here:
            said[name] = "was not ready in time"
            return
        start = time.monotonic()
        try:
            with time_limit(PREPARE_SECONDS):
                run()
        except Exception as error:  # other packages may raise anything; it is recorded
            said[name] = f"{type(error).__name__}: {error}"[:200]
        else:
            said[name] = ""
        took = time.monotonic() - start
        print(f"prepared {name} in {took:.1f} s: {said[name] or 'ready'}", flush=True)

    for case in sonic_cases(device):
        inputs = cases.make_inputs(case.model, case.tokens, case.routing, device)
        for backward in (False, True):
            layer = FromLogits.make(inputs)
            attempt(f"sonicmoe {case} {backward}", layer.call(False, backward))
        measured.release_memory()
        del inputs, layer
    for case in measured.cases_of(device):
        if case.model.activation != "swiglu" or device == "cpu" or case.model.experts > 128:
            continue
        inputs = cases.make_inputs(case.model, case.tokens, case.routing, device)
        for name in COMPILED:
            run = lambda name=name, i=inputs: cases.with_gradients(cases.other_experts(i, name), i)
            attempt(f"{name} {case}", run)
        del inputs, run
        measured.release_memory()
    return said


def measure(results: Results, case: Case, device: str, prepared: dict[str, str]) -> int:
    """Measures a case forward, and forward and backward; returns how many were measured."""
    inputs, done = cases.make_inputs(case.model, case.tokens, case.routing, device), 0
    facts = {"model": asdict(case.model), "tokens": case.tokens, "routing": case.routing}
    facts |= {"rows": inputs.rows, "prepared": prepared}
    for backward in (False, True):
        name = "forward_backward" if backward else "forward"
        if not results.enough(f"{case} {name}"):
            continue
        unready = {rival: prepared.get(f"{rival} {case}", UNREADY) for rival in COMPILED}
        task, error = experts_task(inputs, backward, unready)
        results.check(f"{case} {name}", error)
        result = bench_experts.measure(task, device, copy_bandwidth(), measured.ROUNDS[device])
        result |= {"task": name, "error": error}
        results.add(f"layers[{case} {name}]", result | facts)
        done += 1
        if case in sonic_cases(device) and results.enough(f"{case} sonicmoe"):
            task = sonic_task(inputs, backward, prepared.get(f"sonicmoe {case} {backward}", ""))
            result = bench_experts.measure(task, device, copy_bandwidth(), measured.ROUNDS[device])
            result |= {"task": name, "from_logits": True}
            results.add(f"layers[{case} {name} from logits]", result | facts)
            done += 1
    return done


def main() -> int:
    given = measured.arguments(__doc__, "--wait")
    results, device, done = Results(given.out, given.budget), given.device, 0
    turn = Turn(given.wait)
    prepared = prepare(device, turn)
    results.began = turn.wait()
    for case in measured.cases_of(device):
        if results.enough(case):
            measured.release_memory()
            with results.guarded(case):
                done += measure(results, case, device, prepared)
    return results.finish(f"{done} layers measured")


if __name__ == "__main__":
    sys.exit(main())
