"""The API reference has every public name, and documents the parameters of its signature.

mkdocs (in .ci/run) finds removed names and broken links.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
from pages import ROOT

PAGES = sorted((ROOT / "docs/api").glob("*.md"))
SHOWN = [name for page in PAGES for name in re.findall(r"^::: (\S+)$", page.read_text(), re.M)]
FOLDERS = ["fomoe_ext"] + [f"fomoe_ext.{name}" for name in ("hf", "layer", "ops", "outer")]
# Not for users: names that jobs share with the library, and tables that other texts refer to.
UNSHOWN = {"Codec", "SiteGroups", "get_codec", "__version__"}


def found(name: str) -> Any:
    if "hf" in name:
        pytest.importorskip("transformers")
    module, rest = name, []
    while True:
        try:
            value: Any = importlib.import_module(module)
            break
        except ModuleNotFoundError:
            module, _, last = module.rpartition(".")
            rest.insert(0, last)
    for part in rest:
        value = getattr(value, part)
    return value


def documented(value: Any) -> Iterator[tuple[str, Any]]:
    """Functions with their docstrings: of a module, a class or alone."""
    members = vars(value).items() if isinstance(value, (ModuleType, type)) else []
    for name, member in members:
        if isinstance(member, (classmethod, staticmethod)):
            member = member.__func__
        if inspect.isfunction(member) and (name == "__init__" or name[0] != "_"):
            yield name, member
    if not isinstance(value, ModuleType):
        yield getattr(value, "__name__", "?"), value


def arguments_named(docstring: str) -> list[str]:
    """The parameters that the part Args of a docstring describes, one or several to an entry."""
    part = re.search(r"^Args:\n((?:(?: {4}.*)?\n)*)", inspect.cleandoc(docstring) + "\n", re.M)
    entries = re.findall(r"^ {4}(\w[\w, ]*?)(?: \([^)]*\))?:", part[1] if part else "", re.M)
    return [name for entry in entries for name in entry.split(", ")]


@pytest.mark.parametrize("name", SHOWN)
def test_parameters_are_those_of_the_signature(name):
    for of, value in documented(found(name)):
        named = arguments_named(value.__doc__ or "")
        known = inspect.signature(value).parameters if named else {}
        assert set(named) <= set(known), f"{of}: {set(named) - set(known)}"


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_public_name_is_shown(folder):
    package = importlib.import_module(folder) if folder != "fomoe_ext.hf" else found(folder)
    last = {name.rpartition(".")[2] for name in SHOWN}
    whole = [value for name in SHOWN if isinstance(value := found(name), ModuleType)]
    inside = {name for module in whole for name in vars(module)}
    assert set(package.__all__) - UNSHOWN <= last | inside


def test_a_removed_parameter_is_found():
    said = "A.\n\nArgs:\n    a: one.\n        more: of it.\n    b, c: two.\n\nRaises: d: no.\n"
    assert arguments_named(said) == ["a", "b", "c"]
