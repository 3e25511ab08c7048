"""Predicts how fast the grouped GEMMs are on a Hopper GPU.

    python bench/experts_model.py [--markdown] [--clock GHz] [--kernels NAME] [--resources]
    python bench/experts_model.py --measured bench/results/<gpu>-experts-<date>.jsonl [--markdown]

For each k-block of 64 terms the main loop of a tile takes the longest of: the products on the
tensor cores, the bytes through shared memory, the bytes from L2, the producer's work, and the wait
for a free stage. With ping-pong tiles the epilogue overlaps the other warpgroup's main loop; with
cooperative ones it comes on top. Tiles are assigned to blocks as in scheduler.cuh, and the block
with the most work determines the time. No expert takes less time than its bytes over the bandwidth
of a copying kernel. Power is limited, so the clock falls as the tensor cores become busier.

Inputs that are in no data sheet come from hardware counters of one H200, for OLMoE's six GEMMs with
16384 tokens and balanced routing. --measured compares with benchmarks, also of other models and
routings.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import expert_work as work
from expert_work import Load, Model
from experts_inputs import (
    CODE_LINE,
    CONSUMERS,
    CURRENT,
    FETCH_CLOCKS,
    GROUP_WARPS,
    HANDSHAKE_CLOCKS,
    KERNELS,
    STAGING_BYTES,
    START_SECONDS,
    TURN_CLOCKS,
    Chip,
    Kernels,
)
from experts_predict import (
    TILES,
    Prediction,
    experts_seconds,
    measured_tile,
    predict,
    predictions,
    supports,
)

# ---- tables --------------------------------------------------------------------------------------

Row = Sequence[str]


def table(title: str, head: Row, rows: Sequence[Row], markdown: bool) -> str:
    """A title and a table, in Markdown or with columns aligned by spaces."""
    if markdown:
        lines = [head, ["---"] * len(head), *rows]
        text = "\n".join("| " + " | ".join(line) + " |" for line in lines)
        return f"**{title}**\n\n{text}\n"
    widths = [max(len(line[i]) for line in (head, *rows)) for i in range(len(head))]
    shown = ["  ".join(f"{cell:<{w}}" for cell, w in zip(line, widths, strict=True)).rstrip()
             for line in (head, *rows)]  # fmt: skip
    return "\n".join([title, *shown, ""])


PER_CLOCK, OF_WARP = "bytes per clock and multiprocessor", "clocks of a warp"
SHEET, COUNTED, SEEN, ASSUMED = "data sheet", "counters", "clocks in benchmarks", "assumed"
DEDUCED = "deduced from counted clocks"


def inputs_table(chip: Chip, kernels: Kernels, markdown: bool) -> str:
    clock = f"{chip.clock / 1e9:.2f} GHz / (1 + {chip.power_of_tensor:g} x fraction of time busy)"
    rows = [
        ("multiprocessors", f"{chip.processors}", SHEET),
        ("bf16 FLOPs per clock and multiprocessor", f"{chip.flops_per_clock}", SHEET),
        ("peak of the tensor cores", f"{chip.peak / 1e12:.0f} TFLOP/s at 1.83 GHz", SHEET),
        ("clock at the power limit, 700 W", clock, SEEN),
        ("shared memory", f"{chip.shared_per_clock} {PER_CLOCK}", SHEET),
        ("L2 by TMA", f"{chip.l2_per_clock:g} {PER_CLOCK}", COUNTED),
        ("L2 by gathered 16-byte copies", f"{chip.l2_gathered_per_clock:g} {PER_CLOCK}", COUNTED),
        ("memory", f"{chip.copy / 1e12:.2f} TB/s read and written by a copying kernel", "measured"),
        ("change of tile, without the epilogue", f"{TURN_CLOCKS} clocks", DEDUCED),
        ("start and end of a kernel", f"{START_SECONDS * 1e6:.0f} µs", ASSUMED),
        ("request 16 bytes of a gathered row of A", f"{kernels.row_copy:g} {OF_WARP}", DEDUCED),
        ("the same, gathered along k", f"{kernels.step_copy:g} {OF_WARP}", DEDUCED),
    ]
    times = f"{kernels.index_loads} in sequence, each" if kernels.index_loads > 1 else "one"
    loads = f"{times} of {kernels.index_clocks:g} clocks"
    beside = "not overlapped" if kernels.index_waits else "overlapping the copies"
    rows.append(("index loads per k-block, weight gradients", f"{loads}, {beside}", DEDUCED))
    if kernels.announces_late:
        rows.append(("gathered k-blocks", "signalled after later ones are requested", "source"))
        rows.append(("handshake over two barriers", f"{HANDSHAKE_CLOCKS} clocks", DEDUCED))
        fetching = f"{FETCH_CLOCKS} clocks per {CODE_LINE} bytes"
        rows.append(("instruction cache misses", fetching, COUNTED))
    for (name, gates), e in kernels.epilogues.items():
        if name == "StoreRows" and gates == 2:
            continue
        gated = ", gated" if gates == 2 else ""
        lost = f", {e.fetched} bytes of missed code" if e.fetched else ""
        said = f"{e.clocks:g} clocks, {e.bytes} bytes of shared memory{lost}"
        known = {"StoreRows": True, "Activate": gates == 2, "ActivateBackward": gates == 2}
        source = DEDUCED if known.get(name, False) else "scaled from a deduced one"
        rows.append((f"epilogue {name}{gated}, per strip of 16 x 64", said, source))
    return table(f"Inputs: {kernels.name}", ("what", "value", "source"), rows, markdown)


def tiles_table(chip: Chip, markdown: bool) -> str:
    """Limits of the main loop for each tile, and for 256 columns with B sent to two blocks."""
    rows = []
    cooperative = TILES["cooperative_256"]
    shared = [replace(cooperative, name=f"{cooperative.name}, B multicast to 2", sharing=2)]
    names = ("tensor", "shared", "L2", "producer")
    for tile in (*TILES.values(), *shared):
        for gathers, said in (("", "-"), ("rows", "rows of A"), ("B", "B along k")):
            if gathers == "B" and tile.sharing > 1:
                continue  # a gathered B is not multicast
            cycles = tile.k_block_clocks(chip, gathers=gathers)
            fraction = cycles["tensor"] / max(cycles.values())
            shown = (f"{cycles[name]:.0f}" if name in cycles else "-" for name in names)
            limit = max(cycles, key=cycles.__getitem__)
            cells = (tile.name, said, *shown, limit, f"{fraction:.2f}", f"{tile.stages(chip, 1)}")
            rows.append(cells)
    head = ("tile", "gathered", *names, "limit", "tensor cores busy", "stages")
    return table("Main loop: clocks per k-block of 64 terms", head, rows, markdown)


def faster_tile(model: Model, load: Load, p: Prediction, chip: Chip, kernels: Kernels) -> str:
    """Another compiled tile that is predicted to be at least 3 % faster, and how much."""
    others = [tile for tile in TILES.values() if tile != p.tile and supports(tile, p.gemm)]
    found = [predict(model, p.gemm, load, tile, chip, kernels) for tile in others]
    best = min(found, key=lambda other: other.seconds)
    gain = p.seconds / best.seconds
    return f"{best.tile.name} {gain:.2f}x" if gain >= 1.03 else "-"


def products_table(chip: Chip, kernels: Kernels, tokens: int, routing: str, markdown: bool) -> str:
    rows = []
    for model in work.MODELS:
        load = work.expected_load(model, tokens, routing)
        for p in predictions(model, tokens, routing, chip, kernels=kernels):
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
                    faster_tile(model, load, p, chip, kernels),
                )
            )
    head = ("model", "GEMM", "tile", "main loop", "epilogue", "rows", "columns", "waves")
    head += ("limit", "of peak", "TFLOP/s", "µs", "floor µs", "faster tile")
    title = f"Grouped GEMMs, {tokens} tokens, {routing} routing, all experts resident"
    return table(title, head, rows, markdown)


def fractions_table(chip: Chip, kernels: Kernels, markdown: bool) -> str:
    """Fraction of peak of every GEMM, rates of a layer's experts, and time with fewer residents."""
    rows, names = [], []
    for model in work.MODELS:
        for tokens in work.TOKENS:
            for routing in work.ROUTINGS:
                found = predictions(model, tokens, routing, chip, kernels=kernels)
                names = [p.gemm.name for p in found]

                def seconds_of(backward: bool, parts: int = 1, at=(model, tokens, routing, chip)):
                    return experts_seconds(*at, backward, parts, kernels)

                forward, flops = seconds_of(False)
                both, flops_of_both = seconds_of(True)
                # With Zipf routing it would depend on which popular experts are resident.
                of_all = ["-", "-"]
                if routing == "balanced":
                    for i, parts in enumerate((2, 4)):
                        part, _ = seconds_of(True, parts)
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
    title = "Fraction of the tensor cores' peak of each GEMM, and the experts of a layer"
    return table(title, head, rows, markdown)


def resources_table(markdown: bool) -> str:
    """Registers and warps of the warp-specialised kernels, from the built library or, without one,
    from the committed budget.
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
        shape = re.match(r"(?:warp_specialized|paired)<(.*), (\d+)(?:, (true|false))?>$", kernel)
        if shape is None or "sm_90a" not in row:
            continue
        problem, columns, ping_pong = shape.groups()
        kinds = {"true": "ping_pong", "false": "cooperative", None: "paired"}
        tile = TILES[f"{kinds[ping_pong]}_{columns}"]
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


# ---- against measurements ------------------------------------------------------------------------


@dataclass(frozen=True)
class Compared:
    kernels: str
    model: str
    tokens: int
    routing: str
    what: str  # a GEMM, or "forward" or "forward + backward" of the experts
    tile: str
    predicted: float
    measured: float

    @property
    def ratio(self) -> float:
        return self.predicted / self.measured

    @property
    def is_part(self) -> bool:
        """Whether only half or a quarter of the experts were resident."""
        return self.what.endswith(("half", "quarter"))


class BadFile(Exception):
    """A file does not hold results; the message has its path and the reason."""


def json_lines(path: Path) -> list[dict[str, Any]]:
    """The results in a file with a JSON object per line. Raises BadFile."""
    try:
        found = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise BadFile(f"{path} cannot be read as lines of JSON: {error}") from error
    if not all(isinstance(each, dict) and "kind" in each for each in found):
        raise BadFile(f"{path} must have an object with a 'kind' in every line, got another value")
    return found


def compare(path: Path, chip: Chip) -> list[Compared]:
    """Predictions for every GEMM and layer in the file whose label is one of KERNELS.

    The host's time is not modelled, so a layer is compared with its replay from a CUDA graph if
    that was measured. With half or a quarter of the experts it was not.
    """
    models = {model.name: model for model in work.MODELS}
    found = []
    for line in json_lines(path):
        if line["kind"] == "ceilings" or line["label"] not in KERNELS:
            continue
        kernels, model = KERNELS[line["label"]], models[line["model"]]
        at = (line["tokens"], line["routing"])
        case = (kernels.name, model.name, *at)
        if line["kind"] == "verb":
            load = work.expected_load(model, *at)
            gemm = work.gemms(model, load)[line["verb"]]
            for name, seconds in line["seconds"].items():
                tile = measured_tile(gemm) if name == "default" else TILES.get(name)
                if tile is not None and (name == "default" or tile != measured_tile(gemm)):
                    p = predict(model, gemm, load, tile, chip, kernels)
                    found.append(Compared(*case, gemm.name, tile.name, p.seconds, seconds))
        else:
            backward, measured = line["backward"], line["seconds"]
            what = "forward + backward" if backward else "forward"
            all_of = "graph" if "graph" in measured else "ours"
            for name, part, parts in (
                (all_of, "", 1),
                ("1/2", ", half", 2),
                ("1/4", ", quarter", 4),
            ):
                if name in measured:
                    seconds, _ = experts_seconds(
                        model, *at, chip, backward, parts, kernels, measured_tile
                    )
                    found.append(Compared(*case, what + part, "-", seconds, measured[name]))
    return found


def compared_table(path: Path, chip: Chip, markdown: bool) -> str:
    found = compare(path, chip)
    rows = [
        (
            *(c.kernels, c.model, f"{c.tokens}", c.routing, c.what, c.tile),
            *(f"{seconds * 1e6:.0f}" for seconds in (c.predicted, c.measured)),
            f"{c.ratio:.2f}",
        )
        for c in found
    ]
    head = ("kernels", "model", "tokens", "routing", "what", "tile")
    head += ("predicted µs", "measured µs", "ratio")
    worst = lambda few: f"{max((c.ratio for c in few), key=lambda ratio: abs(ratio - 1)):.2f}"
    whole = [c for c in found if not c.is_part]
    last = f"{len(whole)} figures with all experts resident; the ratio furthest from 1 is "
    last += f"{worst(whole)}."
    if len(found) > len(whole):
        parts = [c for c in found if c.is_part]
        last += f" For {len(parts)} figures with half or a quarter of them it is {worst(parts)}."
    return table(f"Predicted and measured, {path.name}", head, rows, markdown) + "\n" + last


@dataclass(frozen=True)
class Counted:
    """Counters of a launch: seconds, and the fractions of time with the tensor cores busy, and of
    L2's bandwidth.
    """

    seconds: float
    busy: float
    l2: float


def counted(path: Path) -> dict[str, list[Counted]]:
    """Counters of the grouped GEMMs in order, by label of the kernels."""
    found: dict[str, list[Counted]] = {}
    try:
        text = path.read_text()
    except OSError as error:
        raise BadFile(f"{path} cannot be read: {error}") from error
    for part in re.split(r"^# ", text, flags=re.MULTILINE)[1:]:
        label, *launches = re.split(r"\n== ", part)
        for launch in launches:
            if "warp_specialized_kernel" in launch:
                nanoseconds, percent, l2 = (
                    float(re.search(rf"{name}\S* ([\d.]+)", launch)[1])
                    for name in ("gpu__time_duration", "sm__throughput", "lts__throughput")
                )
                line = Counted(nanoseconds / 1e9, percent / 100, l2 / 100)
                found.setdefault(label.splitlines()[0], []).append(line)
    if not found:
        raise BadFile(f"{path} must have counters of a warp_specialized_kernel, got no counters")
    return found


def counters_table(path: Path, measured: Path, chip: Chip, markdown: bool) -> str:
    """OLMoE's GEMMs with 16384 tokens and balanced routing: predictions against counters."""
    model = next(model for model in work.MODELS if model.name == "OLMoE")
    timed = {(c.kernels, c.model, c.what, c.tile): c.measured for c in compare(measured, chip)}
    rows = []
    for label, launches in counted(path).items():
        at = (model, 16384, "balanced", chip)
        found = predictions(*at, kernels=KERNELS[label], choice=measured_tile)
        for p, c in zip(found, launches, strict=True):
            clocks = p.gemm.flops / chip.processors / chip.flops_per_clock / c.busy
            busy = p.main_loop * p.epilogue * p.waves
            seconds = timed[label, model.name, p.gemm.name, p.tile.name]
            rates = [clocks / each / 1e9 for each in (c.seconds, seconds)]
            rates.append(chip.clock_at(busy) / 1e9)
            cells = [f"{busy:.2f}", f"{c.busy:.2f}", f"{clocks / 1e6:.2f}"]
            rows.append((label, p.gemm.name, *cells, *(f"{rate:.2f}" for rate in rates)))
    head = (
        "kernels",
        "product",
        "tensor cores busy, predicted",
        "counted",
        "million clocks counted",
    )
    head += ("GHz under the profiler", "GHz in the benchmark", "GHz predicted")
    return table(f"Predicted and counted, {path.name}", head, rows, markdown)


def l2_table(path: Path, measured: Path, chip: Chip, markdown: bool) -> str:
    """Predicted L2 traffic and time of the GEMMs over rows with every tile, beside counters and
    measurements: OLMoE, 16384 tokens, balanced, the current kernels. A "-": not measured.
    """
    model = next(model for model in work.MODELS if model.name == "OLMoE")
    load, rows = work.expected_load(model, 16384, "balanced"), []
    timed = {
        (c.kernels, c.model, c.tokens, c.what, c.tile): c.measured for c in compare(measured, chip)
    }
    gemms = work.gemms(model, load).values()
    for gemm, launch in zip(gemms, counted(path)[CURRENT.name], strict=True):
        for tile in TILES.values() if supports(TILES["paired_128"], gemm) else ():
            p = predict(model, gemm, load, tile, chip)
            seconds = timed.get((CURRENT.name, model.name, 16384, gemm.name, tile.name))
            cells = [gemm.name, tile.name, f"{p.l2_bytes / 1e9:.2f}", f"{p.l2:.2f}"]
            cells += [f"{launch.l2:.2f}" if tile == measured_tile(gemm) else "-"]
            cells += [f"{p.seconds * 1e6:.0f}", f"{seconds * 1e6:.0f}" if seconds else "-"]
            rows.append(cells)
    head = ("GEMM", "tile", "GB from and to L2", "of L2's bandwidth, predicted", "counted")
    head += ("predicted µs", "measured µs")
    return table("L2 traffic by tile: OLMoE, 16384 tokens, balanced", head, rows, markdown)


def report(chip: Chip, kernels: Kernels, markdown: bool) -> str:
    return "\n".join(
        [
            f"Predicted for: {kernels.name}.\n",
            inputs_table(chip, kernels, markdown),
            tiles_table(chip, markdown),
            products_table(chip, kernels, 16384, "balanced", markdown),
            fractions_table(chip, kernels, markdown),
        ]
    ).rstrip("\n")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--markdown", action="store_true", help="print tables in Markdown")
    parser.add_argument(
        "--clock",
        type=float,
        default=Chip.clock / 1e9,
        metavar="GHz",
        help="clock with the tensor cores idle (default: %(default)s)",
    )
    parser.add_argument(
        "--kernels",
        choices=KERNELS,
        default=CURRENT.name,
        help="state of the kernels to predict (default: %(default)s)",
    )
    parser.add_argument(
        "--measured", type=Path, metavar="FILE", help="only compare with the results in this file"
    )
    parser.add_argument(
        "--counters",
        type=Path,
        metavar="FILE",
        help="with --measured: also compare with these hardware counters",
    )
    parser.add_argument(
        "--resources",
        action="store_true",
        help="only print registers, stages and warps of the built kernels",
    )
    arguments = parser.parse_args()
    if arguments.resources:
        print(resources_table(arguments.markdown))
        return 0
    if arguments.clock <= 0:
        parser.error(f"--clock must be positive, got {arguments.clock}")
    if arguments.counters and not arguments.measured:
        parser.error("--counters must be given together with --measured")
    chip = Chip(clock=arguments.clock * 1e9)
    if arguments.measured:
        try:
            print(compared_table(arguments.measured, chip, arguments.markdown))
            if arguments.counters:
                files = (arguments.counters, arguments.measured)
                print("\n" + counters_table(*files, chip, arguments.markdown).rstrip("\n"))
                print("\n" + l2_table(*files, chip, arguments.markdown).rstrip("\n"))
        except BadFile as bad:
            parser.error(str(bad))
        return 0
    print(report(chip, KERNELS[arguments.kernels], arguments.markdown))
    return 0


if __name__ == "__main__":
    sys.exit(main())
