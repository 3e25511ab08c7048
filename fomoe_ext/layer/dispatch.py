"""Dispatch inside a site of many ranks: rows travel to the rank that holds their expert, and back.

The site's resident experts are shared out over the ranks of the axis "expert" of a `DeviceMesh`: in
chunks ascending by id, or as `rank_experts` says, e.g. hot experts apart
(`fomoe_ext.placement.spread`). A rank allocates only its own experts and has tokens of its own.
Slots are compacted before the exchange, so that a skipped slot never travels; the numbers of rows
go ahead, while the shared expert is computed, and the rows follow by one all_to_all_single of
uneven parts. Every rank's outputs are those of one process with all of the site's experts, and of
an expert's rows none is padded or dropped (as with a capacity, GShard, arXiv 2006.16668).

**Gradients.** Each rank takes the gradient of its own loss. After the backward pass

* an expert's gradient is the sum over the ranks of the axis "expert" divided by their number: that
  of the mean of their losses, complete, to be reduced over that axis no further;
* every other gradient is that of this rank's own loss, to be averaged over all ranks of the site:
  by DDP or FSDP, which must leave the experts alone (`sharded_names`, `sharded_parameters`), or by
  `average_dense`.

With an axis "replica" beside it an expert is held once per replica: `average_replicas` averages its
gradients over these. Then all are gradients of the mean loss over the site's ranks.

All ranks of the axis must run the same passes in the same order, those without tokens too, and take
the backward of the same ones. What differs is found in the forward pass, where it can be, and
raised on all of them. Nothing here depends on which rank is faster: the same bits on every run.
"""

from __future__ import annotations

import operator
import zlib
from collections.abc import Mapping, Sequence
from itertools import chain, groupby
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from fomoe_ext import ops
from fomoe_ext.layer.compute import Computed, Meanwhile
from fomoe_ext.layer.residents import Residents, resident_ids
from fomoe_ext.placement.spread import spread_experts

AXIS, REPLICA = "expert", "replica"
DIRECTIONS = ("tokens", "results", "result gradients", "token gradients")

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# What all ranks must agree on in a pass; sent ahead of the numbers of rows.
_HEADER = (
    "layer_index",
    "site's experts and sizes",
    "rank_experts",
    "dtype",
    "gradient of x",
    "gradient of the experts",
)
_ops = torch.ops.fomoe


class ExpertAxis:
    """The ranks over which a site's experts are cut. Copies of a layer share it."""

    def __init__(self, mesh: DeviceMesh, device: torch.device | str | None = None) -> None:
        """The axis "expert" of a mesh that holds this process.

        Raises TypeError for another mesh, ValueError where it has no such axis, does not hold this
        process, or is of another type of device than `device` (None = torch's default).
        """
        if not isinstance(mesh, DeviceMesh):
            raise TypeError(f"mesh must be a DeviceMesh, got {type(mesh).__name__}")
        self.group = _axis_of(mesh, AXIS)
        kind = torch.device(torch.get_default_device() if device is None else device).type
        if kind not in ("meta", mesh.device_type):
            raise ValueError(f"mesh must be of {kind} as the layer, got one of {mesh.device_type}")
        self.rank: int = mesh.get_local_rank(AXIS)
        self.size: int = self.group.size()

    def __deepcopy__(self, memo: dict[int, Any]) -> ExpertAxis:
        return self

    def __reduce__(self) -> Any:
        raise TypeError(
            "a layer sharded over a mesh cannot be pickled: its connections are of this process; "
            "save its state_dict"
        )


def _hash(value: Any) -> int:
    """Of 31 bits: goes into an int32."""
    return zlib.crc32(repr(value).encode()) >> 1


def _axis_of(mesh: DeviceMesh, name: str) -> dist.ProcessGroup:
    names = mesh.mesh_dim_names or ()
    if name not in names:
        has = ", ".join(map(repr, names)) or "none with a name"
        raise ValueError(f"mesh must have an axis {name!r}, its axes are: {has}")
    if mesh.get_coordinate() is None:
        raise ValueError(f"mesh must hold this process, rank {dist.get_rank()}, got {mesh}")
    return mesh.get_group(name)


def _checked_ranks(
    rank_experts: Sequence[Sequence[int]] | None, site: Sequence[int], ranks: int
) -> tuple[tuple[int, ...], ...]:
    """By rank its experts, ascending; None = chunks. Raises as `Dispatch` does."""
    if rank_experts is None:
        return spread_experts(site, ranks)
    try:
        parts = [sorted(operator.index(expert) for expert in part) for part in rank_experts]
    except TypeError:
        raise TypeError(f"rank_experts must hold ints by rank, got {rank_experts!r}") from None
    if len(parts) != ranks:
        raise ValueError(
            f"rank_experts must have an entry for each rank of the mesh's axis {AXIS!r}, {ranks}, "
            f"got {len(parts)}"
        )
    if sorted(chain(*parts)) != list(site):
        raise ValueError(
            f"rank_experts must hold each of the site's experts {list(site)} once, got {parts}"
        )
    return tuple(map(tuple, parts))


class Dispatch(Residents):
    """The site's resident experts, which ranks hold them, and the exchange of their rows.

    rank_experts: by rank the ids that it holds, ascending. own_experts: those of this rank.
    resident_index: an expert's place when all are in the order of the ranks, by which rows are
    grouped; `resident_experts` and `resident_ids` are ascending. bytes_sent: bytes of rows that
    this rank has sent to others since the layer was made, by direction (`DIRECTIONS`), and of what
    went ahead of them ("counts").
    """

    rank_experts: tuple[tuple[int, ...], ...] = ()

    def __init__(
        self,
        axis: ExpertAxis,
        site_experts: Sequence[int],
        num_experts: int,
        hidden_size: int,
        layer_index: int = 0,
        device: torch.device | str | None = None,
        rank_experts: Sequence[Sequence[int]] | None = None,
    ) -> None:
        """`site_experts`: ids resident in the site; `rank_experts`: by rank those that it holds, in
        any numbers, None = chunks. Both are the same on all ranks.

        Raises ValueError for ids out of range, and where `rank_experts` has not an entry for each
        rank or does not hold each of the site's experts once; TypeError for other than ints.
        """
        super().__init__(site_experts, num_experts, device, "site_experts")
        self.axis = axis
        self.rank_experts = _checked_ranks(rank_experts, self.resident_experts, axis.size)
        self._tables = self._make_tables(device)
        self.own_experts = self.rank_experts[axis.rank]
        sizes = (num_experts, hidden_size, self.resident_experts)
        self._identity = (layer_index, _hash(sizes), _hash(self.rank_experts))
        # As many as any rank may have: room for the message of any site and any share.
        self._places = num_experts
        self.bytes_sent = dict.fromkeys((*DIRECTIONS, "counts"), 0)

    def _in_order(self) -> Sequence[int]:
        return tuple(chain(*self.rank_experts))

    def forward(
        self,
        x: Tensor,
        weights: Tensor,
        chosen: Tensor,
        experts: nn.Module,
        meanwhile: Meanwhile = lambda: None,
    ) -> Computed:
        """A `Compute`: each token's slots on the site's experts, and what is computed meanwhile.

        On a GPU this waits once for the device, as torch wants the numbers of rows on the host.
        torch.compile leaves it as it is, between two graphs.

        Args:
            x: this rank's tokens [T, D].
            weights: fp32 [T, K].
            chosen: experts of the tokens' slots, int32 [T, K].
            experts: as `Experts` of this rank's experts: called once, also for no rows, with rows
                [N, D], weights of one [N, 1], places of their experts among this rank's int32
                [N, 1] and the table int32 of all these places, 0 to their number; returns results
                [N, D] and a row table.
            meanwhile: computed while numbers of rows travel.

        Raises RuntimeError on all ranks where they do not call the same layer alike.
        """
        exchange = self.start(x, chosen, experts)
        beside = meanwhile()
        y, rows_here = self.finish(exchange, x, weights, experts)
        return Computed(y, beside, exchange.table.offsets[-1].clone(), rows_here)

    @torch.compiler.disable
    def start(self, x: Tensor, chosen: Tensor, experts: nn.Module) -> Exchange:
        """Compacts the slots and sends their numbers ahead; as `forward`."""
        of_x = torch.is_grad_enabled() and x.requires_grad
        of_experts = any(p.requires_grad for p in experts.parameters())
        traits = (_DTYPES.index(x.dtype), of_x, torch.is_grad_enabled() and of_experts)
        self.tables_to(x.device)
        table = ops.compact(chosen, self.resident_index, self.num_resident, tile_rows=0)
        return Exchange(self, table, [*self._identity, *map(int, traits)], self._places)

    @torch.compiler.disable
    def finish(
        self, exchange: Exchange, x: Tensor, weights: Tensor, experts: nn.Module
    ) -> tuple[Tensor, Tensor]:
        """The exchange of the rows; y [T, D] and the number computed here. As `forward`."""
        counts = exchange.wait()[:, : len(self.own_experts)]
        received = _ToExperts.apply(x, exchange)
        # By place among this rank's experts, from tables that are the same on all ranks.
        own = torch.arange(counts.shape[1], dtype=torch.int32, device=x.device)
        rows = own.repeat(self.axis.size)
        rows = rows.repeat_interleave(counts.reshape(-1), output_size=received.shape[0])
        ones = received.new_ones((received.shape[0], 1), dtype=torch.float32)
        results, table = experts(received, ones, rows.view(-1, 1), own)
        y = ops.combine(_ToTokens.apply(results, exchange), weights, exchange.table)
        return y, table.offsets[-1].clone()

    def extra_repr(self) -> str:
        held = f"{len(self.own_experts)} of {self.num_resident} experts"
        return f"rank {self.axis.rank} of {self.axis.size} holds {held}"


def make_dispatch(
    mesh: DeviceMesh | None,
    site_experts: Sequence[int],
    num_experts: int,
    hidden_size: int,
    layer_index: int = 0,
    device: torch.device | str | None = None,
    rank_experts: Sequence[Sequence[int]] | None = None,
) -> Dispatch | None:
    """A `Dispatch` over the mesh's axis "expert"; None without a mesh or with one rank.

    Raises TypeError or ValueError for a wrong mesh, and for `rank_experts` without one or other
    than `Dispatch` wants them.
    """
    if mesh is None:
        if rank_experts is not None:
            raise ValueError(f"rank_experts needs a mesh, got {rank_experts!r} without one")
        return None
    axis = ExpertAxis(mesh, device)
    if axis.size == 1:
        _checked_ranks(rank_experts, resident_ids(site_experts, num_experts), axis.size)
        return None
    return Dispatch(axis, site_experts, num_experts, hidden_size, layer_index, device, rank_experts)


class Exchange:
    """Of one pass: the table of this rank's rows, grouped by expert of the site and so by rank, and
    how many rows go to and come from each rank.
    """

    def __init__(
        self, dispatch: Dispatch, table: ops.RowTable, header: list[int], places: int
    ) -> None:
        self.dispatch, self.table = dispatch, table
        self.sent: list[int] = []
        self.received: list[int] = []
        ranks, width = dispatch.axis.size, len(header)
        counts = table.offsets.diff()
        self._message = counts.new_zeros(ranks, width + places)
        self._message[:, :width] = torch.tensor(header, dtype=torch.int32, device="cpu")
        # Neighbours with as many experts at once: of chunks there are two such parts.
        rank = place = 0
        for size, alike in groupby(map(len, dispatch.rank_experts)):
            number = len(list(alike))
            some = counts[place : place + number * size].view(number, size)
            self._message[rank : rank + number, width : width + size] = some
            rank, place = rank + number, place + number * size
        self._answer = torch.empty_like(self._message)
        group = dispatch.axis.group
        dispatch.bytes_sent["counts"] += self._message[1:].nbytes
        self._work = dist.all_to_all_single(self._answer, self._message, group=group, async_op=True)

    def wait(self) -> Tensor:
        """What came: int32 [ranks, places], rows of each rank for each of this rank's experts.

        Raises RuntimeError, on all ranks, where they differ in what they call.
        """
        self._work.wait()
        width = len(_HEADER)
        counts = self._answer[:, width:]
        sums = [part.sum(1, keepdim=True) for part in (self._message[:, width:], counts)]
        # The one time that the host waits for the device.
        *headers, sent, received = torch.cat([self._answer[:, :width], *sums], 1).t().tolist()
        for name, values in zip(_HEADER, headers, strict=True):
            if len(set(values)) > 1:
                raise RuntimeError(
                    f"the ranks of the mesh's axis {AXIS!r} must call the same layers alike, but "
                    f"in layer {headers[0][self.dispatch.axis.rank]} they differ in {name}: by "
                    f"rank {values}"
                )
        self.sent, self.received = sent, received
        del self._work, self._message, self._answer  # the backward pass needs numbers alone
        return counts

    def there(self, rows: Tensor, direction: str) -> Tensor:
        """[rows of own tokens, D], grouped by rank -> those for the experts of this rank [N, D]."""
        out = rows.new_empty(sum(self.received), rows.shape[1])
        self._swap(out, rows[: sum(self.sent)], self.received, self.sent, direction)
        return out

    def back(self, rows: Tensor, direction: str) -> Tensor:
        """[N, D] as `there` returned them -> [T*K, D], rows in the places of the table; what comes
        after the last row is left as it was in memory.
        """
        out = rows.new_empty(self.table.row_of_slot.numel(), rows.shape[1])
        self._swap(out[: sum(self.sent)], rows, self.sent, self.received, direction)
        return out

    def _swap(
        self, out: Tensor, rows: Tensor, coming: list[int], going: list[int], direction: str
    ) -> None:
        axis = self.dispatch.axis
        # As bytes: not every backend knows every dtype.
        there, here = out.view(torch.uint8), rows.contiguous().view(torch.uint8)
        dist.all_to_all_single(there, here, coming, going, group=axis.group)
        self.dispatch.bytes_sent[direction] += (sum(going) - going[axis.rank]) * here.shape[1]


class _ToExperts(torch.autograd.Function):
    """Tokens [T, D] -> the rows [N, D] of all ranks for the experts of this one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        table = exchange.table
        rows = _ops.gather(x=x, row_of_slot=table.row_of_slot, offsets=table.offsets)
        return exchange.there(rows, "tokens")

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        exchange = ctx.exchange
        rows = exchange.back(grad, "token gradients")
        # The division by which experts got the gradient of a mean is not for this rank's tokens.
        grad_x = _ops.combine(rows=rows, weights=None, row_of_slot=exchange.table.row_of_slot)
        return grad_x.mul_(exchange.dispatch.axis.size), None


class _ToTokens(torch.autograd.Function):
    """Results [N, D] -> those of this rank's rows [T*K, D], in the places of the table."""

    @staticmethod
    def forward(ctx: Any, results: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        return exchange.back(results, "results")

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        exchange = ctx.exchange
        rows = exchange.there(grad, "result gradients")
        return rows.div_(exchange.dispatch.axis.size), None


# ---- gradients of a whole site -------------------------------------------------------------------


def _sharded(model: nn.Module) -> list[tuple[str, nn.Module]]:
    return [
        (f"{name}.experts." if name else "experts.", module.experts)
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(getattr(module, "dispatch", None), Dispatch)
    ]


def sharded_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """By name, the parameters of experts that a site's ranks hold in parts. FSDP must leave them
    alone: `ignored_params=set(sharded_parameters(model).values())`.
    """
    return {
        prefix + name: parameter
        for prefix, experts in _sharded(model)
        for name, parameter in experts.named_parameters()
    }


def sharded_names(model: nn.Module) -> list[str]:
    """Names of these parameters and of buffers that differ among ranks, which DDP must leave alone:
    `model._ddp_params_and_buffers_to_ignore = sharded_names(model)` before it wraps the model.
    """
    buffers = [
        prefix + name for prefix, experts in _sharded(model) for name, _ in experts.named_buffers()
    ]
    return [*sharded_parameters(model), *buffers]


def average_replicas(model: nn.Module, mesh: DeviceMesh) -> None:
    """Averages the gradients of sharded experts over the mesh's axis "replica", in place.

    All ranks call it after the backward pass. `main_grad` is averaged where a parameter has it; a
    missing gradient counts as zeros. Raises ValueError where the mesh has no such axis.
    """
    average_gradients(sharded_parameters(model), [_axis_of(mesh, REPLICA)])


def average_dense(model: nn.Module, mesh: DeviceMesh) -> None:
    """Averages all gradients but those of sharded experts over the axes "replica" and "expert" that
    the mesh has, in place: what DDP would do. As `average_replicas`.
    """
    axes = [AXIS, REPLICA] if REPLICA in (mesh.mesh_dim_names or ()) else [AXIS]
    sharded = {id(parameter) for parameter in sharded_parameters(model).values()}
    dense = {n: p for n, p in model.named_parameters() if id(p) not in sharded}
    average_gradients(dense, [_axis_of(mesh, axis) for axis in axes])


@torch.no_grad()
def average_gradients(
    parameters: Mapping[str, nn.Parameter], groups: Sequence[dist.ProcessGroup]
) -> None:
    """Averages gradients in place, in fp32, over one group after the other.

    A missing gradient counts as zeros. All members of the groups must call it.
    """
    grads = [_gradient(p) for p in parameters.values() if p.requires_grad and p.numel()]
    sums = [grad.float() for grad in grads]  # fp32 ones themselves, others as copies
    for group in groups:
        works = [dist.all_reduce(each, group=group, async_op=True) for each in sums]
        for work in works:
            work.wait()
        for each in sums:
            each.div_(group.size())
    for grad, mean in zip(grads, sums, strict=True):
        if mean is not grad:
            grad.copy_(mean)


def _gradient(parameter: nn.Parameter) -> Tensor:
    total = getattr(parameter, "main_grad", None)
    if total is not None:
        return total
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad
