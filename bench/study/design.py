"""Which runs each table of the study consists of.

The model has 2 layers of width 64, each with 16 gated experts of width 64, 2 per token; 86 %
of its parameters are in experts (3.9 % in the model that the paper trained). It learns the source
code of Python's standard library, as bytes. All jobs see equally many tokens: a step is 16
sequences of 128 tokens, shared out among all sites. 320 steps are 20, 10 or 5 rounds of 16, 32 or
64 local steps; the paper has as many rounds, of 32, 64 or 128. The learning rate 0.01 is the
paper's. Of 0.0025, 0.005, 0.01, 0.015 and 0.02 it gave the lowest loss, both with full replicas and
with half of the experts resident (one seed).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import ceil
from typing import Any

from bench.study.store import Run
from fomoe_ext.placement.turns import ORDERS

BASE: dict[str, Any] = {
    "hidden_size": 64,
    "num_layers": 2,
    "num_heads": 2,
    "num_experts": 16,
    "intermediate_size": 64,
    "seq_len": 128,
    "warmup_steps": 40,
    "inner_lr": 0.01,
    "eval_tokens": 16384,
    "eval_rounds": 0,
    "optimizer": "diloco",
    "codec": "fp32",
    "router_scope": "global",
}
"""Flags of every job, unless a table changes them. Everything that affects a result is named here,
so that a change of a default does not change the study."""
SEQUENCES = 16
"""Sequences per step, shared out among all sites."""
OPTIMIZERS = ("diloco", "local-adamw")
PLAIN_GLOBAL = {"router_scope": "global", "router_mean": "all"}
"""The paper's "skip token" mode: tokens choose among all experts; routers are averaged over all
sites."""
PLAIN_RESIDENT = {"router_scope": "resident"}
"""The mode of most of the paper's experiments: tokens choose among the experts of their site."""
SCOPES = {"resident": PLAIN_RESIDENT, "global": PLAIN_GLOBAL}


@dataclass(frozen=True)
class Size:
    """How much of the study is run."""

    steps: int
    seeds: tuple[int, ...]
    sites: tuple[int, ...]
    local_steps: tuple[int, ...]
    optimizers: tuple[str, ...] = OPTIMIZERS


def with_seeds(size: Size, count: int) -> Size:
    """`size` with only its first `count` seeds. Raises ValueError if it has fewer."""
    if not 1 <= count <= len(size.seeds):
        raise ValueError(f"seeds must be in 1..{len(size.seeds)}, got {count}")
    return dataclasses.replace(size, seeds=size.seeds[:count])


FULL = Size(320, (0, 1, 2), (2, 4, 8), (16, 32, 64))
QUICK = Size(64, (0,), (2, 4), (16,), ("diloco",))


def job(
    size: Size, sites: int, replication: int, local_steps: int = 16, seed: int = 0, **flags: Any
) -> Run:
    """A training job of the study's model. A flag that is None is left out."""
    own = {
        **BASE,
        "replication": replication,
        "batch_size": SEQUENCES // sites,
        "local_steps": local_steps,
        "rounds": size.steps // local_steps,
        **flags,
    }
    return Run(sites, seed, {name: value for name, value in own.items() if value is not None})


def replications(sites: int) -> list[int]:
    """Powers of two up to `sites`, the last of which is a full replica."""
    return [1 << n for n in range(sites.bit_length())]


def full(size: Size, sites: int, local_steps: int = 16, seed: int = 0, **flags: Any) -> Run:
    """A job with a full replica on every site. Its router_scope makes no difference."""
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


SITES, HALF, LOCAL_STEPS = 4, 2, 16
"""Sites, replication and local steps of the tables below, unless a row changes them."""


def _half(size: Size, seed: int, local_steps: int = LOCAL_STEPS, **flags: Any) -> Run:
    return job(size, SITES, HALF, local_steps, seed, **{**PLAIN_RESIDENT, **flags})


def costs_rows(size: Size, seed: int) -> dict[str, Run]:
    """Table 2: how much loss comes from training each expert on fewer sites, and how much from
    skipping slots."""
    spes = {"router_scope": "global", "stale_experts": -1}
    rows = {"full replica": full(size, SITES, LOCAL_STEPS, seed)}
    for replication in (HALF, 1):
        of = lambda name, r=replication: f"{name}, replication {r}"
        make = lambda r=replication, **flags: job(size, SITES, r, LOCAL_STEPS, seed, **flags)
        rows[of("tokens choose among residents")] = make(**PLAIN_RESIDENT)
        rows[of("absent experts skipped")] = make(**PLAIN_GLOBAL)
        rows[of("frozen copies of absent experts")] = make(**spes)
    return rows


def stability_rows(size: Size, seed: int) -> dict[str, Run]:
    """Table 3: the same kinds of jobs, with statistics of routing recorded."""
    probe = {"probe_tokens": 2048}
    rows = {"full replica": full(size, SITES, LOCAL_STEPS, seed, **probe)}
    for replication in (HALF, 1):
        for name, scope in SCOPES.items():
            rows[f"{name}, replication {replication}"] = job(
                size, SITES, replication, LOCAL_STEPS, seed, **probe, **scope
            )
    return rows


LONGER = (1.25, 1.1)
"""How many times as many steps the last two jobs of table 4 train: where compute is cheaper than
the link, more steps can buy the same loss with fewer bytes."""
DDP_PARTS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.65, 0.75, 0.9, 1.0)
"""Fractions of the study's steps for which DDP trains, each to the end of its own schedule."""


def bytes_families(size: Size, seed: int) -> dict[str, list[Run]]:
    """Table 4: several jobs per method. `tables.cheapest` takes from each the one with the fewest
    bytes that reaches the full replica's loss.

    All train on the same number of tokens, to the end of their schedule. Exceptions: DDP, which
    reaches that loss in fewer steps, and the last two, which take `LONGER` times as many.
    """
    # A longer job has at least one more round, even in a short study.
    whole = lambda part: round(size.steps * part / 16, 6)
    rounds = lambda part: max(1, ceil(whole(part)) if part > 1 else round(whole(part)))
    of_steps = lambda part: Size(rounds(part) * 16, (), (), ())
    ddp = [
        job(
            of_steps(part),
            SITES,
            SITES,
            16,
            seed,
            optimizer="ddp",
        )
        for part in DDP_PARTS
    ]
    half = lambda steps, **flags: [_half(size, seed, h, **flags) for h in steps]

    def in_turns(local_steps: int) -> dict[str, Any]:
        """Flags with which every expert is averaged every `LOCAL_STEPS` local steps."""
        return {"expert_turns": LOCAL_STEPS // local_steps, "turn_order": ORDERS[0]}

    return {
        "DDP": ddp,
        "DiLoCo, full replica": [full(size, SITES, LOCAL_STEPS, seed)],
        "FoMoE": half((16, 8)),
        "FoMoE, int8": half((16, 8, 4), codec="int8"),
        "FoMoE, int4": half((16, 8, 4, 2), codec="int4"),
        "FoMoE, int2": half((16, 8, 4, 2), codec="int2"),
        "FoMoE, int2, experts in turns": [
            _half(size, seed, h, codec="int2", **in_turns(h)) for h in (8, 4)
        ],
        "FoMoE, topk": half((4, 2), codec="topk"),
        "FoMoE, int2, longer": [_half(of_steps(LONGER[0]), seed, codec="int2")],
        "FoMoE, int2, experts in turns, longer": [
            _half(of_steps(LONGER[1]), seed, 8, codec="int2", **in_turns(8))
        ],
    }


METHODS: Mapping[str, Mapping[str, Any]] = {
    "plain: tokens choose among residents, fp32": {},
    "plain (global): absent experts skipped, fp32": PLAIN_GLOBAL,
    "router rows averaged over holders only (global)": {"router_scope": "global"},
    "experts averaged with their tokens as weights": {"expert_mean": "tokens"},
    "mean deltas times sqrt(sites)": {"rescale": True},
    "routing weights divided by their sum": {"router_renormalize": True},
    "routing weight of skipped slots given to the others (global)": {
        "router_scope": "global",
        "skipped_mass": "rescale",
    },
    "frozen copies of all absent experts (global)": {
        "router_scope": "global",
        "stale_experts": -1,
    },
    "frozen copies of 4 absent experts (global)": {"router_scope": "global", "stale_experts": 4},
    "frozen copies of the 4 absent experts chosen most often (global)": {
        "router_scope": "global",
        "stale_experts": 4,
        "stale_by": "counted",
    },
    "random placement": {"placement": "random"},
    "experts that are chosen together on the same sites": {
        "placement": "together",
        "placement_by": "counted",
    },
    "experts that are chosen together on different sites": {
        "placement": "apart",
        "placement_by": "counted",
    },
    "reshuffle every 4 rounds, AdamW moments reset": {
        "placement": "random",
        "reshuffle_rounds": 4,
    },
    "reshuffle every 4 rounds, AdamW moments carried": {
        "placement": "random",
        "reshuffle_rounds": 4,
        "reshuffle_moments": "carry",
        "reshuffle_warmup": 0,
    },
    "int8": {"codec": "int8"},
    "int8, meetings 4 times as often (as many bytes)": {"codec": "int8", "local_steps": 4},
    "int4, meetings 4 times as often (half the bytes)": {"codec": "int4", "local_steps": 4},
    "int2, meetings 8 times as often (as many bytes)": {"codec": "int2", "local_steps": 2},
    **{
        f"int2, meetings 4 times as often, experts in 4 turns, {order}": {
            "codec": "int2",
            "local_steps": 4,
            "expert_turns": 4,
            "turn_order": order,
        }
        for order in ORDERS
    },
    "LocalAdamW, int4, meetings 4 times as often, moments in every 4th and 8th": {
        "optimizer": "local-adamw",
        "codec": "int4",
        "local_steps": 4,
        "moment_codecs": ["int4", "bf16"],
        "moment_periods": [4, 8],
    },
}
"""Table 5: ways to close the gap to the full replica, each by itself."""


OFTEN = "full replica, int4, meetings 4 times as often"
"""The full replica with one of the best of these methods, for comparison."""


def gap_rows(size: Size, seed: int) -> dict[str, Run]:
    """The full replica, `OFTEN`, and `METHODS`."""
    rows = {
        "full replica": full(size, SITES, LOCAL_STEPS, seed),
        OFTEN: full(size, SITES, LOCAL_STEPS // 4, seed, codec="int4"),
    }
    for name, method in METHODS.items():
        flags = dict(method)
        rows[name] = _half(size, seed, flags.pop("local_steps", LOCAL_STEPS), **flags)
    return rows


def counted(size: Size, seed: int) -> Run:
    """The plain job, which also records how often each two experts are chosen together. A job with
    `placement_by` or `stale_by` = "counted" reads these counts."""
    return _half(size, seed, coactivation=True)


def counted_for(run: Run) -> Run:
    """The job whose counts `run` reads: `counted`, of the same seed and size."""
    changes = {"placement": None, "placement_by": None, "stale_by": None, "stale_experts": None}
    return run.named(**changes, **PLAIN_RESIDENT, coactivation=True)


BEST = {
    "int4": "int4, meetings 4 times as often (half the bytes)",
    "LocalAdamW": "LocalAdamW, int4, meetings 4 times as often, moments in every 4th and 8th",
}
"""Those of `METHODS` that are also run with other numbers of sites, by a short name."""


def gap_sites_rows(size: Size, seed: int) -> dict[tuple[int, str], Run]:
    """The full replica, the plain job and `BEST`, by number of sites and name of the row. All but
    the full replica have replication = sites / 2."""
    rows: dict[tuple[int, str], Run] = {}
    for sites in size.sites:
        rows[sites, "full replica"] = full(size, sites, LOCAL_STEPS, seed)
        rows[sites, "plain"] = job(size, sites, sites // 2, LOCAL_STEPS, seed, **PLAIN_RESIDENT)
        for short, name in BEST.items():
            best = {**PLAIN_RESIDENT, **METHODS[name]}
            steps = best.pop("local_steps")
            rows[sites, short] = job(size, sites, sites // 2, steps, seed, **best)
    return rows


def runs_of(table: str, size: Size) -> list[Run]:
    """All runs of a table, seed by seed. Raises KeyError for a table without runs."""
    if table == "quality":
        return list(quality(size))
    if table == "bytes":
        families = (bytes_families(size, seed) for seed in size.seeds)
        return [run for of_seed in families for runs in of_seed.values() for run in runs]
    rows = {"costs": costs_rows, "stability": stability_rows, "gap": gap_rows}[table]
    runs = [run for seed in size.seeds for run in rows(size, seed).values()]
    if table == "gap":
        runs = [counted(size, seed) for seed in size.seeds] + runs
        runs += [run for seed in size.seeds for run in gap_sites_rows(size, seed).values()]
    return runs
