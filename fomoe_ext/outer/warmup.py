"""ArrivalWarmup: the first steps of experts that a reshuffle has brought are smaller ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fomoe_ext.layer.moe import MoELayer


class ArrivalWarmup:
    """Warms up the learning rate of experts that have arrived: of step i of W it is i / W of it.

    Hooks around `optimizer.step()` keep the arrived experts' rows from before the step and take
    only that share of their change. For optimizers whose change is proportional to the learning
    rate (SGD, AdamW with its decay, ..) that is exactly a smaller learning rate. Experts are known
    by (layer, expert), as their rows move at the next reshuffle.
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
        """Begin anew for these experts, forget those that left. 0 or 1 step = no warm-up."""
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
        # The last step has the whole learning rate: nothing is left to do in it.
        self.progress = {
            k: (done, steps) for k, (done, steps) in advanced.items() if done < steps - 1
        }
