"""The global model: which site provides which tensor, and the names of its tensors.

No site holds the global model. Each expert is taken from one of its holders, and so is its row of
the router, because with router_scope "resident" other sites do not train that row. All other
tensors are taken from site 0. Names are those of the model's state dict, except that every expert
has tensors of its own: `blocks.0.moe.experts.3.expand_weight`, [G*N, D], and so on for
`Experts.parts`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fomoe_ext.launch.waiting import wait_for
from fomoe_ext.layer.experts import extra_state_names
from fomoe_ext.layer.mesh import SiteRanks, put_whole, whole
from fomoe_ext.layer.moe import MoELayer
from fomoe_ext.placement.placement import Placement


class NamedLayer(NamedTuple):
    """An MoE layer, its path in the model and its index among the MoE layers."""

    path: str
    index: int
    layer: MoELayer


def named_moe_layers(model: nn.Module) -> list[NamedLayer]:
    """The MoE layers of any module in order of appearance."""
    found = [(name, m) for name, m in model.named_modules() if isinstance(m, MoELayer)]
    return [NamedLayer(name, i, layer) for i, (name, layer) in enumerate(found)]


def expert_key(path: str, expert: int, part: str) -> str:
    """Name of one expert's tensor in the global model; `part` is one of `Experts.parts`."""
    return f"{path}.experts.{expert}.{part}" if path else f"experts.{expert}.{part}"


def responsible_site(placement: Placement, layer: int, expert: int) -> int:
    """The holder that saves and sends an expert; holders take turns to share the work evenly."""
    owners = placement.owners(layer, expert)
    return owners[(expert + layer) % len(owners)]


def local_tensors(model: nn.Module) -> dict[str, Tensor]:
    """All parameters and persistent buffers by name, detached: the model's state dict without the
    ids of resident experts, which differ between sites."""
    return {name: value.detach() for name, value in _state(model).items()}


def _state(model: nn.Module) -> dict[str, Tensor]:
    state = model.state_dict()
    for name in extra_state_names(model):
        state.pop(name, None)
    return state


def _share(model: NamedLayer, name: str) -> str:
    return f"{model.path}.{name}" if model.path else name


def _from_responsible(
    rows: Tensor, placement: Placement, layer: int, site: int, rank: int
) -> Tensor:
    """Rows [E, ...], row e from the responsible site of expert e; a collective of all processes."""
    rows = whole(rows)
    if placement.num_sites == 1:
        return rows.clone()
    answers = [
        rank == 0 and responsible_site(placement, layer, e) == site
        for e in range(placement.num_experts)
    ]
    mine = torch.tensor(answers).view(-1, *[1] * (rows.dim() - 1))
    # All sites but one add zeros, so the sum has the bits of the responsible site's row.
    result = torch.where(mine, rows.detach().cpu(), torch.zeros((), dtype=rows.dtype))
    wait_for(dist.all_reduce(result, async_op=True))
    return result.to(rows.device)


def global_router_tensors(
    model: nn.Module, placement: Placement, site: int, tensors: Mapping[str, Tensor], rank: int = 0
) -> dict[str, Tensor]:
    """Router weights [E, D], biases and selection biases [E] of the global model, by name.

    tensors: this site's, as `local_tensors` returns them. A collective of all processes.
    """
    result = {}
    for named in named_moe_layers(model):
        for part in (*named.layer.router.parts, "selection_bias"):
            key = _share(named, f"router.{part}")
            result[key] = _from_responsible(tensors[key], placement, named.index, site, rank)
    return result


def own_global_tensors(
    model: nn.Module,
    placement: Placement,
    site: int,
    tensors: Mapping[str, Tensor],
    ranks: SiteRanks | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """This process's part of the global model as (name, tensor); together the parts of all
    processes are the whole model.

    A collective of all processes; with several ranks per site each must exhaust the iterator,
    because sharded tensors are gathered on the way. Router tensors are copies, expert tensors are
    views of `tensors`.

    Args:
        tensors: this site's, as `local_tensors` returns them, or others of the same names and
            shapes.
        ranks: the ranks of this site; None = one.
    """
    ranks = ranks or SiteRanks()
    routers = global_router_tensors(model, placement, site, tensors, ranks.rank)
    return _own_tensors(model, placement, site, tensors, ranks, routers)


def _own_tensors(
    model: nn.Module,
    placement: Placement,
    site: int,
    tensors: Mapping[str, Tensor],
    ranks: SiteRanks,
    routers: Mapping[str, Tensor],
) -> Iterator[tuple[str, Tensor]]:
    stacked: set[str] = set()
    for named in named_moe_layers(model):
        residents = named.layer.experts.resident_experts
        first_copy = ranks.rank < ranks.expert_ranks
        for part in named.layer.experts.parts:
            stack_key = _share(named, f"experts.{part}")
            stacked.add(stack_key)
            for row, expert in enumerate(residents):
                if first_copy and responsible_site(placement, named.index, expert) == site:
                    yield expert_key(named.path, expert, part), tensors[stack_key][row]
    if site == 0:
        dense = [key for key in tensors if key not in stacked]
        for number, key in enumerate(dense):
            value = routers[key] if key in routers else whole(tensors[key])
            if number % ranks.size == ranks.rank:
                yield key, value


def global_names(model: nn.Module) -> set[str]:
    """Names of all tensors of the global model."""
    names = set(_state(model))
    for named in named_moe_layers(model):
        for part in named.layer.experts.parts:
            names.remove(_share(named, f"experts.{part}"))
            names.update(expert_key(named.path, e, part) for e in range(named.layer.num_experts))
    return names


@torch.no_grad()
def fill_model(model: nn.Module, read: Callable[[str], Tensor]) -> None:
    """Fills a model, whichever experts it holds, from tensors of the global model.

    read: returns a tensor of the global model by name; only resident experts are read. Raises
    ValueError if a tensor has another shape than the model's.
    """
    targets = dict(_state(model))
    for named in named_moe_layers(model):
        for part in named.layer.experts.parts:
            stack = targets.pop(_share(named, f"experts.{part}"))
            for row, expert in enumerate(named.layer.experts.resident_experts):
                targets[expert_key(named.path, expert, part)] = stack[row]
    for name, target in targets.items():
        value = read(name)
        if value.shape != target.shape:
            raise ValueError(
                f"{name} must have shape {list(target.shape)}, got {list(value.shape)}"
            )
        put_whole(target, value)
