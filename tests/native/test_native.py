"""Tests written in C++: built by CMake for the CPU alone, plainly and under sanitizers."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def package(name: str) -> Path:
    """The folder of an installed package, without importing it."""
    spec = importlib.util.find_spec(name)
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent


def run(*command: str | Path, **environment: str) -> str:
    """Stdout and stderr of a command; fails the test with them when it fails."""
    result = subprocess.run(
        [str(part) for part in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        env={**os.environ, **environment},
    )
    assert result.returncode == 0, f"{command}: status {result.returncode}\n{result.stdout}"
    return result.stdout


def configure(build: Path, *options: str) -> str:
    """Configures a build of this source tree in `build`, CPU-only unless the options say otherwise;
    returns what cmake said.
    """
    if shutil.which("cmake") is None or shutil.which("ninja") is None:
        pytest.skip("cmake and ninja are needed: pip install cmake ninja")
    return run(
        "cmake",
        *("-G", "Ninja", "-S", ROOT, "-B", build),
        f"-DFOMOE_TORCH_ROOT={package('torch')}",
        "-DFOMOE_CUDA=off",
        *options,
    )


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="x86 kernels")
@pytest.mark.parametrize(
    "sanitizers", [pytest.param("", marks=pytest.mark.slow), "address,undefined"]
)
def test_gemm(tmp_path, sanitizers):
    """Every instruction set's GEMMs against double precision, AVX-512 ones as twins."""
    said = configure(tmp_path, f"-DFOMOE_SANITIZE={sanitizers}")
    assert "building for the CPU only" in said
    run("cmake", "--build", tmp_path, "--target", "test_gemm")
    output = run(tmp_path / "test_gemm", "3", ASAN_OPTIONS="detect_leaks=0")
    for isa in ("scalar", "avx2", "twin512", "twin512_bf16"):
        assert isa in output


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="x86 kernels")
def test_delta(tmp_path):
    """Every instruction set's delta codecs make the same bits and stay in their buffers."""
    configure(tmp_path, "-DFOMOE_SANITIZE=address,undefined")
    run("cmake", "--build", tmp_path, "--target", "test_delta")
    output = run(tmp_path / "test_delta", "2000", ASAN_OPTIONS="detect_leaks=0")
    for isa in ("avx2", "twin512"):
        assert f"{isa}: the bits of scalar in 2000 rounds" in output
