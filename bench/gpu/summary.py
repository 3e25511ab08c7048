"""The summary of a run in lines: the steps, then the most important figures, as ratios.

Throttling of the GPU changes times, but hardly their ratios. So a rival is given by its time over
ours, measured in turn (above 1: we are faster), and a lower bound by the fraction reached.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from bench.gpu.runner import FAILED, TIMED_OUT, Outcome

MOST_LINES, MOST_COLUMNS = 80, 148
TAIL_LINES, TILE_LINES = 3, 2
FASTER = 1.03  # a tile that is faster than the chosen one by this factor is mentioned

Result = dict[str, Any]
Results = dict[str, list[Result]]  # {"name", "extra_info"} by the name of the results
Rows = list[list[str]]


# ---- lines ---------------------------------------------------------------------------------------


def columns(head: Sequence[str], rows: Rows) -> list[str]:
    """A table with columns aligned by spaces; empty without rows."""
    if not rows:
        return []
    table = [list(head), *rows]
    widths = [max(len(row[i]) for row in table) for i in range(len(head))]
    return [
        "  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True)).rstrip()
        for row in table
    ]


def shortened(lines: Sequence[str], where: str) -> list[str]:
    """At most MOST_LINES lines of at most MOST_COLUMNS characters."""
    cut = [
        line if len(line) <= MOST_COLUMNS else line[: MOST_COLUMNS - 3] + "..." for line in lines
    ]
    if len(cut) <= MOST_LINES:
        return cut
    more = len(cut) - MOST_LINES + 1
    return [*cut[: MOST_LINES - 1], f"... {more} more lines in {where}/summary.txt"]


def ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def mean(values: Iterable[float]) -> float | None:
    """The geometric mean."""
    found = list(values)
    return math.exp(sum(map(math.log, found)) / len(found)) if found else None


def rival(result: Result, name: str) -> float | None:
    """A rival's time over ours; None if it was not measured."""
    found: float | None = result["rivals"].get(name, {}).get("ratio")
    return found


# ---- steps ---------------------------------------------------------------------------------------


def step_lines(outcomes: Sequence[Outcome]) -> list[str]:
    rows = [[o.name, o.state, f"{o.seconds:.1f}", o.note] for o in outcomes]
    lines = columns(("step", "state", "s", ""), rows)
    for outcome in outcomes:
        if outcome.state in (FAILED, TIMED_OUT) and outcome.log is not None:
            text = outcome.log.read_text(errors="replace")
            said = [line for line in text.splitlines() if line.strip()][-TAIL_LINES:]
            lines += [f"  {outcome.name}| {line}" for line in said]
    return lines


# ---- figures -------------------------------------------------------------------------------------


def by_setting(results: Sequence[Result]) -> dict[tuple[int, str], list[Result]]:
    """Results by tokens and routing, in the order of measurement."""
    found: dict[tuple[int, str], list[Result]] = defaultdict(list)
    for result in results:
        found[result["tokens"], result["routing"]].append(result)
    return found


def verb_cell(results: Sequence[Result]) -> str:
    """Means over the results: dense/ours, fraction of the floor, grouped_mm/ours."""
    if not results:
        return "-"
    dense = mean(x for r in results if (x := rival(r, "dense")))
    grouped = mean(x for r in results if (x := rival(r, "grouped_mm")))
    return f"{ratio(dense)} {ratio(mean(r['fraction_of_floor'] for r in results))} {ratio(grouped)}"


def verb_lines(results: Sequence[Result]) -> list[str]:
    """Each model with the first tokens and routing, means over models for others; faster tiles."""
    if not results:
        return []
    verbs = list(dict.fromkeys(r["task"] for r in results))
    rows: Rows = []
    for place, ((tokens, routing), found) in enumerate(by_setting(results).items()):
        models = list(dict.fromkeys(r["model"]["name"] for r in found))
        groups = [[name] for name in models] if place == 0 else [models]
        for names in groups:
            said = names[0] if place == 0 else f"mean of {len(models)}"
            of = lambda verb, names=names, found=found: [
                r for r in found if r["task"] == verb and r["model"]["name"] in names
            ]
            rows.append([f"{said} {tokens} {routing}", *(verb_cell(of(verb)) for verb in verbs)])
    lines = ["== products: dense/ours, of the floor, grouped_mm/ours"]
    return [*lines, *columns(("", *verbs), rows), *tile_lines(results)]


def tile_lines(results: Sequence[Result]) -> list[str]:
    """Lists where another tile than the chosen one is faster, and by how much."""
    found = []
    for result in results:
        for tile, seconds in result["tile_seconds"].items():
            gain = result["seconds"] / seconds
            if gain >= FASTER and tile != result["tiles"].get(result["task"]):
                what = f"{result['model']['name']} {result['tokens']} {result['routing']}"
                found.append((gain, f"{what} {result['task']}: {tile} {gain:.2f}x"))
    found.sort(reverse=True)
    count = f"{len(found)} products are faster with another tile than the chosen one"
    return [count, *(f"  {text}" for _, text in found[:TILE_LINES])]


def layer_row(result: Result, name: str, over: Sequence[str]) -> list[str]:
    own = result["seconds"]
    share = lambda key: ratio(result[key] / own if result.get(key) else None)
    memory = result.get("memory") or {}
    ours, theirs = ((memory.get(k) or {}).get("peak") for k in ("ours", "grouped_mm"))
    return [
        name,
        result["task"].replace("forward_backward", "both passes"),
        f"{own * 1e3:.2f}",
        ratio(result["fraction_of_floor"]),
        *(ratio(rival(result, name)) for name in over),
        *(share(f"{key}_seconds") for key in ("graph", "half", "quarter")),
        ratio(ours / theirs if ours and theirs else None),
    ]


def layer_lines(results: Sequence[Result]) -> list[str]:
    """Each layer with the first tokens and routing; means of ratios of both passes for others."""
    if not results:
        return []
    names = list(dict.fromkeys(name for r in results for name in r["rivals"]))
    rows: Rows = []
    for place, ((tokens, routing), found) in enumerate(by_setting(results).items()):
        if place == 0:
            for result in found:
                logits = " from logits" if result.get("from_logits") else ""
                rows.append(layer_row(result, f"{result['model']['name']}{logits}", names))
            continue
        both = [r for r in found if r["task"] == "forward_backward"]
        over = [mean(x for r in both if (x := rival(r, name))) for name in names]
        floor = mean(r["fraction_of_floor"] for r in both)
        said = [f"mean of {len(both)}, {tokens} {routing}", "both passes", "", ratio(floor)]
        rows.append([*said, *map(ratio, over), "", "", "", ""])
    (tokens, routing), _ = next(iter(by_setting(results).items()))
    lines = [f"== layers, {tokens} tokens, {routing}: rival/ours; in a graph, half, quarter: /ours"]
    head = ("", "", "ms", "floor", *names, "graph", "half", "quarter", "peak/grouped_mm")
    return [*lines, *columns(head, rows), *absent_lines(results)]


def absent_lines(results: Sequence[Result]) -> list[str]:
    """A line with the rivals that were never measured, and the reasons."""
    measured = {name for r in results for name in r["rivals"]}
    reasons = {
        name: reason
        for r in results
        for name, reason in r["absent"].items()
        if name not in measured
    }
    said = "; ".join(f"no {name}: {reason}" for name, reason in reasons.items())
    return [said] if said else []


STEP_TIMES = ("seconds", "host_seconds", "gpu_seconds", "graph_seconds")


def training_lines(results: Sequence[Result]) -> list[str]:
    rows: Rows = []
    whole: dict[str, float] = {}
    for r in results:
        if r["resident"] == 1:
            whole[r["preset"]] = r["seconds"]
        milliseconds = lambda x: "-" if x is None else f"{x * 1e3:.1f}"
        speed = whole[r["preset"]] / r["seconds"] if r["preset"] in whole else None
        rows.append(
            [
                f"{r['preset']}, {r['layers']} layers, {r['tokens']} tokens",
                f"{r['resident']:g}",
                *(milliseconds(r[key]) for key in STEP_TIMES),
                ratio(speed),
                "-" if r["peak_bytes"] is None else f"{r['peak_bytes'] / 1e9:.1f}",
            ]
        )
    times = ("step ms", "host ms", "GPU busy ms", "graph ms")
    head = ("", "resident", *times, "speed-up", "peak GB")
    return ["== training steps", *columns(head, rows)] if rows else []


def cell_table(results: Sequence[Result], row: str, column: Callable[[Result], str]) -> list[str]:
    """Microseconds and the fraction of the floor, in brackets."""
    rows, heads = (list(dict.fromkeys(f(r) for r in results)) for f in (lambda r: r[row], column))
    cells = {
        (r[row], column(r)): f"{r['seconds'] * 1e6:.0f} ({ratio(r['fraction_of_floor'])})"
        for r in results
    }
    return columns(
        ("", *heads), [[name, *(cells.get((name, h), "-") for h in heads)] for name in rows]
    )


def token_lines(results: Sequence[Result]) -> list[str]:
    if not results:
        return []
    verbs = [r for r in results if "codec" not in r]
    codecs = [r for r in results if r.get("codec", "fp32") != "fp32"]
    lines = ["== other kernels: µs (of a copy's bandwidth)"]
    lines += cell_table(verbs, "verb", lambda r: f"{r['tokens']}x{r['experts']}")
    return [*lines, *cell_table(codecs, "codec", lambda r: r["verb"])]


def profile_lines(results: Sequence[Result]) -> list[str]:
    """The profile, of kernels that take long."""
    long = sorted(results, key=lambda r: -r.get("nanoseconds", 0))[:4]
    number = lambda r, key, scale=1.0: f"{r[key] * scale:.2f}" if key in r else "-"
    rows = [
        [
            number(r, "nanoseconds", 1e-3),
            number(r, "tensor_percent", 1e-2),
            number(r, "l2_percent", 1e-2),
            number(r, "dram_bytes_per_second", 1e-12),
            number(r, "issued_per_cycle"),
            r["kernel"],
        ]
        for r in long
    ]
    head = ("µs", "tensor", "L2", "DRAM TB/s", "issued/clock", "kernel")
    return ["== profile", *columns(head, rows)] if rows else []


def lines_of(gpu: Sequence[str], outcomes: Sequence[Outcome], results: Results) -> list[str]:
    """All lines of the summary."""
    of = lambda name, part="": [
        entry["extra_info"] for entry in results.get(name, []) if entry["name"].startswith(part)
    ]
    return [
        *(f"{when}: {line}" for when, line in zip(("before", "after"), gpu, strict=False)),
        *step_lines(outcomes),
        *verb_lines(of("verbs")),
        *layer_lines(of("layers")),
        *training_lines(of("training", "training[")),
        *token_lines(of("tokens")),
        *profile_lines(of("profile")),
    ]
