"""Writes `docs/claims.md`: each claim of the paper's abstract, the planned and the measured figure.

    python -m bench.study claims

All figures are computed from the recorded runs; only the text is written by hand.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from bench.study import design, plots, store, tables, throughput
from bench.study.design import FULL, Size
from bench.study.tables import Kept, mean_of
from fomoe_ext.config.job import preset_config
from fomoe_ext.config.model import count_parameters
from fomoe_ext.files.atomic import write_text
from fomoe_ext.plan import cost as plan_cost
from fomoe_ext.report.tables import ReportTable, markdown_table

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAPER_LOCAL_STEPS = 32
WANTED = {"replica": 8.0, "ddp": 250.0}
"""Targets: at equal loss, how many times fewer bytes than the fp32 full replica, and than DDP."""


def _shares(preset: str) -> tuple[int, int]:
    """Numbers of dense and sparse parameters. As in the paper, routers count as sparse."""
    counts = count_parameters(preset_config(preset).model)
    return counts.dense, counts.sparse + counts.router


def _payload_ratio(preset: str, sites: int, replication: int, reshuffles: float) -> float:
    dense, sparse = _shares(preset)
    of = lambda r, moved: plan_cost.paper_round_bytes(
        dense, sparse, sites, r, reshuffles_per_round=moved
    )
    return of(sites, 0.0) / of(replication, reshuffles)


def _memory(preset: str, sites: int, replication: int) -> float:
    return plan_cost.paper_memory_bytes(*_shares(preset), sites, replication)


def _plain(kept: Kept, size: Size) -> list[Mapping[str, Any]]:
    return tables.there(kept, [design.gap_rows(size, s)[_PLAIN] for s in size.seeds])


_PLAIN = next(iter(design.METHODS))
_NO_RUNS = "no runs yet"


def _communication(kept: Kept, size: Size) -> tuple[str, str]:
    """How many times fewer bytes plain jobs sent than a full replica and DDP in as many steps."""
    records = _plain(kept, size)
    if not records:
        return _NO_RUNS, _NO_RUNS
    sent = mean_of(records, "bytes_sent")
    share = records[0]["parameters"]["sparse"] / records[0]["parameters"]["total"]
    replica = f"{mean_of(records, 'full_replica_bytes') / sent:.2f}x ({share:.0%} in experts)"
    ddp = f"{mean_of(records, 'ddp_bytes') / sent:.1f}x at {design.LOCAL_STEPS} local steps"
    return replica, ddp


def _equal_loss(kept: Kept, size: Size) -> tuple[str, str]:
    """How many times fewer bytes than both baselines the cheapest compressed jobs sent that reach
    the full replica's loss: the best job with as many tokens, and the best ones with more."""
    seeds = tables.bytes_seeds(kept, size)
    if not seeds:
        return _NO_RUNS, _NO_RUNS
    best = tables.cheapest(kept, [design.bytes_families(size, seed) for seed in seeds])
    replica, ddp = best["DiLoCo, full replica"], best["DDP"]
    found: dict[str, list[tuple[float, str]]] = {}
    for name, cheapest in best.items():
        if not name.startswith("FoMoE, ") or cheapest is None:
            continue
        loss, sent, job = cheapest
        steps = job.flags["local_steps"]
        part = steps * job.flags["rounds"] / size.steps
        more = f" with {part:g}x the tokens" if part > 1 else ""
        found.setdefault(more, []).append((sent, f"{name}, {steps} local steps, loss {loss:.3f}"))
    ways = [(*min(jobs), more) for more, jobs in sorted(found.items())]
    if not ways or replica is None:
        return ("no compressed job reaches that loss",) * 2

    def below(sent: float, wanted: float, digits: int) -> str:
        parts = [f"{sent / own:.{digits}f}x{more} ({how})" for own, how, more in ways]
        return f"{'; '.join(parts)}; target: {wanted:g}x"

    first = below(replica[1], WANTED["replica"], 1)
    if ddp is None:
        return first, "no DDP job reaches that loss"
    return first, below(ddp[1], WANTED["ddp"], 0)


def _quality(kept: Kept, size: Size) -> tuple[str, str]:
    rows = [design.gap_rows(size, seed) for seed in size.seeds]
    base = [of["full replica"] for of in rows]
    found = {
        name: tables.gaps(kept, [(of[name], b) for of, b in zip(rows, base, strict=True)])
        for name in design.METHODS
    }
    if not found[_PLAIN]:
        return _NO_RUNS, _NO_RUNS
    full = {n: v for n, v in found.items() if len(v) == len(found[_PLAIN])}
    name = min(full, key=lambda n: fmean(full[n]))
    plain = tables.spread(found[_PLAIN], sign=True)
    part = fmean(full[name]) / fmean(found[_PLAIN])
    often = design.OFTEN
    itself = tables.gaps(kept, [(of[often], b) for of, b in zip(rows, base, strict=True)])
    return f"{plain} nats", (
        f"{tables.spread(full[name], sign=True)} nats ({name}), {part:.0%} of the plain gap "
        f"(target: at most 50 %); for comparison, {often}: {tables.spread(itself, sign=True)}"
    )


def _quality_by_sites(kept: Kept, size: Size) -> str:
    """The gap to the full replica of the best of `design.BEST`, at each number of sites."""
    parts = []
    for sites in size.sites:
        of = tables.gaps_of_sites(kept, size, sites)
        plain = of["plain"]
        found = {s: of[s] for s in design.BEST if plain and len(of[s]) == len(plain)}
        if found:
            short = min(found, key=lambda s: fmean(found[s]))
            part = f"{fmean(found[short]) / fmean(plain):.0%} of {fmean(plain):+.3f}"
            parts.append(
                f"{sites} sites: {tables.spread(found[short], sign=True)} ({short}; {part})"
            )
    return "; ".join(parts) or _NO_RUNS


def _routing(kept: Kept, size: Size) -> str:
    of_seeds = [design.stability_rows(size, seed) for seed in size.seeds]
    name = f"resident, replication {design.HALF}"
    parts = []
    for row in ("full replica", name):
        records = tables.there(kept, [of[row] for of in of_seeds])
        if not records:
            return _NO_RUNS
        last = [k["routing"][-1] for k in records]
        parts.append(
            f"{row}: {fmean(r['between_rounds'] for r in last):.0%} of choices unchanged since "
            f"the round before, load std/mean {fmean(r['load_variation'] for r in last):.2f}, "
            f"{fmean(r['dead_experts'] for r in last):.1f} dead experts"
        )
    return "; ".join(parts)


def _speed(share: float) -> str:
    value = throughput.speed_up(share)
    return _NO_RUNS if value is None else f"{value:.2f}x"


def claims_table(kept: Kept, size: Size = FULL) -> ReportTable:
    """A row for each claim. Long because it lists them all."""
    replica, ddp = _communication(kept, size)
    equal_replica, equal_ddp = _equal_loss(kept, size)
    plain, best = _quality(kept, size)
    ratio = _payload_ratio("1.8b", 4, 2, 1.0)
    records = _plain(kept, size)
    memory = _NO_RUNS
    if records:
        held = mean_of(records, "memory") / records[0]["full_replica_memory"]
        memory = f"{held:.0%} of a replica"
    gigabytes = ", ".join(f"{_memory('104b', 8, r) / 1e9:.0f}" for r in (8, 4, 2, 1))
    half = f"{design.SITES} sites, replication {design.HALF}"
    at = f"{half}, {design.LOCAL_STEPS} local steps"
    flops = plan_cost.flops_per_token(throughput.MODEL)
    predicted = lambda share: flops.forward / (flops.forward - (1 - share) * flops.experts)
    rows = (
        (
            "no site needs a full replica",
            "104B, 8 sites, replication 8, 4, 2, 1",
            f"{gigabytes} GB per site",
            f"{memory} ({half})",
            "fomoe plan --preset 104b --sites 8",
        ),
        (
            "1.42x less communication than DiLoCo-like baselines",
            "1.8B (59 % in experts), 4 sites, replication 2, experts moved every round",
            f"{ratio:.2f}x",
            replica,
            "python -m bench.study gap",
        ),
        (
            "45.44x less than DDP",
            f"the same and {PAPER_LOCAL_STEPS} local steps",
            f"{PAPER_LOCAL_STEPS * round(ratio, 2):.2f}x",
            ddp,
            "python -m bench.study gap",
        ),
        (
            "at equal loss, less communication than fp32 DiLoCo with full replicas (ours)",
            half,
            "-",
            equal_replica,
            "python -m bench.study bytes",
        ),
        (
            "at equal loss, less communication than DDP (ours)",
            half,
            "-",
            equal_ddp,
            "python -m bench.study bytes",
        ),
        (
            "1.16x throughput with half of the experts resident",
            f"experts are {throughput.expert_share(throughput.MODEL):.0%} of the FLOPs",
            f"{predicted(0.5):.2f}x by FLOPs",
            _speed(0.5),
            "python -m bench.study throughput",
        ),
        (
            "up to 1.4x throughput (no expert resident)",
            "the same",
            f"{predicted(0.0):.2f}x by FLOPs",
            _speed(0.0),
            "python -m bench.study throughput",
        ),
        (
            "perplexity is maintained (the paper's tables: +0.06 to +0.08 nats at replication = "
            "sites / 2)",
            at,
            "-",
            plain,
            "python -m bench.study gap",
        ),
        (
            "the gap to a full replica is closed (ours)",
            half,
            "-",
            best,
            "python -m bench.study gap",
        ),
        (
            "the same at other numbers of sites (ours; target: at most 50 % of the plain gap)",
            "replication = sites / 2",
            "-",
            _quality_by_sites(kept, size),
            "python -m bench.study gap",
        ),
        (
            "routing stays stable (the paper gives no numbers)",
            at,
            "-",
            _routing(kept, size),
            "python -m bench.study stability",
        ),
    )
    return ReportTable(
        "The claims",
        ("claimed", "configuration", "planned", "measured here", "command"),
        rows,
        "Planned: by the paper's formulas (`fomoe_ext/plan/cost.py`). Measured: with the small "
        "model described above. The gap is the loss minus that of a full replica.",
    )


def coverage(kept: Kept, size: Size) -> ReportTable:
    """How many runs of each table are recorded, and how long they took."""
    rows = []
    for name in tables.TABLES:
        runs = {run.key: run for run in design.runs_of(name, size)}
        done = [kept[key] for key in runs if key in kept]
        seconds = sum(k["job_s"] for k in done)
        rows.append((name, str(len(runs)), str(len(done)), f"{seconds / 60:.0f} min"))
    unequal = tables.unequal_bytes(kept)
    total = sum(k["job_s"] for k in kept.values())
    note = (
        f"All {len(kept)} runs took {total / 3600:.1f} h. "
        f"In {f'all but {len(unequal)} runs' if unequal else 'every run'} every site sent exactly "
        "as many bytes as predicted."
    )
    return ReportTable("Runs", ("table", "planned", "done", "time"), tuple(rows), note)


def page(kept: Kept, size: Size = FULL) -> str:
    """The text of docs/claims.md."""
    machines = sorted(
        {f"{k['machine']['isa']}, torch {k['machine']['torch']}" for k in kept.values()}
    )
    parts = [
        "# The paper's claims: planned and measured",
        "<!-- written by python -m bench.study claims -->",
        "The FoMoE paper ([arXiv 2606.19025](https://arxiv.org/abs/2606.19025)) ships no code. "
        "This page compares each claim of its abstract with the cost model's prediction and with "
        "a measurement of fomoe_ext, at a size that trains on two CPU cores. **No GPU was used.** "
        "`python -m bench.study all` makes the runs that are missing in "
        "`bench/results/study/runs.jsonl`, which takes hours; with `--quick` it makes a few short "
        "ones, recorded in another file, in minutes. `python -m bench.study claims` writes this "
        "page.",
        _setting(size),
        markdown_table(claims_table(kept, size)),
        "![loss against bytes](claims/loss_against_bytes.png)",
    ]
    for maker in tables.TABLES.values():
        parts += [markdown_table(table) for table in maker(kept, size)]
    parts.append("![loss over full replica](claims/quality_against_replication.png)")
    parts += [markdown_table(table) for table in throughput.throughput_table()]
    parts.append(markdown_table(coverage(kept, size)))
    parts.append(f"Machines: {'; '.join(machines)}." if machines else "")
    return "\n\n".join(part for part in parts if part) + "\n"


def _setting(size: Size) -> str:
    model = design.BASE
    return (
        f"The study's model: {model['num_layers']} layers of width {model['hidden_size']}, "
        f"{model['num_experts']} SwiGLU experts of width {model['intermediate_size']} per layer, "
        "2 of them per token. It is trained on the source code of Python's standard library, as "
        f"bytes, for {size.steps} steps of {design.SEQUENCES} sequences of {model['seq_len']} "
        "tokens, shared out among all sites. The inner optimizer is AdamW with a learning rate of "
        f"{model['inner_lr']}; seeds {', '.join(map(str, size.seeds))}."
    )


def write(path: Path = store.RUNS, size: Size = FULL, docs: Path = DOCS) -> None:
    """Writes docs/claims.md and its plots from the recorded runs."""
    kept = store.load(path)
    plots.draw(kept, size, docs / "claims")
    write_text(docs / "claims.md", page(kept, size))
