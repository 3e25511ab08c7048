"""The emulator's programs are compiled once, never left half written, and again after a change."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import emulator
from emulator import build
from emulator.build import Builder, once, remove_unused

needs_compiler = pytest.mark.skipif(emulator.compiler() is None, reason="a C++ compiler is needed")

# A separate process that writes a file slowly, says when it begins, and may die half way.
MAKER = """
import os, sys, time
from pathlib import Path
from emulator.build import once
target, log, dies = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3] == "dies"

def make(path):
    with log.open("a") as file:
        file.write("made\\n")
    path.write_text("half")
    time.sleep(0.5)
    if dies:
        os._exit(7)
    path.write_text("whole")

print(once(target, make).read_text())
"""


def maker(target: Path, log: Path, dies: str = "") -> subprocess.Popen[str]:
    tests = str(Path(__file__).parents[1])
    command = [sys.executable, "-c", MAKER, target, log, dies]
    environment = {**os.environ, "PYTHONPATH": tests}
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


def test_one_process_makes_it_and_others_wait(tmp_path):
    log = tmp_path / "log"
    processes = [maker(tmp_path / "target", log) for _ in range(3)]
    assert [process.communicate()[0] for process in processes] == ["whole\n"] * 3
    assert log.read_text() == "made\n"


def test_nothing_is_left_of_a_process_that_dies(tmp_path):
    target, log = tmp_path / "target", tmp_path / "log"
    process = maker(target, log, "dies")
    process.communicate()
    assert process.returncode == 7 and not target.exists()
    assert maker(target, log).communicate()[0] == "whole\n"
    assert log.read_text() == "made\nmade\n"


def test_nothing_is_left_of_what_fails(tmp_path):
    def fails(path: Path) -> None:
        path.write_text("half")
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        once(tmp_path / "target", fails)
    assert not (tmp_path / "target").exists()
    assert once(tmp_path / "target", lambda path: path.write_text("whole")).read_text() == "whole"


def test_what_is_old_and_unused_is_removed(tmp_path):
    for name in ("route-1", "route-2", "combine-1"):
        (tmp_path / name).touch()
    for name in ("route-1", "combine-1"):
        os.utime(tmp_path / name, (0, 0))
    once(tmp_path / "route-2", lambda path: None)
    remove_unused(tmp_path, "route")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["combine-1", "route-2"]


# ---- objects -------------------------------------------------------------------------------------


@pytest.fixture
def compiled(tmp_path, monkeypatch) -> Path:
    """A file with a line for each call of the compiler."""
    log, script = tmp_path / "compiled", tmp_path / "c++"
    log.touch()
    script.write_text(
        f"""#!/bin/sh
if [ "$1" != --version ]; then
  echo compiled >> {log}
  [ -e {tmp_path}/meanwhile ] && mv {tmp_path}/meanwhile {tmp_path}/source.cpp
fi
exec {emulator.compiler()} "$@"
"""
    )
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    return log


@needs_compiler
def test_an_object_is_made_anew_when_anything_changes(tmp_path, compiled, monkeypatch):
    tree = tmp_path / "tree"
    (tree / "csrc").mkdir(parents=True)
    (tree / "csrc/header.cuh").write_text("// one")
    monkeypatch.setattr(build, "ROOT", tree)
    source = tmp_path / "source.cpp"
    source.write_text("int f() { return 1; }")
    builder = Builder(folder=tmp_path / "built")
    made = [builder.compile(source)]
    assert builder.compile(source) == made[0]
    assert compiled.read_text() == "compiled\n"

    made.append(Builder(folder=tmp_path / "built", defines=("A=1",)).compile(source))
    made.append(Builder(folder=tmp_path / "built", versions="2").compile(source))
    made.append(builder.compile_plain(source))
    (tree / "csrc/header.cuh").write_text("// two")
    made.append(builder.compile(source))
    source.write_text("int f() { return 2; }")
    made.append(builder.compile(source))
    assert len(set(made)) == len(made) and all(file.exists() for file in made)
    assert compiled.read_text() == "compiled\n" * len(made)


@needs_compiler
def test_a_source_that_changes_while_it_is_compiled(tmp_path, compiled):
    """An object's name always belongs to the source that it was compiled from."""
    source, meanwhile = tmp_path / "source.cpp", tmp_path / "meanwhile"
    source.write_text("int f() { return 1; }")
    meanwhile.write_text("int g() { return 2; }")
    made = Builder(folder=tmp_path / "built").compile(source)
    assert source.read_text() == "int g() { return 2; }"
    assert compiled.read_text() == "compiled\n" * 2
    assert list((tmp_path / "built").glob("*.o")) == [made]
    assert b"_Z1gv" in made.read_bytes()


@needs_compiler
def test_what_the_compiler_says_is_told(tmp_path):
    source = tmp_path / "source.cpp"
    source.write_text("int f() { return x; }")
    with pytest.raises(RuntimeError, match=r"x. was not declared|identifier .x"):
        Builder(folder=tmp_path / "built").compile(source)
    assert not list((tmp_path / "built").glob("*.o"))


# ---- planted bugs: what is tried -----------------------------------------------------------------


@pytest.fixture(scope="module")
def mutants() -> ModuleType:
    file = emulator.HERE / "mutants/__main__.py"
    spec = importlib.util.spec_from_file_location("mutants_main", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_what_caught_a_bug_is_tried_first(mutants):
    mutant = mutants.Mutant("name", "gemm/scheduler.cuh", "a", "b")
    everything = mutant.trials({})
    sources = everything[0].sources
    assert "gemm/experts_f32.cu" in sources and len(sources) > 2
    assert [trial.sources for trial in everything] == [sources] * len(everything)
    first, second, *rest = mutant.trials({"by": "thread, priority 1", "in": "gemm/experts_f32.cu"})
    assert first.sources == ("gemm/experts_f32.cu",) and second.sources == sources
    assert {str(first), str(second)} == {"thread, priority 1"}
    # Nothing is left out, and none is tried twice.
    assert sorted(map(str, [second, *rest])) == sorted(map(str, everything))
    assert len(set(map(str, everything))) == len(everything)


def test_what_is_no_longer_there_is_not_tried(mutants):
    mutant = mutants.Mutant("name", "gemm/scheduler.cuh", "a", "b")
    assert mutant.trials({"by": "plain, sideways 1", "in": "gone.cu"}) == mutant.trials({})


def test_recorded_bugs_exist(mutants):
    names = {mutant.name for mutant in mutants.all_mutants()}
    assert set(mutants.last_caught()) <= names
    assert all(mutant.sources() and mutant.parts() for mutant in mutants.all_mutants())
