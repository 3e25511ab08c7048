"""Peaks of memory of expert layers, forward and backward, counted by the allocator.

    python bench/experts_memory.py [--scale 16] [--tokens 4096 16384] [--device cpu] [--markdown]

Ours against the composition of `grouped_mm` (rivals.py), at the sizes of six published models, all
experts resident. What is there before the call is not counted: tokens, weights, gradient of the
output. What the call returns is: the output and every gradient.

--scale divides hidden size, expert size and tokens. Every tensor but tables of indices then shrinks
by its square, so the ratios stay what they are (the tables are 2 % at most at scale 16), and GB are
stated as of the full sizes in bf16. On the CPU the products are of fp32, since torch's own bf16 is
slow there; torch's profiler reports every allocation of torch's allocator. On a GPU the counters of
torch's caching allocator are read; use --scale 1.

Not counted on the CPU: buffers of the products themselves, of KiB to a few MiB for each thread.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import common
import expert_cases as cases
import expert_work as work
import torch
from experts_model import table
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from fomoe_ext.plan.experts import ExpertsCall, experts_peak

TOKENS = (4096, 16384)


def counted_peak(run: Callable[[], Any], device: str) -> int:
    """The most bytes that `run` held at once, beside what was there before; its result included."""
    if device == "cuda":
        return common.peak_bytes(run)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as counted:
        result = run()
    del result
    events = counted.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    held = peak = 0
    for _, change in changes:
        held += change
        peak = max(peak, held)
    return peak


def scaled(model: work.Model, scale: int) -> work.Model:
    """In multiples of 4, which `grouped_mm` wants of fp32."""
    size = lambda full: -(-full // scale // 4) * 4
    return replace(model, hidden=size(model.hidden), expert=size(model.expert))


def planned(
    model: work.Model, tokens: int, dtype: torch.dtype, device: str, **options: Any
) -> ExpertsCall:
    """What `fomoe plan` knows of it."""
    return ExpertsCall(
        tokens,
        model.top_k,
        model.hidden,
        model.expert,
        model.experts,
        gates=model.gates,
        element=dtype.itemsize,
        bias=model.bias,
        gpu=device == "cuda",
        **options,
    )


def into_totals(inputs: cases.Inputs) -> Callable[[], tuple[Tensor, ...]]:
    """Ours, with gradients of the weights added to fp32 sums that are there already."""
    i = inputs
    totals = {
        f"{name}_total": torch.zeros_like(weight, dtype=torch.float32)
        for name, weight in (("expand", i.expand_weight), ("contract", i.contract_weight))
    }
    leaves = [t for t in i.leaves if t is not i.expand_weight and t is not i.contract_weight]

    def run() -> tuple[Tensor, ...]:
        y = cases.our_experts(i, **totals)
        return y, *torch.autograd.grad(y, leaves, i.grad_y)

    return run


class Peaks(NamedTuple):
    """Bytes at the peak. weight_grads: bytes of the gradients of the experts' weights and biases,
    which `ours` and `composed` include. totals: of ours without them. planned: as `ours`.
    """

    ours: int
    composed: int
    weight_grads: int
    totals: int
    planned: int


def measure(model: work.Model, tokens: int, dtype: torch.dtype, device: str) -> Peaks:
    inputs = cases.make_inputs(model, tokens, "balanced", device, dtype)
    call = lambda layer: cases.with_mode(layer, inputs, True)
    peak = lambda run: counted_peak(run, device)
    ours, composed = call(cases.our_experts), call(cases.torch_experts)
    common.assert_same(ours(), composed(), torch.bfloat16)  # also warms up
    return Peaks(
        ours=peak(ours),
        composed=peak(composed),
        weight_grads=sum(t.nbytes for t in inputs.parameters if t is not None),
        totals=peak(into_totals(inputs)),
        planned=experts_peak(planned(model, tokens, dtype, device)),
    )


HEAD = (
    *("model", "tokens", "composed, GB", "ours, GB", "ours / composed"),
    *("weights' gradients / composed", "without them", "into totals", "planned / ours"),
)


def cells(name: str, tokens: int, peaks: Peaks, to_full: float) -> list[str]:
    ratio = lambda ours, theirs: f"{ours / theirs:.2f}"
    rest = peaks.composed - peaks.weight_grads
    return [
        *(name, str(tokens)),
        *(f"{size * to_full / 1e9:.2f}" for size in (peaks.composed, peaks.ours)),
        ratio(peaks.ours, peaks.composed),
        ratio(peaks.weight_grads, peaks.composed),
        ratio(peaks.ours - peaks.weight_grads, rest),
        ratio(peaks.totals, peaks.composed),
        f"{peaks.planned / peaks.ours:.3f}",
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scale", type=int, default=16)
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--markdown", action="store_true")
    asked = parser.parse_args(arguments)
    dtype = torch.bfloat16 if asked.device == "cuda" else torch.float32
    to_full = asked.scale**2 * work.ELEMENT / dtype.itemsize
    torch.set_num_threads(1)  # others may be busy on the machine, and time does not matter
    rows = []
    for tokens in asked.tokens:
        for model in work.MODELS:
            peaks = measure(scaled(model, asked.scale), tokens // asked.scale, dtype, asked.device)
            rows.append(cells(model.name, tokens, peaks, to_full))
    print(table("Peak memory of forward and backward", HEAD, rows, asked.markdown))


if __name__ == "__main__":
    main()
