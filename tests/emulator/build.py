"""Compiles CUDA sources and the emulator's runtime for the CPU, by the C++ compiler alone: no CUDA
toolkit is needed.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
RUNTIME = sorted((HERE / "runtime").glob("*.cpp"))
STRICT = ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-Wno-psabi"]


def compiler() -> str | None:
    """The C++ compiler, or None where there is none."""
    return shutil.which(os.environ.get("CXX", "g++"))


def run(command: Sequence[object]) -> None:
    """Runs a compiler; RuntimeError with its words when it fails."""
    words = [str(word) for word in command]
    result = subprocess.run(words, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise RuntimeError(f"{' '.join(words)}\n{result.stderr[-8000:]}")


@dataclass(frozen=True)
class Builder:
    """One way to compile: which sanitizers, which macros. Objects and programs go into `folder`.

    sanitize: "" or a list for -fsanitize, e.g. "address,undefined". What the sanitizer of
    undefined behaviour finds ends the program.
    """

    folder: Path
    sanitize: str = ""
    defines: tuple[str, ...] = ()
    include_dirs: tuple[Path, ...] = ()
    optimize: str = "-O1"

    def _sanitizer_flags(self) -> list[str]:
        if not self.sanitize:
            return []
        flags = [f"-fsanitize={self.sanitize}", "-fno-omit-frame-pointer"]
        return [*flags, "-fno-sanitize-recover=all"] if "thread" not in self.sanitize else flags

    def compile(self, source: Path, *, warn: bool = True) -> Path:
        """The object of one .cu or .cpp file that may include the emulator's headers.

        Named by source and flags, and made anew every time: sources include each other.
        """
        flags = ["-std=c++20", self.optimize, "-g", "-fPIC", "-ffp-contract=off"]
        flags += [
            "-fvisibility=hidden",
            "-DFOMOE_EMULATED",
            "-DFOMOE_HAVE_SM90A",
            *(f"-D{d}" for d in self.defines),
        ]
        flags += [f"-I{HERE / 'include'}", *(f"-isystem{d}" for d in self.include_dirs)]
        flags += self._sanitizer_flags() + (STRICT if warn else ["-w"])
        # Sanitizers and vector code set this one off where nothing is wrong.
        flags += ["-Wno-maybe-uninitialized"]
        return self._object(source, flags)

    def compile_plain(self, source: Path, defines: Iterable[str] = ()) -> Path:
        """The object of a file that is never sanitized."""
        flags = ["-std=c++20", "-O2", "-g", "-fPIC", "-ffp-contract=off", "-fvisibility=hidden"]
        flags += [f"-I{HERE / 'include'}", *STRICT, *(f"-D{d}" for d in defines)]
        return self._object(source, flags)

    def _object(self, source: Path, flags: list[str]) -> Path:
        key = hashlib.sha256(" ".join([str(source), *flags]).encode()).hexdigest()[:12]
        target = self.folder / f"{source.stem}-{key}.o"
        self.folder.mkdir(parents=True, exist_ok=True)
        run([compiler(), "-x", "c++", *flags, "-c", source, "-o", target])
        return target

    def link(
        self, objects: Iterable[Path], target: Path, *, shared: bool, extra: Sequence[str] = ()
    ) -> Path:
        """An executable, or a shared library, of the objects."""
        kind = ["-shared", "-fPIC"] if shared else []
        flags = self._sanitizer_flags()
        run([compiler(), *kind, *flags, *objects, "-o", target, *extra])
        return target


def in_parallel(jobs: Sequence[tuple]) -> list[Path]:
    """Results of (function, *arguments) jobs, as many at a time as there are processors."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        futures = [pool.submit(function, *arguments) for function, *arguments in jobs]
        return [future.result() for future in futures]


def runtime_objects(folder: Path) -> list[Path]:
    """The runtime, which is never sanitized itself."""
    plain = Builder(folder)
    return in_parallel([(plain.compile_plain, source) for source in RUNTIME])
