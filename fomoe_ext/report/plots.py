"""The drawings of a report in HTML: loss, load per expert, bytes sent, time. Needs matplotlib."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from fomoe_ext.report.course import Course, Point, bits_per_nat, uniform_loss
from fomoe_ext.report.spent import time_parts
from fomoe_ext.report.svg import COLORS, SERIES, new_axes, style, to_svg
from fomoe_ext.report.units import human_bytes, human_count

_WIDE, _HALF = 760, 370
_MOST_CELLS = 2048
"""So many cells of load have a title each; more are one image."""
_MOST_SITES = 16
_MOST_SHARE = 3.0
"""A load of so many even shares, and more, has the full colour."""
_LESS, _MORE = SERIES[0], SERIES[1]


def _known(points: Sequence[Point]) -> list[Point]:
    return [point for point in points if math.isfinite(point.loss)]


def by_tokens(courses: Sequence[Course]) -> bool:
    """Whether all runs say how many tokens they had trained on."""
    return all(point.tokens is not None for course in courses for point in course.training)


def _place(point: Point, tokens: bool) -> float:
    return float(point.tokens or 0) if tokens else float(point.round)


def _finish_loss(axes: Any, tokens: bool) -> None:
    axes.set_xlabel("training tokens, all sites" if tokens else "rounds")
    axes.set_ylabel("loss, nats per token")
    axes.xaxis.set_major_formatter(lambda value, _: human_count(value))
    axes.set_xlim(left=0)
    axes.grid(axis="y")


def loss_plot(report: Mapping[str, Any], course: Course) -> str | None:
    """Loss of training and validation by tokens; None where no round is known."""
    training, validation = _known(course.training), _known(course.validation)
    if not training:
        return None
    tokens = by_tokens([course])
    titles = {}
    with style():
        figure, axes = new_axes(_WIDE, 270)
        x = [_place(point, tokens) for point in training]
        lows, highs = [p.low for p in training], [p.high for p in training]
        if lows != highs:
            axes.fill_between(
                x,
                lows,
                highs,
                color=COLORS["c1"],
                alpha=0.18,
                linewidth=0,
                label="range of the sites",
            )
        losses = [point.loss for point in training]
        axes.plot(x, losses, color=COLORS["c1"], linewidth=1.6, label="training, mean of sites")
        if validation:
            axes.plot(
                [_place(point, tokens) for point in validation],
                [point.loss for point in validation],
                color=COLORS["c2"],
                linewidth=1.6,
                label="validation, global model",
            )
        for i, point in enumerate(validation):
            (dot,) = axes.plot(_place(point, tokens), point.loss, "o", color=COLORS["c2"], ms=4.5)
            dot.set_gid(f"validation-{i}")
            bits = point.loss * bits_per_nat(report)
            titles[f"validation-{i}"] = (
                f"round {point.round}: {point.loss:.4f} nats per token, {bits:.3f} bits per byte"
            )
        _draw_uniform(axes, uniform_loss(report), max(losses))
        _finish_loss(axes, tokens)
        _add_bits_axis(axes, bits_per_nat(report))
        figure.legend(loc="outside upper left", ncols=3, handlelength=1.5, columnspacing=1.5)
        return to_svg(figure, "loss", "Loss by tokens", titles)


def _draw_uniform(axes: Any, uniform: float | None, highest: float) -> None:
    """A line at the loss of uniform guessing, unless the run's losses are far below it."""
    if uniform is None or uniform > 1.2 * highest:
        return
    axes.axhline(uniform, color=COLORS["muted"], linewidth=1, linestyle=(0, (2, 3)))
    axes.annotate(
        "uniform guessing",
        (1, uniform),
        xycoords=("axes fraction", "data"),
        xytext=(-4, -4),
        textcoords="offset points",
        ha="right",
        va="top",
        color=COLORS["muted"],
    )


def _add_bits_axis(axes: Any, bits: float) -> None:
    """A second axis in bits per byte; `bits`: of a nat per token."""
    if math.isfinite(bits) and bits > 0:
        functions = (lambda nats: nats * bits, lambda value: value / bits)
        other = axes.secondary_yaxis("right", functions=functions)
        other.set_ylabel("bits per byte")
        other.spines["right"].set_visible(False)


def load_plot(load: Sequence[Sequence[int]]) -> str:
    """Load per expert and layer: even shares have no colour, less and more have one each."""
    from matplotlib.patches import Rectangle

    layers, experts = len(load), len(load[0])
    shares = [[count * experts / (sum(row) or 1) for count in row] for row in load]
    titles = {}
    with style():
        cell = min(26.0, max(4.0, 240 / layers))
        figure, axes = new_axes(_WIDE, 60 + cell * layers)
        many = layers * experts > _MOST_CELLS
        if many:
            axes.imshow([[_rgba(s) for s in row] for row in shares], aspect="auto")
        for layer, row in enumerate(() if many else shares):
            for expert, share in enumerate(row):
                color, alpha = _tint(share)
                patch = Rectangle((expert - 0.47, layer - 0.46), 0.94, 0.92, linewidth=0)
                patch.set(facecolor=COLORS[color], alpha=alpha, gid=f"load-{layer}-{expert}")
                axes.add_patch(patch)
                titles[f"load-{layer}-{expert}"] = (
                    f"layer {layer}, expert {expert}: {share:.2f} of an even share"
                )
        axes.set_xlim(-0.5, experts - 0.5)
        axes.set_ylim(layers - 0.5, -0.5)
        axes.set_xlabel("expert")
        axes.set_ylabel("layer")
        for axis, count in ((axes.xaxis, experts), (axes.yaxis, layers)):
            every = max(1, math.ceil(count / 32))
            axis.set_ticks(range(0, count, every))
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        return to_svg(figure, "load", "Load per expert and layer", titles)


def _tint(share: float) -> tuple[str, float]:
    """Colour and how much of it: none for an even share, all for no load at all or very much."""
    if share < 1:
        return _LESS, max(0.04, 1 - share)
    return _MORE, max(0.04, min(1.0, (share - 1) / (_MOST_SHARE - 1)))


def _rgba(share: float) -> tuple[float, float, float, float]:
    color, alpha = _tint(share)
    return (*((0.29, 0.54, 0.82) if color == _LESS else (0.88, 0.52, 0.24)), alpha)


def bytes_plot(report: Mapping[str, Any]) -> str | None:
    """What a site has sent, and what it would have sent otherwise; None where nothing was sent."""
    sites = report["sites"]
    mean = lambda of: sum(map(of, sites)) / len(sites)
    amounts = {
        "DDP": mean(lambda site: site["planned"]["ddp_bytes"]),
        "full replica": mean(lambda site: site["planned"]["full_replica_bytes"]),
        "validation": mean(lambda site: site["validation_bytes"]),
        "predicted": mean(lambda site: site["planned"]["bytes"]),
        "meetings, counted": mean(lambda site: site["bytes_sent"]),
    }
    amounts = {name: amount for name, amount in amounts.items() if amount > 0}
    if not amounts:
        return None
    with style():
        figure, axes = new_axes(_HALF, 190)
        for i, (name, amount) in enumerate(amounts.items()):
            color = COLORS["c2" if name in ("meetings, counted", "validation") else "c1"]
            axes.plot([min(amounts.values()) / 3, amount], [i, i], color=COLORS["grid"])
            axes.plot(amount, i, "o", color=color, ms=7)
            axes.annotate(
                human_bytes(amount), (amount, i), (8, 0), textcoords="offset points", va="center"
            )
        axes.set_xscale("log")
        axes.set_xlim(min(amounts.values()) / 3, max(amounts.values()) * 12)
        axes.set_ylim(-0.6, len(amounts) - 0.4)
        axes.set_yticks(range(len(amounts)), list(amounts))
        axes.tick_params(axis="y", length=0, labelcolor=COLORS["ink"])
        axes.xaxis.set_major_formatter(lambda value, _: human_bytes(value))
        axes.xaxis.set_minor_formatter(lambda value, _: "")
        axes.set_xlabel("bytes sent by a site, mean of all sites (log scale)")
        axes.spines["left"].set_visible(False)
        return to_svg(figure, "bytes", "Bytes sent by a site", {})


def time_plot(report: Mapping[str, Any]) -> str:
    """Where the time of each site went, as bars; of many sites their mean."""
    spent = {f"site {site['site']}": time_parts(site) for site in report["sites"]}
    if len(spent) > _MOST_SITES:
        every = list(spent.values())
        means = {name: sum(p[name] for p in every) / len(every) for name in every[0]}
        spent = {"mean site": means}
    titles = {}
    names = [name for name in next(iter(spent.values())) if any(p[name] for p in spent.values())]
    with style():
        figure, axes = new_axes(_HALF, max(190.0, 90 + 16 * len(spent)))
        ends = dict.fromkeys(spent, 0.0)
        for i, name in enumerate(names):
            color = COLORS[_TIME_COLORS.get(name, "muted")]
            widths = [parts[name] for parts in spent.values()]
            bars = axes.barh(
                list(spent), widths, 0.62, list(ends.values()), color=color, label=name, alpha=0.85
            )
            for j, (site, bar) in enumerate(zip(spent, bars, strict=True)):
                bar.set_gid(f"time-{i}-{j}")
                titles[f"time-{i}-{j}"] = f"{site}, {name}: {widths[j]:.1f} s"
                ends[site] += widths[j]
        axes.invert_yaxis()
        axes.set_xlabel("seconds")
        axes.tick_params(axis="y", length=0, labelcolor=COLORS["ink"])
        axes.grid(axis="x")
        axes.spines["left"].set_visible(False)
        figure.legend(loc="outside upper left", ncols=3, handlelength=1, columnspacing=1)
        return to_svg(figure, "time", "Time of each site", titles)


_TIME_COLORS = {
    "start-up": "c4",
    "local steps": "c1",
    "meetings": "c2",
    "validation": "c3",
    "recovery": "c5",
}


# -------------------------------------------------------------------------------- of several runs


def against_plot(courses: Mapping[str, Course], what: str) -> str | None:
    """Loss of several runs against `what`: bytes or tokens. The line is the training's, the dots
    are validations. None where no run says."""
    tokens = by_tokens(list(courses.values()))
    place = {
        "bytes": lambda point: float(point.sent),
        "tokens": lambda point: _place(point, tokens),
    }[what]
    titles, any_shown = {}, False
    with style():
        figure, axes = new_axes(_WIDE, 280)
        for i, (name, course) in enumerate(courses.items()):
            color = COLORS[SERIES[i % len(SERIES)]]
            dashes = ("-", "--", ":")[i // len(SERIES) % 3]
            training = [p for p in _known(course.training) if place(p) > 0]
            if not training:
                continue
            any_shown = True
            losses = [p.loss for p in training]
            x = [place(p) for p in training]
            axes.plot(x, losses, dashes, color=color, linewidth=1.5, label=name)
            for j, point in enumerate(p for p in _known(course.validation) if place(p) > 0):
                (dot,) = axes.plot(place(point), point.loss, "o", color=color, ms=4.5)
                dot.set_gid(f"dot-{i}-{j}")
                titles[f"dot-{i}-{j}"] = (
                    f"{name}, round {point.round}: validation {point.loss:.4f}, "
                    f"{human_bytes(point.sent)} sent"
                )
        if not any_shown:
            return None
        _finish_loss(axes, tokens)
        if what == "bytes":
            axes.set_xscale("log")
            axes.autoscale(axis="x")
            axes.set_xlabel("bytes sent in meetings by the first site (log scale)")
            axes.xaxis.set_major_formatter(lambda value, _: human_bytes(value))
            axes.xaxis.set_minor_formatter(lambda value, _: "")
        figure.legend(loc="outside upper left", ncols=4, handlelength=1.5, columnspacing=1.5)
        return to_svg(figure, f"by-{what}", f"Loss against {what}", titles)
