"""Resumes a checkpoint, with the same sites or with others.

With another number of sites or another placement, a job resumes the global model, the outer
momentum and the data position. A site takes its inner optimizer state from the old site of the same
number (modulo the number of old sites); for experts that this old site did not hold, from one that
did. Error feedback and counts start from zero.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fomoe_ext.checkpoint.manifest import CheckpointError
from fomoe_ext.checkpoint.state import (
    TrainingRank,
    entries_of,
    local_entries,
    own_vectors,
    shared_vectors,
)
from fomoe_ext.layer.assemble import local_tensors
from fomoe_ext.outer.state import by_parameter, from_parameters, share_errors
from fomoe_ext.outer.state_dict import load_met, require_rules
from fomoe_ext.placement.placement import Placement

SourceOf = Callable[[tuple[int, int] | None], int]
"""The old site from which to take the state of an expert (layer, expert), or of dense parameters
(None)."""


class Resumed(NamedTuple):
    """The state of a checkpoint from which this site resumes."""

    state: dict[str, Any]
    placement: Placement
    same: bool
    """The number of sites and the placement are the same, so that all state is kept."""
    num_sites: int
    """Number of sites that wrote it."""


def source_of(resumed: Resumed, site: int) -> SourceOf:
    """From which old site this site takes its own state."""
    old = Placement.from_dict(resumed.state["sync"]["placement"])

    def source(expert: tuple[int, int] | None) -> int:
        wanted = site % resumed.num_sites
        if expert is None:
            return wanted
        owners = old.owners(*expert)
        return wanted if wanted in owners else owners[site % len(owners)]

    return source


@torch.no_grad()
def load_into(
    training: TrainingRank, resumed: Resumed, read: Callable[[Mapping[str, Tensor]], None]
) -> None:
    """Loads the training state; the global model must be loaded. A collective of the site's ranks.

    `read` fills tensors by name. Raises ValueError or CheckpointError for another job's state.
    """
    state, sync = resumed.state, training.sync
    if not resumed.same and state["steps_in_round"]:
        raise CheckpointError(
            "a checkpoint in the middle of a round can only be resumed with the same sites, "
            "replication and placement"
        )
    source = source_of(resumed, training.sync.site)
    wanted = _inner_targets(training, state["inner"], source)
    own = f"site{training.sync.site}"
    vectors = shared_vectors(sync)
    if resumed.same:
        vectors |= {f"{own}/{what}": found for what, found in own_vectors(sync).items()}
        wanted |= {f"{own}/share/{n}": tensor for n, tensor in share_errors(sync.state).items()}
        if state["local"]:
            entries = local_entries(training.model, local_tensors(training.model))
            wanted |= {f"{own}/local/{entry.name}": entry.tensor for entry in entries}
        if _keeps_copies(training, resumed):
            copies = sync.copies.tensors()  # type: ignore[union-attr]
            wanted |= {f"{own}/stale/{name}": tensor for name, tensor in copies.items()}
        if sync.ranks.leads:
            wanted[f"{own}/tokens"] = sync.counts.tokens
    shaped = {what: by_parameter(sync.layout, found) for what, found in vectors.items()}
    for what, tensors in shaped.items():
        for entry in entries_of(training.model, lambda p, found=tensors: found.get(id(p))):
            wanted[f"{what}/{entry.name}"] = entry.tensor
    require_rules(sync.layout.site.rule, sync.layout.site.codec, state["sync"])
    read(wanted)
    for what, found in vectors.items():
        from_parameters(sync.layout, shaped[what], found)
    _load_numbers(training, resumed)


def _keeps_copies(training: TrainingRank, resumed: Resumed) -> bool:
    """Whether the checkpoint holds this site's copies of absent experts (`tensors_of`)."""
    copies = training.sync.copies
    return copies is not None and resumed.state.get("stale") == copies.description()


def fill_copies(training: TrainingRank, resumed: Resumed, read: Callable[[str], Tensor]) -> None:
    """Fills copies of absent experts that `load_into` has not read, from the global model.

    `read` returns its tensors by name. That model is of the last meeting, after which the copies
    were refreshed. Before the first meeting the copies keep their initial weights.
    """
    copies = training.sync.copies
    kept = resumed.same and _keeps_copies(training, resumed)
    if copies is not None and training.sync.round and not kept:
        copies.fill(read)


def _inner_targets(
    training: TrainingRank, inner: Mapping[str, Any], source: SourceOf
) -> dict[str, Tensor]:
    """Creates the inner optimizer's state; returns the tensors to be read, by name."""
    optimizer, steps = training.optimizer, inner["steps"]
    usual = max(steps.values(), default=0.0)
    for name, parameter in training.model.named_parameters():
        if not parameter.requires_grad or not inner["names"]:
            continue
        entry = {what: torch.zeros_like(parameter) for what in inner["names"]}
        if steps:
            device = parameter.device
            step = torch.tensor(steps.get(name, usual), dtype=torch.float32, device=device)
            entry = {"step": step, **entry}
        optimizer.state[parameter] = entry
    return {
        f"site{source(entry.expert)}/{what}/{entry.name}": entry.tensor
        for what in inner["names"]
        for entry in entries_of(training.model, lambda p, what=what: optimizer.state[p][what])
    }


def _load_numbers(training: TrainingRank, resumed: Resumed) -> None:
    state, sync = resumed.state, training.sync
    numbers = state["sync"]
    sync.log.round = int(numbers["round"])
    sync.step_count.taken = int(numbers["steps"])
    sync.step_count.reductions = int(numbers["reductions"])
    sync.overlap.resume(numbers)
    training.load_progress_state(state, resumed.same)
    if not resumed.same:
        return
    load_met(sync.counts.met, numbers)
    sync.log.agreements = int(numbers["agreements"])
    # From here on the first rank holds the sums of the site.
    sync.log.bytes_sent = int(numbers["bytes_sent"]) if sync.ranks.leads else 0
    if sync.warmup is not None:
        sync.warmup.progress = {(a, b): (c, d) for a, b, c, d in numbers["warmup"]}
