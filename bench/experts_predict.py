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
    """TILE_ROWS x `columns` sums. `sharing`: blocks of a cluster that receive one copy of B from L2
    where they multiply by the same.
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

    def slice_bytes(self) -> float:
        """That a block asks L2 for, for a slice: its own lines of A, and its part of B."""
        return (TILE_ROWS + self.columns / self.sharing) * DEPTH * 2

    def slice_cycles(
        self,
        chip: Chip,
        products: int = 2,
        gathers: str = "",
        kernels: Kernels = CURRENT,
    ) -> dict[str, float]:
        """Of one slice, by limit, when `products` x 64 rows of the tile are multiplied."""
        flops = 2 * products * PRODUCT_ROWS * self.columns * DEPTH
        tensor = flops / chip.flops_per_clock
        read = products * (DEPTH // PRODUCT_SUM) * (PRODUCT_ROWS + self.columns) * PRODUCT_SUM * 2
        gathered = {"": 0, "rows": TILE_ROWS, "A": TILE_ROWS, "B": self.columns}[gathers]
        gathered *= DEPTH * 2
        boxes = self.slice_bytes() - gathered
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
                # Slice k is announced after k + stages - 2 has been asked for, into the stage of
                # k - 2, which is given back when the products of k - 1 have been issued, and those
                # are issued as fast as the tensor cores take them: one after the other.
                cycles["ring"] = tensor + inputs.HANDSHAKE_CLOCKS + filling
        return cycles


# Those of warp_specialized.cuh, by name.
TILES = {
    tile["name"]: Tile(
        tile["name"], tile["kernel"], tile["columns"], 2 if tile["kernel"] == "paired" else 1
    )
    for tile in _C.expert_tiles()
    if tile["kernel"] != "multistage"
}


def can_make(tile: Tile, gemm: Gemm) -> bool:
    """Blocks cannot share a B that is gathered, as it is for gradients of weights."""
    return tile.kernel != "paired" or not gemm.makes_weights


def measured_tile(gemm: Gemm) -> Tile:
    """What every product ran with on 2026-11-29."""
    wide = gemm.columns >= 256 and (gemm.makes_weights or gemm.terms >= 256)
    wide = wide and gemm.verb != "contract_backward"
    return TILES["cooperative_256" if wide else "ping_pong_128"]


def chosen_tile(gemm: Gemm) -> Tile:
    """What the kernels run with on Hopper. FOMOE_EXPERTS_TILE overrides it, as it does theirs."""
    name = _C.expert_tile(gemm.verb, "bfloat16", gemm.columns, gemm.terms, True)
    if name not in TILES:
        raise SystemExit(f"FOMOE_EXPERTS_TILE must be one of {', '.join(TILES)}, got {name}")
    return TILES[name]


# ---- a kernel ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prediction:
    """Of one grouped GEMM; the factors multiply to `fraction`, but for start and memory."""

    gemm: Gemm
    tile: Tile
    limit: str  # of slice_cycles, or epilogue or memory
    main_loop: float  # tensor time over that of the main loops
    epilogue: float  # main loops over whole tiles
    rows: float  # existing rows over those multiplied
    columns: float
    waves: float  # mean work of a block over the most
    seconds: float
    fraction: float  # of the tensor cores' peak
    l2_bytes: float  # that main loops and epilogues ask L2 for
    l2: float  # of L2's rate, on average


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


def bands(row_tiles: int, column_tiles: int, height: int = BAND) -> Iterable[np.ndarray]:
    """Row tiles in the order of scheduler.cuh: within a band, down each column."""
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
    """What a product reads and writes beside its operands."""
    if gemm.makes_weights:
        return work.ELEMENT * len(load.groups) * gemm.columns * gemm.length
    lines = load.touched if gemm.name in GATHERS else load.rows
    residents = sum(1 for group in load.groups if group)
    return gemm.bytes - work.ELEMENT * (lines + residents * gemm.columns) * gemm.length


def predict(
    model: Model, gemm: Gemm, load: Load, tile: Tile, chip: Chip, kernels: Kernels = CURRENT
) -> Prediction:
    # Long: one step after the other, each with names of the steps before.
    # Gate and up columns are both sums; the result has half of the columns.
    epilogue = kernels.epilogues[gemm.epilogue, model.gates]
    gathers = GATHERS.get(gemm.name, "")
    if tile.sharing > 1:
        of_block, shares = pairs_of(gemm, load, tile)
        slices = np.full(len(of_block), -(-gemm.length // DEPTH))
    else:
        products, slices = items_of(gemm, load, tile)
        of_block, shares = products[:, None], np.ones(len(products), dtype=bool)
    products = of_block.max(1)  # blocks of a pair work in step
    alone_tile = replace(tile, sharing=1)
    cycles = {p: tile.slice_cycles(chip, p, gathers, kernels) for p in (1, 2)}
    cycles_alone = {p: alone_tile.slice_cycles(chip, p, gathers, kernels) for p in (1, 2)}
    of = lambda kind, cycles: np.array([0.0, *(kind(cycles[p]) for p in (1, 2))])
    longest = lambda limits: max(limits.values())
    loops = np.where(shares, of(longest, cycles)[products], of(longest, cycles_alone)[products])
    loops = loops * slices
    tensor = of(lambda c: c["tensor"], cycles)[of_block].mean(1) * slices
    strips = products * PRODUCT_ROWS // STRIP_ROWS * (tile.columns // STRIP_COLUMNS)
    if tile.kernel != "cooperative":
        alone = strips / GROUP_WARPS * epilogue.total
        shared_of = of(lambda c: c["shared"], cycles)
        shared = shared_of[products] * slices + strips * epilogue.bytes / chip.shared_per_clock
        times = np.maximum.reduce(
            [loops + inputs.TURN_CLOCKS, (loops + alone + inputs.TURN_CLOCKS) / 2, shared]
        )
    else:  # each warpgroup has a half of the rows, the first one always
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
    # A block without a tile asks for its half of B.
    asked = np.where(shares, tile.slice_bytes(), alone_tile.slice_bytes())
    asked = (asked * slices * tile.sharing).sum()
    l2_clocks = np.where(shares, cycles[2]["L2"], cycles_alone[2]["L2"]) * slices * tile.sharing
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
        l2_bytes=float(asked + beside),
        l2=float(l2_clocks / chip.processors / clock / seconds),
    )


def memory_wait(
    gemm: Gemm, load: Load, tile: Tile, products: np.ndarray, seconds: np.ndarray, chip: Chip
) -> float:
    """Seconds that experts' bytes take longer than their products, which are `seconds` per tile.

    Expert by expert, largest first: many rows of one do not hide the weights of one with few.
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
    """Of the six products of a layer, with the tiles that the kernels choose."""
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
    """Seconds of moe_experts and its FLOPs: products as predicted, the rest by its bytes."""
    load = work.expected_load(model, tokens, routing, parts)
    found = predictions(model, tokens, routing, chip, parts, kernels, choice, backward)
    known = {p.gemm.name: p.seconds for p in found}
    seconds, flops = 0.0, 0
    for kernel in work.experts_kernels(model, load, backward):
        flops += kernel.flops
        seconds += known.get(kernel.name) or kernel.bytes / chip.copy + inputs.START_SECONDS
    return seconds, flops
