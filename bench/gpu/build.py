"""Builds the package's native libraries in this tree if any is missing.

Libraries that exist here, or in an installed package with the same sources, are used as they are.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CHECK = "from fomoe_ext import _C; _C.build_facts(); print(_C.FOLDER)"
SEE = "from fomoe_ext.ops import native; assert native.cuda_loaded, 'torch sees no GPU'"
LIBRARIES = ("libfomoe_facts.so", "libfomoe_cpu.so", "libfomoe_cuda.so")


def missing(device: str) -> list[str]:
    """Names of missing libraries; all of them if they cannot be loaded."""
    names = [name for name in LIBRARIES if device == "cuda" or "cuda" not in name]
    check = subprocess.run([sys.executable, "-c", CHECK], capture_output=True, text=True)
    if check.returncode:
        return names
    return [name for name in names if not (Path(check.stdout.strip()) / name).exists()]


def main() -> int:
    device = sys.argv[1] if len(sys.argv) > 1 else "cuda"
    lacking = missing(device)
    if lacking and device == "cpu":  # a dry run
        print(f"{', '.join(lacking)} missing: build the package here, or install it")
        return 1
    if lacking:
        command = [sys.executable, "setup.py", "build_ext", "--inplace"]
        if code := subprocess.run(command, cwd=ROOT, check=False).returncode:
            return code
        if still := missing(device):
            print(f"{', '.join(still)} cannot be loaded after the build")
            return 1
    if device == "cuda" and subprocess.run([sys.executable, "-c", SEE], check=False).returncode:
        return 1
    print(f"built: {', '.join(lacking)}" if lacking else "all libraries exist already")
    return 0


if __name__ == "__main__":
    sys.exit(main())
