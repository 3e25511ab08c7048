"""Plants bugs in the CUDA kernels, one at a time, and expects the emulator to catch each.

    python tests/emulator/mutants               all of them; status 1 when one survives
    python tests/emulator/mutants NAME ...      some
    python tests/emulator/mutants --tested      without first trying the kernels under sanitizers
                                                as they are, which the tests do
    python tests/emulator/mutants --record      also writes down what caught each (caught.toml)
    python tests/emulator/mutants --changed     of those that were recorded as caught only the ones
                                                whose kernels, or the emulator, have changed since,
                                                and a few others
    python tests/emulator/mutants --apply NAME  writes the bug into csrc/cuda (git restores it)
    python tests/emulator/mutants --list        what there is

A mutant that survives is a hole in the tests: a case is missing, or a schedule. What caught a bug
the last time is tried first; nothing but the order depends on it.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent.parent))

import emulator  # noqa: E402
from emulator.build import digest, in_parallel  # noqa: E402
from emulator.runs import PARTS, RUNS, Run, failure_of, first_failure  # noqa: E402

KERNELS = emulator.ROOT / "csrc/cuda"
CAUGHT = HERE / "caught.toml"
# The quickest first: most bugs show in results, without a sanitizer.
BUILDS = {name: emulator.driver_builder(name) for name in RUNS}
ALWAYS = 12  # of so many bugs one is tried though nothing has changed


@dataclass(frozen=True)
class Trial:
    """A run of the driver that may show a bug, planted in some of the .cu files that include it."""

    build: str
    run: Run
    sources: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.build}, {self.run.order} {self.run.seed}"


@dataclass(frozen=True)
class Mutant:
    """A planted bug: `find`, which stands once in the file, becomes `replace`."""

    name: str
    file: str
    find: str
    replace: str

    def plant(self, kernels: Path) -> None:
        """Writes the bug into a folder of kernels. ValueError when its place is not there."""
        path = kernels / self.file
        text = path.read_text()
        if text.count(self.find) != 1:
            raise ValueError(
                f"{self.name}: 'find' must occur once in {self.file}, got {text.count(self.find)} "
                "times; the kernel has changed, so must the mutant"
            )
        path.write_text(text.replace(self.find, self.replace))

    def sources(self) -> list[Path]:
        """The driver's .cu files that the bug is in: the file itself, or all that include it."""
        return [s for s in emulator.driver_sources() if self.file in included(s)]

    def state(self) -> str:
        """A name for all that decides whether the bug is caught: it, the kernels that it is in, and
        the emulator with all that it compares with.
        """
        own = {KERNELS / name for source in self.sources() for name in included(source)}
        folders = (KERNELS.parent / "cpu", HERE.parent)
        around = [*KERNELS.parent.glob("*.h"), *(f for d in folders for f in d.rglob("*"))]
        kinds = (".cpp", ".h", ".cuh", ".cu", ".py")
        files = sorted(
            f
            for f in {*own, *around}
            if f.is_file() and f.suffix in kinds and f.parent != HERE and f.name[:5] != "test_"
        )
        bug = (self.name, self.file, self.find, self.replace)
        names = (f.relative_to(emulator.ROOT).as_posix() for f in files)
        return digest(*bug, *names, *(f.read_bytes() for f in files))

    def parts(self) -> list[str]:
        """The driver's parts that run the code."""
        return [part for part, of in PARTS.items() if {self.file, self.file.split("/")[0]} & {*of}]

    def trials(self, caught: dict[str, str]) -> list[Trial]:
        """All that is tried, in order. caught: of the last time, as `record` writes it."""
        sources = [name_of(source) for source in self.sources()]
        trials = [Trial(b, run, tuple(sources)) for b in BUILDS for run in RUNS[b]]
        before = [t for t in trials if str(t) == caught.get("by")]
        # A bug in a header need not be compiled into every kernel to be seen.
        alone = [replace(t, sources=(s,)) for t in before for s in sources if s == caught.get("in")]
        return [*alone, *before, *(t for t in trials if t not in before)]


def name_of(source: Path) -> str:
    """A kernel's file as mutants.toml names it, below csrc/cuda; of the driver's own, its name."""
    inside = source.is_relative_to(KERNELS)
    return source.relative_to(KERNELS).as_posix() if inside else source.name


def included(source: Path) -> set[str]:
    """Names of a file and of those in csrc/cuda that it includes, also through others."""
    names, waiting = set(), [source]
    while waiting:
        file = waiting.pop()
        if name_of(file) in names or not (file == source or file.is_relative_to(KERNELS)):
            continue
        names.add(name_of(file))
        quoted = re.findall(r'#include "([^"]+)"', file.read_text())
        waiting += [path for name in quoted if (path := (file.parent / name).resolve()).exists()]
    return names


def all_mutants() -> list[Mutant]:
    with (HERE / "mutants.toml").open("rb") as file:
        return [Mutant(name, **fields) for name, fields in tomllib.load(file).items()]


def last_caught() -> dict[str, dict[str, str]]:
    """What caught each bug the last time that it was recorded."""
    return tomllib.loads(CAUGHT.read_text()) if CAUGHT.exists() else {}


def record(caught: dict[str, Trial]) -> None:
    """Adds to what is known of the bugs there are."""
    known = last_caught()
    known |= {name: {"by": str(t), "in": t.sources[0]} for name, t in caught.items()}
    mutants = {mutant.name: mutant for mutant in all_mutants()}
    for name in caught:
        known[name]["of"] = mutants[name].state()
    lines = []
    for name in filter(known.get, mutants):
        fields = ", ".join(f'{key} = "{value}"' for key, value in known[name].items())
        lines.append(f"{name} = {{ {fields} }}")
    CAUGHT.write_text("\n".join(["# Written by --record.", *lines, ""]))


def changed(mutants: list[Mutant]) -> list[Mutant]:
    """Those that are not known to be caught as things are, and a few more."""
    known = last_caught()
    return [
        mutant
        for number, mutant in enumerate(mutants)
        if number % ALWAYS == 0 or known.get(mutant.name, {}).get("of") != mutant.state()
    ]


class Laboratory:
    """The driver's objects in every build, and what becomes of them with a bug in some."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.caught = last_caught()

    def objects(self, build: str) -> dict[str, Path]:
        """Of the driver without a bug."""
        sources, compile_one = emulator.driver_sources(), BUILDS[build].compile
        made = in_parallel([(compile_one, source) for source in sources])
        return dict(zip(map(name_of, sources), made, strict=True))

    def healthy(self, builds: Iterable[str]) -> str | None:
        """What the kernels without a bug fail at in these builds; None when nothing."""
        for build in builds:
            objects = [*self.objects(build).values(), *emulator.driver_references()]
            program = BUILDS[build].link(objects, "driver", shared=False)
            if failure := first_failure(program, RUNS[build]):
                return f"{build}, {failure}"
        return None

    def caught_by(self, mutant: Mutant, narrow: bool) -> Trial | None:
        """What catches the bug first; None when it survives. narrow: also in a single .cu file,
        where one is enough.
        """
        folder = self.folder / mutant.name
        shutil.copytree(KERNELS.parent, folder / "csrc")
        mutant.plant(folder / "csrc/cuda")
        programs: dict[tuple[str, tuple[str, ...]], Path] = {}

        def catches(trial: Trial) -> bool:
            key = trial.build, trial.sources
            if key not in programs:
                programs[key] = self.driver(trial, folder)
            return failure_of(programs[key], trial.run, mutant.parts()) is not None

        try:
            trials = mutant.trials(self.caught.get(mutant.name, {}))
            caught = next(filter(catches, trials), None)
            if caught is not None and narrow:
                alone = (replace(caught, sources=(source,)) for source in caught.sources)
                return next(filter(catches, alone), caught)
            return caught
        finally:
            shutil.rmtree(folder)

    def driver(self, trial: Trial, folder: Path) -> Path:
        """The driver with the bug that is planted in `folder`."""
        builder = replace(BUILDS[trial.build], folder=folder)
        healthy = self.objects(trial.build)
        # First, so that of what several files define the linker takes what has the bug.
        changed = [
            builder.compile_changed(
                folder / "csrc/cuda" / name,
                folder / f"{trial.build}-{name.replace('/', '-')}.o",
            )
            for name in trial.sources
        ]
        rest = [made for name, made in healthy.items() if name not in trial.sources]
        objects = [*changed, *rest, *emulator.driver_references()]
        return builder.link(objects, "driver", shared=False)


def try_all(mutants: list[Mutant], folder: Path, tested: bool, recorded: bool) -> int:
    start = time.monotonic()
    laboratory = Laboratory(folder)
    if failure := None if tested else laboratory.healthy(BUILDS):
        print(f"the kernels fail without any bug planted: {failure}")
        return 2
    caught: dict[str, Trial] = {}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        trials = pool.map(lambda mutant: laboratory.caught_by(mutant, narrow=recorded), mutants)
        for mutant, trial in zip(mutants, trials, strict=True):
            if trial is not None:
                caught[mutant.name] = trial
            print(f"{mutant.name:50} {trial or 'SURVIVES'}", flush=True)
    if recorded:
        record(caught)
    print(f"{len(caught)} of {len(mutants)} caught in {time.monotonic() - start:.0f} s")
    return 0 if len(caught) == len(mutants) else 1


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="mutants", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--apply", action="store_true", help="write one bug into csrc/cuda")
    parser.add_argument("--tested", action="store_true", help="trust the kernels as they are")
    parser.add_argument("--record", action="store_true", help=f"write {CAUGHT.name}")
    parser.add_argument("--changed", action="store_true", help="not all that were caught before")
    parser.add_argument("--list", action="store_true", help="print the names")
    arguments = parser.parse_args()
    mutants = {mutant.name: mutant for mutant in all_mutants()}
    if unknown := set(arguments.names) - set(mutants):
        parser.error(f"no such mutant: {', '.join(sorted(unknown))} (--list names them)")
    if arguments.list:
        print("\n".join(mutants))
        return 0
    if arguments.apply:
        if len(arguments.names) != 1:
            parser.error("--apply takes one name")
        mutants[arguments.names[0]].plant(KERNELS)
        return 0
    if emulator.compiler() is None:
        parser.error("a C++ compiler is needed")
    chosen = [mutants[name] for name in arguments.names] or list(mutants.values())
    if arguments.changed:
        there, chosen = len(chosen), changed(chosen)
        print(f"{there - len(chosen)} of {there} bugs were caught in the same code before")
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        return try_all(chosen, Path(folder), arguments.tested, arguments.record)


if __name__ == "__main__":
    sys.exit(main())
