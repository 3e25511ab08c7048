"""The training job as its users start it: `fomoe train`, torchrun, Ctrl+C, lost sites, --resume."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from sites import pool
from small_job import SMALL, environment, finish, require_gone, start_and_wait_for, started, train

from fomoe_ext.checkpoint import manifest as ckpt
from fomoe_ext.checkpoint.reader import GlobalModelReader
from fomoe_ext.checkpoint.whole import is_whole
from fomoe_ext.config.io import load_config
from fomoe_ext.data.sequences import open_data
from fomoe_ext.report.metrics import read_metrics
from fomoe_ext.report.runs import job_config

# ---- what a job leaves behind --------------------------------------------------------------------


def test_a_job_from_start_to_report(flags, tmp_path):
    run = tmp_path / "run"
    result = started(*flags)
    report = finish(run, result)

    assert report["run"]["rounds"] == 4 and report["run"]["sites"] == 2
    assert report["run"]["tokens"] == 4 * 3 * 2 * 2 * 32  # rounds, steps, sites, batch, length
    full = report["full_replica_memory"]
    dense = 1 - report["model_parameters"]["sparse"] / report["model_parameters"]["total"]
    for site in report["sites"]:
        assert site["bytes_sent"] == site["planned"]["bytes"] > 0
        assert site["bytes_sent"] < site["planned"]["full_replica_bytes"]
        assert site["planned"]["full_replica_bytes"] < site["planned"]["ddp_bytes"]
        share = dense + (1 - dense) / 2  # replication 1 of 2 sites
        for part, size in site["memory"].items():
            assert size == pytest.approx(share * full[part], rel=1e-9), part
        assert 0.2 < site["skipped_share"] < 0.8
    shares = [site["skipped_share"] for site in report["sites"]]
    assert sum(shares) == pytest.approx(1, abs=0.2)  # what one skips the other holds
    for load in report["validation"]["load"]:
        assert sum(load) == 2 * report["validation"]["tokens"]

    records = read_metrics(run / "metrics.jsonl")
    rounds = [r for r in records if r["kind"] == "round"]
    assert [r["round"] for r in rounds] == [1, 2, 3, 4]
    assert sum(r["bytes_sent"] for r in rounds) == report["sites"][0]["bytes_sent"]
    assert [r["round"] for r in records if r["kind"] == "validation"] == [2, 4]
    assert list((run / "tensorboard").iterdir())
    assert (run / "report.md").read_text().startswith("# Run run\n")
    for part in ("validation bits per byte", "counted", "site 1"):
        assert part in result.stdout
    saved = load_config(run / "config.toml")
    assert saved.model.hidden_size == 16 and saved.sites.replication == 1
    (checkpoint,) = ckpt.list_checkpoints(run / "checkpoints")
    assert is_whole(checkpoint)
    with GlobalModelReader(checkpoint) as reader:
        counted = sum(reader.tensor(name).numel() for name in reader.names())
    assert counted >= report["model_parameters"]["total"]  # and buffers


@pytest.mark.parametrize(
    "changes",
    [
        "--optimizer ddp --replication 2",
        "--optimizer fedavg --codec bf16 --router-scope resident",
        "--optimizer local-adamw --balance bias",
        "--placement random --reshuffle-rounds 1 --reshuffle-warmup 2",
        "--placement random --reshuffle-rounds 1 --reshuffle-moments carry",
    ],
    ids=["ddp", "fedavg", "local-adamw", "reshuffle", "reshuffle-carry"],
)
def test_counted_bytes_are_predicted_bytes(flags, tmp_path, changes):
    report = finish(tmp_path / "run", train(*flags, *changes.split(), "--rounds", "2"))
    for site in report["sites"]:
        assert site["bytes_sent"] + site["moved_bytes"] >= site["planned"]["bytes"] > 0
        assert site["planned"]["bytes"] in (
            site["bytes_sent"],
            site["bytes_sent"] + site["moved_bytes"],
        )
        assert (site["moved_bytes"] > 0) == ("reshuffle" in changes)
    if "resident" in changes:
        assert all(site["skipped_share"] == 0 for site in report["sites"])


# ---- the same bits -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(text, tmp_path_factory):
    """A job that ran undisturbed, with a checkpoint after every round: its folder and report."""
    run = tmp_path_factory.mktemp("whole") / "run"
    cache = ["--cache-dir", str(text / "cache"), "--data", str(text / "*.py")]
    sites = ["--sites", "2", "--replication", "1", "--run-dir", str(run)]
    flags = [*SMALL, *sites, *cache]
    return run, finish(run, train(*flags, "--checkpoint-rounds", "1"))


def test_torchrun_gives_the_same_bits(flags, whole, tmp_path):
    launcher = [sys.executable, "-P", "-m", "torch.distributed.run", "--standalone"]
    result = subprocess.run(
        [*launcher, "--nproc-per-node", "2", "-m", "fomoe_ext.train", *flags],
        capture_output=True,
        text=True,
        env=environment(),
        cwd=tmp_path,
        timeout=120,
    )
    report = finish(tmp_path / "run", result)
    assert report["run"]["model_hash"] == whole[1]["run"]["model_hash"]


def test_resuming_gives_the_same_bits(whole, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(whole[0], run)
    for checkpoint in ckpt.list_checkpoints(run / "checkpoints")[2:]:
        shutil.rmtree(checkpoint)
    (run / "report.json").unlink()
    result = train("--resume", str(run))
    report = finish(run, result)
    assert "resumed from" in result.stdout and "round 2, step 6" in result.stdout
    assert report["run"]["model_hash"] == whole[1]["run"]["model_hash"]
    assert report["validation"] == whole[1]["validation"]
    sent = [[site["bytes_sent"] for site in r["sites"]] for r in (report, whole[1])]
    assert sent[0] == sent[1]
    rounds = [r["round"] for r in read_metrics(run / "metrics.jsonl") if r["kind"] == "round"]
    assert rounds == [1, 2, 3, 4]


def test_another_seed_gives_other_bits(flags, whole, tmp_path):
    report = finish(tmp_path / "run", train(*flags, "--seed", "1"))
    assert report["run"]["model_hash"] != whole[1]["run"]["model_hash"]


# ---- stopping and failing ------------------------------------------------------------------------


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs /proc")
def test_ctrl_c_writes_a_checkpoint_and_the_job_goes_on(flags, tmp_path):
    run = tmp_path / "run"
    undisturbed = [*flags, "--rounds", "40", "--eval-rounds", "0"]
    process, sites = start_and_wait_for("round    3/", *undisturbed)
    assert len(sites) == 2
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, out + err
    require_gone(sites)
    (checkpoint,) = ckpt.list_checkpoints(run / "checkpoints")
    assert is_whole(checkpoint)
    assert not list((run / "checkpoints").glob(".*"))

    resumed = finish(run, train("--resume", str(run)))
    again = finish(tmp_path / "again", train(*undisturbed, "--run-dir", str(tmp_path / "again")))
    assert resumed["run"]["model_hash"] == again["run"]["model_hash"]


def stop_unevenly(site: int, num_sites: int, arguments: list[str]) -> list[str]:
    """Saves where one site has begun a round and the other has not; what differs when resumed."""
    from fomoe_ext.launch.world import StopRequest, World
    from fomoe_ext.train.site import TrainingSite

    config = job_config(arguments)
    files = config.data
    data = open_data(files.data, config.model.seq_len, cache_dir=files.cache_dir)
    given = config, World(site, num_sites), data, torch.device("cpu")
    job = TrainingSite(*given, None)
    job.steps.take(StopRequest(), lambda loss: None)
    job.notes.exchange(stop=False)
    job.meetings.meet()
    if site == 0:
        job.steps.step()
    saved = job.checkpoints.save(config.run.local_steps + 1)
    assert not saved.error
    resumed = TrainingSite(*given, saved.path)
    assert resumed.steps_in_round == (1 if site == 0 else 0)
    wanted = job.model.state_dict()
    return [n for n, v in resumed.model.state_dict().items() if not torch.equal(v, wanted[n])]


def test_a_site_that_has_not_begun_the_round_resumes_with_its_own_biases(flags, text):
    """Those of the global model are from a site that has taken a step since the meeting."""
    open_data([str(text / "*.py")], 32, cache_dir=text / "cache")  # encoded once, for both sites
    assert pool().run(2, stop_unevenly, flags) == [[], []]


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs /proc")
def test_a_killed_site_ends_the_job_and_is_named(flags):
    process, sites = start_and_wait_for("round    2/", *flags, "--rounds", "4000")
    command_lines = {pid: Path(f"/proc/{pid}/environ").read_bytes() for pid in sites}
    victim = next(pid for pid, env in command_lines.items() if b"\0RANK=1\0" in b"\0" + env)
    os.kill(victim, signal.SIGKILL)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGKILL
    assert "site 1 was killed by SIGKILL" in err
    require_gone(sites)


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs /proc")
def test_sites_end_with_their_launcher(flags):
    process, sites = start_and_wait_for("round    2/", *flags, "--rounds", "4000")
    process.kill()
    process.communicate(timeout=30)
    require_gone(sites)


@pytest.mark.parametrize(
    "changes, message",
    [
        (["--replication", "3"], "replication"),
        (["--no-such-flag", "1"], "no-such-flag"),
        (["--config", "missing.toml"], "missing.toml does not exist"),
        (["--data", "missing.txt"], "missing.txt"),
        (["--resume", "nowhere"], "must be a run folder with config.toml, got nowhere"),
        (["--preset", "7b"], "preset must be one of"),
        (["--num-experts", "7"], "num_experts"),
        (["--placement-file", "none.json"], "none.json does not exist"),
        (["--device", "cuda"], "device is cuda"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_bad_arguments_are_named(flags, tmp_path, monkeypatch, changes, message):
    monkeypatch.chdir(tmp_path)
    result = train(*flags, *changes)
    assert result.returncode not in (0, 130)
    said = " ".join((result.stdout + result.stderr).replace("│", " ").split())
    assert message in said, said
    assert "Traceback" not in said
    assert not (tmp_path / "run/report.json").exists()


def test_a_run_folder_is_not_overwritten(whole, text):
    before = (whole[0] / "metrics.jsonl").read_bytes()
    result = train(*SMALL, "--data", str(text / "*.py"), "--run-dir", str(whole[0]))
    assert result.returncode == 2 and "run_dir must be a folder without a run" in result.stderr
    assert (whole[0] / "metrics.jsonl").read_bytes() == before


def test_a_damaged_checkpoint_is_refused(whole, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(whole[0], run)
    for checkpoint in ckpt.list_checkpoints(run / "checkpoints"):
        state = checkpoint / "state-00001.json"
        state.write_bytes(state.read_bytes()[:-1])
    result = train("--resume", str(run))
    assert result.returncode not in (0, 130)
    assert "no whole checkpoint" in result.stderr and "state-00001.json must have" in result.stderr
