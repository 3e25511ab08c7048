"""A site's training state by name: written by some sites and ranks, read by any others.

Tensors are called as in the global model (`fomoe_ext.layer.assemble`), with what they are before
it: `momentum/blocks.0.attention.qkv_weight` is of all sites, `site1/exp_avg/...` of one.

At other sites, or with another placement, a job goes on from the global model, the outer momentum
and the data position. A site's inner optimizer state then comes from an old site: that of its own
number (modulo the old sites), for experts that this one did not hold from one that did. Errors of
encoding begin at zero, and counts as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from fomoe_ext.checkpoint.manifest import CheckpointError
from fomoe_ext.layer.assemble import expert_key, named_moe_layers, responsible_site
from fomoe_ext.layer.mesh import is_sharded, rows_here
from fomoe_ext.outer.belongings import steps_of
from fomoe_ext.outer.inner_state import shaped_state
from fomoe_ext.outer.state import (
    by_parameter,
    from_parameters,
    load_met,
    pieces_of,
    require_rules,
    share_errors,
)
from fomoe_ext.placement.placement import Placement
from fomoe_ext.report.tally import Tally

if TYPE_CHECKING:
    from fomoe_ext.outer import OuterSync
    from fomoe_ext.train.site import TrainingSite

Rows = dict[int | None, Tensor]
"""Parts of a tensor of a parameter's shape: some of its rows by number, or by None all of it."""
TensorOf = Callable[[nn.Parameter], Tensor | Rows | None]
SourceOf = Callable[[tuple[int, int] | None], int]
"""The old site that answers for an expert (layer, expert), or for what every site has (None)."""


class _Entry(NamedTuple):
    """A tensor by its name in the global model; of an expert, which (layer, expert).

    alone: no other rank of the site has it.
    """

    name: str
    expert: tuple[int, int] | None
    tensor: Tensor
    alone: bool = False


def _entries(model: nn.Module, tensor_of: TensorOf) -> list[_Entry]:
    """What this rank holds of tensors shaped as the trained parameters; experts one by one.

    Where sites choose among their residents, router rows as well: each is its holders' business.
    """
    stacks: dict[int, tuple[str, int, str, tuple[int, ...]]] = {}
    routers: dict[int, tuple[int, tuple[int, ...]]] = {}
    for named in named_moe_layers(model):
        ids = named.layer.experts.resident_experts
        for part in named.layer.experts.parts:
            stacks[id(named.layer.experts.part(part))] = (named.path, named.index, part, ids)
        if named.layer.router_scope == "resident":
            for part in named.layer.router.parts:
                rows = named.layer.router.get_parameter(part)
                routers[id(rows)] = named.index, named.layer.site_experts
    result = []
    for name, parameter in model.named_parameters():
        tensor = tensor_of(parameter) if parameter.requires_grad else None
        if tensor is None:
            continue
        if id(parameter) in stacks:
            path, layer, part, ids = stacks[id(parameter)]
            for row, expert in enumerate(ids):
                key = expert_key(path, expert, part)
                result.append(_Entry(key, (layer, expert), tensor[row]))
        elif id(parameter) in routers:
            layer, ids = routers[id(parameter)]
            result += [
                _Entry(f"{name}.{expert}", (layer, expert), row, alone=True)
                for expert, row in _rows(tensor, ids)
            ]
        else:
            whole = _whole(tensor) if isinstance(tensor, dict) else tensor
            result.append(_Entry(name, None, whole, is_sharded(whole)))
    return result


def _rows(tensor: Tensor | Rows, wanted: Iterable[int]) -> list[tuple[int, Tensor]]:
    """Those of the wanted rows that this rank has, which share the tensor's memory."""
    if isinstance(tensor, dict):
        return [(row, tensor[row]) for row in wanted]
    first, here = rows_here(tensor)
    return [(row, here[row - first]) for row in wanted if first <= row < first + len(here)]


def _whole(rows: Rows) -> Tensor:
    """A tensor of all its rows."""
    return rows[None] if None in rows else torch.stack([rows[row] for row in range(len(rows))])


def _local_entries(model: nn.Module, tensors: Mapping[str, Tensor]) -> list[_Entry]:
    """A site's own parameters and buffers, experts one by one."""
    whole = dict(tensors)
    result = []
    for named in named_moe_layers(model):
        for part in named.layer.experts.parts:
            prefix = f"{named.path}." if named.path else ""
            stack = whole.pop(f"{prefix}experts.{part}")
            for row, expert in enumerate(named.layer.experts.resident_experts):
                key = expert_key(named.path, expert, part)
                result.append(_Entry(key, (named.index, expert), stack[row]))
    return [*(_Entry(n, None, t, is_sharded(t)) for n, t in whole.items()), *result]


def _inner_names(optimizer: torch.optim.Optimizer) -> list[str]:
    """What the inner optimizer keeps in the shape of its parameters; ValueError for other state."""
    return list(dict.fromkeys(name for _, name, _ in shaped_state(optimizer)))


def _shared_vectors(sync: OuterSync) -> dict[str, list[Tensor]]:
    """What all holders have alike, by name; the same names on all ranks."""
    if sync.rule.name == "ddp":
        return {}
    return {"anchor": sync.anchors} | ({"momentum": sync.momenta} if sync.rule.momentum else {})


def _own_vectors(sync: OuterSync) -> dict[str, list[Tensor]]:
    """The site's own error of every layout; zeros for one where nothing is lost."""
    if not (sync.codec.lossy and sync.options.error_feedback):
        return {}
    errors = [
        torch.zeros(la.numel, device=la.pieces[0].tensor.device) if f.own is None else f.own
        for la, f in zip(sync.layouts, sync.feedback, strict=True)
    ]
    return {"error": errors}


# ---------------------------------------------------------------------------------------- writing


def state_of(site: TrainingSite, has_local: bool) -> dict[str, Any] | None:
    """What of a site's state is no tensor, on its first rank; a collective of the site's ranks.

    `has_local`: whether `tensors_of` gives the site's own parameters and buffers too.
    """
    sync, ranks = site.sync, site.sync.ranks
    numbers = {
        key: value for key, value in sync.state_dict().items() if not isinstance(value, Tensor)
    }
    for what in ("anchor", "momentum", "error", "share_error"):
        numbers.pop(what)
    parts = ranks.gather((sync.bytes_sent, site.tally.state_dict(), site.round_counts()))
    numbers["bytes_sent"] = sum(sent for sent, _, _ in parts)
    if not ranks.leads:
        return None
    state = {
        "sync": numbers,
        "inner": {"names": _inner_names(site.optimizer), "steps": steps_of(sync)},
        "data": site.batches.state_dict(),
        "tally": Tally.of_ranks([Tally.from_state(t) for _, t, _ in parts]).state_dict(),
        "steps_in_round": site.steps_in_round,
        "uneven": site.uneven_state(),
        "round_counts": of_site([counts for _, _, counts in parts]),
        "local": has_local,
    }
    if sync.copies is not None and not sync.copies.fresh:
        state["stale"] = sync.copies.description()
    return state


def tensors_of(
    site: TrainingSite, local: Mapping[str, Tensor] | None
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of the training state that this process has to write, by name, one after another.

    `local`: the site's own parameters and buffers, where they are not those of the global model. A
    collective of the site's ranks, and with several to be gone through to its end. A site writes
    what is its own; of what all holders have alike an expert's `responsible_site` writes it, and
    the sites share out the rest. Of the ranks that have the same the first does. Counts, which a
    forward pass changes, are copies; all else changes only with the optimizer's step or a meeting.
    """
    tokens = site.sync.ranks.sum_(site.sync.tokens.clone())
    return _tensors_of(site, local, tokens)


def _tensors_of(
    site: TrainingSite, local: Mapping[str, Tensor] | None, tokens: Tensor
) -> Iterator[tuple[str, Tensor]]:
    sync, own = site.sync, f"site{site.world.site}"
    kept = site.optimizer.state
    for name in _inner_names(site.optimizer):
        entries = _entries(site.model, lambda p, name=name: kept.get(p, {}).get(name))
        yield from _written_here(site, f"{own}/{name}", entries)
    for what, vectors in _shared_vectors(sync).items():
        pieces = pieces_of(sync, vectors)
        entries = _entries(site.model, lambda p, found=pieces: found.get(id(p)))
        yield from _written_here(site, what, _shared_out(site, entries))
    for what, vectors in _own_vectors(sync).items():
        pieces = pieces_of(sync, vectors)
        entries = _entries(site.model, lambda p, found=pieces: found.get(id(p)))
        yield from _written_here(site, f"{own}/{what}", entries)
    for name, tensor in share_errors(sync).items():
        yield f"{own}/share/{name}", tensor
    if local is not None:
        yield from _written_here(site, f"{own}/local", _local_entries(site.model, local))
    if sync.copies is not None and not sync.copies.fresh:
        for name, tensor in sync.copies.tensors().items():
            yield f"{own}/stale/{name}", tensor
    if sync.ranks.leads:
        yield f"{own}/tokens", tokens


def _written_here(
    site: TrainingSite, prefix: str, entries: Iterable[_Entry]
) -> Iterator[tuple[str, Tensor]]:
    """Of what a site's ranks hold what this one writes; of DTensors each has its shard."""
    ranks = site.sync.ranks
    for entry in entries:
        first = ranks.rank < ranks.expert_ranks if entry.expert is not None else ranks.leads
        if first or entry.alone:
            yield f"{prefix}/{entry.name}", entry.tensor


def _shared_out(site: TrainingSite, entries: Iterable[_Entry]) -> Iterator[_Entry]:
    """Of what other sites have as well what this site writes."""
    placement, mine = site.placement, site.world.site
    dense = 0
    for entry in entries:
        if entry.expert is not None:
            writer = responsible_site(placement, *entry.expert)
        else:
            writer = dense % placement.num_sites
            dense += 1
        if writer == mine:
            yield entry


def of_site(counts: list[tuple[float, int, int]]) -> tuple[float, int, int]:
    """Loss, rows and slots of a round of a site from those of its ranks."""
    losses, rows, slots = zip(*counts, strict=True)
    return sum(losses) / len(losses), sum(rows), sum(slots)


# ---------------------------------------------------------------------------------------- reading


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
    site: TrainingSite, resumed: Resumed, read: Callable[[Mapping[str, Tensor]], None]
) -> None:
    """Goes on from a checkpoint; the global model has been loaded. A collective of the site.

    `read` fills tensors by name. Raises ValueError or CheckpointError for a state of another job.
    """
    state, sync = resumed.state, site.sync
    if not resumed.same and state["steps_in_round"]:
        raise CheckpointError(
            "a checkpoint in the middle of a round can be resumed with its own sites, replication "
            "and placement only"
        )
    source = source_of(resumed, site.world.site)
    wanted = _inner_targets(site, state["inner"], source)
    own = f"site{site.world.site}"
    vectors = _shared_vectors(sync)
    if resumed.same:
        vectors |= {f"{own}/{what}": found for what, found in _own_vectors(sync).items()}
        wanted |= {f"{own}/share/{n}": tensor for n, tensor in share_errors(sync).items()}
        if state["local"]:
            entries = _local_entries(site.model, site.local_tensors())
            wanted |= {f"{own}/local/{entry.name}": entry.tensor for entry in entries}
        if _keeps_copies(site, resumed):
            copies = sync.copies.tensors()  # type: ignore[union-attr]
            wanted |= {f"{own}/stale/{name}": tensor for name, tensor in copies.items()}
        if sync.ranks.leads:
            wanted[f"{own}/tokens"] = sync.tokens
    shaped = {what: by_parameter(sync, found) for what, found in vectors.items()}
    for what, tensors in shaped.items():
        for entry in _entries(site.model, lambda p, found=tensors: found.get(id(p))):
            wanted[f"{what}/{entry.name}"] = entry.tensor
    require_rules(sync, state["sync"])
    read(wanted)
    for what, found in vectors.items():
        from_parameters(sync, shaped[what], found)
    _load_numbers(site, resumed)


def _keeps_copies(site: TrainingSite, resumed: Resumed) -> bool:
    """Whether the state has the copies of absent experts, of an earlier meeting than the last."""
    copies = site.sync.copies
    return copies is not None and resumed.state.get("stale") == copies.description()


def fill_copies(site: TrainingSite, resumed: Resumed, read: Callable[[str], Tensor]) -> None:
    """Copies of absent experts that `load_into` has not read, from the global model.

    `read` gives its tensors by name. That model is of the last meeting, so the copies are what its
    refresh made of them; before the first meeting they are as at the start.
    """
    copies = site.sync.copies
    kept = resumed.same and _keeps_copies(site, resumed)
    if copies is not None and site.round and not kept:
        copies.fill(read)


def _inner_targets(
    site: TrainingSite, inner: Mapping[str, Any], source: SourceOf
) -> dict[str, Tensor]:
    """Makes the inner optimizer's state and names what is to be read into it."""
    optimizer, steps = site.optimizer, inner["steps"]
    usual = max(steps.values(), default=0.0)
    for name, parameter in site.model.named_parameters():
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
        for entry in _entries(site.model, lambda p, what=what: optimizer.state[p][what])
    }


def _load_numbers(site: TrainingSite, resumed: Resumed) -> None:
    state, sync = resumed.state, site.sync
    numbers, leads = state["sync"], sync.ranks.leads
    for name in ("round", "steps", "reductions"):
        setattr(sync, name, int(numbers[name]))
    site.batches.load_state_dict(state["data"])
    tally = Tally.from_state(state["tally"])
    loss, rows, slots = state["round_counts"]
    if not resumed.same:
        site.tally = Tally(steps=tally.steps, from_round=sync.round, from_step=tally.steps)
        return
    load_met(sync, numbers)
    sync.agreements = int(numbers["agreements"])
    # Sums of a site are its first rank's from here on.
    sync.bytes_sent = int(numbers["bytes_sent"]) if leads else 0
    site.tally = tally if leads else tally.without_counts()
    site.steps_in_round = state["steps_in_round"]
    if "uneven" in state:  # not in checkpoints of earlier versions
        site.set_uneven_state(state["uneven"])
    site.set_round_counts((loss, rows, slots) if leads else (loss, 0, 0))
    if sync.warmup is not None:
        sync.warmup.progress = {(a, b): (c, d) for a, b, c, d in numbers["warmup"]}
