"""Going on from a checkpoint, with the sites that wrote it or with others.

At other sites, or with another placement, a job goes on from the global model, the outer momentum
and the data position. A site's inner optimizer state then comes from an old site: that of its own
number (modulo the old sites), for experts that this one did not hold from one that did. Errors of
encoding begin at zero, and counts as well.
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
"""The old site that answers for an expert (layer, expert), or for what every site has (None)."""


class Resumed(NamedTuple):
    """A checkpoint's state, as this site will go on from it."""

    state: dict[str, Any]
    placement: Placement
    same: bool
    """Whether it is of as many sites with the same placement: then all of the state is kept."""
    num_sites: int
    """Sites that wrote it."""


def source_of(resumed: Resumed, site: int) -> SourceOf:
    """Which old site this site's own state comes from."""
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
    """Goes on from a checkpoint; the global model has been loaded. A collective of the site.

    `read` fills tensors by name. Raises ValueError or CheckpointError for a state of another job.
    """
    state, sync = resumed.state, training.sync
    if not resumed.same and state["steps_in_round"]:
        raise CheckpointError(
            "a checkpoint in the middle of a round can be resumed with its own sites, replication "
            "and placement only"
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
    """Whether the state has the copies of absent experts, of an earlier meeting than the last."""
    copies = training.sync.copies
    return copies is not None and resumed.state.get("stale") == copies.description()


def fill_copies(training: TrainingRank, resumed: Resumed, read: Callable[[str], Tensor]) -> None:
    """Copies of absent experts that `load_into` has not read, from the global model.

    `read` gives its tensors by name. That model is of the last meeting, so the copies are what its
    refresh made of them; before the first meeting they are as at the start.
    """
    copies = training.sync.copies
    kept = resumed.same and _keeps_copies(training, resumed)
    if copies is not None and training.sync.round and not kept:
        copies.fill(read)


def _inner_targets(
    training: TrainingRank, inner: Mapping[str, Any], source: SourceOf
) -> dict[str, Tensor]:
    """Makes the inner optimizer's state and names what is to be read into it."""
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
    sync.overlap.resume(int(numbers.get("overlap", 0)))
    training.load_progress_state(state, resumed.same)
    if not resumed.same:
        return
    load_met(sync.counts.met, numbers)
    sync.log.agreements = int(numbers["agreements"])
    # Sums of a site are its first rank's from here on.
    sync.log.bytes_sent = int(numbers["bytes_sent"]) if sync.ranks.leads else 0
    if sync.warmup is not None:
        sync.warmup.progress = {(a, b): (c, d) for a, b, c, d in numbers["warmup"]}
