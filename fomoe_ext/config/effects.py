"""Finds options that were given but have no effect in this job. Needs no torch.

`_IDLE` lists, for each option that depends on others, the conditions under which it does nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

from fomoe_ext.config.io import read_toml
from fomoe_ext.config.job import SECTIONS, TrainConfig, preset_config

_TABLES = (".jsonl", ".ndjson", ".parquet")


def _has_tables(config: TrainConfig) -> bool:
    """Whether a file of the data may have fields or columns."""
    paths = map(Path, (*config.data.data, *config.data.val_data))
    return any(path.suffix.lower() in _TABLES or not path.is_file() for path in paths)


def _one_site(config: TrainConfig) -> bool:
    return config.sites.sites == 1


def _all_everywhere(config: TrainConfig) -> bool:
    return config.sites.replication == config.sites.sites


def _no_skips(config: TrainConfig) -> bool:
    sites = config.sites
    resident = config.model.router_scope == "resident"
    return resident or _all_everywhere(config) or sites.stale_experts == -1


def _all_copied(config: TrainConfig) -> bool:
    sites, experts = config.sites, config.model.num_experts
    return sites.stale_experts in (-1, experts - experts * sites.replication // sites.sites)


_Idle = tuple[Callable[[TrainConfig], bool], str]
_ONE_SITE: _Idle = (_one_site, "with a single site")
_NO_STALE: _Idle = (lambda c: not c.sites.stale_experts, "without --stale-experts")
_NO_RESHUFFLE: _Idle = (lambda c: not c.sites.reshuffle_rounds, "without --reshuffle-rounds")
_NO_MOMENTS: _Idle = (
    lambda c: c.outer.optimizer != "local-adamw",
    "with an --optimizer other than local-adamw",
)
_DDP: _Idle = (lambda c: c.outer.optimizer == "ddp", "with --optimizer ddp")
_SGD: _Idle = (lambda c: c.inner.inner_optimizer == "sgd", "with --inner-optimizer sgd")
_STATIC: _Idle = (lambda c: not c.fault.tolerant, "without --membership torchft")
_EVERYWHERE: _Idle = (_all_everywhere, "where every site holds all experts (--replication)")
_CHECKPOINTS: _Idle = (lambda c: not c.run.checkpoint_rounds, "without --checkpoint-rounds")

_IDLE: dict[str, Sequence[_Idle]] = {
    "balance_coef": [
        (lambda c: c.model.balance not in ("switch", "entropy"), "without --balance switch|entropy")
    ],
    "balance_bias_rate": [(lambda c: c.model.balance != "bias", "without --balance bias")],
    "router_groups_kept": [
        (lambda c: c.model.router_num_groups == 1, "without --router-num-groups")
    ],
    "router_num_groups": [
        (
            lambda c: c.model.router_num_groups == c.model.router_groups_kept > 1,
            "where all groups are kept (--router-groups-kept)",
        )
    ],
    "skipped_mass": [(_no_skips, "where no slot is skipped (--router-scope, --replication)")],
    "validation_fraction": [(lambda c: bool(c.data.val_data), "with --val-data")],
    "text_field": [(lambda c: not _has_tables(c), "without --data of .jsonl or .parquet")],
    "placement": [
        (lambda c: c.sites.placement_file is not None, "with --placement-file"),
        _EVERYWHERE,
    ],
    "placement_by": [
        (lambda c: c.sites.placement_file is not None, "with --placement-file"),
        _EVERYWHERE,
    ],
    "stale_experts": [
        (lambda c: c.sites.stale_experts == -1 and _all_everywhere(c), _EVERYWHERE[1])
    ],
    "stale_by": [(_all_copied, "where all absent experts are copied (--stale-experts)")],
    "reshuffle_rounds": [
        (
            lambda c: c.sites.reshuffle_rounds >= c.run.resolved_rounds,
            "in a job of at most that many --rounds",
        ),
        _EVERYWHERE,
    ],
    "reshuffle_moments": [_NO_RESHUFFLE],
    "reshuffle_warmup": [_NO_RESHUFFLE],
    "link": [_ONE_SITE],
    "min_lr_ratio": [(lambda c: c.inner.schedule == "constant", "with --schedule constant")],
    "beta2": [_SGD],
    "adam_eps": [_SGD],
    "uneven_steps": [_ONE_SITE],
    "outer_lr": [_DDP],
    "outer_momentum": [_DDP],
    "rounding": [
        (
            lambda c: not c.outer.codec.startswith("int"),
            "with a --codec other than int8, int4, int2",
        )
    ],
    "error_feedback": [
        (lambda c: c.outer.codec == "fp32", "with --codec fp32, which loses nothing"),
        _ONE_SITE,
    ],
    "codec": [_ONE_SITE],
    "router_mean": [
        (lambda c: c.model.router_scope == "resident", "with --router-scope resident"),
        _EVERYWHERE,
    ],
    "expert_mean": [
        (lambda c: c.sites.replication == 1, "where an expert is at one site (--replication 1)")
    ],
    "clip_delta": [_ONE_SITE],
    "rescale": [_ONE_SITE],
    "moment_periods": [_NO_MOMENTS],
    "moment_codecs": [_NO_MOMENTS],
    "stale_codec": [_NO_STALE],
    "stale_period": [_NO_STALE],
    "overlap_alpha": [(lambda c: not c.outer.overlap, "without --overlap")],
    "turn_order": [(lambda c: c.outer.expert_turns == 1, "without --expert-turns")],
    "on_mismatch": [_ONE_SITE],
    "in_flight": [_ONE_SITE],
    "bucket_bytes": [_ONE_SITE],
    "rounds": [
        (lambda c: c.run.steps is not None, "with --steps, which sets the length of the job")
    ],
    "eval_rounds": [
        (
            lambda c: c.run.eval_rounds > c.run.resolved_rounds,
            "in a job of fewer --rounds: it validates at the end",
        )
    ],
    "checkpoint_rounds": [
        (
            lambda c: c.run.checkpoint_rounds > c.run.resolved_rounds,
            "in a job of fewer --rounds: there is a checkpoint at the end",
        )
    ],
    "keep_checkpoints": [
        (lambda c: not c.run.checkpoint_rounds and c.run.resume is None, _CHECKPOINTS[1])
    ],
    "async_checkpoints": [_CHECKPOINTS],
    "quorum": [_STATIC],
    "silent_s": [_STATIC],
    "grace": [_STATIC],
    "shadow_experts": [_EVERYWHERE],
}


def _fields() -> dict[str, str]:
    """The section of every option."""
    default = preset_config("tiny")
    return {
        field.name: section
        for section in SECTIONS
        for field in dataclasses.fields(getattr(default, section))
    }


def _named_in(args: Sequence[str]) -> set[str]:
    """The options that a command line gives a value."""
    known, found = _fields(), set()
    for arg in args:
        name = arg.partition("=")[0].removeprefix("--").replace("-", "_")
        for option in (name, name.removeprefix("no_")):
            if arg.startswith("--") and option in known:
                found.add(option)
    return found


def _named_in_file(path: str, config: TrainConfig) -> set[str]:
    """The options of a TOML file whose values differ from those of its preset."""
    plain, tables = preset_config(config.preset), read_toml(path)
    return {
        name
        for section in SECTIONS
        for name, value in tables.get(section, {}).items()
        if value != getattr(getattr(plain, section), name)
    }


def without_effect(config: TrainConfig, args: Sequence[str], file: str | None = None) -> list[str]:
    """A sentence for each option on the command line or in a TOML file that does nothing in this
    job."""
    given = _named_in(args) | (set() if file is None else _named_in_file(file, config))
    result = []
    for option in sorted(given & _IDLE.keys()):
        why = next((reason for idle, reason in _IDLE[option] if idle(config)), None)
        if why is not None:
            result.append(f"--{option.replace('_', '-')} has no effect {why}")
    return result
