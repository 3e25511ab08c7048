"""A site of many ranks: the mesh of all processes, and collectives among the ranks of one site.

Process site * ranks_per_site + replica * expert_ranks + expert_rank has the coordinate (site,
replica, expert_rank) in the mesh, whose axes are "site", "replica" and "expert". The ranks along
"expert" share a site's resident experts (`fomoe_ext.layer.dispatch`). Replicas along "replica" hold
the same experts and work on different data. The slow link is between the ranks along "site".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from fomoe_ext.checks import at_least
from fomoe_ext.launch import messages

AXES = ("site", "replica", "expert")


def make_mesh(
    num_sites: int, ranks_per_site: int, replicas: int = 1, device_type: str = "cpu"
) -> DeviceMesh:
    """The mesh [num_sites, replicas, ranks_per_site / replicas] of all processes; a collective.

    Raises ValueError for impossible sizes, RuntimeError if torch.distributed has another number of
    processes.
    """
    at_least(1, num_sites=num_sites, ranks_per_site=ranks_per_site, replicas=replicas)
    if ranks_per_site % replicas:
        raise ValueError(f"replicas must divide ranks_per_site = {ranks_per_site}, got {replicas}")
    count = dist.get_world_size() if dist.is_initialized() else 1
    if count != num_sites * ranks_per_site:
        raise RuntimeError(
            f"torch.distributed must have {num_sites * ranks_per_site} processes for {num_sites} "
            f"sites of {ranks_per_site} ranks, got {count}"
        )
    shape = (num_sites, replicas, ranks_per_site // replicas)
    return init_device_mesh(device_type, shape, mesh_dim_names=AXES)


class SiteRanks:
    """The ranks of one site and their collectives. A site of one rank sends nothing.

    rank, size: this rank and the number of ranks. site, num_sites: the same of sites. expert_ranks:
    how many ranks share the experts; ranks that are equal modulo that number hold the same experts.
    """

    def __init__(self, mesh: DeviceMesh | None = None, num_sites: int = 1, site: int = 0) -> None:
        """`mesh`: has the axis "expert" and may have "site" and "replica", in the order of `AXES`;
        None = one rank. A collective of all processes.

        Raises TypeError or ValueError for another mesh, and if this process is not at site `site`
        of `num_sites` in it.
        """
        self.rank, self.size, self.expert_ranks = 0, 1, 1
        self.num_sites, self.site = num_sites, site
        self.across: Any = None
        """The process group of the ranks with this number at all sites."""
        self._groups: dict[str, Any] = {}
        if mesh is None:
            self.across = dist.group.WORLD if num_sites > 1 else None
            return
        if not isinstance(mesh, DeviceMesh):
            raise TypeError(f"mesh must be a DeviceMesh, got {type(mesh).__name__}")
        names = mesh.mesh_dim_names or ()
        if list(names) != [axis for axis in AXES if axis in names] or "expert" not in names:
            raise ValueError(f"mesh must have axes of {AXES}, in this order, got {names}")
        places = mesh.get_coordinate()
        if places is None:
            raise ValueError(f"mesh must hold this process, got {mesh}")
        of_sites = mesh.mesh if names[0] == "site" else mesh.mesh.unsqueeze(0)
        self.expert_ranks = of_sites.shape[-1]
        of_sites = of_sites.reshape(of_sites.shape[0], -1)
        if of_sites.flatten().tolist() != list(range(dist.get_world_size())):
            raise ValueError(f"mesh must hold all processes in order, got {mesh}")
        self.size = of_sites.shape[1]
        found, self.rank = divmod(dist.get_rank(), self.size)
        if (found, len(of_sites)) != (site, num_sites):
            raise ValueError(
                f"mesh must have this process in site {site} of {num_sites}, got site {found} of "
                f"{len(of_sites)}"
            )
        self.across = mesh.get_group("site") if "site" in names else None
        if self.size > 1:
            # A group for each thread that may run collectives: the job and its background thread.
            for thread in ("job", "background"):
                groups = [dist.new_group(row.tolist()) for row in of_sites]
                self._groups[thread] = groups[self.site]

    @property
    def _who(self) -> str:
        """How error messages name a rank of this site, before its number."""
        return f"site {self.site}, rank"

    @property
    def leads(self) -> bool:
        """Whether this rank is the leader of the site."""
        return self.rank == 0

    def holders(self, expert_rank: int) -> tuple[int, ...]:
        """The ranks that hold the same experts as rank `expert_rank` of the axis "expert"."""
        return tuple(range(expert_rank, self.size, self.expert_ranks))

    def gather(self, value: Any, thread: str = "job") -> list[Any]:
        """The values of all ranks, by rank; a collective. Values: see `messages.gather_objects`."""
        return messages.gather_objects(value, self.size, self._groups.get(thread), self._who)

    def tell(self, value: Callable[[], Any], thread: str = "job") -> Any:
        """Calls `value` on the leader only and returns its result on all ranks; a collective.

        If it raises there, the leader ends and the other ranks notice the lost connection. Values:
        see `messages.gather_objects`.
        """
        if self.size == 1:
            return value()
        own = value() if self.leads else None
        return messages.broadcast(own, self.leads, self._groups[thread], f"{self._who} 0")

    def first(self, text: str, thread: str = "job") -> str:
        """The first text of any rank that is not empty, else an empty one; a collective."""
        return next((t for t in self.gather(text, thread) if t), "")

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sums a tensor over the ranks in place; a collective."""
        if self.size > 1:
            dist.all_reduce(tensor, group=self._groups["job"])
        return tensor

    def broadcast_(self, tensor: Tensor, rank: int) -> Tensor:
        """Copies the tensor of `rank` to all ranks, in place; a collective."""
        if self.size > 1:
            dist.broadcast(tensor, group=self._groups["job"], group_src=rank)
        return tensor

    def swap(self, sent: Tensor, coming: Sequence[int], going: Sequence[int]) -> Tensor:
        """Sends going[r] elements of flat `sent` to rank r and returns the coming[r] received from
        each, in order of ranks; a collective."""
        out = sent.new_empty(sum(coming))
        if self.size > 1:
            dist.all_to_all_single(out, sent, list(coming), list(going), group=self._groups["job"])
        return out


def whole(tensor: Tensor) -> Tensor:
    """The whole tensor, detached; for a DTensor a collective of its ranks."""
    tensor = tensor.detach()
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def put_whole(target: Tensor, value: Tensor) -> None:
    """Copies a plain tensor of the same shape into a tensor, in place; no collective.

    Raises ValueError for a DTensor that is neither replicated nor sharded by rows over one axis.
    """
    first, here = rows_here(target)
    here.copy_(value[first : first + len(here)] if is_sharded(target) else value)


def rows_here(tensor: Tensor) -> tuple[int, Tensor]:
    """The index of the first row of a tensor that this rank holds, and the rows, as a view.

    Raises ValueError for a DTensor that is neither replicated nor sharded by rows over one axis.
    """
    if not is_sharded(tensor):
        return 0, tensor.detach()
    mesh, placements = tensor.device_mesh, tensor.placements  # type: ignore[attr-defined]
    if len(placements) != 1 or not (placements[0].is_shard(0) or placements[0].is_replicate()):
        raise ValueError(f"target must be sharded by rows, got {placements}")
    if placements[0].is_replicate():
        return 0, local_tensor(tensor)
    each = -(-tensor.shape[0] // mesh.size())
    return min(tensor.shape[0], mesh.get_local_rank() * each), local_tensor(tensor)


def local_tensor(tensor: Tensor) -> Tensor:
    """The part of a tensor on this rank, detached: all of it unless it is a DTensor."""
    from torch.distributed.tensor import DTensor

    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor."""
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)
