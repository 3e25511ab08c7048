"""README's set-up: which package Python imports after it, and that CI runs the same tests."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from unbuilt import ROOT, clone, installed, run_in, run_in_clone

from fomoe_ext import _C

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
CODE = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_python_runs_in_the_clone_after_the_set_up(tmp_path):
    """In the clone, after `pip install .`: nothing is built there, and Python looks there first."""
    result = run_in_clone(tmp_path, "examples", "-c", CODE[0])
    assert result.returncode == 0, result.stderr
    code = "import fomoe_ext; from fomoe_ext import _C; print(fomoe_ext.__file__, _C.FOLDER)"
    result = run_in(tmp_path / "clone", tmp_path / "site-packages", "-c", code)
    taken, libraries = map(Path, result.stdout.split())
    assert taken == tmp_path / "clone/fomoe_ext/__init__.py"
    assert libraries == tmp_path / "site-packages/fomoe_ext"


def test_a_clone_of_other_sources_than_the_installed_package_is_refused(tmp_path):
    tree, site = clone(tmp_path / "clone"), installed(tmp_path / "site-packages")
    (tree / "csrc/kernels.h").write_text("// another contract\n")
    result = run_in(tree, site, "-c", "from fomoe_ext import MoELayer")
    said = result.stderr.splitlines()[-1]
    assert result.returncode == 1 and said.startswith("ImportError: fomoe_ext: ")
    for part in (str(tree), str(site / "fomoe_ext"), "other sources", "pip install ."):
        assert part in said, said


def test_a_clone_without_any_package_says_how_to_go_on(tmp_path):
    tree = clone(tmp_path / "clone")
    code = "import sys; sys.path[1:] = [p for p in sys.path[1:] if 'site-packages' not in p]; "
    code += "import fomoe_ext._C"
    result = run_in(tree, tmp_path, "-S", "-c", code)
    said = result.stderr.splitlines()[-1]
    assert str(tree) in said and "not installed" in said and "pip install ." in said, said


def test_the_hash_of_the_sources_is_that_of_cmake(tmp_path):
    if shutil.which("cmake") is None:
        pytest.skip("cmake is needed: pip install cmake")
    script = tmp_path / "script.cmake"
    include = f'include("{ROOT}/build_tools/sources_hash.cmake")'
    script.write_text(f'{include}\nsources_hash(hash "{ROOT}")\nmessage("${{hash}}")\n')
    said = subprocess.run(["cmake", "-P", script], capture_output=True, text=True, check=True)
    assert said.stderr.strip() == _C.sources_hash(ROOT)


def test_ci_runs_the_tests_as_people_do():
    (command,) = re.findall(r"^pytest.*$", README, re.MULTILINE)
    script = (Path(__file__).parent.parent / ".ci/run").read_text(encoding="utf-8")
    with_variables = r"^(?:\w+=(?:\$\([^)]*\)|\S+) )*(pytest.*)$"
    assert re.findall(with_variables, script, re.MULTILINE) == [command]


@pytest.mark.parametrize("module", ["bench.study", "tests.fuzz.run", "tests.chaos.soak"])
def test_modules_of_a_clone_find_the_installed_package(module, tmp_path):
    """`python -m` in a clone without built libraries, which is first on sys.path."""
    folder = "/".join(module.split(".")[:2])
    result = run_in_clone(tmp_path, folder, "-m", module, "--help")
    assert result.returncode == 0, result.stderr
    assert f"python -m {module}" in result.stdout
