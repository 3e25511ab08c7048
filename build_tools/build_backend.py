"""The build backend: setuptools; torch is fetched for the build only if none is installed.

The build needs only torch's headers and the names of its libraries, and gives the same libraries
with any version from 2.10 on, so it uses the torch of the target environment. Pip's isolation hides
that one from imports, but its folder is known. Fetching another torch would cost gigabytes and
minutes.
"""

from __future__ import annotations

import importlib.metadata
import re
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403

FETCHED = "torch==2.13.0"
OLDEST = (2, 10)


@dataclass(frozen=True)
class Torch:
    """An installed torch: its package folder and version."""

    root: Path
    version: str


def find_torch(folders: list[str] | None = None) -> Torch | None:
    """The first torch that can be built against: an importable one, then one installed for this
    Python; None without one. `folders`: where to look instead."""
    if folders is None:
        paths = sysconfig.get_paths()
        folders = [*sys.path, paths["purelib"], paths["platlib"]]
    for found in importlib.metadata.distributions(name="torch", path=folders):
        root = Path(str(found.locate_file("torch")))
        numbers = re.match(r"(\d+)\.(\d+)", found.version)
        if numbers is None or not (root / "include/torch/csrc/stable/library.h").exists():
            continue
        if tuple(map(int, numbers.groups())) >= OLDEST:
            return Torch(root, found.version)
    return None


def _requirements(others: list[str]) -> list[str]:
    return others if find_torch() is not None else [*others, FETCHED]


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    return _requirements(build_meta.get_requires_for_build_wheel(config_settings))


def get_requires_for_build_editable(config_settings: Any = None) -> list[str]:
    return _requirements(build_meta.get_requires_for_build_editable(config_settings))
