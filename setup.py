"""Builds the native libraries by driving CMake with ninja; CMakeLists.txt is the build description.

Environment: FOMOE_CUDA=on|off|auto, FOMOE_CUDA_ARCHS="80;90a", FOMOE_CUDA_FLAGS, MAX_JOBS.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


def package_root(name: str) -> Path:
    """The folder of an installed package, found without importing it."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise SystemExit(
            f"fomoe-ext: {name} is needed to build. Let pip fetch it (without "
            f"--no-build-isolation), or install it first: pip install torch pybind11 cmake ninja"
        )
    return Path(spec.origin).parent


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
        build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        output = build / "fomoe_ext"
        # Said on every run, as pip's isolated environments come and go under the same build folder.
        variables = {
            "CMAKE_MAKE_PROGRAM": program("ninja"),
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": package_root("pybind11") / "share/cmake/pybind11",
            "FOMOE_TORCH_ROOT": package_root("torch"),
            "FOMOE_TORCH_VERSION": importlib.metadata.version("torch"),
            "FOMOE_OUTPUT": output,
            "FOMOE_CUDA": os.environ.get("FOMOE_CUDA", "auto"),
            "FOMOE_CUDA_ARCHS": os.environ.get("FOMOE_CUDA_ARCHS", "80;90a"),
            "FOMOE_CUDA_FLAGS": os.environ.get("FOMOE_CUDA_FLAGS", ""),
        }
        configure = [program("cmake"), "-G", "Ninja", "-S", str(ROOT), "-B", str(build)]
        self.call([*configure, *(f"-D{name}={value}" for name, value in variables.items())])
        jobs = ["-j", os.environ["MAX_JOBS"]] if "MAX_JOBS" in os.environ else []
        self.call([program("cmake"), "--build", str(build), *jobs])

        package = ROOT / "fomoe_ext" if self.inplace else Path(self.build_lib) / "fomoe_ext"
        package.mkdir(parents=True, exist_ok=True)
        built = sorted(output.glob("*.so"))
        for library in built:
            replace_if_changed(library, package / library.name)
        for stale in {*package.glob("libfomoe_*.so")} - {
            package / library.name for library in built
        }:
            stale.unlink()

    @staticmethod
    def call(command: list[str]) -> None:
        """Runs a command; what it printed says more about a failure than a traceback of ours."""
        status = subprocess.run(command, check=False).returncode
        if status != 0:
            raise SystemExit(f"fomoe-ext: failed with status {status}: {' '.join(command)}")


# Declared so that the wheel is a platform wheel; the sources are CMake's business.
setup(ext_modules=[Extension("fomoe_ext._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
