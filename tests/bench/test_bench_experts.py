"""What the benchmarks of the experts do without a GPU: work, routing, rivals, tasks, results."""

from __future__ import annotations

import itertools
import json
import sys
from collections import Counter

import bench_experts as bench
import common
import expert_cases as cases
import expert_work as work
import pytest
import report
import rivals
import torch
from bench_command import run_python
from expert_work import Kernel, Load, Model

MODELS = (
    Model("gated", 32, 16, 8, 2),
    Model("biases", 24, 40, 8, 2, "clamped_swiglu", bias=True),
    Model("plain", 32, 8, 16, 4, "silu"),
)
TOKENS = 48
every_model = pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
every_routing = pytest.mark.parametrize("routing", work.ROUTINGS)
every_part = pytest.mark.parametrize("parts", work.PARTS.values(), ids=list(work.PARTS))
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


# ---- work ----------------------------------------------------------------------------------------


def test_flops_by_hand():
    """OLMoE, 4096 tokens: 32768 rows of 2048 by 1024, gate, up and down."""
    model = work.MODELS[0]
    load = work.expected_load(model, 4096, "balanced")
    assert load.rows == 4096 * 8 and load.groups == (512,) * 64
    flops = {name: gemm.flops for name, gemm in work.gemms(model, load).items()}
    one = 2 * 32768 * 2048 * 1024  # 137 GFLOP
    assert one == 137_438_953_472
    assert flops == {
        "expand": 2 * one,
        "contract": one,
        "contract_backward": one,
        "grouped_rows": 2 * one,
        "expand_weight_grad": 2 * one,
        "contract_weight_grad": one,
    }
    forward, both = (
        sum(k.flops for k in work.experts_kernels(model, load, backward))
        for backward in (False, True)
    )
    sums = 2 * 32768 * 2048
    assert forward == 3 * one + sums and both == 9 * one + 2 * sums


def test_bytes_by_hand():
    """2 experts of 3 have rows: 5 rows of 3 tokens; D = 8, N = 4, gated."""
    model, load = Model("tiny", 8, 4, 3, 2), Load(4, 8, (3, 0, 2), 3)
    of = {name: gemm.bytes for name, gemm in work.gemms(model, load).items()}
    x, preact, act, rows = 3 * 8, 5 * 8, 5 * 4, 5 * 8
    expand_weight, contract_weight = 2 * 8 * 8, 2 * 8 * 4
    assert of == {
        "expand": 2 * (x + expand_weight + preact + act),
        "contract": 2 * (act + contract_weight + rows),
        "contract_backward": 2 * (x + contract_weight + 2 * preact + act),
        "grouped_rows": 2 * (preact + expand_weight + rows),
        "expand_weight_grad": 2 * (x + preact + 3 * 8 * 8),
        "contract_weight_grad": 2 * (x + act + 3 * 8 * 4),
    }
    assert work.gemms(model, load, training=False)["expand"].bytes == 2 * (x + expand_weight + act)
    assert work.sums(model, load).bytes == 2 * (rows + 4 * 8) + 8 * 8


def test_floors_of_kernels_one_after_the_other():
    kernels = [Kernel("a", flops=600, bytes=100), Kernel("b", flops=0, bytes=400)]
    found = work.floors(kernels, flops_per_second=100, bytes_per_second=50)
    assert (found.compute, found.memory, found.kernels) == (6, 10, 6 + 8)
    assert found.larger == 10


def test_memory_that_a_case_needs():
    """DeepSeek-V3's weights, 22.5 GB, and their gradients twice, and what 65536 tokens take."""
    model = work.MODELS[3]
    weights = 256 * 3 * 7168 * 2048 * 2
    slots = 65536 * 8
    ours, theirs = 4096, 7168 + 4096 + 2048 + 2048 + 7168
    tokens = 2 * (slots * (2 * ours + 2 * theirs + 2 * 7168) + 8 * 65536 * 7168)
    assert work.needed_bytes(model, 65536) == 3 * weights + tokens
    assert 80e9 < work.needed_bytes(model, 65536) < 2 * 141e9


@every_model
def test_memory_kept_for_the_backward(model):
    """What autograd keeps of ours and of the composition is what is counted."""
    inputs = cases.make_inputs(model, TOKENS, "balanced")
    slots, known = inputs.load.slots, inputs.leaves
    kept = work.kept_elements(model)
    ours = common.kept_bytes(lambda: cases.our_experts(inputs), known)
    assert ours == 2 * slots * kept["ours"]
    theirs = common.kept_bytes(lambda: cases.torch_experts(inputs), known)
    weights = 2 * slots  # of the combination, in bf16
    assert theirs == 2 * slots * kept["grouped_mm"] + weights
    assert ours < 0.6 * theirs


# ---- routing -------------------------------------------------------------------------------------


def test_balanced_routing_is_exact():
    model = MODELS[0]
    chosen = cases.balanced_experts(model, TOKENS, torch.Generator().manual_seed(1))
    assert chosen.shape == (TOKENS, 2) and chosen.dtype == torch.int32
    assert torch.bincount(chosen.flatten()).tolist() == [12] * 8
    assert (chosen[:, 0] != chosen[:, 1]).all() and len(set(chosen[:, 0].tolist())) == 8
    with pytest.raises(ValueError, match="top_k must be a divisor of 8 experts, got 3"):
        cases.balanced_experts(Model("odd", 8, 8, 8, 3), 8, torch.Generator())


def test_zipf_routing_has_the_shares_that_are_expected():
    """Counts of 20000 tokens, sorted, against the formula that the prediction uses."""
    model = Model("many", 8, 8, 64, 16)
    chosen = cases.zipf_experts(model, 20000, torch.Generator().manual_seed(1))
    assert chosen.sort(1).values.diff(dim=1).min() > 0  # no expert twice
    counts = torch.bincount(chosen.flatten(), minlength=64)
    shares = counts.sort(descending=True).values / 20000
    expected = torch.tensor(work.chosen_shares(work.zipf_popularity(64), 16))
    assert expected.sum() == pytest.approx(16, rel=1e-4)
    assert (shares - expected).abs().max() < 0.02 and shares[0] > 0.98 and shares[-1] < 0.12
    assert counts.argmax() != 0  # popular experts stand anywhere


def test_expected_load():
    model = work.MODELS[4]
    for routing in work.ROUTINGS:
        load = work.expected_load(model, 4096, routing)
        assert load.rows == pytest.approx(4096 * 4, rel=1e-3) and load.slots == 4096 * 4
        assert load.touched == pytest.approx(4096, rel=1e-2)
    half = work.expected_load(model, 4096, "balanced", 2)
    assert half.rows == 4096 * 2 and len(half.groups) == 16
    assert half.touched == round(4096 * (1 - 1820 / 35960))  # 4 of 16, 4 of 32
    with pytest.raises(ValueError, match="routing must be one of balanced, zipf, got 'even'"):
        work.expected_load(model, 4096, "even")


def test_inputs_know_their_load():
    inputs = cases.make_inputs(MODELS[0], TOKENS, "zipf").part(2)
    resident = inputs.experts < 4
    assert inputs.load == Load(
        TOKENS,
        2 * TOKENS,
        tuple(int((inputs.experts == e).sum()) for e in range(4)),
        int(resident.any(1).sum()),
    )
    assert inputs.x.std().item() == pytest.approx(1, rel=0.1)
    assert inputs.expand_weight.std().item() == pytest.approx(32**-0.5, rel=0.1)
    again = cases.make_inputs(MODELS[0], TOKENS, "zipf")
    assert torch.equal(again.experts, inputs.experts) and torch.equal(again.x, inputs.x)


# ---- rivals give what ours gives -----------------------------------------------------------------


@every_part
@every_dtype
@every_routing
@every_model
def test_layers_agree(model, routing, dtype, parts):
    inputs = cases.make_inputs(model, TOKENS, routing, dtype=dtype).part(parts)
    ours = cases.with_gradients(cases.our_experts, inputs)
    for layer in (rivals.loop_experts, rivals.grouped_mm_experts):
        run = lambda inputs, layer=layer: cases.torch_experts(inputs, layer)
        common.assert_same(cases.with_gradients(run, inputs), ours, dtype)


@every_part
@every_dtype
@every_model
def test_verbs_agree(model, dtype, parts):
    inputs = cases.make_inputs(model, TOKENS, "zipf", dtype=dtype).part(parts)
    verbs = cases.Verbs(inputs)
    assert len(verbs.names) == 6
    for name in verbs.names:
        ours = verbs.our_rows(name)
        for products in (rivals.LoopProducts(), rivals.GroupedMM()):
            common.assert_same(ours, verbs.theirs(name, products), dtype)
        assert verbs.dense(name)().dim() == 2  # it has as many FLOPs, or raises


@every_part
@every_model
def test_whole_layers_agree(model, parts):
    inputs = cases.make_inputs(model, TOKENS, "zipf", dtype=torch.float32).part(parts)
    layers = cases.make_layers(inputs)
    common.assert_same(layers.run_ours(), layers.run_theirs(), torch.float32)
    wanted = torch.bincount(inputs.experts.flatten(), minlength=model.experts)
    missed = (layers.ours.stats.load - wanted).abs().sum()
    assert missed <= 0.1 * wanted.sum()


def test_transformers_experts_agree():
    pytest.importorskip("transformers")
    inputs = cases.make_inputs(MODELS[0], TOKENS, "zipf", dtype=torch.float32)
    theirs = cases.with_gradients(cases.other_experts(inputs, "transformers"), inputs)
    common.assert_same(theirs, cases.with_gradients(cases.our_experts, inputs), torch.float32)


def test_absent_rivals_say_why(monkeypatch):
    inputs = [cases.make_inputs(model, TOKENS, "zipf") for model in MODELS]
    monkeypatch.setitem(sys.modules, "transformers.models.mixtral.modeling_mixtral", None)
    for of, name, reason in (
        (inputs[0], "transformers", "cannot be imported"),
        (inputs[1], "transformers", "only supports SwiGLU without biases"),
        (inputs[0].part(2), "transformers", "needs all experts to be resident"),
        (inputs[0], "liger", "runs on a GPU only"),
    ):
        with pytest.raises(rivals.Absent, match=reason):
            cases.other_experts(of, name)


# ---- tasks and their results ---------------------------------------------------------------------


@pytest.mark.parametrize("name", bench.TASKS)
def test_a_task_is_measured(name):
    inputs = cases.make_inputs(MODELS[0], TOKENS, "balanced")
    task = bench.make_task(inputs, name)
    assert "grouped_mm" in task.rivals
    result = bench.measure(task, "cpu", copy_rate=1e9)
    assert result["flops"] == sum(kernel.flops for kernel in task.kernels)
    assert result["memory_floor_seconds"] == pytest.approx(result["least_bytes"] / 1e9)
    larger = max(result["compute_floor_seconds"], result["memory_floor_seconds"])
    assert result["fraction_of_floor"] == pytest.approx(larger / result["seconds"])
    rival = result["rivals"]["grouped_mm"]
    assert rival["ratio"] == pytest.approx(rival["seconds"] / result["seconds"])
    if name in report.LAYERS:
        assert result["half_seconds"] > 0 and result["rows_share"] == {"half": 0.5, "quarter": 0.25}
    if name == "forward_backward":
        slots = 2 * TOKENS
        assert result["memory"]["ours"]["kept"] == 2 * 32 * slots
        assert result["absent"].keys() >= {"compiled", "liger"}
    json.dumps(result)
    for hopper, kind in ((True, ("ping_pong", "cooperative")), (False, ("multistage",))):
        tiles = bench.tiles_of(task, hopper)
        assert tiles.keys() == {k.name for k in task.kernels if isinstance(k, work.Gemm)}
        assert tiles and all(tile.startswith(kind) for tile in tiles.values())


def test_a_wrong_result_is_not_timed(monkeypatch):
    inputs = cases.make_inputs(MODELS[0], TOKENS, "balanced")
    right = rivals.GroupedMM.rows
    monkeypatch.setattr(rivals.GroupedMM, "rows", lambda *a: 1.1 * right(*a))
    task = bench.verb_task(inputs, "contract")
    assert task.absent == {"grouped_mm": "its result differs"}
    assert list(task.rivals) == ["dense"]
    ours = cases.Verbs.ours
    monkeypatch.setattr(cases.Verbs, "ours", lambda self, name: (1.1 * ours(self, name)[0],))
    with pytest.raises(AssertionError):
        bench.verb_task(inputs, "contract")


def test_rivals_that_fail_are_named():
    task = bench.Task([], lambda: None)

    def out_of_memory():
        raise torch.OutOfMemoryError("tried to allocate 40 GiB")

    task.add_rival("large", out_of_memory, [])
    assert task.absent["large"].endswith("OutOfMemoryError: tried to allocate 40 GiB")


def test_calls_take_turns():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "ab"}
    seconds = common.interleaved_seconds(calls, "cpu", rounds=3)
    assert order[4:] == ["a", "b"] * 3 and set(seconds) == {"a", "b"}


def test_a_case_that_does_not_fit_is_skipped(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (10**9, 10**9))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    with pytest.raises(pytest.skip.Exception, match=r"needs about 146 GB .* 1 are free"):
        bench.Held.get(work.MODELS[3], 65536, "balanced")


def test_cases_are_collected_with_inputs_made_once():
    done = run_python("-m", "pytest", "bench", "-k", "experts_on_gpu", "--collect-only", "-q")
    cases_found = [line for line in done.splitlines() if "test_experts_on_gpu[" in line]
    assert len(cases_found) == 6 * 3 * 2 * 9
    inputs = [line.split("[")[1].rsplit("-", 1)[0] for line in cases_found]
    changes = sum(a != b for a, b in itertools.pairwise(inputs))
    assert changes == len(set(inputs)) - 1 == 6 * 3 * 2 - 1


# ---- tables of results ---------------------------------------------------------------------------

MACHINE = {
    "device": "cuda",
    "commit": "abc1234",
    "torch": "2.13.0",
    "built_with_cuda": "13.0",
    "suspect": [],
    "gpu": {
        "name": "NVIDIA H200",
        "driver": "580.1",
        "sm_clock_mhz": 1500,
        "max_sm_clock_mhz": 1980,
        "memory_clock_mhz": 3201,
        "power_watts": 690.5,
        "power_limit_watts": 700.0,
        "temperature_celsius": 60,
    },
}


def made_up(task: str, **changes) -> dict:
    return {
        "task": task,
        "model": {"name": "OLMoE"},
        "tokens": 4096,
        "routing": "zipf",
        "seconds": 500e-6,
        "compute_floor_seconds": 400e-6,
        "memory_floor_seconds": 100e-6,
        "fraction_of_floor": 0.8,
        "flops_per_second": 600e12,
        "dense_flops_per_second": 750e12,
        "copy_bytes_per_second": 4e12,
        "rivals": {"grouped_mm": {"seconds": 750e-6, "ratio": 1.5}},
        "absent": {"liger": "liger_kernel cannot be imported"},
        "machine": MACHINE,
        **changes,
    }


def test_report_of_a_made_up_file(tmp_path, capsys, monkeypatch):
    memory = {
        "ours": {"peak_without_weight_gradients": 1_000_000_000},
        "grouped_mm": {"peak_without_weight_gradients": 2_500_000_000},
    }
    hot = MACHINE | {"suspect": ["power cap after"], "gpu": MACHINE["gpu"] | {"sm_clock_mhz": 1410}}
    results = [
        (
            "test_experts_on_gpu[a]",
            made_up("contract", rivals={"dense": {"ratio": 0.9}}, tiles={"contract": "wide"}),
        ),
        (
            "test_experts_on_gpu[b]",
            made_up(
                "layer",
                graph_seconds=450e-6,
                half_seconds=260e-6,
                quarter_seconds=135e-6,
                memory=memory,
                machine=hot,
            ),
        ),
        ("test_token_kernels_route[c]", made_up("", torch_seconds=1e-3, compiled_seconds=None)),
        ("test_experts[d]", {"seconds": 1.0}),
    ]
    del results[2][1]["task"]
    file = tmp_path / "h200.json"
    benchmarks = [{"name": name, "extra_info": info} for name, info in results]
    file.write_text(json.dumps({"benchmarks": benchmarks}))
    monkeypatch.setattr(sys, "argv", ["report.py", str(file)])
    assert report.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "### h200.json"
    assert "* device: NVIDIA H200, driver 580.1" in lines
    assert "* commit abc1234, torch 2.13.0, CUDA 13.0" in lines
    assert "* suspect: power cap after (1 results)" in lines
    assert any("1410 to 1500 MHz (at most 1980)" in line for line in lines)
    case = "| OLMoE | 4096 | zipf | {} | 500.0 | 400.0 | 100.0 | 0.80 | 600 | 750 | "
    assert case.format("contract") + "wide | 0.90x |" in lines
    layer = "1.50x | 450.0 | 0.52 | 0.27 | 1.00 | 2.50 | 0.40 |"
    assert case.format("layer") + layer in lines
    assert "| route[c] | 500.0 | 400.0 | 100.0 | 0.80 | 4000 | 2.00x | - |" in lines
    assert "* no liger in 2 results: liger_kernel cannot be imported" in lines
    assert lines[-1] == "1 results of other benchmarks are not shown."
    widths = Counter(line.count("|") for line in lines if line.startswith("|"))
    assert all(count >= 3 for count in widths.values())  # head, rule and rows of a table


@pytest.mark.parametrize("text, said", [("{", "cannot be read as JSON"), ("{}", "'benchmarks'")])
def test_report_refuses_other_files(tmp_path, text, said):
    file = tmp_path / "other.json"
    file.write_text(text)
    with pytest.raises(report.BadFile, match=said):
        report.section(file)
    with pytest.raises(report.BadFile, match="cannot be read"):
        report.section(tmp_path / "none.json")


def test_report_of_lines(tmp_path):
    """TFLOP/s and rivals' times over ours; only the labels that are asked for."""
    seconds = {"default": 2e-3, "dense": 1e-3, "grouped_mm": 3e-3}
    case = {"label": "new", "model": "OLMoE", "tokens": 4096, "routing": "zipf", "flops": 10**12}
    verb = case | {"kind": "verb", "verb": "expand", "seconds": seconds}
    seconds = {"ours": 2e-3, "grouped_mm": 3e-3, "graph": 1e-3, "1/2": 1.2e-3}
    peak = {"ours": 3, "grouped_mm": 4}
    layer = case | {"kind": "layer", "backward": True, "seconds": seconds, "peak": peak}
    ceilings = {"kind": "ceilings", "label": "new", "square": 700e12, "copy": 4e12}
    lines = [ceilings, verb, layer, verb | {"label": "old"}]
    file = tmp_path / "h200.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    shown = report.lines_section(file, ["new"]).splitlines()
    assert shown[0] == "### h200.jsonl"
    of = "| new | OLMoE | 4096 | zipf | "
    assert of + "expand | 2000.0 | 500 | 1000 | 333 | 0.50x | 1.50x |" in shown
    assert of + "forward + backward | 2000.0 | 500 | 1.50x | 0.50 | 0.60 | - | 0.75 |" in shown
    assert any("700 to 700 TFLOP/s" in line for line in shown)
    assert not any("old" in line for line in shown)
    assert any("old" in line for line in report.lines_section(file, []).splitlines())
    with pytest.raises(report.BadFile, match="has no line with the label 'none'"):
        report.lines_section(file, ["none"])
