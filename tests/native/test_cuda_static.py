"""Checks of the CUDA kernels' machine code, without a GPU: registers, spills, access widths.

The library under test is the one that was built; CI builds it for sm_80 and sm_90a with
spills as errors.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import cuda_resources
import emulator
import pytest
from cuda_resources import Code, Resources, ToolMissing
from emulator.build import BUILT, digest, once, remove_unused, run

import fomoe_ext
from fomoe_ext import _C

LIBRARY = Path(fomoe_ext.__file__).parent / "libfomoe_cuda.so"
SOURCES = [p for p in (emulator.ROOT / "csrc").rglob("*") if p.suffix in (".cu", ".cuh", ".h")]


@pytest.fixture(scope="module")
def taken() -> dict[tuple[str, str], Resources]:
    if _C.build_facts()["cuda"] is None:
        pytest.skip("built without CUDA")
    try:
        return cuda_resources.resources(LIBRARY)
    except ToolMissing as missing:
        pytest.skip(str(missing))


@pytest.fixture(scope="module")
def codes(taken) -> dict[tuple[str, str], Code]:
    # Reading it takes a minute: once for all processes of a session.
    parser = Path(cuda_resources.__file__)
    name = f"machine-code-{digest(LIBRARY.read_bytes(), parser.read_bytes())}.json"

    def read(kept: Path) -> None:
        found = cuda_resources.machine_code(LIBRARY)
        kept.write_text(json.dumps([[*key, code.count] for key, code in found.items()]))
        remove_unused(BUILT, "machine-code")

    found = json.loads(once(BUILT / name, read).read_text())
    return {(kernel, arch): Code(count) for kernel, arch, count in found}


def test_every_architecture_is_there(taken):
    """Code for 9.0 comes with the Hopper kernels, which are for 9.0a."""
    archs = _C.build_facts()["cuda_archs"]
    built = {f"sm_{arch.removesuffix('-real')}" for arch in archs if arch.endswith("-real")}
    if "sm_90" in built:
        built.add("sm_90a")
    assert {arch for _, arch in taken} == built


def test_within_the_budget(taken):
    """Registers and shared memory; `python tests/cuda_resources.py --write` makes a new budget.

    Only architectures that were built are compared: a build may be for one GPU.
    """
    table, budget = cuda_resources.table_of(taken), cuda_resources.read_budget()
    archs = cuda_resources.archs_of(table) & cuda_resources.archs_of(budget)
    if not archs:
        pytest.skip("the library has no architecture that there is a budget for")
    table, budget = (cuda_resources.for_archs(part, archs) for part in (table, budget))
    assert list(cuda_resources.complaints(table, budget)) == []


def test_nothing_in_local_memory(taken, codes):
    assert [key for key, what in taken.items() if what.stack or what.local] == []
    assert [key for key, code in codes.items() if code.has(r"^(LDL|STL)\b")] == []


def test_wide_accesses(codes):
    """Kernels for rows of aligned 16-byte vectors load and store 128 bits at a time."""
    wide = {
        (kernel, arch): code
        for (kernel, arch), code in codes.items()
        if re.search(r"Access<\w+, 4>", kernel)
    }
    loading = {
        (kernel, arch): code
        for (kernel, arch), code in codes.items()
        # Each lane has enough experts for 16 bytes.
        if re.fullmatch(
            r"route(_backward)?_kernel<(F32, (4|8|16|32)|B?f?F?16, (8|16|32))(, \w+)?>", kernel
        )
    }
    assert len(wide) > 0 and len(loading) > 0
    for key, code in (wide | loading).items():
        assert code.has(r"^LDG\.E\.(\w+\.)*128"), key
    storing = {key for key in loading if "backward" in key[0]}
    storing |= {key for key in wide if not key[0].startswith("weight_dots")}  # a number per row
    for key in storing:
        assert (wide | loading)[key].has(r"^STG\.E\.(\w+\.)*128"), key


def test_delta_kernels_move_16_bytes_at_a_time(codes):
    """Only values are aligned; payloads may start at any byte."""
    found = {
        (kernel, arch): code
        for (kernel, arch), code in codes.items()
        if re.match(r"delta::|topk_sum_kernel|hash_kernel<4", kernel)
    }
    assert len(found) > 0
    for (kernel, arch), code in found.items():
        # Anchor, error and local; of reductions own and, where they encode, error.
        loads = 3 if "Difference" in kernel else 2 if re.match("delta::(enc|topk)", kernel) else 1
        assert code.total(r"^LDG\.E\.(\w+\.)*128") >= loads, (kernel, arch)
        if not kernel.startswith("hash"):
            assert code.has(r"^STG\.E\.(\w+\.)*128"), (kernel, arch)


def test_route_counts_scores_in_registers(codes):
    """No 64-bit sums in shared memory, which would be loops of compare and swap (ATOMS.CAST)."""
    counting = {k: c for k, c in codes.items() if re.match(r"route_kernel<.*true>", k[0])}
    assert len(counting) > 0
    for key, code in counting.items():
        assert not code.has(r"^ATOMS\.(CAS|CAST)"), key


def test_no_floating_point_atomics(codes):
    """Atomics would add floats in any order."""
    floating = r"^(ATOM|ATOMG|ATOMS|RED|REDG)\b.*\.(F16|F32|F64|BF16)"
    assert [key for key, code in codes.items() if code.has(floating)] == []


def test_warp_reductions_are_instructions(codes):
    """route takes the maximum over a warp in one instruction (REDUX)."""
    found = {key: code for key, code in codes.items() if key[0].startswith("route_kernel")}
    assert len(found) > 0
    for key, code in found.items():
        assert code.has(r"^C?REDUX"), key


def gemms(codes: dict[tuple[str, str], Code], kind: str, arch: str) -> dict[str, Code]:
    return {k: code for (k, a), code in codes.items() if k.startswith(f"{kind}<") and a == arch}


def hopper_gemms(codes: dict[tuple[str, str], Code]) -> dict[str, Code]:
    kinds = [kind.removesuffix("<") for kind in cuda_resources.HOPPER_GEMMS]
    return {k: code for kind in kinds for k, code in gemms(codes, kind, "sm_90a").items()}


def test_hopper_gemms_are_wgmma_and_tma(codes):
    """wgmma products, TMA loads, and registers reallocated to the consumer warpgroups."""
    if not {"90-real", "90a-real"} & set(_C.build_facts()["cuda_archs"]):
        pytest.skip("not built for 9.0")
    found = hopper_gemms(codes)
    assert len(found) > 0
    for kernel, code in found.items():
        columns = int(re.findall(r", (\d+)(?:, (?:true|false))?>$", kernel)[0])
        kind = "F16" if "<F16x2" in kernel else "BF16"
        products = code.total(
            rf"^HGMMA\.64x{columns}x16\.F32\.{kind}$|HGMMA\.64x{columns}x16\.F32$"
        )
        assert products > 0 and products == code.total("^HGMMA"), kernel
        # Serialised products would wait after each one.
        assert code.total(r"^WARPGROUP\.DEPBAR") <= products / 2, kernel
        assert code.total("^UTMALDG") > 0, kernel
        assert code.total("^USETMAXREG") == 2, kernel
        # Rows are gathered by cp.async on their way, as steps of a sum over rows are.
        gathers = "true>, " in kernel or kernel.startswith("warp_specialized<Weights")
        assert code.has("^LDGSTS") == gathers, kernel


def test_paired_gemms_multicast_b(codes):
    """One TMA load for two blocks. Only the cluster barriers at start and end wait for stores; the
    arrival that frees a stage of the other block does not.
    """
    if not {"90-real", "90a-real"} & set(_C.build_facts()["cuda_archs"]):
        pytest.skip("not built for 9.0")
    pairs = gemms(codes, "paired", "sm_90a")
    assert len(pairs) == 2 * (2 * len(cuda_resources.ACTIVATIONS) + 2)  # formats, problems
    for kernel, code in pairs.items():
        assert code.has(r"^UTMALDG\.3D\.MULTICAST"), kernel
        assert code.has(r"^SYNCS\.ARRIVE\.TRANS64\.RED"), kernel
        for barrier in (r"^UCGABAR_ARV", r"^UCGABAR_WAIT", r"^MEMBAR\.ALL\.GPU"):
            assert code.total(barrier) == 2, (kernel, barrier)
    for kernel, code in gemms(codes, "warp_specialized", "sm_90a").items():
        assert not code.has(r"MULTICAST|^UCGABAR"), kernel


def test_hopper_gemms_stay_optimised(codes):
    """The costs that were removed after measurements on an H200 (docs/performance.md) stay away."""
    found = hopper_gemms(codes)
    assert len(found) > 0
    for kernel, code in found.items():
        # Descriptors are computed in uniform registers, once per warp.
        assert code.total("^R2UR") <= 40, kernel
        # A producer waits for free stages only: copies signal their own arrival.
        assert not code.has("^LDGDEPBAR"), kernel
        assert code.has("^ARRIVES.LDGSTSBAR") == code.has("^LDGSTS"), kernel
        # The code fits into the instruction cache.
        assert sum(code.count.values()) <= 7000, kernel


def test_epilogues_move_matrices(codes):
    """16-bit windows are read by ldmatrix and, in the kernels for Hopper, written by stmatrix."""
    epilogues = {
        (kernel, arch): code
        for (kernel, arch), code in codes.items()
        if re.match(r"(multistage|warp_specialized|paired)<", kernel) and "<F32" not in kernel
    }
    kinds = {"multistage", "warp_specialized", "paired"}
    assert {kernel.split("<")[0] for kernel, _ in epilogues} == kinds
    for (kernel, arch), code in epilogues.items():
        if not kernel.startswith("multistage"):
            assert code.has("^STSM") == ("AddRows" not in kernel), kernel  # those add to fp32
            # wgmma reads its operands without ldmatrix.
            assert code.has("^LDSM") == ("ActivateBackward" in kernel), kernel
        elif "ActivateBackward" in kernel:
            other = re.sub(r"ActivateBackward<(\w+), \w+>", r"StoreRows<\1>", kernel)
            other = other.replace("line, true>", "line, false>")
            assert code.total("^LDSM") > epilogues[other, arch].total("^LDSM"), (kernel, arch)


def test_the_activation_is_a_template_argument(codes):
    """The activation is a template argument: a kernel has the exponentials of its own activation
    only. They may be there twice, if the compiler split the code by whether pre-activations are
    kept.
    """
    seen = set()
    for (kernel, arch), code in codes.items():
        found = re.match(
            r"(multistage|warp_specialized|paired)<RowsProblem<(Activate|ActivateBackward)<(\w+), "
            r"(\w+)>, \w+, true>, (\d+)(?:, (\w+))?>",
            kernel,
        )
        if not found:
            continue
        kind, epilogue, dtype, activation, columns, last = found.groups()
        threads = 256 if kind == "warp_specialized" and last == "false" else 128
        threads = 256 if dtype == "F32" else threads
        sums = 128 * int(columns) // threads
        elements = sums // 2 if epilogue == "Activate" and "glu" in activation else sums
        exponentials = code.total(r"^MUFU\.EX2")
        wanted = {0} if activation == "relu2" else {elements, 2 * elements}
        assert exponentials in wanted, (kernel, arch)
        seen.add(activation)
    assert seen == set(cuda_resources.ACTIVATIONS)


def test_portable_gemms_are_mma_and_cp_async(codes):
    for arch in {arch for _, arch in codes}:
        found = gemms(codes, "multistage", arch)
        assert len(found) > 0
        for kernel, code in found.items():
            assert code.has(r"^LDGSTS\.E\.(\w+\.)*128"), (kernel, arch)
            if "<F32" in kernel:
                assert code.has("^FFMA") and not code.has("^HMMA"), (kernel, arch)
                continue
            kind = "BF16" if "<Bf16x2" in kernel else "F32$"
            assert code.has(rf"^HMMA\.16816\.F32.*{kind}|^HMMA\.16816\.{kind}"), (kernel, arch)
            assert code.has(r"^LDSM\.16\.M?T?(88|8816)?.*\.4"), (kernel, arch)


def test_inline_assembly_is_in_one_place():
    guilty = [
        path
        for path in SOURCES
        if re.search(r"\basm\b", path.read_text()) and path.parent.name != "arch"
    ]
    assert guilty == []
    assert any(re.search(r"\basm\b", p.read_text()) for p in SOURCES if p.parent.name == "arch")


# ---- warnings of the assembler -------------------------------------------------------------------


def nvcc() -> str:
    program = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    if program is None:
        pytest.skip("nvcc is needed")
    return program


def words_of_the_assembler(source: Path, cubin: Path) -> str:
    command = [nvcc(), "-std=c++20", "-O3", "-fmad=false", "-arch=sm_90a", "-cubin", "-Xptxas=-v"]
    result = subprocess.run(
        [*command, source, "-o", cubin], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stderr


def complaints_about_warpgroups(words: str) -> list[str]:
    """Warnings that wgmma is serialised, a fence injected or setmaxnreg ignored."""
    return [
        line
        for line in words.splitlines()
        if re.search("wgmma|warpgroup|setmaxnreg", line)
        and "Compiling entry function" not in line
        and "Function properties" not in line
    ]


@pytest.mark.slow
def test_the_assembler_has_no_warnings_about_hopper_gemms(tmp_path):
    """CI checks the output of its own build in the same way."""
    # One of the 16-bit formats, whose kernels differ in the name of an instruction.
    source = emulator.ROOT / "csrc/cuda/gemm/experts_bf16_sm90.cu"
    words = words_of_the_assembler(source, tmp_path / "cubin")
    assert "Used 168 registers" in words
    assert complaints_about_warpgroups(words) == []


def test_warnings_about_warpgroups_are_noticed(tmp_path):
    """Without launch bounds the assembler does not know how many registers setmaxnreg may use."""
    source = tmp_path / "kernel.cu"
    source.write_text(
        f'#include "{emulator.ROOT / "csrc/cuda/arch/warpgroup.cuh"}"\n'
        "__global__ void kernel() { fomoe::cuda::registers_raise<216>(); }"
    )
    (complaint,) = complaints_about_warpgroups(words_of_the_assembler(source, tmp_path / "cubin"))
    assert "'setmaxnreg' ignored" in complaint


# ---- the checks themselves -----------------------------------------------------------------------


def test_a_budget_that_is_too_small_is_noticed():
    budget = {"a": {"shared": 0, "sm_80": 32}, "gone": {"shared": 0, "sm_80": 8}}
    table = {"a": {"shared": 16, "sm_80": 33, "sm_90a": 20}, "new": {"shared": 0, "sm_80": 1}}
    assert list(cuda_resources.complaints(table, budget)) == [
        "new: has no line in cuda_budget.csv",
        "gone: stands in cuda_budget.csv but not in the library",
        "a: 16 bytes of shared memory, the budget is 0",
        "a: 33 registers on sm_80, the budget is 32",
        "a: no budget for registers on sm_90a",
    ]


def test_only_what_was_built_is_compared():
    """A library for one GPU lacks the columns and the kernels of the others."""
    budget = {"a": {"shared": 0, "sm_80": 32, "sm_90a": 8}, "hopper": {"shared": 9, "sm_90a": 8}}
    assert cuda_resources.archs_of(budget) == {"sm_80", "sm_90a"}
    assert cuda_resources.for_archs(budget, ["sm_80"]) == {"a": {"shared": 0, "sm_80": 32}}
    assert cuda_resources.for_archs(budget, ["sm_80", "sm_90a"]) == budget


def test_warps_per_multiprocessor():
    """By hand: 65536 registers, 227 KiB, 64 warps."""
    warps = cuda_resources.warps_per_multiprocessor
    assert warps(32, 0, 256) == 64  # 2048 threads of 32 registers
    assert warps(33, 0, 256) == 48  # rounded up to 40 registers: 6 blocks of 8 warps
    assert warps(255, 0, 128) == 8  # 256: 8 warps
    assert warps(32, 56 << 10, 256) == 24  # three blocks' shared memory


def test_a_spill_is_an_error(tmp_path):
    """The flags that CI builds with stop at a kernel that needs local memory."""
    script = (emulator.ROOT / ".ci/run").read_text()
    (flags,) = re.findall(r'FOMOE_CUDA_FLAGS="([^"]*)"', script)
    source = tmp_path / "kernel.cu"
    command = [nvcc(), "-arch=sm_90a", "-cubin", *flags.split(), source, "-o", tmp_path / "cubin"]
    kernel = (
        "__global__ void kernel(float* p) {{ float kept[64]; {} "
        "for (int i = 0; i < 64; ++i) p[i] = kept[{}]; }}"
    )
    fill = "for (int i = 0; i < 64; ++i) kept[i] = p[64 + i];"
    source.write_text(kernel.format(fill, "63 - i"))
    run(command)
    source.write_text(kernel.format(fill, "int(p[i]) % 64"))  # an index known only when it runs
    with pytest.raises(RuntimeError, match="Local memory used"):
        run(command)
