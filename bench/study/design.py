"""Which runs each table of the study is made of.

The model: 2 layers of width 64, 16 gated experts of width 64 and 2 of them per token; 86 % of its
parameters are in experts (3.9 % in the model that the paper trained). The text: the source code of
Python's standard library, as bytes. Equal tokens: in a step all sites together take 16 sequences of
128 tokens. 320 steps are 20, 10 or 5 rounds of 16, 32 or 64, as in the paper (20, 10 or 5 of 32, 64
or 128).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from bench.study.store import Run

MODEL: dict[str, Any] = {
    "hidden_size": 64,
    "num_layers": 2,
    "num_heads": 2,
    "num_experts": 16,
    "expert_size": 64,
    "seq_len": 128,
    "warmup_steps": 40,
    "eval_tokens": 16384,
    "eval_rounds": 0,
}
SEQUENCES = 16
"""Of all sites in a step."""
OPTIMIZERS = ("diloco", "local-adamw")
PLAIN_GLOBAL = {"router_scope": "global", "router_mean": "all"}
"""As the paper's "skip token" mode: all choose among all experts, routers are averaged over all."""
PLAIN_RESIDENT = {"router_scope": "resident"}
"""As the paper's mode of most of its experiments: sites choose among the experts they hold."""
SCOPES = {"resident": PLAIN_RESIDENT, "global": PLAIN_GLOBAL}


@dataclass(frozen=True)
class Size:
    """How much of the study is run."""

    steps: int
    seeds: tuple[int, ...]
    sites: tuple[int, ...]
    local_steps: tuple[int, ...]
    optimizers: tuple[str, ...] = OPTIMIZERS


FULL = Size(320, (0, 1, 2), (2, 4, 8), (16, 32, 64))
QUICK = Size(64, (0,), (2, 4), (16,), ("diloco",))


def job(
    size: Size, sites: int, replication: int, local_steps: int = 16, seed: int = 0, **flags: Any
) -> Run:
    """A run of the study's model; flags that are None are left out."""
    own = {
        **MODEL,
        "replication": replication,
        "batch_size": SEQUENCES // sites,
        "local_steps": local_steps,
        "rounds": size.steps // local_steps,
        **flags,
    }
    return Run(sites, seed, {name: value for name, value in own.items() if value is not None})


def replications(sites: int) -> list[int]:
    """Powers of two up to all sites."""
    return [1 << n for n in range(sites.bit_length())]


def full(size: Size, sites: int, local_steps: int = 16, seed: int = 0, **flags: Any) -> Run:
    """A full replica on every site: no expert is absent, so the scope says nothing."""
    return job(size, sites, sites, local_steps, seed, **flags)


def quality(size: Size) -> Iterator[Run]:
    """Table 1: loss over full replica, by sites, replication, local steps, optimizer, scope."""
    for seed in size.seeds:
        for local_steps in size.local_steps:
            for optimizer in size.optimizers:
                for sites in size.sites:
                    yield full(size, sites, local_steps, seed, optimizer=optimizer)
                    for replication in replications(sites)[:-1]:
                        for scope in SCOPES.values():
                            yield job(
                                size,
                                sites,
                                replication,
                                local_steps,
                                seed,
                                optimizer=optimizer,
                                **scope,
                            )
