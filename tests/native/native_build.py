"""Commands that configure and build the native libraries."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


def package(name: str) -> Path:
    """The folder of an installed package, without importing it."""
    spec = importlib.util.find_spec(name)
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent


def run(*command: str | Path, **environment: str) -> str:
    """Stdout and stderr of a command; fails the test with them when it fails."""
    result = subprocess.run(
        [str(part) for part in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        env={**os.environ, **environment},
    )
    assert result.returncode == 0, f"{command}: status {result.returncode}\n{result.stdout}"
    return result.stdout


def configure(build: Path, *options: str) -> str:
    """Configures a build of this source tree in `build`, CPU-only unless the options say otherwise;
    returns what cmake said.
    """
    if shutil.which("cmake") is None or shutil.which("ninja") is None:
        pytest.skip("cmake and ninja are needed: pip install cmake ninja")
    return run(
        "cmake",
        *("-G", "Ninja", "-S", ROOT, "-B", build),
        f"-DFOMOE_TORCH_ROOT={package('torch')}",
        "-DFOMOE_CUDA=off",
        *options,
    )


def module(name: str) -> ModuleType:
    """A Python file of build_tools."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "build_tools" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    sys.modules[name] = found  # dataclasses need the module there
    spec.loader.exec_module(found)
    return found
