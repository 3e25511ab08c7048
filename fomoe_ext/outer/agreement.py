"""That all sites agree: about arguments and initial values, and on the bits after a meeting.

After a meeting the first exchange is one number per owner group. Only where that differs do its
members exchange one per piece, so that the error can name the pieces, or the majority's can be
restored.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from fomoe_ext.launch.messages import gather_objects
from fomoe_ext.layer.mesh import SiteRanks
from fomoe_ext.outer.codec import hash_bits
from fomoe_ext.outer.groups import Handle, SiteGroup, SiteGroups
from fomoe_ext.outer.options import MeetingError
from fomoe_ext.placement.placement import Owners

if TYPE_CHECKING:
    from fomoe_ext.outer.sync import OuterSync

_BITS = 1 << 64


class Held(NamedTuple):
    """What a site holds of a piece: parameter, anchor, outer momentum; as far as there are."""

    key: str
    owners: Owners
    tensors: tuple[Tensor, ...]


def _fold(hashes: Iterable[int]) -> int:
    return sum(h * (2 * i + 1) for i, h in enumerate(hashes)) % _BITS


def _signed(value: int) -> int:
    return value - _BITS if value >= _BITS // 2 else value


def piece_hashes(held: Sequence[Held]) -> dict[Owners, dict[str, int]]:
    """A 64-bit hash of every piece, by owner set and key, in the order given."""
    flat = [tensor for piece in held for tensor in piece.tensors]
    values = iter(hash_bits(flat))
    result: dict[Owners, dict[str, int]] = {}
    for piece in held:
        result.setdefault(piece.owners, {})[piece.key] = _fold(next(values) for _ in piece.tensors)
    return result


class Agreement:
    """One exchange of hashes within the owner groups."""

    def __init__(
        self, groups: SiteGroups, held: Sequence[Held], ranks: SiteRanks | None = None
    ) -> None:
        """`ranks`: of this site, each of which has what it holds; None = one."""
        self._groups, self._held = groups, list(held)
        self._ranks = ranks or SiteRanks()
        self._hashes = {
            owners: of_pieces for owners, of_pieces in piece_hashes(held).items() if len(owners) > 1
        }
        self.bytes_sent = 0
        self.differing: dict[Owners, list[tuple[str, list[int]]]] = {}
        """By owner set: pieces that are not the same everywhere, and their hashes in rank order."""
        self.differs = False
        """Whether anything of this site differs, on whichever of its ranks."""

    def exchange(self) -> None:
        """Finds out what differs; all members of the groups must call it."""
        own = {owners: _fold(pieces.values()) for owners, pieces in self._hashes.items()}
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
            own = torch.tensor([_signed(of_site[0] if len(of_site) == 1 else _fold(of_site))])
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
        """Raises MeetingError, with names, when something differs. All of a site must call it."""
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
        """Gives all members what more than half of them hold; the keys that were mended.

        All members of the groups must call it. Raises MeetingError where there is no majority.
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


def agree_on_arguments(sync: OuterSync, problem: Exception | None) -> None:
    """Raises this site's problem; MeetingError for another site's, or when arguments differ."""
    mine: dict[str, Any] = {"problem": str(problem or "")}
    if problem is None:
        # Of stacks without their number of rows: a rank of a site may hold more than another's.
        stacks = {id(p) for layer in sync.moe_layers for p in layer.experts.parameters()}
        shapes = [
            (n, p.shape[1:] if id(p) in stacks else p.shape, p.requires_grad)
            for n, p in sync.model.named_parameters()
        ]
        if sync.ranks.size == 1:
            mine["frozen parameters"] = _frozen(sync.model, stacks)
        mine |= {
            "placement": sync.placement.to_dict(),
            **sync.options.agreed(),
            "parameters": hashlib.sha256(repr(shapes).encode()).hexdigest(),
        }
    size = sync.ranks.size
    everyone = gather_objects(mine, sync.placement.num_sites * size)
    if problem is not None:
        raise problem
    for process, other in enumerate(everyone):
        site = process // size
        if other["problem"]:
            raise MeetingError(f"site {site}: {other['problem']}")
        differing = [name for name in mine if mine[name] != other[name]]
        if differing:
            raise MeetingError(
                f"all sites must have the same {differing[0]}; site {sync.site} and site {site} "
                "differ"
            )


def _frozen(model: nn.Module, stacks: Collection[int]) -> int:
    """A hash of what is neither trained nor an expert's: no meeting makes it alike."""
    tensors = [
        p.detach()
        for p in model.parameters()
        if not p.requires_grad and id(p) not in stacks and not p.is_meta
    ]
    return _fold(hash_bits(tensors)) if tensors else 0


def digests(sync: OuterSync) -> dict[str, str]:
    """`OuterSync.hashes`."""
    with sync.held(wanted=not sync.options.apart):
        mine = _own_digests(sync)
    if sync.ranks.size == 1:
        return mine
    by_rank = sync.ranks.gather(mine)
    return {
        layout.name: hashlib.sha256(
            repr([own.get(layout.name) for own in by_rank]).encode()
        ).hexdigest()
        for layout in sync.site_layouts
    }


def _own_digests(sync: OuterSync) -> dict[str, str]:
    result = {}
    for i, layout in enumerate(sync.layouts):
        digest = hashlib.sha256()
        for piece, place in layout.slices():
            values = sync.anchors[i][place] if sync.options.apart else piece.values()
            # A copy: memory that numpy has seen cannot be given back and taken again.
            digest.update(values.cpu().clone().view(torch.uint8).numpy())
        result[layout.name] = digest.hexdigest()
    return result


def verify(sync: OuterSync) -> None:
    """`OuterSync.verify`."""
    owners_of = {la.name: la.group.owners for la in sync.site_layouts}
    mine = {name: (owners_of[name], digest) for name, digest in digests(sync).items()}
    size, problem = sync.ranks.size, sync.members.change(sync)
    if sync.under_way:
        problem = problem or "call finish before verify: a fragment is under way"
    told = gather_objects((problem, mine), sync.placement.num_sites * size)
    problems = [f"site {i // size}: {text}" for i, (text, _) in enumerate(told) if text]
    if problems:
        raise MeetingError("; ".join(problems))
    everyone = [of_site for _, of_site in told[::size]]
    for first, theirs in enumerate(everyone):
        for name, (owners, digest) in theirs.items():
            differing = [s for s in owners if everyone[s].get(name, ("", ""))[1] != digest]
            if differing:
                raise MeetingError(
                    f"the sites {owners} must hold the same bits of what they share, but site "
                    f"{differing[0]} differs from site {first} (another seed, or not the same "
                    "checkpoint?)"
                )
