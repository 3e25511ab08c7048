"""Plants bugs in the CUDA kernels, one at a time, and expects the emulator to catch each.

    python tests/emulator/mutants               all of them; status 1 when one survives
    python tests/emulator/mutants NAME ...      some
    python tests/emulator/mutants --tested      without first trying the kernels under sanitizers
                                                as they are, which the tests do
    python tests/emulator/mutants --apply NAME  writes the bug into csrc/cuda (git restores it)
    python tests/emulator/mutants --list        what there is

A mutant that survives is a hole in the tests: a case is missing, or a schedule.
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
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent.parent))

import emulator  # noqa: E402
from emulator.build import Builder, in_parallel  # noqa: E402
from emulator.runs import PART_OF, RUNS, failure_of, first_failure  # noqa: E402

KERNELS = emulator.ROOT / "csrc/cuda"
# The quickest to build first: most bugs show in results, without a sanitizer.
BUILDS = ["", "thread", "address,undefined"]
RUNS_OF = {**RUNS, "": RUNS["undefined"]}


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
                f"{self.name}: 'find' stands {text.count(self.find)} times in {self.file}, "
                f"wanted once; the kernel has changed, so must the mutant"
            )
        path.write_text(text.replace(self.find, self.replace))

    def sources(self) -> list[str]:
        """The .cu files whose code the bug is in: the file itself, or all that include it."""
        return [s.name for s in sorted(KERNELS.glob("*.cu")) if self.file in included(s)]

    def parts(self) -> list[str]:
        """The driver's parts that run the code."""
        return [part for part, files in PART_OF.items() if self.file in files]


def included(source: Path) -> set[str]:
    """Names of a file and of those beside it that it includes, also through others."""
    names, waiting = set(), [source]
    while waiting:
        file = waiting.pop()
        if file.name in names or not file.exists():
            continue
        names.add(file.name)
        quoted = re.findall(r'#include "([^"/]+)"', file.read_text())
        waiting += [file.parent / name for name in quoted]
    return names


def all_mutants() -> list[Mutant]:
    with (HERE / "mutants.toml").open("rb") as file:
        return [Mutant(name, **fields) for name, fields in tomllib.load(file).items()]


class Laboratory:
    """The driver's objects in every build, and what becomes of them with a bug in one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.builders = {
            sanitize: Builder(folder / (sanitize or "plain"), sanitize, emulator.DRIVER_DEFINES)
            for sanitize in BUILDS
        }
        self.common = emulator.driver_references(folder)
        self.built: dict[str, dict[str, Path]] = {}
        self.lock = Lock()

    def objects(self, sanitize: str) -> dict[str, Path]:
        """Of the driver without a bug; a build is made when it is first asked for."""
        with self.lock:
            if sanitize not in self.built:
                sources, compile_one = emulator.driver_sources(), self.builders[sanitize].compile
                made = in_parallel([(compile_one, source) for source in sources])
                names = [source.name for source in sources]
                self.built[sanitize] = dict(zip(names, made, strict=True))
            return self.built[sanitize]

    def driver(self, sanitize: str, objects: dict[str, Path], folder: Path) -> Path:
        program = folder / f"driver-{sanitize.replace(',', '-') or 'plain'}"
        all_objects = [*objects.values(), *self.common]
        return self.builders[sanitize].link(all_objects, program, shared=False)

    def healthy(self, builds: Sequence[str]) -> str | None:
        """What the kernels without a bug fail at in these builds; None when nothing."""
        for sanitize in builds:
            program = self.driver(sanitize, self.objects(sanitize), self.folder)
            if failure := first_failure(program, RUNS_OF[sanitize]):
                return f"{sanitize or 'plain'}, {failure}"
        return None

    def caught_by(self, mutant: Mutant) -> str | None:
        """The build and schedule that catch the bug first; None when it survives."""
        folder = self.folder / mutant.name
        shutil.copytree(KERNELS.parent, folder / "csrc")
        kernels = folder / "csrc/cuda"
        mutant.plant(kernels)
        for sanitize, builder in self.builders.items():
            own = Builder(folder / (sanitize or "plain"), builder.sanitize, builder.defines)
            objects = dict(self.objects(sanitize))
            for name in mutant.sources():
                # A planted bug may leave something unused: no warnings.
                objects[name] = own.compile(kernels / name, warn=False)
            program = self.driver(sanitize, objects, folder)
            for run in RUNS_OF[sanitize]:
                if failure_of(program, run, mutant.parts()) is not None:
                    shutil.rmtree(folder)
                    return f"{sanitize or 'plain'}, {run.order} {run.seed}"
        return None


def try_all(mutants: list[Mutant], folder: Path, tested: bool) -> int:
    start = time.monotonic()
    laboratory = Laboratory(folder)
    if failure := laboratory.healthy(BUILDS[:1] if tested else BUILDS):
        print(f"the kernels fail without any bug planted: {failure}")
        return 2
    survivors = 0
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for mutant, caught in zip(mutants, pool.map(laboratory.caught_by, mutants), strict=True):
            survivors += caught is None
            print(f"{mutant.name:50} {caught or 'SURVIVES'}", flush=True)
    print(
        f"{len(mutants) - survivors} of {len(mutants)} caught in {time.monotonic() - start:.0f} s"
    )
    return 1 if survivors else 0


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="mutants", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--apply", action="store_true", help="write one bug into csrc/cuda")
    parser.add_argument("--tested", action="store_true", help="trust the kernels as they are")
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
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        return try_all(chosen, Path(folder), arguments.tested)


if __name__ == "__main__":
    sys.exit(main())
