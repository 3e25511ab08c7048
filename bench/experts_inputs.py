"""Parameters of the chip and of the kernels for the prediction of the grouped GEMMs.

Inputs that are in no data sheet come from hardware counters of one H200 on 2026-11-29
(bench/results/h200-counters-2026-11-29.txt): OLMoE's six products at 16384 tokens, balanced.
"Deduced" means: the clocks that remain of those counted after the rest of the model is subtracted.
"""

from __future__ import annotations

from dataclasses import dataclass, field

DEPTH, PRODUCT_ROWS, PRODUCT_SUM, BAND = 64, 64, 16, 8  # warp_specialized_shape.cuh, scheduler.cuh
STRIP_ROWS, STRIP_COLUMNS = 16, 64  # window.cuh
CONSUMERS, GROUP_WARPS = 2, 4
STAGING_BYTES, BARRIER_BYTES = STRIP_ROWS * (STRIP_COLUMNS * 2 + 16), 4 << 10  # of a warp's window


@dataclass(frozen=True)
class Chip:
    """An H200 in SXM form. Clocks and bytes are of a multiprocessor."""

    processors: int = 132
    flops_per_clock: int = 4096  # dense bf16
    shared_per_clock: int = 128
    shared_bytes: int = 227 << 10
    registers: int = 65536
    # Seen at 700 W: clocks counted over seconds in benchmarks (experts_model.py --counters). The
    # rate with the tensor cores idle, and by how much power grows when they are always busy: 1.70
    # to 1.79 GHz with them up to a fifth busy (331c15c's slow backward), 1.39 to 1.62 from half on.
    clock: float = 1.80e9
    power_of_tensor: float = 0.3
    copy: float = 4.25e12  # bytes read and written per second by an elementwise kernel
    # At 100 % of lts__throughput: bytes asked for over the percentage that they took, of what comes
    # by TMA (grouped_rows has nothing else) and, in the other products, of gathered rows.
    l2_per_clock: float = 82
    l2_gathered_per_clock: float = 60
    sheet_clock: float = 1.83e9  # at which the peak is the data sheet's 989.4 TFLOP/s

    @property
    def peak(self) -> float:
        return self.processors * self.flops_per_clock * self.sheet_clock

    def clock_at(self, tensor: float) -> float:
        """Clocks per second when the tensor cores are busy for this fraction of the time."""
        return self.clock / (1 + self.power_of_tensor * tensor)


# ---- what is known of the kernels ----------------------------------------------------------------


@dataclass(frozen=True)
class Epilogue:
    """What a warp does for a strip of 16 x 64 sums: `clocks` from first to last, `bytes` through
    shared memory, in and out, and `fetched` bytes of its code that the instruction cache has lost.
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
    """A state of csrc/cuda."""

    name: str
    # Slices are announced by the producer, as many behind as the ring has stages less two; else by
    # the copies themselves.
    announces_late: bool
    row_copy: float  # clocks in which a producer thread asks for 16 bytes of a gathered row
    step_copy: float  # the same where the rows are steps of the sum
    # Clocks of one load of indices; how many follow each other in a slice, and whether nothing else
    # is done meanwhile.
    index_clocks: float
    index_loads: int
    index_waits: bool
    epilogues: dict[tuple[str, int], Epilogue] = field(hash=False, compare=False)


STRIP_BYTES = 2 * STRIP_ROWS * STRIP_COLUMNS * 2
STORE = Epilogue(890, STRIP_BYTES)
BACKWARD_CODE = 14_700 // 4 * 16  # bytes of straight code for a strip; instructions have 16
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
CURRENT = SKETCH  # what csrc/cuda has; it was measured as a sketch

# From a free stage to products of what fills it, beside the filling: both barriers are waited for.
HANDSHAKE_CLOCKS = 200
# From a tile's last product to the next one's first, beside the epilogue.
TURN_CLOCKS = 1000
START_SECONDS = 4e-6  # launch, first slices on their way, last stores: of every kernel (assumed)
# What is gathered, by product: lines of A, or steps of the sum of A or B.
GATHERS = {
    "expand": "rows",
    "contract_backward": "rows",
    "expand_weight_grad": "B",
    "contract_weight_grad": "A",
}
