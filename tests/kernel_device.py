"""Devices to run kernels on: the CPU, a GPU, or the CPU with the CUDA kernels' source."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch


@dataclass(frozen=True)
class Device:
    """A device whose kernels are called through torch's dispatcher. `emulated` runs the source of
    the CUDA kernels and of their ops on CPU tensors.
    """

    name: str
    tensors: str  # torch device of the tensors
    namespace: str = "fomoe"

    def op(self, verb: str) -> Callable[..., Any]:
        """The op `verb` on this device; skips the test where it has no such kernel."""
        key = "CUDA" if self.tensors == "cuda" else "CPU"
        if not torch._C._dispatch_has_kernel_for_dispatch_key(f"{self.namespace}::{verb}", key):
            pytest.skip(f"{self.name} has no kernel '{verb}'")
        return getattr(getattr(torch.ops, self.namespace), verb)
