"""Each grouped GEMM with each tile, against a dense GEMM of as many FLOPs and grouped_mm."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import bench_experts
import common
import expert_cases as cases
import expert_work as work
import rivals
from bench_token_kernels import copy_bandwidth

from bench.gpu import measured
from bench.gpu.measured import Case, Results
from fomoe_ext import _C

FORCED = "FOMOE_EXPERTS_TILE"


def forced(tile: str, run: Callable[[], Any]) -> Callable[[], Any]:
    """A call of `run` with this tile; "" = the tile that the kernels choose."""

    def call() -> Any:
        os.environ[FORCED] = tile
        return run()

    return call


def tiles_for(case: Case, gemm: work.Gemm) -> list[str]:
    """The tiles to measure, of those that the GEMM supports. Those for older GPUs are slow, so only
    with few tokens.
    """

    def is_used(name: str) -> bool:
        os.environ[FORCED] = name
        return _C.expert_tile(gemm.verb, "bfloat16", gemm.columns, gemm.terms, True) == name

    names = [tile["name"] for tile in _C.expert_tiles()]
    few = case.tokens <= 4096 and case.routing == "balanced"
    found = [n for n in names if (few or not n.startswith("multistage")) and is_used(n)]
    os.environ[FORCED] = ""
    return found


def error_of(verbs: cases.Verbs, name: str, wanted: cases.Outputs) -> float:
    """The largest relative error of the outputs."""
    got = verbs.our_rows(name)
    return max(common.normalised_error(g, w) for g, w in zip(got, wanted, strict=True))


def measure_verb(
    results: Results, case: Case, verbs: cases.Verbs, name: str, device: str
) -> dict[str, Any]:
    """One GEMM: ours with the chosen tile and with every tile, and rivals, in turn."""
    wanted = verbs.theirs(name, rivals.LoopProducts())
    ours = lambda: verbs.ours(name)
    gemm = work.gemms(case.model, verbs.inputs.load)[name]
    task = bench_experts.Task([gemm], forced("", ours))
    errors = {}
    for tile in ("", *tiles_for(case, gemm)):
        os.environ[FORCED] = tile
        errors[tile or "chosen"] = error_of(verbs, name, wanted)
        results.check(f"{case} {name} {tile}", errors[tile or "chosen"])
        if tile:
            task.others[tile] = forced(tile, ours)
    task.add_rival("grouped_mm", lambda: lambda: verbs.theirs(name, rivals.GroupedMM()), wanted)
    task.rivals["dense"] = verbs.dense(name)
    del wanted
    os.environ[FORCED] = ""
    result = bench_experts.measure(task, device, copy_bandwidth(), measured.ROUNDS[device])
    os.environ[FORCED] = ""
    result["tile_seconds"] = {tile: result.pop(f"{tile}_seconds") for tile in task.others}
    result["tiles"] = bench_experts.tiles_of(task, hopper=True)
    return result | {"task": name, "errors": errors}


def measure_case(results: Results, case: Case, device: str) -> int:
    """Measures all GEMMs of a case; returns how many were measured."""
    inputs, done = cases.make_inputs(case.model, case.tokens, case.routing, device), 0
    verbs = cases.Verbs(inputs)
    facts = {"model": asdict(case.model), "tokens": case.tokens, "routing": case.routing}
    for name in verbs.names:
        if results.enough(f"{case} {name}", 1.0):
            with results.guarded(f"{case} {name}"):
                result = measure_verb(results, case, verbs, name, device)
                results.add(f"verbs[{case} {name}]", result | facts | {"rows": inputs.rows})
                done += 1
    return done


def main() -> int:
    given = measured.arguments(__doc__)
    results, device, done = Results(given.out, given.budget), given.device, 0
    for case in measured.cases_of(device):
        if not results.enough(case):
            continue
        measured.release_memory()
        with results.guarded(case):
            done += measure_case(results, case, device)
    return results.finish(f"{done} products measured")


if __name__ == "__main__":
    sys.exit(main())
