"""A model in a site of several ranks: dense parameters by FSDP2, experts by the mesh."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard

from fomoe_ext.layer.dispatch import REPLICA, average_gradients
from fomoe_ext.layer.moe import MoELayer


def expert_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of all routed experts of this rank, by name."""
    stacks = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, MoELayer)
        for parameter in module.experts.parameters()
    }
    return {name: p for name, p in model.named_parameters() if id(p) in stacks}


def shard_dense(
    model: nn.Module, blocks: Iterable[nn.Module], num_sites: int, ranks_per_site: int
) -> None:
    """Shards all parameters but those of routed experts over all ranks of the site, in place.

    By torch's fully_shard: every one of `blocks`, then what is left. The optimizer, made after
    this, keeps its state sharded alike. A collective of all processes of the job.
    """
    kind = next(model.parameters()).device.type
    shape = (num_sites, ranks_per_site)
    mesh = init_device_mesh(kind, shape, mesh_dim_names=("site", "rank"))["rank"]
    experts = set(expert_parameters(model).values())
    for block in blocks:
        fully_shard(block, mesh=mesh, ignored_params=experts)
    # Between two passes parameters may change, so the root keeps no whole copy of its own either.
    fully_shard(model, mesh=mesh, ignored_params=experts, reshard_after_forward=True)


def average_experts(model: nn.Module, mesh: DeviceMesh) -> None:
    """Averages the gradients of experts over the mesh's axis "replica", in place; after the
    backward pass. (FSDP averages all others.) Nothing to do for one replica.
    """
    group = mesh.get_group(REPLICA)
    if group.size() > 1:
        average_gradients(expert_parameters(model), [group])
