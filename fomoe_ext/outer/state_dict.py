"""The state dict of an OuterSync: what a resumed run needs, as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fomoe_ext.outer.codec import Codec
from fomoe_ext.outer.log import MeetingLog
from fomoe_ext.outer.optimizer import OuterRule
from fomoe_ext.outer.overlap import OverlapTimes
from fomoe_ext.outer.routed import TokenCounts
from fomoe_ext.outer.state import OuterState
from fomoe_ext.outer.step_count import StepCount
from fomoe_ext.outer.warmup import ArrivalWarmup
from fomoe_ext.placement.placement import Placement

_NUMBERS = ("round", "bytes_sent", "steps", "reductions", "agreements")
_TENSORS = {
    "anchor": "outer anchor",
    "momentum": "outer momentum",
    "error": "error feedback (codec, error_feedback)",
    "share_error": "error feedback of sums (codec, error_feedback, bucket_bytes)",
}


@dataclass
class Resumable:
    """Writes and restores the state of the parts of an OuterSync."""

    state: OuterState
    counts: TokenCounts
    steps: StepCount
    log: MeetingLog
    warmup: ArrivalWarmup | None
    times: OverlapTimes

    def state_dict(self) -> dict[str, Any]:
        """`OuterSync.state_dict`."""
        layout, log, counts = self.state.layout, self.log, self.counts
        warming = self.warmup.progress if self.warmup else {}
        return {
            "round": log.round,
            "bytes_sent": log.bytes_sent,
            "steps": self.steps.taken,
            "reductions": self.steps.reductions,
            "agreements": log.agreements,
            "optimizer": layout.site.rule.name,
            "codec": layout.site.codec.name,
            "placement": layout.placement.to_dict(),
            "tokens": counts.tokens,
            "met": counts.met.tolist() if layout.site.options.expert_turns > 1 else [],
            **_tensors(self.state),
            "warmup": [[*key, *steps] for key, steps in warming.items()],
            "overlap": self.times.steps,
            "overlap_reason": self.times.reason,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """`OuterSync.load_state_dict`."""
        try:
            placement = Placement.from_dict(state["placement"])
            stored = {what: dict(state[what]) for what in _TENSORS}
            numbers = {name: int(state[name]) for name in _NUMBERS}
            warming = {(a, b): (c, d) for a, b, c, d in state["warmup"]}
            tokens: Tensor = state["tokens"]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"state must be as OuterSync.state_dict makes it ({error!r})"
            ) from None
        site = self.state.layout.site
        require_rules(site.rule, site.codec, state)
        if placement != self.state.layout.placement:
            raise ValueError("state is of another placement than this OuterSync")
        mine = _tensors(self.state)
        mine["tokens"], stored["tokens"] = {"": self.counts.tokens}, {"": tokens}
        _fill(mine, stored)
        self.log.round, self.log.bytes_sent = numbers["round"], numbers["bytes_sent"]
        self.log.agreements = numbers["agreements"]
        self.steps.taken, self.steps.reductions = numbers["steps"], numbers["reductions"]
        load_met(self.counts.met, state)
        self.times.resume(state)
        if self.warmup is not None:
            self.warmup.progress = warming


def _tensors(state: OuterState) -> dict[str, dict[str, Tensor]]:
    names = [layout.name for layout in state.layout.layouts]
    feedback = list(zip(names, state.feedback, strict=True))
    return {
        "anchor": dict(zip(names, state.anchors, strict=False)),
        "momentum": dict(zip(names, state.momenta, strict=False)),
        "error": {name: f.own for name, f in feedback if f.own is not None},
        "share_error": {name: f.shares for name, f in feedback if f.shares is not None},
    }


def _fill(mine: Mapping[str, Mapping[str, Tensor]], stored: Mapping[str, Any]) -> None:
    """Copies stored tensors. Raises ValueError, with nothing changed, where sizes differ."""
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


def require_rules(rule: OuterRule, codec: Codec, state: Mapping[str, Any]) -> None:
    """Raises ValueError unless a state is of the same outer optimizer and codec."""
    for what, mine in (("optimizer", rule.name), ("codec", codec.name)):
        if what not in state:
            raise ValueError(f"state must be as OuterSync.state_dict makes it (no {what})")
        if state[what] != mine:
            raise ValueError(f"state is of {what} {state[what]!r}, this is {mine!r}")


def load_met(met: Tensor, state: Mapping[str, Any]) -> None:
    """Restores when each expert last met, with expert_turns. Other states do not have it: then no
    expert has priority."""
    found = torch.tensor(state.get("met", []), dtype=torch.int64)
    if found.shape == met.shape:
        met.copy_(found)
