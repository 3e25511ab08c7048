"""Kinds of layers to try frameworks on, and the results of a training pass of each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_layer import make, tokens
from small_model import small
from torch import Tensor, nn

from fomoe_ext.layer.moe import MoELayer
from fomoe_ext.model.language import LanguageModel
from fomoe_ext.placement import Placement

KINDS: dict[str, dict[str, Any]] = {
    "skipping": {
        "resident_experts": [0, 2, 3],
        "expert_bias": True,
        "balance": "bias",
        "router_z_loss_coef": 0.1,
        "shared_expert_intermediate_size": 8,
    },
    "resident": {
        "router_scope": "resident",
        "resident_experts": [5, 1, 2, 4],
        "router_scoring": "softmax",
        "router_renormalize": True,
        "balance": "switch",
        "activation": "clamped_swiglu",
        "expert_bias": True,
    },
    "groups": {
        "router_num_groups": 3,
        "router_groups_kept": 2,
        "router_scale": 2.5,
        "balance": "bias",
        "router_bias": True,
    },
    "empty": {
        "resident_experts": [],
        "shared_expert_intermediate_size": 8,
        "router_z_loss_coef": 0.1,
    },
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def layer_of(kind: str, **changes: Any) -> MoELayer:
    """A layer whose expert biases and selection bias are not zero."""
    layer = make(**(KINDS.get(kind, {"balance": kind}) | changes))
    with torch.no_grad():
        for at, name in enumerate(layer.experts.parts[2:]):
            bias = layer.experts.part(name)
            bias.copy_(tokens(*bias.shape, seed=20 + at))
        layer.router.selection_bias.copy_(0.1 * tokens(6, seed=22))
        if layer.router.bias is not None:
            layer.router.bias.copy_(tokens(6, seed=23))
    return layer


Outcome = dict[str, Tensor]


def outcome(layer: MoELayer, x: Tensor, run: Callable[[Tensor], Tensor] | None = None) -> Outcome:
    """All results of a training pass over x [T, D], by name: output, gradients, statistics."""
    leaf = x.clone().requires_grad_()
    layer.zero_grad()
    y = (layer if run is None else run)(leaf)
    (y.float().square().sum() + layer.aux_loss).backward()
    found = {"y": y.detach(), "x.grad": leaf.grad, "aux_loss": layer.aux_loss.detach()}
    found |= {f"{name}.grad": p.grad for name, p in layer.named_parameters()}
    assert all(value is not None for value in found.values())
    return found | dict(layer.stats._asdict())


def assert_same(got: Outcome, wanted: Outcome, **tolerance: float) -> None:
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(
            got[name], value, msg=lambda text, name=name: f"{name}: {text}", **tolerance
        )


EXACT = {"rtol": 0.0, "atol": 0.0}


def language_model(**changes: Any) -> LanguageModel:
    """A model of which this site holds half of the experts."""
    options: dict[str, Any] = {
        "shared_expert_intermediate_size": 8,
        "expert_bias": True,
        "router_z_loss_coef": 0.1,
    }
    config = small(**(options | changes))
    return LanguageModel(
        config,
        Placement.cyclic(num_sites=2, num_experts=8, num_layers=config.num_layers, replication=1),
        1,
        seed=3,
    )


def assert_same_gradients(got: nn.Module, wanted: nn.Module, **tolerance: float) -> None:
    for (name, mine), theirs in zip(got.named_parameters(), wanted.parameters(), strict=True):
        assert mine.grad is not None and theirs.grad is not None, name
        torch.testing.assert_close(
            mine.grad, theirs.grad, msg=lambda text, name=name: f"{name}: {text}", **tolerance
        )
