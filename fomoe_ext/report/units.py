"""Numbers as people read them: 1.23 MB, 1.23M."""

from __future__ import annotations

_UNITS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def human_bytes(count: float) -> str:
    """A number of bytes in decimal units: 1234567 -> '1.23 MB'."""
    for size, unit in _UNITS:
        if abs(count) >= size:
            return f"{count / size:.3g} {unit}B"
    return f"{count:.0f} B"


def human_count(count: float) -> str:
    """A count in decimal units: 1234567 -> '1.23M'."""
    for size, unit in _UNITS:
        if abs(count) >= size:
            return f"{count / size:.3g}{unit}"
    return f"{count:.0f}"
