"""Runs the CUDA kernels' own source on the CPU (README.md).

`load` builds csrc/cuda/**/*.cu and the ops around them (csrc/ops/*_cuda.cpp) into a library that
registers the same ops for CPU tensors under a namespace of their own; `build_driver` builds them
into a program without Python, for sanitizers.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from .build import HERE, ROOT, Builder, compiler, in_parallel, runtime_objects

__all__ = ["NAMESPACE", "build_driver", "compiler", "driver_builder", "load"]

NAMESPACE = "fomoe_emulated"
CPU_KERNELS = ["route/route", "rows/combine", "rows/compact", "gemm/experts", "gemm/gemm"]
CPU_KERNELS += ["delta/delta", "delta/hash", "parallel", "features"]


# Launches of the driver have few blocks, so that small inputs make blocks go around. It has few
# kernels: one of the 16-bit formats, which differ in conversions only, and half of the activations.
DRIVER_DEFINES = ("FOMOE_FEW_BLOCKS=3", "FOMOE_FEW_KERNELS")


def kernel_sources() -> list[Path]:
    """All CUDA sources of the package."""
    return sorted((ROOT / "csrc/cuda").rglob("*.cu"))


def load() -> None:
    """Builds the emulated ops and loads them: `torch.ops.fomoe_emulated.*`.

    Undefined behaviour in a kernel (misaligned vector accesses, signed overflow) ends the process.
    RuntimeError with the compiler's words when building fails.
    """
    import torch

    spec = importlib.util.find_spec("torch")
    assert spec is not None and spec.origin is not None
    torch_root = Path(spec.origin).parent
    kernels = Builder(sanitize="undefined")
    ops = Builder(
        defines=(f"FOMOE_NAMESPACE={NAMESPACE}", "TORCH_TARGET_VERSION=0x020a000000000000"),
        include_dirs=(torch_root / "include",),
        versions=torch.__version__,
        optimize="-O0",
    )
    op_sources = [ROOT / "csrc/ops/schemas.cpp", *sorted((ROOT / "csrc/ops").glob("*_cuda.cpp"))]
    jobs = [(kernels.compile, source) for source in kernel_sources()]
    objects = in_parallel([*jobs, *((ops.compile, source) for source in op_sources)])
    libraries = [f"-L{torch_root / 'lib'}", "-Wl,--no-as-needed", "-ltorch_cpu", "-lc10"]
    library = kernels.link(
        [*objects, *runtime_objects()], "libfomoe_emulated", shared=True, extra=libraries
    )
    torch.ops.load_library(library)


def driver_builder(sanitize: str) -> Builder:
    """How the driver is compiled with sanitizers. Hardly optimized: it runs a few times only, and
    optimizing code with checks in it takes long.
    """
    return Builder("" if sanitize == "plain" else sanitize, DRIVER_DEFINES, optimize="-Og")


def build_driver(sanitize: str) -> Path:
    """The driver (driver.cpp) with the package's kernels; returns the program."""
    builder = driver_builder(sanitize)
    objects = in_parallel([(builder.compile, source) for source in driver_sources()])
    return builder.link([*objects, *driver_references()], "driver", shared=False)


def driver_sources() -> list[Path]:
    """What the driver is built from with sanitizers: the kernels, of one 16-bit format, and its own
    files.
    """
    kernels = [source for source in kernel_sources() if "_f16_" not in source.name]
    return [*kernels, *sorted(HERE.glob("driver*.cpp"))]


def driver_references() -> list[Path]:
    """Objects of the driver that are never sanitized: the runtime, and the CPU kernels that it
    compares with, for the plainest instruction set.
    """
    isas = ("FOMOE_HAVE_AVX2=0", "FOMOE_HAVE_AVX512=0", "FOMOE_HAVE_AVX512_BF16=0")
    verbs = ("route/route", "rows/combine", "gemm/gemm", "delta/delta")
    scalar = [f"{name}_scalar" for name in verbs]
    names = [*CPU_KERNELS, *scalar]
    plain = Builder()
    kernels = [(plain.compile_plain, ROOT / f"csrc/cpu/{name}.cpp", isas) for name in names]
    return [*runtime_objects(), *in_parallel(kernels)]
