"""Jobs with frozen copies of absent experts."""

from __future__ import annotations

import shutil

import pytest
from small_job import SMALL, finish, train

from fomoe_ext.checkpoint import manifest as ckpt
from fomoe_ext.report.runs import job_config


def test_a_job_with_copies_of_all_absent_experts_skips_nothing(flags, tmp_path):
    result = train(*flags, "--stale-experts", "-1", "--stale-codec", "fp32")
    report = finish(tmp_path / "run", result)
    for site in report["sites"]:
        assert site["skipped_share"] == 0
        assert site["bytes_sent"] == site["planned"]["bytes"] > 0
        assert site["memory"]["stale_copies"] == 2 * 4 * 3 * 16 * 8 * 4  # layers, experts
    flops = report["flops_per_token"]["this run"]
    assert flops["stale_experts"] == flops["experts"] > 0
    assert flops["forward"] == report["flops_per_token"]["full replica"]["forward"]
    assert "stale copies" in (tmp_path / "run" / "report.md").read_text()


def test_copies_of_the_most_chosen_experts_skip_fewer_slots(flags, tmp_path):
    """By the load of an earlier run; bytes are as planned though some are sent more often."""
    first, changes = tmp_path / "run", ["--stale-experts", "2", "--inner-lr", "0.001"]
    evenly = finish(first, train(*flags, *changes))
    second = tmp_path / "by-load"
    by_load = [*changes, "--stale-by", str(first), "--run-dir", str(second)]
    chosen = finish(second, train(*flags, *by_load))
    share = lambda report: sum(site["skipped_share"] for site in report["sites"])
    assert share(chosen) < share(evenly)
    for site in chosen["sites"]:
        assert site["bytes_sent"] == site["planned"]["bytes"]
    wrong = [*by_load[:-1], str(tmp_path / "wrong"), "--num-layers", "1"]
    result = train(*flags, *wrong)
    assert result.returncode != 0
    assert "stale_by" in result.stderr and "of 1 layers of 8 experts" in result.stderr


def test_resuming_gives_the_same_bits(flags, tmp_path):
    """Copies are refreshed after rounds 2 and 4: made from the checkpoint of round 2, and of rounds
    1 and 3 kept in it."""
    run_dir = tmp_path / "run"
    changes = ["--stale-experts", "2", "--stale-period", "2", "--checkpoint-rounds", "1"]
    whole = finish(run_dir, train(*flags, *changes))
    assert all(0 < site["skipped_share"] < 1 for site in whole["sites"])
    for kept in (3, 2, 1):
        for checkpoint in ckpt.list_checkpoints(run_dir / "checkpoints")[kept:]:
            shutil.rmtree(checkpoint)
        (run_dir / "report.json").unlink()
        result = train("--resume", str(run_dir))
        report = finish(run_dir, result)
        assert f"round {kept}, step {3 * kept}" in result.stdout
        assert report["run"]["model_hash"] == whole["run"]["model_hash"]
        assert report["validation"] == whole["validation"]
        for site, before in zip(report["sites"], whole["sites"], strict=True):
            assert site["bytes_sent"] == before["bytes_sent"] == site["planned"]["bytes"]
            assert site["skipped_share"] == before["skipped_share"]


def test_a_job_goes_on_at_other_sites_with_other_copies(flags, tmp_path):
    run_dir = tmp_path / "run"
    finish(run_dir, train(*flags, "--stale-experts", "2", "--rounds", "1"))
    changes = ["--rounds", "2", "--sites", "4", "--stale-experts", "-1", "--batch-size", "1"]
    report = finish(run_dir, train("--resume", str(run_dir), *changes))
    for site in report["sites"]:
        assert site["skipped_share"] == 0 and site["bytes_sent"] == site["planned"]["bytes"] > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ("--stale-experts 5", "sites.stale_experts must be at most 4, the number of experts"),
        ("--stale-experts -2", "sites.stale_experts must be at least -1, got -2"),
        ("--stale-codec topk", "stale-codec"),
        ("--stale-by x.json", "sites.stale_by needs sites.stale_experts of 1 or more, got 0"),
        ("--stale-experts -1 --stale-by x.json", "of 1 or more, got -1"),
        ("--stale-period 0", "outer.stale_period must be at least 1, got 0"),
        ("--stale-experts 1 --optimizer ddp", "got 1, 0, 1 and ddp"),
        ("--stale-experts 1 --overlap 1", "sites.stale_experts needs outer.fragments = 1"),
        ("--stale-experts 1 --router-scope resident", "needs model.router_scope = global"),
        ("--stale-experts 1 --ranks-per-site 2", "and sites.ranks_per_site = 1, got 0 and 2"),
        (
            "--stale-experts 1 --placement random --reshuffle-rounds 2",
            "sites.stale_experts needs sites.reshuffle_rounds = 0",
        ),
    ],
)
def test_bad_flags_are_named(changes, message, capsys):
    with pytest.raises((ValueError, SystemExit)) as caught:
        job_config([*SMALL, "--sites", "2", "--replication", "1", *changes.split()])
    assert message in " ".join((str(caught.value) + capsys.readouterr().err).split())
