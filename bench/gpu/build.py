"""Builds what is missing of the package's libraries; what is there is used as it is."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CHECK = "from fomoe_ext import _C; _C.build_facts()"
SEE = "from fomoe_ext import native; assert native.cuda_loaded, 'torch sees no GPU'"
LIBRARIES = ("libfomoe_cpu.so", "libfomoe_cuda.so")


def package() -> Path:
    """The folder of fomoe_ext: of the tree, or installed."""
    spec = importlib.util.find_spec("fomoe_ext")
    if spec is None or spec.origin is None:
        return ROOT / "fomoe_ext"
    return Path(spec.origin).parent


def missing(device: str) -> list[str]:
    """Names of libraries that are not there, or cannot be imported by this Python."""
    names = [name for name in LIBRARIES if device == "cuda" or "cuda" not in name]
    found = [name for name in names if not (package() / name).exists()]
    check = subprocess.run([sys.executable, "-c", CHECK], capture_output=True)
    return [*found, *(["_C"] if check.returncode else [])]


def build_module() -> int:
    """_C alone, beside libraries that stay as they are; the exit code."""
    import pybind11
    import torch

    build = ROOT / "build" / "gpu-module"
    variables = {
        "Python_EXECUTABLE": sys.executable,
        "pybind11_DIR": pybind11.get_cmake_dir(),
        "FOMOE_TORCH_ROOT": Path(torch.__file__).parent,
        "FOMOE_TORCH_VERSION": importlib.metadata.version("torch"),
        "FOMOE_OUTPUT": build / "fomoe_ext",
        "FOMOE_CUDA": "auto",
        "FOMOE_CUDA_ARCHS": os.environ.get("FOMOE_CUDA_ARCHS", "80;90a"),
    }
    options = [f"-D{name}={value}" for name, value in variables.items()]
    for command in (
        ["cmake", "-G", "Ninja", "-S", str(ROOT), "-B", str(build), *options],
        ["cmake", "--build", str(build), "--target", "_C"],
    ):
        if code := subprocess.run(command, check=False).returncode:
            return code
    for library in (build / "fomoe_ext").glob("_C*.so"):
        shutil.copy2(library, package() / library.name)
    return 0


def main() -> int:
    device = sys.argv[1] if len(sys.argv) > 1 else "cuda"
    lacking = missing(device)
    if lacking and (device == "cpu" or package() != ROOT / "fomoe_ext"):
        print(f"{package()} has no {', '.join(lacking)}: build it, or install it again")
        return 1
    if lacking == ["_C"]:
        code = build_module()
    elif lacking:
        command = [sys.executable, "setup.py", "build_ext", "--inplace"]
        code = subprocess.run(command, cwd=ROOT, check=False).returncode
    else:
        code = 0
    if still := [] if code else missing(device):
        print(f"{', '.join(still)} cannot be loaded even after a build")
        return 1
    if code == 0 and device == "cuda":
        code = subprocess.run([sys.executable, "-c", SEE], check=False).returncode
    if code == 0:
        print(f"built: {', '.join(lacking)}" if lacking else "all libraries were there")
    return code


if __name__ == "__main__":
    sys.exit(main())
