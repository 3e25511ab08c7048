"""Plots of a plan: cost against replication, utilization against bandwidth. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fomoe_ext.config.job import TrainConfig
from fomoe_ext.files.atomic import replace_file
from fomoe_ext.files.outputs import require_file
from fomoe_ext.placement.wire import Link
from fomoe_ext.plan.jobs import (
    JobCost,
    job_cost,
    job_name,
    possible_replications,
    with_codec,
    with_replication,
)
from fomoe_ext.report.units import human_bytes, human_count

FORMATS = (".svg", ".png")


def check_plot(path: Path) -> None:
    """Raises ValueError unless the file's name ends in .svg or .png and matplotlib is installed.
    Raises FileNotFoundError for a missing folder."""
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"plot must end in {' or '.join(FORMATS)}, got {str(path)!r}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"plot: folder {path.parent} does not exist")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ValueError("plot needs matplotlib: pip install 'fomoe-ext[plot]'") from None
    require_file("plot", path)


def by_replication(
    config: TrainConfig, link: Link, flops_per_s: float, codecs: Sequence[str]
) -> dict[str, list[tuple[int, JobCost]]]:
    """The job's cost at every possible replication, by codec."""
    return {
        codec: [
            (r, job_cost(with_codec(with_replication(config, r), codec), link, flops_per_s))
            for r in possible_replications(config)
        ]
        for codec in codecs
    }


def bandwidths(costs: Mapping[str, JobCost], link: Link, points: int = 160) -> list[float]:
    """Bandwidths in bits per second, evenly spaced on a log axis and around that of the link.

    At the lowest, the job that sends least sends ten times as long as it computes. At the highest,
    the job that sends most sends as long as it computes.
    """
    least = min(cost.round.bytes_sent / cost.round.local_s for cost in costs.values())
    most = max(cost.round.bytes_sent / cost.round.local_s for cost in costs.values())
    low, high = min(8 * least / 10, link.bandwidth / 10), max(8 * most, link.bandwidth * 10)
    low = max(low, 1.0)
    return [low * (high / low) ** (i / (points - 1)) for i in range(points)]


def draw_plan(
    path: Path, config: TrainConfig, costs: Mapping[str, JobCost], link: Link, flops_per_s: float
) -> None:
    """Writes the plot, whole or not at all. `costs`: of the compared jobs, by name.

    Raises as `check_plot`.
    """
    check_plot(path)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    own = config.outer.codec
    figure = Figure(figsize=(13, 6.2), layout="constrained")
    grid = figure.add_gridspec(2, 2, width_ratios=(1, 1.35))
    codecs = dict.fromkeys(("fp32", own, "int8", "int4", "int2"))
    known = by_replication(config, link, flops_per_s, list(codecs))
    colors = {name: f"C{i}" for i, name in enumerate(costs)}
    _draw_bytes(figure.add_subplot(grid[0, 0]), known, config, colors)
    _draw_memory(figure.add_subplot(grid[1, 0]), known, config)
    _draw_utilization(figure.add_subplot(grid[:, 1]), costs, link, job_name(own), colors)
    figure.suptitle(
        f"{config.sites.sites} sites, replication {config.sites.replication}, "
        f"{config.run.local_steps} local steps, {link.bandwidth / 1e9:g} Gbit/s and "
        f"{link.latency * 1e3:g} ms, {flops_per_s / 1e12:.4g} TFLOP/s per site"
    )
    canvas = FigureCanvasSVG if path.suffix.lower() == ".svg" else FigureCanvasAgg
    canvas(figure)
    with replace_file(path) as temporary:
        figure.savefig(temporary, format=path.suffix[1:].lower(), dpi=130)


def _draw_bytes(
    axes: Any,
    known: Mapping[str, Sequence[tuple[int, JobCost]]],
    config: TrainConfig,
    colors: Mapping[str, str],
) -> None:
    for codec, points in known.items():
        axes.plot(
            [r for r, _ in points],
            [cost.round.bytes_sent or float("nan") for _, cost in points],
            marker="o",
            color=colors[job_name(codec)],
            linewidth=2.6 if codec == config.outer.codec else 1.3,
            label=codec,
        )
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.set_ylim(low / (high / low) ** 0.35, high)  # room for the legend
    axes.set_ylabel("bytes sent\nper site and round")
    axes.yaxis.set_major_formatter(lambda value, _: human_bytes(value))
    axes.yaxis.set_minor_formatter(lambda value, _: "")
    axes.set_title("Cost against replication")
    _finish(axes, known, config)
    axes.legend(title="codec", ncols=5, fontsize="small", loc="lower right", columnspacing=1)


def _draw_memory(
    axes: Any, known: Mapping[str, Sequence[tuple[int, JobCost]]], config: TrainConfig
) -> None:
    # The codec changes the memory only by error feedback.
    ranks = config.sites.ranks_per_site
    kinds = ("fp32", "fp32", "0.2"), ("with error feedback", "int4", "0.55")
    for label, codec, color in kinds:
        points = known[codec]
        held = [cost.rank_memory for _, cost in points]
        axes.plot([r for r, _ in points], held, "s-", color=color, label=label)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("memory, no activations\nper " + ("rank" if ranks > 1 else "site"))
    axes.yaxis.set_major_formatter(lambda value, _: human_bytes(value))
    axes.set_xlabel("replication (sites that hold each expert)")
    _finish(axes, known, config)
    axes.legend(fontsize="small")


def _finish(
    axes: Any, known: Mapping[str, Sequence[tuple[int, JobCost]]], config: TrainConfig
) -> None:
    axes.axvline(config.sites.replication, color="0.6", linestyle=":", zorder=0)
    axes.set_xticks([r for r, _ in next(iter(known.values()))])
    axes.grid(alpha=0.3)


def _draw_utilization(
    axes: Any, costs: Mapping[str, JobCost], link: Link, own: str, colors: Mapping[str, str]
) -> None:
    rates = bandwidths(costs, link)
    for name, cost in costs.items():
        shares = [cost.round.over(link._replace(bandwidth=rate)).utilization for rate in rates]
        width = 2.8 if name == own else 1.4
        axes.plot(rates, shares, linewidth=width, color=colors[name], label=name)
        here = cost.round.over(link).utilization
        axes.plot([link.bandwidth], [here], "o", color=colors[name], markersize=4)
    axes.axvline(link.bandwidth, color="0.6", linestyle=":", zorder=0)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda value, _: f"{human_count(value)}bit/s")
    axes.set_ylim(0, 1.02)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.set_xlabel("bandwidth of a site (dotted: the link)")
    axes.set_ylabel("utilization (share of the time in local steps)")
    axes.set_title("Utilization against bandwidth (flat where latency is the limit)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", loc="upper left")
