"""What a group does with its flat vector: average it, equalise it, or take an outer step."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fomoe_ext.outer.codec import Codec
from fomoe_ext.outer.layout import Layout, Piece
from fomoe_ext.outer.optimizer import OuterRule


class MeanJob:
    """Averages a tensor of each piece over its contributors, in place (`reduce.Job`)."""

    summed = True

    def __init__(
        self, layout: Layout, site: int, codec: Codec, tensor_of: Callable[[Piece], Tensor]
    ) -> None:
        self.layout, self.site, self.codec, self._tensor_of = layout, site, codec, tensor_of
        self.group, self.numel = layout.group, layout.numel

    def read(self, start: int, stop: int, out: Tensor) -> None:
        for part in self.layout.parts(start, stop):
            piece = part.piece
            if self.site in piece.contributors:
                source = piece.part_of(self._tensor_of(piece))
                out[part.range].copy_(source[part.lo : part.hi])
            else:
                out[part.range].zero_()

    def write(self, start: int, stop: int, total: Tensor) -> None:
        for part in self.layout.parts(start, stop):
            piece = part.piece
            mean = total[part.range].div_(len(piece.contributors))
            piece.part_of(self._tensor_of(piece))[part.lo : part.hi].copy_(mean)


class EqualiseJob(MeanJob):
    """Gives all members the same values: every share of a bucket as one of them has it."""

    summed = False

    def read(self, start: int, stop: int, out: Tensor) -> None:
        for part in self.layout.parts(start, stop):
            source = part.piece.part_of(self._tensor_of(part.piece))
            out[part.range].copy_(source[part.lo : part.hi])

    def write(self, start: int, stop: int, total: Tensor) -> None:
        for part in self.layout.parts(start, stop):
            target = part.piece.part_of(self._tensor_of(part.piece))
            target[part.lo : part.hi].copy_(total[part.range])


class DeltaJob:
    """Mean delta of one owner group, and the outer step with it (`reduce.Job`)."""

    summed = True

    def __init__(
        self,
        layout: Layout,
        site: int,
        codec: Codec,
        rule: OuterRule,
        anchor: Tensor,
        momentum: Tensor | None,
    ) -> None:
        self.layout, self.anchor, self.momentum = layout, anchor, momentum
        self.group, self.numel = layout.group, layout.numel
        self.codec, self._rule, self._site = codec, rule, site

    def read(self, start: int, stop: int, out: Tensor) -> None:
        delta = torch.zeros(stop - start, dtype=torch.float32, device=self.anchor.device)
        anchor = self.anchor[start:stop]
        for part in self.layout.parts(start, stop):
            if self._site in part.piece.contributors:
                local = part.piece.values()[part.lo : part.hi]
                # What the local steps began from: the anchor as the parameter's type holds it.
                begun = anchor[part.range].to(local.dtype).float()
                torch.sub(begun, local.float(), out=delta[part.range])
        out.copy_(delta)

    def write(self, start: int, stop: int, total: Tensor) -> None:
        anchor = self.anchor[start:stop]
        delta = total.to(anchor.device)
        parts = list(self.layout.parts(start, stop))
        for part in parts:
            delta[part.range].div_(len(part.piece.contributors))
        momentum = None if self.momentum is None else self.momentum[start:stop]
        self._rule.apply_(anchor, delta, momentum)
        for part in parts:
            part.piece.values()[part.lo : part.hi].copy_(anchor[part.range])
