"""Checkpoints as earlier versions wrote them: with the anchor beside the model that equals it."""

from __future__ import annotations

import shutil

import pytest
from rank_jobs import TWO, model_of, run_job, state_of

from fomoe_ext.checkpoint import manifest as ckpt


def write_the_anchor(patch: pytest.MonkeyPatch) -> None:
    """The anchor is among what a checkpoint holds, as it was of every optimizer but ddp."""
    from fomoe_ext.checkpoint import state

    vectors = state.shared_vectors
    patch.setattr(
        state, "shared_vectors", lambda sync: {"anchor": sync.state.anchors} | vectors(sync)
    )


@pytest.mark.parametrize(
    "changes",
    [
        ["--codec", "int8", "--fragments", "2", "--overlap", "1", "--replication", "2"],
        [*TWO.split(), "--codec", "int4"],
    ],
    ids=["overlap", "two ranks"],
)
def test_a_stored_anchor_changes_nothing(rank_flags, tmp_path, changes):
    """With overlap a site's parameters are others than the anchor, which is that of the meeting."""
    run = tmp_path / "run"
    job = [*rank_flags, *changes, "--rounds", "4", "--checkpoint-rounds", "2"]
    whole = run_job([*job, "--run-dir", str(run)], write_the_anchor)
    halfway, last = ckpt.list_checkpoints(run / "checkpoints")
    stored, model = state_of(halfway), model_of(halfway)
    anchors = {n.removeprefix("anchor/"): t for n, t in stored.items() if n.startswith("anchor/")}
    assert anchors and all(t.equal(model[n]) for n, t in anchors.items() if n in model)
    ended, ended_state, report = model_of(last), state_of(last), whole.report
    shutil.rmtree(last)
    again = run_job(["--resume", str(run)])
    mine, other = state_of(again.checkpoint), ended_state
    assert not any(name.startswith("anchor/") for name in mine)
    assert mine.keys() == {name for name in other if not name.startswith("anchor/")}
    assert all(mine[name].equal(other[name]) for name in mine)
    resumed = model_of(again.checkpoint)
    assert resumed.keys() == ended.keys()
    assert all(resumed[name].equal(ended[name]) for name in ended)
    assert again.report["validation"] == report["validation"]
