"""What a job's options mean: learning rate, optimizers, and which checkpoints it can resume."""

from __future__ import annotations

import math
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch

from fomoe_ext.checkpoint import manifest as ckpt
from fomoe_ext.checkpoint.reader import load_state
from fomoe_ext.checkpoint.resume import Resumed
from fomoe_ext.config.inner import InnerConfig
from fomoe_ext.config.job import TrainConfig
from fomoe_ext.config.model import ModelConfig
from fomoe_ext.model.language import LanguageModel, optimizer_groups
from fomoe_ext.outer.options import OuterOptions
from fomoe_ext.placement.placement import Placement
from fomoe_ext.plan import traffic as plan


def learning_rate(inner: InnerConfig, step: int, total: int) -> float:
    """Learning rate of step `step` (from 0) of `total`: linear warm-up, then the schedule."""
    if step < inner.warmup_steps:
        return inner.inner_lr * (step + 1) / inner.warmup_steps
    if inner.schedule == "constant":
        return inner.inner_lr
    part = (step - inner.warmup_steps) / max(1, total - 1 - inner.warmup_steps)
    part = min(1.0, part)
    left = 0.5 * (1 + math.cos(math.pi * part)) if inner.schedule == "cosine" else 1 - part
    return inner.inner_lr * (inner.min_lr_ratio + (1 - inner.min_lr_ratio) * left)


def make_optimizer(model: LanguageModel, inner: InnerConfig) -> torch.optim.Optimizer:
    """The optimizer of the local steps: AdamW, or SGD with `beta1` as momentum."""
    groups = optimizer_groups(model, inner.weight_decay)
    if inner.inner_optimizer == "sgd":
        return torch.optim.SGD(groups, lr=inner.inner_lr, momentum=inner.beta1)
    betas = (inner.beta1, inner.beta2)
    return torch.optim.AdamW(groups, lr=inner.inner_lr, betas=betas, eps=inner.adam_eps, fused=True)


def outer_options(config: TrainConfig) -> OuterOptions:
    """The options of a job's OuterSync."""
    return OuterOptions.of_config(
        config.outer,
        local_steps=config.run.local_steps,
        site_mean="tokens" if config.inner.uneven_steps else "equal",
        staged=config.fault.tolerant,
        seed=config.run.seed,
    )


def job_identity(config: TrainConfig) -> dict[str, Any]:
    """The options that a checkpoint's manifest records; `check_same_job` compares them."""
    return {
        "model": asdict(config.model),
        "sites": config.sites.sites,
        "replication": config.sites.replication,
        "seed": config.run.seed,
        "optimizer": config.outer.optimizer,
        "inner_optimizer": config.inner.inner_optimizer,
        "local_steps": config.run.local_steps,
    }


def find_state(path: Path, config: TrainConfig, site: int) -> Resumed:
    """The state from which a site of this job resumes a checkpoint. Raises CheckpointError."""
    manifest = ckpt.read_manifest(path)
    check_same_job(manifest, config, path)
    state = load_state(path, site % manifest.num_sites)
    placement = Placement.from_dict(state["sync"]["placement"])
    sites = config.sites
    same = (placement.num_sites, placement.replication) == (sites.sites, sites.replication)
    if sites.placement_file is not None:
        same = same and placement == plan.job_placement(config)
    wanted = placement if same else plan.job_placement(config)
    return Resumed(state, wanted, same, manifest.num_sites)


def check_same_job(manifest: ckpt.Manifest, config: TrainConfig, path: Path) -> None:
    """Raises CheckpointError naming the first option in which a checkpoint's job differs.

    The number of sites and the replication may differ.
    """
    for key, wanted in job_identity(config).items():
        if key in ("sites", "replication"):
            continue
        found = manifest.meta.get(key)
        if key == "model" and isinstance(found, dict):
            # An older checkpoint lacks newer fields: its model has their defaults.
            found = {f.name: f.default for f in fields(ModelConfig)} | found
            differing = [name for name in wanted if found[name] != wanted[name]]
            if differing:
                key = differing[0]
                found, wanted = found[key], wanted[key]
        if found != wanted:
            raise ckpt.CheckpointError(
                f"checkpoint {path} is of a job with {key} = {found!r}, this one has {wanted!r}"
            )
