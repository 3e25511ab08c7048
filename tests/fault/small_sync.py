"""An OuterSync of the small model at every site, and local steps for it."""

from __future__ import annotations

from typing import Any

import torch
from outer_model import SmallModel, cyclic_placement, give_gradients

from fomoe_ext.outer import OuterOptions, OuterSync


def make(
    site: int, num_sites: int, scope: str = "global", **options: Any
) -> tuple[SmallModel, torch.optim.Optimizer, OuterSync]:
    placement = cyclic_placement(num_sites, 2)
    model = SmallModel(placement, site, scope, balance="bias", balance_bias_rate=0.01)
    inner = torch.optim.AdamW(model.parameters(), lr=0.05)
    sync = OuterSync(model, placement, site, OuterOptions(**options), inner_optimizer=inner)
    return model, inner, sync


def take_steps(model: SmallModel, inner: torch.optim.Optimizer, site: int, index: int) -> None:
    for step in range(2):
        give_gradients(model, site, 2 * index + step)
        inner.step()
