"""The prediction of bench/experts_model.py: its arithmetic by hand, and the page that shows it."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))

import expert_work as work
import experts_model as model_of
from expert_work import Gemm, Load, Model
from experts_model import TILES, Chip
from test_bench_experts import ROOT, run_python

PING_PONG, COOPERATIVE = TILES["ping_pong_128"], TILES["cooperative_256"]
# Nothing but the tensor cores takes time.
FREE = Chip(shared_per_clock=10**9, l2=1e30, copy=1e30)


def gemm(columns: int, length: int, makes_weights: bool = False, rows: int = 1) -> Gemm:
    verb = "weight_grad" if makes_weights else "contract"
    flops = 2 * rows * columns * length
    return Gemm("some", flops, 0, verb, columns, length, "StoreRows", makes_weights)


def load_of(*groups: int) -> Load:
    return Load(sum(groups), sum(groups), groups, sum(groups))


@pytest.fixture
def free(monkeypatch):
    """Epilogues and launches take no time either."""
    monkeypatch.setattr(model_of, "START_SECONDS", 0.0)
    monkeypatch.setattr(model_of, "ISSUE_RATE", 1e12)


def test_constants_are_those_of_the_sources():
    source = "".join(
        (ROOT / "csrc" / name).read_text()
        for name in ("kernels.h", "cuda/warp_specialized.cuh", "cuda/scheduler.cuh",
                     "cuda/epilogue.cuh")
    )  # fmt: skip

    def constant(name: str) -> int:
        (value,) = re.findall(rf"\b{name} = ([\d <]+)[,;]", source)
        base, _, shift = value.partition("<<")
        return int(base) << int(shift or 0)

    for name, mine in {
        "kTileRows": work.TILE_ROWS,
        "kDepth": model_of.DEPTH,
        "kRowsOfProduct": model_of.PRODUCT_ROWS,
        "kSumOfProduct": model_of.PRODUCT_SUM,
        "kBand": model_of.BAND,
        "kStripRows": model_of.STRIP_ROWS,
        "kStripColumns": model_of.STRIP_COLUMNS,
        "kConsumers": model_of.CONSUMERS,
        "kSharedLimit": Chip.shared_bytes,
        "kBarrierBytes": model_of.BARRIER_BYTES,
    }.items():
        assert constant(name) == mine, name


def test_a_slice_by_hand():
    """Of 128 x 128 and 128 x 256 x 64 terms."""
    chip = replace(Chip(), l2=132 * Chip.clock * 32)  # 32 bytes a clock
    cycles = PING_PONG.slice_cycles(chip)
    assert cycles["tensor"] == 2 * 128 * 128 * 64 / 4096 == 512
    assert cycles["shared"] == (8 * (2048 + 4096) + 256 * 128) / 128 == 640
    assert cycles["L2"] == pytest.approx(256 * 128 / 32)
    cycles = COOPERATIVE.slice_cycles(chip)
    assert (cycles["tensor"], cycles["shared"]) == (1024, 1024)
    assert PING_PONG.slice_cycles(chip, products=1)["tensor"] == 256
    assert PING_PONG.slice_cycles(chip, products=1)["shared"] == (4 * 6144 + 32768) / 128
    shared = replace(PING_PONG, sharing=2)
    assert shared.slice_cycles(chip)["L2"] == pytest.approx((128 + 64) * 128 / 32)
    assert Chip().peak == pytest.approx(989.4e12, rel=1e-3)
    assert (PING_PONG.stages(chip, 1), COOPERATIVE.stages(chip, 1)) == (6, 4)
    assert (PING_PONG.stages(chip, 2), COOPERATIVE.stages(chip, 2)) == (5, 3)


def in_bands(item: int, row_tiles: int, column_tiles: int) -> tuple[int, int]:
    """As scheduler.cuh says it."""
    band = item // (8 * column_tiles)
    height = min(8, row_tiles - band * 8)
    within = item - band * 8 * column_tiles
    return band * 8 + within % height, within // height


def test_items_are_in_the_order_of_the_scheduler():
    load = load_of(70, 1300, 0, 128)  # by rows: 11, 1, 1 tiles; two of them with one product
    products, slices = model_of.items_of(gemm(300, 100), load, PING_PONG)
    of_rows = [2] * 10 + [1] + [2] + [2]
    assert [of_rows[in_bands(i, 13, 3)[0]] for i in range(39)] == products.tolist()
    assert set(slices) == {2}
    load = load_of(70, 1300, 0)
    products, slices = model_of.items_of(gemm(300, 192, makes_weights=True), load, PING_PONG)
    one = [[2, 1][in_bands(i, 2, 3)[0]] for i in range(6)]
    assert products.tolist() == 3 * one
    assert slices.tolist() == [21] * 6 + [2] * 6 + [0] * 6


def test_whole_tiles_reach_the_peak(free):
    load = load_of(*[128] * 132)
    found = model_of.predict(
        Model("any", 1024, 128, 132, 1), gemm(128, 1024, rows=128 * 132), load, PING_PONG, FREE
    )
    assert found.fraction == pytest.approx(1)
    assert found.seconds == pytest.approx(16 * 512 / Chip.clock)
    assert (found.rows, found.columns, found.waves, found.main_loop) == (1, 1, 1, 1)


def test_what_lowers_the_rate(free):
    model = Model("any", 1024, 128, 132, 1)

    def predict(groups: list[int], columns: int = 128, tile=PING_PONG, chip: Chip = FREE):
        rows = sum(groups)
        return model_of.predict(model, gemm(columns, 1024, rows=rows), load_of(*groups), tile, chip)

    one_more = predict([128] * 133)  # a second wave for one tile
    assert one_more.waves == pytest.approx(133 / 264)
    assert one_more.fraction == pytest.approx(133 / 264)
    half_rows = predict([32] * 132)
    assert half_rows.rows == 0.5 and half_rows.fraction == pytest.approx(0.5)
    half_columns = predict([128] * 132, columns=128, tile=COOPERATIVE)
    assert half_columns.columns == 0.5 and half_columns.fraction == pytest.approx(0.5)
    by_l2 = predict([128] * 132, chip=replace(FREE, l2=32 * 132 * FREE.clock))
    assert (by_l2.limit, by_l2.main_loop) == ("L2", pytest.approx(0.5))
    by_shared = predict([128] * 132, chip=replace(FREE, shared_per_clock=128))
    assert (by_shared.limit, by_shared.main_loop) == ("shared", pytest.approx(0.8, rel=0.01))


def test_memory_binds_what_moves_more_than_it_multiplies(free):
    model, chip = Model("any", 1024, 128, 132, 1), replace(FREE, copy=1e12)
    moving = replace(gemm(128, 1024, rows=128 * 132), bytes=10**9)
    found = model_of.predict(model, moving, load_of(*[128] * 132), PING_PONG, chip)
    assert (found.limit, found.seconds) == ("memory", pytest.approx(1e-3))


def test_epilogue_hides_in_ping_pong_only(monkeypatch):
    monkeypatch.setattr(model_of, "START_SECONDS", 0.0)
    model, load = Model("any", 1024, 128, 132, 1), load_of(*[128] * 132)
    issued = 4 * 400 / model_of.ISSUE_RATE  # strips of a warp, StoreRows

    def seconds(length: int, tile) -> float:
        some = gemm(256, length, rows=128 * 132)
        return model_of.predict(model, some, load, tile, FREE).seconds * FREE.clock

    assert seconds(1024, COOPERATIVE) == pytest.approx(16 * 1024 + issued)
    assert seconds(1024, PING_PONG) == pytest.approx(2 * 16 * 512)
    short = seconds(128, PING_PONG)  # main loops of 1024 clocks, the epilogue takes longer
    assert issued > 1024 and short == pytest.approx(2 * (1024 + issued) / 2)


def test_every_shape_is_predicted_below_its_floors():
    chip = Chip()
    for model in work.MODELS:
        for routing in work.ROUTINGS:
            for p in model_of.predictions(model, 4096, routing, chip):
                assert p.seconds > max(p.gemm.flops / chip.peak, p.gemm.bytes / chip.copy)
                factors = np.array([p.main_loop, p.epilogue, p.rows, p.columns, p.waves])
                assert ((factors > 0) & (factors <= 1)).all()
        all_of, half = (
            model_of.experts_seconds(model, 65536, "balanced", chip, True, parts)[0]
            for parts in (1, 2)
        )
        assert 0.45 < half / all_of < 0.6


def test_tiles_follow_the_kernels_choice(monkeypatch):
    expand = gemm(4096, 2048)
    monkeypatch.delenv("FOMOE_EXPERTS_TILE", raising=False)
    assert model_of.chosen_tile(expand) in TILES.values()
    for name, tile in TILES.items():
        monkeypatch.setenv("FOMOE_EXPERTS_TILE", name)
        assert model_of.chosen_tile(expand) == tile
    monkeypatch.setenv("FOMOE_EXPERTS_TILE", "multistage_64")
    with pytest.raises(SystemExit, match="multistage_64 is not modelled"):
        model_of.chosen_tile(expand)


def test_the_page_shows_what_the_command_prints():
    page = (ROOT / "docs" / "performance.md").read_text()
    begin, end = "<!-- python bench/experts_model.py --markdown -->\n", "<!-- end -->"
    assert begin in page and end in page
    shown = page.split(begin)[1].split(end)[0]
    printed = run_python("bench/experts_model.py", "--markdown")
    assert shown == printed, "run the command and put what it prints into the page"
    assert "not measured" in printed and "DeepSeek-V3" in printed


def test_the_command_refuses_nonsense():
    with pytest.raises(AssertionError, match="must be positive, got 0"):
        run_python("bench/experts_model.py", "--clock", "0")
    slower = run_python("bench/experts_model.py", "--clock", "1.4")
    assert "757 TFLOP/s" in slower
