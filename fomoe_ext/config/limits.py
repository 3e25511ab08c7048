"""Ranges of a section's values, with messages that name the section and the field."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


def at_least(owner: str, low: float, **values: float | None) -> None:
    """Each value that is given at least `low`, else ValueError. `owner`: the section and a dot."""
    for name, value in values.items():
        if value is not None and not value >= low:
            raise ValueError(f"{owner}{name} must be >= {low}, got {value}")


def inside(owner: str, low: float, high: float, **values: float) -> None:
    """Each value in [low, high], else ValueError. `owner`: the section and a dot."""
    for name, value in values.items():
        if not low <= value <= high:
            raise ValueError(f"{owner}{name} must be in [{low}, {high}], got {value}")


@contextmanager
def in_section(owner: str) -> Iterator[None]:
    """Puts the section before the field that an error names first."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise ValueError(f"{owner}{error}") from None
