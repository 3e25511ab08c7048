"""Reshuffle: moves experts between sites to change to a new placement."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from fomoe_ext.checks import at_least, one_of
from fomoe_ext.layer.moe import MoELayer
from fomoe_ext.outer import optimizer as opt
from fomoe_ext.outer.errors import MeetingError
from fomoe_ext.outer.groups import share_statuses
from fomoe_ext.outer.inner_state import move_state_rows, problem_with_rows
from fomoe_ext.outer.layout import Layout, Piece, find_moe_layers
from fomoe_ext.outer.log import MeetingLog
from fomoe_ext.outer.model_layout import ModelLayout
from fomoe_ext.outer.reports import ReshuffleReport
from fomoe_ext.outer.site import Site
from fomoe_ext.outer.state import OuterState
from fomoe_ext.outer.step_count import StepCount
from fomoe_ext.outer.warmup import ArrivalWarmup
from fomoe_ext.placement.placement import Placement, Transfer

_ExpertId = tuple[int, int]  # layer, expert
_LACKING = "no moments: "
_PROBLEM = "problem: "


def reshuffle(
    state: OuterState,
    steps: StepCount,
    log: MeetingLog,
    warmup: ArrivalWarmup,
    new: Placement,
    warmup_steps: int,
    moments: Literal["reset", "carry"],
) -> ReshuffleReport:
    """`OuterSync.reshuffle`, after `check`, and when no fragment is under way."""
    before = log.round_bytes, log.seconds
    with log.meeting("the reshuffle"):
        sent = _agree(state.layout, steps, new, moments)
        arrived, moved = move_experts(state, new, moments == "carry")
        log.sent(sent + moved)
        warmup.start(arrived, warmup_steps)
    return ReshuffleReport(arrived, *log.take_since(*before))


def check(
    layout: ModelLayout, new: Placement, warmup_steps: int, moments: str, copies: bool
) -> None:
    """Raises ValueError if this site cannot reshuffle. `copies`: whether there are stale
    experts."""
    at_least(0, warmup_steps=warmup_steps)
    one_of(("reset", "carry"), moments=moments)
    site = layout.site
    if site.inner_optimizer is None:
        raise ValueError("reshuffle needs the inner_optimizer, whose state moves with experts")
    if moments == "carry":
        opt.check_adamw(site.inner_optimizer, "reshuffle with moments 'carry'")
    if layout.lane is not None:
        raise ValueError("reshuffle: not possible with sites of several ranks")
    if copies:
        raise ValueError("reshuffle: not possible with stale experts")
    if site.options.expert_turns > 1:
        raise ValueError("reshuffle: not possible with expert_turns > 1")
    layout.placement.transfers(new)  # refuses other sizes
    for path, layer in find_moe_layers(site.model):
        if not all(p.requires_grad for p in layer.experts.parameters()):
            raise ValueError(f"reshuffle cannot move the frozen experts of {path}")


def _problem(layout: ModelLayout, steps: StepCount) -> str:
    """Says why experts, or their inner optimizer state, cannot be moved here, or is empty."""
    inner = layout.site.inner_optimizer
    assert inner is not None
    named = []
    for path, layer in find_moe_layers(layout.site.model):
        named += [(f"{path}.experts.{n}", layer.experts.part(n)) for n in layer.experts.parts]
        if layer.router_scope == "resident":
            parts = layer.router.parts
            named += [(f"{path}.router.{n}", layer.router.get_parameter(n)) for n in parts]
    problem = layout.members.change() or steps.other_optimizer(named, inner)
    return problem or problem_with_rows(inner, named)


def _agree(layout: ModelLayout, steps: StepCount, new: Placement, moments: str) -> int:
    """Raises MeetingError unless all sites passed the same arguments and can reshuffle; returns the
    bytes sent."""
    digest = hashlib.sha256(repr((new.table, moments)).encode()).hexdigest()
    lacking, inner = "", layout.site.inner_optimizer
    if moments == "carry":
        assert inner is not None
        pieces = [p for flat in layout.layouts for p in flat.pieces if p.expert is not None]
        lacking = opt.missing_moments(inner, [(p.key, p.tensor) for p in pieces])
    everyone, problem = layout.site.everyone, _problem(layout, steps)
    status = f"{_LACKING}{lacking}" if lacking else digest
    texts, sent = share_statuses(everyone, f"{_PROBLEM}{problem}" if problem else status)
    if problem:
        raise ValueError(f"reshuffle: {problem}")
    for site, text in enumerate(texts):
        if text.startswith(_PROBLEM):
            raise MeetingError(f"reshuffle: site {site}: {text.removeprefix(_PROBLEM)}")
        if text.startswith(_LACKING):
            raise MeetingError(
                "reshuffle with moments 'carry' comes after an optimizer step, but at site "
                f"{site} {text.removeprefix(_LACKING)} has no moments"
            )
    if len(set(texts)) > 1:
        raise MeetingError(
            "all sites must pass the same placement to reshuffle, and the same moments"
        )
    return sent


@torch.no_grad()
def move_experts(
    state: OuterState, new: Placement, carry: bool = False
) -> tuple[tuple[_ExpertId, ...], int]:
    """Sends and receives experts, layer by layer, and makes new layouts; a collective.

    Returns the experts that arrived at this site, as (layer, expert), and the bytes it sent. An
    expert is sent as one fp32 vector: the anchor of its pieces, their outer momentum, with `carry`
    both moments of the inner optimizer, and its selection bias.
    """
    site = state.layout.site
    transfers = state.layout.placement.transfers(new)
    before = _Before(state, opt.MOMENTS if carry else ())
    arrived: dict[_ExpertId, Tensor] = {}
    sent = 0
    for layer in range(new.num_layers):
        of_layer = [t for t in transfers if t.layer == layer]
        if of_layer:
            vectors, count = _exchange(state.layout, of_layer, before)
            arrived |= vectors
            sent += count
    for index, (_, module) in enumerate(find_moe_layers(site.model)):
        _change_residents(site, module, new.resident(index, site.index))
    state.adopt(new)
    before.restore(state, arrived)
    return tuple(sorted(arrived)), sent


class _Before:
    """Anchor, outer momentum and pieces of a site before the move.

    `moments`: names of the inner optimizer's state that goes along with an expert.
    """

    def __init__(self, state: OuterState, moments: tuple[str, ...] = ()) -> None:
        layouts = state.layout.layouts
        self.inner, self.moments = state.layout.site.inner_optimizer, moments
        self.anchor: dict[str, Tensor] = {}
        self.momentum: dict[str, Tensor] = {}
        self.error: dict[str, Tensor] = {}
        self.shares = {
            _shape(layout): feedback.shares
            for layout, feedback in zip(layouts, state.feedback, strict=True)
        }
        self.pieces: dict[_ExpertId, list[Piece]] = {}
        self.biases: dict[_ExpertId, Piece] = {}
        for index, layout in enumerate(layouts):
            for piece, place in layout.slices():
                if state.anchors:
                    self.anchor[piece.key] = state.anchors[index][place]
                if state.momenta:
                    self.momentum[piece.key] = state.momenta[index][place]
                error = state.feedback[index].own
                if error is not None:
                    self.error[piece.key] = error[place]
                if piece.expert is not None:
                    self.pieces.setdefault(piece.expert, []).append(piece)
        for layout in state.layout.bias_layouts:
            for piece in layout.pieces:
                if piece.expert is not None:
                    self.biases[piece.expert] = piece

    def vector(self, expert: _ExpertId) -> Tensor:
        """Everything that is sent of an expert, flat fp32."""
        pieces = self.pieces[expert]
        parts = [self.anchor.get(piece.key, piece.values().float()) for piece in pieces]
        parts += [self.momentum[piece.key] for piece in pieces if self.momentum]
        parts += [self._moment(name, piece).float() for name in self.moments for piece in pieces]
        if expert in self.biases:
            parts.append(self.biases[expert].values())
        return torch.cat(parts)

    def _moment(self, name: str, piece: Piece) -> Tensor:
        """A flat view of what the inner optimizer keeps of a piece."""
        assert self.inner is not None
        return piece.part_of(self.inner.state[piece.tensor][name])

    def restore(self, state: OuterState, arrived: Mapping[_ExpertId, Tensor]) -> None:
        """Fills parameters, moments and biases that arrived, and the anchor and momentum of all
        pieces."""
        anchor, momentum = dict(self.anchor), dict(self.momentum)
        here: dict[_ExpertId, list[Piece]] = {}
        for piece in (p for layout in state.layout.layouts for p in layout.pieces):
            if piece.expert in arrived:
                here.setdefault(piece.expert, []).append(piece)
        for expert, pieces in here.items():
            parts = list(arrived[expert].split(self._sizes(pieces)))
            for piece in pieces:
                anchor[piece.key] = parts.pop(0)
                piece.values().copy_(anchor[piece.key])
            if self.momentum:
                for piece in pieces:
                    momentum[piece.key] = parts.pop(0)
            for name in self.moments:
                for piece in pieces:
                    self._moment(name, piece).copy_(parts.pop(0))
        for piece in (p for layout in state.layout.bias_layouts for p in layout.pieces):
            if piece.expert in arrived:
                piece.values().copy_(arrived[piece.expert][-1:])
        self._restore_feedback(state, arrived)
        if state.layout.site.rule.name == "ddp":
            return
        for layout in state.layout.layouts:
            device = layout.pieces[0].tensor.device
            for target, source in ((state.anchors, anchor), (state.momenta, momentum)):
                if source:
                    values = [source[piece.key].to(device) for piece in layout.pieces]
                    target.append(torch.cat(values))

    def _restore_feedback(self, state: OuterState, arrived: Mapping[_ExpertId, Tensor]) -> None:
        """Keeps the error feedback of pieces that stay; that of new holders and other sums is
        zero."""
        for layout, feedback in zip(state.layout.layouts, state.feedback, strict=True):
            if feedback.own is None:
                continue
            for piece, place in layout.slices():
                if piece.key in self.error and piece.expert not in arrived:
                    feedback.own[place].copy_(self.error[piece.key])
            shares = self.shares.get(_shape(layout))
            if shares is not None and feedback.shares is not None:
                feedback.shares.copy_(shares)

    def _sizes(self, pieces: list[Piece]) -> list[int]:
        """Lengths of the parts of an expert's vector; the bias is the last."""
        copies = (2 if self.momentum else 1) + len(self.moments)
        numels = [piece.numel for piece in pieces] * copies
        return numels + ([1] if self.biases else [])


def _shape(layout: Layout) -> tuple[str, ...]:
    """Identifies a layout by its owners and its pieces."""
    return layout.name, *(piece.key for piece in layout.pieces)


def _exchange(
    layout: ModelLayout, transfers: list[Transfer], before: _Before
) -> tuple[dict[_ExpertId, Tensor], int]:
    """Sends the experts of one layer; returns what arrives here, and the bytes sent."""
    group, sites, here = layout.site.everyone, range(layout.site.num_sites), layout.site.index
    outgoing = [[t for t in transfers if (t.source, t.target) == (here, s)] for s in sites]
    incoming = [[t for t in transfers if (t.source, t.target) == (s, here)] for s in sites]
    layer = transfers[0].layer
    size = before.vector((layer, layout.placement.resident(layer, here)[0])).numel()
    vectors = [before.vector((t.layer, t.expert)) for to_site in outgoing for t in to_site]
    sent = torch.cat(vectors) if vectors else torch.empty(0)
    sent = sent.to(group.device)
    received = torch.empty(size * sum(map(len, incoming)), device=group.device)
    count = group.send_to_each(
        received,
        sent,
        [size * len(from_site) for from_site in incoming],
        [size * len(to_site) for to_site in outgoing],
    )
    order = [(t.layer, t.expert) for from_site in incoming for t in from_site]
    return dict(zip(order, received.split(size) if order else (), strict=True)), count


def _change_residents(site: Site, layer: MoELayer, residents: tuple[int, ...]) -> None:
    """Moves the layer's rows and their inner optimizer state; rows of arrivals become zeros."""
    experts, optimizer = layer.experts, site.inner_optimizer
    assert optimizer is not None
    old = experts.resident_experts
    if residents == old:
        return
    arrived = [e for e in residents if e not in old]
    blank = tuple(torch.zeros_like(experts.part(name)[0]) for name in experts.parts)
    layer.set_resident_experts(residents, dict.fromkeys(arrived, blank))
    sources = [old.index(e) if e in old else None for e in residents]
    for name in experts.parts:
        move_state_rows(optimizer, experts.part(name), sources)
        experts.part(name).grad = None
        total = getattr(experts.part(name), "main_grad", None)
        if total is not None:
            total.zero_()
    if layer.router_scope == "resident":
        rows = [None if e in arrived else e for e in range(layer.num_experts)]
        for part in layer.router.parts:
            move_state_rows(optimizer, layer.router.get_parameter(part), rows)
