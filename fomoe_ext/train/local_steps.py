"""The local steps of a site.

Several ranks of a site split its batch. They share its experts over the mesh (expert parallel), and
FSDP shards the other parameters.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from fomoe_ext.launch import inject
from fomoe_ext.launch.world import StopRequest
from fomoe_ext.layer.dense import average_experts
from fomoe_ext.layer.mesh import local_tensor
from fomoe_ext.train.divergence import Diverged
from fomoe_ext.train.job import learning_rate
from fomoe_ext.train.state import SiteState


class LocalSteps:
    """Takes and counts the local steps of one rank of a site."""

    def __init__(self, site: SiteState, before_update: Callable[[], None]) -> None:
        """`before_update` is called in each step before parameters or optimizer state change."""
        self._site, self._before_update = site, before_update
        self.clock = time.perf_counter

    def take(self, stop: StopRequest, after_step: Callable[[Tensor], None]) -> None:
        """Takes the remaining local steps of the round, fewer if this site is asked to stop.

        If a meeting may fall on any step (ddp, fragments, overlap), all sites take all steps.
        `after_step` gets the cross entropy of every step: a scalar, in nats per token. Raises
        Diverged for NaN or infinite values.
        """
        site, progress = self._site, self._site.progress
        outer = site.config.outer
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

    def step(self) -> Tensor:
        """One optimizer step on this site's next batch; returns the cross entropy, detached."""
        site = self._site
        inner, ddp = site.config.inner, site.config.outer.optimizer == "ddp"
        tokens = self.share(next(site.batches)).to(site.device)
        with torch.autocast(
            site.device.type, dtype=site.autocast, enabled=site.autocast is not None
        ):
            loss = site.model.loss(tokens)
        place = site.round + 1, site.progress.steps + 1
        if not self._may_be_left_out:
            site.course.loss(loss.cross_entropy.detach(), *place)
        loss.total.backward()
        self._before_update()
        if site.mesh is not None:
            average_experts(site.model, site.mesh)
        if ddp:
            site.sync.reduce_gradients()
        if inner.grad_clip:
            norm = site.sync.clip_grad_norm_(inner.grad_clip)
            if not self._may_be_left_out:
                site.course.norm(norm, *place)
        step = site.round * site.local_steps + site.progress.scheduled
        lr = learning_rate(inner, step, site.rounds * site.local_steps)
        site.course.rate(lr)
        for group in site.optimizer.param_groups:
            group["lr"] = lr
        site.optimizer.step()
        self._count(tokens, loss.cross_entropy.detach())
        site.sync.after_step()
        site.optimizer.zero_grad()
        return loss.cross_entropy.detach()

    def share(self, batch: Tensor) -> Tensor:
        """This rank's sequences of the site's batch."""
        world = self._site.world
        return batch.chunk(world.ranks)[world.rank]

    @torch.no_grad()
    def _count(self, tokens: Tensor, loss: Tensor) -> None:
        site, tally, progress = self._site, self._site.tally, self._site.progress
        grads = [p.grad for p in site.model.parameters() if p.grad is not None]
        tally.gradient_bytes = sum(local_tensor(grad).nbytes for grad in grads)
        tally.steps += 1
        progress.steps += 1
        count = tokens[:, 1:].numel()
        tally.tokens += count
        progress.tokens += count
        progress.loss += loss
        layers = site.model.moe_layers()
        # A site's ranks move its selection biases together.
        loads = site.sync.ranks.sum_(torch.stack([layer.load_since_update for layer in layers]))
        for layer, load in zip(layers, loads, strict=True):
            assert layer.stats is not None
            progress.rows += layer.stats.rows
            residents = len(layer.site_experts)
            chosen = layer.top_k if layer.router_scope == "global" else min(layer.top_k, residents)
            progress.slots += count * chosen
            layer.update_selection_bias(load)

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
