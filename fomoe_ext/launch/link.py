"""A slow link on one machine: meetings take what they would at a given bandwidth and latency.

Where the kernel allows it, it does the shaping (`fomoe_ext.launch.namespace`); what it cannot do is
counted: `CountedLink` tells when an exchange would be complete, and the transport waits until then.
The launcher tells its sites which of the two by the environment variable FOMOE_LINK:
FOMOE_LINK_MODE=counted does without the kernel, FOMOE_LINK_MODE=kernel fails where the kernel
cannot even shape the rate. Needs no torch.
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
"""Who delays: the kernel all of it, the kernel but for the latency, or nobody but `CountedLink`."""


class CountedLink:
    """When the exchanges of a site would be complete on its link. May be used by several threads.

    The uplink carries one exchange after the other. `rate` False: the kernel shapes the rate, and
    only the latency is counted; `latency` False: the other way round. Times are those of `clock`,
    in seconds.
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
        self._clock, self._sleep = clock, sleep
        self._lock = threading.Lock()
        self._busy = -math.inf

    def send(self, nbytes: int) -> float:
        """The time at which an exchange in which this site sends `nbytes` from now is complete.

        Raises ValueError for a negative `nbytes`.
        """
        if nbytes < 0:
            raise ValueError(f"nbytes must be >= 0, got {nbytes}")
        with self._lock:
            self._busy = max(self._busy, self._clock())
            if self.rate:
                self._busy += 8 * nbytes / self.link.bandwidth
            return self._busy + self._latency

    def ended(self, until: float) -> float:
        """The time at which an exchange is complete whose collective has just ended.

        `until` is what `send` said. Where the kernel shapes the rate the collective took the time
        of its bits, and the latency comes on top.
        """
        return until if self.rate else max(until, self._clock() + self._latency)

    def wait(self, until: float) -> None:
        """Sleeps until then."""
        while (left := until - self._clock()) > 0:
            self._sleep(left)


def link_variable(link: Link, mode: LinkMode) -> str:
    """The value of FOMOE_LINK for sites on this link."""
    return f"{spec(link)};{mode}"


def wanted_mode(environment: Mapping[str, str] = os.environ) -> str:
    """What FOMOE_LINK_MODE asks for: auto, kernel or counted. Raises ValueError for others."""
    mode = environment.get(MODE_VARIABLE) or "auto"
    if mode not in ("auto", "kernel", "counted"):
        raise ValueError(f"{MODE_VARIABLE} must be auto, kernel or counted, got {mode!r}")
    return mode


def active_link(
    environment: Mapping[str, str] = os.environ, link: Link | None = None, ranks: int = 1
) -> tuple[CountedLink | None, str]:
    """What this site must count (None = nothing), and the report's words ("" = there is no link).

    `link` is the job's: it is counted where no launcher has said anything (torchrun). Each of the
    site's `ranks` counts for itself, with its share of the rate. Raises ValueError for a malformed
    FOMOE_LINK.
    """
    value = environment.get(VARIABLE)
    if value is not None:
        text, _, mode = value.rpartition(";")
        try:
            link = parse_link(text)
        except ValueError as error:
            raise ValueError(f"{VARIABLE} is {value!r}: {error}") from None
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
