"""Losses and bytes at the sizes of models that the paper has trained, with all sites on one GPU.

The shapes are the paper's 54M and 153M (`fomoe train --preset`), with the 256 bytes as vocabulary:
nearly all parameters of its own are in a vocabulary of 200,019. Four sites train on all text that
the Python packages of this machine have: with full replicas, and with replication 2 and 1 in both
scopes, on equally many tokens. How many there are follows from the minutes that are given: a
short run at first measures how long a step takes.
"""

from __future__ import annotations

import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from bench.study import pool, store
from bench.study.design import LOCAL_STEPS, SCOPES, SITES
from bench.study.run import run_missing
from bench.study.store import Run
from bench.study.tables import spread
from fomoe_ext.report.tables import ReportTable
from fomoe_ext.report.units import human_bytes, human_count

RUNS = store.RUNS.with_name("gpu.jsonl")
KINDS: Mapping[str, Mapping[str, Any]] = {
    "full replica": {"replication": SITES},
    **{
        f"replication {replication}, {name}": {"replication": replication, **scope}
        for replication in (2, 1)
        for name, scope in SCOPES.items()
    },
}
LEAST_ROUNDS, MOST_ROUNDS = 4, 200
"""Fewer rounds say nothing; more than so many the paper does not have either."""
SUFFIXES = ("py", "pyi", "md", "rst", "txt")
Train = Callable[[Sequence[str], int], dict[str, Any]]


@dataclass(frozen=True)
class Setting:
    """How large the study is: presets with flags of their own, and flags of all runs."""

    shapes: Mapping[str, Mapping[str, Any]]
    common: Mapping[str, Any]


def setting(device: str) -> Setting:
    """That of a GPU; on the CPU a tiny one, to try the study itself."""
    common: dict[str, Any] = {
        "vocab_size": 256,
        "optimizer": "diloco",
        "codec": "fp32",
        "local_steps": LOCAL_STEPS,
        "eval_rounds": 0,
    }
    if device == "cpu":
        tiny = {"hidden_size": 16, "num_heads": 2, "num_experts": 4, "intermediate_size": 8}
        tiny |= {"num_layers": 1, "top_k": 2, "seq_len": 32, "batch_size": 1}
        tiny |= {"inner_lr": 0.01, "warmup_steps": 8}
        return Setting({"tiny": tiny}, common | {"eval_tokens": 256})
    common |= {"seq_len": 1024, "batch_size": 8, "dtype": "bfloat16", "cuda_graph": True}
    common |= {"eval_tokens": 262144, "inner_lr": 0.01}
    return Setting({"54m": {}, "153m": {}}, common)


def collect_text(folder: Path, most_bytes: int | None = None) -> int:
    """Writes the text of this machine's Python packages and standard library to `folder`, a file
    per package, and returns its bytes. Files that are not UTF-8 are left out."""
    sources = sorted({sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")})
    written = 0
    for source in map(Path, sources):
        for package in sorted(source.iterdir()):
            if str(package) in sources or package.suffix in (".dist-info", ".so"):
                continue
            files = sorted(package.rglob("*")) if package.is_dir() else [package]
            texts = list(_texts(f for f in files if f.suffix.lstrip(".") in SUFFIXES))
            if texts:
                target = folder / f"{sources.index(str(source))}-{package.stem}.txt"
                with target.open("a", encoding="utf-8") as file:
                    file.write("\n".join(texts))
                written += target.stat().st_size
            if most_bytes is not None and written >= most_bytes:
                return written
    return written


def _texts(files: Iterable[Path]) -> Iterator[str]:
    for file in files:
        try:
            text = file.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue
        if text.strip():
            yield text


def runs_of(preset: str, given: Setting, rounds: int, seeds: Sequence[int]) -> list[Run]:
    """All kinds of runs of a preset, seed by seed."""
    own = {**given.common, **given.shapes[preset], "preset": preset, "rounds": rounds}
    own |= {"warmup_steps": max(1, min(160, rounds * LOCAL_STEPS // 4))}
    return [Run(SITES, seed, {**own, **kind}) for seed in seeds for kind in KINDS.values()]


def rounds_within(seconds: float, start_s: float, round_s: float) -> int:
    """Rounds of a run that is to take `seconds`, of which `start_s` pass before the first.

    0 if not even `LEAST_ROUNDS` fit.
    """
    rounds = min(MOST_ROUNDS, int((seconds - start_s) / round_s))
    return rounds if rounds >= LEAST_ROUNDS else 0


def measure_round(run: Run, train: Train) -> tuple[float, float]:
    """Seconds before the first round and per round, from runs of `LEAST_ROUNDS` and twice that."""
    took = []
    for rounds in (LEAST_ROUNDS, 2 * LEAST_ROUNDS):
        took.append(train(run.named(rounds=rounds).arguments(), SITES)["job_s"])
    round_s = max(1e-3, (took[1] - took[0]) / LEAST_ROUNDS)
    return max(0.0, took[0] - LEAST_ROUNDS * round_s), round_s


def run_all(
    minutes: float, device: str, seeds: Sequence[int], facts: Mapping[str, Any], path: Path
) -> int:
    """`study` on the text of this machine; returns how many runs failed."""
    with tempfile.TemporaryDirectory(prefix="fomoe-study-text-") as folder:
        text = Path(folder) / "text"
        text.mkdir()
        size = collect_text(text, 1 << 20 if device == "cpu" else None)
        print(f"text: {human_bytes(size)} of the Python packages of this machine", flush=True)
        where = ["--data", str(text), "--cache-dir", str(Path(folder) / "cache")]
        train = lambda words, sites: pool.train([*words, *where], sites, device)
        known = {**facts, "text_bytes": size}
        return study(minutes, setting(device), seeds, known, train, path)


def study(
    minutes: float,
    given: Setting,
    seeds: Sequence[int],
    facts: Mapping[str, Any],
    train: Train,
    path: Path = RUNS,
) -> int:
    """Makes all runs within so many minutes and records each; returns how many failed.

    `train`: as `pool.train`, but for the device. Where the file has some runs of a preset, the
    others get as many rounds. A preset whose runs would have fewer than `LEAST_ROUNDS` rounds is
    left out, and named.
    """
    failed = 0
    for preset in given.shapes:
        rounds = begun(preset, given, seeds, path)
        try:
            if rounds is None:
                share = 60 * minutes / len(given.shapes)
                rounds = affordable_rounds(preset, given, seeds, share, train)
        except pool.RunFailed as error:
            failed += 1
            print(f"{preset}: failed\n{error}", flush=True)
            continue
        if rounds:
            failed += run_missing(
                preset,
                runs_of(preset, given, rounds, seeds),
                path,
                train=lambda run: train(run.arguments(), SITES),
                facts=facts,
            )
    return failed


def begun(preset: str, given: Setting, seeds: Sequence[int], path: Path) -> int | None:
    """The rounds of the runs of a preset that are recorded; None if there are none."""
    kept = store.load(path)
    for rounds in {one["flags"].get("rounds") for one in kept.values()}:
        if rounds and any(run.key in kept for run in runs_of(preset, given, rounds, seeds)):
            return int(rounds)
    return None


def affordable_rounds(
    preset: str, given: Setting, seeds: Sequence[int], seconds: float, train: Train
) -> int:
    """Rounds with which all runs of a preset take `seconds`, measuring included; 0 where that is
    too little, which is printed. Raises RunFailed."""
    begin = time.perf_counter()
    runs = runs_of(preset, given, LEAST_ROUNDS, seeds)
    start_s, round_s = measure_round(runs[0], train)
    left = seconds - (time.perf_counter() - begin)
    rounds = rounds_within(left / len(runs), start_s, round_s)
    if not rounds:
        need = (len(runs) * (start_s + LEAST_ROUNDS * round_s) - left) / 60
        print(f"{preset}: left out, needs {need:.1f} minutes more", flush=True)
    return rounds


def name_of(flags: Mapping[str, Any]) -> str:
    """The kind of a run, a key of `KINDS`."""
    return next(
        name for name, kind in KINDS.items() if all(flags.get(k) == v for k, v in kind.items())
    )


def table(path: Path = RUNS) -> list[ReportTable]:
    """A table for each preset and number of rounds that is recorded."""
    groups: dict[tuple[str, int], dict[str, list[Mapping[str, Any]]]] = {}
    for kept in store.load(path).values():
        of = groups.setdefault((kept["flags"]["preset"], kept["flags"]["rounds"]), {})
        of.setdefault(name_of(kept["flags"]), []).append(kept)
    return [_table(preset, rounds, of) for (preset, rounds), of in sorted(groups.items())]


def _table(preset: str, rounds: int, of: Mapping[str, Sequence[Mapping[str, Any]]]) -> ReportTable:
    base = {kept["seed"]: kept["loss"] for kept in of.get("full replica", ())}
    rows = []
    for name in KINDS:
        kept = of.get(name, ())
        if not kept:
            continue
        sent = fmean(fmean(one["bytes_sent"]) for one in kept)
        gaps = [one["loss"] - base[one["seed"]] for one in kept if one["seed"] in base]
        rows.append(
            (
                name,
                spread(one["loss"] for one in kept),
                spread(gaps, sign=True),
                human_bytes(sent),
                f"{fmean(one['full_replica_bytes'] for one in kept) / sent:.2f}x",
                f"{fmean(one['ddp_bytes'] for one in kept) / sent:.1f}x",
                human_bytes(fmean(fmean(one["memory"]) for one in kept)),
                f"{fmean(one['skipped_share'] for one in kept):.0%}",
            )
        )
    one = next(iter(of.values()))[0]
    share = one["parameters"]["sparse"] / one["parameters"]["total"]
    return ReportTable(
        f"The paper's shape {preset}, {SITES} sites on one device, {rounds} rounds",
        (
            "",
            "loss",
            "over full replica",
            "sent per site",
            "less than full",
            "less than DDP",
            "memory",
            "skipped slots",
        ),
        tuple(rows),
        f"Validation loss in nats per byte. {human_count(one['tokens'])} training tokens of all "
        f"sites in each run, {LOCAL_STEPS} local steps per round, DiLoCo, fp32 deltas; "
        f"{share:.0%} of the parameters are in experts. Text: that of the machine's Python "
        "packages. Less than: bytes of full replicas that meet as often, and of DDP, as predicted, "
        "divided by those sent.",
    )
