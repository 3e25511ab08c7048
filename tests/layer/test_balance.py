"""A layer's statistics, the auxiliary losses computed from them, and the balancing bias."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from small_layer import make, normalised_error, tokens
from torch import Tensor

from fomoe_ext.layer import balance
from fomoe_ext.layer.moe import MoELayer

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("scoring", ["sigmoid", "softmax"])
@pytest.mark.parametrize("router_scope", ["global", "resident"])
def test_statistics_equal_plain_counts(scoring: str, router_scope: str) -> None:
    residents = [0, 2, 3, 4]
    layer = make(router_scoring=scoring, router_scope=router_scope, resident_experts=residents)
    x = tokens(2, 50, 24)
    layer(x)
    flat, logits = x.view(100, 24), layer.router.logits(x.view(100, 24)).detach()
    experts = layer.router.choose(layer.router.logits(flat), layer.allowed)[1]
    load = [experts.eq(e).sum().item() for e in range(6)]
    assert layer.stats.load.tolist() == load and sum(load) == 300
    if router_scope == "resident":
        logits = logits[:, residents]
    scores = logits.sigmoid() if scoring == "sigmoid" else logits.softmax(-1)
    entropy = torch.distributions.Categorical(probs=scores).entropy().mean()
    torch.testing.assert_close(layer.stats.router_entropy, entropy)
    skipped = sum(load[e] for e in range(6) if e not in residents) / 300
    assert layer.stats.skipped_share.item() == pytest.approx(skipped, abs=1e-6)
    assert not any(s.requires_grad for s in layer.stats)


def test_no_loss_is_zero_and_losses_are_off_in_eval_mode() -> None:
    layer = make()
    layer(tokens(5, 24))
    assert layer.aux_loss.item() == 0 and layer.aux_loss.dim() == 0
    layer = make(balance="switch", router_z_loss_coef=1.0).eval()
    layer(tokens(5, 24))
    assert layer.aux_loss.item() == 0


@pytest.mark.parametrize("router_scope", ["global", "resident"])
@pytest.mark.parametrize("scoring", ["sigmoid", "softmax"])
@pytest.mark.parametrize("kind", ["switch", "entropy"])
def test_losses_equal_their_formulas(router_scope: str, scoring: str, kind: str) -> None:
    residents = [1, 2, 5]
    layer = make(
        balance=kind,
        balance_coef=0.3,
        router_z_loss_coef=0.07,
        router_scoring=scoring,
        router_scope=router_scope,
        resident_experts=residents,
        top_k=2,
    )
    x = tokens(64, 24)
    layer(x)
    weight = layer.router.weight.detach().double().requires_grad_()
    columns = residents if router_scope == "resident" else list(range(6))
    logits = (x.double() @ weight.T)[:, columns]
    share = layer.stats.load.double()[columns] / (64 * 2)
    if kind == "switch":
        scores = logits.sigmoid() if scoring == "sigmoid" else logits.softmax(-1)
        mean = (scores / scores.sum(-1, keepdim=True)).mean(0)
        loss = len(columns) * (share * mean).sum()
    else:
        mean = logits.softmax(-1).mean(0)
        loss = (mean * mean.log()).sum()
    z = logits.exp().sum(-1).log().square().mean()
    wanted = 0.3 * loss + 0.07 * z
    assert layer.aux_loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    grads = [
        torch.autograd.grad(layer.aux_loss, layer.router.weight)[0],
        torch.autograd.grad(wanted, weight)[0],
    ]
    assert grads[1].abs().max() > 0 and normalised_error(*grads) < 1e-4


def test_losses_at_their_extremes() -> None:
    even, load = torch.zeros(32, 8), torch.full((8,), 4)
    assert balance.switch_loss(even, load).item() == pytest.approx(1)
    assert balance.entropy_loss(even).item() == pytest.approx(-math.log(8))
    assert balance.z_loss(even).item() == pytest.approx(math.log(8) ** 2)
    collapsed = torch.zeros(32, 8)
    collapsed[:, 3] = 50.0
    only = torch.tensor([0, 0, 0, 32, 0, 0, 0, 0])
    assert balance.switch_loss(collapsed, only).item() == pytest.approx(8)
    assert balance.entropy_loss(collapsed).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("kind", ["switch", "entropy"])
def test_a_loss_balances_a_skewed_router(kind: str) -> None:
    layer = skewed_layer(balance=kind, balance_coef=1.0)
    x = skewed_tokens()
    before = imbalance(layer, x)
    optimizer = torch.optim.Adam(layer.router.parameters(), lr=0.02)
    for _ in range(120):
        optimizer.zero_grad()
        layer(x)
        layer.aux_loss.backward()
        optimizer.step()
    assert before > 2 and imbalance(layer, x) < 0.6 * before


@pytest.mark.parametrize("router_scope", ["global", "resident"])
def test_selection_bias_balances_a_skewed_router(router_scope: str) -> None:
    residents = [0, 1, 2, 4]
    layer = skewed_layer(
        balance="bias",
        balance_bias_rate=0.01,
        router_scope=router_scope,
        resident_experts=residents,
    )
    x = skewed_tokens()
    before = imbalance(layer, x)
    for _ in range(200):
        layer(x)
        layer.update_selection_bias()
    assert before > 1.5 and imbalance(layer, x) < 1.2
    assert layer.aux_loss.item() == 0
    if router_scope == "resident":
        assert layer.router.selection_bias[[3, 5]].tolist() == [0, 0]


def test_selection_bias_step_by_hand() -> None:
    layer = make(balance="bias", balance_bias_rate=0.5)
    layer.update_selection_bias(torch.tensor([4, 0, 2, 2, 3, 1]))
    assert layer.router.selection_bias.tolist() == [-0.5, 0.5, 0, 0, -0.5, 0.5]
    layer.update_selection_bias()  # nothing counted: nothing moves
    assert layer.router.selection_bias.tolist() == [-0.5, 0.5, 0, 0, -0.5, 0.5]
    layer.eval()(tokens(40, 24))
    assert layer.load_since_update.sum() == 0
    layer.train()
    for _ in range(2):  # two micro-batches count together
        layer(tokens(40, 24))
    assert layer.load_since_update.tolist() == (2 * layer.stats.load).tolist()
    layer.update_selection_bias()
    assert layer.load_since_update.sum() == 0
    other = make(balance="none")
    other(tokens(40, 24))
    other.update_selection_bias()
    assert other.router.selection_bias.abs().sum() == 0


def skewed_layer(**options: Any) -> MoELayer:
    """A layer whose router prefers the same experts for most tokens."""
    layer = make(top_k=1, **options)
    with torch.no_grad():
        layer.router.weight[:, 0] += torch.tensor([0.2, 0, 1.5, 0, 0.5, 0])  # see skewed_tokens
    return layer


def skewed_tokens() -> Tensor:
    x = tokens(512, 24)
    x[:, 0] = 1.0
    return x


def imbalance(layer: MoELayer, x: Tensor) -> float:
    """Largest load over mean load, of the experts that may be chosen."""
    layer(x)
    load = layer.stats.load
    if layer.allowed is not None:
        load = load[layer.allowed]
    return (load.max() / load.double().mean()).item()
