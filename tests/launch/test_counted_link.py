"""The link that a site reads from its environment, and the delays that it counts itself."""

from __future__ import annotations

import threading
import time

import pytest

from fomoe_ext.config.links import describe
from fomoe_ext.launch.link import VARIABLE, CountedLink, active_link, link_variable
from fomoe_ext.placement.wire import Link


@pytest.mark.parametrize("link", [Link(2e8, 0.05), Link(1e9, 0.0), Link(1e8 / 3, 1e-7 / 3)])
def test_sites_read_what_the_launcher_wrote(link):
    def read(mode):
        return active_link({VARIABLE: link_variable(link, mode)})

    counted, words = read("counted")
    assert counted.link == link and counted.rate and words == f"{describe(link)}: counted delays"
    counted, words = read("rate")
    assert counted.link == link and not counted.rate
    assert "rate by the kernel" in words and words.endswith("latency counted")
    counted, words = read("kernel")
    assert counted is None and words.startswith(describe(link)) and "by the kernel" in words
    assert ("delay" in words) == (link.latency > 0)


def test_without_a_launcher_the_link_of_the_job_is_counted():
    assert active_link({}) == (None, "")
    counted, words = active_link({}, Link(1e6, 0.1))
    assert counted.link == Link(1e6, 0.1) and counted.rate and words.endswith("counted delays")
    counted, _ = active_link({VARIABLE: link_variable(Link(2e6, 0), "counted")}, Link(1e6, 0.1))
    assert counted.link == Link(2e6, 0)  # what the launcher has made counts


@pytest.mark.parametrize("value", ["", "200mbit", "200mbit;", "200mbit;fast", "fast;counted"])
def test_a_malformed_variable_is_named(value):
    with pytest.raises(ValueError, match=VARIABLE):
        active_link({VARIABLE: value})


class Clock:
    """A clock that only `sleep` advances, by a little more than asked for."""

    def __init__(self) -> None:
        self.now = 100.0
        self.slept: list[float] = []

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


def counted(clock: Clock, **kinds: bool) -> CountedLink:
    """A link of 1000 bytes a second and half a second."""
    return CountedLink(Link(8000, 0.5), clock=clock, sleep=clock.sleep, **kinds)


def test_exchanges_take_the_uplink_one_after_the_other():
    clock = Clock()
    link = counted(clock)
    assert link.send(1000) == 101.5
    assert link.send(2000) == 103.5  # its bits follow those of the first; latencies overlap
    clock.now = 102.0
    assert link.send(500) == 104.0  # the uplink is busy until 103
    clock.now = 110.0
    assert link.send(0) == 110.5
    assert link.send(1000) == 111.5
    assert link.ended(111.5) == 111.5


def test_what_the_kernel_shapes_is_not_counted():
    clock = Clock()
    link = counted(clock, rate=False)
    until = link.send(10**9)
    assert until == link.send(1) == 100.5
    clock.now = 107.0  # the kernel took 7 s for the bits; the last exchange waits for a latency
    assert link.ended(until) == 107.5
    assert link.ended(until, 103.0) == 103.5  # it ended before anybody waited for it
    clock.now = 100.0
    assert link.ended(until) == 100.5
    assert counted(clock, latency=False).send(1000) == 101.0


def test_waiting_ends_at_the_time_and_not_before():
    clock = Clock()
    link = counted(clock)
    clock.sleep = lambda seconds: Clock.sleep(clock, seconds / 2 + 0.01)  # wakes too early
    link = counted(clock)
    link.wait(101.0)
    assert clock.now >= 101.0 and len(clock.slept) > 2
    before = len(clock.slept)
    link.wait(101.0)
    link.wait(7.0)
    assert len(clock.slept) == before


def test_threads_share_the_uplink():
    def clock() -> float:
        time.sleep(0)  # lets another thread run, in the midst of `send`
        return 0.0

    link = CountedLink(Link(8.0, 0.0), clock=clock)
    times: list[float] = []
    gate = threading.Barrier(4)

    def work() -> None:
        gate.wait()
        times.extend([link.send(1) for _ in range(250)])

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(times) == [float(i) for i in range(1, 1001)]


@pytest.mark.parametrize("link", [Link(0, 0), Link(-1, 0), Link(1, -1)])
def test_bad_links_and_sizes_are_named(link):
    with pytest.raises(ValueError, match="link must have a bandwidth > 0"):
        CountedLink(link)
    with pytest.raises(ValueError, match="nbytes must be >= 0, got -1"):
        CountedLink(Link(1, 0)).send(-1)
