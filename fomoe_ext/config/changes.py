"""What is configured anew where a run goes on, and what of that it cannot do. Needs no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from fomoe_ext.config.job import SECTIONS, TrainConfig

_PLACES = ("placement", "placement_by", "placement_file")
_OWN_BUSINESS = {"run.run_dir", "run.resume"}


def changes(old: TrainConfig, new: TrainConfig) -> dict[str, tuple[Any, Any]]:
    """What a run's configuration was and is to be, by section.option, where that differs."""
    found = {}
    for section in SECTIONS:
        before, after = getattr(old, section), getattr(new, section)
        for field in dataclasses.fields(before):
            key = f"{section}.{field.name}"
            pair = getattr(before, field.name), getattr(after, field.name)
            if pair[0] != pair[1] and key not in _OWN_BUSINESS:
                found[key] = pair
    return found


def check_changes(old: TrainConfig | None, new: TrainConfig, rounds_done: int) -> None:
    """Raises ValueError for what a run that goes on cannot do; `old`: its configuration so far."""
    rounds = new.run.resolved_rounds
    if rounds < rounds_done:
        raise ValueError(
            f"rounds must be at least {rounds_done}, as many as the checkpoint has, got {rounds}: "
            "nothing of them is left to do"
        )
    if old is None:
        return
    useless = [key for key in changes(old, new) if key.startswith(("inner.", "outer."))]
    if rounds == rounds_done and useless:
        raise ValueError(
            f"{useless[0]} has no effect any more: all {rounds} rounds are done (--rounds makes it "
            "more)"
        )
    own = ("sites", "replication")
    same = all(getattr(old.sites, name) == getattr(new.sites, name) for name in own)
    moved = [n for n in _PLACES if getattr(old.sites, n) != getattr(new.sites, n)]
    if same and moved and new.sites.placement_file is None:
        raise ValueError(
            f"sites.{moved[0]} cannot change from {getattr(old.sites, moved[0])} to "
            f"{getattr(new.sites, moved[0])} where a run goes on with as many sites and the same "
            "replication: it keeps the checkpoint's placement; --placement-file gives it another"
        )


def told(found: dict[str, tuple[Any, Any]]) -> Iterable[str]:
    """A line for every change."""
    for key, (before, after) in found.items():
        yield f"changed: {key} from {_word(before)} to {_word(after)}"


def _word(value: Any) -> str:
    return " ".join(map(str, value)) or "none" if isinstance(value, tuple) else str(value)
