"""Options that a resumed run changes, and the changes that it cannot make. Needs no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from fomoe_ext.config.job import SECTIONS, TrainConfig

_PLACES = ("placement", "placement_by", "placement_file")
_OWN_BUSINESS = {"run.run_dir", "run.resume"}


def changes(old: TrainConfig, new: TrainConfig) -> dict[str, tuple[Any, Any]]:
    """The old and new value of each option that differs, by section.option."""
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
    """Raises ValueError for changes that a resumed run cannot make.

    `old`: the run's configuration so far, None = not known. `rounds_done`: those of the checkpoint.
    """
    rounds = new.run.resolved_rounds
    if rounds < rounds_done:
        raise ValueError(
            f"rounds must be at least {rounds_done}, the number of rounds that the checkpoint has "
            f"done, got {rounds}"
        )
    if old is None:
        return
    useless = [key for key in changes(old, new) if key.startswith(("inner.", "outer."))]
    if rounds == rounds_done and useless:
        raise ValueError(
            f"{useless[0]} has no effect any more: all {rounds} rounds are done (to train further, "
            "give more --rounds)"
        )
    own = ("sites", "replication")
    same = all(getattr(old.sites, name) == getattr(new.sites, name) for name in own)
    moved = [n for n in _PLACES if getattr(old.sites, n) != getattr(new.sites, n)]
    if same and moved and new.sites.placement_file is None:
        raise ValueError(
            f"sites.{moved[0]} must stay {getattr(old.sites, moved[0])} in a run that is resumed "
            f"with the same sites and replication, got {getattr(new.sites, moved[0])}: the run "
            "keeps the checkpoint's placement (--placement-file sets another one)"
        )


def told(found: dict[str, tuple[Any, Any]]) -> Iterable[str]:
    """A line for each change."""
    for key, (before, after) in found.items():
        yield f"changed: {key} from {_word(before)} to {_word(after)}"


def _word(value: Any) -> str:
    return " ".join(map(str, value)) or "none" if isinstance(value, tuple) else str(value)
