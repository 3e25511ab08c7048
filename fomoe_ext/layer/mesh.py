"""A site of many ranks: the mesh of all processes, and how the ranks of one site speak together.

Process site * ranks_per_site + replica * expert_ranks + expert_rank is at place (site, replica,
expert_rank) of the mesh, whose axes are called "site", "replica" and "expert". Along "expert" a
site's resident experts are shared out (`fomoe_ext.layer.dispatch`), along "replica" that is
repeated for more data, and the slow link is between the places along "site".
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

    Raises ValueError for impossible sizes, RuntimeError when torch.distributed has not so many
    processes.
    """
    at_least(1, num_sites=num_sites, ranks_per_site=ranks_per_site, replicas=replicas)
    if ranks_per_site % replicas:
        raise ValueError(f"replicas must divide ranks_per_site = {ranks_per_site}, got {replicas}")
    count = dist.get_world_size() if dist.is_initialized() else 1
    if count != num_sites * ranks_per_site:
        raise RuntimeError(
            f"a mesh of {num_sites} sites of {ranks_per_site} ranks needs "
            f"{num_sites * ranks_per_site} processes in torch.distributed, there are {count}"
        )
    shape = (num_sites, replicas, ranks_per_site // replicas)
    return init_device_mesh(device_type, shape, mesh_dim_names=AXES)


class SiteRanks:
    """The ranks of one site. With one rank nothing is sent, and every answer is its own.

    rank, size: this one's place and their number. site, num_sites. expert_ranks: how many share out
    the experts; ranks that are equal modulo that hold the same ones.
    """

    def __init__(self, mesh: DeviceMesh | None = None, num_sites: int = 1, site: int = 0) -> None:
        """`mesh`: with an axis "expert", and "site" and "replica" where there are these, in this
        order; None = one rank. A collective of all processes.

        Raises TypeError or ValueError for another mesh, or one in which this is not site `site` of
        `num_sites`.
        """
        self.rank, self.size, self.expert_ranks = 0, 1, 1
        self.num_sites, self.site = num_sites, site
        self.across: Any = None
        """The process group of this rank of all sites."""
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
                f"mesh must have this process in site {site} of {num_sites}, it has it in site "
                f"{found} of {len(of_sites)}"
            )
        self.across = mesh.get_group("site") if "site" in names else None
        if self.size > 1:
            # Two threads of a process may speak at once: one of the job, one behind its steps.
            for thread in ("job", "background"):
                groups = [dist.new_group(row.tolist()) for row in of_sites]
                self._groups[thread] = groups[self.site]

    @property
    def _who(self) -> str:
        """What messages call this site's ranks, before their number."""
        return f"site {self.site}, rank"

    @property
    def leads(self) -> bool:
        """Whether this rank speaks for the site."""
        return self.rank == 0

    def holders(self, expert_rank: int) -> tuple[int, ...]:
        """The ranks that hold what rank `expert_rank` of the axis "expert" holds."""
        return tuple(range(expert_rank, self.size, self.expert_ranks))

    def gather(self, value: Any, thread: str = "job") -> list[Any]:
        """What every rank passed, by rank; a collective. Values: see `messages.gather_objects`."""
        return messages.gather_objects(value, self.size, self._groups.get(thread), self._who)

    def tell(self, value: Callable[[], Any], thread: str = "job") -> Any:
        """What `value` returns on the leader, where alone it is called; a collective.

        An error there ends the leader, and the others learn that it is gone. Values: see
        `messages.gather_objects`.
        """
        if self.size == 1:
            return value()
        own = value() if self.leads else None
        return messages.broadcast(own, self.leads, self._groups[thread], f"{self._who} 0")

    def first(self, text: str, thread: str = "job") -> str:
        """The first text that is not empty, or an empty one; a collective."""
        return next((t for t in self.gather(text, thread) if t), "")

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sums a tensor over the ranks in place; a collective."""
        if self.size > 1:
            dist.all_reduce(tensor, group=self._groups["job"])
        return tensor

    def broadcast_(self, tensor: Tensor, rank: int) -> Tensor:
        """Gives all ranks what `rank` has, in place; a collective."""
        if self.size > 1:
            dist.broadcast(tensor, group=self._groups["job"], group_src=rank)
        return tensor

    def swap(self, sent: Tensor, coming: Sequence[int], going: Sequence[int]) -> Tensor:
        """going[r] elements of flat `sent` go to rank r; those that come, in order of ranks."""
        out = sent.new_empty(sum(coming))
        if self.size > 1:
            dist.all_to_all_single(out, sent, list(coming), list(going), group=self._groups["job"])
        return out


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, detached; of a DTensor, a collective of its ranks."""
    tensor = tensor.detach()
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def put_whole(target: Tensor, value: Tensor) -> None:
    """Copies a plain tensor of the same shape into a tensor, in place; no collective.

    Raises ValueError for a DTensor that is not sharded by rows over one axis, or replicated.
    """
    first, here = rows_here(target)
    here.copy_(value[first : first + len(here)] if is_sharded(target) else value)


def rows_here(tensor: Tensor) -> tuple[int, Tensor]:
    """The first of the rows that this rank holds of a tensor, and these rows, which share its
    memory.

    Raises ValueError for a DTensor that is not sharded by rows over one axis, or replicated.
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
    """What this rank holds of a tensor: the local part of a DTensor, else all of it; detached."""
    from torch.distributed.tensor import DTensor

    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor."""
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)
