"""StepCount: counts local steps and the optimizers that took them."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from fomoe_ext.layer.moe import MoELayer


class StepCount:
    """Local steps that hooks or `after_step` have counted.

    since: steps since the last meeting of a round. reductions: with "ddp", how often gradients were
    averaged. optimizers: all that have taken a step.
    """

    def __init__(self, of_round: int | None) -> None:
        """`of_round`: steps of a round, if meetings are spread over it."""
        self._of_round = of_round
        self._taken, self.since, self.reductions = 0, 0, 0
        self._reductions_before = 0
        """`reductions` at the last meeting of a round."""
        self.optimizers: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()
        self._warned = False

    @property
    def taken(self) -> int:
        """Steps since the start."""
        return self._taken

    @taken.setter
    def taken(self, number: int) -> None:
        """Sets the number of steps, from a checkpoint or from other sites."""
        self._taken = number
        self.since = number % self._of_round if self._of_round else 0

    def take(self) -> None:
        """Counts a step."""
        self._taken += 1
        self.since += 1

    def unreduced(self) -> str:
        """With "ddp": says that gradients were not averaged before every step, or is empty."""
        reduced = self.reductions - self._reductions_before
        if reduced < self.since:
            return (
                f"reduce_gradients is due before every step, was called {reduced} times in "
                f"{self.since}"
            )
        return ""

    def other_optimizer(
        self, named: Iterable[tuple[str, Tensor]], inner: torch.optim.Optimizer | None
    ) -> str:
        """Names a parameter that another optimizer than the inner one has trained, or is empty."""
        names = {id(parameter): name for name, parameter in named}
        for optimizer in self.optimizers:
            if optimizer is inner:
                continue
            held = [id(p) for group in optimizer.param_groups for p in group["params"]]
            if found := [names[key] for key in held if key in names]:
                return f"{found[0]} was trained by another optimizer than inner_optimizer"
        return ""

    def round_over(self, layers: Sequence[MoELayer]) -> None:
        """Notes that the sites have met at the end of a round."""
        if self.since and not self._warned:
            self._warned = _warn_of_balance(layers)
        self.since, self._reductions_before = 0, self.reductions


def _warn_of_balance(layers: Sequence[MoELayer]) -> bool:
    """Warns if balance is "bias" and `update_selection_bias` was never called."""
    forgotten = [
        layer
        for layer in layers
        if layer.balance == "bias"
        and bool(layer.load_since_update.any())
        and not bool(layer.router.selection_bias.any())
    ]
    if forgotten:
        warnings.warn(
            "balance = 'bias' needs MoELayer.update_selection_bias after every optimizer step; it "
            f"has not moved the bias of {len(forgotten)} layers",
            stacklevel=6,
        )
    return bool(forgotten)
