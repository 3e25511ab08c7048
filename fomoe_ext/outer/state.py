"""What a resumed run needs of an OuterSync."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fomoe_ext.placement import Placement

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


def load_state_dict(sync: OuterSync, state: Mapping[str, Any]) -> None:
    """`OuterSync.load_state_dict`."""
    try:
        given, codec = state["optimizer"], state["codec"]
        placement = Placement.from_dict(state["placement"])
        stored = {what: dict(state[what]) for what in _TENSORS}
        numbers = {name: int(state[name]) for name in _NUMBERS}
        warming = {(a, b): (c, d) for a, b, c, d in state["warmup"]}
        tokens: Tensor = state["tokens"]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"state must be as OuterSync.state_dict makes it ({error!r})") from None
    if given != sync.rule.name:
        raise ValueError(f"state is of optimizer {given!r}, this is {sync.rule.name!r}")
    if codec != sync.codec.name:
        raise ValueError(f"state is of codec {codec!r}, this is {sync.codec.name!r}")
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
    if sync.warmup is not None:
        sync.warmup.progress = warming
