"""The package's structure: imports lead down, files are small, CONTRIBUTING names what exists."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import house
import pytest

ROOT = house.PACKAGE.parent
GUIDE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
FOLDERS = sorted({path.parent.name for path in house.PACKAGE.glob("*/*.py")})
FILE_LINES, CLASS_LINES, FUNCTION_LINES = 500, 300, 60


def package(folder: Path, **files: str) -> Path:
    """Writes a package of these modules: `a__b` is b in the folder a, `init` its __init__."""
    root = folder / "things"
    for name, text in files.items():
        path = root / (name.replace("__", "/").replace("init", "__init__") + ".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


# ---- arrows --------------------------------------------------------------------------------------


def test_imports_lead_down():
    arrows = house.imports(house.PACKAGE)
    assert not house.upward(arrows, house.FLOORS)
    assert not house.circles(arrows)


def test_a_module_is_imported_where_it_is_defined():
    found = house.faces(house.imports(house.PACKAGE))
    assert [arrow for arrow in found if not arrow.endswith(" -> ops")] == []


def test_every_folder_has_a_floor():
    inside = {name.split(".")[0] for name in house.modules(house.PACKAGE)} - {""}
    assert inside == set(house.FLOORS.split())


@pytest.mark.parametrize(
    "text",
    [
        "import things.high.b\n",
        "from things.high import b\n",
        "from things.high.b import word\n",
        "from ..high import b\n",
        "from ..high.b import word\n",
        "def f():\n    from things.high.b import word\n",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from things.high.b import word\n",
    ],
)
def test_an_import_upward_is_seen_wherever_it_stands(text, tmp_path):
    root = package(tmp_path, low__a=text, high__b="word = 1\n")
    arrows = house.imports(root)
    assert house.upward(arrows, "high\nlow") == ["low.a -> high.b"]
    assert house.upward(arrows, "low\nhigh") == []
    assert house.upward(arrows, "low high") == ["low.a -> high.b"]  # side by side: strangers


@pytest.mark.parametrize("text", ["import things\n", "from things import word\n"])
def test_a_name_of_the_package_itself_is_no_way_around(text, tmp_path):
    arrows = house.imports(package(tmp_path, init="word = 1\n", low__a=text))
    assert house.upward(arrows, "high\nlow") == ["low.a -> the package itself"]


def test_an_import_of_a_folder_is_seen(tmp_path):
    files = {"low__init": "from things.low.a import word\n", "low__a": "word = 1\n"}
    root = package(tmp_path, **files, b="from things.low import word\n", c="import things.low.a\n")
    assert house.faces(house.imports(root)) == ["b -> low"]


def test_circles_are_seen_and_floors_counted(tmp_path):
    files = {"a": "import things.b\n", "b": "import things.c\n", "c": "", "d": "import things.a\n"}
    arrows = house.imports(package(tmp_path, **files))
    assert house.circles(arrows) == [] and house.floors(arrows) == 4
    files["c"] = "def later():\n    import things.a\n"
    arrows = house.imports(package(tmp_path, **files))
    assert house.circles(arrows) == [["a", "b", "c"]] and house.floors(arrows) == 2


def test_the_script_says_it_of_any_package(tmp_path):
    root = package(tmp_path, a="from things import b\n", b="from things import a\n")
    command = [sys.executable, str(ROOT / "tests/house.py"), str(root)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert said.splitlines()[:2] == ["2 modules, 1 floors, 1 circles", "circle: a b"]


# ---- rooms ---------------------------------------------------------------------------------------


def too_long(path: Path) -> list[str]:
    text = path.read_text(encoding="utf-8")
    found = [f"{path.name}: {n} lines"] if (n := text.count("\n")) > FILE_LINES else []
    for node in ast.walk(ast.parse(text)):
        kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
        if isinstance(node, kinds):
            most = CLASS_LINES if isinstance(node, ast.ClassDef) else FUNCTION_LINES
            lines = (node.end_lineno or 0) - node.lineno + 1
            if lines > most and "# Long" not in text.split("\n")[node.lineno - 2]:
                found.append(f"{path.name}: {node.name} has {lines} lines")
    return found


def test_rooms_are_small():
    found = [said for path in house.modules(house.PACKAGE).values() for said in too_long(path)]
    assert not found


def test_what_is_too_long_is_named(tmp_path):
    function = "def f():\n" + "    pass\n" * FUNCTION_LINES
    body = "    x = 1\n" * CLASS_LINES
    told = "# Long for its table.\n" + function
    (tmp_path / "long.py").write_text(function + "class C:\n" + body + told + "\n" * 200)
    assert too_long(tmp_path / "long.py") == [
        "long.py: 624 lines",
        "long.py: f has 61 lines",
        "long.py: C has 301 lines",
    ]


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folder_says_what_lives_there(folder):
    text = (house.PACKAGE / folder / "__init__.py").read_text(encoding="utf-8")
    said = (ast.get_docstring(ast.parse(text)) or "").splitlines()
    assert len([line for line in said if line]) >= 3
    assert re.search(r"[Mm]ay import|[Ss]tands on", " ".join(said))
    assert re.search(r"\bknows?\b", " ".join(said), re.I)


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_large_folder_has_a_table_of_contents(folder):
    files = {path.stem for path in (house.PACKAGE / folder).glob("[!_]*.py")}
    text = (house.PACKAGE / folder / "__init__.py").read_text(encoding="utf-8")
    named = set(re.findall(r"\w+", ast.get_docstring(ast.parse(text)) or ""))
    assert len(files) <= 12 or files <= named, files - named


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folder_has_its_tests(folder):
    assert list((ROOT / "tests" / folder).glob("test_*.py"))


# ---- the guide -----------------------------------------------------------------------------------


def test_the_guide_shows_the_floors():
    shown = re.search(r"<!-- floors -->\n```\n(.*?)```", GUIDE, re.S)
    assert shown is not None
    rows = [line.split("|")[0].split() for line in shown[1].splitlines() if line.strip()]
    assert [row for row in rows if row] == [
        line.split() for line in house.FLOORS.strip().split("\n")
    ]


def test_every_file_the_guide_names_exists():
    named = set(re.findall(r"(?<![\w>*}/.-])[\w./]*\w\.(?:py|cpp|cuh?|h|toml|md|cmake)\b", GUIDE))
    assert len(named) > 80
    folders = (".ci", "bench", "build_tools", "csrc", "docs", "fomoe_ext", "tests")
    files = {path.name for folder in folders for path in (ROOT / folder).rglob("*.*")}
    paths = {name for name in named if "/" in name}
    lost = {
        name for name in paths if not ((ROOT / name).exists() or (house.PACKAGE / name).exists())
    }
    lost |= {name for name in named - paths if not (ROOT / name).exists() and name not in files}
    assert not lost


@pytest.mark.parametrize("what", ["token", "delta", "checkpoint"])
def test_the_guide_walks_with(what):
    walk = re.search(rf"^### A {what} goes this way\n+```\n(.*?)```", GUIDE, re.M | re.S)
    assert walk is not None
    lines = walk[1].splitlines()
    assert 10 <= len(lines) <= 16
    assert all(re.search(r"\.(py|cpp|cu|h)\b", line) for line in lines if line[0] != " ")


def test_the_changelog_knows_where_modules_went():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    known = house.modules(house.PACKAGE)
    rows = re.findall(r"^\| `([\w.]+)` \| (.*) \|$", text, re.M)
    assert len(rows) > 70
    for _, now in rows:
        homes = re.findall(r"`([a-z_]+\.[a-z_]+)`", now)
        assert homes and set(homes) <= set(known), now


def names_in(path: Path) -> set[str]:
    """All names that a module defines, imports or uses."""
    found = {"__file__"}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, ast.alias):
            found.add((node.asname or node.name).split(".")[-1])
        elif isinstance(node, ast.Name):
            found.add(node.id)
    return found


def test_every_path_that_is_named_leads_somewhere():
    """In docstrings, docs, commands and tests: `fomoe_ext.layer.moe`, `fomoe_ext.ops.route`, also
    as a file."""
    known = {name: names_in(path) for name, path in house.modules(house.PACKAGE).items()}
    known[""] |= set(
        re.findall(r'"(\w+)": "fomoe_ext\.', (house.PACKAGE / "__init__.py").read_text())
    )
    kinds = {".py", ".md", ".toml", ".txt", ".cpp", ".h", ".cu", ".cuh"}
    folders = ("bench", "build_tools", "csrc", "docs", "examples", "fomoe_ext", "tests")
    texts = [*ROOT.glob("*.md"), *(f for d in folders for f in (ROOT / d).rglob("*"))]
    lost = []
    for path in texts:
        if path.suffix not in kinds or path.name == "CHANGELOG.md" or "results" in path.parts:
            continue
        text = path.read_text(encoding="utf-8")
        files = re.findall(r"\bfomoe_ext/[\w/]+\.py\b", text)
        lost += [f"{path.relative_to(ROOT)}: {f}" for f in files if not (ROOT / f).exists()]
        for words in re.findall(r"\bfomoe_ext((?:\.\w+)+)", text):
            module, rest = words[1:], ""
            while module not in known:
                module, _, rest = module.rpartition(".")
            if rest and rest not in known[module]:
                lost.append(f"{path.relative_to(ROOT)}: fomoe_ext{words}")
    assert not lost
