"""Predicts how fast the grouped GEMMs can be on a Hopper GPU, from arithmetic alone.

    python bench/experts_model.py [--markdown] [--clock GHz] [--l2 TB/s] [--resources]

A prediction, not a measurement: it says which limit to expect and how much each costs. A tile's
main loop takes, for every slice of 64 terms of the sum, the longest of three times: products on the
tensor cores, bytes through shared memory (what wgmma reads, and the slice's arrival), bytes out of
L2. The epilogue hides behind the other warpgroup's main loop in ping-pong and is added when both
warpgroups share a tile. Tiles go to blocks as scheduler.cuh gives them out; the block with most
work ends last. A kernel takes no less than its bytes over the bandwidth of a copy.

Left out: requests that L2 answers once for several multiprocessors, latencies (the ring of stages
is deep enough), clocks that fall under load.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import expert_work as work
import numpy as np
from expert_work import TILE_ROWS, Gemm, Load, Model

from fomoe_ext import _C

DEPTH, PRODUCT_ROWS, PRODUCT_SUM, BAND = 64, 64, 16, 8  # warp_specialized.cuh, scheduler.cuh
STRIP_ROWS, STRIP_COLUMNS = 16, 64  # epilogue.cuh
CONSUMERS, GROUP_WARPS = 2, 4
STAGING_BYTES, BARRIER_BYTES = STRIP_ROWS * (STRIP_COLUMNS * 2 + 16), 4 << 10  # of a warp's window


@dataclass(frozen=True)
class Chip:
    """An H100 or H200 in SXM form."""

    processors: int = 132
    flops_per_clock: int = 4096  # of a multiprocessor, dense bf16
    shared_per_clock: int = 128  # bytes of a multiprocessor
    shared_bytes: int = 227 << 10
    registers: int = 65536
    # That at which processors x flops_per_clock make the data sheet's 989.4 TFLOP/s. Boost is 1.98;
    # at 700 W, dense products on random data have been seen at 1.4.
    clock: float = 1.83e9
    copy: float = 4.3e12  # bytes read and written per second on an H200, 4.8 nominal
    # Bytes per second out of L2, what DeepGEMM's choice of tiles assumes: the least certain figure.
    l2: float = 8e12

    @property
    def peak(self) -> float:
        return self.processors * self.flops_per_clock * self.clock

    @property
    def l2_per_clock(self) -> float:
        """Bytes for each multiprocessor."""
        return self.l2 / self.processors / self.clock


# ---- tiles ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tile:
    """TILE_ROWS x `columns` sums. `sharing`: blocks that receive one copy of B from L2 (multicast
    to a cluster; the kernels have none yet).
    """

    name: str
    kernel: str  # ping_pong or cooperative
    columns: int
    sharing: int = 1

    @property
    def stage_bytes(self) -> int:
        return (TILE_ROWS + self.columns) * DEPTH * 2

    def stages(self, chip: Chip, windows: int) -> int:
        staging = CONSUMERS * GROUP_WARPS * windows * STAGING_BYTES
        return (chip.shared_bytes - BARRIER_BYTES - staging) // self.stage_bytes

    def slice_cycles(self, chip: Chip, products: int = 2) -> dict[str, float]:
        """Of one slice, by limit, when `products` x 64 rows of the tile are multiplied."""
        flops = 2 * products * PRODUCT_ROWS * self.columns * DEPTH
        read = products * (DEPTH // PRODUCT_SUM) * (PRODUCT_ROWS + self.columns) * PRODUCT_SUM * 2
        from_l2 = (TILE_ROWS + self.columns / self.sharing) * DEPTH * 2
        return {
            "tensor": flops / chip.flops_per_clock,
            "shared": (read + self.stage_bytes) / chip.shared_per_clock,
            "L2": from_l2 / chip.l2_per_clock,
        }


@dataclass(frozen=True)
class Epilogue:
    """What a warp does for a strip of 16 x 64 sums. `instructions`: estimated from the machine code
    for sm_90a: those of the kernel without main loop and producer, over the 4 strips that it is
    unrolled to, of the alternatives of the activation one. `bytes`: through shared memory, in and
    out. `windows`: of staging memory for a warp.
    """

    instructions: int
    bytes: int
    windows: int = 1


STRIP_BYTES = 2 * STRIP_ROWS * STRIP_COLUMNS * 2
EPILOGUES = {  # by name and gates
    ("StoreRows", 1): Epilogue(400, STRIP_BYTES),
    ("StoreRows", 2): Epilogue(400, STRIP_BYTES),
    ("Activate", 1): Epilogue(1250, 2 * STRIP_BYTES),
    ("Activate", 2): Epilogue(1050, 3 * STRIP_BYTES // 2),
    ("ActivateBackward", 1): Epilogue(1740, 3 * STRIP_BYTES),
    ("ActivateBackward", 2): Epilogue(2380, 5 * STRIP_BYTES, windows=2),
}
ISSUE_RATE = 0.5  # instructions a clock that one warp alone gets out of its scheduler
START_SECONDS = 4e-6  # launch, first slices on their way, last stores: of every kernel

# Those of warp_specialized.cuh, by name.
TILES = {
    tile["name"]: Tile(tile["name"], tile["kernel"], tile["columns"])
    for tile in _C.expert_tiles()
    if tile["kernel"] != "multistage"
}


def chosen_tile(gemm: Gemm) -> Tile:
    """What the kernels run with on Hopper. FOMOE_EXPERTS_TILE overrides it, as it does theirs."""
    name = _C.expert_tile(gemm.verb, "bfloat16", gemm.columns, gemm.terms, True)
    if name not in TILES:
        raise SystemExit(f"FOMOE_EXPERTS_TILE: {name} is not modelled, only {', '.join(TILES)}")
    return TILES[name]


# ---- a kernel ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prediction:
    """Of one grouped GEMM; the factors multiply to `fraction`, but for start and memory."""

    gemm: Gemm
    tile: Tile
    limit: str  # tensor, shared, L2, epilogue or memory
    main_loop: float  # tensor time over that of the main loops
    epilogue: float  # main loops over whole tiles
    rows: float  # existing rows over those multiplied
    columns: float
    waves: float  # mean work of a block over the most
    seconds: float
    fraction: float  # of the tensor cores' peak


def items_of(gemm: Gemm, load: Load, tile: Tile) -> tuple[np.ndarray, np.ndarray]:
    """Of every tile in the order in which blocks take them: products of 64 rows, and slices."""
    columns = -(-gemm.columns // tile.columns)
    ranked = sorted(load.groups, reverse=True)
    if gemm.makes_weights:
        row_tiles = row_products(gemm.length)
        within = np.concatenate([row_tiles[band] for band in bands(len(row_tiles), columns)])
        slices = np.array([-(-group // DEPTH) for group in ranked])
        return np.tile(within, len(ranked)), np.repeat(slices, len(within))
    row_tiles = np.concatenate([row_products(group) for group in ranked])
    products = np.concatenate([row_tiles[band] for band in bands(len(row_tiles), columns)])
    return products, np.full(len(products), -(-gemm.length // DEPTH))


def row_products(rows: int) -> np.ndarray:
    """Of each row tile of so many rows: its products of 64 rows."""
    full, rest = divmod(rows, TILE_ROWS)
    last = [-(-rest // PRODUCT_ROWS)] if rest else []
    return np.array([TILE_ROWS // PRODUCT_ROWS] * full + last, dtype=np.int64)


def bands(row_tiles: int, column_tiles: int) -> Iterable[np.ndarray]:
    """Row tiles in the order of scheduler.cuh: within a band, down each column."""
    for first in range(0, row_tiles, BAND):
        yield np.tile(np.arange(first, min(first + BAND, row_tiles)), column_tiles)


def predict(model: Model, gemm: Gemm, load: Load, tile: Tile, chip: Chip) -> Prediction:
    # Gate and up columns are both sums; the result has half of the columns.
    products, slices = items_of(gemm, load, tile)
    epilogue = EPILOGUES[gemm.epilogue, model.gates]
    cycles = {p: tile.slice_cycles(chip, p) for p in (1, 2)}
    loop_of = np.array([0.0, *(max(cycles[p].values()) for p in (1, 2))])
    tensor_of = np.array([0.0, *(cycles[p]["tensor"] for p in (1, 2))])
    loops = loop_of[products] * slices
    tensor = tensor_of[products] * slices
    strips = products * PRODUCT_ROWS // STRIP_ROWS * (tile.columns // STRIP_COLUMNS)
    if tile.kernel == "ping_pong":
        alone = strips / GROUP_WARPS * epilogue.instructions / ISSUE_RATE
        shared_of = np.array([0.0, *(cycles[p]["shared"] for p in (1, 2))])
        shared = shared_of[products] * slices + strips * epilogue.bytes / chip.shared_per_clock
        times = np.maximum.reduce([loops, (loops + alone) / 2, shared])
    else:  # each warpgroup has a half of the rows, the first one always
        own = strips / np.maximum(products, 1) / GROUP_WARPS
        times = loops + own * epilogue.instructions / ISSUE_RATE
    blocks = np.zeros(-(-len(times) // chip.processors) * chip.processors)
    blocks[: len(times)] = times
    work_of_block = blocks.reshape(-1, chip.processors).sum(0)
    memory = gemm.bytes / chip.copy
    compute = work_of_block.max() / chip.clock
    seconds = max(compute, memory) + START_SECONDS
    limit = max(cycles[2], key=cycles[2].__getitem__)
    if times.sum() > 1.5 * loops.sum():
        limit = "epilogue"
    if memory > compute:
        limit = "memory"
    along = gemm.length if gemm.makes_weights else None
    groups = [along] if along else load.groups
    multiplied = sum(-(-group // PRODUCT_ROWS) * PRODUCT_ROWS for group in groups)
    whole = -(-gemm.columns // tile.columns) * tile.columns
    return Prediction(
        gemm,
        tile,
        limit,
        main_loop=tensor.sum() / loops.sum(),
        epilogue=loops.sum() / times.sum(),
        rows=sum(groups) / multiplied,
        columns=gemm.columns / whole,
        waves=work_of_block.mean() / work_of_block.max(),
        seconds=seconds,
        fraction=gemm.flops / seconds / chip.peak,
    )


@cache
def predictions(
    model: Model, tokens: int, routing: str, chip: Chip, parts: int = 1
) -> tuple[Prediction, ...]:
    """Of the six products of a layer, with the tiles that the kernels choose."""
    load = work.expected_load(model, tokens, routing, parts)
    gemms = work.gemms(model, load).values()
    return tuple(predict(model, gemm, load, chosen_tile(gemm), chip) for gemm in gemms)


def experts_seconds(
    model: Model, tokens: int, routing: str, chip: Chip, backward: bool, parts: int = 1
) -> tuple[float, int]:
    """Seconds of moe_experts and its FLOPs: products as predicted, the rest by its bytes."""
    load = work.expected_load(model, tokens, routing, parts)
    known = {p.gemm.name: p.seconds for p in predictions(model, tokens, routing, chip, parts)}
    seconds, flops = 0.0, 0
    for kernel in work.experts_kernels(model, load, backward):
        flops += kernel.flops
        seconds += known.get(kernel.name) or kernel.bytes / chip.copy + START_SECONDS
    return seconds, flops


# ---- tables --------------------------------------------------------------------------------------

Row = Sequence[str]


def table(title: str, head: Row, rows: Sequence[Row], markdown: bool) -> str:
    """A title and a table, in Markdown or with columns set out by blanks."""
    if markdown:
        lines = [head, ["---"] * len(head), *rows]
        text = "\n".join("| " + " | ".join(line) + " |" for line in lines)
        return f"**{title}**\n\n{text}\n"
    widths = [max(len(line[i]) for line in (head, *rows)) for i in range(len(head))]
    shown = ["  ".join(f"{cell:<{w}}" for cell, w in zip(line, widths, strict=True)).rstrip()
             for line in (head, *rows)]  # fmt: skip
    return "\n".join([title, *shown, ""])


def inputs_table(chip: Chip, markdown: bool) -> str:
    rows = [
        ("multiprocessors", f"{chip.processors}"),
        ("bf16 FLOP per clock and multiprocessor", f"{chip.flops_per_clock}"),
        (
            "clock",
            f"{chip.clock / 1e9:.2f} GHz (data sheet's rate; 1.98 boost, about 1.4 at 700 W)",
        ),
        ("peak of the tensor cores", f"{chip.peak / 1e12:.0f} TFLOP/s"),
        ("shared memory", f"{chip.shared_per_clock} bytes per clock, {chip.shared_bytes} bytes"),
        ("L2", f"{chip.l2 / 1e12:.1f} TB/s, {chip.l2_per_clock:.1f} bytes per clock for each"),
        ("copy", f"{chip.copy / 1e12:.1f} TB/s read and written (H200, 4.8 nominal)"),
        ("instructions per clock of a warp in its epilogue", f"{ISSUE_RATE} (assumed)"),
        ("start and end of a kernel", f"{START_SECONDS * 1e6:.0f} µs (assumed)"),
    ]
    for (name, gates), e in EPILOGUES.items():
        if name != "StoreRows" or gates == 1:
            gated = {1: "", 2: ", gated"}[gates] if name != "StoreRows" else ""
            said = f"about {e.instructions} instructions, {e.bytes} bytes of shared memory"
            rows.append((f"epilogue {name}{gated}, a strip of 16 x 64", said))
    return table("Inputs", ("what", "value"), rows, markdown)


OTHER_L2 = (5.5e12, 11e12)  # bytes per second: if it is less or more than assumed


def tiles_table(chip: Chip, markdown: bool) -> str:
    """Limits of a main loop: tiles that there are, and the same with B sent to two blocks."""

    def fraction_of(tile: Tile, chip: Chip) -> float:
        cycles = tile.slice_cycles(chip)
        return cycles["tensor"] / max(cycles.values())

    shared = [replace(t, name=f"{t.name}, B to two", sharing=2) for t in TILES.values()]
    rows = []
    for tile in (*TILES.values(), *shared):
        cycles = tile.slice_cycles(chip)
        fraction = fraction_of(tile, chip)
        rows.append(
            (
                tile.name,
                *(f"{cycles[name]:.0f}" for name in ("tensor", "shared", "L2")),
                max(cycles, key=cycles.__getitem__),
                f"{fraction:.2f}",
                f"{fraction * chip.peak / 1e12:.0f}",
                *(f"{fraction_of(tile, replace(chip, l2=l2)):.2f}" for l2 in OTHER_L2),
                f"{tile.stages(chip, 1)}",
            )
        )
    with_l2 = (f"of peak, L2 at {l2 / 1e12:g} TB/s" for l2 in OTHER_L2)
    head = ("tile", "tensor", "shared", "L2", "limit", "of peak", "TFLOP/s", *with_l2, "stages")
    return table("Main loop: clocks for a slice of 64 terms", head, rows, markdown)


def faster_tile(model: Model, load: Load, p: Prediction, chip: Chip) -> str:
    """A compiled tile that the model has faster by 3 % or more, and by how much."""
    others = [predict(model, p.gemm, load, tile, chip) for tile in TILES.values() if tile != p.tile]
    best = min(others, key=lambda other: other.seconds)
    gain = p.seconds / best.seconds
    return f"{best.tile.name} {gain:.2f}x" if gain >= 1.03 else "-"


def products_table(chip: Chip, tokens: int, routing: str, markdown: bool) -> str:
    rows = []
    for model in work.MODELS:
        load = work.expected_load(model, tokens, routing)
        for p in predictions(model, tokens, routing, chip):
            factors = (p.main_loop, p.epilogue, p.rows, p.columns, p.waves)
            floor = max(p.gemm.bytes / chip.copy, p.gemm.flops / chip.peak)
            rows.append(
                (
                    model.name,
                    p.gemm.name,
                    p.tile.name,
                    *(f"{factor:.2f}" for factor in factors),
                    p.limit,
                    f"{p.fraction:.2f}",
                    f"{p.fraction * chip.peak / 1e12:.0f}",
                    f"{p.seconds * 1e6:.0f}",
                    f"{floor * 1e6:.0f}",
                    faster_tile(model, load, p, chip),
                )
            )
    head = ("model", "product", "tile", "main loop", "epilogue", "rows", "columns", "waves")
    head += ("limit", "of peak", "TFLOP/s", "µs", "floor µs", "faster tile")
    title = f"Grouped products, {tokens} tokens, {routing} routing, all experts resident"
    return table(title, head, rows, markdown)


def fractions_table(chip: Chip, markdown: bool) -> str:
    """Of peak, of every product; the layer's experts; and the time of fewer residents."""
    rows, names = [], []
    for model in work.MODELS:
        for tokens in work.TOKENS:
            for routing in work.ROUTINGS:
                found = predictions(model, tokens, routing, chip)
                names = [p.gemm.name for p in found]
                forward, flops = experts_seconds(model, tokens, routing, chip, False)
                both, flops_of_both = experts_seconds(model, tokens, routing, chip, True)
                # Which of the popular experts are resident would decide it under Zipf.
                of_all = ["-", "-"]
                if routing == "balanced":
                    for i, parts in enumerate((2, 4)):
                        part, _ = experts_seconds(model, tokens, routing, chip, True, parts)
                        of_all[i] = f"{part / both:.2f}"
                rows.append(
                    (
                        model.name,
                        f"{tokens}",
                        routing,
                        f"{tokens * model.top_k // model.experts}",
                        *(f"{p.fraction:.2f}" for p in found),
                        f"{flops / forward / 1e12:.0f}",
                        f"{flops_of_both / both / 1e12:.0f}",
                        *of_all,
                    )
                )
    head = ("model", "tokens", "routing", "rows per expert", *names)
    head += ("forward TFLOP/s", "forward+backward TFLOP/s", "half / all", "quarter / all")
    title = "Fraction of the tensor cores' peak by product, and the experts of a layer"
    return table(title, head, rows, markdown)


def resources_table(markdown: bool) -> str:
    """Registers and warps of the warp-specialised kernels, from the built library, else from the
    committed budget.
    """
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
    import cuda_resources

    import fomoe_ext

    library = Path(fomoe_ext.__file__).parent / "libfomoe_cuda.so"
    if library.exists():
        budget = cuda_resources.table_of(cuda_resources.resources(library))
        source = "the built library"
    else:
        budget, source = cuda_resources.read_budget(), cuda_resources.BUDGET.name
    rows = []
    for kernel, row in budget.items():
        shape = re.match(r"warp_specialized<(.*), (\d+), (true|false)>$", kernel)
        if shape is None or "sm_90a" not in row:
            continue
        problem, columns, ping_pong = shape.groups()
        tile = TILES[f"{'ping_pong' if ping_pong == 'true' else 'cooperative'}_{columns}"]
        windows = 0 if "AddRows" in problem else 1
        windows += bool(re.search(r"ActivateBackward<\w+, true>", problem))
        stages = tile.stages(Chip(), windows)
        shared = stages * tile.stage_bytes + CONSUMERS * GROUP_WARPS * windows * STAGING_BYTES
        shared += row["shared"]
        threads = cuda_resources.threads_of(kernel)
        warps = cuda_resources.warps_per_multiprocessor(row["sm_90a"], shared, threads)
        rows.append((problem, tile.name, str(stages), str(shared), str(row["sm_90a"]), str(warps)))
    if not rows:
        return f"No warp-specialised kernel for sm_90a in {source}.\n"
    head = ("problem", "tile", "stages", "shared bytes", "registers at launch", "warps")
    return table(f"Resources on sm_90a, from {source}", head, rows, markdown)


def report(chip: Chip, markdown: bool) -> str:
    return "\n".join(
        [
            "Predicted by arithmetic, not measured.\n",
            inputs_table(chip, markdown),
            tiles_table(chip, markdown),
            products_table(chip, 16384, "balanced", markdown),
            fractions_table(chip, markdown),
        ]
    ).rstrip("\n")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--markdown", action="store_true", help="as docs/performance.md has it")
    parser.add_argument("--clock", type=float, default=Chip.clock / 1e9, help="in GHz")
    parser.add_argument("--l2", type=float, default=Chip.l2 / 1e12, help="out of L2, in TB/s")
    parser.add_argument(
        "--resources", action="store_true", help="registers and stages of the built kernels only"
    )
    arguments = parser.parse_args()
    if arguments.resources:
        print(resources_table(arguments.markdown))
        return 0
    if arguments.clock <= 0 or arguments.l2 <= 0:
        parser.error(f"--clock and --l2 must be positive, got {arguments.clock}, {arguments.l2}")
    print(report(Chip(clock=arguments.clock * 1e9, l2=arguments.l2 * 1e12), arguments.markdown))
    return 0


if __name__ == "__main__":
    sys.exit(main())
