"""The arithmetic of bench/experts_model.py: tiles, a kernel, the experts of a layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cache

import expert_work as work
import experts_inputs as inputs
import numpy as np
from expert_work import TILE_ROWS, Gemm, Load, Model
from experts_inputs import (
    BAND,
    BARRIER_BYTES,
    CONSUMERS,
    CURRENT,
    DEPTH,
    GATHERS,
    GROUP_WARPS,
    PRODUCT_ROWS,
    PRODUCT_SUM,
    STAGING_BYTES,
    STRIP_COLUMNS,
    STRIP_ROWS,
    Chip,
    Kernels,
)

from fomoe_ext import _C

# ---- tiles ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tile:
    """A tile of TILE_ROWS x `columns` sums. `sharing`: number of blocks of a cluster that receive
    the same copy of B from L2 (multicast), where they multiply by the same B.
    """

    name: str
    kernel: str  # ping_pong, cooperative or paired
    columns: int
    sharing: int = 1

    @property
    def stage_bytes(self) -> int:
        return (TILE_ROWS + self.columns) * DEPTH * 2

    def stages(self, chip: Chip, windows: int) -> int:
        staging = CONSUMERS * GROUP_WARPS * windows * STAGING_BYTES
        return (chip.shared_bytes - BARRIER_BYTES - staging) // self.stage_bytes

    def k_block_bytes(self) -> float:
        """Bytes that a block reads from L2 for a k-block: its rows of A, and its part of B."""
        return (TILE_ROWS + self.columns / self.sharing) * DEPTH * 2

    def k_block_clocks(
        self,
        chip: Chip,
        products: int = 2,
        gathers: str = "",
        kernels: Kernels = CURRENT,
    ) -> dict[str, float]:
        """Clocks per k-block, by what limits it, if `products` x 64 rows of the tile are used."""
        flops = 2 * products * PRODUCT_ROWS * self.columns * DEPTH
        tensor = flops / chip.flops_per_clock
        read = products * (DEPTH // PRODUCT_SUM) * (PRODUCT_ROWS + self.columns) * PRODUCT_SUM * 2
        gathered = {"": 0, "rows": TILE_ROWS, "A": TILE_ROWS, "B": self.columns}[gathers]
        gathered *= DEPTH * 2
        boxes = self.k_block_bytes() - gathered
        cycles = {
            "tensor": tensor,
            "shared": (read + gathered) / chip.shared_per_clock,
            "L2": boxes / chip.l2_per_clock + gathered / chip.l2_gathered_per_clock,
        }
        if gathers:
            copies = gathered / 16 / (GROUP_WARPS * 32)
            filling = copies * (kernels.row_copy if gathers == "rows" else kernels.step_copy)
            if gathers != "rows":
                index = kernels.index_loads * kernels.index_clocks
                filling = filling + index if kernels.index_waits else max(filling, index)
            cycles["producer"] = filling
            if kernels.announces_late:
                # K-block k is signalled after k + stages - 2 is requested. That goes into the stage
                # of k - 2, which is released when the products of k - 1 are issued. So filling,
                # handshake and products happen one after the other.
                cycles["ring"] = tensor + inputs.HANDSHAKE_CLOCKS + filling
        return cycles


# The tiles of warp_specialized.cuh, by name.
TILES = {
    tile["name"]: Tile(
        tile["name"], tile["kernel"], tile["columns"], 2 if tile["kernel"] == "paired" else 1
    )
    for tile in _C.expert_tiles()
    if tile["kernel"] != "multistage"
}


def supports(tile: Tile, gemm: Gemm) -> bool:
    """Whether a GEMM can use the tile. Blocks cannot share a B that is gathered, as in gradients of
    weights.
    """
    return tile.kernel != "paired" or not gemm.makes_weights


def measured_tile(gemm: Gemm) -> Tile:
    """The tile that a GEMM used in the measurements of 2026-11-29."""
    wide = gemm.columns >= 256 and (gemm.makes_weights or gemm.terms >= 256)
    wide = wide and gemm.verb != "contract_backward"
    return TILES["cooperative_256" if wide else "ping_pong_128"]


def chosen_tile(gemm: Gemm) -> Tile:
    """The tile that the kernels use on Hopper. FOMOE_EXPERTS_TILE overrides both."""
    name = _C.expert_tile(gemm.verb, "bfloat16", gemm.columns, gemm.terms, True)
    if name not in TILES:
        raise SystemExit(f"FOMOE_EXPERTS_TILE must be one of {', '.join(TILES)}, got {name}")
    return TILES[name]


# ---- a kernel ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prediction:
    """The time of one grouped GEMM. `fraction` is the product of the factors, but for the start of
    the kernel and waits for memory."""

    gemm: Gemm
    tile: Tile
    limit: str  # a key of k_block_clocks, or "epilogue" or "memory"
    main_loop: float  # time of the tensor cores over that of the main loops
    epilogue: float  # time of the main loops over that of the tiles
    rows: float  # existing rows over multiplied rows
    columns: float  # the same for columns
    waves: float  # mean work of a block over that of the busiest
    seconds: float
    fraction: float  # of the tensor cores' peak
    l2_bytes: float  # bytes that main loops and epilogues move from and to L2
    l2: float  # mean fraction of L2's bandwidth


def items_of(gemm: Gemm, load: Load, tile: Tile) -> tuple[np.ndarray, np.ndarray]:
    """For every tile, in the order of the scheduler: used products of 64 rows, and k-blocks."""
    columns = -(-gemm.columns // tile.columns)
    ranked = sorted(load.groups, reverse=True)
    if gemm.makes_weights:
        row_tiles = row_products(gemm.length)
        within = np.concatenate([row_tiles[band] for band in bands(len(row_tiles), columns)])
        k_blocks = np.array([-(-group // DEPTH) for group in ranked])
        return np.tile(within, len(ranked)), np.repeat(k_blocks, len(within))
    row_tiles = np.concatenate([row_products(group) for group in ranked])
    products = np.concatenate([row_tiles[band] for band in bands(len(row_tiles), columns)])
    return products, np.full(len(products), -(-gemm.length // DEPTH))


def row_products(rows: int) -> np.ndarray:
    """Number of products of 64 rows in each tile of a group of `rows` rows."""
    full, rest = divmod(rows, TILE_ROWS)
    last = [-(-rest // PRODUCT_ROWS)] if rest else []
    return np.array([TILE_ROWS // PRODUCT_ROWS] * full + last, dtype=np.int64)


def bands(row_tiles: int, column_tiles: int, height: int = BAND) -> Iterable[np.ndarray]:
    """Row tiles in the order of scheduler.cuh: band by band, and column by column within a band."""
    for first in range(0, row_tiles, height):
        yield np.tile(np.arange(first, min(first + height, row_tiles)), column_tiles)


def pairs_of(gemm: Gemm, load: Load, tile: Tile) -> tuple[np.ndarray, np.ndarray]:
    """As items_of, for pairs of blocks: the products of each [items, 2], and whether both multiply
    by the same B. A block without a tile has 0 products, and the B of the other.
    """
    tiles = [
        (p, i) for i, g in enumerate(sorted(load.groups, reverse=True)) for p in row_products(g)
    ]
    tiles += [(0, tiles[-1][1])] * (len(tiles) % 2)
    pairs = np.array(tiles, dtype=np.int64).reshape(-1, 2, 2)
    columns = -(-gemm.columns // tile.columns)
    order = np.concatenate(list(bands(len(pairs), columns, BAND // 2)))
    return pairs[order, :, 0], (pairs[:, 0, 1] == pairs[:, 1, 1])[order]


def epilogue_bytes(gemm: Gemm, load: Load) -> int:
    """Bytes that a GEMM reads and writes beside its operands."""
    if gemm.makes_weights:
        return work.ELEMENT * len(load.groups) * gemm.columns * gemm.length
    lines = load.touched if gemm.name in GATHERS else load.rows
    residents = sum(1 for group in load.groups if group)
    return gemm.bytes - work.ELEMENT * (lines + residents * gemm.columns) * gemm.length


def predict(
    model: Model, gemm: Gemm, load: Load, tile: Tile, chip: Chip, kernels: Kernels = CURRENT
) -> Prediction:
    # Long: one step after the other, each with names of the steps before.
    # The sums include gate and up columns; the result of a gated activation has half as many.
    epilogue = kernels.epilogues[gemm.epilogue, model.gates]
    gathers = GATHERS.get(gemm.name, "")
    if tile.sharing > 1:
        of_block, shares = pairs_of(gemm, load, tile)
        k_blocks = np.full(len(of_block), -(-gemm.length // DEPTH))
    else:
        products, k_blocks = items_of(gemm, load, tile)
        of_block, shares = products[:, None], np.ones(len(products), dtype=bool)
    products = of_block.max(1)  # the blocks of a pair work in lockstep
    single = replace(tile, sharing=1)
    cycles = {p: tile.k_block_clocks(chip, p, gathers, kernels) for p in (1, 2)}
    cycles_single = {p: single.k_block_clocks(chip, p, gathers, kernels) for p in (1, 2)}
    of = lambda kind, cycles: np.array([0.0, *(kind(cycles[p]) for p in (1, 2))])
    longest = lambda limits: max(limits.values())
    loops = np.where(shares, of(longest, cycles)[products], of(longest, cycles_single)[products])
    loops = loops * k_blocks
    tensor = of(lambda c: c["tensor"], cycles)[of_block].mean(1) * k_blocks
    strips = products * PRODUCT_ROWS // STRIP_ROWS * (tile.columns // STRIP_COLUMNS)
    if tile.kernel != "cooperative":
        alone = strips / GROUP_WARPS * epilogue.total
        shared_of = of(lambda c: c["shared"], cycles)
        shared = shared_of[products] * k_blocks + strips * epilogue.bytes / chip.shared_per_clock
        times = np.maximum.reduce(
            [loops + inputs.TURN_CLOCKS, (loops + alone + inputs.TURN_CLOCKS) / 2, shared]
        )
    else:  # each warpgroup has half of the rows; in a last tile the second may have none
        own = strips / np.maximum(products, 1) / GROUP_WARPS
        times = loops + own * epilogue.total + inputs.TURN_CLOCKS
    clusters = chip.processors // tile.sharing
    blocks = np.zeros(-(-len(times) // clusters) * clusters)
    blocks[: len(times)] = times
    work_of_block = blocks.reshape(-1, clusters).sum(0)
    busy = tensor.sum() / clusters / work_of_block.max()
    clock = chip.clock_at(busy)
    compute = work_of_block.max() / clock
    waiting = memory_wait(gemm, load, tile, products, times / chip.processors / clock, chip)
    seconds = compute + waiting + inputs.START_SECONDS
    limit = max(cycles[2], key=cycles[2].__getitem__)
    if times.sum() > 1.5 * loops.sum():
        limit = "epilogue"
    if waiting > compute:
        limit = "memory"
    along = gemm.length if gemm.makes_weights else None
    groups = [along] if along else load.groups
    multiplied = sum(-(-group // PRODUCT_ROWS) * PRODUCT_ROWS for group in groups)
    whole = -(-gemm.columns // tile.columns) * tile.columns
    # A block without a tile reads its half of B all the same.
    read = np.where(shares, tile.k_block_bytes(), single.k_block_bytes())
    read = (read * k_blocks * tile.sharing).sum()
    l2_clocks = np.where(shares, cycles[2]["L2"], cycles_single[2]["L2"]) * k_blocks * tile.sharing
    beside = epilogue_bytes(gemm, load)
    l2_clocks = l2_clocks.sum() + beside / chip.l2_per_clock
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
        l2_bytes=float(read + beside),
        l2=float(l2_clocks / chip.processors / clock / seconds),
    )


def memory_wait(
    gemm: Gemm, load: Load, tile: Tile, products: np.ndarray, seconds: np.ndarray, chip: Chip
) -> float:
    """By how many seconds loading takes longer than multiplying, summed over experts.

    `seconds`: of the products of each tile. Experts are processed one by one, largest first, so the
    products of one with many rows do not hide loading the weights of one with few.
    """
    ranked = sorted((group for group in load.groups if group or gemm.makes_weights), reverse=True)
    if gemm.makes_weights:
        of_group = seconds.reshape(len(ranked), -1).sum(1)
    else:
        of_products = {p: float(seconds[products == p][0]) for p in set(products.tolist())}
        of_products.setdefault(1, of_products.get(2, 0.0))  # beside a longer one
        columns = -(-gemm.columns // tile.columns)
        of_group = np.array(
            [columns * sum(of_products[p] for p in row_products(group)) for group in ranked]
        )
    weights = min(work.ELEMENT * gemm.columns * gemm.length, gemm.bytes / max(1, len(ranked)))
    rest = (gemm.bytes - weights * len(ranked)) / max(1, load.rows)
    moving = (weights + rest * np.array(ranked)) / chip.copy
    return float(np.maximum(moving - of_group, 0).sum())


Choice = Callable[[Gemm], Tile]


@cache
def predictions(
    model: Model,
    tokens: int,
    routing: str,
    chip: Chip,
    parts: int = 1,
    kernels: Kernels = CURRENT,
    choice: Choice = chosen_tile,
    training: bool = True,
) -> tuple[Prediction, ...]:
    """Predictions for the six grouped GEMMs of a layer, by default with the tiles in use."""
    load = work.expected_load(model, tokens, routing, parts)
    gemms = work.gemms(model, load, training).values()
    return tuple(predict(model, gemm, load, choice(gemm), chip, kernels) for gemm in gemms)


def experts_seconds(
    model: Model,
    tokens: int,
    routing: str,
    chip: Chip,
    backward: bool,
    parts: int = 1,
    kernels: Kernels = CURRENT,
    choice: Choice = chosen_tile,
) -> tuple[float, int]:
    """Seconds and FLOPs of moe_experts: GEMMs as predicted, other kernels by their bytes."""
    load = work.expected_load(model, tokens, routing, parts)
    found = predictions(model, tokens, routing, chip, parts, kernels, choice, backward)
    known = {p.gemm.name: p.seconds for p in found}
    seconds, flops = 0.0, 0
    for kernel in work.experts_kernels(model, load, backward):
        flops += kernel.flops
        seconds += known.get(kernel.name) or kernel.bytes / chip.copy + inputs.START_SECONDS
    return seconds, flops
