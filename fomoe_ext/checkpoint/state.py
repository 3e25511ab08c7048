"""What a checkpoint holds of a training rank besides the global model, and how that is called.

Tensors are called as in the global model (`fomoe_ext.layer.assemble`), with what they are before
it: `momentum/blocks.0.attention.qkv_weight` is of all sites, `site1/exp_avg/...` of one. So any
other sites and ranks than wrote them can read them (`fomoe_ext.checkpoint.resume`).
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
    """One rank of a site in training, as far as a checkpoint holds it.

    Tensors are taken from its model, inner optimizer and outer sync, and filled there again. How
    far it is it tells itself, as JSON of which nothing but `steps_in_round` is known here.
    """

    @property
    def model(self) -> nn.Module: ...

    @property
    def optimizer(self) -> torch.optim.Optimizer: ...

    @property
    def sync(self) -> OuterSync: ...

    def counts(self) -> Any:
        """What this rank has counted, as a message (`launch.messages`)."""
        ...

    def progress_state(self, counts: Sequence[Any]) -> dict[str, Any]:
        """How far the site is; `counts` are those of all its ranks. Asked of the first one."""
        ...

    def load_progress_state(self, state: Mapping[str, Any], same: bool) -> None:
        """Goes on from what `progress_state` said, in a `state` that says more than that.

        `same` False: it is of other sites, or of another placement. Raises ValueError.
        """
        ...


Rows = dict[int | None, Tensor]
"""Parts of a tensor of a parameter's shape: some of its rows by number, or by None all of it."""
TensorOf = Callable[[nn.Parameter], Tensor | Rows | None]


class Entry(NamedTuple):
    """A tensor by its name in the global model; of an expert, which (layer, expert).

    alone: no other rank of the site has it.
    """

    name: str
    expert: tuple[int, int] | None
    tensor: Tensor
    alone: bool = False


def entries_of(model: nn.Module, tensor_of: TensorOf) -> list[Entry]:
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
    """What the inner optimizer keeps in the shape of its parameters; ValueError for other state."""
    return list(dict.fromkeys(name for _, name, _ in shaped_state(optimizer)))


def shared_vectors(sync: OuterSync) -> dict[str, list[Tensor]]:
    """What all holders have alike besides the global model, by name; the same names on all ranks.

    The anchor is the global model, and is made of it again (`OuterState.fill`), unless parameters
    are of fewer bits than it.
    """
    rule = sync.layout.site.rule
    if rule.name == "ddp":
        return {}
    rounded = any(p.dtype != torch.float32 for p in sync.model.parameters() if p.requires_grad)
    found = {"anchor": sync.state.anchors} if rounded else {}
    return found | ({"momentum": sync.state.momenta} if rule.momentum else {})


def own_vectors(sync: OuterSync) -> dict[str, list[Tensor]]:
    """The site's own error of every layout; zeros for one where nothing is lost."""
    if not (sync.layout.site.codec.lossy and sync.options.error_feedback):
        return {}
    errors = [
        torch.zeros(la.numel, device=la.pieces[0].tensor.device) if f.own is None else f.own
        for la, f in zip(sync.layout.layouts, sync.state.feedback, strict=True)
    ]
    return {"error": errors}


# ---------------------------------------------------------------------------------------- writing


def state_of(training: TrainingRank, has_local: bool) -> dict[str, Any] | None:
    """What of a site's state is no tensor, on its first rank; a collective of the site's ranks.

    `has_local`: whether `tensors_of` gives the site's own parameters and buffers too.
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
    """The tensors of the training state that this process has to write, by name, one after another.

    `local`: the site's own parameters and buffers, where they are not those of the global model. A
    collective of the site's ranks, and with several to be gone through to its end. A site writes
    what is its own; of what all holders have alike an expert's `responsible_site` writes it, and
    the sites share out the rest. Of the ranks that have the same the first does. Counts, which a
    forward pass changes, are copies; all else changes only with the optimizer's step or a meeting.
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
    """Of what a site's ranks hold what this one writes; of DTensors each has its shard."""
    ranks = training.sync.ranks
    for entry in entries:
        first = ranks.rank < ranks.expert_ranks if entry.expert is not None else ranks.leads
        if first or entry.alone:
            yield f"{prefix}/{entry.name}", entry.tensor


def _shared_out(training: TrainingRank, entries: Iterable[Entry]) -> Iterator[Entry]:
    """Of what other sites have as well what this site writes."""
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
