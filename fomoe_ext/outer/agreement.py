"""Agreement: after a meeting all holders of a piece must have the same bits of it.

The members of an owner group first exchange one hash for everything they share. Only if it differs
do they exchange one per piece, to name the pieces that differ or to restore the majority's values.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fomoe_ext.layer.mesh import SiteRanks
from fomoe_ext.outer.codec import hash_bits
from fomoe_ext.outer.errors import MeetingError
from fomoe_ext.outer.groups import Handle, SiteGroup, SiteGroups
from fomoe_ext.placement.placement import Owners

_BITS = 1 << 64


class Held(NamedTuple):
    """What a site holds of a piece: parameter, and anchor and outer momentum where they exist."""

    key: str
    owners: Owners
    tensors: tuple[Tensor, ...]


def fold(hashes: Iterable[int]) -> int:
    """A 64-bit hash of several 64-bit numbers and their order."""
    return sum(h * (2 * i + 1) for i, h in enumerate(hashes)) % _BITS


def _signed(value: int) -> int:
    return value - _BITS if value >= _BITS // 2 else value


def piece_hashes(held: Sequence[Held]) -> dict[Owners, dict[str, int]]:
    """A 64-bit hash of every piece, by owner set and key, in the order given."""
    flat = [tensor for piece in held for tensor in piece.tensors]
    values = iter(hash_bits(flat))
    result: dict[Owners, dict[str, int]] = {}
    for piece in held:
        result.setdefault(piece.owners, {})[piece.key] = fold(next(values) for _ in piece.tensors)
    return result


class Agreement:
    """One exchange of hashes within the owner groups."""

    def __init__(
        self, groups: SiteGroups, held: Sequence[Held], ranks: SiteRanks | None = None
    ) -> None:
        """`ranks`: the ranks of this site, each with its own `held`; None = one rank."""
        self._groups, self._held = groups, list(held)
        self._ranks = ranks or SiteRanks()
        self._hashes = {
            owners: of_pieces for owners, of_pieces in piece_hashes(held).items() if len(owners) > 1
        }
        self.bytes_sent = 0
        self.differing: dict[Owners, list[tuple[str, list[int]]]] = {}
        """By owner set: pieces that are not the same everywhere, and their hashes in rank order."""
        self.differs = False
        """Whether anything that this site holds, on any of its ranks, differs."""

    def exchange(self) -> None:
        """Exchanges hashes and finds out what differs; a collective of the groups' members."""
        own = {owners: fold(pieces.values()) for owners, pieces in self._hashes.items()}
        by_rank = self._ranks.gather(own, "background")
        differing, sent = self._ranks.tell(lambda: self._compare(by_rank), "background")
        self.bytes_sent += sent if self._ranks.leads else 0
        self.differs = bool(differing)
        for owners in differing:
            found = self._find(self._groups.group(owners)) if owners in self._hashes else []
            if found:  # else another rank has it
                self.differing[owners] = found

    def _compare(self, by_rank: Sequence[dict[Owners, int]]) -> tuple[list[Owners], int]:
        """The owner sets in which sites differ, and the bytes sent: one hash per set and site."""
        waiting: list[tuple[SiteGroup, Handle, Tensor]] = []
        total = 0
        for owners in sorted(set().union(*by_rank)):
            group = self._groups.group(owners)
            of_site = [hashes.get(owners, 0) for hashes in by_rank]
            own = torch.tensor([_signed(of_site[0] if len(of_site) == 1 else fold(of_site))])
            own = own.to(group.device)
            gathered = own.new_empty(group.size)
            handle, sent = group.gather(gathered, own)
            total += sent
            waiting.append((group, handle, gathered))
        differing = []
        for group, handle, gathered in waiting:
            handle.wait()
            if len(set(gathered.tolist())) > 1:
                differing.append(group.owners)
        return differing, total

    def _find(self, group: SiteGroup) -> list[tuple[str, list[int]]]:
        mine = self._hashes[group.owners]
        table, sent = group.gather_now(torch.tensor([_signed(h) for h in mine.values()]))
        self.bytes_sent += sent
        columns = zip(mine, table.T.tolist(), strict=True)
        return [(key, column) for key, column in columns if len(set(column)) > 1]

    def require(self) -> None:
        """Raises MeetingError naming the pieces that differ; a collective of the site's ranks."""
        text = self._ranks.first(self._difference()) if self.differs else ""
        if text:
            raise MeetingError(text)

    def _difference(self) -> str:
        for owners, pieces in self.differing.items():
            key, column = pieces[0]
            usual = _majority(column)
            common = column[0] if usual is None else usual
            others = [owners[i] for i, value in enumerate(column) if value != common]
            same = [owners[i] for i, value in enumerate(column) if value == common]
            more = f" and {len(pieces) - 1} more" if len(pieces) > 1 else ""
            same_ = _words(same)
            return f"sites {_words(others)} hold other bits of {key}{more} than sites {same_}"
        return ""

    def heal(self) -> list[str]:
        """Gives all members the values that more than half of them hold; returns the keys of the
        pieces that were restored.

        A collective of the groups' members. Raises MeetingError where there is no majority.
        """
        healed, problem = [], ""
        try:
            healed = self._heal()
        except MeetingError as error:
            problem = str(error)
        problem = self._ranks.first(problem, "background")
        if problem:
            raise MeetingError(problem)
        self.differs = False
        return [key for keys in self._ranks.gather(healed, "background") for key in keys]

    def _heal(self) -> list[str]:
        tensors = {(piece.owners, piece.key): piece.tensors for piece in self._held}
        healed = []
        for owners, pieces in sorted(self.differing.items()):
            group = self._groups.group(owners)
            for key, column in pieces:
                usual = _majority(column)
                if usual is None:
                    raise MeetingError(
                        f"no majority of the sites {_words(owners)} holds the same bits of {key}"
                    )
                for tensor in tensors[owners, key]:
                    self.bytes_sent += group.broadcast(tensor, column.index(usual))
                healed.append(key)
        self.differing = {}
        return healed


def _majority(column: Sequence[int]) -> int | None:
    value, count = Counter(column).most_common(1)[0]
    return value if 2 * count > len(column) else None


def _words(sites: Iterable[int]) -> str:
    return ", ".join(map(str, sites))
