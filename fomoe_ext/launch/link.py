"""A slow link on one machine: meetings take as long as at a given bandwidth and latency.

If the kernel allows it, the kernel shapes the traffic (`fomoe_ext.launch.namespace`). Whatever it
cannot do is counted: `CountedLink` computes when an exchange would be complete, and the transport
waits until then. The launcher tells its sites by the environment variable FOMOE_LINK which of the
two they have. The user may choose: FOMOE_LINK_MODE=counted never asks the kernel, and
FOMOE_LINK_MODE=kernel fails if the kernel cannot shape the rate. Needs no torch.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Callable, Mapping
from typing import Literal

from fomoe_ext.config.links import describe, parse_link, spec
from fomoe_ext.placement.wire import Link

VARIABLE = "FOMOE_LINK"
"""`SPEC;MODE`, set by the launcher for its sites."""
MODE_VARIABLE = "FOMOE_LINK_MODE"

LinkMode = Literal["kernel", "rate", "counted"]
"""kernel: the kernel shapes rate and latency; rate: the kernel shapes the rate, the latency is
counted; counted: both are counted by `CountedLink`."""


class CountedLink:
    """Computes when the exchanges of a site would be complete on its link. Thread-safe.

    The uplink carries one exchange after the other. `rate`, `latency`: whether this class counts
    the bandwidth and the latency; False = the kernel shapes it. Times are seconds of `clock`.
    """

    def __init__(
        self,
        link: Link,
        rate: bool = True,
        latency: bool = True,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        if not (link.bandwidth > 0 and link.latency >= 0):
            raise ValueError(f"link must have a bandwidth > 0 and a latency >= 0, got {link}")
        self.link, self.rate = link, rate
        self._latency = link.latency if latency else 0.0
        self.clock, self._sleep = clock, sleep
        self._lock = threading.Lock()
        self._busy = -math.inf

    def send(self, nbytes: int) -> float:
        """The time at which an exchange in which this site sends `nbytes` from now is complete.

        Raises ValueError for a negative `nbytes`.
        """
        if nbytes < 0:
            raise ValueError(f"nbytes must be >= 0, got {nbytes}")
        with self._lock:
            self._busy = max(self._busy, self.clock())
            if self.rate:
                self._busy += 8 * nbytes / self.link.bandwidth
            return self._busy + self._latency

    def ended(self, until: float, at: float | None = None) -> float:
        """The time at which an exchange is complete, called when its collective has ended.

        `until`: from `send`. If the kernel shapes the rate, the collective itself took the transfer
        time, and the latency is added to it. `at`: the time of `clock` at which the collective
        ended; None = now. Exchanges that travel side by side so wait for one latency together.
        """
        if self.rate:
            return until
        return max(until, (self.clock() if at is None else at) + self._latency)

    def wait(self, until: float) -> None:
        """Sleeps until the time `until`."""
        while (left := until - self.clock()) > 0:
            self._sleep(left)


def link_variable(link: Link, mode: LinkMode) -> str:
    """The value of FOMOE_LINK for sites on this link."""
    return f"{spec(link)};{mode}"


def wanted_mode(environment: Mapping[str, str] = os.environ) -> str:
    """The value of FOMOE_LINK_MODE: auto, kernel or counted. Raises ValueError for others."""
    mode = environment.get(MODE_VARIABLE) or "auto"
    if mode not in ("auto", "kernel", "counted"):
        raise ValueError(f"{MODE_VARIABLE} must be auto, kernel or counted, got {mode!r}")
    return mode


def active_link(
    environment: Mapping[str, str] = os.environ, link: Link | None = None, ranks: int = 1
) -> tuple[CountedLink | None, str]:
    """The link that this site must count (None = nothing to count), and its description for the
    report ("" = no link).

    `link`: the job's option, used if no launcher has set FOMOE_LINK (torchrun); it is counted. Each
    of the site's `ranks` counts its own share of the rate. Raises ValueError for a malformed
    FOMOE_LINK.
    """
    value = environment.get(VARIABLE)
    if value is not None:
        text, _, mode = value.rpartition(";")
        try:
            link = parse_link(text)
        except ValueError as error:
            raise ValueError(f"{VARIABLE} must be SPEC;MODE, got {value!r}: {error}") from None
    elif link is not None:
        mode = "counted"
    else:
        return None, ""
    if mode == "kernel":
        shaped = "rate and delay" if link.latency else "rate"
        return None, f"{describe(link)}: {shaped} by the kernel (private network namespaces)"
    if mode == "rate":
        words = "rate by the kernel (private network namespaces), latency counted"
        return CountedLink(link, rate=False), f"{describe(link)}: {words}"
    if mode == "counted":
        shared = f", the rate shared by {ranks} ranks" if ranks > 1 else ""
        share = link._replace(bandwidth=link.bandwidth / ranks)
        return CountedLink(share), f"{describe(link)}: counted delays{shared}"
    raise ValueError(f"{VARIABLE} must end in kernel, rate or counted, got {value!r}")
