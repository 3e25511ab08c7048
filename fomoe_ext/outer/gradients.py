"""Gradients averaged at every step, for the outer optimizer "ddp"."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from fomoe_ext.checks import finite
from fomoe_ext.outer.groups import sum_floats
from fomoe_ext.outer.jobs import MeanJob
from fomoe_ext.outer.meeting import bad_tensor, meeting_name, random_seed, require_good
from fomoe_ext.outer.reduce import Job, run_jobs

if TYPE_CHECKING:
    from fomoe_ext.outer.sync import OuterSync


def reduce_gradients(sync: OuterSync) -> None:
    """`OuterSync.reduce_gradients`."""
    if sync.rule.name != "ddp":
        raise RuntimeError(f"reduce_gradients is for optimizer 'ddp', this is {sync.rule.name!r}")
    for layout in sync.layouts:
        for piece in layout.pieces:
            parameter = piece.tensor
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            elif not parameter.grad.is_contiguous():
                parameter.grad = parameter.grad.contiguous()
    with sync.meeting("the reduction of gradients"):
        problem = bad_tensor(sync.layouts, "gradient", lambda piece: piece.tensor.grad)
        sync.sent(require_good(sync, meeting_name(sync), problem))
        sync.reductions += 1
        jobs: list[Job] = [
            MeanJob(
                layout,
                sync.site,
                sync.codec,
                lambda piece: piece.tensor.grad,
                feedback=feedback,
                seed=random_seed(sync.options.seed, sync.reductions, layout.name, sync.site),
            )
            for layout, feedback in zip(sync.layouts, sync.feedback, strict=True)
            if layout.group.size > 1
        ]
        sync.sent(run_jobs(jobs, sync.options.bucket_bytes, sync.options.in_flight))


def clip_grad_norm(sync: OuterSync, max_norm: float) -> float:
    """`OuterSync.clip_grad_norm`."""
    finite(0.0, max_norm=max_norm)
    if max_norm == 0:
        raise ValueError(f"max_norm must be > 0, got {max_norm}")
    parameters = [p for p in sync.model.parameters() if p.grad is not None]
    if sync.rule.name != "ddp":
        return float(nn.utils.clip_grad_norm_(parameters, max_norm))
    with sync.meeting("the clipping of gradients"):
        own = sum(
            float(piece.part_of(piece.tensor.grad).double().square().sum())
            for layout in sync.layouts
            if layout.group.rank == 0  # one holder speaks for the group
            for piece in layout.pieces
        )
        total, sent = sum_floats(sync.groups.group(sync.groups.everyone), own)
        sync.sent(sent)
    norm = total**0.5
    nn.utils.clip_grads_with_norm_(parameters, max_norm, torch.tensor(norm))
    return norm
