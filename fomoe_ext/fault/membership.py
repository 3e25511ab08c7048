"""Which sites take part: agreed through torchft's lighthouse, watched by heartbeats.

Each site has a permanent number. A view is a set of sites that form process groups together. A site
that finds another one lost ends the view; the others notice within half a second, and the live
sites agree on the next view. A site that joins late waits until a view ends between two rounds.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any, NamedTuple

import torch.distributed as dist

from fomoe_ext.config.addresses import bracketed, parse_address, resolve
from fomoe_ext.config.fault import FaultConfig
from fomoe_ext.fault import keys
from fomoe_ext.fault.lighthouse import (
    LIGHTHOUSE,
    require_lighthouse,
    require_secret,
    torchft,
)
from fomoe_ext.fault.secret import keyed, matches
from fomoe_ext.files.json_values import loads
from fomoe_ext.launch.waiting import reason_of

_log = logging.getLogger(__name__)

_BEAT_S = 0.5
_LOOK_S = 0.05
_ARRIVAL_S = 10.0
"""How long a site that asked to join is waited for when it is to be taken in."""
_STORE_S = 30.0
_KEY_S = 10.0
"""How long a lighthouse that was just started may take to write its first key."""
_CURRENT_BYTES = 1 << 20
"""The longest record of the current view that is accepted."""


class View(NamedTuple):
    """The sites that take part, ascending, and the store for their process groups."""

    name: str
    members: tuple[int, ...]
    store: dist.Store


def read_current(raw: bytes, num_sites: int) -> tuple[str, tuple[int, ...]]:
    """Name and members of the current view, from its record in the store.

    Raises ValueError for a record that `TorchftMembership` would not write.
    """
    try:
        value = loads(raw) if len(raw) <= _CURRENT_BYTES else None
    except ValueError:
        value = None
    name, members = (
        (value.get("name"), value.get("members")) if isinstance(value, dict) else ("", ())
    )
    if not (isinstance(name, str) and name and isinstance(members, list)) or not all(
        type(site) is int and 0 <= site < num_sites for site in members
    ):
        raise ValueError(
            "the membership record in the store is corrupt: it must hold a name and members in "
            f"[0, {num_sites}), got {raw[:100]!r}"
        )
    return name, tuple(members)


class NotAMember(RuntimeError):
    """The other sites have continued without this one."""


class TooFew(RuntimeError):
    """Fewer sites are left than the quorum."""


class Finished(RuntimeError):
    """The job has ended without this site."""


class _Beats:
    """Sends a heartbeat twice a second and reads those of the other sites, in a thread."""

    def __init__(self, owner: TorchftMembership) -> None:
        self._owner = owner
        self._heard: dict[int, tuple[bytes, float]] = {}
        self._lock = threading.Lock()
        self._count = 0
        self.reason = ""
        self.counts = True
        self.knocked: frozenset[int] = frozenset()
        self.blind_since: float | None = None
        self.ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="fomoe-beats", daemon=True)

    def start(self) -> None:
        if not self._thread.is_alive():
            self.beat()
            self._thread.start()

    def beat(self) -> None:
        """Sends one heartbeat to the store and, if this site counts, to the lighthouse."""
        owner = self._owner
        self._count += 1
        owner.beat_store.set(keys.beat(owner.site), f"{owner.incarnation}.{self._count}")
        # The lighthouse forms a quorum when more than half of the live sites ask. A site that
        # waits to be taken in does not ask, so it must not count as live.
        if self.counts:
            owner.beat_client.heartbeat(str(owner.site), timedelta(seconds=5))

    def _run(self) -> None:
        while not self.ended.wait(_BEAT_S):
            try:
                self.beat()
                self._look()
                self.blind_since = None
            except Exception as error:  # the store's connection raises many types
                # Without the lighthouse the members cannot change. Training continues.
                if self.blind_since is None:
                    self.blind_since = time.monotonic()
                    _log.info("fomoe: the lighthouse does not answer (%s)", reason_of(error))
                with suppress(Exception):
                    self._owner.connect()

    def _look(self) -> None:
        owner, now = self._owner, time.monotonic()
        view = owner.view
        store = owner.beat_store
        for site in owner.all_sites:
            if site == owner.site or not store.check([keys.beat(site)]):
                continue
            beat = store.get(keys.beat(site))
            with self._lock:
                before = self._heard.get(site)
                if before is None or before[0] != beat:
                    self._heard[site] = beat, now
        knocking = {s for s in owner.all_sites if store.check([keys.knock(s)])}
        self.knocked = frozenset(knocking - set(view.members if view else ()))
        if view is not None and store.check([keys.end(view.name)]):
            self.reason = self.reason or store.get(keys.end(view.name)).decode()
        elif view is not None:
            silent = [s for s in view.members if s != owner.site and self.is_silent(s)]
            if silent and self.is_dead(silent[0]):
                self.reason = f"the process of site {silent[0]} has ended"
            elif silent:
                self.reason = f"site {silent[0]} sent no heartbeat for {owner.silent_s:g} s"

    def is_silent(self, site: int) -> bool:
        """Whether a site has sent no heartbeat for `silent_s` seconds, or is known to be dead."""
        owner = self._owner
        with self._lock:
            heard = self._heard.get(site)
        if heard is not None and time.monotonic() - heard[1] > owner.silent_s:
            return True
        return self.is_dead(site)

    def is_dead(self, site: int) -> bool:
        """Whether the launcher has reported the end of the process that was in the view."""
        store, owner = self._owner.beat_store, self._owner
        if not store.check([keys.dead(site)]):
            return False
        return int(store.get(keys.dead(site))) > owner.deaths_before.get(site, 0)

    def forget(self, sites: Sequence[int]) -> None:
        """Treats these sites as just heard from, for a new view."""
        with self._lock:
            for site in sites:
                beat = self._heard.get(site, (b"", 0.0))[0]
                self._heard[site] = beat, time.monotonic()
        self.reason = ""


class TorchftMembership:
    """The membership of one site, through torchft's lighthouse, in one view after another."""

    def __init__(
        self,
        address: str,
        site: int,
        num_sites: int,
        *,
        quorum: int,
        silent_s: float,
        name: str = LIGHTHOUSE,
    ) -> None:
        """`address`: HOST:PORT of a lighthouse. `site`: the permanent number of this site.

        `name`: the option that gave the address. Raises NotInstalled without torchft, ValueError
        for an address that requires a secret, OSError if no lighthouse of this job answers.
        """
        native = torchft()
        self._address, self._name = parse_address(address, name), name
        require_secret(self._address.host)
        self._native = native
        self.site, self.all_sites = site, tuple(range(num_sites))
        self.quorum, self.silent_s = quorum, silent_s
        self.view: View | None = None
        self.deaths_before: dict[int, int] = {}
        self._ended: set[int] = set()
        self._attempt = 0
        self.connect()
        self.incarnation = self.store.add(keys.incarnation(site), 1)
        self._beats = _Beats(self)

    def connect(self) -> None:
        """Connects to the lighthouse, for the first time or again."""
        require_lighthouse(self._address, self._name)
        host, port = resolve(self._address, self._name)
        wait = timedelta(seconds=_STORE_S)
        stores = [dist.TCPStore(host, port, wait_for_workers=False, timeout=wait) for _ in range(2)]
        store, beat_store = (dist.PrefixStore(keys.root(), store) for store in stores)
        try:
            store.wait([keys.LIGHTHOUSE_PORT], timedelta(seconds=_KEY_S))
        except dist.DistStoreError:
            raise ConnectionError(
                f"{self._name} {self._address} answers, but is no lighthouse of this job: give the "
                "address that `fomoe lighthouse` has printed, and the same FOMOE_SECRET"
            ) from None
        rpc = f"http://{bracketed(host)}:{int(store.get(keys.LIGHTHOUSE_PORT))}"
        clients = [self._native.LighthouseClient(rpc, wait) for _ in range(2)]
        self.store, self.beat_store = store, beat_store
        self._client, self.beat_client = clients

    # ---------------------------------------------------------------------- while the job goes on

    def agree(self, round_index: int, *, between_rounds: bool, patience_s: float) -> View:
        """The next view: the live sites that arrive within `patience_s` seconds.

        A collective of these sites. `between_rounds`: also take in sites that asked to join. Raises
        NotAMember if the others have continued already, TooFew below the quorum.
        """
        before = self.view
        assert before is not None, "begin or knock comes first"
        self._raise_if_finished()
        if between_rounds and not self.store.check([keys.admit(before.name)]):
            self.store.set(keys.admit(before.name), "1")
        self.end("the next view is being formed")
        self.store.set(keys.here(before.name, self.site), "1")
        self._await(before, sorted(self._beats.knocked) if between_rounds else [], patience_s)
        return self._enter(self._ask(round_index, self.quorum))

    def lost(self) -> str:
        """Why the current view cannot continue, or "". Quick."""
        return self._beats.reason

    # ----------------------------------------------------------------------------- coming, leaving

    def begin(self, timeout_s: float) -> View | None:
        """The first view, of all sites; None if the job is already running.

        Raises TooFew if not all arrive in time.
        """
        if self.store.check([keys.CURRENT]):
            return None
        self.store.set(keys.start(self.site), "1")
        deadline = time.monotonic() + timeout_s
        while not all(self.store.check([keys.start(s)]) for s in self.all_sites):
            if self.store.check([keys.CURRENT]):
                return None
            if time.monotonic() > deadline:
                missing = [s for s in self.all_sites if not self.store.check([keys.start(s)])]
                raise TooFew(f"sites {missing} did not start within {timeout_s:g} s")
            time.sleep(_LOOK_S)
        self._beats.start()
        # The lighthouse may answer some sites before all have asked. Only the view of all sites is
        # the current one: a site that sees a current view takes the job for running, and knocks.
        while (view := self._ask(0, 1)).members != self.all_sites:
            if time.monotonic() > deadline:
                missing = sorted(set(self.all_sites) - set(view.members))
                raise TooFew(f"sites {missing} did not join within {timeout_s:g} s")
            time.sleep(_LOOK_S)
        return self._enter(view)

    def knock(self, timeout_s: float) -> View:
        """Asks to join, and returns the view that takes this site in, at the end of a round.

        Raises TooFew if that does not happen in time.
        """
        self._beats.counts = False
        self._beats.start()
        self.view = None
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            self._raise_if_finished()
            name, members = self._current()
            if self.site in members:
                # The others have not yet noticed that the previous process of this site is gone.
                self.store.set(keys.end(name), f"site {self.site} was restarted")
            self.store.set(keys.knock(self.site), str(self.incarnation))
            if self.store.check([keys.admit(name)]):
                self._beats.counts = True
                self.store.set(keys.here(name, self.site), "1")
                view = self._enter(self._ask(-1, self.quorum))
                self.store.delete_key(keys.knock(self.site))
                return view
            time.sleep(_LOOK_S)
        raise TooFew(f"the other sites did not take in site {self.site} within {timeout_s:g} s")

    def close(self) -> None:
        """Sends no more heartbeats: to the other sites this one is silent from now on."""
        self._beats.ended.set()

    def why(self, site: int) -> str:
        """Why a site counts as lost, as text."""
        if site in self._ended:
            return "its process has ended"
        if self._beats.is_silent(site):
            return f"it sent no heartbeat for {self.silent_s:g} s"
        return "it was late"

    def finish(self) -> None:
        """Records that the job has ended, so that sites stop waiting or joining."""
        with suppress(dist.DistError):  # if the lighthouse is gone, nobody can be told
            self.store.set(keys.FINISHED, "1")

    def _raise_if_finished(self) -> None:
        if self.store.check([keys.FINISHED]):
            raise Finished("the job has ended")

    def knocked(self) -> bool:
        """Whether a site waits to join."""
        members = self.view.members if self.view else ()
        return bool(self._beats.knocked - set(members))

    def end(self, reason: str) -> None:
        """Ends the current view; its other sites read the reason from the store."""
        assert self.view is not None
        if not self.store.check([keys.end(self.view.name)]):
            self.store.set(keys.end(self.view.name), reason)

    def _await(self, view: View, late: Sequence[int], patience_s: float) -> None:
        """Waits until the live sites of the view and the late ones have arrived, with a limit."""
        start = time.monotonic()
        while True:
            if self._superseded(view):
                raise NotAMember(f"the other sites have continued without site {self.site}")
            away = [s for s in view.members if not self.store.check([keys.here(view.name, s)])]
            away = [s for s in away if not self._beats.is_silent(s)]
            passed = time.monotonic() - start
            if passed < _ARRIVAL_S:
                late = [s for s in late if not self.store.check([keys.here(view.name, s)])]
                late = [s for s in late if not self._beats.is_silent(s)]
            else:
                late = []
            if not (away or late) or (passed > patience_s and not late):
                return
            time.sleep(_LOOK_S)

    def _superseded(self, view: View) -> bool:
        name, members = self._current()
        return name != view.name and self.site not in members

    def _current(self) -> tuple[str, tuple[int, ...]]:
        return read_current(self.store.get(keys.CURRENT), len(self.all_sites))

    def _ask(self, round_index: int, least: int) -> View:
        """Asks the lighthouse for a quorum: the next view, which `_enter` makes the current one.

        Raises TooFew for fewer than `least` sites.
        """
        deadline = time.monotonic() + 4 * self.silent_s + _STORE_S
        while True:
            self._attempt += 1
            about = {"attempt": self._attempt, "incarnation": self.incarnation}
            about["proof"] = keyed("member", self.site, self._attempt, self.incarnation)
            try:
                quorum = self._client.quorum(
                    str(self.site),
                    timedelta(seconds=self.silent_s + 5),
                    step=round_index,
                    world_size=1,
                    shrink_only=False,
                    data=about,
                )
                break
            except (RuntimeError, TimeoutError) as error:
                if time.monotonic() > deadline:
                    raise TooFew(f"no quorum of {self.quorum} sites: {reason_of(error)}") from None
        proven = [p for p in quorum.participants if _is_proven(p.replica_id, p.data)]
        members = tuple(sorted(int(p.replica_id) for p in proven))
        if self.site not in members or len(members) < least:
            raise TooFew(f"sites {members} are only {len(members)}, quorum is {least}")
        self._attempt = max(int(p.data["attempt"]) for p in proven)
        incarnations = [int(p.data["incarnation"]) for p in proven]
        name = f"{quorum.quorum_id}.{self._attempt}.{'-'.join(map(str, incarnations))}"
        return View(name, members, dist.PrefixStore(keys.of_view(name), self.store))

    def _enter(self, view: View) -> View:
        """Makes `view` the current one, for this site and in the store."""
        deaths = {s: self._deaths(s) for s in self.all_sites}
        before = self.deaths_before
        ended = {s for s in self.all_sites if s in before and deaths[s] > before[s]}
        self._ended = (self._ended | ended) - set(view.members)
        self.deaths_before = deaths
        self.view = view
        self._beats.forget(view.members)
        self.store.set(keys.CURRENT, json.dumps({"name": view.name, "members": view.members}))
        return view

    def _deaths(self, site: int) -> int:
        return int(self.store.add(keys.deaths(site), 0))


def _is_proven(replica_id: str, data: Any) -> bool:
    """Whether a participant has proven that it knows the run's secret."""
    try:
        words = int(replica_id), int(data["attempt"]), int(data["incarnation"])
        return matches(str(data["proof"]), "member", *words)
    except (TypeError, ValueError, KeyError):
        return False


def join(fault: FaultConfig, site: int, num_sites: int) -> TorchftMembership:
    """A site's membership, at the lighthouse that the options or the launcher name.

    Raises ValueError if neither names one, and what `TorchftMembership` raises.
    """
    name = "--lighthouse" if fault.lighthouse else LIGHTHOUSE
    address = fault.lighthouse or os.environ.get(LIGHTHOUSE)
    if address is None:
        raise ValueError(
            "fault.membership = torchft needs a lighthouse: use `fomoe train`, or start "
            "`fomoe lighthouse` and give its address with --lighthouse"
        )
    quorum, silent_s = fault.quorum, fault.silent_s
    return TorchftMembership(address, site, num_sites, quorum=quorum, silent_s=silent_s, name=name)
