"""OuterSync: resuming, bad arguments, disagreement between sites, and a lost site."""

from __future__ import annotations

import copy
import io
import subprocess
import sys
import tempfile
from typing import Any

import pytest
import torch
from new_process import environment
from outer_model import (
    EXPERTS,
    HIDDEN,
    LAYERS,
    SmallModel,
    bits,
    cyclic_placement,
    give_gradients,
    pieces,
    random_placement,
)
from sites import pool
from torch import nn

from fomoe_ext.outer import MeetingError, OuterOptions, OuterSync, SiteGroups
from fomoe_ext.outer.layout import check_model
from fomoe_ext.placement import Placement

# ----------------------------------------------------------------------------------------- resuming


def make(
    placement: Placement, site: int, optimizer: str, scope: str = "global"
) -> tuple[SmallModel, torch.optim.Optimizer, OuterSync]:
    model = SmallModel(placement, site, scope)
    inner = torch.optim.AdamW(model.parameters(), lr=0.05)
    sync = OuterSync(
        model, placement, site, OuterOptions(optimizer=optimizer), inner_optimizer=inner
    )
    return model, inner, sync


def one_round(
    model: nn.Module, inner: torch.optim.Optimizer, sync: OuterSync, site: int, index: int
) -> None:
    for step in range(2):
        give_gradients(model, site, 2 * index + step)
        if sync.layout.site.rule.name == "ddp":
            sync.reduce_gradients()
        inner.step()
    sync.step()


def resume(site: int, num_sites: int, optimizer: str, scope: str) -> tuple[Any, Any, Any, Any]:
    """Three rounds and a reshuffle without a break, and the third again from a stored state."""
    placements = [random_placement(num_sites, 2, epoch=epoch) for epoch in range(2)]
    model, inner, sync = make(placements[0], site, optimizer, scope)
    one_round(model, inner, sync, site, 0)
    sync.reshuffle(placements[1], warmup_steps=8)
    one_round(model, inner, sync, site, 1)
    file = io.BytesIO()
    state = {"model": model.state_dict(), "inner": inner.state_dict(), "sync": sync.state_dict()}
    torch.save(state, file)
    sent = sync.bytes_sent
    one_round(model, inner, sync, site, 2)

    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    again = make(Placement.from_dict(loaded["sync"]["placement"]), site, optimizer, scope)
    again[0].load_state_dict(loaded["model"])
    again[1].load_state_dict(loaded["inner"])
    again[2].load_state_dict(loaded["sync"])
    assert again[2].round == 2 and again[2].bytes_sent == sent
    one_round(*again, site, 2)
    assert again[2].bytes_sent == sync.bytes_sent
    assert sync.warmup.progress and again[2].warmup.progress == sync.warmup.progress
    return pieces(model), pieces(again[0]), sync.state_dict(), again[2].state_dict()


@pytest.mark.parametrize("optimizer", ["diloco", "fedavg", "local-adamw", "ddp"])
def test_resuming_is_bit_exact(optimizer: str) -> None:
    scope = "resident" if optimizer == "fedavg" else "global"
    for straight, resumed, state, state_again in pool().run(3, resume, optimizer, scope):
        for key, value in straight.items():
            assert bits(value) == bits(resumed[key]), key
        for what in ("anchor", "momentum"):
            assert state[what].keys() == state_again[what].keys()
            for name, value in state[what].items():
                assert bits(value) == bits(state_again[what][name]), (what, name)
        assert bool(state["momentum"]) == (optimizer == "diloco")
        assert bool(state["anchor"]) == (optimizer != "ddp")


def test_state_of_another_job_is_refused() -> None:
    placement = cyclic_placement(1, 1)
    model, _, sync = make(placement, 0, "diloco")
    good = copy.deepcopy(sync.state_dict())
    without = OuterSync(model, placement, 0, OuterOptions(outer_momentum=0.0))
    fedavg = OuterSync(model, placement, 0, OuterOptions(optimizer="fedavg"))
    elsewhere = Placement.cyclic(
        num_sites=1, num_experts=EXPERTS, num_layers=LAYERS + 1, replication=1
    ).to_dict()
    small = good | {"anchor": {"0": torch.zeros(3)}}
    for target, state, message in (
        (sync, {}, "state must be as OuterSync.state_dict makes it"),
        (sync, good | {"warmup": 3}, "state must be as"),
        (sync, good | {"placement": elsewhere}, "another placement"),
        (sync, small, r"outer anchor of the sizes \{'0': \(3,\)\}"),
        (fedavg, good, "optimizer 'diloco', this is 'fedavg'"),
        (without, good, "outer momentum of the sizes"),
    ):
        with pytest.raises(ValueError, match=message):
            target.load_state_dict(state)
    sync.load_state_dict(good)


def test_anchor_undoes_local_steps() -> None:
    model, inner, sync = make(
        cyclic_placement(1, 1),
        0,
        "diloco",
    )
    one_round(model, inner, sync, 0, 0)
    agreed = pieces(model)
    give_gradients(model, 0, 9)
    inner.step()
    assert bits(pieces(model)["dense", "first"]) != bits(agreed["dense", "first"])
    sync.copy_anchor_to_model()
    assert all(bits(value) == bits(agreed[key]) for key, value in pieces(model).items())


def test_bf16_parameters_without_learning_stay(site: int = 0) -> None:
    """The anchor is fp32: without a local step there is no delta, whatever bf16 rounded."""
    placement = cyclic_placement(1, 1)
    model = SmallModel(placement, 0).bfloat16()
    sync = OuterSync(model, placement, 0, OuterOptions(outer_lr=0.3))
    give_gradients(model, 0, 0)
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    sync.step()
    sync.state.momenta[0].zero_()
    anchor = sync.state.anchors[0].clone()
    assert not torch.equal(anchor, anchor.bfloat16().float())
    sync.step()
    assert bits(sync.state.anchors[0]) == bits(anchor)


# ------------------------------------------------------------------------------------ bad arguments

SINGLE = cyclic_placement(1, 1)
ARGUMENTS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"optimizer": "adam"}, ValueError, "optimizer must be one of diloco, fedavg, .*'adam'"),
    ({"codec": "zip"}, ValueError, "codec must be one of fp32, bf16, int8, .*, got 'zip'"),
    ({"router_mean": "some"}, ValueError, "router_mean must be one of holders, all, got 'some'"),
    ({"outer_lr": 0.0}, ValueError, "outer_lr must be > 0"),
    ({"outer_lr": float("nan")}, ValueError, "outer_lr must be finite"),
    ({"outer_lr": "1"}, TypeError, "outer_lr must be a number"),
    ({"outer_momentum": 1.0}, ValueError, r"outer_momentum must be in \[0, 1\)"),
    ({"outer_momentum": -0.1}, ValueError, "outer_momentum must be finite and at least 0"),
    ({"bucket_bytes": 3}, ValueError, "bucket_bytes must be 0 or at least 4"),
    ({"moment_periods": (1, 0)}, ValueError, "moment_periods: second must be at least 1"),
    ({"moment_periods": (1,)}, ValueError, "moment_periods must be two"),
    ({"moment_periods": 3}, TypeError, "moment_periods must be two numbers of rounds, got 3"),
    ({"site": "0"}, TypeError, "site must be an int, got '0'"),
    ({"placement": 1, "site": SINGLE}, TypeError, "placement must be a Placement, got int"),
    ({"timeout_s": -1.0}, ValueError, "timeout_s must be > 0"),
    ({"site": 1}, ValueError, r"site must be in \[0, 1\), got 1"),
    ({"optimizer": "local-adamw"}, ValueError, "needs inner_optimizer to be torch.optim.AdamW"),
    (
        {
            "placement": Placement.cyclic(
                num_sites=1, num_experts=EXPERTS, num_layers=LAYERS + 1, replication=1
            )
        },
        ValueError,
        f"as many layers as the model has MoE layers, {LAYERS}, got {LAYERS + 1}",
    ),
    (
        {
            "placement": Placement.cyclic(
                num_sites=1, num_experts=EXPERTS + 1, num_layers=LAYERS, replication=1
            )
        },
        ValueError,
        f"must have the {EXPERTS} experts of layers.0, got {EXPERTS + 1}",
    ),
]


@pytest.mark.parametrize(("changes", "kind", "message"), ARGUMENTS)
def test_bad_arguments_are_refused(
    changes: dict[str, Any], kind: type[Exception], message: str
) -> None:
    arguments = {"placement": SINGLE, "site": 0} | changes
    with pytest.raises(kind, match=message):
        OuterSync(
            SmallModel(SINGLE, 0),
            arguments.pop("placement"),
            arguments.pop("site"),
            OuterOptions(**arguments),
        )


def test_bad_models_are_refused() -> None:
    half = cyclic_placement(2, 1)
    with pytest.raises(ValueError, match=r"layers\.0 must hold the placement's experts of site 0"):
        OuterSync(SmallModel(half, 0), SINGLE, 0)
    model = SmallModel(SINGLE, 0)
    model.first = nn.Parameter(torch.zeros(3, HIDDEN).t())
    with pytest.raises(ValueError, match="parameter first must be a contiguous float tensor"):
        OuterSync(model, SINGLE, 0)
    model = SmallModel(SINGLE, 0)
    with pytest.raises(TypeError, match="model must be a Module, got NoneType"):
        OuterSync(None, SINGLE, 0)
    with pytest.raises(TypeError, match="groups must be a SiteGroups, got int"):
        OuterSync(model, SINGLE, 0, groups=1)
    groups = SiteGroups(1, 0)
    amsgrad = torch.optim.AdamW(model.parameters(), amsgrad=True)
    with pytest.raises(ValueError, match="amsgrad"):
        OuterSync(model, SINGLE, 0, OuterOptions(optimizer="local-adamw"), inner_optimizer=amsgrad)
    with pytest.raises(ValueError, match="groups must be of site 0 of 2"):
        OuterSync(model, half, 0, groups=groups)
    with pytest.raises(RuntimeError, match="must be initialised"):
        OuterSync(SmallModel(half, 0), half, 0)


def test_methods_refuse_what_does_not_fit() -> None:
    model = SmallModel(SINGLE, 0)
    sync = OuterSync(model, SINGLE, 0)
    with pytest.raises(RuntimeError, match="reduce_gradients is for optimizer 'ddp'"):
        sync.reduce_gradients()
    with pytest.raises(ValueError, match="reshuffle needs the inner_optimizer"):
        sync.reshuffle(SINGLE)
    for norm in (0.0, float("nan")):
        with pytest.raises(ValueError, match="max_norm must be"):
            sync.clip_grad_norm_(norm)
    sync = OuterSync(model, SINGLE, 0, inner_optimizer=torch.optim.SGD(model.parameters(), lr=1))
    with pytest.raises(ValueError, match="warmup_steps must be at least 0, got -1"):
        sync.reshuffle(SINGLE, warmup_steps=-1)
    with pytest.raises(ValueError, match="new must have the same"):
        sync.reshuffle(
            Placement.cyclic(num_sites=1, num_experts=EXPERTS, num_layers=LAYERS + 1, replication=1)
        )
    model.layers[1].experts.contract_weight.requires_grad_(False)
    with pytest.raises(ValueError, match=r"frozen experts of layers\.1"):
        sync.reshuffle(SINGLE)


# ------------------------------------------------------------------- what the sites tell each other


def refused(call: Any, *arguments: Any, **options: Any) -> str:
    """The message of the MeetingError (or other error) that a call raises."""
    try:
        call(*arguments, **options)
    except (MeetingError, ValueError) as error:
        return str(error)
    return "nothing was raised"


def disagree(site: int, num_sites: int) -> list[str]:
    placement = cyclic_placement(num_sites, 2)
    model = SmallModel(placement, site)
    messages = [
        refused(OuterSync, model, placement, site, OuterOptions(codec=("fp32", "bf16")[site == 2])),
        refused(OuterSync, model, placement, site, OuterOptions(outer_lr=0.5 + (site == 1))),
        refused(
            OuterSync,
            model,
            placement,
            site,
            OuterOptions(optimizer="local-adamw" if site == 1 else "ddp"),
        ),
    ]
    with torch.no_grad():
        model.layers[1].experts.contract_weight[0, 0, 0] += float(site == 1)
    messages.append(refused(OuterSync, model, placement, site))
    return messages


def test_sites_that_disagree_are_told() -> None:
    answers = pool().run(3, disagree)
    for site, messages in enumerate(answers):
        assert "all sites must have the same codec" in messages[0]
        assert "all sites must have the same outer_lr" in messages[1]
        own = "optimizer 'local-adamw' needs inner_optimizer"
        own = own if site == 1 else f"site 1: {own}"
        assert messages[2].startswith(own)
        assert "must hold the same bits of what they share, but site" in messages[3]


def bad_values(site: int, num_sites: int) -> list[Any]:
    placement = cyclic_placement(num_sites, 1)
    result: list[Any] = []
    model, inner, sync = make(placement, site, "local-adamw")
    result.append(refused(sync.step))  # no moments yet
    give_gradients(model, site, 0)
    inner.step()
    before = pieces(model)
    row = model.layers[1].experts.expand_weight.detach()[1]
    for value in (float("nan"), float("inf"), float("-inf")):
        kept = row.clone()
        if site == 1:
            row[3, 2] = value
        result.append(refused(sync.step))
        row.copy_(kept)
    moment = inner.state[model.first]["exp_avg_sq"]
    kept = moment.clone()
    if site == 0:
        moment[0, 0] = float("nan")
    result.append(refused(sync.step))
    moment.copy_(kept)
    unchanged = all(bits(value) == bits(before[key]) for key, value in pieces(model).items())
    result.append((unchanged, sync.round))
    sync.step()  # nothing is broken
    sync.verify()

    model, inner, sync = make(placement, site, "ddp")
    give_gradients(model, site, 0)
    if site == 1:
        model.scalar.grad.fill_(float("nan"))
    result.append(refused(sync.reduce_gradients))
    other = cyclic_placement(num_sites, 1)
    if site == 1:
        other = random_placement(num_sites, 1, seed=1)
    result.append(refused(sync.reshuffle, other))
    return result


def test_bad_values_are_named_before_anything_happens() -> None:
    for messages in pool().run(2, bad_values):
        assert "site 0: inner_optimizer has no moments of first" in messages[0]
        expert = cyclic_placement(2, 1).resident(1, 1)[1]
        key = f"the value of layers.1.experts.{expert}.expand_weight"
        for message in messages[1:4]:
            assert message.startswith("nothing was sent or changed: site 1: " + key)
            assert "is NaN or infinite" in message and "site 0" not in message
        assert "site 0: exp_avg_sq of first is NaN or infinite" in messages[4]
        assert messages[5] == (True, 0)
        assert "site 1: gradient of scalar is NaN or infinite" in messages[6]
        assert "all sites must pass the same placement to reshuffle" in messages[7]


def test_large_finite_values_are_not_refused() -> None:
    model, _, sync = make(SINGLE, 0, "fedavg")
    with torch.no_grad():
        model.first.fill_(3e38)  # their sum overflows
    assert sync.step().round == 1


LOST = """
import sys, torch, torch.distributed as dist
from datetime import timedelta
from outer_model import *
from fomoe_ext.outer import MeetingError, OuterSync
site, store = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method="file://" + store, rank=site, world_size=3,
                        timeout=timedelta(seconds=20))
placement = cyclic_placement(3, 2)
model = SmallModel(placement, site)
sync = OuterSync(model, placement, site, timeout_s=6)
sync.step()
if site == 2:
    import os
    os._exit(9)
messages = []
for _ in range(2):
    try:
        sync.step()
    except MeetingError as error:
        messages.append(str(error))
assert len(messages) == 2, messages
assert f"the meeting after round 1 broke off at site {site}" in messages[0], messages
assert "cannot go on" in messages[1] and "resume a checkpoint" in messages[1], messages
os = __import__("os")
os._exit(0)
"""


def test_a_lost_site_is_an_error_in_time() -> None:
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            subprocess.Popen(
                [sys.executable, "-c", LOST, str(site), f"{folder}/store"],
                env=environment(OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME="lo"),
                stderr=subprocess.PIPE,
                text=True,
            )
            for site in range(3)
        ]
        try:
            outputs = [process.communicate(timeout=60)[1] for process in processes]
        finally:
            for process in processes:
                process.kill()
    codes = [process.returncode for process in processes]
    assert codes == [0, 0, 9], "\n".join(outputs)


def test_a_model_without_layers_is_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    """All sites train all of it, which a placement of replication 1 does not say."""
    dense = nn.Linear(4, 4)
    check_model(dense, cyclic_placement(2, 2), 0)
    assert not caplog.records
    check_model(dense, cyclic_placement(2, 1), 0)
    assert "model has no MoELayer" in caplog.text and "replication 1 of 2 sites" in caplog.text
