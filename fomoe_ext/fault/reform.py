"""Regroups the sites of a new view: interrupted meeting, placement of experts, new models.

All sites of the view take the same steps:

    connect
    exchange their states
    apply the interrupted meeting if any site has applied it, else roll it back (`outer.staged`)
    compute who holds which expert (`ownership`)
    make a model for that, beside the old one
    send each other what is missing
    confirm that all have everything, then replace the old model

If a site is lost on the way, this view ends too, and all begin again with a new one.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from fomoe_ext.fault import ownership, recovery
from fomoe_ext.fault.membership import View
from fomoe_ext.fault.site import Formed, Recoverable
from fomoe_ext.launch import inject
from fomoe_ext.launch.messages import MessageError, gather_objects
from fomoe_ext.launch.world import PeerLost, World, with_others
from fomoe_ext.outer.belongings import Belongings, Item, biases_of, elements_of, items_of, ship
from fomoe_ext.outer.groups import SiteGroups
from fomoe_ext.outer.reduce import Damaged
from fomoe_ext.placement.placement import Placement

_CONNECT_S = 30.0
_BURIAL_S = 5.0


def bury(*groups: Any) -> None:
    """Releases process groups with lost members in a thread, without waiting for them.

    Destroying a group waits until its operations end or time out. The caller must drop its own
    references to the groups within a few seconds.
    """

    def hold(held: list[Any]) -> None:
        time.sleep(_BURIAL_S)
        held.clear()

    threading.Thread(target=hold, args=(list(groups),), name="fomoe-burial", daemon=True).start()


@contextmanager
def _lost_where_damaged() -> Iterator[None]:
    """Turns damaged data into PeerLost, so that the next view sends it again."""
    try:
        yield
    except (Damaged, MessageError) as error:
        raise PeerLost(str(error)) from error


def new_default_group(view: View, world: World, timeout_s: float) -> None:
    """Replaces torch.distributed's default group by one of the view's sites; their collective."""
    if dist.is_initialized():
        bury(dist.group.WORLD)
        dist.destroy_process_group()
    dist.init_process_group(
        "gloo",
        store=view.store,
        rank=world.site,
        world_size=world.num_sites,
        timeout=timedelta(seconds=min(timeout_s, _CONNECT_S)),
    )
    if world.num_sites > 1:
        dist.barrier()
    backend = dist.group.WORLD._get_backend(torch.device("cpu"))  # type: ignore[union-attr]
    backend._set_default_timeout(timedelta(seconds=timeout_s))


@dataclass(frozen=True)
class Regrouped:
    """The result of regrouping, for the report."""

    members: tuple[int, ...]
    joined: tuple[int, ...]
    restored: tuple[dict[str, Any], ...]
    bytes_sent: int
    meeting: str
    """What became of an interrupted meeting: "applied", "rolled back", or "" without one."""


class Reform:
    """Regroups a site with others, each time the sites change."""

    def __init__(self, site: Recoverable) -> None:
        self._site = site
        self._ready: Formed | None = None
        self._made: list[SiteGroups] = []
        if not site.late:
            self._made.append(site.sync.groups)
        self.number = 0
        """How many changes this site has completed."""

    def regroup(self, view: View) -> Regrouped:
        """Regroups with the sites of `view`; a collective of them.

        Raises PeerLost if one of them is lost on the way. Then agree on the next view.
        """
        site = self._site
        world = site.world.of_members(view.members)
        with _lost_where_damaged(), with_others("regrouping", world.number):
            new_default_group(view, world, site.config.outer.timeout_s)
            groups = site.make_groups(world)
            self._keep(groups)
            standing = self._tell(world)
            meeting = self._end_meeting(standing)
            standing = gather_objects(self._standing(), world.num_sites)
            formed = self._form(world, groups, standing)
            sent = self._ship(formed, standing)
            self._ready = formed
            inject.point("reform")
            for entries in gather_objects(formed.restored, world.num_sites):
                formed.told += entries
        known = {s["uid"] for s in standing if not s["fresh"]}
        self._put_into_force()
        return Regrouped(
            members=view.members,
            joined=tuple(sorted(set(view.members) - known)),
            restored=tuple(formed.told),
            bytes_sent=sent,
            meeting=meeting,
        )

    def _keep(self, groups: SiteGroups) -> None:
        """Keeps the new connections and those in use; releases those of earlier views."""
        used = (groups, None if self._site.late else self._site.sync.groups)
        bury(*(old for old in self._made if old not in used))
        self._made = [*(old for old in self._made if old in used and old is not groups), groups]

    # ------------------------------------------------------------------------- states of all sites

    def _tell(self, world: World) -> list[dict[str, Any]]:
        """The states of all sites, after those that missed the last change have completed it."""
        standing = gather_objects(self._standing(), world.num_sites)
        latest = max(s["number"] for s in standing)
        if any(s["number"] != latest and s["ready"] == latest for s in standing):
            if self.number != latest and self._ready is not None:
                self._put_into_force()
            standing = gather_objects(self._standing(), world.num_sites)
        self._ready = None
        return standing

    def _standing(self) -> dict[str, Any]:
        """The state of this site, as far as others need it."""
        site = self._site
        about: dict[str, Any] = {
            "uid": site.world.number,
            "number": self.number,
            "ready": self._ready.number if self._ready else -1,
            "fresh": site.late,
        }
        if site.late:
            return about
        sync = site.sync
        return about | {
            "round": sync.round,
            "arrived": sync.pending is not None and sync.pending.arrived,
            "between": site.steps_in_round == 0,
            "shadows": [site.shadows.round, [list(key) for key in site.shadows.experts]],
            "holds": [list(layer.site_experts) for layer in sync.layout.site.moe_layers],
            "names": Belongings.of(sync.state).names(),
            **recovery.progress(site),
        }

    def _end_meeting(self, standing: Sequence[dict[str, Any]]) -> str:
        """Ends an interrupted meeting in the same way at all sites."""
        site = self._site
        if site.late:
            return ""
        target = max(s["round"] for s in standing if not s["fresh"])
        pending = site.sync.pending is not None
        if site.sync.round == target:
            recovery.end_meeting(site, commit=False)
            return "rolled back" if pending else ""
        if site.sync.round == target - 1 and site.sync.pending and site.sync.pending.arrived:
            recovery.end_meeting(site, commit=True)
            return "applied"
        site.late = True  # it has missed a whole round: the others send it everything
        return ""

    # ------------------------------------------------------------------------------ the new model

    def _form(self, world: World, groups: SiteGroups, standing: Sequence[dict[str, Any]]) -> Formed:
        """A model for this site's share of the new placement; its weights are not yet filled."""
        site = self._site
        old = [s for s in standing if not s["fresh"]]
        if not old:
            raise RuntimeError("no site is left that has the model; resume a checkpoint")
        experts, holdings = site.config.model.num_experts, self._holdings(standing)
        if all(s["between"] for s in old) and not ownership.orphans(holdings, experts):
            replication = site.config.sites.replication
            placement = ownership.rebalance(holdings, experts, replication)
        else:
            # Do not balance now. A restored expert exists only at its new holder and cannot be sent
            # to others yet. In the middle of a round, a new holder would lack what the old ones
            # have trained since the last meeting.
            placement = ownership.adopt_orphans(holdings, experts, _copies(standing))
        model, optimizer, sync = site.make(world, placement, groups, arriving=True)
        number = max(s["number"] for s in standing) + 1
        return Formed(number, world, placement, model, optimizer, sync, old[0])

    def _holdings(self, standing: Sequence[dict[str, Any]]) -> list[list[list[int]]]:
        """The experts that every site holds (`ownership.Holdings`)."""
        nothing: list[list[int]] = [[]] * self._site.config.model.num_layers
        return [nothing if s["fresh"] else s["holds"] for s in standing]

    def _ship(self, formed: Formed, standing: Sequence[dict[str, Any]]) -> int:
        """Fills the new model from this site and the others; returns the bytes sent."""
        site, me = self._site, formed.world.site
        old = [s for s in standing if not s["fresh"]]
        names = sorted(set.intersection(*(set(s["names"]) for s in old)))
        parcels = _parcels(standing, formed.placement)
        mine = Belongings() if site.late else Belongings.of(site.sync.state)
        mine.tensors = {
            k: v for k, v in mine.tensors.items() if k in ("value", "error", "bias", *names)
        }
        mine.steps = dict(formed.donor["steps"])
        here = {} if site.late else items_of(site.sync.layout)
        here_biases = {} if site.late else biases_of(site.sync.layout)
        wanted, wanted_biases = items_of(formed.sync.layout), biases_of(formed.sync.layout)
        everyone = formed.sync.groups.group(formed.sync.groups.everyone)
        sent = 0
        # Layer by layer, so that only one layer is in memory twice.
        for layer in sorted({-1 if item is None else item[0] for item, _, _ in parcels}):
            some = [p for p in parcels if (-1 if p[0] is None else p[0][0]) == layer]
            sizes = {}
            vectors = {}
            for item, source, target in some:
                own, biases = (here, here_biases) if source == me else (wanted, wanted_biases)
                if me in (source, target):
                    sizes[item] = elements_of(own.get(item, []), biases.get(item, []), names)
                if source == me and item not in vectors:
                    vectors[item] = mine.vector(here[item], here_biases.get(item, []))
            arrived, count = ship(everyone, me, [p for p in some if me in p[1:]], sizes, vectors)
            sent += count
            for item, vector in arrived.items():
                mine.take(vector, wanted[item], wanted_biases.get(item, []), names)
        self._restore(formed, mine, standing)
        mine.fill(formed.sync.state)
        if not site.late:
            recovery.carry_share_errors(
                site.sync, site.world.members, formed.sync, formed.world.members
            )
        return sent

    def _restore(
        self, formed: Formed, mine: Belongings, standing: Sequence[dict[str, Any]]
    ) -> None:
        """Restores experts without a holder from a shadow copy or the newest checkpoint; without
        both they start from their initial weights."""
        experts = self._site.config.model.num_experts
        lost = ownership.orphans(self._holdings(standing), experts)
        here = [key for key in lost if formed.world.site in formed.placement.owners(*key)]
        shadows = self._site.shadows
        copied = [key for key in here if key in shadows.experts]
        for key in copied:
            shadows.fill(mine, formed.sync, key)
        others = [key for key in here if key not in copied]
        step = recovery.restore_experts(self._site, formed.model, others) if others else None
        steps = dict.fromkeys(copied, shadows.round * self._site.config.run.local_steps)
        steps |= dict.fromkeys(others, step)
        formed.restored += [
            {"layer": key[0], "expert": key[1], "site": formed.world.number, "from_step": at}
            for key, at in steps.items()
        ]

    def _put_into_force(self) -> None:
        formed, self._ready = self._ready, None
        assert formed is not None
        self.number = formed.number
        self._keep(formed.sync.groups)
        recovery.become(self._site, formed)


def _copies(standing: Sequence[dict[str, Any]]) -> dict[tuple[int, int], int]:
    """By (layer, expert), the site with the newest shadow copy of it."""
    newest: dict[tuple[int, int], tuple[int, int]] = {}
    for place, s in enumerate(standing):
        if s["fresh"]:
            continue
        at, experts = s["shadows"]
        for layer, expert in experts:
            newest[layer, expert] = max(newest.get((layer, expert), (-1, 0)), (at, -place))
    return {key: -place for key, (_, place) in newest.items()}


def _parcels(
    standing: Sequence[dict[str, Any]], placement: Placement
) -> list[tuple[Item, int, int]]:
    """What must be sent: (item, source, target). Senders are chosen evenly."""
    fresh = [place for place, s in enumerate(standing) if s["fresh"]]
    donor = next(place for place, s in enumerate(standing) if not s["fresh"])
    parcels: list[tuple[Item, int, int]] = [(None, donor, target) for target in fresh]
    sends = [0] * len(standing)
    for layer in range(placement.num_layers):
        held: dict[int, list[int]] = {}
        for place, s in enumerate(standing):
            for expert in [] if s["fresh"] else s["holds"][layer]:
                held.setdefault(expert, []).append(place)
        for expert, owners in enumerate(placement.table[layer]):
            for target in owners:
                have = held.get(expert, [])
                if have and target not in have:
                    source = min(have, key=lambda place: (sends[place], place))
                    sends[source] += 1
                    parcels.append(((layer, expert), source, target))
    return parcels
