"""ArrivalWarmup: a learning rate warm-up for experts that arrived in a reshuffle."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fomoe_ext.layer.moe import MoELayer


class ArrivalWarmup:
    """Warms up the learning rate of experts that arrived: in step i of W it is i / W of the full
    one.

    Hooks around `optimizer.step()` store the rows of these experts before the step and apply only
    that share of their change. If an optimizer's change is proportional to the learning rate (SGD,
    AdamW with its decay, ...), this equals a smaller learning rate. Experts are identified by
    (layer, expert), because their rows move in the next reshuffle.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, layers: Sequence[MoELayer]) -> None:
        """`layers`: the MoE layers, in order."""
        self._layers = layers
        self.progress: dict[tuple[int, int], tuple[int, int]] = {}
        """(layer, expert) -> steps taken, steps in all."""
        self._kept: list[tuple[Tensor, Tensor, float]] = []
        optimizer.register_step_pre_hook(lambda *_: self._keep())
        optimizer.register_step_post_hook(lambda *_: self._take_share())

    def start(self, arrived: Sequence[tuple[int, int]], steps: int) -> None:
        """Starts a warm-up for these experts and forgets those that left. 0 or 1 step = no
        warm-up."""
        for layer, expert in list(self.progress):
            if expert not in self._layers[layer].experts.resident_experts:
                del self.progress[layer, expert]
        for key in arrived:
            self.progress.pop(key, None)
            if steps > 1:
                self.progress[key] = (0, steps)

    def _rows(self, layer: int, expert: int) -> list[Tensor]:
        module = self._layers[layer]
        rows = list(module.experts.expert_weights(expert))
        if module.router_scope == "resident":
            parts = (module.router.get_parameter(part) for part in module.router.parts)
            rows += [part.detach()[expert] for part in parts]
        return rows

    def _keep(self) -> None:
        self._kept = [
            (row, row.clone(), (done + 1) / steps)
            for (layer, expert), (done, steps) in self.progress.items()
            for row in self._rows(layer, expert)
        ]

    def _take_share(self) -> None:
        for row, before, share in self._kept:
            row.copy_(before + share * (row - before))
        self._kept = []
        advanced = {key: (done + 1, steps) for key, (done, steps) in self.progress.items()}
        # The last step has the full learning rate: nothing to do.
        self.progress = {
            k: (done, steps) for k, (done, steps) in advanced.items() if done < steps - 1
        }
