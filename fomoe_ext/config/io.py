"""Reading and writing a `TrainConfig`: TOML files and the command line. Needs no torch.

Precedence: preset < TOML file < command line. The saved file holds every resolved value, so that
reading it back gives the same configuration.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
import tomllib
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fomoe_ext.config.job import SECTIONS, TrainConfig, preset_config
from fomoe_ext.files.atomic import seal_text, write_text

RENAMED = {
    "model.expert_size": "model.intermediate_size",
    "model.shared_expert_size": "model.shared_expert_intermediate_size",
    "model.scoring": "model.router_scoring",
    "model.renormalize": "model.router_renormalize",
    "model.routed_scale": "model.router_scale",
    "model.num_groups": "model.router_num_groups",
    "model.groups_kept": "model.router_groups_kept",
    "model.z_loss_coef": "model.router_z_loss_coef",
    "model.bias_update_rate": "model.balance_bias_rate",
}
"""Keys of configuration files of version 0.0 and their present names."""


def check_renamed(
    keys: Iterable[str], section: str, where: str, names: Mapping[str, str] | None = None
) -> None:
    """Raises ValueError for an option of version 0.0, with its present name.

    `keys`: those of a section in another file than a TOML configuration. `where`: the file, for
    the message. `names`: of options that the file calls otherwise.
    """
    for key in keys:
        if now := RENAMED.get(f"{section}.{key}"):
            now = now.removeprefix(f"{section}.")
            now = now if names is None else names.get(now, now)
            raise ValueError(f"{where}: unknown key {key!r}; it is called {now!r} now")


def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _type_name(kind: Any) -> str:
    if typing.get_origin(kind) is typing.Literal:
        names = [repr(choice) for choice in typing.get_args(kind)]
        return names[0] if len(names) == 1 else "one of " + ", ".join(names)
    if typing.get_origin(kind) is tuple:
        return "a list of " + _type_name(typing.get_args(kind)[0])
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a string"}
    return names.get(kind, "a path as a string" if kind is Path else str(kind))


def _convert(key: str, kind: Any, value: Any) -> Any:
    """The TOML value converted to the field's type. Raises TypeError or ValueError for the key."""
    origin, choices = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return _convert_one(key, [c for c in choices if c is not type(None)], value)
    if origin is typing.Literal:
        if value not in choices or type(value) is not type(choices[0]):
            raise ValueError(f"{key} must be {_type_name(kind)}, got {value!r}")
        return value
    if origin is tuple and isinstance(value, list):
        return tuple(_convert(f"{key}[{i}]", choices[0], item) for i, item in enumerate(value))
    if kind is float and type(value) in (int, float):
        try:
            return float(value)
        except OverflowError:
            raise ValueError(
                f"{key} must be a number that fits into fp64, got {value!r:.60}"
            ) from None
    if kind is Path and isinstance(value, str):
        return Path(value)
    if kind in (int, bool, str) and type(value) is kind:
        return value
    raise TypeError(f"{key} must be {_type_name(kind)}, got {value!r}")


def _convert_one(key: str, kinds: Sequence[Any], value: Any) -> Any:
    """The TOML value converted to the first of several types that accepts it."""
    if len(kinds) == 1:
        return _convert(key, kinds[0], value)
    for kind in kinds:
        try:
            return _convert(key, kind, value)
        except (TypeError, ValueError):
            continue
    wanted = " or ".join(map(_type_name, kinds))
    raise TypeError(f"{key} must be {wanted}, got {value!r}")


def _unknown_key(path: Path, key: str, section: str | None) -> ValueError:
    """The error for an unknown key, with its present name or the most similar known keys."""
    where = {name: part for part in SECTIONS for name in _hints(_hints(TrainConfig)[part]) if name}
    full = key if section is None else f"{section}.{key}"
    if full in RENAMED:
        return ValueError(f"{path}: unknown key {full!r}; it is called {RENAMED[full]!r} now")
    if section is None and key in where:
        return ValueError(f"{path}: key {key!r} belongs in section [{where[key]}]")
    if key in where:
        return ValueError(f"{path}: unknown key {full!r}; it belongs in section [{where[key]}]")
    known = {"preset": "preset"} | {name: f"{part}.{name}" for name, part in where.items()}
    if section is None:
        known |= {part: f"[{part}]" for part in SECTIONS}
    nearest = difflib.get_close_matches(key, known, n=3, cutoff=0.5)
    named = [known[name] for name in nearest]
    hint = f"; did you mean {' or '.join(named)}?" if named else ""
    return ValueError(f"{path}: unknown key {full!r}{hint}")


def read_toml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The type-checked content of a TOML configuration: {"preset": str, section: {key: value}}.

    Raises FileNotFoundError for a missing file, ValueError for invalid TOML and for unknown keys
    (naming similar known ones), and TypeError for a value of the wrong type.
    """
    path = Path(path)
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"configuration file {path} does not exist") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, IsADirectoryError) as error:
        raise ValueError(f"configuration file must be TOML, got {path}: {error}") from None
    except RecursionError:
        raise ValueError(
            f"configuration file must be TOML, got {path}: nested too deeply"
        ) from None
    result: dict[str, Any] = {}
    kinds = _hints(TrainConfig)
    for name, value in tables.items():
        if name == "preset":
            result[name] = _convert("preset", str, value)
        elif name not in SECTIONS:
            raise _unknown_key(path, name, None)
        elif not isinstance(value, dict):
            raise TypeError(f"{path}: {name} must be a section [{name}], got {value!r}")
        else:
            fields = _hints(kinds[name])
            for key in value:
                if key not in fields:
                    raise _unknown_key(path, key, name)
            result[name] = {
                key: _convert(f"{name}.{key}", fields[key], item) for key, item in value.items()
            }
    return result


def _apply(base: TrainConfig, tables: dict[str, Any]) -> TrainConfig:
    changes = {
        name: dataclasses.replace(getattr(base, name), **values)
        for name, values in tables.items()
        if name != "preset"
    }
    return dataclasses.replace(base, **changes)


def load_config(path: str | os.PathLike[str], preset: str | None = None) -> TrainConfig:
    """The configuration in a TOML file, on top of its preset or, if given, of `preset`.

    Errors as in `read_toml`, and ValueError for values out of range.
    """
    tables = read_toml(path)
    return _apply(preset_config(preset or tables.get("preset", "tiny")), tables)


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return repr(value)  # repr of a float is its shortest exact form, legal in TOML
    if isinstance(value, tuple):
        return "[" + ", ".join(_toml_value(item) for item in value) + "]"
    # A JSON string is a TOML basic string, except that TOML requires DEL to be escaped.
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")


def dump_config(config: TrainConfig) -> str:
    """The whole configuration as TOML text; fields that are None are left out."""
    lines = [f"preset = {_toml_value(config.preset)}"]
    for section in SECTIONS:
        lines += ["", f"[{section}]"]
        for key, value in dataclasses.asdict(getattr(config, section)).items():
            if value is not None:
                lines.append(f"{key} = {_toml_value(value)}")
    return "\n".join(lines) + "\n"


def save_config(config: TrainConfig, path: str | os.PathLike[str]) -> None:
    """Writes the configuration to a TOML file, whole or not at all, with its hash in the first line
    (`atomic.check_text_seal`). `load_config` reads it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, seal_text(dump_config(config)))


def flag_value(args: Sequence[str], flag: str) -> str | None:
    """The last value of `--flag VALUE` or `--flag=VALUE`; "" for a flag without a value."""
    value = None
    for i, arg in enumerate(args):
        if arg == flag:
            bare = i + 1 == len(args) or args[i + 1].startswith("--")
            value = "" if bare else args[i + 1]
        elif arg.startswith(flag + "="):
            value = arg.partition("=")[2]
    return value


def _take_option(args: list[str], flag: str) -> str | None:
    """Removes `flag VALUE` or `flag=VALUE` from the arguments; returns the last value."""
    value = None
    i = 0
    while i < len(args):
        if args[i] == flag:
            if i + 1 == len(args) or args[i + 1].startswith("--"):
                raise ValueError(f"{flag} needs a value")
            value = args[i + 1]
            del args[i : i + 2]
        elif args[i].startswith(flag + "="):
            value = args[i].partition("=")[2]
            del args[i]
        else:
            i += 1
    return value


def parse_args(
    args: Sequence[str],
    prog: str = "fomoe train",
    about: str = "Train a FoMoE language model across sites.",
) -> TrainConfig:
    """The configuration that the arguments of `fomoe train` describe.

    Every field has a flag. There are also `--preset NAME` and `--config FILE.toml`, and `--resume`
    may have no value (= auto). `about`: the first sentence of the help. Raises SystemExit (0 after
    --help, 2 after a bad flag or a value out of range, with the reason on stderr), and the errors
    of `load_config` for a bad preset or file.
    """
    import tyro  # not needed to read a configuration file

    rest = list(args)
    for i, arg in enumerate(rest):
        bare = i + 1 == len(rest) or rest[i + 1].startswith("--")
        if arg == "--resume" and bare:
            rest[i] = "--resume=auto"
    preset = _take_option(rest, "--preset")
    file = _take_option(rest, "--config")
    base = load_config(file, preset) if file else preset_config(preset or "tiny")
    description = (
        f"{about} Values come from --preset NAME, then --config FILE.toml, then the flags below."
    )
    return tyro.cli(
        TrainConfig,
        prog=prog,
        description=description,
        args=rest,
        default=base,
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.AvoidSubcommands),
    )
