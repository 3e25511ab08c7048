"""The emulator itself: what it computes, what it catches, and that its twins of instructions do
what the hardware does.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import cuda_resources
import numpy as np
import pytest

import emulator
from emulator.build import Builder, in_parallel, run, runtime_objects
from emulator.expected import INPUT, PRODUCTS, expected

SELFTEST = emulator.HERE / "selftest"
SOURCES = [SELFTEST / f"{name}.cu" for name in ("selftest", "warpgroup", "arrivals", "clusters")]
OUT_WORDS = (192 << 10) // 4
BUILDS = ["undefined", "address,undefined", "thread"]
ORDERS = ["forward", "reverse", "random", "priority", "laggard"]

pytestmark = pytest.mark.skipif(emulator.compiler() is None, reason="a C++ compiler is needed")


def build_program(sanitize: str) -> Path:
    builder = Builder(sanitize)
    jobs = [(builder.compile, source) for source in (*SOURCES, SELFTEST / "main.cpp")]
    return builder.link([*in_parallel(jobs), *runtime_objects()], "selftest", shared=False)


@pytest.fixture(scope="module")
def programs() -> dict[str, Path]:
    """The self-tests as programs, by sanitizers."""
    return {sanitize: build_program(sanitize) for sanitize in BUILDS}


def execute(program: Path, name: str, defect: int, **schedule: object) -> tuple[int, str, str]:
    """Status, output words and messages of one run; schedule: order, seed, resident, async_."""
    names = {key.rstrip("_").upper(): str(value) for key, value in schedule.items()}
    environment = {f"FOMOE_EMULATOR_{key}": value for key, value in names.items()}
    options = {"ASAN_OPTIONS": "detect_leaks=0", "TSAN_OPTIONS": "halt_on_error=1"}
    result = subprocess.run(
        [program, name, str(defect), str(len(expected(name)))],
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
        timeout=120,
        env={**os.environ, **options, **environment},
    )
    return result.returncode, result.stdout, result.stderr


NAMES = [
    "neighbours",
    "histogram",
    "warp_words",
    "named_barriers",
    "async_copies",
    "bulk_ring",
    "spoken_for",
    "chain",
    "wide_words",
    "matrices_bf16",
    "matrices_f16",
    "stored_matrices",
    "uniform_words",
    "approximations",
    "copy_arrivals",
    "tensor_boxes",
    "cluster_words",
    "multicast",
    *PRODUCTS,
]
SINCE_SM90 = ["bulk_ring", "spoken_for", "stored_matrices", "copy_arrivals", "tensor_boxes"]
SINCE_SM90 += ["cluster_words"]


def words_of(stdout: str) -> np.ndarray:
    return np.array([int(word, 16) for word in stdout.split()], dtype=np.uint32)


@pytest.mark.parametrize("name", NAMES)
def test_emulated_selftest_is_right_in_every_schedule(programs, name):
    arrivals = ["early", "late", "random"]
    for order, async_, seed in product(ORDERS, arrivals, range(3)):
        schedule = {"order": order, "async_": async_, "seed": seed, "resident": 1 + seed}
        status, stdout, stderr = execute(programs["undefined"], name, 0, **schedule)
        assert status == 0, stderr
        assert np.array_equal(words_of(stdout), expected(name)), schedule
    for sanitize, order in product(BUILDS[1:], ("random", "priority", "laggard")):
        status, _, stderr = execute(programs[sanitize], name, 0, order=order, resident=4)
        assert status == 0, stderr


# name, planted bug, the build that finds it, its message. None: wrong output, or any error.
DEFECTS = [
    ("neighbours", 1, "thread", "data race"),  # no barrier
    ("neighbours", 1, "undefined", None),
    ("neighbours", 2, "undefined", "__syncthreads in divergent code"),
    ("neighbours", 3, "address,undefined", "heap-buffer-overflow|out of bounds"),
    ("histogram", 1, "thread", "data race"),  # a plain add for an atomic one
    ("warp_words", 1, "undefined", "the calling lane .* is not in its mask"),
    ("warp_words", 2, "undefined", "divergent code|overlaps"),
    ("warp_words", 3, "undefined", None),  # lanes that have left take no part
    ("named_barriers", 1, "thread", "data race"),
    ("named_barriers", 2, "undefined", "others came for|deadlock"),
    ("async_copies", 1, "undefined", None),  # waits for one group too few
    ("async_copies", 2, "thread", "data race"),  # a stage is written while it is read
    ("async_copies", 3, "undefined", "not aligned to 16"),
    ("async_copies", 4, "undefined", "cp.async of thread .* in flight"),
    ("bulk_ring", 1, "undefined", None),  # expects half the bytes
    ("bulk_ring", 2, "undefined", "livelock|deadlock"),  # expects twice the bytes
    ("bulk_ring", 3, "undefined", None),  # no fence.proxy.async
    ("bulk_ring", 4, "undefined", "bulk stores of thread 0"),
    ("bulk_ring", 5, "undefined", None),  # overwrites what a store has not read
    ("bulk_ring", 6, "undefined", None),  # waits for the wrong parity
    ("bulk_ring", 7, "undefined", "no mbarrier at"),  # used before it is initialised
    ("bulk_ring", 8, "undefined", "ends with an mbarrier that expects 512 more bytes"),
    # One lane signals for its warp before the other lanes have read.
    ("spoken_for", 1, "undefined", "has missed the end of its phase"),
    ("spoken_for", 1, "thread", "data race"),
    ("chain", 1, "thread", "data race"),  # ordinary loads and stores for ordered ones
    ("chain", 2, "undefined", "livelock|deadlock"),  # expects blocks to start in order
    ("matrices_bf16", 1, "thread", "data race"),  # read before others have written
    ("matrices_bf16", 2, "undefined", "deadlock|divergent code"),
    ("matrices_bf16", 3, "undefined", "ldmatrix: row at .* is not aligned to 16"),
    ("stored_matrices", 1, "thread", "data race"),  # read before others have written
    ("stored_matrices", 1, "undefined", None),
    ("stored_matrices", 2, "undefined", "stmatrix in divergent code"),
    ("stored_matrices", 3, "undefined", "stmatrix: row at .* is not aligned to 16"),
    ("stored_matrices", 4, "undefined", None),  # wrong rows
    ("stored_matrices", 4, "thread", "data race"),
    ("stored_matrices", 5, "undefined", "stmatrix: 16 bytes at .* are not within one array"),
    ("stored_matrices", 6, "undefined", "in divergent code: other lanes are at a"),
    ("uniform_words", 1, "undefined", "warp_uniform: lanes differ: [13] here, [02] in the first"),
    ("uniform_words", 2, "undefined", "in divergent code: other lanes are at a"),
    ("uniform_words", 3, "address,undefined", "prefetch.global.L2: byte 0 of 1 .* not be touched"),
    ("uniform_words", 4, "undefined", "prefetch.global.L2: .* is in shared memory"),
    ("approximations", 1, "undefined", None),  # denormals as they are
    ("approximations", 2, "undefined", None),
    ("approximations", 3, "undefined", None),
    ("copy_arrivals", 1, "undefined", None),  # arrivals before the copies are issued
    ("copy_arrivals", 1, "thread", "data race"),
    ("copy_arrivals", 2, "undefined", "arrive.noinc: more arrivals than its count 31"),
    ("copy_arrivals", 3, "undefined", "livelock|deadlock"),  # one lane does not arrive
    ("copy_arrivals", 4, "undefined", "more arrivals than its count 32"),  # ... to a full stage
    ("copy_arrivals", 4, "thread", "data race"),
    (
        "copy_arrivals",
        5,
        "thread",
        "data race",
    ),  # an ordinary store, which the arrival does not order
    ("copy_arrivals", 6, "undefined", "ends with cp.async of thread .* in flight"),
    ("tensor_boxes", 1, "undefined", "not aligned to 1024"),
    (
        "tensor_boxes",
        2,
        "undefined",
        "ends with .* (in flight|more bytes)",
    ),  # expects too few bytes
    ("tensor_boxes", 3, "undefined", None),  # does not wait
    ("tensor_boxes", 3, "thread", "data race"),
    ("tensor_boxes", 4, "address,undefined", "cp.async.bulk.tensor: byte .* may not be touched"),
    ("tensor_boxes", 5, "undefined", "is not a tensor map"),
    (
        "tensor_boxes",
        6,
        "undefined",
        "coordinate 0 must be a multiple of",
    ),
    ("tensor_boxes", 7, "undefined", "1048576 bytes in one phase, at most 1048575 can be counted"),
    ("cluster_words", 1, "thread", "data race"),  # no barrier
    ("cluster_words", 1, "undefined", None),
    ("cluster_words", 2, "undefined", "ld.shared::cluster: block .* has ended before"),
    ("cluster_words", 3, "undefined", "mapa: block 2 of the cluster, which has 2"),
    ("cluster_words", 4, "undefined", "barrier.cluster.*divergent code|deadlock"),
    ("cluster_words", 5, "undefined", "arrive: this thread has arrived before and not waited"),
    ("cluster_words", 6, "undefined", "barrier.cluster.wait: this thread has not arrived"),
    ("cluster_words", 7, "undefined", None),  # half of the words are not there
    ("cluster_words", 8, "undefined", "a thread leaves its kernel between arrival and wait"),
    ("multicast", 1, "undefined", "multicast::cluster: block 2 of the cluster, which has 2"),
    ("multicast", 2, "undefined", None),  # expects its own half alone
    ("multicast", 3, "undefined", "livelock|deadlock"),  # expects a half too many
    ("multicast", 4, "undefined", None),  # a stage that the partner still reads
    ("multicast", 4, "thread", "data race"),
    ("multicast", 5, "undefined", "no mbarrier at"),  # the partner has not initialised its own
    ("multicast", 6, "undefined", "that reaches its shared memory .*arrive.*, perhaps later"),
    ("multicast", 6, "undefined", "arrive.*: block .* of the cluster has ended before"),
    ("multicast", 7, "undefined", None),  # arrives at its own
    ("multicast", 8, "undefined", None),  # arrives twice
    ("multicast", 9, "undefined", "livelock|deadlock"),  # its half to itself alone
    ("multicast", 10, "undefined", "rows of 3 blocks are not whole clusters of 2"),
    ("stored_bf16_64", 1, "undefined", None),  # no fence.proxy.async
    ("stored_bf16_64", 2, "undefined", None),  # the fence comes before cp.async has arrived
    ("stored_bf16_64", 3, "undefined", None),  # the fence comes before ordinary stores
    ("gathered", 1, "undefined", None),  # no fence.proxy.async
    ("gathered", 2, "undefined", None),  # the fence comes before the wait
    ("gathered", 3, "undefined", None),  # one fence is by the thread that issued the copies
    ("gathered", 4, "undefined", None),  # arrivals before the copies are issued
    ("gathered", 4, "thread", "data race"),
    ("gathered", 5, "undefined", "livelock|deadlock"),  # one thread does not arrive
    ("gathered", 6, "undefined", "arrive.noinc: more arrivals than its count 129"),
    ("gathered", 7, "undefined", "more arrivals than its count 128"),  # the loads are not counted
    ("gathered", 8, "undefined", None),  # expects too few bytes
    ("gathered", 9, "undefined", "ends with cp.async of thread .* in flight"),  # nobody waits
    ("gemm_kn", 1, "undefined", "no wgmma.fence since"),
    ("gemm_kn", 2, "undefined", "ends with wgmma of warpgroup 1 in flight"),  # no wait
    ("gemm_kn", 3, "thread", "data race"),  # a stage is free before its products are done
    ("gemm_kn", 3, "undefined", None),
    ("gemm_kn", 4, "undefined", "not aligned to 1024"),  # steps of K twice too far
    ("gemm_kn", 5, "undefined", "outside of dynamic shared memory"),  # twice the stride
    ("gemm_kn", 6, "undefined", None),  # a wrong leading offset
    ("gemm_kn", 7, "undefined", "livelock|deadlock"),  # waits for the wrong parity
    ("gemm_kn", 8, "undefined", None),  # expects too few bytes
    ("gemm_kn", 9, "undefined", "not aligned to 1024"),
    ("gemm_kn", 10, "undefined", None),  # the wrong operand is transposed
    ("gemm_kn", 11, "undefined", "descriptors differ inside the warpgroup"),
    ("gemm_kn", 12, "undefined", "outside of dynamic shared memory"),
    ("gemm_kn", 13, "undefined", "wgmma.wait_group in divergent code|deadlock"),
    ("gemm_kn", 14, "undefined", "ends with wgmma of warpgroup 1 in flight"),  # no commit
    ("gemm_kn", 15, "undefined", None),  # every step starts from zero
    ("gemm_kn", 16, "undefined", None),  # one thread waits for all
    ("gemm_kn", 16, "thread", "data race"),
    ("gemm_kn", 17, "undefined", "ends with setmaxnreg.dec .* to which 32 threads came"),
    ("gemm_kn", 18, "undefined", "deadlock"),  # half a warpgroup waits once more
    ("gemm_kn", 19, "undefined", "`accumulate` differs inside the warpgroup"),
    ("gemm_kn", 20, "undefined", "others in the warpgroup have other accumulators"),
]


@pytest.mark.parametrize("name, defect, sanitize, message", DEFECTS)
def test_emulated_defect_is_caught(programs, name, defect, sanitize, message):
    schedules = [
        {"order": order, "async": async_, "seed": seed, "resident": 2}
        for order, async_, seed in product(ORDERS, ("late", "early"), range(2))
    ]
    found = []
    for schedule in schedules:
        status, stdout, stderr = execute(programs[sanitize], name, defect, **schedule)
        wrong = status != 0 or not np.array_equal(words_of(stdout), expected(name))
        if wrong and message is None:
            return
        if wrong and re.search(message, stderr):
            return
        found.append(f"{schedule}: status {status}, {'wrong' if wrong else 'right'}\n{stderr}")
    pytest.fail("\n".join(found))


@pytest.mark.parametrize("defect", [1, 2, 3])
def test_emulated_copies_need_a_fence_of_who_waited(programs, defect):
    """In every schedule, also where the copies have arrived before the fence."""
    arrivals = ["early", "late", "random"]
    for order, async_, seed in product(ORDERS, arrivals, range(2)):
        schedule = {"order": order, "async_": async_, "seed": seed, "resident": 1}
        status, stdout, stderr = execute(programs["undefined"], "gathered", defect, **schedule)
        assert status == 0, stderr
        values = words_of(stdout).view(np.float32)
        assert np.isnan(values).any(), schedule


def test_emulated_blocks_of_a_cluster_end_together(programs):
    """In every schedule, also where the last access comes before the block's end by chance."""
    arrivals, said = ["early", "late", "random"], set()
    for order, async_, seed in product(ORDERS, arrivals, range(4)):
        schedule = {"order": order, "async_": async_, "seed": seed, "resident": 1 + seed}
        status, _, stderr = execute(programs["undefined"], "multicast", 6, **schedule)
        found = re.search("that reaches its shared memory|has ended before", stderr)
        assert status != 0 and found, schedule
        said.add(found[0])
    assert len(said) == 2


# ---- errors --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    """The self-tests as a library in this process, its fibers switched by ucontext."""
    builder = Builder()
    sources = sorted((emulator.HERE / "runtime").glob("*.cpp"))
    portable = ("FOMOE_EMULATOR_UCONTEXT",)
    jobs = [(builder.compile_plain, source, portable) for source in sources]
    objects = in_parallel([*jobs, *((builder.compile, source) for source in SOURCES)])
    loaded = ctypes.CDLL(str(builder.link(objects, "libselftest", shared=True)))
    loaded.fomoe_emulator_last_error.restype = ctypes.c_char_p
    return loaded


def call(library: ctypes.CDLL, name: str, defect: int) -> tuple[int, np.ndarray]:
    # Aligned as device memory is.
    memory = np.zeros(1024 + OUT_WORDS + 64, np.uint32)
    start = -memory.ctypes.data % 256 // 4
    inputs, outputs = np.split(memory[start : start + 1024 + OUT_WORDS], [1024])
    inputs[:] = INPUT
    address = lambda array: ctypes.c_void_p(array.ctypes.data)
    error = library.fomoe_selftest(name.encode(), defect, address(inputs), address(outputs))
    return error, outputs[: len(expected(name))]


def test_emulated_error_is_returned_not_fatal(library, monkeypatch, capfd):
    """A failed launch names place, thread and how to reproduce it; the next launch works."""
    monkeypatch.setenv("FOMOE_EMULATOR_SEED", "7")
    error, _ = call(library, "neighbours", 2)
    assert error == 719
    text = library.fomoe_emulator_last_error().decode()
    assert "selftest.cu:" in text and "thread (" in text and "FOMOE_EMULATOR_SEED=7" in text
    assert text in capfd.readouterr().err
    for name in NAMES:
        error, outputs = call(library, name, 0)
        assert error == 0, library.fomoe_emulator_last_error()
        assert np.array_equal(outputs, expected(name))


@pytest.mark.parametrize(
    "variable, value, message",
    [
        ("ORDER", "sideways", "one of forward, reverse, random, priority, laggard, got 'sideways'"),
        ("SEED", "x", "a number of at least 0, got 'x'"),
        ("RESIDENT", "0", "a number of at least 1, got '0'"),
        ("ASYNC", "", "one of early, late, random, got ''"),
    ],
)
def test_emulated_schedule_that_does_not_exist(library, monkeypatch, variable, value, message):
    monkeypatch.setenv(f"FOMOE_EMULATOR_{variable}", value)
    error, _ = call(library, "neighbours", 0)
    assert error == 9
    assert (
        f"FOMOE_EMULATOR_{variable} must be {message}"
        in library.fomoe_emulator_last_error().decode()
    )


MAP = {"dtype": 1, "sizes": (64, 8, 2), "strides": (128, 1024), "box": (64, 8, 1), "shift": 0}


@pytest.mark.parametrize(
    "change, fault",
    [
        ({}, None),
        ({"dtype": 2}, None),
        ({"dtype": 0}, "dtype must be bf16 or f16"),
        ({"shift": 8}, "base must be a multiple of 16"),
        ({"shift": 16}, None),
        ({"sizes": (64, 0, 2)}, "sizes must be in 1 .. 2^32"),
        ({"sizes": (2**32, 8, 2), "strides": (2**33, 2**36)}, None),
        ({"sizes": (64, 2**32 + 1, 2)}, "sizes must be in 1 .. 2^32"),
        ({"sizes": (60, 8, 2)}, "sizes[0] must be a multiple of 16 bytes"),
        ({"strides": (120, 1024)}, "strides must be positive multiples of 16 below 2^40"),
        ({"strides": (128, 2**40)}, "strides must be positive multiples of 16 below 2^40"),
        ({"strides": (0, 1024)}, "strides must be positive multiples of 16 below 2^40"),
        ({"strides": (-128, 1024)}, "strides must be positive multiples of 16 below 2^40"),
        ({"strides": (112, 1024)}, "strides[0] must be at least a row"),
        ({"strides": (128, 1040)}, "strides[1] must be a multiple of strides[0]"),
        ({"strides": (128, 896)}, "strides[1] must be at least a plane"),
        ({"strides": (160, 1440)}, None),  # padding after rows and planes
        ({"box": (64, 256, 256)}, None),
        ({"box": (64, 257, 1)}, "box must be in 1 .. 256"),
        ({"box": (64, 8, 0)}, "box must be in 1 .. 256"),
        ({"box": (32, 8, 1)}, "box[0] must be 64"),
    ],
)
def test_emulated_tensor_maps_are_refused_by_name(library, change, fault):
    error, said = map_fault(library, **{**MAP, **change})
    assert said == fault
    assert error == (0 if fault is None else 1)


def map_fault(
    library: ctypes.CDLL,
    dtype: int,
    sizes: Sequence[int],
    strides: Sequence[int],
    box: Sequence[int],
    shift: int,
) -> tuple[int, str | None]:
    """The status and error message of make_tensor_map."""
    base = ctypes.c_void_p((1 << 20) + shift)
    sizes, strides = (ctypes.c_int64 * 3)(*sizes), (ctypes.c_int64 * 2)(*strides)
    error = ctypes.c_int()
    library.fomoe_selftest_map.restype = ctypes.c_char_p
    said = library.fomoe_selftest_map(
        dtype, base, sizes, strides, (ctypes.c_int * 3)(*box), ctypes.byref(error)
    )
    return error.value, None if said is None else said.decode()


# ---- the hardware --------------------------------------------------------------------------------


def nvcc() -> str:
    found = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    if found is None:
        pytest.skip("nvcc is needed")
    return found


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a", "sm_120"])
def test_emulated_selftest_is_cuda_too(tmp_path, arch):
    """The twins' other halves: every PTX wrapper is known to the assembler."""
    flags = ["-std=c++20", "-O3", f"-arch={arch}", "-cubin", "-Werror", "all-warnings"]
    for source in SOURCES:
        run([nvcc(), *flags, source, "-o", tmp_path / f"{source.stem}.cubin"])


@pytest.mark.parametrize("source", SOURCES[1:], ids=lambda source: source.stem)
def test_products_and_boxes_are_hopper_instructions(tmp_path, source):
    """Without spills, and without wgmma that the assembler serialised."""
    cubin = tmp_path / f"{source.stem}.cubin"
    command = [nvcc(), "-std=c++20", "-O3", "-arch=sm_90a", "-cubin", "-Xptxas=-v", source]
    said = subprocess.run([*command, "-o", cubin], capture_output=True, text=True, check=True)
    assert re.search(r"serializ|[1-9]\d* bytes (stack|spill)|ignored", said.stderr) is None
    try:
        codes = cuda_resources.machine_code(cubin)
    except cuda_resources.ToolMissing as missing:
        pytest.skip(str(missing))
    for (kernel, _), code in codes.items():
        if kernel.startswith(("gemm", "stored", "gathered")):
            assert code.has(r"^HGMMA\.64x(64|128|256)x16\.F32") and code.has(r"^WARPGROUP"), kernel
        if kernel.startswith(("gemm", "tensor", "gathered")):
            assert code.has(r"^UTMALDG\.3D"), kernel
        if kernel.startswith("multicast"):
            assert code.has(r"^UTMALDG\.3D\.MULTICAST"), kernel
            # An arrival in another block waits for no store; the barrier at start and end does.
            assert code.total(r"^MEMBAR\.ALL\.GPU") == code.total("^UCGABAR_ARV") == 2, kernel
            assert code.total("^UCGABAR_WAIT") == 2, kernel
        if kernel.startswith(("copy_arrivals", "gathered<0, 0", "gathered<0, 1")):
            assert code.has(r"^ARRIVES\.LDGSTSBAR"), kernel
    products = [kernel for kernel, _ in codes if kernel.startswith(("gemm", "gathered"))]
    assert len(products) == {"warpgroup": 4, "arrivals": 3, "clusters": 0}[source.stem]


@pytest.mark.parametrize("name", NAMES)
def test_twins_write_what_the_hardware_writes(tmp_path_factory, name):
    """Bit for bit, wherever there is a GPU (of sm_90 for bulk copies) and nvcc."""
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    major, minor = torch.cuda.get_device_capability()
    if name in SINCE_SM90 and major < 9:
        pytest.skip("mbarriers, bulk copies and stmatrix are from sm_90 on")
    if name in [*PRODUCTS, "multicast"] and (major, minor) != (9, 0):
        pytest.skip("products of warpgroups and loads to several blocks are for sm_90")
    library_path = tmp_path_factory.getbasetemp() / "selftest-cuda.so"
    if not library_path.exists():
        arch = f"sm_{major}{minor}" + ("a" if (major, minor) == (9, 0) else "")
        flags = ["-std=c++20", "-O3", f"-arch={arch}", "-shared", "-Xcompiler", "-fPIC"]
        run([nvcc(), *flags, *SOURCES, "-o", library_path])
    hardware = ctypes.CDLL(str(library_path))
    inputs = torch.from_numpy(INPUT.view(np.int32).copy()).cuda()
    outputs = torch.zeros(OUT_WORDS, dtype=torch.int32, device="cuda")
    torch.cuda.synchronize()
    pointer = lambda tensor: ctypes.c_void_p(tensor.data_ptr())
    assert hardware.fomoe_selftest(name.encode(), 0, pointer(inputs), pointer(outputs)) == 0
    torch.cuda.synchronize()
    words = outputs.cpu().numpy().view(np.uint32)[: len(expected(name))]
    assert np.array_equal(words, expected(name))
