"""The plots of `docs/claims.md`, drawn from the recorded runs."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from statistics import fmean
from typing import Any

from bench.study import design, tables
from bench.study.design import Size
from bench.study.tables import Kept


def _axes(width: float = 7.0) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot.subplots(figsize=(width, 4.3), layout="constrained")


def _save(figure: Any, path: Path) -> None:
    from matplotlib import pyplot

    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"part-{path.name}")
    # No date in it: the same runs give the same file.
    figure.savefig(part, dpi=130, metadata={"Software": None})
    part.replace(path)
    pyplot.close(figure)


def loss_against_bytes(kept: Kept, size: Size, path: Path) -> None:
    """Final loss of every job of table 4 against the bytes that a site sent."""
    seeds = tables.bytes_seeds(kept, size) or list(size.seeds[:1])
    families = [design.bytes_families(size, seed) for seed in seeds]
    figure, axes = _axes()
    for number, (name, jobs) in enumerate(families[0].items()):
        points = []
        for index in range(len(jobs)):
            records = tables.there(kept, [of[name][index] for of in families])
            if len(records) == len(seeds):
                sent = fmean(fmean(k["bytes_sent"]) for k in records)
                points.append((sent / 1e6, fmean(k["loss"] for k in records)))
        if points:
            x, y = zip(*sorted(points), strict=True)
            axes.plot(x, y, marker="osD^vP*"[number % 7], ms=5, lw=1, label=name)
            if name == "DiLoCo, full replica":
                axes.axhline(y[0], color="grey", lw=0.8, ls=":")
    axes.set_xscale("log")
    axes.set_xlabel("sent by each site, MB")
    axes.set_ylabel("validation loss at the end, nats per token")
    axes.set_title(f"{design.SITES} sites, replication {design.HALF}", fontsize=10)
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize="small")
    _save(figure, path)


def quality_against_replication(kept: Kept, size: Size, path: Path) -> None:
    """Loss of the plain method (DiLoCo) over the full replica's, against the fraction of experts
    that a site holds."""
    figure, axes = _axes()
    local_steps = size.local_steps[0]
    for mark, sites in zip("osD", size.sites, strict=False):
        for style, (name, scope) in zip(("-", "--"), design.SCOPES.items(), strict=True):
            points = []
            for replication in design.replications(sites)[:-1]:
                of = lambda seed, r, m=sites, **more: design.job(
                    size, m, r, local_steps, seed, optimizer="diloco", **more
                )
                pairs = [(of(s, replication, **scope), of(s, sites)) for s in size.seeds]
                found = tables.gaps(kept, pairs)
                if found:
                    points.append((replication / sites, fmean(found)))
            if points:
                x, y = zip(*points, strict=True)
                label = f"{sites} sites, {name}"
                axes.plot(x, y, style, marker=mark, ms=5, lw=1, label=label)
    axes.axhline(0, color="grey", lw=0.8)
    axes.set_xscale("log", base=2)
    axes.set_xticks([1 / 8, 1 / 4, 1 / 2], ["1/8", "1/4", "1/2"])
    axes.set_xlabel("share of the experts that a site holds")
    axes.set_ylabel("loss over full replica, nats per token")
    axes.set_title(f"{local_steps} local steps, DiLoCo", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    _save(figure, path)


def names() -> Iterable[str]:
    """Names of the files in docs/claims that `docs/claims.md` shows."""
    return ("loss_against_bytes.png", "quality_against_replication.png")


def draw(kept: Kept, size: Size, folder: Path) -> None:
    """Draws all plots into `folder`. Raises ImportError without matplotlib."""
    loss_against_bytes(kept, size, folder / "loss_against_bytes.png")
    quality_against_replication(kept, size, folder / "quality_against_replication.png")
