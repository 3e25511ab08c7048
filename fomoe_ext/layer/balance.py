"""Statistics of an MoE layer's routing, and what balances the load of its experts.

All results are tensors on the device, so that the host does not wait for them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from fomoe_ext.checks import at_least, finite, one_of
from fomoe_ext.layer.losses import LossOptions, router_loss, wants_loss
from fomoe_ext.ops.tokens import RouterStatistics

BALANCES = ("none", "switch", "entropy", "bias")


class MoEStats(NamedTuple):
    """Measurements of one forward pass, as tensors on the layer's device.

    load: int64 [E], slots that chose each expert, resident or not.
    skipped_share: fp32 scalar in 0..1, share of all T*K slots that were skipped.
    router_entropy: fp32 scalar, nats: the entropy of a token's scores, normalised to sum 1, mean
        over tokens; log(C) if all scores of a token are equal.
    rows: int32 scalar, rows that the experts in this process computed.

    They are made when they are read, of the fields, which are what the pass counted.
    """

    counted: RouterStatistics
    computed: Tensor
    """int32 [*], the last entry: slots of this rank's tokens that were computed, on any rank."""
    computed_here: Tensor
    """int32 [*], the last entry: rows that this process computed for the tokens of any rank."""
    tokens: int
    top_k: int

    @property
    def load(self) -> Tensor:
        return self.counted.load

    @property
    def skipped_share(self) -> Tensor:
        slots = self.tokens * self.top_k
        if not slots:
            return torch.zeros((), dtype=torch.float32, device=self.computed.device)
        return 1 - self.computed[-1] / slots

    @property
    def router_entropy(self) -> Tensor:
        return (self.counted.entropy_sum / max(self.tokens, 1)).float()

    @property
    def rows(self) -> Tensor:
        return self.computed_here[-1]

    def measured(self) -> dict[str, Tensor]:
        """The measurements by name."""
        names = ("load", "skipped_share", "router_entropy", "rows")
        return {name: getattr(self, name) for name in names}


def expert_load(experts: Tensor, num_experts: int) -> Tensor:
    """Slots per expert, int64 [E], of the chosen experts int32 [T, K]; -1 counts nowhere."""
    # bincount would wait for the device. Integer scatter_add is deterministic.
    bins = experts.reshape(-1).long() + 1
    counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=experts.device)
    return counts.scatter_add(0, bins, torch.ones_like(bins))[1:]


def bias_step(load: Tensor, rate: float) -> Tensor:
    """rate * sign(mean load - load), fp32 [C], to be added to the selection bias.

    Balancing without a loss (arXiv 2408.15664, as in DeepSeek-V3); load is int64 [C].
    """
    load = load.double()  # counts stay exact
    return rate * torch.sign(load.mean() - load).float()


class Balanced(nn.Module):
    """A layer that measures its routing and balances the load of its experts.

    stats, aux_loss: results of the last pass, as `MoELayer` documents them. load_since_update:
    int64 [E], slots per expert since the selection bias was last moved, counted in training for
    balance "bias"; in no state dict.
    """

    stats: MoEStats | None
    load_since_update: Tensor
    _loss: Tensor | None = None  # None: 0

    def __init__(
        self,
        num_experts: int,
        balance: str,
        balance_coef: float,
        balance_bias_rate: float,
        router_z_loss_coef: float,
        device: torch.device | str | None,
    ) -> None:
        """Options of `MoELayer`. Raises ValueError or TypeError naming the argument."""
        super().__init__()
        one_of(BALANCES, balance=balance)
        finite(0.0, balance_coef=balance_coef, router_z_loss_coef=router_z_loss_coef)
        finite(0.0, balance_bias_rate=balance_bias_rate)
        at_least(1, num_experts=num_experts)
        self.num_experts, self.balance, self.balance_coef = num_experts, balance, balance_coef
        self.router_z_loss_coef, self.balance_bias_rate = router_z_loss_coef, balance_bias_rate
        self.stats = None
        counts = torch.zeros(num_experts, dtype=torch.int64, device=device)
        self.register_buffer("load_since_update", counts, persistent=False)

    @property
    def aux_loss(self) -> Tensor:
        """The sum of the balancing losses of the last pass; a new 0 where there is none."""
        if self._loss is None:
            return torch.zeros((), dtype=torch.float32, device=self.load_since_update.device)
        return self._loss

    @aux_loss.setter
    def aux_loss(self, loss: Tensor | None) -> None:
        self._loss = loss

    def _weigh(
        self, logits: Tensor | None, counted: RouterStatistics, ids: Tensor | None, scoring: str
    ) -> None:
        """After a pass: sets `aux_loss` and counts the load.

        logits fp32 [T, E], needed if `_takes_loss`; ids int64: the experts that may be chosen, None
        = all.
        """
        loss = None
        if self.training and self.balance == "bias":
            self.load_since_update.add_(counted.load)
        if self._takes_loss and logits is not None and logits.shape[0] > 0:
            load = counted.load
            if ids is not None:
                logits, load = logits.index_select(1, ids), load.index_select(0, ids)
            coefs = (self.balance_coef, self.router_z_loss_coef)
            loss = router_loss(logits, load, LossOptions(self.balance, *coefs, scoring))
        self._loss = loss

    @property
    def _takes_loss(self) -> bool:
        """Whether a pass now takes a loss of the logits, unless it has no tokens."""
        return self.training and wants_loss(self.balance, self.router_z_loss_coef)

    @torch.no_grad()
    def _move_bias(self, bias: Tensor, load: Tensor | None, ids: Tensor | None) -> None:
        """One step of bias balancing, as `MoELayer.update_selection_bias`; ids as `_weigh`."""
        if load is None:
            load = self.load_since_update
        if not isinstance(load, Tensor):
            raise TypeError(f"load must be a tensor, got {type(load).__name__}")
        if load.shape != (self.num_experts,):
            raise ValueError(f"load must have shape [{self.num_experts}], got {list(load.shape)}")
        load = load.to(self.load_since_update.device)
        if ids is None:
            bias += bias_step(load, self.balance_bias_rate)
        else:
            bias.index_add_(0, ids, bias_step(load[ids], self.balance_bias_rate))
        self.load_since_update.zero_()

    def _counts_to(self, device: torch.device) -> None:
        """Moves the counted load to a device; zeros where it had no memory."""
        if self.load_since_update.device != device:
            with torch.inference_mode(False):  # they are used after the current pass, too
                self.load_since_update = _moved(self.load_since_update, device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        counts = self.load_since_update
        super()._apply(fn, recurse)
        # `fn` may cast, or make memory without values (to_empty): only its device counts.
        self.load_since_update = counts
        device = fn(torch.empty(0, device=counts.device)).device
        self._counts_to(device)
        if self._loss is not None and self._loss.device != device:
            self._loss = _moved(self._loss.detach(), device)
        return self

    def __getstate__(self) -> dict[str, Any]:
        # The autograd graph of the last pass can neither be copied nor pickled.
        return self.__dict__ | {"_loss": None if self._loss is None else self._loss.detach()}


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    """On a device; zeros where the tensor is on meta and the device is not."""
    if tensor.is_meta and device.type != "meta":
        return torch.zeros_like(tensor, device=device)
    return tensor.to(device)
