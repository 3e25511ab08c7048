"""What Python finds that starts in a clone whose package was installed, and nothing built in it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import fomoe_ext

ROOT = Path(__file__).resolve().parents[1]


def run_in_clone(clone: Path, folder: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs Python in the root of a clone that has `folder` of the repository and a fomoe_ext that
    cannot be imported; the real one is where installed packages are."""
    shutil.copytree(ROOT / folder, clone / folder)
    (clone / "fomoe_ext").mkdir()
    (clone / "fomoe_ext" / "__init__.py").write_text("raise ImportError('not built')")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONSAFEPATH"}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=clone,
        env={**environment, "PYTHONPATH": str(Path(fomoe_ext.__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=120,
    )
