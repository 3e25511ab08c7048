"""Parts of an OuterSync alone: no process, no connection, no meeting."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from fomoe_ext.outer.errors import MeetingError, MeetingLost
from fomoe_ext.outer.log import MeetingLog
from fomoe_ext.outer.options import OuterOptions
from fomoe_ext.outer.routed import TokenCounts
from fomoe_ext.outer.step_count import StepCount


def log_of(missing: str = "", **options: Any) -> MeetingLog:
    groups = SimpleNamespace(missing_sites=lambda: missing)
    site: Any = SimpleNamespace(index=1, groups=groups, options=OuterOptions(**options))
    return MeetingLog(site)


def test_a_report_has_what_was_counted_since_the_last_one() -> None:
    log = log_of()
    for count in (7, 30):
        with log.meeting("the meeting"):
            log.sent(count)
    log.round, log.exchange_s = 1, 0.5
    log.healed.append("a.weight")
    first, second = log.report_round(), log.report_round()
    assert (first.round, first.bytes_sent, first.exchange_s) == (1, 37, 0.5)
    assert first.seconds > 0 and first.healed == ("a.weight",)
    assert (second.bytes_sent, second.seconds, second.healed) == (0, 0.0, ())
    assert log.bytes_sent == 37


def test_bytes_and_seconds_may_belong_to_no_round() -> None:
    log = log_of()
    log.sent(5)
    seconds = log.seconds
    with log.meeting("moving experts"):
        log.sent(11)
    sent, taken = log.take_since(5, seconds)
    assert sent == 11 and taken > 0
    assert log.report().bytes_sent == 5 and log.bytes_sent == 16


def test_a_failed_meeting_is_the_last() -> None:
    log = log_of("site 2 is gone")
    log.round = 3
    named = "the meeting after round 3 broke off at site 1: site 2 is gone: connection closed"
    with pytest.raises(MeetingError, match=named), log.meeting("the meeting"):
        raise RuntimeError("connection closed")
    again = pytest.raises(MeetingError, match=f"cannot go on: {named}; resume")
    with again, log.meeting("the meeting"):
        pytest.fail("the meeting went on")


@pytest.mark.parametrize("error", [MeetingError("site 2 is in another round"), ValueError("no")])
def test_a_refused_meeting_may_be_tried_again(error: Exception) -> None:
    log = log_of()
    with pytest.raises(type(error)), log.meeting("the meeting"):
        raise error
    with log.meeting("the meeting"):
        pass


def test_a_staged_meeting_that_breaks_off_is_lost_alone() -> None:
    log = log_of("site 2 is gone", staged=True)
    lost = pytest.raises(MeetingLost, match="round 0 broke off at site 1: connection closed")
    with lost, log.meeting("the meeting"):
        raise RuntimeError("connection closed")
    with log.meeting("the meeting"):
        pass


def test_steps_of_a_round_continue_from_a_checkpoint() -> None:
    steps = StepCount(of_round=4)
    steps.taken = 10
    assert steps.since == 2
    steps.take()
    assert (steps.taken, steps.since) == (11, 3)
    steps.round_over([])
    assert (steps.taken, steps.since) == (11, 0)


def test_steps_without_reduced_gradients_are_counted() -> None:
    steps = StepCount(None)
    for reduces in (True, True, False):
        steps.reductions += reduces
        steps.take()
    assert "was called 2 times in 3" in steps.unreduced()
    steps.round_over([])
    steps.take()
    assert "was called 0 times in 1" in steps.unreduced()
    steps.reductions += 1
    assert steps.unreduced() == ""


def test_another_optimizer_is_named_by_what_it_trains() -> None:
    model, other = nn.Linear(2, 2), nn.Linear(2, 2)
    inner = torch.optim.SGD([model.weight], lr=0.1)
    second, foreign = torch.optim.SGD([model.bias], lr=0.1), torch.optim.SGD(other.parameters())
    steps, named = StepCount(None), list(model.named_parameters())
    steps.optimizers.update({inner, foreign})
    assert steps.other_optimizer(named, inner) == ""
    steps.optimizers.add(second)
    assert steps.other_optimizer(named, inner).startswith("bias was trained by another optimizer")


def test_tokens_are_counted_until_their_expert_meets() -> None:
    layers: Any = [SimpleNamespace(num_experts=3)] * 2
    counts = TokenCounts(layers)
    counts.add(torch.tensor([[1.0, 2.0, 0.0], [0.0, 0.0, 0.0]]))
    counts.add(torch.tensor([[4.0, 0.0, 0.0], [0.0, 0.0, 0.0]]))
    assert counts.tokens.tolist() == [[5, 2, 0], [0, 0, 0]] and counts.counted == [True, False]
    counts.forget([(0, 0), (1, 2)], 7)
    assert counts.tokens.tolist() == [[0, 2, 0], [0, 0, 0]] and counts.counted == [False, False]
    assert counts.met.tolist() == [[7, 0, 0], [0, 0, 7]]
