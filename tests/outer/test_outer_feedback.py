"""Error feedback for lossy codecs; means weighted by tokens, and rescaled."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from outer_model import (
    EXPERTS,
    HIDDEN,
    LAYERS,
    SmallModel,
    bits,
    contributors,
    cyclic_placement,
    give_gradients,
    noise,
    pieces,
    random_placement,
)
from sites import pool
from torch import Tensor

from fomoe_ext.outer import OuterOptions, OuterSync
from fomoe_ext.placement import Placement


def place(num_sites: int, replication: int = 2) -> Placement:
    return cyclic_placement(num_sites, replication)


def drift(site: int, num_sites: int, codec: str, feedback: bool, rounds: int) -> Any:
    """Every site adds the same small amount to its parameters in every round.

    Returns how far a dense piece has moved, the sum of unsent errors, and the bytes of feedback.
    """
    placement = place(num_sites)
    model = SmallModel(placement, site)
    sync = OuterSync(
        model,
        placement,
        site,
        OuterOptions(optimizer="fedavg", codec=codec, error_feedback=feedback),
    )
    start = pieces(model)
    for _ in range(rounds):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter += step_of(name, parameter.shape)
        sync.step()
    moved = {key: value - start[key] for key, value in pieces(model).items()}
    waiting = sum(float(f.own.abs().sum()) for f in sync.state.feedback if f.own is not None)
    return moved["dense", "first"], waiting, sync.state_bytes()[2]


def step_of(name: str, shape: Any) -> Tensor:
    """The first value is a hundred times the others, which coarse codecs round to zero."""
    step = torch.full(shape, 1e-3)
    step.view(-1)[0] = 0.1
    return step


@pytest.mark.parametrize("codec", ["bf16", "int8", "int4", "int2", "topk"])
def test_error_feedback_recovers_lost_values(codec: str) -> None:
    rounds = 400 if codec == "topk" else 60
    exact = rounds * step_of("first", (HIDDEN, 3))
    for moved, waiting, stored in pool().run(2, drift, codec, True, rounds):
        # The lag is what the two errors hold; it does not grow with the rounds.
        assert float((moved - exact).abs().max()) < 0.35 * float(exact.max())
        assert float((moved - exact).sum().abs()) < 0.15 * float(exact.sum())
        assert stored > 0 and (waiting > 0 or codec == "bf16")
    if codec == "int4":
        for moved, waiting, stored in pool().run(2, drift, codec, False, rounds):
            small = moved.view(-1)[1:]
            assert float(small.abs().max()) < 0.01 * float(exact.min())  # lost for good
            assert waiting == stored == 0


def one_meeting(site: int, num_sites: int, codec: str) -> Any:
    placement = place(num_sites, num_sites)
    model = SmallModel(placement, site)
    sync = OuterSync(model, placement, site, OuterOptions(optimizer="fedavg", codec=codec))
    give_gradients(model, site, 0)
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    local = pieces(model)
    start = {
        p.key: sync.state.anchors[i][at].clone()
        for i, la in enumerate(sync.layout.layouts)
        for p, at in la.slices()
    }
    sync.step()
    return (
        local["dense", "first"],
        start["first"],
        pieces(model)["dense", "first"],
        [
            (f.own.clone(), f.shares.clone(), la.group.rank)
            for f, la in zip(sync.state.feedback, sync.layout.layouts, strict=True)
        ],
    )


def test_own_part_is_exact_and_nothing_is_forgotten() -> None:
    """The sum of all deltas = the applied mean times the number of sites + all stored errors."""
    answers = pool().run(3, one_meeting, "int4")
    deltas = sum(a[1].double() - a[0].double().view(-1) for a in answers)
    applied = 3 * (answers[0][1].double() - answers[0][2].double().view(-1))
    numel = answers[0][0].numel()
    own = sum(a[3][0][0][:numel].double() for a in answers)
    share = -(-answers[0][3][0][0].numel() // 3)
    sums = torch.cat([a[3][0][1].double() for a in answers])[:numel]
    assert float((deltas - applied - own - sums).abs().max()) < 1e-6
    for site, answer in enumerate(answers):
        error = answer[3][0][0]
        mine = error[site * share : (site + 1) * share]
        assert not bool(mine.any()) and bool(error.any())


def weigh(site: int, num_sites: int, mode: str, rescale: bool) -> Any:
    placement = place(num_sites)
    model = SmallModel(placement, site)
    sync = OuterSync(
        model, placement, site, OuterOptions(optimizer="fedavg", expert_mean=mode, rescale=rescale)
    )
    start, loads = pieces(model), torch.zeros(LAYERS, EXPERTS, dtype=torch.float64)
    for step in range(2):
        model(noise(("x", site, step), 3 + 5 * site, HIDDEN))
        for layer, module in enumerate(model.layers):
            loads[layer] += module.stats.load.double()
        give_gradients(model, site, step)
        torch.optim.SGD(model.parameters(), lr=0.1).step()
        sync.after_step()
    predicted, local = sync.predicted_bytes(), pieces(model)
    assert sync.step().bytes_sent == predicted
    again = sync.step()  # no tokens since: equal weights of nothing
    assert again.round == 2
    return start, local, pieces(model), loads


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("mode", ["equal", "tokens"])
def test_means_are_weighted_and_rescaled(mode: str, rescale: bool) -> None:
    answers = pool().run(3, weigh, mode, rescale)
    placement, unlike = place(3), 0
    for key in sorted({key for answer in answers for key in answer[0]}, key=repr):
        sites = contributors(key, placement)
        weights = torch.ones(len(sites), dtype=torch.float64)
        if mode == "tokens" and key[0] == "expert":
            weights = torch.stack([answers[s][3][key[1], key[2]] for s in sites])
            unlike += int(len(set(weights.tolist())) > 1)
        deltas = [answers[s][0][key].double() - answers[s][1][key].double() for s in sites]
        total = float(weights.sum()) or 1.0
        mean = sum(w * d for w, d in zip(weights, deltas, strict=True)) / total
        mean = mean * len(sites) ** 0.5 if rescale else mean
        wanted = answers[sites[0]][0][key].double() - mean
        for site in sites:
            assert float((answers[site][2][key].double() - wanted).abs().max()) < 2e-6, key
    assert unlike > 10 or mode == "equal"


def moved_feedback(site: int, num_sites: int) -> Any:
    """Error feedback before and after a reshuffle, by piece."""
    placements = [random_placement(num_sites, 2, epoch=epoch) for epoch in range(2)]
    model = SmallModel(placements[0], site)
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    sync = OuterSync(model, placements[0], site, OuterOptions(codec="int4"), inner_optimizer=inner)
    give_gradients(model, site, 0)
    inner.step()
    sync.step()

    def errors() -> dict[str, Tensor]:
        return {
            piece.key: feedback.own[at].clone()
            for layout, feedback in zip(sync.layout.layouts, sync.state.feedback, strict=True)
            if feedback.own is not None
            for piece, at in layout.slices()
        }

    before, residents = errors(), {p.key for la in sync.layout.layouts for p in la.pieces}
    arrived = sync.reshuffle(placements[1]).arrived
    return before, errors(), residents, arrived


def test_feedback_stays_with_its_piece_and_starts_anew_for_a_new_holder() -> None:
    kept = fresh = 0
    for before, after, residents, arrived in pool().run(3, moved_feedback):
        new = {f"layers.{layer}.experts.{expert}." for layer, expert in arrived}
        for key, error in after.items():
            if any(key.startswith(prefix) for prefix in new):
                assert not bool(error.any()) and key not in residents
                fresh += 1
            else:
                assert bits(error) == bits(before[key])
                kept += int(error.any())
    assert kept > 10 and fresh > 4
