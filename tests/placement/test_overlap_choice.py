"""How many steps of overlap are chosen for what an exchange takes."""

from __future__ import annotations

import math

import pytest

from fomoe_ext.placement.overlap import FIRST, chosen_overlap, needed_steps, next_overlap, reason


@pytest.mark.parametrize(
    ("exchange", "steps", "chosen"),
    [(0.0, 16, 1), (0.1, 16, 2), (1.0, 16, 3), (8.0, 16, 11), (9.3, 16, 13), (40.0, 16, 15)],
)
def test_a_quarter_more_than_the_exchange_takes_and_a_step(exchange, steps, chosen):
    assert chosen_overlap(exchange, steps) == chosen
    assert chosen_overlap(exchange, 2) == 1


@pytest.mark.parametrize("bad", [-1.0, math.nan, math.inf])
def test_nonsense_is_refused(bad):
    with pytest.raises(ValueError, match="exchange_steps must be finite and at least 0, got"):
        chosen_overlap(bad, 16)


def test_a_choice_stays_where_it_is_about_right():
    assert next_overlap(1, 9.3, 16) == 13
    assert next_overlap(12, 11.0, 16) == 12  # it still fits
    assert next_overlap(12, 11.1, 16) == 15  # it does not any more
    assert next_overlap(12, 6.0, 16) == 12  # 9 would do
    assert next_overlap(12, 4.8, 16) == 7  # 7 are much less


@pytest.mark.parametrize(
    ("told", "steps"),
    [
        # A round of which nothing is known yet, at one site.
        ([(0.1, 4.0, 1.0), (0.0, 0.0, 0.0)], None),
        # Measured on a link of 200 Mbit/s and 50 ms: two latencies to announce, two to send.
        ([(0.11, 0.12, 0.1), (0.40, 0.12, 0.1), (0.94, 0.12, 0.1), (0.63, 0.12, 0.1)], 2.3),
        # The site with the shortest steps needs most of them, the slowest exchange counts.
        ([(0.1, 4.0, 1.0), (7.0, 4.0, 0.5)], 8.2),
        ([(0.5, 1.5, 1.0), (0.9, 7.5, 1.0)], 8.0),
    ],
)
def test_what_sites_tell_becomes_steps(told, steps):
    needed = needed_steps(told)
    assert needed == (None if steps is None else pytest.approx(steps))
    if needed is not None:
        # In one go: what is chosen first is kept while the times stay as they are.
        chosen = next_overlap(FIRST, needed, 16)
        assert needed < chosen == next_overlap(chosen, needed, 16)
    assert next_overlap(15, 100.0, 16) == 15  # there are no more


def test_the_reason_says_why_not_more():
    assert reason(12, 9.3, 16) == (
        "overlap 12: the exchange takes 9.3 steps; more would only make deltas older"
    )
    assert "takes 1.0 step;" in reason(2, 1.0, 16)
    told = reason(15, 20.0, 16)
    assert "takes 20.0 steps; more is not possible" in told and "after 16 steps" in told
    assert "sites wait for the rest" in told
    assert reason(12, 7.9, 16, 2) == reason(12, 7.9, 16)
    told = reason(12, 9.3, 16, 2)
    assert "more would not help, as the 2 exchanges of a round take longer than its 16" in told
