"""Averaging of gradients at every step, for the outer optimizer "ddp", and their norm."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from fomoe_ext.checks import finite
from fomoe_ext.layer.mesh import is_sharded, local_tensor
from fomoe_ext.outer.announce import bad_tensor, meeting_name, require_good
from fomoe_ext.outer.groups import sum_floats
from fomoe_ext.outer.jobs import MeanJob, random_seed
from fomoe_ext.outer.layout import Piece
from fomoe_ext.outer.log import MeetingLog
from fomoe_ext.outer.reduce import Job, run_jobs
from fomoe_ext.outer.site import Site
from fomoe_ext.outer.state import OuterState
from fomoe_ext.outer.step_count import StepCount


class Gradients:
    """The gradients of a site's model: their mean over the sites, and their norm."""

    def __init__(self, state: OuterState, steps: StepCount, log: MeetingLog) -> None:
        self._state, self._layout, self._site = state, state.layout, state.layout.site
        self._steps, self._log = steps, log
        self._stamps: dict[int, tuple[weakref.ref[Tensor], int]] = {}
        """By parameter: the gradient that is the mean, and its version counter then."""
        self._used: set[int] = set()
        """Optimizers that have taken a step with these gradients."""

    # ---------------------------------------------------------------- are gradients the mean yet?

    def _mark(self, anew: bool = True) -> None:
        """Notes that the gradients are the mean now. `anew`: they are those of a new step."""
        model = self._site.model
        gradients = {id(p): p.grad for p in model.parameters() if p.grad is not None}
        self._stamps = {
            key: (weakref.ref(g), local_tensor(g)._version) for key, g in gradients.items()
        }
        if anew:
            self._used.clear()

    def _stand(self, parameters: Iterable[Tensor]) -> bool:
        """Whether the gradients of these parameters are unchanged since `_mark`."""
        for parameter in parameters:
            stamp, gradient = self._stamps.get(id(parameter)), parameter.grad
            if gradient is None or stamp is None:
                return False
            if stamp[0]() is not gradient or stamp[1] != local_tensor(gradient)._version:
                return False
        return True

    def used_by(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether an optimizer's gradients are the mean and it has not used them for a step yet;
        notes that it has now."""
        own = {id(p) for p in self._site.model.parameters() if p.requires_grad}
        held = [p for group in optimizer.param_groups for p in group["params"] if id(p) in own]
        if id(optimizer) in self._used or not self._stand(held):
            return False
        self._used.add(id(optimizer))
        return True

    # -------------------------------------------------------------------------------------- mean

    @torch.no_grad()
    def reduce(self) -> None:
        """`OuterSync.reduce_gradients`."""
        site, layout, lane = self._site, self._layout, self._layout.lane
        if site.rule.name != "ddp":
            raise RuntimeError(
                f"reduce_gradients is for optimizer 'ddp', this is {site.rule.name!r}"
            )
        for parameter in site.model.parameters():
            if not parameter.requires_grad:
                continue
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            elif not parameter.grad.is_contiguous():
                parameter.grad = parameter.grad.contiguous()
        with self._log.meeting("the reduction of gradients"):
            gradient, flats = self._of_pieces()
            problem = layout.members.change() or bad_tensor(layout.layouts, "gradient", gradient)
            name = meeting_name(layout.placement, self._log.round)
            self._log.sent(require_good(site, name, problem))
            self._steps.reductions += 1
            jobs = self._jobs(gradient)
            self._log.sent(run_jobs(jobs, site.options.bucket_bytes, site.options.in_flight))
            if lane is not None:
                lane.push(0, flats, lambda parameter: parameter.grad)  # type: ignore[arg-type,return-value]
            self._mark()

    def _jobs(self, gradient: Callable[[Piece], Tensor]) -> list[Job]:
        site, reductions = self._site, self._steps.reductions
        return [
            MeanJob(
                layout,
                site.index,
                site.codec,
                gradient,
                feedback=feedback,
                seed=random_seed(site.options.seed, reductions, layout.name, site.index),
            )
            for layout, feedback in zip(self._layout.layouts, self._state.feedback, strict=True)
            if layout.group.size > 1
        ]

    def _of_pieces(self) -> tuple[Callable[[Piece], Tensor], dict[int, Tensor]]:
        """Gradients of this rank's pieces; with several ranks per site also the vectors that
        contain them."""
        lane = self._layout.lane
        if lane is None:
            return lambda piece: piece.tensor.grad, {}
        flats = lane.pull(0, lambda parameter: parameter.grad)  # type: ignore[arg-type,return-value]
        return lane.views(flats), flats

    # -------------------------------------------------------------------------------------- norm

    @torch.no_grad()
    def clip(self, max_norm: float) -> Tensor:
        """`OuterSync.clip_grad_norm_`."""
        finite(0.0, max_norm=max_norm)
        if max_norm == 0:
            raise ValueError(f"max_norm must be > 0, got {max_norm}")
        model, ranks, ddp = self._site.model, self._site.ranks, self._site.rule.name == "ddp"
        if ddp and not self._stand(p for p in model.parameters() if p.requires_grad):
            self.reduce()
        parameters = [p for p in model.parameters() if p.grad is not None]
        if not ddp and ranks.size == 1:
            return nn.utils.clip_grad_norm_(parameters, max_norm)
        with self._log.meeting("the clipping of gradients"):
            own = self._square_of_pieces() if ddp else self._square_of(parameters)
            total = float(ranks.sum_(torch.tensor(own, dtype=torch.float64)))
            if ddp:
                group = self._site.everyone
                total, sent = ranks.tell(lambda: sum_floats(group, total))
                self._log.sent(sent if ranks.leads else 0)
        norm = total**0.5
        local = [local_tensor(p.grad) for p in parameters if p.grad is not None]
        # As torch's clip_grads_with_norm_, which does not accept DTensors and tensors together.
        torch._foreach_mul_(local, min(1.0, max_norm / (norm + 1e-6)))
        if ddp:
            self._mark(anew=False)
        return torch.tensor(norm, device=local[0].device if local else None)

    def _square_of_pieces(self) -> float:
        """Squared norm of the gradients of the pieces that this site, and this rank, counts."""
        gradient, _ = self._of_pieces()
        return sum(
            float(piece.part_of(gradient(piece)).double().square().sum())
            for layout in self._layout.layouts
            if layout.group.rank == 0  # one holder counts for the group
            for piece in layout.pieces
        )

    def _square_of(self, parameters: Iterable[nn.Parameter]) -> float:
        """Squared norm of this rank's part of a site's gradients."""
        return sum(_own_square(self._site, parameter) for parameter in parameters)


def _own_square(site: Site, parameter: nn.Parameter) -> float:
    """This rank's part of a gradient's squared norm. Ranks that hold the same values count an equal
    share of it each."""
    assert parameter.grad is not None
    square = float(local_tensor(parameter.grad).double().square().sum())
    if is_sharded(parameter):
        return square
    experts = any(parameter is p for la in site.moe_layers for p in la.experts.parameters())
    ranks = site.ranks
    return square / (ranks.size // ranks.expert_ranks if experts else ranks.size)
