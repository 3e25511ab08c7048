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
CMAKE_VARIABLES = ("FOMOE_CUDA", "FOMOE_CUDA_ARCHS", "FOMOE_CUDA_FLAGS")


def torch_root() -> Path:
    """The folder of the installed torch package, found without importing it."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise SystemExit(
            "fomoe-ext: torch is needed to build. Let pip fetch it (no --no-build-isolation), "
            "or install torch >= 2.10 first."
        )
    return Path(spec.origin).parent


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
        configure = ["cmake", "-G", "Ninja", "-S", str(ROOT), "-B", str(build)]
        configure += [
            f"-DFOMOE_TORCH_ROOT={torch_root()}",
            f"-DFOMOE_TORCH_VERSION={importlib.metadata.version('torch')}",
            f"-DFOMOE_OUTPUT={output}",
            f"-DPython_EXECUTABLE={sys.executable}",
        ]
        configure += [f"-D{name}={os.environ[name]}" for name in CMAKE_VARIABLES if name in os.environ]
        subprocess.run(configure, check=True)
        jobs = ["-j", os.environ["MAX_JOBS"]] if "MAX_JOBS" in os.environ else []
        subprocess.run(["cmake", "--build", str(build), *jobs], check=True)
        package = ROOT / "fomoe_ext" if self.inplace else Path(self.build_lib) / "fomoe_ext"
        package.mkdir(parents=True, exist_ok=True)
        for library in sorted(output.glob("*.so")):
            replace_if_changed(library, package / library.name)

    def get_outputs(self) -> list[str]:
        """The files that belong into the wheel."""
        return [str(path) for path in sorted((Path(self.build_lib) / "fomoe_ext").glob("*.so"))]


# Declared so that the wheel is a platform wheel; the sources are CMake's business.
setup(ext_modules=[Extension("fomoe_ext._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
