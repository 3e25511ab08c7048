"""What a group does with its flat vector: average it, equalise it, or take an outer step."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor

from fomoe_ext.outer.averaging import Averaging
from fomoe_ext.outer.codec import Codec, DeltaPart
from fomoe_ext.outer.layout import Layout, Part, Piece
from fomoe_ext.outer.optimizer import OuterRule
from fomoe_ext.placement import wire


def random_seed(*name: object) -> int:
    """A seed of 63 bits that depends on the name alone."""
    digest = hashlib.blake2b(repr(name).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class Feedback:
    """Error feedback of one layout: the encoding error so far, added to the next values.

    `own`: of this site's values, fp32 [numel]; `shares`: of the sums that this site encodes for its
    group, fp32 [wire.own_elements]. Both None where encoding is exact (codec fp32) or nothing is
    sent (a group of one). 1-bit SGD (Seide et al. 2014) keeps such an error; on both ends, 1-bit
    Adam (arXiv 2102.02888).
    """

    def __init__(self, layout: Layout, codec: Codec, bucket_bytes: int, wanted: bool) -> None:
        self.own: Tensor | None = None
        self.shares: Tensor | None = None
        group = layout.group
        if wanted and codec.lossy and group.size > 1:
            device = layout.pieces[0].tensor.device
            count = wire.own_elements(layout.numel, group.size, codec.name, bucket_bytes)
            self.own = torch.zeros(layout.numel, device=device)
            self.shares = torch.zeros(count, device=group.device)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(t.nbytes for t in (self.own, self.shares) if t is not None)


class MeanJob:
    """Averages a tensor of each piece over its contributors, in place (`reduce.Job`).

    Set `averaging` before anything is encoded. A piece without members stays as it is.
    """

    summed = True

    def __init__(
        self,
        layout: Layout,
        site: int,
        codec: Codec,
        tensor_of: Callable[[Piece], Tensor],
        *,
        feedback: Feedback | None = None,
        seed: int = 0,
    ) -> None:
        self.layout, self.site, self.codec, self._tensor_of = layout, site, codec, tensor_of
        self.group, self.numel, self.seed = layout.group, layout.numel, seed
        self.device = layout.pieces[0].tensor.device
        self.own_error = feedback.own if feedback else None
        self.share_error = feedback.shares if feedback else None
        self.averaging = Averaging()

    def _anchor(self, start: int, stop: int) -> Tensor | None:
        return None

    def _source(self, part: Part) -> DeltaPart:
        """The values that this site contributes to a part."""
        if self.site not in self.averaging.members(part.piece):
            return DeltaPart(None, part.at)
        values = part.piece.part_of(self._tensor_of(part.piece))
        weight = self.averaging.weight(part.piece, self.site)
        return DeltaPart(values[part.lo : part.hi], part.at, weight)

    def encode(self, start: int, stop: int, payload: Tensor) -> None:
        self._encode(self.codec, start, stop, payload)

    def values(self, start: int, stop: int) -> Tensor:
        out = torch.empty(stop - start, device=self.device)
        # fp32 is exact: the error so far is sent along, and none is left.
        self._encode(_EXACT, start, stop, out.view(torch.uint8))
        return out

    def _encode(self, codec: Codec, start: int, stop: int, payload: Tensor) -> None:
        if start == stop:
            return
        with self.layout.lent(self.own_error, start, stop) as error:
            codec.encode_delta(
                [self._source(part) for part in self.layout.parts(start, stop)],
                stop - start,
                payload,
                anchor=self._anchor(start, stop),
                error=error,
                seed=self.seed,
                first=self.position(start),
            )

    def position(self, element: int) -> int:
        return self.layout.position(element)

    def write(self, start: int, stop: int, total: Tensor) -> None:
        for part in self.layout.parts(start, stop):
            if self.averaging.members(part.piece):
                mean = total[part.range].div_(self.averaging.divisor(part.piece))
                self._target(part).copy_(mean)

    def _target(self, part: Part) -> Tensor:
        return part.piece.part_of(self._tensor_of(part.piece))[part.lo : part.hi]


_EXACT = Codec("fp32")


class ShiftJob(MeanJob):
    """Averages a tensor that changes meanwhile: adds the difference of the mean and its old
    value."""

    def __init__(
        self, layout: Layout, site: int, codec: Codec, tensor_of: Callable[[Piece], Tensor]
    ) -> None:
        super().__init__(layout, site, codec, tensor_of)
        self._before = torch.cat(
            [piece.part_of(tensor_of(piece)).float() for piece in layout.pieces]
        )

    def write(self, start: int, stop: int, total: Tensor) -> None:
        for part in self.layout.parts(start, stop):
            mean = total[part.range].div_(len(part.piece.contributors))
            self._target(part).add_(mean - self._before[start:stop][part.range])


class EqualiseJob(MeanJob):
    """Gives all members the same values: each share of a bucket comes from one of them."""

    summed = False

    def _source(self, part: Part) -> DeltaPart:
        return DeltaPart(self._target(part), part.at)

    def write(self, start: int, stop: int, total: Tensor) -> None:
        for part in self.layout.parts(start, stop):
            self._target(part).copy_(total[part.range])


class DeltaJob(MeanJob):
    """Mean delta of one owner group, and the outer step with it (`reduce.Job`).

    If all members of a piece are left out, its anchor and momentum stay as they are, and every
    owner's parameter is set to the anchor.

    The new parameter is alpha * (the site's own value) + (1 - alpha) * (the new anchor), as in
    Streaming DiLoCo (arXiv 2501.18512).
    """

    def __init__(
        self,
        layout: Layout,
        site: int,
        codec: Codec,
        rule: OuterRule,
        anchor: Tensor,
        momentum: Tensor | None,
        *,
        feedback: Feedback | None = None,
        seed: int = 0,
        alpha: float = 0.0,
    ) -> None:
        super().__init__(
            layout, site, codec, lambda piece: piece.tensor, feedback=feedback, seed=seed
        )
        self.anchor, self.momentum, self._rule, self._alpha = anchor, momentum, rule, alpha

    def _anchor(self, start: int, stop: int) -> Tensor | None:
        return self.layout.take(self.anchor, start, stop)

    def write(self, start: int, stop: int, total: Tensor) -> None:
        lent = self.layout.lent
        with (
            lent(self.anchor, start, stop) as anchor,
            lent(self.momentum, start, stop) as momentum,
        ):
            assert anchor is not None
            self._move(list(self.layout.parts(start, stop)), total, anchor, momentum)

    def _move(
        self, parts: list[Part], total: Tensor, anchor: Tensor, momentum: Tensor | None
    ) -> None:
        for part in parts:
            total[part.range].div_(self.averaging.divisor(part.piece))
        vectors = [anchor] if momentum is None else [anchor, momentum]
        unmoved = [part.range for part in parts if not self.averaging.members(part.piece)]
        kept = [(v[place], v[place].clone()) for place in unmoved for v in vectors]
        self._rule.apply_(anchor, total, momentum)
        for view, before in kept:
            view.copy_(before)
        for part in parts:
            target = self._target(part)
            if self._alpha:
                new = self._alpha * target.float() + (1 - self._alpha) * anchor[part.range]
                target.copy_(new)
            else:
                target.copy_(anchor[part.range])
