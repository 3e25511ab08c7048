"""Parameters of the GPU and the kernels, from which the times of the grouped GEMMs are predicted.

Those that are in no data sheet come from hardware counters of one H200 on 2026-11-29
(bench/results/h200-counters-2026-11-29.txt), for OLMoE's six GEMMs with 16384 tokens and balanced
routing. "Deduced" means: counted clocks minus those that the rest of the model explains.
"""

from __future__ import annotations

from dataclasses import dataclass, field

DEPTH, PRODUCT_ROWS, PRODUCT_SUM, BAND = 64, 64, 16, 8  # warp_specialized_shape.cuh, scheduler.cuh
STRIP_ROWS, STRIP_COLUMNS = 16, 64  # window.cuh
CONSUMERS, GROUP_WARPS = 2, 4
STAGING_BYTES, BARRIER_BYTES = STRIP_ROWS * (STRIP_COLUMNS * 2 + 16), 4 << 10  # of a warp's window


@dataclass(frozen=True)
class Chip:
    """An H200 SXM. Rates per clock are those of one multiprocessor."""

    processors: int = 132
    flops_per_clock: int = 4096  # dense bf16
    shared_per_clock: int = 128
    shared_bytes: int = 227 << 10
    registers: int = 65536
    # At 700 W, from counted clocks over seconds in benchmarks (experts_model.py --counters): the
    # clock with idle tensor cores, and how much more power they take when always busy. It was 1.70
    # to 1.79 GHz with them at most 20 % busy (backward of 331c15c), 1.39 to 1.62 from 50 % on.
    clock: float = 1.80e9
    power_of_tensor: float = 0.3
    copy: float = 4.25e12  # bytes read and written per second by an elementwise kernel
    # At 100 % of lts__throughput, extrapolated from requested bytes and the percentage they took:
    # by TMA (as in grouped_rows, which uses nothing else), and by gathering rows.
    l2_per_clock: float = 82
    l2_gathered_per_clock: float = 60
    sheet_clock: float = 1.83e9  # gives the data sheet's peak of 989.4 TFLOP/s

    @property
    def peak(self) -> float:
        return self.processors * self.flops_per_clock * self.sheet_clock

    def clock_at(self, tensor: float) -> float:
        """The clock when the tensor cores are busy for this fraction of the time."""
        return self.clock / (1 + self.power_of_tensor * tensor)


# ---- the kernels ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Epilogue:
    """A warp's work for a strip of 16 x 64 sums: `clocks` from start to end, `bytes` read from and
    written to shared memory, and `fetched` bytes of code that missed the instruction cache.
    """

    clocks: float
    bytes: int
    windows: int = 1  # of staging memory for a warp
    fetched: int = 0

    @property
    def total(self) -> float:
        return self.clocks + self.fetched / CODE_LINE * FETCH_CLOCKS


CODE_LINE = 128  # bytes, 8 instructions
# no_instruction stalls of contract_backward on 331c15c: 7.28 per instruction, 55,650 per tile, of
# 16 strips, each 3675 instructions long.
FETCH_CLOCKS = 55


@dataclass(frozen=True)
class Kernels:
    """A version of csrc/cuda."""

    name: str
    # Whether the producer signals a k-block only after it has requested stages - 2 later ones. Else
    # the copies signal their own arrival.
    announces_late: bool
    row_copy: float  # clocks in which a producer thread requests 16 bytes of a gathered row
    step_copy: float  # the same if the rows are gathered along k
    # Clocks of a load of row indices, the number of such loads in sequence per k-block, and whether
    # the producer waits for them.
    index_clocks: float
    index_loads: int
    index_waits: bool
    epilogues: dict[tuple[str, int], Epilogue] = field(hash=False, compare=False)


STRIP_BYTES = 2 * STRIP_ROWS * STRIP_COLUMNS * 2
STORE = Epilogue(890, STRIP_BYTES)
BACKWARD_CODE = 14_700 // 4 * 16  # bytes of unrolled code per strip; 16 per instruction
MAIN = Kernels(
    "main 331c15c",
    announces_late=True,
    row_copy=40,
    step_copy=165,
    index_clocks=300,
    index_loads=8,
    index_waits=True,
    epilogues={
        ("StoreRows", 1): STORE,
        ("StoreRows", 2): STORE,
        ("Activate", 1): Epilogue(3040, 2 * STRIP_BYTES),
        ("Activate", 2): Epilogue(2550, 3 * STRIP_BYTES // 2),
        ("ActivateOnly", 1): Epilogue(3040 - STORE.clocks, STRIP_BYTES),
        ("ActivateOnly", 2): Epilogue(2550 - STORE.clocks, STRIP_BYTES // 2),
        ("ActivateBackward", 1): Epilogue(11_400, 3 * STRIP_BYTES, 1, BACKWARD_CODE * 3 // 4),
        ("ActivateBackward", 2): Epilogue(15_600, 5 * STRIP_BYTES, 2, BACKWARD_CODE),
    },
)
SKETCH = Kernels(
    "sketch",
    announces_late=False,
    row_copy=75,
    step_copy=75,
    index_clocks=1000,
    index_loads=1,
    index_waits=False,
    epilogues={
        ("StoreRows", 1): STORE,
        ("StoreRows", 2): STORE,
        ("Activate", 1): Epilogue(2200, 2 * STRIP_BYTES),
        ("Activate", 2): Epilogue(1855, 3 * STRIP_BYTES // 2),
        ("ActivateOnly", 1): Epilogue(2200 - STORE.clocks, STRIP_BYTES),
        ("ActivateOnly", 2): Epilogue(1855 - STORE.clocks, STRIP_BYTES // 2),
        ("ActivateBackward", 1): Epilogue(6850, 3 * STRIP_BYTES),
        ("ActivateBackward", 2): Epilogue(9360, 5 * STRIP_BYTES, 2),
    },
)
KERNELS = {kernels.name: kernels for kernels in (MAIN, SKETCH)}
CURRENT = SKETCH  # csrc/cuda as it is now, which was measured as a sketch

# From the release of a stage to the products of its next k-block, without filling it: the waits at
# both barriers.
HANDSHAKE_CLOCKS = 200
# From the last product of a tile to the first of the next one, without the epilogue.
TURN_CLOCKS = 1000
START_SECONDS = 4e-6  # launch, first k-blocks under way, last stores of a kernel (assumed)
# What each GEMM gathers: rows of A, or A or B along k.
GATHERS = {
    "expand": "rows",
    "contract_backward": "rows",
    "expand_weight_grad": "B",
    "contract_weight_grad": "A",
}
