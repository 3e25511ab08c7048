"""A model at a site of several ranks: FSDP2 shards dense parameters, the mesh shares experts."""

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
    """Shards all parameters except those of routed experts over all ranks of the site, in place.

    Uses torch's fully_shard on each of `blocks`, then on the rest. Build the optimizer after this,
    so that its state is sharded the same way. A collective of all processes of the job.
    """
    kind = next(model.parameters()).device.type
    shape = (num_sites, ranks_per_site)
    mesh = init_device_mesh(kind, shape, mesh_dim_names=("site", "rank"))["rank"]
    experts = set(expert_parameters(model).values())
    for block in blocks:
        fully_shard(block, mesh=mesh, ignored_params=experts)
    # The root is resharded as well, because parameters may change between two passes.
    fully_shard(model, mesh=mesh, ignored_params=experts, reshard_after_forward=True)


def average_experts(model: nn.Module, mesh: DeviceMesh) -> None:
    """Averages the gradients of experts over the mesh's axis "replica", in place. Call it after the
    backward pass. FSDP averages all other gradients. With one replica it does nothing.
    """
    group = mesh.get_group(REPLICA)
    if group.size() > 1:
        average_gradients(expert_parameters(model), [group])
