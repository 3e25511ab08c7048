"""Jobs of sites of several ranks, in processes of the pool, and what their checkpoints hold."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shlex
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from sites import pool
from torch import Tensor

from fomoe_ext.checkpoint import manifest as ckpt
from fomoe_ext.checkpoint.reader import GlobalModelReader, load_tensors, tensor_names
from fomoe_ext.config.job import TrainConfig
from fomoe_ext.report.metrics import read_metrics
from fomoe_ext.report.runs import job_config

SMALL = shlex.split("""
--hidden-size 32 --num-layers 2 --num-heads 2 --num-experts 8 --intermediate-size 16 --top-k 2
--seq-len 32 --batch-size 4 --local-steps 2 --rounds 3 --eval-rounds 0 --eval-tokens 128
--threads 1 --warmup-steps 2 --sites 2 --replication 1 --bucket-bytes 8192 --no-tensorboard
--grad-clip 0.5 --timeout-s 30 --router-scope global --codec fp32
""")
TWO = "--ranks-per-site 2"
Plant = Callable[[pytest.MonkeyPatch], None]  # of a module, so that processes find it


class Result(NamedTuple):
    """A job's exit code, what its first process said, and by process what `watch` returned."""

    run: Path
    code: int
    said: str
    seen: list[Any]

    @property
    def report(self) -> dict[str, Any]:
        return json.loads((self.run / "report.json").read_text())

    def rounds(self, what: str) -> list[Any]:
        records = read_metrics(self.run / "metrics.jsonl")
        return [record[what] for record in records if record["kind"] == "round"]

    @property
    def checkpoint(self) -> Path:
        return ckpt.list_checkpoints(self.run / "checkpoints")[-1]


def watch(site: Any) -> dict[str, Any]:
    """What is seen of a rank of a job at its end."""
    from fomoe_ext.train.job_report import memory_of

    layers = site.model.moe_layers()
    return {
        "experts": [layer.experts.resident_experts for layer in layers],
        "shapes": [tuple(layer.experts.expand_weight.shape) for layer in layers],
        "site": [layer.site_experts for layer in layers],
        "memory": memory_of(site),
    }


def process_of_job(
    process: int, processes: int, config: TrainConfig, store: str, plant: Plant | None
) -> tuple[int, str, Any]:
    """`python -m fomoe_ext.train` in a process of the pool, whose own group makes way."""
    from fomoe_ext.launch import processes as launch
    from fomoe_ext.launch.world import StopRequest, World
    from fomoe_ext.train import process as job
    from fomoe_ext.train.site import TrainingSite

    if dist.is_initialized():
        dist.barrier()  # one that is gone would disturb those that are still connecting
        dist.destroy_process_group()
    ranks = config.sites.ranks_per_site
    assert processes == config.sites.sites * ranks
    site, rank = divmod(process, ranks)
    world = World(site, config.sites.sites, process, processes, rank, ranks)

    class NoSignals(StopRequest):
        def install(self) -> None:
            """The pool's processes keep their own."""

    made: list[Any] = []
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said):
        patch.setenv(launch.RENDEZVOUS, f"file://{store}")
        patch.setenv("COLUMNS", "200")
        if plant is not None:
            plant(patch)

        class Seen(TrainingSite):
            def __init__(self, *given: Any) -> None:
                super().__init__(*given)
                made.append(self)

        patch.setattr(job, "TrainingSite", Seen)
        code = job.run_site(config, world, NoSignals())
    return code, said.getvalue(), watch(made[0])


def run_job(arguments: list[str], plant: Plant | None = None) -> Result:
    """A job; arguments name the run folder. `plant` changes the program in each of its processes.

    Raises AssertionError where a process raises.
    """
    config = job_config(arguments)
    with tempfile.TemporaryDirectory() as folder:
        processes = config.sites.sites * config.sites.ranks_per_site
        store = os.path.join(folder, "store")
        answers = pool().run(processes, process_of_job, config, store, plant)
    codes, said, seen = zip(*answers, strict=True)
    assert len(set(codes)) == 1
    assert config.run.run_dir is not None
    return Result(config.run.run_dir, codes[0], said[0], list(seen))


def model_of(path: Path) -> dict[str, Tensor]:
    """The global model of a checkpoint."""
    with GlobalModelReader(path) as reader:
        return {name: reader.tensor(name) for name in reader.names()}


def state_of(path: Path) -> dict[str, Tensor]:
    """All tensors of the training state of a checkpoint."""
    wanted = {
        name: torch.empty(shape, dtype=torch.float64 if name.endswith("/tokens") else torch.float32)
        for name, shape in tensor_names(path).items()
    }
    load_tensors(path, wanted)
    return wanted
