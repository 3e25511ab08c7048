"""Training that diverges says where, what was measured before, and what to try."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from small_job import SMALL, train

from fomoe_ext.config.job import TrainConfig
from fomoe_ext.outer.errors import MeetingError
from fomoe_ext.train.divergence import Course, Diverged


def course(**sections: dict[str, Any]) -> Course:
    config = TrainConfig()
    for name, options in sections.items():
        section = dataclasses.replace(getattr(config, name), **options)
        config = dataclasses.replace(config, **{name: section})
    return Course(config, 3)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("A text that is long enough. " * 500)
    return path


@pytest.mark.parametrize(
    ("flags", "words", "not_said"),
    [
        ("--inner-lr 100", ["Learning rate", "(--inner-lr 100)", "lower --inner-lr"], "--outer-lr"),
        (
            "--inner-lr 1e6 --inner-optimizer sgd --grad-clip 0 --warmup-steps 0",
            ["in round 1, step", "gradients were not clipped", "or --grad-clip 1"],
            "--outer-lr",
        ),
        (
            "--outer-lr 1e5",
            ["step 1 of 3", "Try a lower --outer-lr (now 100000) or --outer-momentum (now 0.2)"],
            "site 1 ended",
        ),
    ],
    ids=["inner rate", "without clipping", "outer rate"],
)
def test_a_rate_that_is_too_high_is_named(flags, words, not_said, text, tmp_path):
    sites = ["--sites", "2", "--replication", "1", "--rounds", "20", "--eval-rounds", "0"]
    given = [*SMALL, *sites, "--data", str(text), "--run-dir", str(tmp_path / "run")]
    result = train(*given, *flags.split())
    said = " ".join(result.stderr.split())
    assert result.returncode == 1 and "Traceback" not in said, said
    # Either site may be the first.
    assert re.search(r"fomoe train, site (\d): training has diverged at site \1 in round", said)
    assert all(word in said for word in [*words, "Last finite losses: "]), said
    assert not_said not in said


def test_what_was_measured_is_told():
    last = course()
    last.rate(0.25)
    for step, value in enumerate([5.5, 6.0, 700.0]):
        last.loss(torch.tensor(value), 2, step + 1)
    last.norm(12.5, 2, 3)
    with pytest.raises(Diverged) as caught:
        last.loss(torch.tensor(math.nan), 2, 4)
    said = str(caught.value)
    assert said.startswith("training has diverged at site 3 in round 2, step 4 of ")
    assert "the loss is NaN or infinite" in said
    assert "Last finite losses: 5.5, 6, 700" in said
    assert "Learning rate 0.25 (--inner-lr 0.005), last gradient norm 12.5 before" in said
    with pytest.raises(Diverged, match="the gradient norm is NaN or infinite"):
        last.norm(torch.tensor(math.inf), 2, 4)


def test_a_gpus_losses_are_looked_at_after_the_round(monkeypatch):
    late = course()
    for step, value in enumerate([5.5, math.inf, math.nan]):
        late._losses.append((1, step + 1, torch.tensor(value)))
    with pytest.raises(Diverged, match=r"in round 1, step 2 of .*Last finite losses: 5\.5\."):
        late.check()
    course().check()


def test_errors_about_other_things_stay():
    for error in (ValueError("x must be 1, got 2"), MeetingError("site 1 is lost")):
        with pytest.raises(type(error)) as caught, course().explained(1, 1):
            raise error
        assert caught.value is error


def test_a_meeting_says_it_at_all_sites():
    published = course(outer={"outer_lr": 0.7, "outer_momentum": 0.9})
    error = MeetingError("nothing was sent or changed: site 1: the value of x is NaN or infinite")
    with pytest.raises(MeetingError) as caught, published.explained(4, None):
        raise error
    said = str(caught.value)
    assert said.startswith(f"training has diverged after round 4: {error}")
    assert "Try a lower --outer-lr (now 0.7) or --outer-momentum (now 0.9)" in said
    assert "a lower --inner-lr" in said and caught.value.__cause__ is error
