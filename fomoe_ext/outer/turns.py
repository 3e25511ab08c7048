"""Layouts of meetings in which only some experts take part (`fomoe_ext.placement.turns`).

Such a layout has only the pieces that are sent. Anchor, momentum and error feedback remain vectors
of the whole layout; jobs copy the elements of those pieces out of them and back.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from fomoe_ext.outer.jobs import Feedback
from fomoe_ext.outer.layout import Layout, Piece
from fomoe_ext.outer.options import OuterOptions
from fomoe_ext.placement import wire
from fomoe_ext.placement.turns import Expert, GroupExperts, experts_of_turn


class TurnLayout(Layout):
    """Some pieces of another layout: those of `experts`, and those that belong to no expert.
    Vectors are those of the whole layout."""

    def __init__(self, whole: Layout, experts: Collection[Expert]) -> None:
        kept = [
            (piece, place)
            for piece, place in whole.slices()
            if piece.expert is None or piece.expert in experts
        ]
        super().__init__(whole.group, [piece for piece, _ in kept], whole.fragment)
        self._places = [place for _, place in kept]

    def slices(self) -> Iterator[tuple[Piece, slice]]:
        """Every piece with its place in the vectors of the whole layout."""
        return zip(self.pieces, self._places, strict=True)

    def _runs(self, start: int, stop: int) -> Iterator[slice]:
        """Where elements start..stop-1 are in the vectors of the whole layout."""
        index, here = bisect_right(self.starts, start) - 1, start
        while here < stop:
            last = min(stop, self.starts[index + 1])
            shift = self._places[index].start - self.starts[index]
            if last > here:
                yield slice(here + shift, last + shift)
                here = last
            index += 1

    def take(self, vector: Tensor, start: int, stop: int) -> Tensor:
        return torch.cat([vector[:0], *(vector[run] for run in self._runs(start, stop))])

    @contextmanager
    def lent(self, vector: Tensor | None, start: int, stop: int) -> Iterator[Tensor | None]:
        if vector is None:
            yield None
            return
        values = self.take(vector, start, stop)
        yield values
        at = 0
        for run in self._runs(start, stop):
            vector[run] = values[at : at + run.stop - run.start]
            at += run.stop - run.start


def experts_of(layout: Layout) -> list[Expert]:
    """The experts whose pieces travel in a layout, ascending."""
    return sorted({piece.expert for piece in layout.pieces if piece.expert is not None})


def group_experts(pieces: Iterable[Piece]) -> GroupExperts:
    """The number of experts that the pieces belong to, and elements of each. Raises ValueError
    unless these are equal; otherwise the bytes of a meeting would depend on whose turn it is."""
    sizes: Counter[Expert] = Counter()
    for piece in pieces:
        if piece.expert is not None:
            sizes[piece.expert] += piece.numel
    if len(set(sizes.values())) > 1:
        raise ValueError(
            f"expert_turns > 1 needs experts of one size, got {sorted(set(sizes.values()))} "
            "elements"
        )
    return GroupExperts(len(sizes), next(iter(sizes.values()), 0))


def check_experts(pieces: Sequence[Piece], options: OuterOptions, ranks: int) -> None:
    """Raises ValueError if the experts of these pieces cannot take turns."""
    if options.expert_turns == 1:
        return
    if ranks > 1:
        raise ValueError(f"expert_turns > 1 needs one rank per site, got {ranks}")
    group_experts(pieces)


def layouts_of_turn(
    layouts: Sequence[Layout],
    options: OuterOptions,
    round_index: int,
    met: Tensor,
    tokens: Tensor | None,
) -> list[Layout]:
    """The parts of the layouts that meet in a round. Pieces that a single site holds need no
    exchange and always meet. `met` [L, E]: the round in which each expert last met. `tokens`
    [num_sites, L, E]: the counts of all sites."""

    def chosen(layout: Layout) -> Layout:
        experts, owners = experts_of(layout), list(layout.group.owners)
        if len(owners) == 1 or not experts:
            return layout
        trained = torch.zeros(met.shape) if tokens is None else tokens[owners].sum(0)
        of_turn = experts_of_turn(
            experts,
            round_index,
            options.expert_turns,
            options.turn_order,
            lambda expert: int(met[expert]),
            lambda expert: float(trained[expert]),
        )
        return TurnLayout(layout, set(of_turn))

    return [chosen(layout) for layout in layouts]


def keep_shares(layout: Layout, feedback: Feedback, bucket_bytes: int) -> None:
    """Adds the encoding errors of the sums of this turn to the error of the site's own values,
    because its share has other elements in the next turn."""
    if feedback.own is None or feedback.shares is None or not feedback.shares.numel():
        return
    group, size, at = layout.group, wire.bucket_elements(bucket_bytes), 0
    for begin in range(0, layout.numel, size):
        end = min(begin + size, layout.numel)
        share = wire.share_elements(end - begin, group.size)
        start, stop = (min(begin + r * share, end) for r in (group.rank, group.rank + 1))
        with layout.lent(feedback.own, start, stop) as own:
            if own is not None and stop > start:
                own += feedback.shares[at : at + stop - start].to(own.device)
        at += share
    feedback.shares.zero_()
