"""Belongings: values and state of a site's pieces, moved from one outer state to another.

When sites leave or join, every site makes a new model for the experts it is to hold, and fills it
with what it had and with what others send. Until that is done the old model is unchanged.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fomoe_ext.outer.codec import hash_bits
from fomoe_ext.outer.groups import SiteGroup
from fomoe_ext.outer.inner_state import shaped_state
from fomoe_ext.outer.layout import Layout, Piece
from fomoe_ext.outer.model_layout import ModelLayout
from fomoe_ext.outer.reduce import Damaged
from fomoe_ext.outer.site import Site
from fomoe_ext.outer.state import OuterState
from fomoe_ext.placement import wire

Inner = torch.optim.Optimizer | None
"""The inner optimizer, which must be given here."""

Item = tuple[int, int] | None
"""An expert (layer, expert), or None: everything that belongs to no expert."""

_STAYS = ("value", "error", "bias")
"""What is not sent with each piece: the receiver takes values from the anchor, error feedback stays
at its site, and biases are pieces of their own."""


def items_of(layout: ModelLayout) -> dict[Item, list[Piece]]:
    """The pieces of every item in the order of their keys, which is that of the item's vector."""
    return _by_item(layout.layouts)


def biases_of(layout: ModelLayout) -> dict[Item, list[Piece]]:
    """The same for selection biases, which have no anchor."""
    return _by_item(layout.bias_layouts)


def _by_item(layouts: Sequence[Layout]) -> dict[Item, list[Piece]]:
    found: dict[Item, list[Piece]] = {}
    for layout in layouts:
        for piece in layout.pieces:
            found.setdefault(piece.expert, []).append(piece)
    return {item: sorted(pieces, key=lambda p: p.key) for item, pieces in found.items()}


def elements_of(pieces: Sequence[Piece], biases: Sequence[Piece], names: Sequence[str]) -> int:
    """Number of elements of an item's vector: `names` of each of its pieces, and its biases."""
    return len(names) * sum(p.numel for p in pieces) + sum(p.numel for p in biases)


class Belongings:
    """Flat tensors by what they are ("value", "anchor", "momentum", "error", "bias", and by what
    the inner optimizer calls its own) and by piece; and its steps by parameter."""

    def __init__(self) -> None:
        self.tensors: dict[str, dict[str, Tensor]] = {}
        self.steps: dict[str, float] = {}

    @classmethod
    @torch.no_grad()
    def of(cls, state: OuterState) -> Belongings:
        """Everything that a site has, as views of its memory. Raises ValueError if the inner
        optimizer's state does not have its parameters' shapes (`inner_state.shaped_state`)."""
        result, site = cls(), state.layout.site
        kept = result.tensors
        if site.inner_optimizer is not None:
            list(shaped_state(site.inner_optimizer, list(site.model.named_parameters())))
        for index, layout in enumerate(state.layout.layouts):
            error = state.feedback[index].own
            for piece, place in layout.slices():
                kept.setdefault("value", {})[piece.key] = piece.values()
                kept.setdefault("anchor", {})[piece.key] = state.anchors[index][place]
                if state.momenta:
                    kept.setdefault("momentum", {})[piece.key] = state.momenta[index][place]
                if error is not None:
                    kept.setdefault("error", {})[piece.key] = error[place]
                for moment, tensor in _moments(site.inner_optimizer, piece):
                    kept.setdefault(moment, {})[piece.key] = tensor
        for layout in state.layout.bias_layouts:
            for piece in layout.pieces:
                kept.setdefault("bias", {})[piece.key] = piece.values()
        result.steps = steps_of(site.model, site.inner_optimizer)
        return result

    def names(self) -> list[str]:
        """What is sent of each piece of an item."""
        return sorted(what for what in self.tensors if what not in _STAYS)

    def vector(self, pieces: Sequence[Piece], biases: Sequence[Piece]) -> Tensor:
        """All that is sent of an item, flat fp32."""
        parts = [self.tensors[what][p.key].float() for what in self.names() for p in pieces]
        parts += [self.tensors["bias"][piece.key].float() for piece in biases]
        return torch.cat(parts)

    def take(
        self,
        vector: Tensor,
        pieces: Sequence[Piece],
        biases: Sequence[Piece],
        names: Sequence[str],
    ) -> None:
        """Stores what `vector` returned at another site; parameters take the value of the
        anchor."""
        sizes = [piece.numel for piece in pieces] * len(names) + [p.numel for p in biases]
        parts = iter(vector.split(sizes))
        for what in names:
            for piece in pieces:
                self.tensors.setdefault(what, {})[piece.key] = next(parts)
        for piece in biases:
            self.tensors.setdefault("bias", {})[piece.key] = next(parts)
        for piece in pieces:
            self.tensors.setdefault("value", {})[piece.key] = self.tensors["anchor"][piece.key]

    @torch.no_grad()
    def fill(self, state: OuterState) -> None:
        """Fills the state of an `arriving` OuterSync. State that is missing here starts from zero;
        a parameter whose value is missing keeps its own."""
        site = state.layout.site
        moments = [name for name in self.names() if name not in ("anchor", "momentum")]
        _make_moments(site, moments, self.steps)
        for index, layout in enumerate(state.layout.layouts):
            device = layout.pieces[0].tensor.device
            anchor = torch.zeros(layout.numel, device=device)
            momentum = torch.zeros(layout.numel, device=device) if site.rule.momentum else None
            error = state.feedback[index].own
            for piece, place in layout.slices():
                value = self._find("value", piece)
                if value is not None:
                    piece.values().copy_(value)
                found = self._find("anchor", piece)
                anchor[place].copy_(piece.values() if found is None else found)
                for what, vector in (("momentum", momentum), ("error", error)):
                    found = self._find(what, piece)
                    if vector is not None and found is not None:
                        vector[place].copy_(found)
                for moment, tensor in _moments(site.inner_optimizer, piece):
                    found = self._find(moment, piece)
                    if found is not None:
                        tensor.copy_(found)
            state.anchors.append(anchor)
            if momentum is not None:
                state.momenta.append(momentum)
        for layout in state.layout.bias_layouts:
            for piece in layout.pieces:
                found = self._find("bias", piece)
                if found is not None:
                    piece.values().copy_(found)

    def _find(self, what: str, piece: Piece) -> Tensor | None:
        return self.tensors.get(what, {}).get(piece.key)


def _moments(inner: Inner, piece: Piece) -> Iterator[tuple[str, Tensor]]:
    """Flat views of the inner optimizer's state of a piece."""
    assert inner is not None
    state = inner.state.get(piece.tensor, {})
    for name, value in state.items():
        if name != "step" and isinstance(value, Tensor) and value.shape == piece.tensor.shape:
            yield name, piece.part_of(value)


def steps_of(model: nn.Module, inner: Inner) -> dict[str, float]:
    """The inner optimizer's step count of each parameter that has one."""
    assert inner is not None
    state = inner.state
    return {
        name: float(state[p]["step"])
        for name, p in model.named_parameters()
        if "step" in state.get(p, {})
    }


def _make_moments(site: Site, names: Sequence[str], steps: Mapping[str, float]) -> None:
    """The inner optimizer's state with all tensors zero and the given step counts."""
    if not names:
        return
    usual = max(steps.values(), default=0.0)
    assert site.inner_optimizer is not None
    for name, parameter in site.model.named_parameters():
        if parameter.requires_grad:
            entry: dict[str, Any] = {what: torch.zeros_like(parameter) for what in names}
            if steps:
                step = torch.tensor(steps.get(name, usual), dtype=torch.float32)
                entry = {"step": step.to(parameter.device), **entry}
            site.inner_optimizer.state[parameter] = entry


def ship(
    group: SiteGroup,
    site: int,
    parcels: Iterable[tuple[Item, int, int]],
    size_of: Mapping[Item, int],
    vector_of: Mapping[Item, Tensor],
) -> tuple[dict[Item, Tensor], int]:
    """Sends items to the sites that want them; returns the vectors that arrived and the bytes sent.

    A collective of the group, whose member `site` this is. `parcels`: (item, source, target), the
    same at all members. `size_of`: fp32 elements of every item; `vector_of`: what this site sends.
    Raises Damaged where a message does not match its hash.
    """
    ordered = sorted(parcels, key=lambda p: (p[0] is not None, p[0] or (), p[2]))
    members = range(group.size)
    outgoing = [[i for i, a, b in ordered if (a, b) == (site, other)] for other in members]
    incoming = [[i for i, a, b in ordered if (a, b) == (other, site)] for other in members]
    messages = [_sealed([vector_of[item] for item in to_site]) for to_site in outgoing if to_site]
    sent = (torch.cat(messages) if messages else torch.empty(0)).to(group.device)
    sizes, others = (
        [sum(size_of[item] for item in of_site) + _SEAL * bool(of_site) for of_site in direction]
        for direction in (incoming, outgoing)
    )
    received = torch.empty(sum(sizes), device=group.device)
    count = group.send_to_each(received, sent, sizes, others)
    arrived: dict[Item, Tensor] = {}
    for sender, (message, items) in enumerate(zip(received.split(sizes), incoming, strict=True)):
        if items:
            values = _opened(message, f"site {sender}")
            arrived |= zip(items, values.split([size_of[item] for item in items]), strict=True)
    return arrived, count


_SEAL = wire.HASH_BYTES // 4
"""Size of a message's hash in fp32 elements."""


def _sealed(vectors: Sequence[Tensor]) -> Tensor:
    """The concatenated vectors, followed by their hash."""
    values = torch.cat(list(vectors))
    return torch.cat([values, _hash(values).to(values.device)])


def _hash(values: Tensor) -> Tensor:
    (number,) = hash_bits([values])
    signed = number - (1 << 64) if number >> 63 else number
    return torch.tensor([signed], dtype=torch.int64).view(torch.float32)


def _opened(message: Tensor, sender: str) -> Tensor:
    """A message without its hash. Raises Damaged where they do not match."""
    values, seal = message[:-_SEAL], message[-_SEAL:]
    stated = seal.cpu().clone().view(torch.int64)  # a copy: a view would need an aligned start
    if not torch.equal(_hash(values).view(torch.int64), stated):
        raise Damaged(f"what {sender} sent of its experts was damaged on the way")
    return values
