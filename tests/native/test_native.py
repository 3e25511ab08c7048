"""Tests written in C++: built by CMake for the CPU alone, plainly and under sanitizers."""

from __future__ import annotations

import platform

import pytest
from native_build import configure, run


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="x86 kernels")
@pytest.mark.parametrize(
    "sanitizers", [pytest.param("", marks=pytest.mark.slow), "address,undefined"]
)
def test_gemm(tmp_path, sanitizers):
    """Every instruction set's GEMMs against double precision, AVX-512 ones as scalar twins."""
    said = configure(tmp_path, f"-DFOMOE_SANITIZE={sanitizers}")
    assert "building for the CPU only" in said
    run("cmake", "--build", tmp_path, "--target", "test_gemm")
    output = run(tmp_path / "test_gemm", "3", ASAN_OPTIONS="detect_leaks=0")
    for isa in ("scalar", "avx2", "twin512", "twin512_bf16"):
        assert isa in output


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="x86 kernels")
def test_delta(tmp_path):
    """Delta codecs of every instruction set write the same bits, and only into their buffers."""
    configure(tmp_path, "-DFOMOE_SANITIZE=address,undefined")
    run("cmake", "--build", tmp_path, "--target", "test_delta")
    output = run(tmp_path / "test_delta", "2000", ASAN_OPTIONS="detect_leaks=0")
    for isa in ("avx2", "twin512"):
        assert f"{isa}: the bits of scalar in 2000 rounds" in output
