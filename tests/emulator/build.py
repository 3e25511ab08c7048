"""Compiles CUDA sources and the emulator's runtime for the CPU, by the C++ compiler alone: no CUDA
toolkit is needed.

What is built is named by all that it is made from, so it is made once for as long as nothing
changes: for all processes of a test session, and for the next one.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
BUILT = ROOT / "build/emulator"
RUNTIME = sorted((HERE / "runtime").glob("*.cpp"))
STRICT = ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-Wno-psabi"]
HEADERS = (".h", ".cuh")
UNUSED_SECONDS = 24 * 3600  # after which what was built from another state of the source is removed
# More flags, e.g. -g1: without it compiling takes three quarters of the time.
EXTRA = os.environ.get("FOMOE_EMULATOR_FLAGS", "").split()


def compiler() -> str | None:
    """The C++ compiler, or None where there is none."""
    return shutil.which(os.environ.get("CXX", "g++"))


def run(command: Sequence[object]) -> None:
    """Runs a compiler; RuntimeError with its words when it fails."""
    words = [str(word) for word in command]
    result = subprocess.run(words, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise RuntimeError(f"{' '.join(words)}\n{result.stderr[-8000:]}")


def once(target: Path, make: Callable[[Path], object]) -> Path:
    """`target`, which make(path) writes under another name if it is not there yet.

    It is there as a whole or not at all, and is made by one thread of one process, for which
    others wait. Where it fails or is killed the next one tries.
    """
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.with_name(f"{target.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # let go of when the process ends, however it does
            if not target.exists():
                unfinished = target.with_name(f"{target.name}.part")
                make(unfinished)
                unfinished.replace(target)
    os.utime(target)
    return target


def digest(*parts: str | bytes) -> str:
    """A name for all of the parts together."""
    whole = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        whole.update(len(data).to_bytes(8, "little") + data)
    return whole.hexdigest()[:16]


@cache
def version(program: str) -> bytes:
    """What a compiler says of itself."""
    return subprocess.run([program, "--version"], capture_output=True, check=True).stdout


class SourceChanged(Exception):
    """What was built is not of the state of the source that its name tells."""


def surroundings(program: str) -> str:
    """What every object depends on beside its source and flags: the compiler, and all headers."""
    folders = (ROOT / "csrc", HERE)
    headers = sorted(h for folder in folders for h in folder.rglob("*") if h.suffix in HEADERS)
    return digest(
        program, version(program), *(part for h in headers for part in (str(h), h.read_bytes()))
    )


@dataclass(frozen=True)
class Builder:
    """One way to compile: which sanitizers, which macros. Objects and programs go into `folder`.

    sanitize: "" or a list for -fsanitize, e.g. "address,undefined". What the sanitizer of
    undefined behaviour finds ends the program.
    versions: of what is included from `include_dirs`, whose headers are not looked at.
    """

    sanitize: str = ""
    defines: tuple[str, ...] = ()
    include_dirs: tuple[Path, ...] = ()
    optimize: str = "-O1"
    versions: str = ""
    folder: Path = BUILT

    def _sanitizer_flags(self) -> list[str]:
        if not self.sanitize:
            return []
        flags = [f"-fsanitize={self.sanitize}", "-fno-omit-frame-pointer"]
        return [*flags, "-fno-sanitize-recover=all"] if "thread" not in self.sanitize else flags

    def _flags(self) -> list[str]:
        flags = ["-std=c++20", self.optimize, "-fPIC", "-ffp-contract=off", "-fvisibility=hidden"]
        flags += ["-DFOMOE_EMULATED", "-DFOMOE_HAVE_SM90A", *(f"-D{d}" for d in self.defines)]
        flags += [f"-I{HERE / 'include'}", *(f"-isystem{d}" for d in self.include_dirs)]
        # Sanitizers and vector code set this one off where nothing is wrong.
        return [*flags, *self._sanitizer_flags(), *EXTRA, "-Wno-maybe-uninitialized"]

    def compile(self, source: Path) -> Path:
        """The object of one .cu or .cpp file that may include the emulator's headers."""
        return self._object(source, [*STRICT, *self._flags()])

    def compile_plain(self, source: Path, defines: Iterable[str] = ()) -> Path:
        """The object of a file that is never sanitized."""
        flags = ["-std=c++20", "-O2", "-fPIC", "-ffp-contract=off", "-fvisibility=hidden"]
        flags += [f"-I{HERE / 'include'}", *STRICT, *EXTRA, *(f"-D{d}" for d in defines)]
        return self._object(source, flags)

    def compile_changed(self, source: Path, target: Path) -> Path:
        """`target`, the object of a changed copy of a file with its headers beside it: made anew,
        without warnings.
        """
        run([compiler(), "-x", "c++", *self._flags(), "-w", "-c", source, "-o", target])
        return target

    def _object(self, source: Path, flags: list[str]) -> Path:
        program = compiler() or ""
        way = f"{source.stem}-{digest(str(source), *flags)}"
        state = lambda: digest(surroundings(program), self.versions, source.read_bytes())

        def make(target: Path) -> None:
            run([program, "-x", "c++", *flags, "-c", source, "-o", target])
            if state() != before:
                raise SourceChanged
            remove_unused(self.folder, way)

        while True:
            before = state()
            with suppress(SourceChanged):  # while it was compiled
                return once(self.folder / f"{way}-{before}.o", make)

    def link(
        self, objects: Iterable[Path], name: str, *, shared: bool, extra: Sequence[str] = ()
    ) -> Path:
        """An executable, or a shared library, of such objects; `name` begins its file's name."""
        words = [*map(str, objects), *self._sanitizer_flags(), *extra]
        kind = ["-shared", "-fPIC"] if shared else []

        def make(target: Path) -> None:
            run([compiler(), *kind, *words, "-o", target])
            remove_unused(self.folder, name)

        return once(self.folder / f"{name}-{digest(*kind, *words)}", make)


def remove_unused(folder: Path, start: str) -> None:
    """Removes what was built in other states of the source and has not been used for long."""
    oldest = time.time() - UNUSED_SECONDS
    for file in folder.glob(f"{start}-*"):
        with suppress(FileNotFoundError):  # another process has removed it
            if file.stat().st_mtime < oldest:
                file.unlink()


def in_parallel(jobs: Sequence[tuple]) -> list[Path]:
    """Results of (function, *arguments) jobs, as many at a time as there are processors."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        futures = [pool.submit(function, *arguments) for function, *arguments in jobs]
        return [future.result() for future in futures]


def runtime_objects() -> list[Path]:
    """The runtime, which is never sanitized itself."""
    plain = Builder()
    return in_parallel([(plain.compile_plain, source) for source in RUNTIME])
