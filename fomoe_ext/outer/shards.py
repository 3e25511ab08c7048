"""How the ranks of a site share a meeting: each meets for some of the site's buckets.

A site lays out its pieces as a single process would (`fomoe_ext.outer.layout`). The buckets of each
layout are assigned to its ranks in turn, and rank r of a site meets rank r of the others. So the
same payloads are sent over the slow link as with one rank per site, each once, and the state of the
outer optimizer is evenly distributed, whichever ranks hold the parameters. Before a meeting a rank
receives the values of its buckets from the ranks that hold them; afterwards it sends them the new
values. Both go over the fast network inside the site, one fp32 per parameter and direction.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from fomoe_ext.layer.mesh import SiteRanks, is_sharded, local_tensor
from fomoe_ext.outer.layout import Layout, Piece
from fomoe_ext.placement import wire
from fomoe_ext.placement.placement import Owners

_AT_ONCE = 1 << 24
"""Elements that the ranks of a site exchange at a time."""

TensorOf = Callable[[Tensor], Tensor]
"""Selects what to exchange of a parameter: itself, its gradient or a moment, of the same shape."""


class Span(NamedTuple):
    """Elements lo..hi-1 of a piece, which `ranks` hold at offset `at` of their flat tensor."""

    lo: int
    hi: int
    ranks: tuple[int, ...]
    at: int


def spans_of(piece: Piece, ranks: SiteRanks) -> list[Span]:
    """Which ranks of the site hold which elements of a piece. Raises ValueError for a DTensor that
    is not sharded by rows (or replicated) over all ranks of the site in order."""
    parameter, row, expert_rank = piece.tensor, piece.row, piece.expert_rank
    everyone = tuple(range(ranks.size))
    count = piece.numel
    if expert_rank is not None:
        assert row is not None
        return [Span(0, count, ranks.holders(expert_rank), row * count)]
    if not is_sharded(parameter):
        return [Span(0, count, everyone, (row or 0) * count)]
    mesh, placements = parameter.device_mesh, parameter.placements  # type: ignore[attr-defined]
    own = [ranks.site * ranks.size + rank for rank in everyone]
    if mesh.mesh.flatten().tolist() != own or len(placements) != 1:
        raise ValueError(f"{piece.key} must be sharded over the ranks {own} of its site alone")
    if placements[0].is_replicate():
        return [Span(0, count, everyone, (row or 0) * count)]
    if not placements[0].is_shard(0):
        raise ValueError(f"{piece.key} must be sharded by rows, got {placements[0]}")
    rows = parameter.shape[0]
    each = -(-rows // ranks.size)
    width = parameter.numel() // rows
    if row is not None:
        return [Span(0, count, (row // each,), row % each * width)]
    edges = [min(rows, each * rank) * width for rank in (*everyone, ranks.size)]
    return [Span(lo, hi, (rank,), 0) for rank, (lo, hi) in enumerate(pairwise(edges)) if hi > lo]


class _Move(NamedTuple):
    """A copy of `count` elements between the vector with which rank `lane` meets for layout `index`
    and the flat tensor of a parameter, which all of `ranks` hold; with the offset in each.
    """

    lane: int
    index: int
    start: int
    count: int
    ranks: tuple[int, ...]
    parameter: Tensor
    at: int


class Lane:
    """This rank's part of a site's layouts.

    layouts: of this rank's buckets alone. Their pieces are parts of the site's pieces; tensors of
    pieces are fp32 and have memory between `hold` and `release` only.
    """

    def __init__(
        self,
        trained: Sequence[Layout],
        biases: Sequence[Layout],
        ranks: SiteRanks,
        bucket_bytes: int,
        turns: Sequence[Owners],
    ) -> None:
        """`trained` and `biases`: the site's layouts of parameters and of selection biases.
        `turns`: owner sets in the order in which their first buckets go round the ranks."""
        self.ranks, self._trained = ranks, len(trained)
        self.layouts: list[Layout] = []
        self.numbers: list[int] = []
        """Which of the site's layouts each is a part of."""
        self._flats: dict[int, Tensor] = {}
        self._moves: dict[int, list[_Move]] = {}
        size = wire.bucket_elements(bucket_bytes)
        for index, layout in enumerate([*trained, *biases]):
            turn = turns.index(layout.group.owners) + layout.fragment
            self._share_out(index, layout, size, turn)

    def _share_out(self, index: int, layout: Layout, size: int, turn: int) -> None:
        ranks, mine = self.ranks, []
        spans = {piece.key: spans_of(piece, ranks) for piece in layout.pieces}
        moves = self._moves.setdefault(layout.fragment, [])
        length = [0] * ranks.size
        for number, start in enumerate(range(0, layout.numel, size)):
            lane = wire.lane_of(number, turn, ranks.size)
            for part in layout.parts(start, min(start + size, layout.numel)):
                piece = part.piece
                for span in spans[piece.key]:
                    lo, hi = max(part.lo, span.lo), min(part.hi, span.hi)
                    if lo < hi:
                        at = span.at + lo - span.lo
                        place = length[lane] + lo - part.lo
                        held = piece.tensor
                        move = _Move(lane, index, place, hi - lo, span.ranks, held, at)
                        moves.append(move)
                if lane == ranks.rank:
                    mine.append(part)
                length[lane] += part.hi - part.lo
        own = [m for m in moves if m.index == index and m.lane == ranks.rank]
        if not mine:
            return
        device = own[0].parameter.device
        flat = torch.empty(length[ranks.rank], device=device)
        pieces, at = [], 0
        for part in mine:
            piece, count = part.piece, part.hi - part.lo
            key = piece.key if count == piece.numel else f"{piece.key}[{part.lo}:{part.hi}]"
            view = flat[at : at + count]
            pieces.append(Piece(key, view, None, piece.owners, piece.contributors, piece.expert))
            at += count
        lane_layout = Layout(layout.group, pieces, layout.fragment)
        first = (ranks.rank - turn) % ranks.size
        # Only the last of the site's buckets may be short, so these start at multiples too.
        lane_layout.position = lambda element: (
            (first + element // size * ranks.size) * size + element % size
        )
        self._flats[index] = flat
        self.layouts.append(lane_layout)
        self.numbers.append(index)
        flat.untyped_storage().resize_(0)

    # ------------------------------------------------------------------------------- exchange

    def _flats_of(self, fragment: int) -> dict[int, Tensor]:
        """This rank's flat vectors of a fragment, by number of the site's layout."""
        numbers = {move.index for move in self._moves.get(fragment, ())}
        return {index: flat for index, flat in self._flats.items() if index in numbers}

    @property
    def fragments(self) -> list[int]:
        """The numbers of all fragments."""
        return sorted(self._moves)

    def hold(self, fragment: int) -> None:
        """Copies the parameters into the tensors of this rank's pieces; a collective."""
        for flat in self._flats_of(fragment).values():
            flat.untyped_storage().resize_(flat.nbytes)
        self._pull(fragment, self._flats, lambda parameter: parameter)

    def release(self, fragment: int) -> None:
        """Frees the memory of the pieces' tensors."""
        for flat in self._flats_of(fragment).values():
            flat.untyped_storage().resize_(0)

    def give_back(self, fragment: int) -> None:
        """Copies the pieces' tensors back into the parameters and frees them; a collective."""
        self._push(fragment, self._flats, lambda parameter: parameter)
        self.release(fragment)

    def pull(self, fragment: int, tensor_of: TensorOf) -> dict[int, Tensor]:
        """New fp32 vectors with the trained parameters in this rank's buckets, by number of the
        layout; a collective."""
        flats = {
            index: torch.empty(flat.numel(), device=flat.device)
            for index, flat in self._flats_of(fragment).items()
            if index < self._trained
        }
        self._pull(fragment, flats, tensor_of, self._trained)
        return flats

    def push(self, fragment: int, flats: dict[int, Tensor], tensor_of: TensorOf) -> None:
        """Writes vectors as `pull` returns them into the tensors of all holders; a collective."""
        self._push(fragment, flats, tensor_of, self._trained)

    @property
    def of_parameters(self) -> list[Layout]:
        """The layouts of trained parameters."""
        found = zip(self.numbers, self.layouts, strict=True)
        return [layout for number, layout in found if number < self._trained]

    @property
    def of_biases(self) -> list[Layout]:
        """The layouts of selection biases."""
        return self.layouts[len(self.of_parameters) :]

    def numbered(self, vectors: Sequence[Tensor]) -> dict[int, Tensor]:
        """Vectors of all `of_parameters`, by number of the site's layout."""
        numbers = [number for number in self.numbers if number < self._trained]
        return dict(zip(numbers, vectors, strict=True))

    def views(self, flats: dict[int, Tensor]) -> Callable[[Piece], Tensor]:
        """A function from a piece to its values in vectors as `pull` returns them."""
        found = {
            id(piece): flats[number][place]
            for number, layout in zip(self.numbers, self.layouts, strict=True)
            if number in flats
            for piece, place in layout.slices()
        }
        return lambda piece: found[id(piece)]

    def _moves_of(self, fragment: int, limit: int | None) -> Iterable[list[_Move]]:
        """The moves in runs of about `_AT_ONCE` elements, the same on all ranks."""
        run: list[_Move] = []
        elements = 0
        for move in self._moves.get(fragment, ()):
            if limit is not None and move.index >= limit:
                continue
            run.append(move)
            elements += move.count * len(move.ranks)
            if elements >= _AT_ONCE:
                yield run
                run, elements = [], 0
        if run:
            yield run

    def _pull(
        self,
        fragment: int,
        flats: dict[int, Tensor],
        tensor_of: TensorOf,
        limit: int | None = None,
    ) -> None:
        me = self.ranks.rank
        for moves in self._moves_of(fragment, limit):
            going: list[list[Tensor]] = [[] for _ in range(self.ranks.size)]
            coming: list[list[Tensor]] = [[] for _ in range(self.ranks.size)]
            for move in moves:
                source = move.lane
                if source not in move.ranks:
                    source = move.ranks[move.lane % len(move.ranks)]
                if me not in (source, move.lane):
                    continue
                if me == source:
                    value = _flat(tensor_of(move.parameter))[move.at : move.at + move.count]
                    if me == move.lane:
                        flats[move.index][move.start : move.start + move.count].copy_(value)
                        continue
                    going[move.lane].append(value.float())
                else:
                    coming[source].append(flats[move.index][move.start : move.start + move.count])
            self._swap(going, coming)

    def _push(
        self,
        fragment: int,
        flats: dict[int, Tensor],
        tensor_of: TensorOf,
        limit: int | None = None,
    ) -> None:
        me = self.ranks.rank
        for moves in self._moves_of(fragment, limit):
            going: list[list[Tensor]] = [[] for _ in range(self.ranks.size)]
            coming: list[list[Tensor]] = [[] for _ in range(self.ranks.size)]
            for move in moves:
                value = target = None
                if me == move.lane:
                    value = flats[move.index][move.start : move.start + move.count]
                if me in move.ranks:
                    target = _flat(tensor_of(move.parameter))[move.at : move.at + move.count]
                if value is not None:
                    for rank in move.ranks:
                        if rank != me:
                            going[rank].append(value)
                if target is not None:
                    if value is not None:
                        target.copy_(value)
                    else:
                        coming[move.lane].append(target)
            self._swap(going, coming)

    def _swap(self, going: list[list[Tensor]], coming: list[list[Tensor]]) -> None:
        sent = [part for parts in going for part in parts]
        device = next((p.device for parts in (*coming, *going) for p in parts), "cpu")
        vector = torch.cat(sent) if sent else torch.empty(0, device=device)
        counts = [[sum(p.numel() for p in parts) for parts in side] for side in (coming, going)]
        out = self.ranks.swap(vector, *counts)
        targets = [part for parts in coming for part in parts]
        for target, value in zip(targets, out.split([t.numel() for t in targets]), strict=True):
            target.copy_(value)


def _flat(tensor: Tensor) -> Tensor:
    return local_tensor(tensor).view(-1)
