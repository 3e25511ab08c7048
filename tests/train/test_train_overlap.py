"""Jobs whose overlap is chosen by measured times: what they say, and how they are resumed."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from rank_jobs import model_of, run_job
from small_job import finish, train

from fomoe_ext.checkpoint import manifest as ckpt
from fomoe_ext.checkpoint.reader import load_state

AUTO = ["--overlap", "auto", "--codec", "int8", "--replication", "1"]


def cut(run: Path, rounds: int) -> Path:
    """Removes the report and all checkpoints after a round; returns the last that is left."""
    (run / "report.json").unlink()
    checkpoints = ckpt.list_checkpoints(run / "checkpoints")
    for checkpoint in checkpoints[rounds:]:
        shutil.rmtree(checkpoint)
    return checkpoints[rounds - 1]


def test_the_choice_is_said_reported_and_resumed(flags, tmp_path):
    """The times are those of this machine, so any choice may come of them."""
    run = tmp_path / "run"
    job = [*AUTO, "--local-steps", "6", "--rounds", "4", "--checkpoint-rounds", "1"]
    first = train(*flags, *job)
    report = finish(run, first)["run"]
    said = " ".join(first.stdout.split())
    assert 1 <= report["overlap"] < 6
    assert report["overlap_reason"].startswith("overlap ")
    assert report["overlap_reason"].split(";")[0] in said
    assert all(s["bytes_sent"] == s["planned"]["bytes"] for s in finish(run, first)["sites"])
    kept = load_state(cut(run, 3), 0)["sync"]
    assert 1 <= kept["overlap"] < 6 and kept["overlap_reason"] in said
    # The one round that is left ends before it can choose anew: its first exchange is its last.
    again = train("--resume", str(run))
    report = finish(run, again)["run"]
    assert report["rounds"] == 4
    assert (report["overlap"], report["overlap_reason"]) == (
        kept["overlap"],
        kept["overlap_reason"],
    )
    assert kept["overlap_reason"] in " ".join(again.stdout.split())


def tell_the_same(patch: pytest.MonkeyPatch) -> None:
    """Sites tell the same times in every run, as soon as they have measured any."""
    from fomoe_ext.outer.overlap import OverlapTimes

    told = OverlapTimes.told

    def same(times: OverlapTimes) -> tuple[float, float, float]:
        return (0.1, 1.9, 1.0) if any(told(times)) else (0.0, 0.0, 0.0)

    patch.setattr(OverlapTimes, "told", same)


@pytest.mark.parametrize("fragments", ["1", "2"])
def test_a_resumed_job_goes_on_with_what_it_had_chosen(rank_flags, tmp_path, fragments):
    """With equal times it is the uninterrupted job, bit for bit."""
    job = [*AUTO, "--fragments", fragments, "--local-steps", "6", "--rounds", "4"]
    where = ["--checkpoint-rounds", "1", "--run-dir", str(tmp_path / "run")]
    whole = run_job([*rank_flags, *job, *where], tell_the_same)
    whole_report, losses, model = whole.report, whole.rounds("loss"), model_of(whole.checkpoint)
    chosen = "overlap 4: the exchange takes 2.0 steps; more would only make deltas older"
    assert whole.report["run"]["overlap_reason"] == chosen and chosen in whole.said
    cut(whole.run, 2)
    again = run_job(["--resume", str(whole.run)], tell_the_same)
    assert again.report["run"]["overlap"] == 4 and chosen in again.said
    # A round tells the losses of the round before, the first after a start this site's own.
    assert again.rounds("round") == [1, 2, 3, 4]
    assert again.rounds("loss")[3] == losses[3]
    assert again.report["validation"] == whole_report["validation"]
    ended = model_of(again.checkpoint)
    assert ended.keys() == model.keys()
    assert all(ended[name].equal(model[name]) for name in model)
