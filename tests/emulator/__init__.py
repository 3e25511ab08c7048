"""Runs the CUDA kernels' own source on the CPU (README.md).

`load` builds csrc/cuda/*.cu and the ops around them (csrc/ops/*_cuda.cpp) into a library that
registers the same ops for CPU tensors under a namespace of their own; `build_driver` builds them
into a program without Python, for sanitizers.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from .build import HERE, Builder, compiler, in_parallel, runtime_objects

__all__ = ["NAMESPACE", "build_driver", "compiler", "load"]

NAMESPACE = "fomoe_emulated"
ROOT = HERE.parent.parent
CPU_KERNELS = ["route", "combine", "compact", "experts", "gemm", "delta", "hash"]
CPU_KERNELS += ["parallel", "features"]


# Launches of the driver have few blocks, so that small inputs make blocks go around; of the 16-bit
# formats, whose kernels differ in nothing but conversions, it has one.
DRIVER_DEFINES = ("FOMOE_FEW_BLOCKS=3", "FOMOE_FEW_FORMATS")


def kernel_sources() -> list[Path]:
    """All CUDA sources of the package."""
    return sorted((ROOT / "csrc/cuda").glob("*.cu"))


def load(folder: Path) -> None:
    """Builds the emulated ops in `folder` and loads them: `torch.ops.fomoe_emulated.*`.

    Undefined behaviour in a kernel (misaligned vector accesses, signed overflow) ends the process.
    RuntimeError with the compiler's words when building fails.
    """
    import torch

    spec = importlib.util.find_spec("torch")
    assert spec is not None and spec.origin is not None
    torch_root = Path(spec.origin).parent
    kernels = Builder(folder, sanitize="undefined")
    ops = Builder(
        folder,
        defines=(f"FOMOE_NAMESPACE={NAMESPACE}", "TORCH_TARGET_VERSION=0x020a000000000000"),
        include_dirs=(torch_root / "include",),
        optimize="-O0",
    )
    op_sources = [ROOT / "csrc/ops/schemas.cpp", *sorted((ROOT / "csrc/ops").glob("*_cuda.cpp"))]
    jobs = [(kernels.compile, source) for source in kernel_sources()]
    objects = in_parallel([*jobs, *((ops.compile, source) for source in op_sources)])
    libraries = [f"-L{torch_root / 'lib'}", "-Wl,--no-as-needed", "-ltorch_cpu", "-lc10"]
    library = folder / "libfomoe_emulated.so"
    kernels.link([*objects, *runtime_objects(folder)], library, shared=True, extra=libraries)
    torch.ops.load_library(library)


def build_driver(folder: Path, sanitize: str) -> Path:
    """The driver (driver.cpp) with the package's kernels; returns the program."""
    builder = Builder(folder, sanitize=sanitize, defines=DRIVER_DEFINES)
    objects = in_parallel([(builder.compile, source) for source in driver_sources()])
    return builder.link([*objects, *driver_references(folder)], folder / "driver", shared=False)


def driver_sources() -> list[Path]:
    """What the driver is built from with sanitizers: the kernels and its own files."""
    return [*kernel_sources(), *sorted(HERE.glob("driver*.cpp"))]


def driver_references(folder: Path) -> list[Path]:
    """Objects of the driver that are never sanitized: the runtime, and the CPU kernels that it
    compares with, for the plainest instruction set.
    """
    isas = ("FOMOE_HAVE_AVX2=0", "FOMOE_HAVE_AVX512=0", "FOMOE_HAVE_AVX512_BF16=0")
    scalar = [f"{name}_scalar" for name in ("route", "combine", "gemm", "delta")]
    names = [*CPU_KERNELS, *scalar]
    plain = Builder(folder)
    kernels = [(plain.compile_plain, ROOT / f"csrc/cpu/{name}.cpp", isas) for name in names]
    return [*runtime_objects(folder), *in_parallel(kernels)]
