"""Python started in a clone without built libraries, with the package installed elsewhere."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fomoe_ext import _C

ROOT = Path(__file__).resolve().parents[1]
_NOT_BUILT = shutil.ignore_patterns("*.so", "__pycache__")


def clone(folder: Path, *more: str) -> Path:
    """A source tree without libraries, and `more` of the repository's folders."""
    for name in ("fomoe_ext", "csrc", *more):
        shutil.copytree(ROOT / name, folder / name, ignore=_NOT_BUILT)
    shutil.copy(ROOT / "CMakeLists.txt", folder)
    return folder


def installed(folder: Path) -> Path:
    """A folder as site-packages, with the package in it; links to the libraries at hand."""
    package = folder / "fomoe_ext"
    shutil.copytree(ROOT / "fomoe_ext", package, ignore=_NOT_BUILT)
    for library in _C.FOLDER.glob("*.so"):
        (package / library.name).symlink_to(library)
    return folder


def run_in(folder: Path, site: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs Python in a folder, as people start it there; `site` is where packages are installed."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONSAFEPATH"}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={**environment, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )


def run_in_clone(folder: Path, more: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs Python in the root of a clone that has also `more` of the repository."""
    if _C.sources_hash(ROOT) != _C.built_from():
        pytest.skip("the libraries at hand were not built from this source tree")
    site = installed(folder / "site-packages")
    return run_in(clone(folder / "clone", more), site, *arguments)
