"""Meetings of sites that hold the small model."""

from __future__ import annotations

from typing import Any

import torch
from outer_model import EXPERTS, LAYERS, SmallModel, give_gradients

from fomoe_ext.outer import OuterOptions, OuterSync
from fomoe_ext.placement import Placement


def make(
    site: int, num_sites: int, scope: str = "global", **options: Any
) -> tuple[SmallModel, torch.optim.Optimizer, OuterSync]:
    placement = Placement.cyclic(
        num_sites=num_sites, num_experts=EXPERTS, num_layers=LAYERS, replication=2
    )
    model = SmallModel(placement, site, scope, balance="bias", balance_bias_rate=0.01)
    inner = torch.optim.AdamW(model.parameters(), lr=0.05)
    sync = OuterSync(model, placement, site, OuterOptions(**options), inner_optimizer=inner)
    return model, inner, sync


def take_steps(model: SmallModel, inner: torch.optim.Optimizer, site: int, index: int) -> None:
    for step in range(2):
        give_gradients(model, site, 2 * index + step)
        inner.step()
