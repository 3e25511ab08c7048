"""Dispatch inside a site of many ranks: rows travel to the rank that holds their expert, and back.

The ranks of the axis "expert" of a `DeviceMesh` share the site's resident experts: in equal chunks
ascending by id, or as `rank_experts` says, e.g. with busy experts on different ranks
(`fomoe_ext.placement.spread`). A rank allocates only its own experts and has tokens of its own.

Slots are compacted before the exchange, so skipped slots are never sent. The numbers of rows are
sent first, and the shared expert is computed meanwhile; the rows follow in one all_to_all_single of
uneven parts. Every rank gets the outputs that one process with all of the site's experts would
give. No row is padded or dropped (unlike with a capacity, GShard, arXiv 2006.16668).

**Gradients.** Each rank calls backward on its own loss. After that

* the gradient of an expert is complete: the sum over the ranks of the axis "expert" divided by
  their number, which is the gradient of their mean loss. Do not reduce it over that axis again;
* every other gradient is that of this rank's own loss and must be averaged over all ranks of the
  site: by DDP or FSDP, told to ignore the experts (`sharded_names`, `sharded_parameters`), or by
  `average_dense`.

With an additional axis "replica" every replica holds each expert once, and `average_replicas`
averages the experts' gradients over that axis. Then all gradients are those of the mean loss over
the site's ranks.

All ranks of the axis must run the same forward and backward passes in the same order, also ranks
without tokens. The forward pass compares what the ranks call and raises on all of them where they
differ. Results do not depend on timing: every run gives the same bits.

Shapes use the letters of `fomoe_ext.layer.moe`.
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
# What all ranks must agree on in a pass; sent before the numbers of rows.
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
    """The ranks that share a site's experts. Copies of a layer have the same one."""

    def __init__(self, mesh: DeviceMesh, device: torch.device | str | None = None) -> None:
        """The axis "expert" of a mesh that holds this process.

        Raises TypeError unless `mesh` is a DeviceMesh, and ValueError if it lacks that axis or this
        process, or is for another type of device than `device` (None = torch's default).
        """
        if not isinstance(mesh, DeviceMesh):
            raise TypeError(f"mesh must be a DeviceMesh, got {type(mesh).__name__}")
        self.group = _axis_of(mesh, AXIS)
        kind = torch.device(torch.get_default_device() if device is None else device).type
        if kind not in ("meta", mesh.device_type):
            raise ValueError(
                f"mesh must be for {kind}, the device of the layer, got {mesh.device_type}"
            )
        self.rank: int = mesh.get_local_rank(AXIS)
        self.size: int = self.group.size()

    def __deepcopy__(self, memo: dict[int, Any]) -> ExpertAxis:
        return self

    def __reduce__(self) -> Any:
        raise TypeError(
            "a layer sharded over a mesh cannot be pickled, because its connections belong to this "
            "process; save its state_dict"
        )


def _hash(value: Any) -> int:
    """31 bits, so that it fits an int32."""
    return zlib.crc32(repr(value).encode()) >> 1


def _axis_of(mesh: DeviceMesh, name: str) -> dist.ProcessGroup:
    names = mesh.mesh_dim_names or ()
    if name not in names:
        has = ", ".join(map(repr, names)) or "none with a name"
        raise ValueError(f"mesh must have an axis {name!r}, got {has}")
    if mesh.get_coordinate() is None:
        raise ValueError(f"mesh must hold this process, rank {dist.get_rank()}, got {mesh}")
    return mesh.get_group(name)


def _checked_ranks(
    rank_experts: Sequence[Sequence[int]] | None, site: Sequence[int], ranks: int
) -> tuple[tuple[int, ...], ...]:
    """The experts of each rank, ascending; None = equal chunks. Raises as `Dispatch` does."""
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
    """The site's resident experts, which rank holds which, and the exchange of their rows.

    rank_experts: for each rank the ids that it holds, ascending. own_experts: those of this rank.
    resident_index: an expert's place in the order of the ranks, by which rows are grouped.
    `resident_experts` and `resident_ids` are ascending by id. bytes_sent: bytes that this rank has
    sent to others since the layer was built, by kind of row (`DIRECTIONS`), and of the numbers of
    rows ("counts").
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
        """`site_experts`: ids resident at the site. `rank_experts`: for each rank the ids that it
        holds, as many as it likes; None = equal chunks. Both must be the same on all ranks.

        Raises ValueError for ids out of range, and unless `rank_experts` has an entry for each rank
        and each of the site's experts exactly once; TypeError for ids that are no ints.
        """
        super().__init__(site_experts, num_experts, device, "site_experts")
        self.axis = axis
        self.rank_experts = _checked_ranks(rank_experts, self.resident_experts, axis.size)
        self._tables = self._make_tables(device)
        self.own_experts = self.rank_experts[axis.rank]
        sizes = (num_experts, hidden_size, self.resident_experts)
        self._identity = (layer_index, _hash(sizes), _hash(self.rank_experts))
        # The message has room for as many counts as any rank at any site may have experts.
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
        """A `Compute`: the sum over each token's slots on the site's experts.

        On a GPU this waits for the device once, because torch needs the numbers of rows on the
        host. torch.compile does not trace it: the graph breaks around it.

        Args:
            x: this rank's tokens [T, D].
            weights: combine weights, fp32 [T, K].
            chosen: experts of the tokens' slots, int32 [T, K].
            experts: called like `Experts` exactly once, also for no rows: with rows [M, D], weights
                of one [M, 1], the place of each row's expert among this rank's experts int32
                [M, 1], and the index int32 [R] 0, 1, ... R - 1. It returns results [M, D] and a row
                table.
            meanwhile: called while the numbers of rows travel.

        Raises RuntimeError on all ranks if they do not make the same call.
        """
        exchange = self._start(x, chosen, experts)
        beside = meanwhile()
        y_TD, rows_here = self._finish(exchange, x, weights, experts)
        return Computed(y_TD, beside, exchange.table.offsets, rows_here)

    @torch.compiler.disable
    def _start(self, x_TD: Tensor, chosen_TK: Tensor, experts: nn.Module) -> _Exchange:
        """Compacts the slots and sends the numbers of their rows."""
        of_x = torch.is_grad_enabled() and x_TD.requires_grad
        of_experts = any(p.requires_grad for p in experts.parameters())
        traits = (_DTYPES.index(x_TD.dtype), of_x, torch.is_grad_enabled() and of_experts)
        self.tables_to(x_TD.device)
        table = ops.compact(chosen_TK, self.resident_index, self.num_resident, tile_rows=0)
        return _Exchange(self, table, [*self._identity, *map(int, traits)], self._places)

    @torch.compiler.disable
    def _finish(
        self, exchange: _Exchange, x_TD: Tensor, weights_TK: Tensor, experts: nn.Module
    ) -> tuple[Tensor, Tensor]:
        """Exchanges and computes the rows; y [T, D] and the number of rows computed here."""
        counts = exchange.wait()[:, : len(self.own_experts)]  # [ranks, R]
        x_MD = _ToExperts.apply(x_TD, exchange)
        # Rows come by rank and then by expert: the order of `counts` read row by row.
        index_R = torch.arange(counts.shape[1], dtype=torch.int32, device=x_TD.device)
        places = index_R.repeat(self.axis.size)
        places_M = places.repeat_interleave(counts.reshape(-1), output_size=x_MD.shape[0])
        ones_M1 = x_MD.new_ones((x_MD.shape[0], 1), dtype=torch.float32)
        y_MD, table = experts(x_MD, ones_M1, places_M.view(-1, 1), index_R)
        y_TD = ops.combine(_ToTokens.apply(y_MD, exchange), weights_TK, exchange.table)
        return y_TD, table.offsets

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

    Raises as `ExpertAxis` and `Dispatch` do, and ValueError for `rank_experts` without a mesh.
    """
    if mesh is None:
        if rank_experts is not None:
            raise ValueError(f"rank_experts must be None without a mesh, got {rank_experts!r}")
        return None
    axis = ExpertAxis(mesh, device)
    if axis.size == 1:
        _checked_ranks(rank_experts, resident_ids(site_experts, num_experts), axis.size)
        return None
    return Dispatch(axis, site_experts, num_experts, hidden_size, layer_index, device, rank_experts)


class _Exchange:
    """The exchange of one pass.

    table: this rank's rows, grouped by expert in the order of the ranks. sent, received: rows that
    go to and come from each rank, known after `wait`.
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
        # Neighbouring ranks with equally many experts in one copy: equal chunks need two at most.
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
        """int32 [ranks, places]: the rows that each rank has for each of this rank's experts.

        Raises RuntimeError on all ranks if they do not make the same call.
        """
        self._work.wait()
        width = len(_HEADER)
        counts = self._answer[:, width:]
        sums = [part.sum(1, keepdim=True) for part in (self._message[:, width:], counts)]
        # Only here the host waits for the device.
        *headers, sent, received = torch.cat([self._answer[:, :width], *sums], 1).t().tolist()
        for name, values in zip(_HEADER, headers, strict=True):
            if len(set(values)) > 1:
                raise RuntimeError(
                    f"the ranks of the mesh's axis {AXIS!r} must make the same calls of the same "
                    f"layers, but in layer {headers[0][self.dispatch.axis.rank]} they differ in "
                    f"{name}, by rank: {values}"
                )
        self.sent, self.received = sent, received
        del self._work, self._message, self._answer  # not needed by the backward pass
        return counts

    def to_experts(self, rows: Tensor, direction: str) -> Tensor:
        """Rows of this rank's tokens [.., D], grouped by rank -> rows for its experts [M, D]."""
        out = rows.new_empty(sum(self.received), rows.shape[1])
        self._swap(out, rows[: sum(self.sent)], self.received, self.sent, direction)
        return out

    def to_tokens(self, rows: Tensor, direction: str) -> Tensor:
        """[M, D] in the order of `to_experts` -> [T*K, D], rows in the places of the table. Memory
        past the last row is not written.
        """
        out = rows.new_empty(self.table.row_of_slot.numel(), rows.shape[1])
        self._swap(out[: sum(self.sent)], rows, self.sent, self.received, direction)
        return out

    def _swap(
        self, out: Tensor, rows: Tensor, coming: list[int], going: list[int], direction: str
    ) -> None:
        axis = self.dispatch.axis
        # Sent as bytes, because not every backend supports every dtype.
        there, here = out.view(torch.uint8), rows.contiguous().view(torch.uint8)
        dist.all_to_all_single(there, here, coming, going, group=axis.group)
        self.dispatch.bytes_sent[direction] += (sum(going) - going[axis.rank]) * here.shape[1]


class _ToExperts(torch.autograd.Function):
    """Tokens [T, D] -> the rows [M, D] of all ranks for the experts of this one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, exchange: _Exchange) -> Tensor:
        ctx.exchange = exchange
        table = exchange.table
        rows = _ops.gather(x=x, row_of_slot=table.row_of_slot, offsets=table.offsets)
        return exchange.to_experts(rows, "tokens")

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        exchange = ctx.exchange
        rows = exchange.to_tokens(grad, "token gradients")
        # Experts got gradients divided by the number of ranks; this rank's tokens get the full one.
        grad_x = _ops.combine(rows=rows, weights=None, row_of_slot=exchange.table.row_of_slot)
        return grad_x.mul_(exchange.dispatch.axis.size), None


class _ToTokens(torch.autograd.Function):
    """Results [M, D] -> those of this rank's rows [T*K, D], in the places of the table."""

    @staticmethod
    def forward(ctx: Any, results: Tensor, exchange: _Exchange) -> Tensor:
        ctx.exchange = exchange
        return exchange.to_tokens(results, "results")

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        exchange = ctx.exchange
        rows = exchange.to_experts(grad, "result gradients")
        return rows.div_(exchange.dispatch.axis.size), None


# ---- gradients of a whole site -------------------------------------------------------------------


def _sharded(model: nn.Module) -> list[tuple[str, nn.Module]]:
    return [
        (f"{name}.experts." if name else "experts.", module.experts)
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(getattr(module, "dispatch", None), Dispatch)
    ]


def sharded_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """By name, the parameters of experts that the ranks of a site share. Tell FSDP to ignore them:
    `ignored_params=set(sharded_parameters(model).values())`.
    """
    return {
        prefix + name: parameter
        for prefix, experts in _sharded(model)
        for name, parameter in experts.named_parameters()
    }


def sharded_names(model: nn.Module) -> list[str]:
    """Names of the `sharded_parameters` and of buffers that differ between ranks.

    Tell DDP to ignore them, before it wraps the model:
    `model._ddp_params_and_buffers_to_ignore = sharded_names(model)`.
    """
    buffers = [
        prefix + name for prefix, experts in _sharded(model) for name, _ in experts.named_buffers()
    ]
    return [*sharded_parameters(model), *buffers]


def average_replicas(model: nn.Module, mesh: DeviceMesh) -> None:
    """Averages the gradients of sharded experts over the mesh's axis "replica", in place.

    All ranks must call it after the backward pass. If a parameter has a `main_grad`, that is
    averaged. A missing gradient counts as zeros. Raises ValueError if the mesh lacks that axis.
    """
    average_gradients(sharded_parameters(model), [_axis_of(mesh, REPLICA)])


def average_dense(model: nn.Module, mesh: DeviceMesh) -> None:
    """Averages all gradients except those of sharded experts, as DDP would: in place, over the axis
    "expert" and, if the mesh has it, "replica". Otherwise as `average_replicas`.
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

    A missing gradient counts as zeros. All ranks of the groups must call it.
    """
    grads = [_gradient(p) for p in parameters.values() if p.requires_grad and p.numel()]
    sums = [grad.float() for grad in grads]  # a copy unless the gradient is fp32
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
