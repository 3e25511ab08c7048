"""Time and bytes of a run: the seconds of each activity, and the bytes sent."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fomoe_ext.report.tables import ReportTable, site_rows
from fomoe_ext.report.units import human_bytes, human_count


def seconds(value: float) -> str:
    """Seconds as a table shows them."""
    return f"{value:.1f} s"


def _ratio(whole: float, part: float) -> str:
    if not part:
        return "-" if not whole else "all saved"
    return f"{whole / part:.2f}x"


# -------------------------------------------------------------------------------------------- time


def time_parts(site: Mapping[str, Any]) -> dict[str, float]:
    """Seconds of a site by activity; they add up to its time from start to report."""
    parts = {
        "start-up": site.get("startup_s", 0.0),
        "local steps": site["local_s"],
        "meetings": site["meeting_s"],
        "validation": site["validation_s"],
        "recovery": site.get("recovery_s", 0.0),
    }
    rest = site.get("wall_s", 0.0) - sum(parts.values())
    return parts | {"checkpoints and other": max(0.0, rest)}


def time_table(report: Mapping[str, Any]) -> ReportTable:
    """Where the time of each site went."""
    spent = {site["site"]: time_parts(site) for site in report["sites"]}
    optional = ("start-up", "recovery", "checkpoints and other")
    names = [
        name
        for name in next(iter(spent.values()))
        if name not in optional or any(parts[name] for parts in spent.values())
    ]
    cells = {
        site: (*(seconds(parts[name]) for name in names), seconds(sum(parts.values())))
        for site, parts in spent.items()
    }
    return ReportTable(
        "Time",
        ("", *names, "total"),
        tuple(site_rows(cells)),
        "Start-up: from the start of a site's process to its first local step. A meeting includes "
        "waiting for the slowest site.",
    )


def training_table(report: Mapping[str, Any]) -> ReportTable:
    """The speed of each site, and the share of its exchanges that overlapped with local steps."""
    sites, run = report["sites"], report["run"]
    uneven = run.get("uneven_steps", False)
    exchanged = any(site["exchange_s"] for site in sites)
    skipped = any(site["skipped_share"] >= 0.0005 for site in sites)
    columns, cells = ["", "tokens/s", "training share"], {}
    columns += ["exchange", "hidden"] if exchanged else []
    columns += ["skipped slots"] if skipped else []
    columns += ["steps taken"] if uneven else []
    for site in sites:
        local, busy = site["local_s"], site["local_s"] + site["meeting_s"]
        row = [human_count(site["tokens"] / local) if local else "-"]
        row.append(f"{local / busy:.1%}" if busy else "-")
        row += [seconds(site["exchange_s"]), _hidden(site)] if exchanged else []
        row += [f"{site['skipped_share']:.1%}"] if skipped else []
        row += [str(site["steps"] - site["from_step"])] if uneven else []
        cells[site["site"]] = tuple(row)
    note = "Tokens/s: in local steps. Training share: local steps / (local steps + meetings)."
    if exchanged:
        note += (
            " Exchange: from the first byte of a meeting to the last; hidden: the share of it that "
            f"overlapped with local steps{_spread(run)}.{_chosen(run)}{_link(run)}"
        )
    note += " Skipped slots are not computed." if skipped else ""
    note += f"{_UNEVEN if uneven else ''}{_turns(run)}"
    return ReportTable("Training", tuple(columns), tuple(site_rows(cells)), note)


_UNEVEN = (
    " Slower sites took fewer local steps; deltas were weighted by the tokens that each site "
    "trained on."
)


def _turns(run: Mapping[str, Any]) -> str:
    turns = run.get("expert_turns", 1)
    if turns == 1:
        return ""
    order = "by number" if run["turn_order"] == "numbered" else f"{run['turn_order']} first"
    return f" Experts took turns: each was averaged in one of {turns} meetings, {order}."


def _hidden(site: Mapping[str, Any]) -> str:
    """The share of exchanges for which the site did not wait."""
    whole = site["exchange_s"]
    return f"{max(0.0, 1 - site['meeting_s'] / whole):.1%}" if whole else "-"


def _spread(run: Mapping[str, Any]) -> str:
    if not run["overlap"] and run["fragments"] == 1:
        return " (none without overlap)"
    return f" ({run['fragments']} fragments, {run['overlap']} steps of overlap)"


def _chosen(run: Mapping[str, Any]) -> str:
    """Why overlap "auto" chose its number of steps; empty for an overlap that was given."""
    reason = run.get("overlap_reason")  # not in reports of version 0.0
    return f" Chosen: {reason}." if reason else ""


def _link(run: Mapping[str, Any]) -> str:
    return f" Link: {run['link']}." if run["link"] else ""


# ------------------------------------------------------------------------------------------- bytes


def bytes_table(report: Mapping[str, Any]) -> ReportTable:
    """The bytes that each site sent, and would have sent as a full replica or with DDP."""
    sites = report["sites"]
    cells = {}
    for site in sites:
        sent, plan = site["bytes_sent"], site["planned"]
        cells[site["site"]] = (
            human_bytes(sent),
            human_bytes(plan["bytes"]),
            human_bytes(plan["full_replica_bytes"]),
            human_bytes(plan["ddp_bytes"]),
            _ratio(plan["full_replica_bytes"], sent),
            _ratio(plan["ddp_bytes"], sent),
        )
    rows = site_rows(cells, "meetings, ")
    for what, name in (("of which moved experts, ", "moved_bytes"), (_VALIDATION, _VALIDATED)):
        if any(site[name] for site in sites):
            counted = {site["site"]: (human_bytes(site[name]), *[""] * 5) for site in sites}
            rows += site_rows(counted, what)
    if len(sites) > 1:
        whole = sum(site["bytes_sent"] + site["validation_bytes"] for site in sites)
        rows.append(("all sites together", human_bytes(whole), *[""] * 5))
    difference = sum(s["bytes_sent"] - s["planned"]["bytes"] for s in sites)
    agree = "equal" if not difference else f"differ by {difference} bytes over all sites"
    return ReportTable(
        "Bytes sent",
        ("", "counted", "predicted", "full replica", "DDP", "vs full replica", "vs DDP"),
        tuple(rows),
        f"Counted and predicted {agree}. Full replica and DDP: the same tokens and steps.",
    )


_VALIDATION, _VALIDATED = "validation, ", "validation_bytes"
