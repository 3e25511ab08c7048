"""The prediction of bench/experts_model.py: its arithmetic by hand, and the page that shows it."""

from __future__ import annotations

import re
from dataclasses import replace

import expert_work as work
import experts_inputs as inputs
import experts_model as model_of
import experts_predict as predict_of
import numpy as np
import pytest
from bench_command import ROOT, run_python
from expert_work import Gemm, Load, Model
from experts_inputs import MAIN, SKETCH, Chip, Epilogue
from experts_predict import TILES

PING_PONG, COOPERATIVE = TILES["ping_pong_128"], TILES["cooperative_256"]
PAIRED = TILES["paired_128"]
# Nothing but the tensor cores takes time, and the clock stays as it is.
FREE = Chip(
    shared_per_clock=10**9, l2_per_clock=1e9, copy=1e30, power_of_tensor=0, clock=Chip.sheet_clock
)
MEASURED = "bench/results/h200-experts-2026-11-29.jsonl"
COUNTERS = "bench/results/h200-counters-2026-11-29.txt"


def gemm(columns: int, length: int, makes_weights: bool = False, rows: int = 1) -> Gemm:
    verb = "weight_grad" if makes_weights else "contract"
    flops = 2 * rows * columns * length
    return Gemm("some", flops, 0, verb, columns, length, "StoreRows", makes_weights)


def load_of(*groups: int) -> Load:
    return Load(sum(groups), sum(groups), groups, sum(groups))


@pytest.fixture
def free(monkeypatch):
    """Epilogues, launches and turns take no time either."""
    monkeypatch.setattr(inputs, "START_SECONDS", 0.0)
    monkeypatch.setattr(inputs, "TURN_CLOCKS", 0)
    for gates in (1, 2):
        monkeypatch.setitem(SKETCH.epilogues, ("StoreRows", gates), Epilogue(0, 0))


def test_constants_are_those_of_the_sources():
    source = "".join(
        (ROOT / "csrc" / name).read_text()
        for name in ("kernels.h", "cuda/gemm/warp_specialized_shape.cuh", "cuda/gemm/scheduler.cuh",
                     "cuda/gemm/window.cuh")
    )  # fmt: skip

    def constant(name: str) -> int:
        (value,) = re.findall(rf"\b{name} = ([\d <]+)[,;]", source)
        base, _, shift = value.partition("<<")
        return int(base) << int(shift or 0)

    for name, mine in {
        "kTileRows": work.TILE_ROWS,
        "kDepth": inputs.DEPTH,
        "kRowsOfProduct": inputs.PRODUCT_ROWS,
        "kSumOfProduct": inputs.PRODUCT_SUM,
        "kBand": inputs.BAND,
        "kStripRows": inputs.STRIP_ROWS,
        "kStripColumns": inputs.STRIP_COLUMNS,
        "kConsumers": inputs.CONSUMERS,
        "kSharedLimit": Chip.shared_bytes,
        "kBarrierBytes": inputs.BARRIER_BYTES,
    }.items():
        assert constant(name) == mine, name


def test_a_slice_by_hand():
    """Of 128 x 128 and 128 x 256 x 64 terms."""
    chip = Chip(l2_per_clock=32, l2_gathered_per_clock=16)
    cycles = PING_PONG.k_block_clocks(chip)
    assert cycles["tensor"] == 2 * 128 * 128 * 64 / 4096 == 512
    assert cycles["shared"] == 8 * (2048 + 4096) / 128 == 384
    assert cycles["L2"] == 256 * 128 / 32
    assert "producer" not in cycles
    cycles = COOPERATIVE.k_block_clocks(chip)
    assert (cycles["tensor"], cycles["shared"]) == (1024, 640)
    assert PING_PONG.k_block_clocks(chip, products=1)["tensor"] == 256
    assert PING_PONG.k_block_clocks(chip, products=1)["shared"] == 4 * 6144 / 128
    assert PAIRED.k_block_clocks(chip)["L2"] == (128 + 64) * 128 / 32
    assert (PAIRED.k_block_bytes(), PING_PONG.k_block_bytes()) == (192 * 128, 256 * 128)
    assert Chip().peak == pytest.approx(989.4e12, rel=1e-3)
    assert (PING_PONG.stages(chip, 1), COOPERATIVE.stages(chip, 1)) == (6, 4)
    assert (PING_PONG.stages(chip, 2), COOPERATIVE.stages(chip, 2)) == (5, 3)


def test_a_gathered_slice_by_hand():
    """Of 128 or 256 lines, 8 or 16 copies of a thread."""
    chip = Chip(l2_per_clock=32, l2_gathered_per_clock=16)
    kernels = replace(SKETCH, row_copy=10, step_copy=20, index_clocks=300)
    cycles = COOPERATIVE.k_block_clocks(chip, gathers="rows", kernels=kernels)
    assert cycles["shared"] == 640 + 128 * 128 / 128  # they are written there by the threads
    assert cycles["L2"] == 256 * 128 / 32 + 128 * 128 / 16
    assert (cycles["producer"], "ring" in cycles) == (8 * 10, False)
    of = lambda gathers, **changes: COOPERATIVE.k_block_clocks(
        chip, gathers=gathers, kernels=replace(kernels, **changes)
    )
    assert (of("B")["producer"], of("A")["producer"]) == (16 * 20, 300)  # indices meanwhile
    waiting = {"index_loads": 8, "index_waits": True}
    assert of("A", **waiting)["producer"] == 8 * 300 + 8 * 20
    late = of("A", announces_late=True, **waiting)
    assert late["ring"] == 1024 + inputs.HANDSHAKE_CLOCKS + 8 * 300 + 8 * 20


def test_clocks_fall_with_power():
    chip = Chip(clock=2e9, power_of_tensor=0.25)
    assert (chip.clock_at(0), chip.clock_at(1)) == (2e9, 1.6e9)


def in_bands(item: int, row_tiles: int, column_tiles: int) -> tuple[int, int]:
    """As scheduler.cuh says it."""
    band = item // (8 * column_tiles)
    height = min(8, row_tiles - band * 8)
    within = item - band * 8 * column_tiles
    return band * 8 + within % height, within // height


def test_pairs_are_in_the_order_of_the_scheduler():
    load = load_of(70, 1300, 0, 128)  # 11, 1, 1 tiles: 5 pairs of one expert, then of two, then one
    products, shares = predict_of.pairs_of(gemm(300, 100), load, PAIRED)
    first, last = [[2, 2]] * 4, [[2, 2], [1, 2], [2, 0]]
    assert products.tolist() == first * 3 + last * 3
    assert shares.tolist() == [True] * 12 + [True, False, True] * 3


def test_what_l2_is_asked_for_by_hand(free):
    """Two row tiles to a column: each reads A, and each or both together B."""
    load, some = load_of(256), gemm(256, 128, rows=256)
    for tile, lines in ((PING_PONG, 4 * 256), (COOPERATIVE, 2 * 384), (PAIRED, 4 * 192)):
        p = predict_of.predict(work.MODELS[0], some, load, tile, FREE)
        # `some` says that nothing is moved at all: an epilogue moves that less the operands.
        beside = -2 * (256 + 256) * 128
        assert p.l2_bytes == lines * 128 * 2 + beside
    alone = predict_of.predict(work.MODELS[0], some, load_of(128, 128), PAIRED, FREE)
    assert alone.l2_bytes == 4 * 256 * 128 * 2 - 2 * (256 + 2 * 256) * 128


def test_blocks_of_a_pair_work_in_step(free):
    """A pair takes as long as its longer tile, also if the other block has none."""
    seconds = lambda *groups: (
        predict_of.predict(
            work.MODELS[0], gemm(128, 64, rows=sum(groups)), load_of(*groups), PAIRED, FREE
        ).seconds
    )
    assert seconds(256) == seconds(128) == seconds(128, 64) == 2 * seconds(64, 64)


def test_items_are_in_the_order_of_the_scheduler():
    load = load_of(70, 1300, 0, 128)  # by rows: 11, 1, 1 tiles; two of them with one product
    products, slices = predict_of.items_of(gemm(300, 100), load, PING_PONG)
    of_rows = [2] * 10 + [1] + [2] + [2]
    assert [of_rows[in_bands(i, 13, 3)[0]] for i in range(39)] == products.tolist()
    assert set(slices) == {2}
    load = load_of(70, 1300, 0)
    products, slices = predict_of.items_of(gemm(300, 192, makes_weights=True), load, PING_PONG)
    one = [[2, 1][in_bands(i, 2, 3)[0]] for i in range(6)]
    assert products.tolist() == 3 * one
    assert slices.tolist() == [21] * 6 + [2] * 6 + [0] * 6


def test_whole_tiles_reach_the_peak(free):
    load = load_of(*[128] * 132)
    found = predict_of.predict(
        Model("any", 1024, 128, 132, 1), gemm(128, 1024, rows=128 * 132), load, PING_PONG, FREE
    )
    assert found.fraction == pytest.approx(1)
    assert found.seconds == pytest.approx(16 * 512 / FREE.clock)
    assert (found.rows, found.columns, found.waves, found.main_loop) == (1, 1, 1, 1)


def test_what_lowers_the_rate(free):
    model = Model("any", 1024, 128, 132, 1)

    def predict(groups: list[int], columns: int = 128, tile=PING_PONG, chip: Chip = FREE):
        rows = sum(groups)
        return predict_of.predict(
            model, gemm(columns, 1024, rows=rows), load_of(*groups), tile, chip
        )

    one_more = predict([128] * 133)  # a second wave for one tile
    assert one_more.waves == pytest.approx(133 / 264)
    assert one_more.fraction == pytest.approx(133 / 264)
    half_rows = predict([32] * 132)
    assert half_rows.rows == 0.5 and half_rows.fraction == pytest.approx(0.5)
    half_columns = predict([128] * 132, columns=128, tile=COOPERATIVE)
    assert half_columns.columns == 0.5 and half_columns.fraction == pytest.approx(0.5)
    by_l2 = predict([128] * 132, chip=replace(FREE, l2_per_clock=32))
    assert (by_l2.limit, by_l2.main_loop) == ("L2", pytest.approx(0.5))
    by_shared = predict([128] * 132, chip=replace(FREE, shared_per_clock=48))
    assert (by_shared.limit, by_shared.main_loop) == ("shared", pytest.approx(0.5))


def test_memory_binds_what_moves_more_than_it_multiplies(free):
    model, chip = Model("any", 1024, 128, 132, 1), replace(FREE, copy=1e12)
    moving = replace(gemm(128, 1024, rows=128 * 132), bytes=10**9)
    found = predict_of.predict(model, moving, load_of(*[128] * 132), PING_PONG, chip)
    assert (found.limit, found.seconds) == ("memory", pytest.approx(1e-3))


@pytest.mark.parametrize("makes_weights", [False, True])
def test_products_of_one_expert_do_not_hide_the_bytes_of_another(free, makes_weights):
    """One expert with many rows, 100 with one row, of which each has as large a weight."""
    columns = length = 128 * 4
    groups = [128 * 1320] + [1] * 100
    some = gemm(columns, length, makes_weights, rows=sum(groups))
    some = replace(some, bytes=101 * columns * length * 2)
    chip = replace(FREE, copy=1e12)
    args = Model("any", 512, 512, 101, 1), some, load_of(*groups), PING_PONG
    alone, found = (predict_of.predict(*args, c).seconds for c in (FREE, chip))
    weights = 101 * columns * length * 2 / chip.copy
    assert weights < alone  # so that all bytes together would hide behind all products
    assert alone + 0.8 * weights < found < alone + weights


def test_epilogue_hides_in_ping_pong_only(monkeypatch):
    monkeypatch.setattr(inputs, "START_SECONDS", 0.0)
    model, load = Model("any", 1024, 128, 132, 1), load_of(*[128] * 132)
    issued, turn = 4 * 890, inputs.TURN_CLOCKS  # strips of a warp, StoreRows

    def seconds(length: int, tile) -> float:
        some = gemm(256, length, rows=128 * 132)
        return predict_of.predict(model, some, load, tile, FREE).seconds * FREE.clock

    assert seconds(1024, COOPERATIVE) == pytest.approx(16 * 1024 + issued + turn)
    assert seconds(1024, PING_PONG) == pytest.approx(2 * (16 * 512 + turn))
    short = seconds(128, PING_PONG)  # main loops of 1024 clocks, the epilogue takes longer
    assert short == pytest.approx(2 * (1024 + issued + turn) / 2)
    assert issued > 1024 + turn


def test_code_that_is_lost_costs_its_lines():
    assert Epilogue(100, 0, 1, 256).total == 100 + 2 * inputs.FETCH_CLOCKS


def test_every_shape_is_predicted_below_its_floors():
    chip = Chip()
    for model in work.MODELS:
        for routing in work.ROUTINGS:
            for p in predict_of.predictions(model, 4096, routing, chip):
                assert p.seconds > max(p.gemm.flops / chip.peak, p.gemm.bytes / chip.copy)
                factors = np.array([p.main_loop, p.epilogue, p.rows, p.columns, p.waves])
                assert ((factors > 0) & (factors <= 1)).all()
        all_of, half = (
            predict_of.experts_seconds(model, 65536, "balanced", chip, True, parts)[0]
            for parts in (1, 2)
        )
        assert 0.45 < half / all_of < 0.6


def test_tiles_follow_the_kernels_choice(monkeypatch):
    expand = gemm(4096, 2048)
    monkeypatch.delenv("FOMOE_EXPERTS_TILE", raising=False)
    assert predict_of.chosen_tile(expand) in TILES.values()
    for name, tile in TILES.items():
        monkeypatch.setenv("FOMOE_EXPERTS_TILE", name)
        assert predict_of.chosen_tile(expand) == tile
    monkeypatch.setenv("FOMOE_EXPERTS_TILE", "multistage_64")
    with pytest.raises(SystemExit, match=r"must be one of ping_pong_128, .*, got multistage_64"):
        predict_of.chosen_tile(expand)


# ---- against what an H200 measured ---------------------------------------------------------------


def test_predictions_are_within_15_percent():
    """Of every product, tile and layer of both states."""
    found = model_of.compare(ROOT / MEASURED, Chip())
    assert {c.kernels for c in found} == {"main 331c15c", "sketch"}
    parts = [c for c in found if c.is_part]
    whole = [c for c in found if not c.is_part]
    products = {(c.kernels, c.model, c.what) for c in whole if c.tile != "-"}
    layers = {(c.kernels, c.model, c.tokens, c.what) for c in whole if c.tile == "-"}
    assert (len(products), len(layers), len(parts)) == (2 * 2 * 6, 2 * 2 * 2 + 6 * 2, 2 * 8)
    assert not [c for c in whole if not 0.85 < c.ratio < 1.15]
    # Not in a graph: the host's time, which is not modelled, is a part of theirs.
    assert not [c for c in parts if not 0.78 < c.ratio < 1.15]


def test_clocks_counted_are_predicted():
    """The fraction of time in which the tensor cores work, but for contract_weight_grad."""
    found = model_of.counted(ROOT / COUNTERS)
    model = next(model for model in work.MODELS if model.name == "OLMoE")
    for label, kernels in inputs.KERNELS.items():
        at = (model, 16384, "balanced", Chip())
        all_of = predict_of.predictions(*at, kernels=kernels, choice=predict_of.measured_tile)
        for p, c in zip(all_of, found[label], strict=True):
            limit = 0.15 if p.gemm.name == "contract_weight_grad" else 0.05
            assert p.main_loop * p.epilogue * p.waves == pytest.approx(c.busy, rel=1.2 * limit)


def test_what_l2_does_is_predicted():
    """Its bandwidth, but not in contract_backward, where L2 is busier than predicted."""
    found = model_of.counted(ROOT / COUNTERS)[SKETCH.name]
    at = (work.MODELS[0], 16384, "balanced", Chip())
    all_of = predict_of.predictions(*at, choice=predict_of.measured_tile)
    for p, c in zip(all_of[:4], found, strict=False):
        limit = 0.25 if p.gemm.name == "contract_backward" else 0.08
        assert p.l2 == pytest.approx(c.l2, rel=limit), p.gemm.name
        if p.tile == PING_PONG:
            pair = predict_of.predict(
                work.MODELS[0], p.gemm, work.expected_load(*at[:3]), PAIRED, Chip()
            )
            assert pair.l2_bytes < 0.8 * p.l2_bytes and pair.l2 < p.l2


def test_the_new_kernels_are_predicted_faster_where_they_were_changed():
    args = (work.MODELS[0], 16384, "balanced", Chip())
    seconds = {
        kernels.name: {p.gemm.name: p.seconds for p in predict_of.predictions(*args, 1, kernels)}
        for kernels in (MAIN, SKETCH)
    }
    gains = {name: seconds[MAIN.name][name] / s for name, s in seconds[SKETCH.name].items()}
    assert gains.pop("contract") == gains.pop("grouped_rows") == 1
    assert all(gain > 1.2 for gain in gains.values())


@pytest.mark.parametrize("text", ["{", "3", '{"label": "main"}'])
def test_other_files_are_refused(tmp_path, text):
    file = tmp_path / "other.jsonl"
    file.write_text(text)
    with pytest.raises(model_of.BadFile, match=r"other\.jsonl"):
        model_of.json_lines(file)
    with pytest.raises(model_of.BadFile, match="cannot be read"):
        model_of.json_lines(tmp_path / "none.jsonl")
    with pytest.raises(model_of.BadFile, match="no counters"):
        model_of.counted(file)


# ---- the page and the command --------------------------------------------------------------------

LABELS = ("--label", "main 331c15c", "--label", "sketch")
PARTS = {  # of docs/performance.md, by the command that prints them
    "python bench/experts_model.py --markdown": ("bench/experts_model.py", "--markdown"),
    f"python bench/experts_model.py --markdown --measured {MEASURED} --counters {COUNTERS}": (
        *("bench/experts_model.py", "--markdown"),
        *("--measured", MEASURED, "--counters", COUNTERS),
    ),
    f'python bench/report.py {MEASURED} --label "main 331c15c" --label sketch': (
        *("bench/report.py", MEASURED),
        *LABELS,
    ),
}


@pytest.mark.parametrize("command", PARTS)
def test_the_page_shows_what_the_command_prints(command):
    page = (ROOT / "docs" / "performance.md").read_text()
    begin, end = f"<!-- {command} -->\n", "<!-- end -->"
    assert begin in page and end in page
    shown = page.split(begin)[1].split(end)[0]
    printed = run_python(*PARTS[command])
    assert shown == printed, "run the command and put what it prints into the page"
    assert "OLMoE" in printed and "DeepSeek-V3" in printed


def test_the_command_refuses_nonsense():
    with pytest.raises(AssertionError, match="must be positive, got 0"):
        run_python("bench/experts_model.py", "--clock", "0")
    with pytest.raises(AssertionError, match="--counters must be given together"):
        run_python("bench/experts_model.py", "--counters", COUNTERS)
    before = run_python("bench/experts_model.py", "--kernels", "main 331c15c", "--clock", "1.4")
    assert "1.40 GHz" in before and "signalled after" in before
