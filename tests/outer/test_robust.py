"""`clip_delta`: deltas that are far too long are scaled down, non-finite ones left out."""

from __future__ import annotations

import math
from statistics import median
from typing import Any

import pytest
import torch
from outer_model import (
    SmallModel,
    assert_same_bits,
    contributors,
    cyclic_placement,
    give_gradients,
    pieces,
)
from sites import pool
from small_job import SMALL
from torch import Tensor

from fomoe_ext.outer import MeetingError, OuterSync
from fomoe_ext.outer.averaging import Averaging, treat
from fomoe_ext.outer.options import OuterOptions
from fomoe_ext.placement import Placement
from fomoe_ext.report.runs import job_config

Pieces = dict[Any, Tensor]
SITES = 3


def place(replication: int) -> Placement:
    return cyclic_placement(SITES, replication)


def spoil(model: SmallModel, inner: torch.optim.Optimizer, how: str) -> None:
    """Puts NaN or infinity into a site's model or optimizer state."""
    with torch.no_grad():
        if how == "dense":
            model.first[2, 1] = math.nan
        elif how == "expert":
            model.layers[1].experts.contract_weight[1, 0, 0] = math.inf
        else:
            inner.state[model.first]["exp_avg_sq"][1, 1] = math.inf
    if how != "moment":
        inner.state[model.layers[0].router.weight]["exp_avg"][0, 0] = math.nan


def meet(
    site: int,
    num_sites: int,
    replication: int,
    scope: str,
    options: dict[str, Any],
    bad: tuple[int, ...],
    how: str = "dense",
    length: tuple[float, ...] = (1.0, 1.0, 1.0),
    rounds: int = 1,
) -> dict[str, Any]:
    """Some rounds; in the last one the sites `bad` have non-finite values."""
    placement = place(replication)
    model = SmallModel(placement, site, scope, balance="bias")
    inner = torch.optim.AdamW(model.parameters(), lr=0.01)
    sync = OuterSync(model, placement, site, OuterOptions(**options), inner_optimizer=inner)
    for step in range(rounds):
        before = pieces(model)
        give_gradients(model, site, step)
        inner.param_groups[0]["lr"] = 0.01 * length[site]
        inner.step()
        for layer in model.layers:
            layer.router.selection_bias += 0.01 * site
        if step < rounds - 1:
            sync.step(tokens=10.0)
    if site in bad:
        spoil(model, inner, how)
    moments = {
        m: pieces(model, lambda p, m=m: inner.state[p][m]) for m in ("exp_avg", "exp_avg_sq")
    }
    local, momenta = pieces(model), [m.clone() for m in sync.state.momenta]
    anchors = [a.clone() for a in sync.state.anchors]
    predicted, error = sync.predicted_bytes(), ""
    try:
        report = sync.step(tokens=float(10 * (site + 1)))
        assert report.bytes_sent == predicted
        factors, left_out = report.treatment
    except MeetingError as caught:
        error, factors, left_out = str(caught), (), ()
    kept = {
        piece.key: (torch.equal(sync.state.anchors[i][at], anchors[i][at]), site)
        for i, la in enumerate(sync.layout.layouts)
        for piece, at in la.slices()
        if piece.expert is not None
        and (not momenta or torch.equal(sync.state.momenta[i][at], momenta[i][at]))
    }
    state = [v for s in inner.state.values() for v in s.values() if v.dim()]
    return {
        "before": before,
        "local": local,
        "after": pieces(model),
        "moments": moments,
        "moments after": {m: pieces(model, lambda p, m=m: inner.state[p][m]) for m in moments},
        "biases": [layer.router.selection_bias.clone() for layer in model.layers],
        "factors": factors,
        "left out": left_out,
        "error": error,
        "kept": kept,
        "finite": all(bool(v.isfinite().all()) for v in state),
        "agreements": sync.agreements,
    }


def delta(answer: dict[str, Any], key: Any) -> Tensor:
    return answer["before"][key].double() - answer["local"][key].double()


def all_keys(answers: list[dict[str, Any]]) -> list[Any]:
    return sorted({key for answer in answers for key in answer["after"]}, key=repr)


def wanted_mean(answers: list[dict[str, Any]], key: Any, sites: list[int]) -> Tensor:
    """The mean of scaled deltas by the definition, in fp64."""
    scaled = [answers[s]["factors"][s] * delta(answers[s], key) for s in sites]
    return sum(scaled) / len(sites)


@pytest.mark.parametrize("scope", ["global", "resident"])
@pytest.mark.parametrize("replication", [1, 2])
def test_long_deltas_are_scaled_down(replication: int, scope: str) -> None:
    """Norms, factors and means are compared with fp64 ones, computed from the sites' values."""
    options = {"optimizer": "fedavg", "clip_delta": 1.5}
    answers = pool().run(SITES, meet, replication, scope, options, (), "dense", (1.0, 1.3, 50.0))
    placement = place(replication)
    norms = [
        math.sqrt(
            sum(
                float(delta(answer, key).square().sum())
                for key in answer["after"]
                if key[0] == "dense"
                or (key[0] == "router" and site in placement.owners(key[1], key[2]))
                if key[0] == "dense" or scope == "global"
            )
        )
        for site, answer in enumerate(answers)
    ]
    limit = 1.5 * median(norms)
    assert norms[2] > 10 * limit
    for answer in answers:
        assert answer["left out"] == () and answer["agreements"] == 1
        assert answer["factors"][:2] == (1.0, 1.0)
        assert answer["factors"][2] == pytest.approx(limit / norms[2], rel=1e-5)
    moved = 0
    for key in all_keys(answers):
        sites = list(contributors(key, placement))
        mean = wanted_mean(answers, key, sites)
        for site in sites:
            wanted = answers[site]["before"][key].double() - mean
            assert float((answers[site]["after"][key].double() - wanted).abs().max()) < 2e-6, key
        moved += int(float(mean.abs().max()) > 1e-3)
    assert moved > 10
    assert_same_bits([answer["after"] for answer in answers], placement, scope)


@pytest.mark.parametrize("how", ["dense", "expert"])
@pytest.mark.parametrize("scope", ["global", "resident"])
@pytest.mark.parametrize("replication", [1, 2])
@pytest.mark.parametrize("staged", [False, True])
def test_a_site_with_nan_is_left_out(replication: int, scope: str, how: str, staged: bool) -> None:
    """The site gets the others' result. An expert that it alone holds is unchanged, also in the
    momentum of the outer optimizer."""
    bad = 1
    options = {"outer_lr": 1.0, "outer_momentum": 0.5, "clip_delta": 100.0, "staged": staged}
    answers = pool().run(SITES, meet, replication, scope, options, (bad,), how, (1.0, 1.0, 1.0), 2)
    placement, alone = place(replication), 0
    for site, answer in enumerate(answers):
        assert answer["error"] == "" and answer["left out"] == (bad,)
        assert answer["factors"] == (1.0, 0.0, 1.0) and answer["agreements"] == 2
        assert answer["finite"] and all(v.isfinite().all() for v in answer["after"].values())
        for layer, bias in enumerate(answer["biases"]):
            for expert, value in enumerate(bias):
                owners = placement.owners(layer, expert)
                of = range(SITES) if scope == "global" else owners
                if site in of:
                    left = [s for s in of if s != bad] or list(of)
                    assert float(value) == pytest.approx(_bias(left, of), abs=1e-6)
    for key in all_keys(answers):
        sites = [s for s in contributors(key, placement) if s != bad]
        if sites:
            continue
        owners = placement.owners(key[1], key[2])
        assert owners == (bad,)
        assert torch.equal(answers[bad]["after"][key], answers[bad]["before"][key])
        alone += 1
    if replication == 1:
        assert alone > 10
    kept = [key for key, (same, _) in answers[bad]["kept"].items() if same]
    assert bool(kept) == (replication == 1)
    assert_same_bits([answer["after"] for answer in answers], placement, scope)


@pytest.mark.parametrize("scope", ["global", "resident"])
def test_experts_whose_holders_are_all_left_out(scope: str) -> None:
    """These experts and their outer momentum stay as they were; biases are averaged."""
    options = {"outer_lr": 1.0, "outer_momentum": 0.5, "clip_delta": 100.0}
    answers = pool().run(SITES, meet, 2, scope, options, (0, 1), "expert", (1.0, 1.0, 1.0), 2)
    placement, lost = place(2), 0
    for answer in answers:
        assert answer["left out"] == (0, 1) and answer["agreements"] == 2 and answer["finite"]
    for key in all_keys(answers):
        if key[0] == "expert" and placement.owners(key[1], key[2]) == (0, 1):
            lost += 1
            for site in (0, 1):
                assert torch.equal(answers[site]["after"][key], answers[site]["before"][key])
    assert lost > 4 and any(same for same, _ in answers[0]["kept"].values())
    for site, answer in enumerate(answers):
        for layer, bias in enumerate(answer["biases"]):
            for expert, value in enumerate(bias):
                owners = placement.owners(layer, expert)
                of = list(range(SITES) if scope == "global" else owners)
                if site in of:
                    left = [s for s in of if s == 2] or of
                    assert float(value) == pytest.approx(_bias(left, of), abs=1e-6)
    assert_same_bits([answer["after"] for answer in answers], placement, scope)


def _bias(left: list[int], of: Any) -> float:
    """The bias if site s moves it by 0.01 s in two rounds: a mean of all, then of `left`."""
    first = sum(0.01 * s for s in of) / len(list(of))
    return first + sum(0.01 * s for s in left) / len(left)


@pytest.mark.parametrize("codec", ["fp32", "int4"])
@pytest.mark.parametrize("replication", [1, 2])
def test_means_of_those_that_are_left(replication: int, codec: str) -> None:
    options = {"optimizer": "fedavg", "clip_delta": 100.0, "codec": codec}
    answers = pool().run(SITES, meet, replication, "global", options, (2,))
    placement = place(replication)
    tolerance = 2e-6 if codec == "fp32" else 4e-3
    moved = 0
    for key in all_keys(answers):
        sites = [s for s in contributors(key, placement) if s != 2]
        if not sites:
            continue
        mean = wanted_mean(answers, key, sites)
        start = answers[sites[0]]["before"][key].double()
        for answer in answers:
            if key in answer["after"]:
                got = answer["after"][key].double()
                assert float((got - (start - mean)).abs().max()) < tolerance, key
        moved += int(float(mean.abs().max()) > 1e-3)
    assert moved > 10


@pytest.mark.parametrize("replication", [1, 2, 3])
@pytest.mark.parametrize("how", ["dense", "moment"])
def test_moments_of_a_site_that_is_left_out(how: str, replication: int) -> None:
    """Moments that were exchanged become the others' mean; other non-finite state is reset."""
    options = {"optimizer": "local-adamw", "clip_delta": 100.0}
    answers = pool().run(SITES, meet, replication, "global", options, (0,), how)
    placement = place(replication)
    for answer in answers:
        assert answer["left out"] == (0,) and answer["finite"]
    for moment in ("exp_avg", "exp_avg_sq"):
        for key in all_keys(answers):
            sites = [s for s in contributors(key, placement) if s != 0]
            for site in contributors(key, placement) if sites else ():
                want = sum(answers[s]["moments"][moment][key].double() for s in sites) / len(sites)
                got = answers[site]["moments after"][moment][key].double()
                assert float((got - want).abs().max()) < 1e-6, (moment, key, site)


def test_without_the_option_nan_is_refused() -> None:
    for answer in pool().run(SITES, meet, 2, "global", {"optimizer": "fedavg"}, (1,)):
        assert "site 1: the value of first is NaN or infinite" in answer["error"]


@pytest.mark.parametrize("staged", [False, True])
def test_a_meeting_of_nothing_but_nan_is_refused(staged: bool) -> None:
    options = {"optimizer": "fedavg", "clip_delta": 2.0, "staged": staged}
    for answer in pool().run(SITES, meet, 2, "global", options, (0, 1, 2)):
        assert "nothing was changed: the values of every site" in answer["error"]
        for key, value in answer["after"].items():
            assert torch.equal(value.nan_to_num(), answer["local"][key].nan_to_num())


def run_job(site: int, num_sites: int, arguments: list[str]) -> dict[str, Any]:
    """A job in which site 1 has NaN from the first step of round 2 on."""
    from fomoe_ext.data.sequences import open_data
    from fomoe_ext.launch.world import StopRequest, World
    from fomoe_ext.report.report import markdown
    from fomoe_ext.train.job_report import job_report, model_hash
    from fomoe_ext.train.site import TrainingSite
    from fomoe_ext.train.trainer import Trainer
    from fomoe_ext.train.validation import validate

    config = job_config(arguments)
    files = config.data
    data = open_data(files.data, config.model.seq_len, cache_dir=files.cache_dir)
    job = TrainingSite(config, World(site, num_sites), data, torch.device("cpu"), None)
    local_step, meet, taken = job.steps.step, job.meetings.meet, []

    def step() -> Tensor:
        result = local_step()
        if site == 1 and job.round == 1 and job.steps_in_round == 1:
            with torch.no_grad():
                next(job.model.parameters())[:] = math.nan
        return result

    def met() -> float:
        taken.append(job.steps_in_round)
        return meet()

    job.steps.step, job.meetings.meet = step, met  # type: ignore[method-assign]
    Trainer(job, StopRequest(), None).train()
    job.finish()
    validation = validate(job, 256)
    report = job_report(job, validation)
    return {
        "taken": taken,
        "position": job.batches.position,
        "report": report,
        "markdown": markdown(report),
        "hash": model_hash(job),
        "sent": (job.bytes_sent, job.tally.planned_bytes),
    }


@pytest.mark.parametrize("replication", [1, 2])
@pytest.mark.parametrize("scope", ["global", "resident"])
def test_a_job_outlives_nan_at_one_site(text, tmp_path, replication, scope) -> None:
    """Its router refuses NaN, so the site takes no more steps in that round. One meeting leaves it
    out, then it trains on like the others, and the report says so."""
    from fomoe_ext.data.sequences import open_data

    open_data([str(text / "*.py")], 32, cache_dir=text / "cache")  # encoded once, for all sites
    arguments = [
        *SMALL,
        *("--sites", "3", "--num-experts", "9", "--replication", str(replication)),
        *("--router-scope", scope, "--clip-delta", "1000", "--codec", "int8"),
        *("--run-dir", str(tmp_path / "run"), "--data", str(text / "*.py")),
        *("--cache-dir", str(text / "cache")),
    ]
    answers = pool().run(SITES, run_job, arguments)
    assert [answer["taken"] for answer in answers] == [[3] * 4, [3, 1, 3, 3], [3] * 4]
    assert {answer["position"] for answer in answers} == {4 * 3 * SITES * 2}
    assert len({answer["hash"] for answer in answers}) == 1
    for answer in answers:
        report = answer["report"]
        assert [site["left_out"] for site in report["sites"]] == [0, 1, 0]
        assert [site["clipped"] for site in report["sites"]] == [0, 0, 0]
        assert report["run"]["agreements"] == 4
        assert math.isfinite(report["validation"]["loss"])
        assert "| site 1 | 0 | - | 1 |" in answer["markdown"]
        assert answer["sent"][0] == answer["sent"][1]


def test_factors() -> None:
    nan, inf = math.nan, math.inf
    assert treat([1.0, 2.0, 8.0], 2.0) == ((1.0, 1.0, 0.5), ())
    assert treat([1.0, 3.0, 8.0, 8.0], 1.0)[0] == (1.0, 1.0, 5.5 / 8, 5.5 / 8)
    assert treat([1.0, nan, 4.0, inf], 1.0) == ((1.0, 0.0, 2.5 / 4, 0.0), (1, 3))
    assert treat([0.0, 0.0, 5.0], 3.0) == ((1.0, 1.0, 1.0), ())  # no norm to compare with
    assert treat([nan, nan], 3.0) == ((0.0, 0.0), (0, 1))


def test_weights_of_clipped_and_left_out_members() -> None:
    """Factors scale deltas, not weights."""
    from fomoe_ext.outer.layout import Piece

    piece = Piece("e", torch.empty(1), None, (0, 1, 2), (0, 1, 2), (0, 4))
    treatment = treat([1.0, math.nan, 4.0], 1.0)
    averaging = Averaging({(0, 4): [3.0, 5.0, 1.0]}, False, None, treatment)
    assert averaging.members(piece) == (0, 2)
    assert [averaging.weight(piece, s) for s in range(3)] == [3.0, 0.0, 2.5 / 4]
    assert averaging.divisor(piece) == 4.0
    plain = Averaging(treatment=treatment, rescale=True)
    assert [plain.weight(piece, s) for s in range(3)] == [1.0, 0.0, 2.5 / 4]
    assert plain.divisor(piece) == pytest.approx(2 / math.sqrt(2))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"clip_delta": 0.5}, ValueError, "clip_delta must be 0 or at least 1, got 0.5"),
        ({"clip_delta": math.nan}, ValueError, "clip_delta must be finite"),
        ({"clip_delta": "2"}, TypeError, "clip_delta must be a number, got '2'"),
        ({"clip_delta": 2.0, "optimizer": "ddp"}, ValueError, "clip_delta needs fragments = 1"),
        ({"clip_delta": 2.0, "overlap": 1, "local_steps": 4}, ValueError, "overlap = 0"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        OuterOptions(**options)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--clip-delta 2 --fragments 2", "outer.clip_delta needs outer.fragments = 1"),
        ("--clip-delta 0.2", "outer.clip_delta must be 0 or at least 1, got 0.2"),
    ],
)
def test_bad_flags_are_named(flags: str, message: str, capsys: Any) -> None:
    with pytest.raises((ValueError, SystemExit)) as caught:
        job_config(flags.split())
    box = capsys.readouterr().err.translate({ord("\u2502"): " "})
    assert message in " ".join((str(caught.value) + box).split())
