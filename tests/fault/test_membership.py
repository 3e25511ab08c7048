"""How the sites of a job find each other, at a lighthouse in this process."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch.distributed as dist

from fomoe_ext.config.addresses import parse_address
from fomoe_ext.fault import keys
from fomoe_ext.fault.lighthouse import Lighthouse
from fomoe_ext.fault.membership import TooFew, TorchftMembership

pytest.importorskip("torchft", reason="the extra `fault` is not installed")

NUM_SITES, SILENT_S = 3, 3.0


@pytest.fixture
def lighthouse(monkeypatch: pytest.MonkeyPatch) -> Iterator[Lighthouse]:
    monkeypatch.setenv("RUST_LOG", "error")
    there = Lighthouse(parse_address("127.0.0.1:0", "--bind", any_port=True), 1, SILENT_S)
    yield there
    there.shutdown()


@pytest.fixture
def members(lighthouse: Lighthouse) -> Iterator[list[TorchftMembership]]:
    all_of_them = [
        TorchftMembership(lighthouse.address, site, NUM_SITES, quorum=1, silent_s=SILENT_S)
        for site in range(NUM_SITES)
    ]
    yield all_of_them
    for member in all_of_them:
        member.close()


class _Paused(dist.PrefixStore):
    """The store of a site that calls `pause` before it looks up a key for the second time."""

    def __init__(self, store: dist.PrefixStore, key: str, pause: Callable[[], None]) -> None:
        super().__init__(keys.root(), store.underlying_store)
        self._key, self._pause, self._looks = key, pause, 0

    def check(self, wanted: list[str]) -> bool:
        self._looks += wanted == [self._key]
        if self._looks == 2:
            self._looks += 1
            self._pause()
        return bool(super().check(wanted))


@pytest.mark.parametrize("key", [keys.CURRENT, keys.start(0)])
def test_a_slow_site_is_in_the_first_view(members: list[TorchftMembership], key: str) -> None:
    """The job does not start without it, however far the others get between two of its reads."""
    *others, slow = members
    go = threading.Event()

    def pause() -> None:
        go.set()
        time.sleep(1.0)

    def begin(member: TorchftMembership) -> Any:
        assert go.wait(20.0)
        return member.begin(20.0)

    slow.store = _Paused(slow.store, key, pause)
    with ThreadPoolExecutor(NUM_SITES) as pool:
        asked = [pool.submit(slow.begin, 20.0), *(pool.submit(begin, m) for m in others)]
        views = [future.result() for future in asked]
    assert [view and view.members for view in views] == [tuple(range(NUM_SITES))] * NUM_SITES
    assert len({view.name for view in views}) == 1


def test_a_site_lost_at_the_start_is_waited_for_with_a_limit(
    members: list[TorchftMembership],
) -> None:
    """The site has announced its start but does not join: the error at the others names it."""
    *others, gone = members
    gone.store.set(keys.start(gone.site), "1")
    with ThreadPoolExecutor(NUM_SITES) as pool:
        asked = [pool.submit(m.begin, 1.0) for m in others]
        for future in asked:
            with pytest.raises(TooFew, match=r"sites \[2\] did not join within 1 s"):
                future.result()
    assert not others[0].store.check([keys.CURRENT])


def test_a_site_that_joins_a_running_job_has_no_first_view(
    lighthouse: Lighthouse, members: list[TorchftMembership]
) -> None:
    with ThreadPoolExecutor(NUM_SITES) as pool:
        views = [f.result() for f in [pool.submit(m.begin, 20.0) for m in members]]
    assert all(views)
    again = TorchftMembership(lighthouse.address, 1, NUM_SITES, quorum=1, silent_s=SILENT_S)
    assert again.incarnation == 2
    assert again.begin(1.0) is None


def test_a_closed_member_is_silent(members: list[TorchftMembership]) -> None:
    """Its thread ends; the others find out by its silence."""
    with ThreadPoolExecutor(NUM_SITES) as pool:
        assert all(f.result() for f in [pool.submit(m.begin, 20.0) for m in members])
    members[2].close()
    deadline = time.monotonic() + 30.0
    while not members[0].lost() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert members[0].lost() == f"site 2 sent no heartbeat for {SILENT_S:g} s"
