"""OuterState: anchor, outer momentum and error feedback of a site; also by parameter, for
checkpoints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fomoe_ext.outer.jobs import Feedback
from fomoe_ext.outer.model_layout import ModelLayout
from fomoe_ext.placement import wire
from fomoe_ext.placement.placement import Placement


class OuterState:
    """Vectors of the layouts that this rank meets for, in the order of `layout.layouts`.

    anchors: the values that all holders agreed on last, fp32; none with "ddp". momenta: of the
    outer optimizer, fp32; none without momentum. feedback: encoding errors (`jobs.Feedback`).
    """

    def __init__(self, layout: ModelLayout) -> None:
        """Without anchor and momentum, which `fill` makes or the caller appends."""
        self.layout = layout
        self._reset()

    def _reset(self) -> None:
        site, options = self.layout.site, self.layout.site.options
        self.anchors: list[Tensor] = []
        self.momenta: list[Tensor] = []
        self.feedback = [
            Feedback(layout, site.codec, options.bucket_bytes, options.error_feedback)
            for layout in self.layout.layouts
        ]

    def adopt(self, placement: Placement) -> None:
        """Makes new layouts (`ModelLayout.adopt`). Drops anchor and momentum and sets errors to
        zero."""
        self.layout.adopt(placement)
        self._reset()

    def fill(self) -> None:
        """Sets the anchor to the parameters and the momentum to zero. "ddp" has neither."""
        rule = self.layout.site.rule
        if rule.name == "ddp":
            return
        with self.layout.held():
            for layout in self.layout.layouts:
                device = layout.pieces[0].tensor.device
                anchor = torch.empty(layout.numel, dtype=torch.float32, device=device)
                for piece, place in layout.slices():
                    anchor[place].copy_(piece.values())
                self.anchors.append(anchor)
                if rule.momentum:
                    self.momenta.append(torch.zeros_like(anchor))

    def copy_anchor_to_model(self) -> None:
        """Sets the parameters to the anchor; a collective of the site's ranks."""
        layout, lane = self.layout, self.layout.lane
        if lane is not None and self.anchors:
            for fragment in lane.fragments:
                lane.push(fragment, lane.numbered(self.anchors), lambda p: p)
            return
        for flat, anchor in zip(layout.layouts, self.anchors, strict=False):
            for piece, place in flat.slices():
                piece.values().copy_(anchor[place])

    @property
    def nbytes(self) -> tuple[int, int, int]:
        """Bytes of anchor, of outer momentum and of error feedback in this process."""
        return (
            sum(a.nbytes for a in self.anchors),
            sum(m.nbytes for m in self.momenta),
            sum(f.nbytes for f in self.feedback),
        )


# ---- by parameter: for checkpoints that other sites, ranks or placements read -------------------


@torch.no_grad()
def by_parameter(layout: ModelLayout, vectors: Sequence[Tensor]) -> dict[int, Tensor]:
    """Vectors of all `layout.layouts` as fp32 tensors of the parameters' shapes, by parameter's id.

    Every rank gets those of the parameters that it holds; a collective of the site's ranks.
    """
    result = {
        id(p): torch.zeros_like(p, dtype=torch.float32)
        for p in layout.site.model.parameters()
        if p.requires_grad
    }
    if layout.lane is not None:
        flats = layout.lane.numbered(vectors)
        for fragment in layout.lane.fragments:
            layout.lane.push(fragment, flats, lambda parameter: result[id(parameter)])
        return result
    for flat, vector in zip(layout.layouts, vectors, strict=True):
        for piece, place in flat.slices():
            piece.part_of(result[id(piece.tensor)]).copy_(vector[place])
    return result


def pieces_of(
    layout: ModelLayout, vectors: Sequence[Tensor]
) -> Mapping[int, Tensor | dict[int | None, Tensor]]:
    """As `by_parameter`, but with one rank per site nothing is copied: views of the vectors, by
    rows of the parameter, or with None all of it.
    """
    if layout.lane is not None:
        return by_parameter(layout, vectors)
    result: dict[int, dict[int | None, Tensor]] = {}
    for flat, vector in zip(layout.layouts, vectors, strict=True):
        for piece, place in flat.slices():
            shape = piece.tensor.shape if piece.row is None else piece.tensor.shape[1:]
            result.setdefault(id(piece.tensor), {})[piece.row] = vector[place].view(shape)
    return result


@torch.no_grad()
def from_parameters(
    layout: ModelLayout, tensors: Mapping[int, Tensor], vectors: Sequence[Tensor]
) -> None:
    """Fills vectors of all `layout.layouts` with what `by_parameter` returned; a collective."""
    if layout.lane is not None:
        targets = layout.lane.numbered(vectors)
        for fragment in layout.lane.fragments:
            found = layout.lane.pull(fragment, lambda parameter: tensors[id(parameter)])
            for number, values in found.items():
                targets[number].copy_(values)
        return
    for flat, vector in zip(layout.layouts, vectors, strict=True):
        for piece, place in flat.slices():
            vector[place].copy_(piece.part_of(tensors[id(piece.tensor)]))


def share_errors(state: OuterState) -> dict[str, Tensor]:
    """Error feedback of the sums that this rank encodes, by layout and bucket of the site: views.

    The same names and sizes with any number of ranks per site.
    """
    size = wire.bucket_elements(state.layout.site.options.bucket_bytes)
    result = {}
    for layout, feedback in zip(state.layout.layouts, state.feedback, strict=True):
        if feedback.shares is None:
            continue
        at = 0
        for start in range(0, layout.numel, size):
            count = min(size, layout.numel - start)
            share = wire.share_elements(count, layout.group.size)
            number = layout.position(start) // size
            result[f"{layout.name}/{number}"] = feedback.shares[at : at + share]
            at += share
    return result
