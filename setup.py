"""Builds the native libraries by driving CMake with ninja; CMakeLists.txt is the build description.

Environment: FOMOE_CUDA=on|off|auto, FOMOE_CUDA_ARCHS="80;90a", TORCH_CUDA_ARCH_LIST (build_tools/
cuda_archs.py chooses between them, and a default if none is set), FOMOE_CUDA_FLAGS, MAX_JOBS.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
sys.path.insert(0, str(ROOT / "build_tools"))

import build_backend  # noqa: E402
import cuda_archs  # noqa: E402


def program(name: str) -> str:
    """The path of a program; a clear error where there is none."""
    path = shutil.which(name)
    if path is None:
        raise SystemExit(f"fomoe-ext: {name} is needed to build: pip install {name}")
    return path


def replace_if_changed(source: Path, target: Path) -> None:
    """Copies by writing a new file and renaming it: a process that runs the old one keeps it."""
    if target.exists() and target.read_bytes() == source.read_bytes():
        return
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    shutil.copy2(source, temporary)
    temporary.replace(target)


class CMakeBuild(build_ext):
    """`build_ext` whose only work is to call cmake and to put its libraries into the package."""

    def run(self) -> None:
        build = ROOT / "build" / "cmake"
        output = build / "fomoe_ext"
        torch = build_backend.find_torch()
        if torch is None:
            raise SystemExit(
                "fomoe-ext: torch >= 2.10 is needed to build. Let pip fetch it (without "
                "--no-build-isolation), or install it first: pip install torch cmake ninja"
            )
        try:
            archs = cuda_archs.choose()
        except cuda_archs.BadArchs as error:
            raise SystemExit(f"fomoe-ext: {error}") from None
        # Passed on every run: pip's isolated environments change under the same build folder.
        variables = {
            "CMAKE_MAKE_PROGRAM": program("ninja"),
            "FOMOE_TORCH_ROOT": torch.root,
            "FOMOE_TORCH_VERSION": torch.version,
            "FOMOE_OUTPUT": output,
            "FOMOE_CUDA": os.environ.get("FOMOE_CUDA", "auto"),
            "FOMOE_CUDA_ARCHS": ";".join(archs.entries),
            "FOMOE_CUDA_ARCHS_FROM": archs.why.replace(";", " "),
            "FOMOE_CUDA_ARCHS_ELSE": ";".join(archs.otherwise),
            "FOMOE_CUDA_FLAGS": os.environ.get("FOMOE_CUDA_FLAGS", ""),
        }
        began = time.monotonic()
        print(f"fomoe-ext: building with torch {torch.version} ({torch.root})", flush=True)
        configure = [program("cmake"), "-G", "Ninja", "-S", str(ROOT), "-B", str(build)]
        self.call([*configure, *(f"-D{name}={value}" for name, value in variables.items())])
        jobs = ["-j", os.environ["MAX_JOBS"]] if "MAX_JOBS" in os.environ else []
        self.call([program("cmake"), "--build", str(build), *jobs])
        print(f"fomoe-ext: libraries built in {time.monotonic() - began:.0f} s", flush=True)

        package = ROOT / "fomoe_ext" if self.inplace else Path(self.build_lib) / "fomoe_ext"
        package.mkdir(parents=True, exist_ok=True)
        built = sorted(output.glob("libfomoe_*.so"))
        for library in built:
            replace_if_changed(library, package / library.name)
        # Also removes the extension module that earlier versions built: it would hide _C.py.
        old = {*package.glob("libfomoe_*.so"), *package.glob("_C.*.so")}
        for stale in old - {package / library.name for library in built}:
            stale.unlink()

    def get_outputs(self) -> list[str]:
        return [str(path) for path in Path(self.build_lib, "fomoe_ext").glob("libfomoe_*.so")]

    def get_output_mapping(self) -> dict[str, str]:
        return {}

    @staticmethod
    def call(command: list[str]) -> None:
        """Runs a command. On failure its own output is more useful than a traceback from here."""
        status = subprocess.run(command, check=False).returncode
        if status != 0:
            raise SystemExit(f"fomoe-ext: failed with status {status}: {' '.join(command)}")


class Wheel(bdist_wheel):
    """A wheel of this platform for every Python: the libraries do not depend on Python."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


# Declared so that the wheel is a platform wheel; CMake knows the sources.
setup(
    ext_modules=[Extension("fomoe_ext.libfomoe", sources=[])],
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": Wheel},
)
