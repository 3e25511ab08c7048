"""How long training waits for an asynchronous checkpoint, compared with a round and with a blocking
checkpoint.

    pytest bench -k checkpoint --benchmark-only

One site trains the whole model and writes to this machine's disk. The wait is compared with a copy
in memory of as many bytes; it can be shorter, because the copy overlaps with a forward and a
backward pass. The blocking checkpoint is compared with writing and syncing one file of the same
size. All are measured in turn; figures are medians.
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
"""Target: training waits for a checkpoint for less than this fraction of a round."""
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
    """Writes and syncs one file: the best that the disk can do."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def checkpoint_during_round(site: TrainingSite) -> dict[str, float]:
    """Trains a round while a checkpoint is written.

    Seconds: "wait", that training waited; "with", of the round including these waits; "whole", from
    the start until the checkpoint was complete.
    """
    begin, before = time.perf_counter(), site.tally.checkpoint_s
    start = seconds_of(lambda: site.checkpoints.start(site.tally.steps))
    disturbed = seconds_of(lambda: train_a_round(site))
    wait = site.tally.checkpoint_s - before
    outcome = None
    while outcome is None:  # a job polls after every round
        pause = time.perf_counter()
        outcome = site.checkpoints.poll()
        last = time.perf_counter() - pause
        time.sleep(0.001)
    assert not outcome.error, outcome.error
    whole = time.perf_counter() - begin
    return {"wait": wait + last, "with": start + disturbed + last, "whole": whole}


def measure(site: TrainingSite, folder: Path) -> dict[str, Any]:
    """Bytes of a checkpoint, and the median seconds of everything, measured in turn."""
    train_a_round(site)
    first = checkpoint_during_round(site)  # allocates memory that later ones reuse
    path = site.checkpoints.save(site.tally.steps).path
    files = ckpt.read_manifest(path).files.values()
    size = sum(entry.size for entry in files)
    content = os.urandom(size)
    source = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    target = torch.empty_like(source)
    found: dict[str, list[float]] = {}
    for _ in range(ROUNDS):
        once = {"round": seconds_of(lambda: train_a_round(site)), **checkpoint_during_round(site)}
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
    """What the checkpoints of one job cost, during training and as a blocking write."""
    watch, load = machine.Watch(DEVICE), outer_cases.load()
    site = make_site(tmp_path, CASES[case])
    found = measure(site, tmp_path)
    benchmark.pedantic(lambda: checkpoint_during_round(site), rounds=1)
    result = {"case": case, "load": load, **found}
    benchmark.extra_info.update(result, machine=watch.facts())
    results.append(result)


def table_of(found: list[dict[str, Any]]) -> Table:
    right = ("MB", "round ms", "wait ms", "of a round", "first wait ms", "copy/wait", "round with")
    table = columns(
        "checkpoints: how long training waits",
        ("job",),
        (*right, "complete after ms", "blocking ms", "of disk"),
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
        f"* misses the target, less than {WANTED_SHARE:.0%} of a round. wait: training waits for "
        "state that is not a tensor, for copies that are not done after the first backward pass, "
        "and for the index, the manifest and the renaming at the end. first wait: of the first "
        "checkpoint, which allocates memory. copy/wait: the time of a copy in memory over the "
        "wait. round with: the time of a round with a checkpoint over one without. blocking: "
        "without async_checkpoints (x = over wait). of disk: the time of writing one file over "
        f"that of the blocking checkpoint. {DEVICE}, one site; disk {min(rates):.0f} to "
        f"{max(rates):.0f} MB/s. Medians of {ROUNDS}."
    )
    if line := load_line(results[:1]):
        console.print(line)
