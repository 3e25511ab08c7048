"""Finds errors of a job before its sites are started.

The sites would find the same errors, but only after each has spent seconds on importing torch. This
needs torch only if the job asks for a GPU or resumes a run.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fomoe_ext.config.addresses import parse_address
from fomoe_ext.config.job import TrainConfig
from fomoe_ext.data.sequences import TextData, open_job_data
from fomoe_ext.extras import NotInstalled
from fomoe_ext.fault.lighthouse import require_lighthouse, require_secret, torchft
from fomoe_ext.fault.secret import own_secret
from fomoe_ext.files.outputs import require_folder, require_place
from fomoe_ext.launch import inject
from fomoe_ext.launch.link import wanted_mode
from fomoe_ext.plan import traffic as plan
from fomoe_ext.report.runs import AUTO, CHECKPOINTS, run_of

if TYPE_CHECKING:
    from fomoe_ext.checkpoint.manifest import Manifest


def check_job(config: TrainConfig) -> None:
    """Raises an error if a job cannot begin: ValueError, OSError, NotInstalled, or ImportError if
    the package is not built.

    `config`: from `runs.job_config`, for a job with all sites on this machine. The text is
    tokenized and cached unless that was done before; nothing else is written.
    """
    assert config.run.run_dir is not None
    require_folder("run_dir", config.run.run_dir)
    if config.data.cache_dir is not None:  # nothing is written there if it has all tokens
        require_place("cache_dir", config.data.cache_dir)
    _check_build()
    if config.run.resume is None:
        _check_tables(config)
    _check_membership(config)
    if config.sites.link is not None:
        wanted_mode()
    _check_device(config)
    if config.run.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise NotInstalled("run.tensorboard (--no-tensorboard does without)", "tensorboard")
    data = open_job_data(config, check=False)  # the sites compare hashes, once
    if config.run.resume is not None:
        _check_resume(config.with_vocab(data.vocab_size), data)


def _check_build() -> None:
    from fomoe_ext import _C

    try:
        _C.cpu_features()
    except RuntimeError as error:  # of FOMOE_CPU_ISA
        raise ValueError(str(error)) from None


def _check_tables(config: TrainConfig) -> None:
    """Reads the files that placements and stale copies are computed from."""
    placement = plan.job_placement(config)
    plan.rank_experts(config, placement, 0)
    if config.sites.stale_experts:
        plan.wanted_copies(config, placement)


def _check_membership(config: TrainConfig) -> None:
    try:
        inject.parse(os.environ.get(inject.VARIABLE, ""))
    except ValueError as error:
        raise ValueError(f"{inject.VARIABLE}: {error}") from None
    own_secret()
    if not config.fault.tolerant:
        return
    torchft()
    if config.fault.lighthouse is not None:
        address = parse_address(config.fault.lighthouse, "fault.lighthouse")
        require_secret(address.host)
        require_lighthouse(address, "fault.lighthouse (--lighthouse)")


def _check_device(config: TrainConfig) -> None:
    if config.run.device == "cuda":  # whether there is a GPU can only be asked of torch
        from fomoe_ext.launch.world import World, choose_device

        choose_device(config.run.device, World())


def _check_resume(config: TrainConfig, data: TextData) -> None:
    """Raises ValueError if this job cannot resume any of the checkpoints."""
    from fomoe_ext.checkpoint import manifest as ckpt
    from fomoe_ext.checkpoint.reader import load_state
    from fomoe_ext.checkpoint.whole import require_whole
    from fomoe_ext.train.job import check_same_job

    run = config.run
    assert run.resume is not None and run.run_dir is not None
    automatic = run.resume == AUTO
    target = run.run_dir if automatic else Path(run.resume)
    by_name = not automatic and run_of(target) != target
    found = [target] if by_name else ckpt.list_checkpoints(target / CHECKPOINTS)
    whole: list[tuple[Path, Manifest, Any]] = []
    reasons: list[str] = []
    for path in reversed(found):
        try:
            require_whole(path)  # sizes only; the sites check the content
            whole.append((path, ckpt.read_manifest(path), load_state(path, 0)["data"]))
        except (ckpt.CheckpointError, OSError, KeyError, TypeError) as error:
            reasons.append(str(error))
    if not whole and not automatic:
        raise ValueError(
            f"--resume {run.resume}: there is no whole checkpoint to resume in {target} "
            f"({'; '.join(reasons) or 'it has none'})"
        )
    refused: list[str] = []
    for path, manifest, state in whole:
        try:
            check_same_job(manifest, config, path)
        except ckpt.CheckpointError as error:
            refused.append(str(error))
            continue
        try:
            stream = data.train_batches(1, site=0, num_sites=1, seed=run.seed)
            stream.load_state_dict(state)
            return
        except ValueError as error:
            refused.append(f"checkpoint {path} was trained on other data: {error}")
    if refused:
        raise ValueError(f"--resume {run.resume}: {refused[0]}")
