"""Checkpoints: how long training waits for one, compared with a round and with a blocking write.

    pytest bench -k checkpoint --benchmark-only

One site with the whole model, on this machine's disk. The floor of the wait for copies is the bytes
over the bandwidth of a copy in memory; it overlaps a forward and a backward pass that take longer.
The floor of writing is the bytes over the rate at which one file of the same size is written and
synced to the same disk. All are measured in turn; figures are medians.
"""

from __future__ import annotations

import os
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import machine
import outer_cases
import pytest
import torch
from outer_tables import columns, load_line
from rich.console import Console
from rich.table import Table

from fomoe_ext.checkpoint import manifest as ckpt
from fomoe_ext.data.sequences import open_data
from fomoe_ext.launch.world import StopRequest, World
from fomoe_ext.ops import native
from fomoe_ext.report.runs import job_config
from fomoe_ext.train.site import TrainingSite

DEVICE = "cuda" if native.cuda_loaded else "cpu"
ROUNDS = 3
WANTED_SHARE = 0.02
"""Training should wait for a checkpoint for less than so much of a round."""
JOB = ("--sites", "1", "--replication", "1", "--rounds", "1000", "--no-tensorboard")
CASES = {
    "tiny, 4 local steps": ("--local-steps", "4"),
    "tiny, 16 local steps": ("--local-steps", "16"),
    "hidden 256, 4 local steps": ("--hidden-size", "256", "--intermediate-size", "256"),
}

results: list[dict[str, Any]] = []


def make_site(folder: Path, changes: tuple[str, ...]) -> TrainingSite:
    """A site that trains on Python's standard library."""
    config = job_config([*JOB, *changes, "--run-dir", str(folder / "run"), "--device", DEVICE])
    data = open_data(None, config.model.seq_len)
    config = config.with_vocab(data.vocab_size)
    return TrainingSite(config, World(), data, torch.device(DEVICE), None)


def seconds_of(call: Callable[[], Any]) -> float:
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def train_a_round(site: TrainingSite) -> None:
    site.steps.take(StopRequest(), lambda loss: None)
    site.notes.exchange(stop=False)
    site.meetings.meet()


def write_one_file(path: Path, content: bytes) -> None:
    """As many bytes in one file, synced: what the disk does at best."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def behind(site: TrainingSite) -> dict[str, float]:
    """A checkpoint during a round: seconds that training waits, of the round, until it is whole.

    "with": of the whole round, with all that the checkpoint does meanwhile and the waits.
    """
    begin, before = time.perf_counter(), site.tally.checkpoint_s
    start = seconds_of(lambda: site.checkpoints.start(site.tally.steps))
    disturbed = seconds_of(lambda: train_a_round(site))
    wait = site.tally.checkpoint_s - before
    outcome = None
    while outcome is None:  # asked after every round in a job
        pause = time.perf_counter()
        outcome = site.checkpoints.poll()
        last = time.perf_counter() - pause
        time.sleep(0.001)
    assert not outcome.error, outcome.error
    whole = time.perf_counter() - begin
    return {"wait": wait + last, "with": start + disturbed + last, "whole": whole}


def measure(site: TrainingSite, folder: Path) -> dict[str, Any]:
    """Medians of all, in turn, and the bytes of a checkpoint."""
    train_a_round(site)
    first = behind(site)  # fills memory that the next ones have
    path = site.checkpoints.save(site.tally.steps).path
    files = ckpt.read_manifest(path).files.values()
    size = sum(entry.size for entry in files)
    content = os.urandom(size)
    source = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    target = torch.empty_like(source)
    found: dict[str, list[float]] = {}
    for _ in range(ROUNDS):
        once = {"round": seconds_of(lambda: train_a_round(site)), **behind(site)}
        once["at_once"] = seconds_of(lambda: site.checkpoints.save(site.tally.steps))
        once["copy"] = seconds_of(lambda: target.copy_(source))
        once["disk"] = seconds_of(lambda: write_one_file(folder / "file", content))
        for name, value in once.items():
            found.setdefault(name, []).append(value)
        shutil.rmtree(folder / "run")
    medians = {f"{name}_seconds": statistics.median(values) for name, values in found.items()}
    return {"bytes": size, "first_wait_seconds": first["wait"], **medians}


@pytest.mark.parametrize("case", CASES)
def test_checkpoint(benchmark: Any, tmp_path: Path, case: str) -> None:
    """One job: what its checkpoints cost, behind the training and at once."""
    watch, load = machine.Watch(DEVICE), outer_cases.load()
    site = make_site(tmp_path, CASES[case])
    found = measure(site, tmp_path)
    benchmark.pedantic(lambda: behind(site), rounds=1)
    result = {"case": case, "load": load, **found}
    benchmark.extra_info.update(result, machine=watch.facts())
    results.append(result)


def table_of(found: list[dict[str, Any]]) -> Table:
    right = ("MB", "round ms", "waits ms", "of a round", "first ms", "of copy", "with it")
    table = columns(
        "checkpoints: how long training waits",
        ("job",),
        (*right, "whole after", "at once ms", "of disk"),
    )
    for r in found:
        share = r["wait_seconds"] / r["round_seconds"]
        table.add_row(
            r["case"],
            f"{r['bytes'] / 1e6:.1f}",
            f"{r['round_seconds'] * 1e3:.0f}",
            f"{r['wait_seconds'] * 1e3:.1f}",
            f"{share:.2%}" + ("" if share < WANTED_SHARE else "*"),
            f"{r['first_wait_seconds'] * 1e3:.0f}",
            f"{r['copy_seconds'] / r['wait_seconds']:.1f}x",
            f"{r['with_seconds'] / r['round_seconds']:.2f}x",
            f"{r['whole_seconds'] * 1e3:.0f}",
            f"{r['at_once_seconds'] * 1e3:.0f} ({r['at_once_seconds'] / r['wait_seconds']:.0f}x)",
            f"{r['disk_seconds'] / r['at_once_seconds']:.0%}",
        )
    return table


def show(console: Console) -> None:
    """Prints the table of what has been measured."""
    if not results:
        return
    console.print(table_of(results))
    rates = [r["bytes"] / r["disk_seconds"] / 1e6 for r in results]
    console.print(
        f"* misses the target: under {WANTED_SHARE:.0%} of a round. Waits: what is no tensor, "
        "copies that are not done when the first backward pass is, and index, manifest and name at "
        "the end; of the first one, which fills new memory; of copy: the time of a copy in memory, "
        "over the wait. With it: a round with a checkpoint, all of it, over one without. At once: "
        f"without async_checkpoints (x = over waits). {DEVICE}, one site; disk "
        f"{min(rates):.0f} to {max(rates):.0f} MB/s. Medians of {ROUNDS}."
    )
    if line := load_line(results[:1]):
        console.print(line)
