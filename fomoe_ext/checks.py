"""Checks of plain arguments, with messages that name them."""

from __future__ import annotations

import math
from collections.abc import Sequence


def an_int(**values: int) -> None:
    """Each value an int, else TypeError naming it."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} must be an int, got {value!r}")


def a_bool(**values: bool) -> None:
    """Each value True or False, else TypeError naming it."""
    for name, value in values.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be True or False, got {value!r}")


def an_instance(kind: type, **values: object) -> None:
    """Each value of this class, else TypeError naming it."""
    for name, value in values.items():
        if not isinstance(value, kind):
            article = "an" if kind.__name__[0] in "AEIOU" else "a"
            raise TypeError(f"{name} must be {article} {kind.__name__}, got {type(value).__name__}")


def at_least(minimum: int, **sizes: int) -> None:
    """Each value an int of at least `minimum`, else TypeError or ValueError naming it."""
    an_int(**sizes)
    for name, value in sizes.items():
        if value < minimum:
            raise ValueError(f"{name} must be at least {minimum}, got {value}")


def a_number(**values: float) -> None:
    """Each value an int or a float, else TypeError naming it."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{name} must be a number, got {value!r}")


def finite(minimum: float, **values: float) -> None:
    """Each value a finite number of at least `minimum`, else TypeError or ValueError naming it."""
    a_number(**values)
    for name, value in values.items():
        if not minimum <= value < math.inf:
            raise ValueError(f"{name} must be finite and at least {minimum}, got {value}")


def one_of(choices: Sequence[str], **values: str) -> None:
    """Each value one of `choices`, else ValueError naming it."""
    for name, value in values.items():
        if value not in choices:
            raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
