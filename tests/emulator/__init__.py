"""Runs the CUDA kernels' own source on the CPU: compiled by g++ against a stand-in for CUDA's
headers, with the undefined-behaviour checks of the compiler on (misaligned vector accesses, signed
overflow and shifts out of range abort).
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import torch

HERE = Path(__file__).parent
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def compiler() -> str | None:
    """The C++ compiler, or None where there is none."""
    return shutil.which(os.environ.get("CXX", "g++"))


class EmulatedKernels:
    """The CUDA kernels by name, on CPU tensors, with the signatures of `torch.ops.fomoe`."""

    def __init__(self, folder: Path) -> None:
        """Compiles into `folder`; RuntimeError with the compiler's words when that fails."""
        library = folder / "emulated_kernels.so"
        # -O0: an optimiser would drop a read whose value goes unused, and hide it from the tests.
        command = [str(compiler()), "-x", "c++", "-std=c++20", "-O0", "-g", "-shared", "-fPIC"]
        command += ["-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Werror", "-ffp-contract=off"]
        command += ["-fsanitize=undefined", "-fno-sanitize-recover=undefined"]
        command += [f"-I{HERE / 'include'}", str(HERE / "kernels.cpp"), "-o", str(library)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode != 0:
            raise RuntimeError(f"{' '.join(command)}\n{result.stderr}")
        self._library = ctypes.CDLL(str(library))

    def combine(
        self, rows: torch.Tensor, weights: torch.Tensor | None, row_of_slot: torch.Tensor
    ) -> torch.Tensor:
        """`fomoe::cuda::combine`; y is poisoned with NaN before. RuntimeError on a CUDA error."""
        y = torch.full((len(row_of_slot), rows.shape[1]), float("nan"), dtype=rows.dtype)
        self.call_combine(rows.data_ptr(), weights, row_of_slot, rows.dtype, y)
        return y

    def call_combine(
        self,
        rows: int,
        weights: torch.Tensor | None,
        row_of_slot: torch.Tensor,
        dtype: torch.dtype,
        y: torch.Tensor,
    ) -> None:
        """The same with `rows` as an address and y given."""
        tokens, top_k = row_of_slot.shape
        error = self._library.emulated_combine(
            ctypes.c_void_p(rows),
            ctypes.c_void_p(0 if weights is None else weights.data_ptr()),
            ctypes.c_void_p(row_of_slot.data_ptr()),
            ctypes.c_int32(DTYPES[dtype]),
            ctypes.c_int64(tokens),
            ctypes.c_int64(y.shape[1]),
            ctypes.c_int32(top_k),
            ctypes.c_void_p(y.data_ptr()),
        )
        if error != 0:
            raise RuntimeError(f"emulated combine: CUDA error {error}")
