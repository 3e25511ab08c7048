"""Gradients averaged at every step, for the outer optimizer "ddp"."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fomoe_ext.checks import finite
from fomoe_ext.layer.mesh import is_sharded, local_tensor
from fomoe_ext.outer.groups import sum_floats
from fomoe_ext.outer.jobs import MeanJob
from fomoe_ext.outer.layout import Piece
from fomoe_ext.outer.meeting import bad_tensor, meeting_name, random_seed, require_good
from fomoe_ext.outer.reduce import Job, run_jobs

if TYPE_CHECKING:
    from fomoe_ext.outer.sync import OuterSync


class Reduction:
    """Of which gradients the mean has been taken, and whose step they have been used for."""

    def __init__(self) -> None:
        self._stamps: dict[int, tuple[weakref.ref[Tensor], int]] = {}
        self._used: set[int] = set()

    def made(self, model: nn.Module, anew: bool = True) -> None:
        """The gradients are the mean now; with `anew` of new ones."""
        gradients = {id(p): p.grad for p in model.parameters() if p.grad is not None}
        self._stamps = {
            key: (weakref.ref(g), local_tensor(g)._version) for key, g in gradients.items()
        }
        if anew:
            self._used.clear()

    def stands(self, parameters: Iterable[Tensor]) -> bool:
        """Whether these parameters' gradients are as they were then."""
        for parameter in parameters:
            stamp, gradient = self._stamps.get(id(parameter)), parameter.grad
            if gradient is None or stamp is None:
                return False
            if stamp[0]() is not gradient or stamp[1] != local_tensor(gradient)._version:
                return False
        return True

    def used_by(self, optimizer: torch.optim.Optimizer, model: nn.Module) -> bool:
        """Whether the gradients that an optimizer is about to take its step by are the mean, and
        it has not taken one by it; it has then."""
        own = {id(p) for p in model.parameters() if p.requires_grad}
        held = [p for group in optimizer.param_groups for p in group["params"] if id(p) in own]
        if id(optimizer) in self._used or not self.stands(held):
            return False
        self._used.add(id(optimizer))
        return True


def reduce_gradients(sync: OuterSync) -> None:
    """`OuterSync.reduce_gradients`."""
    if sync.rule.name != "ddp":
        raise RuntimeError(f"reduce_gradients is for optimizer 'ddp', this is {sync.rule.name!r}")
    for parameter in sync.model.parameters():
        if not parameter.requires_grad:
            continue
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        elif not parameter.grad.is_contiguous():
            parameter.grad = parameter.grad.contiguous()
    with sync.meeting("the reduction of gradients"):
        gradient, flats = _gradients(sync)
        problem = sync.members.change(sync) or bad_tensor(sync.layouts, "gradient", gradient)
        sync.sent(require_good(sync, meeting_name(sync), problem))
        sync.reductions += 1
        jobs: list[Job] = [
            MeanJob(
                layout,
                sync.site,
                sync.codec,
                gradient,
                feedback=feedback,
                seed=random_seed(sync.options.seed, sync.reductions, layout.name, sync.site),
            )
            for layout, feedback in zip(sync.layouts, sync.feedback, strict=True)
            if layout.group.size > 1
        ]
        sync.sent(run_jobs(jobs, sync.options.bucket_bytes, sync.options.in_flight))
        if sync.lane is not None:
            sync.lane.push(0, flats, lambda parameter: parameter.grad)  # type: ignore[arg-type,return-value]
        sync.reduction.made(sync.model)


def _gradients(sync: OuterSync) -> tuple[Callable[[Piece], Tensor], dict[int, Tensor]]:
    """Gradients of this rank's pieces; with several ranks per site, the vectors they are in."""
    if sync.lane is None:
        return lambda piece: piece.tensor.grad, {}  # type: ignore[return-value]
    flats = sync.lane.pull(0, lambda parameter: parameter.grad)  # type: ignore[arg-type,return-value]
    return sync.lane.views(flats), flats


def clip_grad_norm(sync: OuterSync, max_norm: float) -> float:
    """`OuterSync.clip_grad_norm`."""
    finite(0.0, max_norm=max_norm)
    if max_norm == 0:
        raise ValueError(f"max_norm must be > 0, got {max_norm}")
    parameters = [p for p in sync.model.parameters() if p.grad is not None]
    ranks, ddp = sync.ranks, sync.rule.name == "ddp"
    if ddp and not sync.reduction.stands(p for p in sync.model.parameters() if p.requires_grad):
        reduce_gradients(sync)
        parameters = [p for p in sync.model.parameters() if p.grad is not None]
    if not ddp and ranks.size == 1:
        return float(nn.utils.clip_grad_norm_(parameters, max_norm))
    with sync.meeting("the clipping of gradients"):
        if ddp:
            gradient, _ = _gradients(sync)
            own = sum(
                float(piece.part_of(gradient(piece)).double().square().sum())
                for layout in sync.layouts
                if layout.group.rank == 0  # one holder speaks for the group
                for piece in layout.pieces
            )
        else:
            own = sum(_own_square(sync, parameter) for parameter in parameters)
        total = float(ranks.sum_(torch.tensor(own, dtype=torch.float64)))
        if ddp:
            group = sync.groups.group(sync.groups.everyone)
            total, sent = ranks.tell(lambda: sum_floats(group, total))
            sync.sent(sent if ranks.leads else 0)
    norm = total**0.5
    local = [local_tensor(p.grad) for p in parameters if p.grad is not None]
    # As torch's clip_grads_with_norm_, which takes no mixture of DTensors and others.
    torch._foreach_mul_(local, min(1.0, max_norm / (norm + 1e-6)))
    if ddp:
        sync.reduction.made(sync.model, anew=False)
    return norm


def _own_square(sync: OuterSync, parameter: nn.Parameter) -> float:
    """This rank's part of a gradient's squared norm; of what several ranks hold, a share."""
    assert parameter.grad is not None
    square = float(local_tensor(parameter.grad).double().square().sum())
    if is_sharded(parameter):
        return square
    experts = any(parameter is p for la in sync.moe_layers for p in la.experts.parameters())
    ranks = sync.ranks
    return square / (ranks.size // ranks.expert_ranks if experts else ranks.size)
