"""2N rounds are N rounds, a checkpoint written behind the training, and N more: the same bits,
losses and data; and `--resume auto`, which one command line can say for ever."""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from sites import pool
from small_job import SMALL, finish, train

from fomoe_ext.checkpoint import manifest as ckpt
from fomoe_ext.checkpoint.staging import Buffers
from fomoe_ext.checkpoint.state import tensors_of
from fomoe_ext.data.sequences import open_data
from fomoe_ext.launch.world import StopRequest, World
from fomoe_ext.report.metrics import read_metrics
from fomoe_ext.report.runs import job_config
from fomoe_ext.train.job_report import model_hash
from fomoe_ext.train.site import TrainingSite
from fomoe_ext.train.validation import validate


class Watched:
    """A training site's batches, with the windows that were taken and the losses of the steps."""

    def __init__(self, site: TrainingSite) -> None:
        self.site, self.windows, self.losses = site, [], []
        batches = site.batches
        take = type(batches).__next__

        def watched() -> torch.Tensor:
            batch = take(batches)
            self.windows += [hashlib.sha256(row.numpy().tobytes()).hexdigest() for row in batch]
            return batch

        share = site.steps.share
        site.steps.share = lambda _: share(watched())  # type: ignore[method-assign]
        site.batches = _Standing(batches)  # type: ignore[assignment]

    def rounds(self, count: int) -> None:
        for _ in range(count):
            self.site.steps.take(StopRequest(), lambda loss: self.losses.append(float(loss)))
            self.site.notes.exchange(stop=False)
            self.site.meetings.meet()


class _Standing:
    """Batches that stand still when asked for the next; all else is theirs."""

    def __init__(self, batches: Any) -> None:
        self._batches = batches

    def __next__(self) -> None:
        return None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._batches, name)


@contextmanager
def slow_copies() -> Iterator[None]:
    """Inside, a checkpoint takes longer to copy than a step takes."""
    copy = Buffers.copy

    def slow(*arguments: Any) -> torch.Tensor:
        time.sleep(0.001)
        return copy(*arguments)

    Buffers.copy = slow  # type: ignore[method-assign]
    try:
        yield
    finally:
        Buffers.copy = copy  # type: ignore[method-assign]


def outcome(watched: Watched) -> dict[str, Any]:
    """All that must be the same at the end."""
    site = watched.site
    site.finish()
    state = {
        name: hashlib.sha256(tensor.contiguous().view(-1).view(torch.uint8).numpy()).hexdigest()
        for name, tensor in tensors_of(site, None)
    }
    loss = validate(site, 512).loss
    data = site.batches.state_dict()
    return {"model": model_hash(site), "state": state, "loss": loss, "data": data}


def interrupted(site: int, num_sites: int, arguments: list[str]) -> list[Any]:
    """Two rounds, a checkpoint, two more while it is written; then the two from the checkpoint."""
    config = job_config(arguments)
    data = open_data(config.data.data, config.model.seq_len, cache_dir=config.data.cache_dir)
    given = config, World(site, num_sites), data, torch.device("cpu")
    whole = Watched(TrainingSite(*given, None))
    whole.rounds(2)
    done = list(whole.windows), list(whole.losses)
    with slow_copies():
        pending = whole.site.checkpoints.start(whole.site.tally.steps)
        assert not pending.copied.is_set()
        whole.rounds(1)
    saved = whole.site.checkpoints.poll(wait=True)
    assert saved is not None and not saved.error
    whole.rounds(1)
    again = Watched(TrainingSite(*given, saved.path))
    assert again.site.round == 2
    again.rounds(2)
    assert done[0] + again.windows == whole.windows
    assert done[1] + again.losses == whole.losses
    assert len(whole.losses) == 4 * config.run.local_steps
    return [outcome(whole), outcome(again), whole.windows]


@pytest.mark.parametrize("scope", ["resident", "global"])
@pytest.mark.parametrize("codec", ["fp32", "int4"])
@pytest.mark.parametrize("optimizer", ["diloco", "local-adamw"])
def test_an_interrupted_job_is_an_undisturbed_one(flags, text, optimizer, codec, scope):
    """With anchors, momenta, AdamW's moments, errors of encoding and data of every site.

    The two sites that hold an expert also write different parts of what they have alike.
    """
    open_data([str(text / "*.py")], 32, cache_dir=text / "cache")  # encoded once, for all sites
    changes = ["--optimizer", optimizer, "--codec", codec, "--router-scope", scope]
    more = ["--sites", "3", "--num-experts", "6", "--balance", "bias", "--rounding", "stochastic"]
    # Without other holders an expert's encoding has no error, and none is kept.
    replication = ["--replication", "1" if (optimizer, scope) == ("diloco", "global") else "2"]
    if codec == "fp32":
        more = more[:-2]
    answers = pool().run(3, interrupted, [*flags, *changes, *more, *replication])
    for whole, again, _ in answers:
        assert whole == again
        assert any("/error/" in name for name in whole["state"]) == (codec == "int4")
        assert any(name.startswith("momentum/") for name in whole["state"]) == (
            optimizer == "diloco"
        )
    assert len({whole["model"] for whole, _, _ in answers}) == 1
    # No window was trained on by two sites, and together they took the first of the order.
    taken = Counter(window for _, _, windows in answers for window in windows)
    assert set(taken.values()) == {1} and len(taken) == 3 * 4 * 3 * 2


def test_one_command_line_for_ever(flags, tmp_path):
    """From nothing; from the newest whole checkpoint, with what was skipped; at the end."""
    run = tmp_path / "run"
    # The learning rate must not depend on the number of rounds, which changes.
    same = [*flags, "--eval-rounds", "0", "--schedule", "constant"]
    line = [*same, "--resume", "auto", "--checkpoint-rounds", "1"]
    first = train(*line, "--rounds", "3")
    finish(run, first)
    assert "no whole checkpoint in" in first.stdout and "from the beginning" in first.stdout
    newest = ckpt.list_checkpoints(run / "checkpoints")[-1]
    (file,) = newest.glob("model-00001-of-*")
    damaged = bytearray(file.read_bytes())
    damaged[-3] ^= 1
    file.write_bytes(damaged)
    (run / "report.json").unlink()
    (run / "checkpoints/.step-00000012.partial").mkdir()
    result = train(*line, "--rounds", "4", "--keep-checkpoints", "2")
    report = finish(run, result)
    said = " ".join(result.stdout.split())
    assert f"skipped: checkpoint {newest}: the content of {file.name} is damaged" in said
    assert "round 2, step 6" in said
    rounds = [r["round"] for r in read_metrics(run / "metrics.jsonl") if r["kind"] == "round"]
    assert rounds == [1, 2, 3, 4]
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == [
        ckpt.checkpoint_name(9),
        ckpt.checkpoint_name(12),
    ]
    undisturbed = ["--rounds", "4", "--no-async-checkpoints", "--run-dir", str(tmp_path / "again")]
    again = finish(tmp_path / "again", train(*same, *undisturbed))
    assert report["run"]["model_hash"] == again["run"]["model_hash"]
    assert report["validation"] == again["validation"]


def test_a_checkpoint_that_cannot_be_written_does_not_end_the_job(flags, tmp_path):
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "checkpoints/.step-00000006.partial").write_text("in the way")
    result = train(*flags, "--checkpoint-rounds", "1", "--eval-rounds", "0")
    finish(run, result)
    names = [path.name for path in ckpt.list_checkpoints(run / "checkpoints")]
    assert names == [ckpt.checkpoint_name(steps) for steps in (3, 9, 12)]
    assert "could not write checkpoint" in result.stderr and "training goes on" in result.stderr
    failed = [r for r in read_metrics(run / "metrics.jsonl") if r["kind"] == "checkpoint_failed"]
    assert [(r["round"], r["step"]) for r in failed] == [(2, 6)]
    assert "site 0" in failed[0]["error"] and "site 1" in failed[0]["error"]
    report = json.loads((run / "report.json").read_text())
    for site in report["sites"]:
        assert (site["checkpoints"], site["checkpoints_failed"]) == (3, 1)
        assert 0 < site["checkpoint_s"] < site["wall_s"]
    shown = (run / "report.md").read_text()
    assert "| checkpoints that could not be written | 1 |" in shown
    assert "of a round (3 checkpoints)" in shown


def test_the_last_checkpoint_must_be_written(flags, tmp_path):
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "checkpoints/.step-00000003.partial").write_text("in the way")
    result = train(*flags, "--rounds", "1", "--eval-rounds", "0")
    assert result.returncode not in (0, 130)
    assert "could not write checkpoint" in result.stderr and "Traceback" not in result.stderr


@pytest.mark.parametrize("name", ["auto", ""])
def test_auto_begins_where_there_is_no_run(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    config = job_config(["--resume", *filter(None, [name]), *SMALL])
    assert config.run.resume == "auto" and config.run.run_dir.parent == Path("runs")
    config = job_config(["--resume=auto", "--run-dir", "x", *SMALL])
    assert (config.run.resume, config.run.run_dir) == ("auto", Path("x"))
    (tmp_path / "x").mkdir()
    (tmp_path / "x/config.toml").write_text("[run]\nseed = 5\nrun_dir = 'elsewhere'\n")
    config = job_config(["--resume=auto", "--run-dir", "x"])
    assert (config.run.seed, config.run.run_dir) == (5, Path("x"))
    with pytest.raises(FileNotFoundError, match=r"must be a run folder .*y$"):
        job_config(["--resume", "y"])
