"""Links from and to text such as "200mbit,50ms", and in words for people. Needs no torch."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from fomoe_ext.placement.wire import Link

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
    """A link from its bandwidth and, after a comma, its one-way latency: "200mbit,50ms", "1gbit".

    Units: bit, kbit, mbit, gbit (per second, powers of 1000) and us, ms, s. Raises ValueError for
    anything else and for a bandwidth below 1 bit/s.
    """
    parts = text.split(",")
    rate = _quantity(parts[0], _BITS)
    latency = _quantity(parts[1], _SECONDS) if len(parts) == 2 else 0.0
    good = rate is not None and latency is not None and len(parts) <= 2
    if not (good and 1 <= rate < math.inf and latency < math.inf):
        raise ValueError(
            f"link must be a bandwidth in kbit, mbit or gbit and perhaps a latency in us, ms or s, "
            f"such as 200mbit,50ms or 1gbit, got {text!r}"
        )
    return Link(rate, latency)


def spec(link: Link) -> str:
    """The text that `parse_link` reads as exactly this link."""
    return f"{link.bandwidth!r}bit,{link.latency!r}s"


def _scaled(value: float, units: Mapping[str, str]) -> str:
    names = {name: float(scale) for scale, name in units.items()}
    name = next((n for n, scale in names.items() if value >= scale), list(names)[-1])
    return f"{value / names[name]:g} {name}"


def describe(link: Link) -> str:
    """The link in words: "200 Mbit/s, 50 ms"; a latency of 0 is left out."""
    rate = _scaled(
        link.bandwidth, {"1e9": "Gbit/s", "1e6": "Mbit/s", "1e3": "kbit/s", "1": "bit/s"}
    )
    if not link.latency:
        return rate
    return f"{rate}, {_scaled(link.latency, {'1': 's', '1e-3': 'ms', '1e-6': 'us'})}"
