"""The tables of the study, computed from the recorded runs alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from statistics import fmean, stdev
from typing import Any

from bench.study import design
from bench.study.design import Size
from bench.study.store import Run
from fomoe_ext.report.tables import ReportTable
from fomoe_ext.report.units import human_bytes

Kept = Mapping[str, Mapping[str, Any]]
"""Records by key, as `store.load` gives them."""


def spread(values: Iterable[float], digits: int = 3, sign: bool = False) -> str:
    """Mean ± sample standard deviation; with fewer than 3 values their number in parentheses."""
    found = list(values)
    if not found:
        return "-"
    form = f"{{:{'+' if sign else ''}.{digits}f}}"
    text = form.format(fmean(found))
    if len(found) > 1:
        text += f" ± {stdev(found):.{digits}f}"
    return text if len(found) > 2 else f"{text} ({len(found)})"


def gaps(kept: Kept, pairs: Iterable[tuple[Run, Run]]) -> list[float]:
    """Loss of the first run minus that of the second, in nats, of pairs that are recorded."""
    found = [
        (kept[one.key], kept[base.key]) for one, base in pairs if {one.key, base.key} <= set(kept)
    ]
    return [one["loss"] - base["loss"] for one, base in found]


def there(kept: Kept, runs: Iterable[Run]) -> list[Mapping[str, Any]]:
    """The records of those runs that are in the file."""
    return [kept[run.key] for run in runs if run.key in kept]


def quality_table(kept: Kept, size: Size) -> list[ReportTable]:
    """Table 1: loss of the plain method over that of a full replica, a table per optimizer."""
    tables = []
    for optimizer in size.optimizers:
        rows = []
        for local_steps in size.local_steps:
            for sites in size.sites:
                of = lambda seed, r, h=local_steps, m=sites, o=optimizer, **scope: design.job(
                    size, m, r, h, seed, optimizer=o, **scope
                )
                base = [of(seed, sites) for seed in size.seeds]
                losses = [k["loss"] for k in there(kept, base)]
                for replication in design.replications(sites)[:-1]:
                    cells = [
                        spread(
                            gaps(
                                kept,
                                [
                                    (of(seed, replication, **scope), full)
                                    for seed, full in zip(size.seeds, base, strict=True)
                                ],
                            ),
                            sign=True,
                        )
                        for scope in design.SCOPES.values()
                    ]
                    rows.append(
                        (str(local_steps), str(sites), str(replication), spread(losses), *cells)
                    )
        tables.append(
            ReportTable(
                f"Loss over full replica, {optimizer}",
                ("local steps", "sites", "replication", "full replica", *design.SCOPES),
                tuple(rows),
                "Validation loss in nats per token. resident and global: differences from the full "
                "replica with the same seed. Mean ± standard deviation over "
                f"{len(size.seeds)} seeds (a number in parentheses: over so many). resident: "
                "tokens choose among the experts of their site. global: they choose among all "
                "experts, and absent ones are skipped.",
            )
        )
    return tables


def _by_row(rows: Callable[[Size, int], Mapping[str, Run]], size: Size) -> dict[str, list[Run]]:
    """The runs of all seeds, by name of the row."""
    of_seeds = [rows(size, seed) for seed in size.seeds]
    return {name: [of[name] for of in of_seeds] for name in of_seeds[0]}


def costs_table(kept: Kept, size: Size) -> list[ReportTable]:
    """Table 2: loss, bytes and memory of ways to treat absent experts."""
    by_row = _by_row(design.costs_rows, size)
    base = by_row["full replica"]
    rows = []
    for name, runs in by_row.items():
        records = there(kept, runs)
        if not records:
            continue
        one = records[0]
        rows.append(
            (
                name,
                spread(k["loss"] for k in records),
                spread(gaps(kept, zip(runs, base, strict=True)), sign=True),
                human_bytes(fmean(one["bytes_sent"])),
                human_bytes(fmean(one["memory"])),
                f"{fmean(k['skipped_share'] for k in records):.0%}",
            )
        )
    return [
        ReportTable(
            f"Ways to treat absent experts: {design.SITES} sites, {design.LOCAL_STEPS} local "
            "steps, DiLoCo",
            ("", "loss", "over full replica", "sent per site", "memory", "skipped slots"),
            tuple(rows),
            "Frozen copies (as in SPES): a site also holds int8 copies of all absent experts. It "
            "computes them but does not train them; every meeting refreshes them.",
        )
    ]


def stability_table(kept: Kept, size: Size) -> list[ReportTable]:
    """Table 3: routing statistics after the first, the middle and the last meeting."""
    rows = []
    for name, runs in _by_row(design.stability_rows, size).items():
        records = there(kept, runs)
        if not records:
            continue
        count = min(len(k["routing"]) for k in records)
        for index in dict.fromkeys((1, count // 2, count - 1)):
            of = lambda what, i=index, r=records: [k["routing"][i][what] for k in r]
            rows.append(
                (
                    name,
                    str(records[0]["routing"][index]["round"]),
                    spread(of("entropy")),
                    spread(of("load_variation"), 2),
                    spread(of("between_sites"), 2),
                    spread(of("between_rounds"), 2),
                    spread(of("dead_experts"), 1),
                )
            )
    experts = design.BASE["num_experts"] * design.BASE["num_layers"]
    return [
        ReportTable(
            f"Stability of routing: {design.SITES} sites, {design.LOCAL_STEPS} local steps",
            (
                "",
                "round",
                "entropy, nats",
                "load std/mean",
                "same on two sites",
                "same as a round ago",
                f"dead experts of {experts}",
            ),
            tuple(rows),
            "All sites route the same 2048 validation tokens. Same: the fraction of a token's "
            "choices that two sites share before the meeting, or that the model shares after this "
            "meeting and the one before. With router_scope resident two sites can only share the "
            "experts that both hold.",
        )
    ]


def cheapest(
    kept: Kept, families: list[Mapping[str, list[Run]]]
) -> dict[str, tuple[float, float, Run] | None]:
    """For each method the job with the fewest bytes whose loss is at most the full replica's, both
    as means over the seeds: its loss, its bytes per site, and the job with the first seed.

    None = no job reaches that loss. `families`: `design.bytes_families` of every seed.
    """
    goal = _mean(kept, [of["DiLoCo, full replica"][0] for of in families], "loss")
    result: dict[str, tuple[float, float, Run] | None] = {}
    for name, jobs in families[0].items():
        best = None
        for number, job in enumerate(jobs):
            same = [of[name][number] for of in families]
            loss, sent = _mean(kept, same, "loss"), _mean(kept, same, "bytes_sent")
            if goal is None or loss is None or sent is None or loss > goal:
                continue
            if best is None or sent < best[1]:
                best = loss, sent, job
        result[name] = best
    return result


def mean_of(records: Iterable[Mapping[str, Any]], what: str) -> float:
    """Mean of a field over the records; a field with a value per site is averaged over sites."""
    values = [record[what] for record in records]
    return fmean(fmean(v) if isinstance(v, list) else v for v in values)


def _mean(kept: Kept, runs: list[Run], what: str) -> float | None:
    """`mean_of` the runs' records; None unless all runs are in the file."""
    records = there(kept, runs)
    return mean_of(records, what) if len(records) == len(runs) else None


def bytes_seeds(kept: Kept, size: Size) -> list[int]:
    """The seeds for which all runs of table 4 are in the file."""
    return [
        seed
        for seed in size.seeds
        if all(r.key in kept for jobs in design.bytes_families(size, seed).values() for r in jobs)
    ]


def bytes_table(kept: Kept, size: Size) -> list[ReportTable]:
    """Table 4: every job, and the cheapest of each method that reaches the full replica's loss."""
    seeds = bytes_seeds(kept, size) or list(size.seeds[:1])
    families = [design.bytes_families(size, seed) for seed in seeds]
    best = cheapest(kept, families)
    replica = _mean(kept, [of["DiLoCo, full replica"][0] for of in families], "bytes_sent")
    ddp = best["DDP"]
    rows = []
    for name, jobs in families[0].items():
        for number, job in enumerate(jobs):
            same = [of[name][number] for of in families]
            loss, sent = _mean(kept, same, "loss"), _mean(kept, same, "bytes_sent")
            if loss is None or sent is None or replica is None:
                continue
            chosen = best[name]
            mark = chosen is not None and chosen[2].key == job.key
            ddp_job = job.flags.get("optimizer") == "ddp"
            steps = job.flags["rounds"] * job.flags["local_steps"]
            rows.append(
                (
                    f"{name}{' *' if mark else ''}",
                    "every step" if ddp_job else str(job.flags["local_steps"]),
                    str(steps),
                    f"{loss:.3f}",
                    human_bytes(sent),
                    f"{replica / sent:.1f}x",
                    f"{ddp[1] / sent:.0f}x" if ddp else "-",
                )
            )
    return [
        ReportTable(
            f"Communication at equal loss: {design.SITES} sites, replication {design.HALF}",
            ("", "local steps", "steps", "loss", "sent per site", "below replica", "below DDP *"),
            tuple(rows),
            f"Mean over seeds {', '.join(map(str, seeds))}. *: the job of the method with the "
            "fewest bytes whose loss is at most the full replica's. Below: how many times fewer "
            "bytes this job sends than the fp32 full replica, and than the DDP job with a *. Each "
            "job trains to the end of its schedule; DDP needs fewer steps than the others for that "
            f"loss. In turns: each expert is averaged every {design.LOCAL_STEPS} steps.",
        )
    ]


def gap_table(kept: Kept, size: Size) -> list[ReportTable]:
    """Table 5: ways to close the gap to the full replica; the best at other numbers of sites."""
    by_row = _by_row(design.gap_rows, size)
    base = by_row["full replica"]
    plain = next(iter(design.METHODS))
    reference = gaps(kept, zip(by_row[plain], base, strict=True))
    rows = []
    for name, runs in by_row.items():
        records = there(kept, runs)
        if not records:
            continue
        differences = gaps(kept, zip(runs, base, strict=True))
        share = "-"
        if len(differences) == len(reference) and reference and fmean(reference) > 0:
            share = f"{fmean(differences) / fmean(reference):.0%}"
        rows.append(
            (
                name,
                spread(k["loss"] for k in records),
                spread(differences, sign=True),
                share,
                human_bytes(fmean(records[0]["bytes_sent"])),
                human_bytes(fmean(records[0]["memory"])),
            )
        )
    return [
        ReportTable(
            f"Closing the gap: {design.SITES} sites, replication {design.HALF}, DiLoCo",
            ("", "loss", "over full replica", "of plain's gap", "sent per site", "memory"),
            tuple(rows),
            f"{design.LOCAL_STEPS} local steps in fp32 unless the row says otherwise. Differences "
            "are between runs with the same seed; mean ± standard deviation.",
        ),
        _gap_of_sites(kept, size),
    ]


_OF_SITES = ("full replica", "plain", *design.BEST)


def _runs_of_sites(size: Size, sites: int) -> dict[str, list[Run]]:
    of_seeds = [design.gap_sites_rows(size, seed) for seed in size.seeds]
    return {name: [rows[sites, name] for rows in of_seeds] for name in _OF_SITES}


def gaps_of_sites(kept: Kept, size: Size, sites: int) -> dict[str, list[float]]:
    """`gaps` to the full replica, by name of the row of `design.gap_sites_rows`."""
    base, *others = _OF_SITES
    runs = _runs_of_sites(size, sites)
    return {name: gaps(kept, zip(runs[name], runs[base], strict=True)) for name in others}


def _gap_of_sites(kept: Kept, size: Size) -> ReportTable:
    names = _OF_SITES
    rows = []
    for sites in size.sites:
        records = {name: there(kept, of) for name, of in _runs_of_sites(size, sites).items()}
        found = gaps_of_sites(kept, size, sites)
        differences = [spread(of, sign=True) for of in found.values()]
        loss = spread(k["loss"] for k in records[names[0]])
        sent = [human_bytes(mean_of(of, "bytes_sent")) if of else "-" for of in records.values()]
        rows.append((str(sites), loss, *differences, *sent))
    shorts = "; ".join(f"{short}: {name}" for short, name in design.BEST.items())
    return ReportTable(
        "The same at other numbers of sites, replication = sites / 2",
        ("sites", *names, *(f"sent: {name}" for name in names)),
        tuple(rows),
        f"plain: tokens choose among residents, fp32, {design.LOCAL_STEPS} local steps; {shorts}. "
        "All three are differences from the full replica, in nats.",
    )


TABLES: Mapping[str, Callable[[Kept, Size], list[ReportTable]]] = {
    "quality": quality_table,
    "costs": costs_table,
    "stability": stability_table,
    "bytes": bytes_table,
    "gap": gap_table,
}


def unequal_bytes(kept: Kept) -> list[str]:
    """Keys of the runs in which a site did not send exactly as many bytes as predicted."""
    return [key for key, run in kept.items() if run["bytes_sent"] != run["bytes_predicted"]]
