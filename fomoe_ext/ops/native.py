"""Loads the native ops into torch; `import fomoe_ext.ops` does it for who uses them.

The CPU library is always loaded, the CUDA library only where torch sees a GPU.
"""

from __future__ import annotations

import torch

from fomoe_ext._C import FOLDER


def _load(library: str) -> bool:
    """Loads a library of the package; False when it was not built."""
    path = FOLDER / library
    if not path.exists():
        return False
    try:
        torch.ops.load_library(path)
    except OSError as error:
        raise ImportError(
            f"fomoe_ext: {path} does not load into torch {torch.__version__} "
            f"(torch >= 2.10 is needed): {error.__cause__ or error}"
        ) from error
    return True


if not _load("libfomoe_cpu.so"):
    raise ImportError(
        f"fomoe_ext: {FOLDER / 'libfomoe_cpu.so'} is missing, the package is only half built. "
        "Run `pip install .` in the source tree, or `python setup.py build_ext --inplace`."
    )

cuda_loaded: bool = torch.cuda.is_available() and _load("libfomoe_cuda.so")
