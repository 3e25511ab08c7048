"""The report of a run: report.json for programs, report.md and the terminal for people.

report.md and the terminal show the same tables, from report.json and the records of metrics.jsonl.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from fomoe_ext.files.atomic import sealed, write_text
from fomoe_ext.files.unwritten import Unwritten
from fomoe_ext.report.course import Course, loss_table, read_course
from fomoe_ext.report.spent import bytes_table, seconds, time_table, training_table
from fomoe_ext.report.story import what
from fomoe_ext.report.tables import (
    ReportTable,
    markdown_table,
    print_tables,
    shown_parts,
    site_rows,
)
from fomoe_ext.report.units import human_bytes, human_count

_MOST_EXPERTS, _MOST_LAYERS = 64, 8
"""Up to this many experts and layers, the load of each expert is shown."""


def _result(report: Mapping[str, Any]) -> ReportTable:
    validation, run = report["validation"], report["run"]
    rows = [
        ("validation loss", f"{validation['loss']:.4f} nats/token"),
        ("validation bits per byte", f"{validation['bits_per_byte']:.3f}"),
        ("validation tokens", human_count(validation["tokens"])),
        ("training tokens, all sites", human_count(run["tokens"])),
        *_tokens_per_s(report),
        ("rounds x local steps", f"{run['rounds']} x {run['local_steps']}"),
        ("time, from start to report", seconds(run["wall_s"])),
    ]
    if run["sites"] > 1:
        healed = sum(site["healed"] for site in report["sites"])
        rows.append(("same bits on all holders", f"after {run['agreements']} meetings"))
        if healed:
            rows.append(("tensors restored from a majority", str(healed)))
    rows += _checkpoints(report)
    ranks = f" of {run['ranks_per_site']} ranks" if run.get("ranks_per_site", 1) > 1 else ""
    note = f"{run['sites']} sites{ranks}, replication {run['replication']}, {run['data']}"
    if run.get("router_scope") == "resident" and run["replication"] < run["sites"]:
        note += ". Tokens choose among the experts that their site holds"
    if run.get("from_round"):
        note += (
            f". Bytes, tokens and times count from round {run['from_round']}, where the job was "
            "resumed with other sites or another placement"
        )
    return ReportTable("Result", ("", ""), tuple(rows), note, texts=(0, 1))


def _tokens_per_s(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Tokens per second of all sites together: in rounds, and over the whole time."""
    tokens, wall = report["run"]["tokens"], report["run"]["wall_s"]
    busy = max(site["local_s"] + site["meeting_s"] for site in report["sites"])
    if not (busy and wall):
        return []
    text = f"{human_count(tokens / busy)} in rounds, {human_count(tokens / wall)} overall"
    return [("tokens/s, all sites", text)]


def _checkpoints(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """How long training waited for checkpoints, if there were some."""
    sites = report["sites"]
    failed = max(site.get("checkpoints_failed", 0) for site in sites)
    rows = [("checkpoints that could not be written", str(failed))] if failed else []
    during = max(site.get("checkpoints", 0) for site in sites)
    slowest = max(sites, key=lambda site: site.get("checkpoint_s", 0.0))
    rounds = report["run"]["rounds"] - report["run"].get("from_round", 0)
    training = slowest["local_s"] + slowest["meeting_s"]
    if during and rounds and training:
        each = slowest["checkpoint_s"] / during
        share = each / (training / rounds)
        text = f"{each * 1e3:.1f} ms each, {share:.1%} of a round ({during} checkpoints)"
        rows.append(("training waited for checkpoints", text))
    return rows


def _memory(report: Mapping[str, Any]) -> ReportTable:
    whole = report["full_replica_memory"]
    parts = shown_parts([whole, *(site["memory"] for site in report["sites"])])
    full = {part: whole[part] for part in parts}
    rows = site_rows(
        {
            site["site"]: tuple(human_bytes(site["memory"][part]) for part in full)
            for site in report["sites"]
        }
    )
    rows.append(("full replica", *(human_bytes(size) for size in full.values())))
    mean = [sum(s["memory"][p] for s in report["sites"]) / len(report["sites"]) for p in full]
    shares = (
        f"{size / whole:.1%}" if whole else "-"
        for size, whole in zip(mean, full.values(), strict=True)
    )
    rows.append(("site / full", *shares))
    names = (part.replace("_", " ") for part in full)
    counts = report["model_parameters"]
    return ReportTable(
        "Parameter and optimizer memory",
        ("", *names),
        tuple(rows),
        f"The model has {human_count(counts['total'])} parameters, "
        f"{counts['sparse'] / counts['total']:.0%} of them in experts. Counted from the tensors "
        f"in memory{_of_ranks(report)}.",
    )


def _of_ranks(report: Mapping[str, Any]) -> str:
    if report["run"].get("ranks_per_site", 1) == 1:
        return ""
    largest = max(site["rank_memory"] for site in report["sites"])
    return f", by all ranks of a site; no rank holds more than {human_bytes(largest)}"


def _load(report: Mapping[str, Any]) -> ReportTable:
    loads: Sequence[Sequence[int]] = report["validation"]["load"]
    num_experts = len(loads[0])
    shares = []
    for load in loads:
        mean = sum(load) / num_experts or 1.0
        shares.append([count / mean for count in load])
    spreads = [math.sqrt(sum((s - 1) ** 2 for s in row) / num_experts) for row in shares]
    title = "Load per expert on validation text"
    note = "Slots that chose an expert, 1 = an even share. Spread: standard deviation over experts."
    cell = "{:.2f}".format
    if num_experts <= _MOST_EXPERTS and len(loads) <= _MOST_LAYERS:
        rows = [(f"expert {e}", *(cell(row[e]) for row in shares)) for e in range(num_experts)]
        rows.append(("spread", *map(cell, spreads)))
        return ReportTable(
            title, ("", *(f"layer {n}" for n in range(len(loads)))), tuple(rows), note
        )
    rows = [
        (f"layer {n}", cell(min(row)), cell(max(row)), cell(spread))
        for n, (row, spread) in enumerate(zip(shares, spreads, strict=True))
    ]
    return ReportTable(title, ("", "least", "most", "spread"), tuple(rows), note)


def _clipped(report: Mapping[str, Any]) -> ReportTable:
    cells = {
        site["site"]: (
            str(site["clipped"]),
            f"{site['least_factor']:.3g}" if site["clipped"] else "-",
            str(site["left_out"]),
        )
        for site in report["sites"]
    }
    limit = report["run"]["clip_delta"]
    return ReportTable(
        "Deltas that were scaled down or left out",
        ("", "scaled down", "smallest factor", "left out"),
        tuple(site_rows(cells)),
        f"Numbers of meetings in which a site's delta was scaled down (its norm was more than "
        f"{limit:g} times the median of all sites) or left out (it was NaN or infinite). This "
        "protects against accidents, not against a malicious site.",
    )


def _routing(report: Mapping[str, Any]) -> ReportTable:
    routing = report["routing"]
    share = lambda value: "-" if value is None else f"{value:.1%}"
    return ReportTable(
        "Routing of the probe at the last meeting",
        ("", ""),
        (
            ("same choices on two sites, before the meeting", share(routing["between_sites"])),
            ("same choices as at the meeting before", share(routing["between_rounds"])),
            ("entropy of a token's scores", f"{routing['entropy']:.3f} nats"),
            ("load, standard deviation / mean", f"{routing['load_variation']:.2f}"),
            ("experts that no token chose", str(routing["dead_experts"])),
        ),
    )


def arithmetic_table(flops: Mapping[str, Mapping[str, float]]) -> ReportTable:
    """FLOPs per token by kind of job and part of the model."""
    parts = shown_parts(list(flops.values()))
    rows = [(kind, *(f"{human_count(row[part])}" for part in parts)) for kind, row in flops.items()]
    names = (part.replace("_", " ") for part in parts)
    return ReportTable("FLOPs per token (model)", ("", *names), tuple(rows))


def report_tables(report: Mapping[str, Any], course: Course | None = None) -> list[ReportTable]:
    """The tables of a report. `course`: the loss curves, None = not known."""
    story = _story(report) if report.get("story") else None
    losses = None if course is None else loss_table(report, course)
    tables = [_result(report), losses, story]
    tables += [time_table(report), training_table(report), bytes_table(report), _memory(report)]
    if report["run"].get("clip_delta"):
        tables.append(_clipped(report))
    tables += [arithmetic_table(report["flops_per_token"]), _load(report)]
    tables.append(_routing(report) if report.get("routing") else None)
    return [table for table in tables if table is not None]


def _story(report: Mapping[str, Any]) -> ReportTable:
    """Which sites were lost or joined, and the time and bytes that it took."""
    rows = [
        (
            what(event),
            str(event["round"]),
            ", ".join(map(str, event["members"])),
            seconds(event["seconds"]),
        )
        for event in report["story"]
    ]
    sites, run = report["sites"], report["run"]
    slowest = max(site.get("recovery_s", 0.0) for site in sites)
    moved = sum(site.get("recovery_bytes", 0) for site in sites)
    busy = max(site["local_s"] + site["meeting_s"] for site in sites)
    note = f"All sites together sent {human_bytes(moved)} to redistribute experts."
    if busy + slowest:
        note += f" Training took {busy / (busy + slowest):.1%} of the time of training and recovery"
        note += f" ({run['rounds']} rounds)."
    columns = ("what happened", "after round", "continues with sites", "recovery")
    return ReportTable("Sites that were lost or joined", columns, tuple(rows), note, texts=(0, 2))


def markdown(report: Mapping[str, Any], course: Course | None = None) -> str:
    """The report as Markdown."""
    tables = "\n\n".join(markdown_table(table) for table in report_tables(report, course))
    return f"# Run {report['run']['name']}\n\n{tables}\n"


def print_report(report: Mapping[str, Any], console: Console, course: Course | None = None) -> None:
    """The report on a terminal, or as plain text where there is none."""
    print_tables(report_tables(report, course), console)


def known_course(run_dir: Path) -> Course | None:
    """The loss curves of a run; None if its metrics cannot be read, as on a full disk."""
    try:
        return read_course(run_dir)
    except (OSError, ValueError):
        return None


def write_report(run_dir: Path, report: Mapping[str, Any], unwritten: Unwritten) -> None:
    """Writes report.json (with its hash) and report.md into the run folder.

    Each file is written whole or not at all. `unwritten`: notes files that cannot be written.
    """
    texts = {
        "report.json": json.dumps(sealed(report), indent=1) + "\n",
        "report.md": markdown(report, known_course(run_dir)),
    }
    for name, text in texts.items():
        try:
            write_text(run_dir / name, text)
        except OSError as error:
            unwritten.note(run_dir / name, error)
