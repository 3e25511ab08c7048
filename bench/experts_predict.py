"""The arithmetic of bench/experts_model.py: tiles, a kernel, the experts of a layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
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
    """A tile of TILE_ROWS x `columns` sums. `sharing`: number of blocks that receive the same copy
    of B from L2 (multicast in a cluster; the kernels do not do that yet).
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
        boxes = (TILE_ROWS + self.columns / self.sharing) * DEPTH * 2 - gathered
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
    tile["name"]: Tile(tile["name"], tile["kernel"], tile["columns"])
    for tile in _C.expert_tiles()
    if tile["kernel"] != "multistage"
}


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


def bands(row_tiles: int, column_tiles: int) -> Iterable[np.ndarray]:
    """Row tiles in the order of scheduler.cuh: band by band, and column by column within a band."""
    for first in range(0, row_tiles, BAND):
        yield np.tile(np.arange(first, min(first + BAND, row_tiles)), column_tiles)


def predict(
    model: Model, gemm: Gemm, load: Load, tile: Tile, chip: Chip, kernels: Kernels = CURRENT
) -> Prediction:
    # The sums include gate and up columns; the result of a gated activation has half as many.
    products, k_blocks = items_of(gemm, load, tile)
    epilogue = kernels.epilogues[gemm.epilogue, model.gates]
    gathers = GATHERS.get(gemm.name, "")
    cycles = {p: tile.k_block_clocks(chip, p, gathers, kernels) for p in (1, 2)}
    loop_of = np.array([0.0, *(max(cycles[p].values()) for p in (1, 2))])
    tensor_of = np.array([0.0, *(cycles[p]["tensor"] for p in (1, 2))])
    loops = loop_of[products] * k_blocks
    tensor = tensor_of[products] * k_blocks
    strips = products * PRODUCT_ROWS // STRIP_ROWS * (tile.columns // STRIP_COLUMNS)
    if tile.kernel == "ping_pong":
        alone = strips / GROUP_WARPS * epilogue.total
        shared_of = np.array([0.0, *(cycles[p]["shared"] for p in (1, 2))])
        shared = shared_of[products] * k_blocks + strips * epilogue.bytes / chip.shared_per_clock
        times = np.maximum.reduce(
            [loops + inputs.TURN_CLOCKS, (loops + alone + inputs.TURN_CLOCKS) / 2, shared]
        )
    else:  # each warpgroup has half of the rows; in a last tile the second may have none
        own = strips / np.maximum(products, 1) / GROUP_WARPS
        times = loops + own * epilogue.total + inputs.TURN_CLOCKS
    blocks = np.zeros(-(-len(times) // chip.processors) * chip.processors)
    blocks[: len(times)] = times
    work_of_block = blocks.reshape(-1, chip.processors).sum(0)
    busy = tensor.sum() / chip.processors / work_of_block.max()
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
