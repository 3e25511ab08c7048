"""The program to profile: runs each grouped GEMM of a layer, and the kernels around them, once."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

import expert_cases as cases
import torch

from bench.gpu import measured
from fomoe_ext import ops


def calls_of(device: str, name: str | None) -> list[Callable[[], object]]:
    """One call of each kernel, with the largest number of tokens."""
    models = {model.name: model for model in measured.models_of(device)}
    case = measured.cases_of(device)[0]
    inputs = cases.make_inputs(models[name or case.model.name], case.tokens, "balanced", device)
    verbs, model = cases.Verbs(inputs), inputs.model
    logits = torch.randn(case.tokens, model.experts, device=device)
    bias = torch.zeros(model.experts, device=device)
    rows = torch.randn(inputs.load.slots, model.hidden, device=device).bfloat16()
    weights = inputs.weights.detach()
    return [
        *(lambda name=name: verbs.ours(name) for name in verbs.names),
        lambda: ops.route(logits, model.top_k, selection_bias=bias, return_statistics=True),
        lambda: ops.compact(inputs.experts, inputs.resident_index, model.experts, ops.TILE_ROWS),
        lambda: ops.combine(rows, weights, inputs.table),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--model", help="name in bench/expert_work.MODELS (default: the first)")
    given = parser.parse_args()
    calls = calls_of(given.device, given.model)

    def run_all() -> None:
        for call in calls:
            call()
        if given.device == "cuda":
            torch.cuda.synchronize()

    run_all()
    if given.device == "cuda":
        torch.cuda.cudart().cudaProfilerStart()
    run_all()
    if given.device == "cuda":
        torch.cuda.cudart().cudaProfilerStop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
