"""The local steps of a site.

Several ranks of a site split its batch. They share its experts over the mesh (expert parallel), and
FSDP shards the other parameters.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable

import torch
from torch import Tensor

from fomoe_ext.launch import inject
from fomoe_ext.launch.world import StopRequest
from fomoe_ext.layer.dense import average_experts
from fomoe_ext.layer.mesh import local_tensor
from fomoe_ext.train.captured import CapturedStep, StepResult, is_capturing, places
from fomoe_ext.train.divergence import Diverged
from fomoe_ext.train.job import learning_rate
from fomoe_ext.train.state import SiteState


class LocalSteps:
    """Takes and counts the local steps of one rank of a site."""

    def __init__(self, site: SiteState, before_update: Callable[[], None]) -> None:
        """`before_update` is called in each step before parameters or optimizer state change."""
        self._site, self._before_update = site, before_update
        self.clock = time.perf_counter
        self._captured: CapturedStep | None = None
        self._left_at: Hashable = None
        """The places of the model and the optimizer's state after the last round's steps."""

    def take(self, stop: StopRequest, after_step: Callable[[Tensor], None]) -> None:
        """Takes the remaining local steps of the round, fewer if this site is asked to stop.

        If a meeting may fall on any step (ddp, fragments, overlap), all sites take all steps.
        `after_step` gets the cross entropy of every step: a scalar, in nats per token. Raises
        Diverged for NaN or infinite values.
        """
        site, progress = self._site, self._site.progress
        outer = site.config.outer
        if self._places() != self._left_at:  # a meeting or a resume has moved the model
            self._captured = None
        all_of_them = outer.optimizer == "ddp" or outer.staggered
        before, begun = progress.steps, self.clock()
        while progress.left and (all_of_them or not self._asked(stop)):
            position = site.batches.position
            try:
                with site.course.explained(site.round + 1, progress.steps + 1):
                    after_step(self.step())
            except Diverged:
                if not self._can_be_left_out():
                    raise
                progress.spoilt, site.batches.position = True, position
                site.optimizer.zero_grad()
            inject.point("local")
        if not self._may_be_left_out:
            site.course.check()
        site.pace.took(progress.steps - before, self.clock() - begun)
        self._left_at = self._places()

    def step(self) -> Tensor:
        """One optimizer step on this site's next batch; returns the cross entropy, detached."""
        site = self._site
        batch = self.share(next(site.batches))
        step = site.round * site.local_steps + site.progress.scheduled
        lr = learning_rate(site.config.inner, step, site.rounds * site.local_steps)
        site.course.rate(lr)
        if self._captures():
            self._before_update()
            assert self._captured is not None
            done = StepResult(
                *(None if r is None else r.clone() for r in self._captured(batch, lr))
            )
            if self._captured.captured:
                self._watch(done.loss, done.norm)
        else:
            for group in site.optimizer.param_groups:
                group["lr"] = lr
            done = self._compute(batch.to(site.device))
        self._count(batch, done)
        site.sync.after_step()
        site.optimizer.zero_grad()
        return done.loss

    def _compute(self, tokens: Tensor) -> StepResult:
        """The step on int64 tokens [B, L + 1] with the learning rate in the optimizer's groups."""
        site = self._site
        inner, ddp = site.config.inner, site.config.outer.optimizer == "ddp"
        with torch.autocast(
            site.device.type, dtype=site.autocast, enabled=site.autocast is not None
        ):
            loss = site.model.loss(tokens)
        self._watch(loss.cross_entropy.detach())
        loss.total.backward()
        self._before_update()
        if site.mesh is not None:
            average_experts(site.model, site.mesh)
        if ddp:
            site.sync.reduce_gradients()
        norm = None
        if inner.grad_clip:
            norm = site.sync.clip_grad_norm_(inner.grad_clip)
            self._watch(norm=norm)
        site.optimizer.step()
        return StepResult(loss.cross_entropy.detach(), norm, self._after_update())

    def _watch(self, loss: Tensor | None = None, norm: Tensor | None = None) -> None:
        """Raises Diverged for what is not finite, where the host need not wait for it."""
        site = self._site
        if self._may_be_left_out or is_capturing(site.device):
            return
        place = site.round + 1, site.progress.steps + 1
        if loss is not None:
            site.course.loss(loss, *place)
        if norm is not None:
            site.course.norm(norm, *place)

    @torch.no_grad()
    def _after_update(self) -> Tensor:
        """Moves the selection biases, and returns the rows that the experts have computed, of all
        layers: an int64 scalar. A site's ranks move its selection biases together."""
        site, layers = self._site, self._site.model.moe_layers()
        grads = [p.grad for p in site.model.parameters() if p.grad is not None]
        site.tally.gradient_bytes = sum(local_tensor(grad).nbytes for grad in grads)
        loads = site.sync.ranks.sum_(torch.stack([layer.load_since_update for layer in layers]))
        rows = []
        for layer, load in zip(layers, loads, strict=True):
            assert layer.stats is not None
            rows.append(layer.stats.rows)
            layer.update_selection_bias(load)
        return torch.stack(rows).sum(dtype=torch.int64)

    def _captures(self) -> bool:
        """Whether this step is to be one of a graph."""
        site = self._site
        if not site.config.run.cuda_graph:
            return False
        warmup = site.sync.warmup
        if warmup is not None and warmup.progress:  # its hooks differ from step to step
            self._captured = None
            return False
        if self._captured is None:
            self._captured = CapturedStep(self._compute, site.optimizer, site.device)
        return True

    def _places(self) -> Hashable:
        site = self._site
        return places(site.model, site.optimizer) if site.config.run.cuda_graph else None

    def share(self, batch: Tensor) -> Tensor:
        """This rank's sequences of the site's batch."""
        world = self._site.world
        return batch.chunk(world.ranks)[world.rank]

    @torch.no_grad()
    def _count(self, tokens: Tensor, done: StepResult) -> None:
        site, tally, progress = self._site, self._site.tally, self._site.progress
        tally.steps += 1
        progress.steps += 1
        count = tokens[:, 1:].numel()
        tally.tokens += count
        progress.tokens += count
        progress.loss += done.loss
        progress.rows += done.rows
        for layer in site.model.moe_layers():
            residents = len(layer.site_experts)
            chosen = layer.top_k if layer.router_scope == "global" else min(layer.top_k, residents)
            progress.slots += count * chosen

    @property
    def _may_be_left_out(self) -> bool:
        """Whether meetings go on without a site whose parameters are NaN or infinite."""
        return bool(self._site.config.outer.clip_delta) and self._site.world.ranks == 1

    def _can_be_left_out(self) -> bool:
        """Whether the next meeting will go on without this site."""
        if not self._may_be_left_out:
            return False
        parameters = self._site.model.parameters()
        return not all(bool(p.detach().isfinite().all()) for p in parameters)

    def _asked(self, stop: StopRequest) -> bool:
        """Whether any rank of this site was asked to stop; a collective of its ranks."""
        site = self._site
        if site.world.ranks == 1:
            return stop.asked
        return bool(site.sync.ranks.sum_(torch.tensor(int(stop.asked), device=site.device)))
