"""Resources of the compiled CUDA kernels: registers, shared memory, stack, machine code.

    FOMOE_CUDA_ARCHS="80;90a" python setup.py build_ext --inplace
    python tests/cuda_resources.py            prints the table, with warps per multiprocessor
    python tests/cuda_resources.py --write    makes it the budget, tests/cuda_budget.csv

Read from the built library by cuobjdump (pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm).
"""

from __future__ import annotations

import argparse
import csv
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections import defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

BUDGET = Path(__file__).parent / "cuda_budget.csv"
# Of a multiprocessor of sm_90: registers, bytes of shared memory, warps.
SM_REGISTERS, SM_SHARED, SM_WARPS = 65536, 227 << 10, 64
BLOCK_RESERVE = 1 << 10  # shared memory that every block takes beside its own
ACTIVATIONS = ("swiglu", "geglu", "silu", "relu2", "gelu", "clamped_swiglu")  # of csrc/kernels.h
HOPPER_GEMMS = ("warp_specialized<", "paired<")  # one block, pairs of blocks
FORMATS = ("fp32", "bf16", "int8", "int4", "int2", "topk")  # of csrc/kernels.h


@dataclass(frozen=True)
class Resources:
    """Of one kernel on one architecture: registers per thread, bytes."""

    registers: int
    shared: int
    stack: int
    local: int


@dataclass
class Code:
    """Mnemonics of one kernel's machine code, e.g. LDG.E.128, and how often each stands."""

    count: dict[str, int] = field(default_factory=lambda: defaultdict(int))

    def has(self, pattern: str) -> bool:
        return self.total(pattern) > 0

    def total(self, pattern: str) -> int:
        """The number of instructions whose mnemonic matches the pattern."""
        return sum(n for mnemonic, n in self.count.items() if re.search(pattern, mnemonic))


class ToolMissing(Exception):
    """A program is not installed; says which and how to get it."""


def tool(name: str, hint: str) -> str:
    site = Path(sysconfig.get_path("purelib"))
    places = [*map(str, site.glob(f"nvidia/**/bin/{name}")), name, f"/usr/local/cuda/bin/{name}"]
    for place in places:
        if found := shutil.which(place):
            return found
    raise ToolMissing(f"{name} is needed: {hint}")


def cuobjdump(*arguments: object) -> str:
    program = tool("cuobjdump", "pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm")
    # It calls nvdisasm, which pip puts beside it.
    path = f"{Path(program).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        [program, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PATH": path},
    ).stdout


def readable(symbols: Iterable[str]) -> dict[str, str]:
    """Mangled names -> e.g. `scatter::scatter_kernel<Access<F32, 4>, true, false>`."""
    symbols = list(symbols)
    program = tool("c++filt", "it comes with binutils")
    said = subprocess.run(
        [program, *symbols], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    names = {}
    for symbol, name in zip(symbols, said, strict=True):
        name = re.sub(r"fomoe::cuda::|\(anonymous namespace\)::|\w*_GLOBAL__N_\w*::", "", name)
        name = re.sub(r"\(Major\)(\d)", lambda m: ("sum", "line")[int(m[1])], name)
        name = re.sub(r"\(fomoe::Format\)(\d)", lambda m: FORMATS[int(m[1])], name)
        name = re.sub(r"\(fomoe::Activation\)(\d)", lambda m: ACTIVATIONS[int(m[1])], name)
        name = re.sub(r"^void ", "", name).split("(")[0].replace("> >", ">>")
        # A GEMM is named by its problem, columns and stages; its other template arguments follow
        # from them.
        name = re.sub(r"(\w+)::\1_kernel<\1::Shape<(.*)>>$", r"\1<\2>", name)
        name = re.sub(r"(\w+)::\1_kernel<\1::PairShape<(.*)>>$", r"paired<\2>", name)
        names[symbol] = name
    return names


def resources(library: Path) -> dict[tuple[str, str], Resources]:
    """(kernel, architecture) -> what it takes."""
    text = cuobjdump("--dump-resource-usage", library)
    found: list[tuple[str, str, Resources]] = []
    arch = function = ""
    for line in text.splitlines():
        if match := re.match(r"arch = (\w+)", line.strip()):
            arch = match[1]
        elif match := re.match(r"Function (\S+):", line.strip()):
            function = match[1]
        elif "REG:" in line:
            value = dict(re.findall(r"(\w+):(\d+)", line))
            taken = [int(value[name]) for name in ("REG", "SHARED", "STACK", "LOCAL")]
            found.append((function, arch, Resources(*taken)))
    names = readable(function for function, *_ in found)
    return {(names[function], arch): taken for function, arch, taken in found}


def machine_code(library: Path) -> dict[tuple[str, str], Code]:
    """(kernel, architecture) -> its instructions."""
    archs = sorted(set(re.findall(r"\.(sm_\w+)\.cubin", cuobjdump("--list-elf", library))))
    codes: dict[tuple[str, str], Code] = defaultdict(Code)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        texts = pool.map(lambda arch: cuobjdump("-sass", "-arch", arch, library), archs)
        for arch, text in zip(archs, texts, strict=True):
            function = ""
            for line in text.splitlines():
                if match := re.match(r"\s*Function : (\S+)", line):
                    function = match[1]
                elif match := re.match(r"\s*/\*\w+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", line):
                    codes[function, arch].count[match[1]] += 1
    names = readable({function for function, _ in codes})
    return {(names[function], arch): code for (function, arch), code in codes.items()}


# ---- the budget ----------------------------------------------------------------------------------

Table = dict[str, dict[str, int]]  # kernel -> {"shared": bytes, architecture: registers}


def table_of(taken: dict[tuple[str, str], Resources]) -> Table:
    table: Table = defaultdict(lambda: {"shared": 0})
    for (kernel, arch), what in sorted(taken.items()):
        # From sm_90 on the driver's reserve is counted as shared memory of the kernel.
        shared = what.shared - (BLOCK_RESERVE if arch_number(arch) >= 90 else 0)
        table[kernel]["shared"] = max(table[kernel]["shared"], shared)
        table[kernel][arch] = what.registers
    return dict(table)


def read_budget() -> Table:
    with BUDGET.open(newline="") as file:
        return {
            row.pop("kernel"): {name: int(value) for name, value in row.items() if value}
            for row in csv.DictReader(file)
        }


def for_archs(table: Table, archs: Iterable[str]) -> Table:
    """The columns of these architectures, without kernels that are built for none of them."""
    kept = {"shared", *archs}
    return {
        kernel: {what: value for what, value in row.items() if what in kept}
        for kernel, row in table.items()
        if kept & (row.keys() - {"shared"})
    }


def archs_of(table: Table) -> set[str]:
    return {what for row in table.values() for what in row} - {"shared"}


def write_budget(table: Table) -> None:
    archs = sorted(archs_of(table), key=arch_number)
    temporary = BUDGET.with_suffix(".tmp")
    with temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["kernel", "shared", *archs], lineterminator="\n")
        writer.writeheader()
        writer.writerows({"kernel": kernel, **table[kernel]} for kernel in sorted(table))
    temporary.replace(BUDGET)


def arch_number(arch: str) -> int:
    return int(re.sub(r"\D", "", arch))


def complaints(table: Table, budget: Table) -> Iterator[str]:
    """A message for each place where the table exceeds the budget."""
    for kernel in sorted(table.keys() - budget.keys()):
        yield f"{kernel}: has no line in {BUDGET.name}"
    for kernel in sorted(budget.keys() - table.keys()):
        yield f"{kernel}: stands in {BUDGET.name} but not in the library"
    for kernel in sorted(table.keys() & budget.keys()):
        for what, value in table[kernel].items():
            allowed = budget[kernel].get(what)
            unit = "bytes of shared memory" if what == "shared" else f"registers on {what}"
            if allowed is None:
                yield f"{kernel}: no budget for {unit}"
            elif value > allowed:
                yield f"{kernel}: {value} {unit}, the budget is {allowed}"


def warps_per_multiprocessor(registers: int, shared: int, threads: int) -> int:
    """How many warps are resident on a multiprocessor of sm_90, with blocks of so many threads.

    Registers are given out in units of 8 per thread and 256 per warp.
    """
    warps = -(-threads // 32)
    per_warp = -(-registers // 8) * 8 * 32
    by_registers = SM_REGISTERS // per_warp // warps
    by_shared = SM_SHARED // (shared + BLOCK_RESERVE)
    return warps * min(by_registers, by_shared, SM_WARPS // warps, 32)


def threads_of(kernel: str) -> int:
    """Threads of a kernel's blocks, as its source has them."""
    if kernel.startswith(("route_kernel", "route_backward_kernel")):
        return 128 if re.search(r", 32(, \w+)?>$", kernel) else 256
    if kernel.startswith(HOPPER_GEMMS):
        return 384
    if kernel.startswith("multistage<"):
        return 256 if "<F32" in kernel else 128
    chunks = kernel.startswith(("delta::topk_kernel", "topk_sum_kernel"))
    return 512 if chunks or kernel in ("count_kernel", "scatter_kernel") else 256


def dynamic_shared_of(kernel: str) -> int:
    """Shared memory that a launch adds, bytes: a GEMM's ring of stages, as its source has them."""
    if match := re.match(r"multistage<.*, (\d+), (\d+)>$", kernel):
        columns, stages = map(int, match.groups())
        return stages * (128 + columns) * 128
    # As many stages as fit, so one block.
    return SM_SHARED // 2 if kernel.startswith(HOPPER_GEMMS) else 0


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help=f"write {BUDGET.name}")
    import fomoe_ext

    library = Path(fomoe_ext.__file__).parent / "libfomoe_cuda.so"
    arguments = parser.parse_args()
    if not library.exists():
        parser.error(f"{library} is not there: build with nvcc first")
    try:
        taken = resources(library)
    except ToolMissing as missing:
        parser.error(str(missing))
    table = table_of(taken)
    archs = sorted({arch for _, arch in taken}, key=arch_number)
    if missing := archs_of(read_budget()) - set(archs):
        wanted = 'FOMOE_CUDA_ARCHS="80;90a"'
        parser.error(f"{library} has no code for {', '.join(sorted(missing))}: build with {wanted}")
    print(
        f"{'kernel':60} {'shared':>7} {' '.join(f'{arch:>7}' for arch in archs)}  warps on sm_90a"
    )
    for kernel, row in sorted(table.items()):
        registers = " ".join(f"{row.get(arch, 0):7}" for arch in archs)
        shared = row["shared"] + dynamic_shared_of(kernel)
        warps = warps_per_multiprocessor(row["sm_90a"], shared, threads_of(kernel))
        print(f"{kernel:60} {row['shared']:7} {registers}  {warps} of {SM_WARPS}")
    spilling = [f"{kernel} on {arch}" for (kernel, arch), r in taken.items() if r.stack or r.local]
    if spilling:
        print("use of local memory:", ", ".join(spilling))
    if arguments.write:
        write_budget(table)
    return 1 if spilling else 0


if __name__ == "__main__":
    sys.exit(main())
