"""The training state in a checkpoint, besides the global model, and the names of its tensors.

A name is that of the parameter in the global model (`fomoe_ext.layer.assemble`) with a prefix:
`momentum/blocks.0.attention.qkv_weight` is shared by all sites, `site1/exp_avg/...` belongs to one.
So other numbers of sites and ranks can read it (`fomoe_ext.checkpoint.resume`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from fomoe_ext.layer.assemble import expert_key, named_moe_layers, responsible_site
from fomoe_ext.layer.mesh import is_sharded, rows_here
from fomoe_ext.outer.belongings import steps_of
from fomoe_ext.outer.inner_state import shaped_state
from fomoe_ext.outer.state import pieces_of, share_errors
from fomoe_ext.outer.sync import OuterSync


class TrainingRank(Protocol):
    """One rank of a site in training, as far as a checkpoint saves it.

    Tensors are read from its model, inner optimizer and outer sync, and loaded into them. Its
    progress is JSON of its own, of which only `steps_in_round` is used here.
    """

    @property
    def model(self) -> nn.Module: ...

    @property
    def optimizer(self) -> torch.optim.Optimizer: ...

    @property
    def sync(self) -> OuterSync: ...

    def counts(self) -> Any:
        """The counts of this rank, as a message (`launch.messages`)."""
        ...

    def progress_state(self, counts: Sequence[Any]) -> dict[str, Any]:
        """The progress of the site; `counts`: of all its ranks. Called on the first rank."""
        ...

    def load_progress_state(self, state: Mapping[str, Any], same: bool) -> None:
        """Loads what `progress_state` returned; `state` has more entries.

        `same` False: the checkpoint has other sites or another placement. Raises ValueError.
        """
        ...


Rows = dict[int | None, Tensor]
"""Parts of a tensor of a parameter's shape: rows by number, or the whole tensor by None."""
TensorOf = Callable[[nn.Parameter], Tensor | Rows | None]


class Entry(NamedTuple):
    """A tensor with its name in the global model; expert: (layer, expert) or None.

    alone: no other rank of the site has it.
    """

    name: str
    expert: tuple[int, int] | None
    tensor: Tensor
    alone: bool = False


def entries_of(model: nn.Module, tensor_of: TensorOf) -> list[Entry]:
    """This rank's tensors with the shapes of the trained parameters; experts one by one.

    With router_scope "resident" the router's rows are separate entries too, because each is
    averaged over the holders of its expert.
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
                result.append(Entry(key, (layer, expert), tensor[row]))
        elif id(parameter) in routers:
            layer, ids = routers[id(parameter)]
            result += [
                Entry(f"{name}.{expert}", (layer, expert), row, alone=True)
                for expert, row in _rows(tensor, ids)
            ]
        else:
            whole = _whole(tensor) if isinstance(tensor, dict) else tensor
            result.append(Entry(name, None, whole, is_sharded(whole)))
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


def local_entries(model: nn.Module, tensors: Mapping[str, Tensor]) -> list[Entry]:
    """A site's own parameters and buffers, experts one by one."""
    whole = dict(tensors)
    result = []
    for named in named_moe_layers(model):
        for part in named.layer.experts.parts:
            prefix = f"{named.path}." if named.path else ""
            stack = whole.pop(f"{prefix}experts.{part}")
            for row, expert in enumerate(named.layer.experts.resident_experts):
                key = expert_key(named.path, expert, part)
                result.append(Entry(key, (named.index, expert), stack[row]))
    return [*(Entry(n, None, t, is_sharded(t)) for n, t in whole.items()), *result]


def inner_names(optimizer: torch.optim.Optimizer) -> list[str]:
    """Names of the inner optimizer's state tensors with the shape of their parameter, such as
    exp_avg. Raises ValueError for other state."""
    return list(dict.fromkeys(name for _, name, _ in shaped_state(optimizer)))


def shared_vectors(sync: OuterSync) -> dict[str, list[Tensor]]:
    """Vectors that are equal on all holders, besides the global model; equal names on all ranks.

    The anchor is left out if all parameters are fp32: it then equals the global model, from which
    `OuterState.fill` restores it.
    """
    rule = sync.layout.site.rule
    if rule.name == "ddp":
        return {}
    rounded = any(p.dtype != torch.float32 for p in sync.model.parameters() if p.requires_grad)
    found = {"anchor": sync.state.anchors} if rounded else {}
    return found | ({"momentum": sync.state.momenta} if rule.momentum else {})


def own_vectors(sync: OuterSync) -> dict[str, list[Tensor]]:
    """The site's own error feedback of every layout; zeros for a layout without error."""
    if not (sync.layout.site.codec.lossy and sync.options.error_feedback):
        return {}
    errors = [
        torch.zeros(la.numel, device=la.pieces[0].tensor.device) if f.own is None else f.own
        for la, f in zip(sync.layout.layouts, sync.state.feedback, strict=True)
    ]
    return {"error": errors}


# ---------------------------------------------------------------------------------------- writing


def state_of(training: TrainingRank, has_local: bool) -> dict[str, Any] | None:
    """The part of a site's state that is JSON, on its first rank; None on the others.

    A collective of the site's ranks. `has_local`: `tensors_of` yields the site's own parameters and
    buffers too.
    """
    sync, ranks = training.sync, training.sync.ranks
    numbers = {
        key: value for key, value in sync.state_dict().items() if not isinstance(value, Tensor)
    }
    for what in ("anchor", "momentum", "error", "share_error"):
        numbers.pop(what)
    parts = ranks.gather((sync.bytes_sent, training.counts()))
    numbers["bytes_sent"] = sum(sent for sent, _ in parts)
    if not ranks.leads:
        return None
    state = {
        "sync": numbers,
        "inner": {
            "names": inner_names(training.optimizer),
            "steps": steps_of(sync.model, sync.inner_optimizer),
        },
        **training.progress_state([counts for _, counts in parts]),
        "local": has_local,
    }
    if sync.copies is not None and not sync.copies.fresh:
        state["stale"] = sync.copies.description()
    return state


def tensors_of(
    training: TrainingRank, local: Mapping[str, Tensor] | None
) -> Iterator[tuple[str, Tensor]]:
    """Yields the tensors of the training state that this process writes, with their names.

    `local`: the site's own parameters and buffers, if they differ from the global model. A
    collective of the site's ranks; with several ranks it must be consumed to the end.

    A site writes its own tensors. Tensors that are equal on all holders of an expert are written by
    its `responsible_site`; other shared tensors are divided among the sites. If several ranks have
    the same tensor, the first writes it. Counts, which a forward pass changes, are copies; all
    other tensors change only in an optimizer step or a meeting.
    """
    tokens = training.sync.ranks.sum_(training.sync.counts.tokens.clone())
    return _tensors_of(training, local, tokens)


def _tensors_of(
    training: TrainingRank, local: Mapping[str, Tensor] | None, tokens: Tensor
) -> Iterator[tuple[str, Tensor]]:
    sync, own = training.sync, f"site{training.sync.site}"
    kept = training.optimizer.state
    for name in inner_names(training.optimizer):
        entries = entries_of(training.model, lambda p, name=name: kept.get(p, {}).get(name))
        yield from _written_here(training, f"{own}/{name}", entries)
    for what, vectors in shared_vectors(sync).items():
        pieces = pieces_of(sync.layout, vectors)
        entries = entries_of(training.model, lambda p, found=pieces: found.get(id(p)))
        yield from _written_here(training, what, _shared_out(training, entries))
    for what, vectors in own_vectors(sync).items():
        pieces = pieces_of(sync.layout, vectors)
        entries = entries_of(training.model, lambda p, found=pieces: found.get(id(p)))
        yield from _written_here(training, f"{own}/{what}", entries)
    for name, tensor in share_errors(sync.state).items():
        yield f"{own}/share/{name}", tensor
    if local is not None:
        yield from _written_here(training, f"{own}/local", local_entries(training.model, local))
    if sync.copies is not None and not sync.copies.fresh:
        for name, tensor in sync.copies.tensors().items():
            yield f"{own}/stale/{name}", tensor
    if sync.ranks.leads:
        yield f"{own}/tokens", tokens


def _written_here(
    training: TrainingRank, prefix: str, entries: Iterable[Entry]
) -> Iterator[tuple[str, Tensor]]:
    """The entries that this rank of the site writes; every rank writes its shard of a DTensor."""
    ranks = training.sync.ranks
    for entry in entries:
        first = ranks.rank < ranks.expert_ranks if entry.expert is not None else ranks.leads
        if first or entry.alone:
            yield f"{prefix}/{entry.name}", entry.tensor


def _shared_out(training: TrainingRank, entries: Iterable[Entry]) -> Iterator[Entry]:
    """The entries that this site writes, of those that several sites have."""
    placement, mine = training.sync.placement, training.sync.site
    dense = 0
    for entry in entries:
        if entry.expert is not None:
            writer = responsible_site(placement, *entry.expert)
        else:
            writer = dense % placement.num_sites
            dense += 1
        if writer == mine:
            yield entry
