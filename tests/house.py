"""The floors of the package: a module is one floor above the highest that it imports.

    python tests/house.py [FOLDER]      a package's files, floors, cycles and upward imports

Every import counts, also one inside a function or only for type hints.
"""

from __future__ import annotations

import ast
import sys
from graphlib import TopologicalSorter
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "fomoe_ext"
FLOORS = """
    cli
    info link
    train
    eval
    export fault
    checkpoint hf
    model
    outer
    layer plan
    report data
    launch
    config
    placement
    files ops
    _C activations checks extras version
"""
"""Folders and files of the package from roof to ground, as CONTRIBUTING.md shows them."""


def modules(package: Path) -> dict[str, Path]:
    """Every module of a package by its dotted name below the package; "" is its __init__."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        words = path.relative_to(package).with_suffix("").parts
        found[".".join(words[:-1] if words[-1] == "__init__" else words)] = path
    return found


def imports(package: Path) -> dict[str, set[str]]:
    """The modules of the package that each module imports."""
    paths = modules(package)
    return {name: _imported(path, package, paths) - {name} for name, path in paths.items()}


def _imported(path: Path, package: Path, known: dict[str, Path]) -> set[str]:
    words = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            words += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            here = path.relative_to(package.parent).parts[: -node.level] if node.level else ()
            start = [*here, node.module] if node.module else here
            words += [".".join([*start, alias.name]) for alias in node.names]
    found = set()
    for word in words:
        first, _, below = word.partition(".")
        while first == package.name and below and below not in known:
            below = below.rpartition(".")[0]
        if first == package.name and below in known:
            found.add(below)
    return found


def circles(arrows: dict[str, set[str]]) -> list[list[str]]:
    """Import cycles: sets of modules that reach each other."""
    reach = {name: _reached(name, arrows) for name in arrows}
    groups = {frozenset(b for b in reach[a] if a in reach[b]) for a in arrows}
    return sorted(sorted(group) for group in groups if len(group) > 1)


def _reached(start: str, arrows: dict[str, set[str]]) -> set[str]:
    seen, ahead = set(), [start]
    while ahead:
        for name in arrows[ahead.pop()] - seen:
            seen.add(name)
            ahead.append(name)
    return seen


def floors(arrows: dict[str, set[str]]) -> int:
    """The number of floors, with each cycle taken as one module."""
    of = {name: group[0] for group in circles(arrows) for name in group}
    whole: dict[str, set[str]] = {}
    for name, below in arrows.items():
        mine = of.get(name, name)
        whole.setdefault(mine, set()).update({of.get(b, b) for b in below} - {mine})
    height: dict[str, int] = {}
    for name in TopologicalSorter(whole).static_order():
        height[name] = 1 + max((height[below] for below in whole[name]), default=0)
    return max(height.values())


def upward(arrows: dict[str, set[str]], order: str) -> list[str]:
    """Imports between folders that do not lead down; on one floor none may import another.

    The package's own names are lazy and may be of any floor: importing them counts as upward.
    """
    floor = {
        folder: -number for number, line in enumerate(order.split("\n")) for folder in line.split()
    }
    return [
        f"{name} -> {other or 'the package itself'}"
        for name, below in arrows.items()
        for other in sorted(below)
        if name
        and (a := name.split(".")[0]) != (b := other.split(".")[0])
        and (not b or floor[a] <= floor[b])
    ]


def faces(arrows: dict[str, set[str]]) -> list[str]:
    """Imports from a folder instead of the module in it that defines the name."""
    folders = {name.rpartition(".")[0] for name in arrows} - {""}
    return [f"{name} -> {other}" for name in arrows for other in sorted(arrows[name] & folders)]


def main() -> None:
    package = Path(sys.argv[1]) if len(sys.argv) > 1 else PACKAGE
    arrows = {name: below - {""} for name, below in imports(package).items() if name}
    print(f"{len(arrows)} modules, {floors(arrows)} floors, {len(circles(arrows))} circles")
    for circle in circles(arrows):
        print("circle:", " ".join(circle))
    if package == PACKAGE:
        for arrow in upward(arrows, FLOORS):
            print("upward:", arrow)


if __name__ == "__main__":
    main()
