"""What a resumed run needs of an OuterSync."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fomoe_ext.placement import wire
from fomoe_ext.placement.placement import Placement

if TYPE_CHECKING:
    from fomoe_ext.outer.sync import OuterSync

_NUMBERS = ("round", "bytes_sent", "steps", "reductions", "agreements")
_TENSORS = {
    "anchor": "outer anchor",
    "momentum": "outer momentum",
    "error": "error feedback (codec, error_feedback)",
    "share_error": "error feedback of sums (codec, error_feedback, bucket_bytes)",
}


def state_dict(sync: OuterSync) -> dict[str, Any]:
    """`OuterSync.state_dict`."""
    warming = sync.warmup.progress if sync.warmup else {}
    return {
        "round": sync.round,
        "bytes_sent": sync.bytes_sent,
        "steps": sync.steps,
        "reductions": sync.reductions,
        "agreements": sync.agreements,
        "optimizer": sync.rule.name,
        "codec": sync.codec.name,
        "placement": sync.placement.to_dict(),
        "tokens": sync.tokens,
        "met": sync.met.tolist() if sync.options.expert_turns > 1 else [],
        **_tensors(sync),
        "warmup": [[*key, *steps] for key, steps in warming.items()],
    }


def _tensors(sync: OuterSync) -> dict[str, dict[str, Tensor]]:
    names = [layout.name for layout in sync.layouts]
    feedback = list(zip(names, sync.feedback, strict=True))
    return {
        "anchor": dict(zip(names, sync.anchors, strict=False)),
        "momentum": dict(zip(names, sync.momenta, strict=False)),
        "error": {name: f.own for name, f in feedback if f.own is not None},
        "share_error": {name: f.shares for name, f in feedback if f.shares is not None},
    }


def require_rules(sync: OuterSync, state: Mapping[str, Any]) -> None:
    """Raises ValueError unless a state is of the same outer optimizer and codec."""
    for what, mine in (("optimizer", sync.rule.name), ("codec", sync.codec.name)):
        if what not in state:
            raise ValueError(f"state must be as OuterSync.state_dict makes it (no {what})")
        if state[what] != mine:
            raise ValueError(f"state is of {what} {state[what]!r}, this is {mine!r}")


def load_met(sync: OuterSync, state: Mapping[str, Any]) -> None:
    """When experts last met, with turns. A state without that is of none, or of earlier versions:
    then all wait alike."""
    met = torch.tensor(state.get("met", []), dtype=torch.int64)
    if met.shape == sync.met.shape:
        sync.met.copy_(met)


def load_state_dict(sync: OuterSync, state: Mapping[str, Any]) -> None:
    """`OuterSync.load_state_dict`."""
    try:
        placement = Placement.from_dict(state["placement"])
        stored = {what: dict(state[what]) for what in _TENSORS}
        numbers = {name: int(state[name]) for name in _NUMBERS}
        warming = {(a, b): (c, d) for a, b, c, d in state["warmup"]}
        tokens: Tensor = state["tokens"]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"state must be as OuterSync.state_dict makes it ({error!r})") from None
    require_rules(sync, state)
    if placement != sync.placement:
        raise ValueError("state is of another placement than this OuterSync")
    mine = _tensors(sync)
    mine["tokens"], stored["tokens"] = {"": sync.tokens}, {"": tokens}
    for what, tensors in stored.items():
        wanted = {name: tuple(t.shape) for name, t in mine[what].items()}
        found = {name: tuple(t.shape) for name, t in tensors.items()}
        if wanted != found:
            raise ValueError(
                f"state has an {_TENSORS.get(what, what)} of the sizes {found}, this model wants "
                f"{wanted}"
            )
    for what, tensors in stored.items():
        for name, tensor in tensors.items():
            mine[what][name].copy_(tensor)
    for name, number in numbers.items():
        setattr(sync, name, number)
    load_met(sync, state)
    if sync.warmup is not None:
        sync.warmup.progress = warming


# ---- by parameter: for checkpoints that other sites, ranks or placements read -------------------


@torch.no_grad()
def by_parameter(sync: OuterSync, vectors: Sequence[Tensor]) -> dict[int, Tensor]:
    """Vectors of all `sync.layouts` as fp32 tensors of the parameters' shapes, by parameter's id.

    Every rank gets what it holds of the parameters; a collective of the site's ranks.
    """
    result = {
        id(p): torch.zeros_like(p, dtype=torch.float32)
        for p in sync.model.parameters()
        if p.requires_grad
    }
    if sync.lane is not None:
        flats = sync.lane.numbered(vectors)
        for fragment in sync.lane.fragments:
            sync.lane.push(fragment, flats, lambda parameter: result[id(parameter)])
        return result
    for layout, vector in zip(sync.layouts, vectors, strict=True):
        for piece, place in layout.slices():
            piece.part_of(result[id(piece.tensor)]).copy_(vector[place])
    return result


def pieces_of(
    sync: OuterSync, vectors: Sequence[Tensor]
) -> Mapping[int, Tensor | dict[int | None, Tensor]]:
    """As `by_parameter`, but with one rank per site nothing is copied: views of the vectors, by
    rows of the parameter, or with None all of it.
    """
    if sync.lane is not None:
        return by_parameter(sync, vectors)
    result: dict[int, dict[int | None, Tensor]] = {}
    for layout, vector in zip(sync.layouts, vectors, strict=True):
        for piece, place in layout.slices():
            shape = piece.tensor.shape if piece.row is None else piece.tensor.shape[1:]
            result.setdefault(id(piece.tensor), {})[piece.row] = vector[place].view(shape)
    return result


@torch.no_grad()
def from_parameters(
    sync: OuterSync, tensors: Mapping[int, Tensor], vectors: Sequence[Tensor]
) -> None:
    """Fills vectors of all `sync.layouts` with what `by_parameter` returned; a collective."""
    if sync.lane is not None:
        targets = sync.lane.numbered(vectors)
        for fragment in sync.lane.fragments:
            found = sync.lane.pull(fragment, lambda parameter: tensors[id(parameter)])
            for number, flat in found.items():
                targets[number].copy_(flat)
        return
    for layout, vector in zip(sync.layouts, vectors, strict=True):
        for piece, place in layout.slices():
            vector[place].copy_(piece.part_of(tensors[id(piece.tensor)]))


def share_errors(sync: OuterSync) -> dict[str, Tensor]:
    """Error feedback of the sums that this rank encodes, by layout and bucket of the site: views.

    The same names and sizes with any number of ranks per site.
    """
    size = wire.bucket_elements(sync.options.bucket_bytes)
    result = {}
    for layout, feedback in zip(sync.layouts, sync.feedback, strict=True):
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
