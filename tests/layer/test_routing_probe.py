"""The stability of routing: its figures, and a job that measures them."""

from __future__ import annotations

import math

import pytest
import torch
from small_job import finish, train
from small_run import tiny_config

from fomoe_ext import MoELayer
from fomoe_ext.launch.messages import decode, encode
from fomoe_ext.layer import routing_probe
from fomoe_ext.layer.routing_probe import (
    RoutingProbe,
    between,
    figures,
    load_figures,
    overlap,
    pack,
    routed,
    unpack,
)
from fomoe_ext.model.language import LanguageModel
from fomoe_ext.placement import Placement
from fomoe_ext.report.metrics import read_metrics


def choice(*rows: list[int]) -> torch.Tensor:
    return torch.tensor([rows], dtype=torch.int32)


def test_overlap_counts_common_choices():
    one, other = choice([0, 1], [2, 3], [4, 5]), choice([1, 0], [2, 9], [6, 7])
    assert overlap(one, one) == 1.0
    assert overlap(one, other) == overlap(other, one) == pytest.approx((2 + 1 + 0) / 6)
    assert between([one]) is None
    assert between([one, one, other]) == pytest.approx((1 + 0.5 + 0.5) / 3)
    with pytest.raises(ValueError, match="one shape"):
        overlap(one, choice([0, 1]))


def test_load_figures():
    even, odd = choice([0, 1], [2, 3]), choice([0, 0], [0, 1])
    assert load_figures([even], 4) == (0.0, 0)
    # Loads 3, 1, 0, 0: mean 1, deviations 2, 0, -1, -1.
    assert load_figures([odd], 4) == (pytest.approx(math.sqrt(6 / 4)), 2)
    assert load_figures([odd, even], 4) == (pytest.approx(math.sqrt(6 / 4) / 2), 0)


def test_the_probe_sees_what_the_layers_choose():
    """The probe's choices agree with the layer's own statistics, and probing changes no state."""
    model = LanguageModel(tiny_config(), seed=3)
    tokens = torch.randint(256, (3, 24), generator=torch.Generator().manual_seed(1))
    layers = model.moe_layers()
    before = [layer.load_since_update.clone() for layer in layers]
    found = routed(model, layers, tokens)
    assert found.experts.shape == (2, 72, 2) and model.training
    assert [layer.stats for layer in layers] == [None, None]
    assert all(map(torch.equal, before, [layer.load_since_update for layer in layers]))
    model(tokens)
    for layer, experts in zip(layers, found.experts, strict=True):
        assert torch.equal(layer.stats.load, torch.bincount(experts.flatten(), minlength=8))
    expected = sum(float(layer.stats.router_entropy) for layer in layers) / 2
    assert found.entropy == pytest.approx(expected, abs=1e-5)


def test_only_resident_experts_are_chosen_with_router_scope_resident():
    placement = Placement.cyclic(num_sites=4, num_experts=8, num_layers=2, replication=2)
    model = LanguageModel(tiny_config(router_scope="resident"), placement, 1, seed=3)
    tokens = torch.randint(256, (2, 24), generator=torch.Generator().manual_seed(1))
    found = routed(model, model.moe_layers(), tokens)
    for layer, experts in enumerate(found.experts):
        assert set(experts.flatten().tolist()) <= set(placement.resident(layer, 1))


def test_figures_of_rounds():
    torch.manual_seed(0)
    layer = MoELayer(16, 8, 8, 2)
    probe = RoutingProbe(layer, [layer], torch.randn(5, 16))
    probe.before_meeting()
    first = probe.after_meeting()
    assert first[2] is None and torch.equal(first[0].experts, first[1].experts)
    probe.before_meeting()
    with torch.no_grad():
        layer.router.weight.mul_(-1)  # turns the order of the experts around
    second = probe.after_meeting()
    assert second[2] == overlap(first[1].experts, second[1].experts) < 0.5
    told = figures([unpack(decode(encode(pack(f)), "site 0")) for f in (first, second)], 8)
    assert told["between_rounds"] == second[2]
    assert told["between_sites"] == 1.0  # both were asked before the change
    both = [first[1].experts, second[1].experts]
    assert (told["load_variation"], told["dead_experts"]) == load_figures(both, 8)


def test_a_job_measures_and_trains_the_same(flags, tmp_path):
    reports = {}
    for tokens in ("0", "200"):
        run = tmp_path / tokens
        result = train(*flags, "--run-dir", str(run), "--probe-tokens", tokens)
        reports[tokens] = finish(run, result)
    plain, probed = reports["0"], reports["200"]
    assert plain["run"]["model_hash"] == probed["run"]["model_hash"]
    assert plain["routing"] is None
    lines = [r for r in read_metrics(run / "metrics.jsonl") if r["kind"] == "routing"]
    rounds = probed["run"]["rounds"]
    assert [line["round"] for line in lines] == list(range(1, rounds + 1))
    assert lines[0]["between_rounds"] is None
    for line in lines:
        assert 0 < line["between_sites"] <= 1 and 0 < line["entropy"] <= math.log(8)
    assert {key: lines[-1][key] for key in probed["routing"]} == probed["routing"]
    assert "same choices as at the meeting before" in (run / "report.md").read_text()
    assert "same choices" not in (tmp_path / "0" / "report.md").read_text()
    assert [s["bytes_sent"] for s in plain["sites"]] == [s["bytes_sent"] for s in probed["sites"]]


def test_the_module_names_what_the_job_reports():
    for name in figures([(c := routing_probe.Choices(choice([0, 1]), 0.0), c, None)], 2):
        assert f"{name}:" in str(routing_probe.__doc__)
