"""Checkpoints of sites of several ranks go on at the same and at other sites, ranks, placements."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_jobs import SMALL, TWO, model_of, run_job, state_of
from small_job import environment, require_gone, start_and_wait_for
from torch import Tensor

from fomoe_ext.checkpoint import manifest as ckpt
from fomoe_ext.checkpoint.reader import load_state
from fomoe_ext.config.io import load_config, parse_args
from fomoe_ext.launch.world import find_world
from fomoe_ext.placement import Placement
from fomoe_ext.plan.disk import CheckpointSize, checkpoint_size
from fomoe_ext.plan.traffic import job_placement

JOB = [*TWO.split(), "--codec", "int8", "--rounds", "4", "--checkpoint-rounds", "2"]


@pytest.fixture(scope="module")
def whole(rank_flags, tmp_path_factory):
    """A job of 2 x 2 that was never interrupted: checkpoints after rounds 2 and 4."""
    run = tmp_path_factory.mktemp("whole") / "run"
    return run_job([*rank_flags, *JOB, "--run-dir", str(run)])


def halfway(whole: Any, folder: Path) -> Path:
    """Its run folder as it was after round 2."""
    run = folder / "run"
    shutil.copytree(whole.run, run)
    shutil.rmtree(ckpt.list_checkpoints(run / "checkpoints")[-1])
    return run


def resumed(run: Path, *changes: str) -> Any:
    return run_job(["--resume", str(run), *changes])


def save_and_stop(patch: pytest.MonkeyPatch) -> None:
    """What was read is written again, and the job is over."""
    from fomoe_ext.train.trainer import Trainer

    def save(rounds: Any) -> bool:
        rounds._save(rounds.site.tally.steps + 1000)
        return True

    patch.setattr(Trainer, "train", save)


def same(mine: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert mine.keys() == other.keys()
    for name, tensor in mine.items():
        assert torch.equal(tensor, other[name]), name


def test_what_was_interrupted_goes_on_bit_for_bit(whole, tmp_path):
    again = resumed(halfway(whole, tmp_path))
    same(model_of(again.checkpoint), model_of(whole.checkpoint))
    same(state_of(again.checkpoint), state_of(whole.checkpoint))
    assert again.rounds("loss") == whole.rounds("loss")
    for mine, other in zip(again.report["sites"], whole.report["sites"], strict=True):
        for what in ("tokens", "rows", "slots", "bytes_sent", "planned", "agreements"):
            assert mine[what] == other[what], what


def test_a_checkpoint_takes_what_the_plan_says(whole):
    """Of each kind of tensor, to the byte; the anchor is not stored beside the model."""
    config = load_config(whole.run / "config.toml")
    planned = checkpoint_size(config, job_placement(config))
    sizes = dict.fromkeys(CheckpointSize._fields, 0)
    sizes["model"] = sum(tensor.nbytes for tensor in model_of(whole.checkpoint).values())
    kinds = {"exp_avg": "inner_state", "exp_avg_sq": "inner_state", "local": "own_models"}
    kinds |= {"error": "error_feedback", "share": "error_feedback"}
    for name, tensor in state_of(whole.checkpoint).items():
        first, second = name.split("/")[:2]
        if second != "tokens":
            sizes["outer_state" if first == "momentum" else kinds[second]] += tensor.nbytes
    assert sizes == planned._asdict()
    assert all(sizes[kind] for kind in sizes if kind != "own_models")


@pytest.mark.parametrize("ranks", [["--ranks-per-site", "1"], ["--replicas", "2"]], ids=" ".join)
def test_other_ranks_have_all_of_the_state(whole, tmp_path, ranks):
    run = halfway(whole, tmp_path)
    before = ckpt.list_checkpoints(run / "checkpoints")[-1]
    states, models = state_of(before), model_of(before)
    result = resumed(run, *ranks)
    # One round further it is the same job, but for the order of additions.
    for mine, other in zip(result.rounds("loss"), whole.rounds("loss"), strict=True):
        assert mine == pytest.approx(other, rel=1e-5)
    assert result.report["sites"][0]["bytes_sent"] == whole.report["sites"][0]["bytes_sent"]
    assert result.report["run"]["from_round"] == 0
    # And what it has read is what was written.
    read = tmp_path / "read"
    shutil.copytree(run, read, ignore=lambda _, names: [n for n in names if n == "step-00000008"])
    last = read_back(read, *ranks)
    same(last[0], states)
    same(last[1], models)


def read_back(run: Path, *changes: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """State and model as a job with other ranks writes them after it has read them."""
    result = run_job(["--resume", str(run), *changes], save_and_stop)
    # Saved as if in the middle of a round: with the site's own parameters beside the global model.
    state = {n: t for n, t in state_of(result.checkpoint).items() if "/local/" not in n}
    return state, model_of(result.checkpoint)


@pytest.mark.parametrize(
    "changes",
    [
        "--sites 4 --ranks-per-site 1 --replication 2",
        "--replication 2",
        "--sites 1 --ranks-per-site 1",
    ],
)
def test_other_sites_go_on(whole, tmp_path, changes):
    run = halfway(whole, tmp_path)
    before = ckpt.list_checkpoints(run / "checkpoints")[-1]
    old = Placement.from_dict(load_state(before, 0)["sync"]["placement"])
    states, models = state_of(before), model_of(before)
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    state, model = read_back(copy, *changes.split())
    same(model, models)
    for name, tensor in state.items():
        place, _, rest = name.partition("/")
        if place in ("anchor", "momentum"):
            assert torch.equal(tensor, states[name]), name
        elif rest.startswith("exp_avg"):
            what, _, key = rest.partition("/")
            words = key.split(".")
            holders: tuple[int, ...] = (0, 1)
            if "experts" in words:
                expert = int(words[words.index("experts") + 1])
                holders = old.owners(int(words[1]), expert)
            given = [states[f"site{holder}/{what}/{key}"] for holder in holders]
            assert any(torch.equal(tensor, one) for one in given), name
        elif rest.startswith(("error", "share", "tokens")):
            assert not tensor.any(), name
    result = resumed(run, *changes.split())
    assert result.report["run"]["from_round"] == 2 and result.report["run"]["rounds"] == 4
    assert "counts start from zero" in result.said
    for site in result.report["sites"]:
        assert site["bytes_sent"] == site["planned"]["bytes"]
    assert result.rounds("loss")[-1] < result.rounds("loss")[0]


def test_a_stop_in_the_middle_of_a_round(rank_flags, tmp_path):
    """Ctrl+C in a job of 2 x 2: goes on at other ranks, not at other sites."""
    run = tmp_path / "run"
    command = [sys.executable, "-P", "-m", "fomoe_ext.cli", "train", *rank_flags, *TWO.split()]
    command += ["--run-dir", str(run), "--local-steps", "200", "--rounds", "2"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if "tokens, replication" in line:
            break
    time.sleep(1.0)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 130, said
    steps = load_state(ckpt.list_checkpoints(run / "checkpoints")[-1], 0)["steps_in_round"]
    assert 0 < steps < 200
    with pytest.raises(AssertionError, match="in the middle of a round"):
        resumed(run, *["--sites", "4", "--ranks-per-site", "1", "--replication", "2"])
    result = resumed(run, "--ranks-per-site", "1")
    assert result.code == 0 and result.report["sites"][0]["steps"] == 400


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs /proc")
def test_the_death_of_a_rank_ends_the_job(rank_flags, tmp_path):
    arguments = [*rank_flags, *TWO.split(), "--run-dir", str(tmp_path / "run"), "--rounds", "4000"]
    process, ranks = start_and_wait_for("round    2/", *arguments)
    assert len(ranks) == 4
    environments = {pid: b"\0" + Path(f"/proc/{pid}/environ").read_bytes() for pid in ranks}
    victim = next(pid for pid, found in environments.items() if b"\0RANK=3\0" in found)
    os.kill(victim, signal.SIGKILL)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGKILL
    assert "site 1, rank 1 was killed by SIGKILL" in said
    require_gone(ranks)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@pytest.mark.slow
def test_torchrun_on_two_machines(rank_flags, whole, tmp_path):
    """A node per site; the numbers are those of `fomoe train`."""
    run, port = tmp_path / "run", str(free_port())
    words = [sys.executable, "-P", "-m", "torch.distributed.run", "--nnodes", "2"]
    words += ["--nproc-per-node", "2", "--master-addr", "127.0.0.1", "--master-port", port]
    job = ["-m", "fomoe_ext.train", *rank_flags, *JOB, "--run-dir", str(run)]
    nodes = [
        subprocess.Popen(
            [*words, "--node-rank", str(node), *job],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment() | {"GLOO_SOCKET_IFNAME": "lo"},
        )
        for node in range(2)
    ]
    for node in nodes:
        said, _ = node.communicate(timeout=120)
        assert node.returncode == 0, said
    same(model_of(ckpt.list_checkpoints(run / "checkpoints")[-1]), model_of(whole.checkpoint))


def test_a_process_knows_its_site_and_rank():
    """As torchrun starts them, a node per site."""
    environment = {"RANK": "5", "WORLD_SIZE": "6", "LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "3"}
    world = find_world(2, environment, 3)
    assert (world.site, world.rank, world.process, world.processes) == (1, 2, 5, 6)
    with pytest.raises(ValueError, match="all sites have as many ranks"):
        find_world(2, environment, 2)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ("--ranks-per-site 3", "batch_size"),
        ("--ranks-per-site 4 --replicas 3", "replicas"),
        ("--ranks-per-site 2 --placement random --reshuffle-rounds 2", "reshuffle_rounds"),
        ("--spread-by x.json", "spread_by"),
    ],
)
def test_bad_options_are_refused(changes, words, capsys):
    with pytest.raises(SystemExit):
        parse_args([*SMALL, *changes.split()])
    said = capsys.readouterr()
    assert words in said.out + said.err
