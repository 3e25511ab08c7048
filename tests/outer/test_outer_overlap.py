"""Fragments that meet at staggered steps, in the background, against a simulation of all sites."""

from __future__ import annotations

import io
import os
from functools import lru_cache
from typing import Any

import pytest
import torch
from outer_model import (
    SmallModel,
    assert_same_bits,
    bits,
    contributors,
    cyclic_placement,
    give_gradients,
    pieces,
    receivers,
)
from sites import pool
from torch import Tensor

from fomoe_ext.outer import MeetingError, OuterOptions, OuterSync, SiteGroups
from fomoe_ext.outer.overlap import OverlapTimes
from fomoe_ext.placement import Placement, wire

STEPS, ROUNDS, LR, ALPHA = 4, 3, 0.1, 0.25
SCHEDULES = [(1, 0), (2, 0), (1, 1), (2, 1), (1, 3), (2, 3)]


def place(num_sites: int) -> Placement:
    return cyclic_placement(num_sites, min(2, num_sites))


def make(
    site: int, num_sites: int, fragments: int, overlap: Any, **options: Any
) -> tuple[SmallModel, torch.optim.Optimizer, OuterSync]:
    placement = place(num_sites)
    model = SmallModel(placement, site)
    inner = torch.optim.SGD(model.parameters(), lr=LR)
    sync = OuterSync(
        model,
        placement,
        site,
        OuterOptions(
            fragments=fragments,
            overlap=overlap,
            overlap_alpha=ALPHA,
            local_steps=STEPS,
            bucket_bytes=600,
            outer_lr=0.7,
            outer_momentum=0.9,
            **options,
        ),
        inner_optimizer=inner,
        groups=SiteGroups(num_sites, site, 20),
    )
    return model, inner, sync


def train(
    model: SmallModel, inner: torch.optim.Optimizer, sync: OuterSync, site: int, step: int
) -> None:
    """One local step, and the meeting after the last of a round."""
    give_gradients(model, site, step)
    inner.step()
    sync.after_step()
    if step % STEPS == STEPS - 1:
        sync.step()


def anchors(sync: OuterSync) -> dict[str, Tensor]:
    return {
        piece.key: sync.state.anchors[i][place].clone()
        for i, layout in enumerate(sync.layout.layouts)
        for piece, place in layout.slices()
    }


def follow(site: int, num_sites: int, fragments: int, overlap: int, codec: str) -> Any:
    """Parameters after every step; anchors, bytes and what was predicted at the end."""
    model, inner, sync = make(site, num_sites, fragments, overlap, codec=codec)
    seen, predicted = [], 0
    for step in range(ROUNDS * STEPS):
        if step % STEPS == 0:
            predicted += sync.predicted_bytes()
        train(model, inner, sync, site, step)
        seen.append(pieces(model))
    sync.finish()
    sync.verify()
    return seen, anchors(sync), sync.bytes_sent, predicted, sync.agreements


def key_of(key: tuple[Any, ...]) -> str:
    """The name of a piece in the layout."""
    if key[0] == "dense":
        return key[1]
    if key[0] == "router":
        return f"layers.{key[1]}.router.weight.{key[2]}"
    return f"layers.{key[1]}.experts.{key[2]}.{key[3]}"


def simulate(
    key: tuple[Any, ...], starts: list[Any], num_sites: int, fragments: int, overlap: int
) -> tuple[list[list[Tensor]], Tensor]:
    """A piece on all sites that hold it, after every step, and its anchor at the end, in fp64."""
    placement = place(num_sites)
    sites = receivers(key, placement, "global")
    sources = contributors(key, placement)
    local = {site: starts[site][key].double() for site in sites}
    anchor, velocity = local[sites[0]].clone(), torch.zeros_like(local[sites[0]])
    fragment = 0 if key[0] == "dense" else key[1] % fragments
    due = wire.fragment_steps(fragments, STEPS)[fragment]
    history, under_way = [], []

    def land(delta: Tensor) -> None:
        nonlocal anchor, velocity
        velocity = 0.9 * velocity + delta
        anchor = anchor - 0.7 * (delta + 0.9 * velocity)
        for site in sites:
            mixed = ALPHA * local[site] + (1 - ALPHA) * anchor
            local[site] = mixed if overlap else anchor

    for step in range(ROUNDS * STEPS):
        for site in sites:
            local[site] = local[site] - LR * gradients(site, step)[key].double()
        while under_way and under_way[0][0] == step:
            land(under_way.pop(0)[1])
        if (step + 1) % STEPS == due % STEPS:
            delta = torch.stack([anchor - local[site] for site in sources]).mean(0)
            if overlap:
                under_way.append((step + overlap, delta))
            else:
                land(delta)
        history.append([local[site].clone() for site in sites])
    for _, delta in under_way:
        land(delta)
    return history, anchor


@lru_cache
def gradients(site: int, step: int) -> dict[tuple[Any, ...], Tensor]:
    """What `give_gradients` gives to the pieces of one of three sites."""
    model = SmallModel(place(3), site)
    give_gradients(model, site, step)
    return pieces(model, lambda p: p.grad)


@pytest.mark.parametrize(("fragments", "overlap"), SCHEDULES)
def test_schedule_equals_the_simulation(fragments: int, overlap: int) -> None:
    answers = pool().run(3, follow, fragments, overlap, "fp32")
    starts = [pieces(SmallModel(place(3), site)) for site in range(3)]
    for key in sorted({key for start in starts for key in start}, key=repr):
        history, anchor = simulate(key, starts, 3, fragments, overlap)
        sites = receivers(key, place(3), "global")
        for row, site in enumerate(sites):
            seen, ended, *_ = answers[site]
            for step, wanted in enumerate(history):
                error = (seen[step][key].double() - wanted[row]).abs().max()
                assert float(error) < 2e-6, (key, site, step)
            found = ended[key_of(key)].double().view(anchor.shape)
            assert float((found - anchor).abs().max()) < 2e-6, (key, site)


@pytest.mark.parametrize("codec", ["int8", "topk"])
@pytest.mark.parametrize(("fragments", "overlap"), SCHEDULES)
def test_bytes_and_bits(fragments: int, overlap: int, codec: str) -> None:
    answers = pool().run(3, follow, fragments, overlap, codec)
    for seen, ended, sent, predicted, agreements in answers:
        assert sent == predicted
        assert agreements == ROUNDS * fragments
        other = next(a for a in answers if a[1] is not ended)
        shared = ended.keys() & other[1].keys()
        assert shared and all(bits(ended[k]) == bits(other[1][k]) for k in shared)
        assert len(seen) == ROUNDS * STEPS
    if (fragments, overlap) == (1, 0):
        assert_same_bits([answer[0][-1] for answer in answers], place(3), "global")


def follow_on_link(site: int, num_sites: int, link: str) -> Any:
    if link:
        os.environ["FOMOE_LINK"] = f"{link};counted"
    try:
        seen, ended, *_ = follow(site, num_sites, 2, 1, "int8")
    finally:
        os.environ.pop("FOMOE_LINK", None)
    return seen[-1], ended


def test_the_result_does_not_depend_on_the_link() -> None:
    quick = pool().run(2, follow_on_link, "")
    slow = pool().run(2, follow_on_link, "1mbit,30ms")
    for (seen, ended), (seen_slow, ended_slow) in zip(quick, slow, strict=True):
        assert all(bits(v) == bits(seen_slow[k]) for k, v in seen.items())
        assert all(bits(v) == bits(ended_slow[k]) for k, v in ended.items())


def resume(site: int, num_sites: int, options: dict[str, Any]) -> Any:
    """Two rounds, a state, one more round; and the last round again from the state."""
    model, inner, sync = make(site, num_sites, **options)
    for step in range(2 * STEPS):
        train(model, inner, sync, site, step)
    early = ""
    if options["overlap"]:
        try:
            sync.state_dict()
        except RuntimeError as error:
            early = str(error)
    sync.finish()
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "sync": sync.state_dict()}, file)
    file.seek(0)
    stored = torch.load(file, weights_only=True)
    again = make(site, num_sites, **options)
    for m, i, s in ((model, inner, sync), again):
        if s is not sync:
            m.load_state_dict(stored["model"])
            s.load_state_dict(stored["sync"])
        for step in range(2 * STEPS, 3 * STEPS):
            train(m, i, s, site, step)
        s.finish()
    return early, pieces(model), pieces(again[0]), anchors(sync), anchors(again[2])


@pytest.mark.parametrize(
    "options",
    [
        {"fragments": 2, "overlap": 1, "codec": "int8", "rounding": "stochastic"},
        {"fragments": 1, "overlap": 0, "codec": "topk"},
        {"fragments": 2, "overlap": 0, "codec": "int4", "error_feedback": False},
    ],
)
def test_resuming_is_bit_exact(options: dict[str, Any]) -> None:
    for early, straight, resumed, anchor, anchor_again in pool().run(3, resume, options):
        assert ("call finish before state_dict" in early) == bool(options["overlap"])
        assert all(bits(v) == bits(resumed[k]) for k, v in straight.items())
        assert all(bits(v) == bits(anchor_again[k]) for k, v in anchor.items())


def nan_in_the_air(site: int, num_sites: int) -> list[str]:
    """Site 1's delta becomes NaN in the second round."""
    model, inner, sync = make(site, num_sites, 2, 1, codec="int8")
    messages = []
    try:
        for step in range(3 * STEPS):
            give_gradients(model, site, step)
            if site == 1 and step == STEPS:
                model.layers[1].experts.contract_weight.grad[0, 0, 0] = float("nan")
            inner.step()
            sync.after_step()
            if step % STEPS == STEPS - 1:
                sync.step()
    except MeetingError as error:
        messages.append(str(error))
    return [*messages, str(step)]


def test_a_nan_is_named_when_its_fragment_is_due() -> None:
    for message, step in pool().run(3, nan_in_the_air):
        expert = place(3).resident(1, 1)[0]
        wanted = f"site 1: the value of layers.1.experts.{expert}.contract_weight is NaN"
        assert message.startswith("nothing was sent or changed: ") and wanted in message
        assert step == str(2 * STEPS)  # fragment 1 leaves at the end of round 2, and is due one on


def test_step_out_of_turn_is_refused() -> None:
    model, inner, sync = make(0, 1, 2, 0)
    give_gradients(model, 0, 0)
    inner.step()
    sync.after_step()
    with pytest.raises(MeetingError, match="step is due every local_steps = 4 steps, after_step"):
        sync.step()
    with pytest.raises(ValueError, match="fragments must be at most the number of the model's bl"):
        make(0, 1, 3, 0)


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"fragments": 0}, ValueError, "fragments must be at least 1"),
        ({"fragments": 2}, ValueError, "local_steps must be given"),
        ({"overlap": 1}, ValueError, "local_steps must be given .*fragments = 1 and overlap = 1"),
        ({"overlap": 4, "local_steps": 4}, ValueError, "overlap must be less than local_steps = 4"),
        ({"fragments": 5, "local_steps": 4}, ValueError, r"fragments must be in \[1, local_steps"),
        (
            {"overlap": 1, "local_steps": 4, "optimizer": "ddp"},
            ValueError,
            "must be diloco or fedavg",
        ),
        ({"overlap_alpha": 1.0}, ValueError, r"overlap_alpha must be in \[0, 1\)"),
        ({"rounding": "up"}, ValueError, "rounding must be"),
        ({"error_feedback": 1}, TypeError, "error_feedback must be True or False"),
        ({"expert_mean": "all"}, ValueError, "expert_mean must be one of equal, tokens"),
        (
            {"expert_mean": "tokens", "optimizer": "ddp"},
            ValueError,
            "needs optimizer = diloco",
        ),
        ({"on_mismatch": "pray"}, ValueError, "on_mismatch must be one of stop, heal"),
        ({"moment_codecs": ("int8", "int8")}, ValueError, "moment_codecs: second must be one of"),
        ({"moment_codecs": ("topk", "fp32")}, ValueError, "moment_codecs: first must be one of"),
        ({"moment_codecs": ("fp32",)}, ValueError, "moment_codecs must be two codecs"),
        ({"in_flight": 0}, ValueError, "in_flight must be at least 1"),
    ],
)
def test_bad_options_are_refused(
    changes: dict[str, Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        OuterOptions(**changes)


def test_fragments_are_spread_over_a_round() -> None:
    assert wire.fragment_steps(1, 16) == [16]
    assert wire.fragment_steps(4, 16) == [4, 8, 12, 16]
    assert wire.fragment_steps(3, 16) == [5, 10, 16]
    assert [wire.fragment_of_block(block, 3) for block in range(7)] == [0, 1, 2, 0, 1, 2, 0]


# ---- overlap chosen by measured times ------------------------------------------------------------


def test_times_are_those_of_steps_and_exchanges_alone() -> None:
    times = OverlapTimes(OuterOptions(overlap="auto", local_steps=16))
    assert times.steps == 1 and times.told() == (0.0, 0.0, 0.0)
    now = [0.0]
    times.clock = lambda: now[0]

    def passes(seconds: float) -> None:
        now[0] += seconds

    for _ in range(3):  # rounds: what is between a round's end and its first step is not measured
        passes(100.0)
        times.step_ended()
        passes(50.0)  # a fragment lands
        times.step_begins()
        passes(2.0)
        times.step_ended()
        times.step_begins()
        times.not_a_step()
    assert times.told() == (0.0, 0.0, 0.0)  # no exchange yet
    times.exchanged(0, 0.5, 6.0)
    times.exchanged(1, 9.0, 5.0)
    assert times.told() == (0.5, 6.0, 2.0)  # the times of the slowest fragment
    times.exchanged(0, 0.5, 3.0)
    assert times.told() == (9.0, 5.0, 2.0)
    for announced, moved in [(0.25, 7.0), (40.0, 6.5), (0.25, 6.5), (0.75, 90.0)]:
        times.exchanged(0, announced, moved)
    assert times.told() == (0.5, 6.5, 2.0)  # the medians of the last five
    times.exchanged(0, 0.75, 8.0)
    assert times.told() == (0.75, 7.0, 2.0)


def test_the_overlap_is_chosen_by_the_site_that_needs_most_steps() -> None:
    times = OverlapTimes(OuterOptions(overlap="auto", local_steps=16))
    times.choose([(0.1, 4.0, 1.0), (0.0, 0.0, 0.0)])
    assert times.steps == 1 and not times.reason
    # The second site waits 7 s for the first to announce: that is no part of the exchange.
    times.choose([(0.1, 4.0, 1.0), (7.0, 4.0, 0.5)])
    assert times.steps == 12  # (0.1 + 4) / 0.5 = 8.2 steps, a quarter, and a step
    assert times.reason.startswith("overlap 12: the exchange takes 8.2 steps; more would only")
    given = OverlapTimes(OuterOptions(overlap=3, local_steps=16))
    given.choose([(0.1, 4.0, 1.0)])
    given.resume({"overlap": 7, "overlap_reason": "x"})
    assert given.steps == 3 and not given.reason


def follow_chosen(site: int, num_sites: int, fragments: int) -> Any:
    """The overlap after every step, with given times instead of measured ones."""
    model, inner, sync = make(site, num_sites, fragments, "auto", codec="int8")
    sync.overlap.told = lambda: (0.1 + site, 1.9, 1.0 if site == 0 else 1.5)
    chosen, predicted = [], 0
    for step in range(ROUNDS * STEPS):
        if step % STEPS == 0:
            predicted += sync.predicted_bytes()
        train(model, inner, sync, site, step)
        chosen.append(sync.overlap.steps)
    sync.finish()
    sync.verify()
    state = sync.state_dict()
    again = make(site, num_sites, fragments, "auto", codec="int8")[2]
    again.load_state_dict(state)
    fixed = make(site, num_sites, fragments, 1, codec="int8")[2]
    fixed.load_state_dict(state)
    kept = again.overlap.steps, fixed.overlap.steps
    return anchors(sync), chosen, sync.bytes_sent, predicted, kept, sync.overlap.reason


@pytest.mark.parametrize("fragments", [1, 2])
def test_all_sites_choose_alike_and_at_the_same_step(fragments: int) -> None:
    answers = pool().run(3, follow_chosen, fragments)
    first = STEPS // fragments  # the first fragment is sent after this step, and lands one later
    for ended, chosen, sent, predicted, kept, reason in answers:
        assert chosen == [1] * first + [3] * (ROUNDS * STEPS - first)
        assert sent == predicted
        assert kept == (3, 1)
        assert reason.startswith("overlap 3: the exchange takes 2.0 steps; more would only")
        other = next(a for a in answers if a[0] is not ended)
        shared = ended.keys() & other[0].keys()
        assert shared and all(bits(ended[k]) == bits(other[0][k]) for k in shared)


def count_checks(site: int, num_sites: int) -> list[int]:
    """The comparisons of hashes that have been waited for, after every step."""
    model, inner, sync = make(site, num_sites, 2, 1)
    counts = []
    for step in range(ROUNDS * STEPS):
        train(model, inner, sync, site, step)
        counts.append(sync.log.agreements)
    sync.finish()
    return [*counts, sync.log.agreements]


def test_a_fragment_waits_for_its_own_check_alone() -> None:
    """Fragments are sent after steps 2, 4, 6 .. in turn and land a step later: what is compared
    from step 3 on must be known at step 6, when that fragment is sent again, not at step 4."""
    for counts in pool().run(2, count_checks):
        assert counts == [0, 0, 0, 0, 0, 1, 1, 2, 2, 3, 3, 4, 6]


def measure(site: int, num_sites: int) -> tuple[int, str, float]:
    """With measured times: the sites choose some overlap of 1 .. 3."""
    model, inner, sync = make(site, num_sites, 1, "auto")
    for step in range(ROUNDS * STEPS):
        train(model, inner, sync, site, step)
    sync.finish()
    return sync.overlap.steps, sync.overlap.reason, min(sync.overlap.told())


def test_all_sites_choose_the_overlap_by_measured_times() -> None:
    answers = pool().run(3, measure)
    assert len({answer[:2] for answer in answers}) == 1
    steps, reason, _ = answers[0]
    assert 1 <= steps < STEPS and reason.startswith(f"overlap {steps}: the exchange takes ")
    assert all(least > 0 for *_, least in answers)
