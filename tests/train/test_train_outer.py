"""Jobs with compressed, staggered and overlapped meetings, as users start them."""

from __future__ import annotations

import shutil

import pytest
from small_job import SMALL, finish, train

from fomoe_ext.checkpoint import manifest as ckpt
from fomoe_ext.report.metrics import read_metrics
from fomoe_ext.report.runs import job_config


@pytest.mark.parametrize(
    "changes",
    [
        "--codec int8 --expert-mean tokens --rescale",
        "--codec topk --fragments 2 --overlap 2",
        "--codec int2 --optimizer local-adamw --moment-periods 1 2 --moment-codecs int8 bf16",
        "--codec int8-128 --optimizer ddp",
        "--codec int4 --expert-turns 3 --router-scope resident",
    ],
    ids=["tokens", "overlap", "local-adamw", "ddp", "turns"],
)
def test_bytes_are_as_predicted_and_holders_agree(flags, tmp_path, changes):
    shared = ["--replication", "2", *changes.split()]
    result = train(*flags, *shared)
    report = finish(tmp_path / "run", result)
    fragments = 2 if "fragments" in changes else 1
    assert report["run"]["agreements"] == 4 * fragments
    for site in report["sites"]:
        assert site["bytes_sent"] == site["planned"]["bytes"] > 0
        assert site["healed"] == 0 and site["exchange_s"] > 0
        full = report["full_replica_memory"]
        assert site["memory"] == full and full["error_feedback"] > 0
    assert f"after {4 * fragments} meetings" in result.stdout
    if "overlap" in changes:
        assert "2 fragments, 2 steps of overlap" in (tmp_path / "run" / "report.md").read_text()
    told = "each was averaged in one of 3 meetings, least-trained first" in " ".join(
        (tmp_path / "run" / "report.md").read_text().split()
    )
    assert told == ("turns" in changes)


def test_a_slow_link_is_counted_and_hidden(flags, tmp_path, monkeypatch):
    """With overlap the result is the same on any link, and the report says over which it went."""
    monkeypatch.setenv("FOMOE_LINK_MODE", "counted")
    hashes = set()
    for name, link in (("quick", []), ("slow", ["--link", "5mbit,100ms"])):
        run = tmp_path / name
        arguments = ["--replication", "2", "--codec", "int8", "--overlap", "2", *link]
        report = finish(run, train(*flags, *arguments, "--run-dir", str(run), "--rounds", "3"))
        hashes.add(report["run"]["model_hash"])
        assert report["run"]["link"] == ("5 Mbit/s, 100 ms: counted delays" if link else "")
        if link:
            # Every round has statuses, shares and sums, one after the other.
            assert all(site["exchange_s"] > 3 * 3 * 0.1 for site in report["sites"])
            rounds = [r for r in read_metrics(run / "metrics.jsonl") if r["kind"] == "round"]
            assert len(rounds) == 3 and all("exchange_s" in r for r in rounds)
    assert len(hashes) == 1


@pytest.mark.parametrize(
    "changes",
    [
        "--codec int4 --rounding stochastic",
        "--codec int8 --fragments 2 --overlap 1",
        "--codec int4 --expert-turns 3",
    ],
)
def test_resuming_gives_the_same_bits(flags, tmp_path, changes):
    run = tmp_path / "run"
    arguments = [*flags, "--replication", "2", *changes.split(), "--checkpoint-rounds", "1"]
    whole = finish(run, train(*arguments))
    for checkpoint in ckpt.list_checkpoints(run / "checkpoints")[2:]:
        shutil.rmtree(checkpoint)
    (run / "report.json").unlink()
    result = train("--resume", str(run))
    report = finish(run, result)
    assert "round 2, step 6" in result.stdout
    for what in ("model_hash", "agreements"):
        assert report["run"][what] == whole["run"][what]
    assert report["validation"] == whole["validation"]
    sent = [[site["bytes_sent"] for site in r["sites"]] for r in (report, whole)]
    assert sent[0] == sent[1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ("--codec int3", "int3"),
        ("--link fast", "link must be a bandwidth"),
        ("--overlap 3", "outer.overlap must be less than local_steps = 3, got 3"),
        ("--fragments 3", "outer.fragments must be at most model.num_layers = 2, got 3"),
        (
            "--fragments 2 --optimizer ddp",
            "must be diloco or fedavg with fragments or overlap, got 'ddp'",
        ),
        (
            "--moment-codecs int8 int8",
            "outer.moment_codecs: second must be one of fp32, bf16, got 'int8'",
        ),
        ("--expert-turns 2 --optimizer local-adamw", "outer.expert_turns > 1 needs optimizer"),
        ("--expert-turns 2 --turn-order first", "turn-order"),
        ("--expert-turns 2 --clip-delta 2", "outer.clip_delta needs outer.fragments = 1"),
        (
            "--expert-turns 2 --placement random --reshuffle-rounds 2",
            "outer.expert_turns > 1 needs sites.ranks_per_site = 1 and sites.reshuffle_rounds = 0",
        ),
        ("--moment-periods 3", "outer.moment_periods must be two numbers of rounds"),
    ],
)
def test_bad_flags_are_named(changes, message, capsys):
    with pytest.raises((ValueError, SystemExit)) as caught:
        job_config([*SMALL, *changes.split()])
    assert message in " ".join((str(caught.value) + capsys.readouterr().err).split())
