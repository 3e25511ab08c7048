"""A slow link on one machine: meetings take what they would at a given bandwidth and latency.

Where the kernel allows it, it does the shaping (`fomoe_ext.namespace`); what it cannot do is
counted: `CountedLink` tells when an exchange would be complete, and the transport waits until then.
The launcher tells its sites which of the two by the environment variable FOMOE_LINK. Needs no
torch.

    python -m fomoe_ext.link --sites 2 --link 200mbit,50ms -- command...

runs any command once per site on such a link, with the environment of a site.
FOMOE_LINK_MODE=counted does without the kernel, FOMOE_LINK_MODE=kernel fails where the kernel
cannot even shape the rate.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

from fomoe_ext.wire import Link

VARIABLE = "FOMOE_LINK"
"""`SPEC;MODE`, set by the launcher for its sites."""
MODE_VARIABLE = "FOMOE_LINK_MODE"

LinkMode = Literal["kernel", "rate", "counted"]
"""Who delays: the kernel all of it, the kernel but for the latency, or nobody but `CountedLink`."""

_BITS = {"bit": 1.0, "kbit": 1e3, "mbit": 1e6, "gbit": 1e9}
_SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}
_QUANTITY = re.compile(r"([0-9.]+(?:e[+-]?[0-9]+)?)\s*([a-z]+)")


def _quantity(text: str, units: Mapping[str, float]) -> float | None:
    match = _QUANTITY.fullmatch(text.strip().lower())
    if match is None or match[2] not in units:
        return None
    try:
        return float(match[1]) * units[match[2]]
    except ValueError:
        return None


def parse_link(text: str) -> Link:
    """A link from its rate and, after a comma, its latency one way: "200mbit,50ms", "1gbit".

    Units: bit, kbit, mbit, gbit (per second, powers of 1000) and us, ms, s. Raises ValueError for
    anything else, and for a rate below 1 bit/s.
    """
    parts = text.split(",")
    rate = _quantity(parts[0], _BITS)
    latency = _quantity(parts[1], _SECONDS) if len(parts) == 2 else 0.0
    good = rate is not None and latency is not None and len(parts) <= 2
    if not (good and 1 <= rate < math.inf and latency < math.inf):
        raise ValueError(
            f"link must be a rate in kbit, mbit or gbit and perhaps a latency in us, ms or s, "
            f"such as 200mbit,50ms or 1gbit, got {text!r}"
        )
    return Link(rate, latency)


def _spec(link: Link) -> str:
    """The text that `parse_link` reads as exactly this link."""
    return f"{link.bandwidth!r}bit,{link.latency!r}s"


def _scaled(value: float, units: Mapping[str, str]) -> str:
    names = {name: float(scale) for scale, name in units.items()}
    name = next((n for n, scale in names.items() if value >= scale), list(names)[-1])
    return f"{value / names[name]:g} {name}"


def describe(link: Link) -> str:
    """The link in words: "200 Mbit/s, 50 ms"; without the latency where there is none."""
    rate = _scaled(
        link.bandwidth, {"1e9": "Gbit/s", "1e6": "Mbit/s", "1e3": "kbit/s", "1": "bit/s"}
    )
    if not link.latency:
        return rate
    return f"{rate}, {_scaled(link.latency, {'1': 's', '1e-3': 'ms', '1e-6': 'us'})}"


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
    return f"{_spec(link)};{mode}"


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
        spec, _, mode = value.rpartition(";")
        try:
            link = parse_link(spec)
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


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command per site on a link; returns the exit code as `fomoe train` does."""
    from fomoe_ext.console import outlive_terminal
    from fomoe_ext.launch import run_sites
    from fomoe_ext.outputs import require_folder

    parser = argparse.ArgumentParser(
        prog="python -m fomoe_ext.link", description="Run a command once per site on a slow link."
    )
    parser.add_argument("--sites", type=int, default=2, help="how many (default: 2)")
    parser.add_argument("--link", help="such as 200mbit,50ms (default: no shaping)")
    parser.add_argument(
        "--log-dir", type=Path, help="folder for the output of the sites but the first"
    )
    parser.add_argument("command", nargs="+", help="after --: the command and its arguments")
    given = parser.parse_args(arguments)
    outlive_terminal()
    try:
        link = None if given.link is None else parse_link(given.link)
        if given.log_dir is not None:
            require_folder("--log-dir", given.log_dir)
        return run_sites(given.command, given.sites, given.log_dir, link)
    except (ValueError, OSError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
