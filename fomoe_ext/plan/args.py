"""Fast parsing of the flags of `fomoe plan`. Needs no torch.

Importing and running `tyro` takes as long as the rest of a plan. So flags of the plain form
`--name value` with a valid value are parsed here, in a hundredth of a second. Help, errors and all
other forms are left to `tyro`.
"""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from fomoe_ext.config.io import load_config, parse_args
from fomoe_ext.config.job import TrainConfig, preset_config

PROGRAM = "fomoe plan"
Options = TypeVar("Options")


class _Unclear(Exception):
    """Raised for arguments that are left to tyro."""


def _convert(kind: Any, text: str) -> Any:
    """The text as a value of a field's type. Raises _Unclear if that needs tyro."""
    origin, choices = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType) and text != "None":
        for choice in choices:
            try:
                return _convert(choice, text)
            except _Unclear:
                continue
    if origin is typing.Literal and text in choices:
        return text
    if kind is int and re.fullmatch(r"-?[0-9]+", text):
        return int(text)
    if kind is float and re.fullmatch(r"-?[0-9]+(\.[0-9]*)?(e-?[0-9]+)?", text):
        return float(text)
    if kind in (str, Path) and text != "None":
        return kind(text)
    raise _Unclear


def _take(kinds: dict[str, Any], args: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """The values of the known flags, by field, and the remaining arguments."""
    values: dict[str, Any] = {}
    rest = []
    given = list(args)
    while given:
        flag, equals, value = given.pop(0).partition("=")
        name = flag.removeprefix("--").replace("-", "_")
        no = name.removeprefix("no_") if name not in kinds else name
        if not flag.startswith("--") or no not in kinds:
            rest.append(flag + equals + value)
        elif kinds[no] is bool:
            if equals:
                raise _Unclear
            values[no] = no == name
        elif name != no or not (equals or given):
            raise _Unclear
        else:
            value = value if equals else given.pop(0)
            if value.startswith("-") and kinds[no] not in (int, float):
                raise _Unclear
            values[no] = _convert(kinds[no], value)
    return values, rest


def parse_options(kind: type[Options], arguments: Sequence[str]) -> tuple[Options, list[str]]:
    """A flat dataclass of options filled from its flags, and the remaining arguments.

    --help prints the help of these options and then that of the job's flags. Raises SystemExit
    after --help and after a bad flag.
    """
    hints = typing.get_type_hints(kind)
    args = list(arguments)
    wants_help = "-h" in args or "--help" in args
    try:
        if not wants_help:
            values, rest = _take(hints, args)
            return kind(**values), rest
    except (_Unclear, ValueError):
        pass
    import tyro

    if wants_help:
        try:
            tyro.cli(kind, prog=PROGRAM, args=["--help"])
        except SystemExit:
            print()
        parse_args(["--help"], PROGRAM, "The job, described by the flags of `fomoe train`.")
    return tyro.cli(kind, prog=PROGRAM, args=args, return_unknown_args=True)


def parse_job(arguments: Sequence[str]) -> TrainConfig:
    """The job that the flags of `fomoe train` describe: as `parse_args`, with the same errors."""
    try:
        return _plain_job(arguments)
    except (_Unclear, ValueError, TypeError, OSError):
        return parse_args(arguments, PROGRAM)


def _plain_job(arguments: Sequence[str]) -> TrainConfig:
    sections = typing.get_type_hints(TrainConfig)
    del sections["preset"]
    fields = {name: typing.get_type_hints(section) for name, section in sections.items()}
    kinds: dict[str, Any] = {"preset": str, "config": Path}
    for hints in fields.values():
        kinds |= hints
    values, rest = _take(kinds, arguments)
    if rest:
        raise _Unclear
    preset, file = values.pop("preset", None), values.pop("config", None)
    base = load_config(file, preset) if file else preset_config(preset or "tiny")
    changes = {}
    for section, hints in fields.items():
        of_section = {name: values[name] for name in hints if name in values}
        changes[section] = dataclasses.replace(getattr(base, section), **of_section)
    return dataclasses.replace(base, **changes)
