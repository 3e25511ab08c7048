"""Checks of a section's values, with messages that name the section and the option."""

from __future__ import annotations

import functools
import typing
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fomoe_ext.checks import a_bool, a_number, an_int, one_of


def at_least(owner: str, low: float, **values: float | None) -> None:
    """ValueError unless each value is at least `low` or None, TypeError if it is no number.
    `owner`: the section and a dot."""
    for name, value in values.items():
        if value is not None:
            a_number(**{f"{owner}{name}": value})
        if value is not None and not value >= low:
            raise ValueError(f"{owner}{name} must be at least {low}, got {value}")


def inside(owner: str, low: float, high: float, **values: float) -> None:
    """ValueError unless each value is in [low, high], TypeError if it is no number. `owner`: the
    section and a dot."""
    a_number(**{f"{owner}{name}": value for name, value in values.items()})
    for name, value in values.items():
        if not low <= value <= high:
            raise ValueError(f"{owner}{name} must be in [{low}, {high}], got {value}")


def check_choices(options: Any) -> None:
    """Checks the fields of one Literal, bool, int or float, for values that a program passes.

    Values from files and flags are checked when they are read. Raises ValueError or TypeError
    naming the field.
    """
    for name, kind in _hints(type(options)).items():
        value = getattr(options, name)
        if typing.get_origin(kind) is typing.Literal:
            one_of(typing.get_args(kind), **{name: value})
        elif kind is bool:
            a_bool(**{name: value})
        elif kind is int:
            an_int(**{name: value})
        elif kind is float:
            a_number(**{name: value})


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)


@contextmanager
def in_section(owner: str) -> Iterator[None]:
    """Adds the section (and a dot) before the option with which an error's message begins."""
    try:
        yield
    except TypeError as error:
        raise TypeError(f"{owner}{error}") from None
    except ValueError as error:
        raise ValueError(f"{owner}{error}") from None
