"""The helpers of the benchmarks of codecs, all-reduce and loss: no time is taken here."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import loss_vs_bits
import outer_cases
import outer_tables
import pytest
import torch
from bench_command import ROOT
from rich.console import Console

import fomoe_ext
from fomoe_ext.outer.codec import Codec
from fomoe_ext.placement import wire

BENCH = ROOT / "bench"
HOME = str(Path(fomoe_ext.__file__).parent.parent)  # where the built package is, tree or not

# ---- errors, floors, crossovers ------------------------------------------------------------------


def test_means_are_exact_without_loss_and_as_accurate_as_wanted_with_int8() -> None:
    deltas = outer_cases.site_deltas(8, 64, 512)
    assert deltas.shape == (8, 64 * 512)
    exact = outer_cases.mean_errors(Codec("fp32"), deltas)
    assert max(exact.values()) < 1e-6
    int8 = outer_cases.mean_errors(Codec("int8"), deltas)
    assert 1e-3 < int8["ours"] <= 0.007
    assert int8["ring"] > 1.3 * int8["ours"]  # it encodes eight times, not twice
    sparse = Codec("topk")
    parts = torch.stack([sparse.decode(sparse.encode(delta), delta.numel()) for delta in deltas])
    torch.testing.assert_close(outer_cases.our_mean(sparse, deltas), parts.mean(0))


def test_deltas_are_correlated_and_their_rows_differ() -> None:
    deltas = outer_cases.site_deltas(3, 256, 64)
    rows = deltas[0].view(256, 64).square().mean(1).sqrt()
    assert rows.max() > 8 * rows.min()
    unit = (deltas.view(3, 256, 64) / rows[:, None]).flatten(1)
    assert torch.corrcoef(unit)[0, 1].item() == pytest.approx(0.5, abs=0.05)
    assert torch.equal(deltas, outer_cases.site_deltas(3, 256, 64))


def test_uneven_shares_are_all_averaged() -> None:
    deltas = outer_cases.site_deltas(3, 1, 100)
    for mean in (outer_cases.our_mean, outer_cases.ring_mean):
        torch.testing.assert_close(mean(Codec("fp32"), deltas), deltas.mean(0))


def test_floors_count_every_tensor_once() -> None:
    numel = 6400  # int8: 100 blocks of 64 codes and a step
    payload = 6400 + 200
    values = 4 * numel
    wanted = {
        "encode values": values + payload,
        "encode delta": 2 * values + 2 * values + payload,  # anchor, local, error twice
        "decode sum": 4 * payload + values,
        "reduce": 3 * payload + values + 2 * values + payload,  # others, own, error, out
    }
    for verb in outer_cases.VERBS:
        assert outer_cases.least_bytes(verb, Codec("int8"), numel) == wanted[verb]
    assert outer_cases.least_bytes("encode delta", Codec("fp32"), numel) == 3 * values
    with pytest.raises(ValueError, match=r"verb must be one of encode values, .*, got 'decode'"):
        outer_cases.least_bytes("decode", Codec("int8"), numel)


def test_crossover_is_where_both_take_as_long() -> None:
    ours, theirs = (0.5, 25_000_000), (0.1, 100_000_000)
    bandwidth = outer_cases.crossover(ours, theirs)
    assert bandwidth == 1.5e9
    assert ours[0] + 8 * ours[1] / bandwidth == theirs[0] + 8 * theirs[1] / bandwidth
    assert outer_cases.crossover((0.1, 1), (0.2, 2)) == math.inf
    assert outer_cases.crossover((0.2, 2), (0.2, 2)) == math.inf
    assert outer_cases.crossover((0.3, 2), (0.2, 2)) == 0.0
    assert outer_cases.crossover((0.1, 3), (0.2, 2)) == 0.0


def test_link_share() -> None:
    assert outer_cases.link_share(25_000_000, 2.0, 200e6) == 0.5


def test_cases_are_distinct_and_the_large_ones_are_asked_for() -> None:
    names = [str(case) for case in outer_cases.LINK_CASES]
    assert len(set(names)) == len(names)
    large = [case for case in outer_cases.LINK_CASES if case.megabytes > 64]
    assert large and all(case.full for case in large)
    assert {case.sites for case in outer_cases.LINK_CASES if not case.full} == {2, 4, 8}


# ---- the verbs and their rivals ------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bf16", "int8", "topk"])
@pytest.mark.parametrize("verb", outer_cases.VERBS)
def test_rivals_do_the_same_work(verb: str, name: str) -> None:
    """Decoded, torch's output is ours but for what the formats lose; both keep just that."""
    codec, numel = Codec(name), 1 << 14
    rivals, _ = outer_cases.rivals_of(name)
    rival = next(rival for rival in rivals if rival.name == "torch")
    mine, theirs = (outer_cases.Work.make(codec, numel) for _ in range(2))
    outputs = [mine.ours(verb)(), theirs.theirs(verb, rival)()]
    if verb != "decode sum":
        outputs = [codec.decode(outputs[0], numel), rival.decode(outputs[1])]
    limit = {"bf16": 0.01, "int8": 0.05, "topk": 0.6}[name]
    assert outer_cases.normalised_error(*outputs) < limit
    if verb not in ("encode delta", "reduce"):
        return
    ours_again = lambda row: codec.decode(codec.encode(row), numel)
    theirs_again = lambda row: rival.decode(rival.encode(row))
    for work, call, decode, again in (
        (mine, mine.ours(verb), lambda out: codec.decode(out, numel), ours_again),
        (theirs, theirs.theirs(verb, rival), rival.decode, theirs_again),
    ):
        assert work.error is not None and work.error.abs().max() > 0
        wanted = work.given[0] + work.error
        if verb == "reduce":
            wanted += sum(again(row) for row in work.given[1:])
        kept = decode(call()) + work.error
        # anchor - local is rounded to about 1e-7 of the anchor, 1e-4 of the delta.
        assert outer_cases.normalised_error(kept, wanted) < 1e-3


def test_a_rival_that_fails_or_errs_is_absent_with_its_reason(monkeypatch: Any) -> None:
    def missing() -> outer_cases.Rival:
        raise ImportError("No module named 'rival'")

    nothing = outer_cases.Rival("nothing", lambda values: values, torch.zeros_like)
    rivals = {"int8": {"missing": missing, "nothing": lambda: nothing}}
    monkeypatch.setattr(outer_cases, "_RIVALS", rivals)
    found, absent = outer_cases.rivals_of("int8")
    assert not found
    assert absent["missing"] == "ImportError: No module named 'rival'"
    assert "its result differs (relative error 1.00)" in absent["nothing"]
    assert outer_cases.rivals_of("fp32") == ([], {})


# ---- the processes of the all-reduce -------------------------------------------------------------


def test_sites_measure_all_methods(tmp_path: Path) -> None:
    found = tmp_path / "found.json"
    site = [sys.executable, str(BENCH / "outer_site.py"), "--out", str(found)]
    site += ["--numel", "10001", "--rounds", "2"]
    launcher = [
        sys.executable,
        "-m",
        "fomoe_ext.link",
        "--sites",
        "2",
        "--log-dir",
        str(tmp_path),
    ]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join((HOME, str(BENCH)))}
    done = subprocess.run(
        [*launcher, "--", *site], env=env, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(found.read_text())
    assert (result["sites"], result["numel"], result["link"]) == (2, 10001, "")
    methods = result["methods"]
    for name, method in methods.items():
        assert len(method["seconds"]) == len(method["cpu_seconds"]) == 2
        assert method["equal_bits"]
        if name in wire.CODECS:
            wanted = wire.all_reduce_bytes(10001, 2, name, 1 << 22)
            assert method["bytes_sent"] == wanted
    assert methods["gloo fp32"]["bytes_sent"] == 4 * 10001
    assert methods["fp32"]["error"] < 1e-6 < methods["bf16"]["error"] < methods["int8"]["error"]
    assert methods["int8"]["error"] < 0.02 < methods["int4"]["error"] < methods["topk"]["error"]

    case = outer_cases.LinkCase(2, "50mbit", 10001, 2)._asdict()
    shaped = {**result, "case": case, "link": "50 Mbit/s: counted delays"}
    free = {**result, "case": {**case, "link": None}}
    console = Console(width=200, record=True, file=(tmp_path / "out").open("w"))
    for table in (
        outer_tables.time_table([shaped, free], list(methods)),
        outer_tables.share_table([shaped], list(methods)),
        outer_tables.crossover_table([free], list(methods)),
    ):
        console.print(table)
    text = console.export_text()
    assert "counted delays" in text and "unshaped" in text
    console.file.close()


def test_a_shared_machine_makes_results_suspect(monkeypatch: Any) -> None:
    monkeypatch.setattr(outer_tables.launch, "cores", lambda: 2)
    assert outer_tables.load_line([{"load": 3.0}, {"load": None}]) == ""
    assert "up to 9 processes shared 2 cores" in outer_tables.load_line([{"load": 9.2}])


# ---- loss against bits ---------------------------------------------------------------------------


def run(codec: str, seed: int, loss: float, sent: int = 100, flags: tuple[str, ...] = ()) -> Any:
    job = {"tokens": 1000, "sites": 2, "replication": 1, "rounds": 2, "local_steps": 3}
    return {
        "codec": codec,
        "seed": seed,
        "flags": list(flags),
        "loss": loss,
        "bytes_sent": [sent, sent + 2],
        "bytes_predicted": [100, 102],
        "run": {**job, "data": "text", "wall_s": 1.0},
        "machine": {"commit": "abc", "torch": "2", "device": "cpu", "isa": "avx2"},
    }


RUNS = [
    run("int8", 1, 2.02),
    run("fp32", 0, 1.0),
    run("fp32", 1, 2.0),
    run("int8", 0, 0.999),
    run("topk", 0, 1.005, sent=99),
    run("int4", 2, 1.0),
]


def test_differences_are_paired_by_seed() -> None:
    rows = {row.codec: row for row in loss_vs_bits.summarise(RUNS)}
    assert list(rows) == ["fp32", "int8", "int4", "topk"]  # by bits
    assert rows["int8"].losses == {0: 0.999, 1: 2.02}
    assert rows["int8"].differences == pytest.approx({0: -0.1, 1: 1.0})
    assert rows["int8"].good is False  # 0.45 on average, 0.1 wanted
    assert rows["topk"].good is True and rows["fp32"].good is None
    assert rows["int4"].differences == {} and rows["int4"].good is None  # fp32 lacks that seed
    assert rows["int8"].bytes_sent == 101 and rows["int8"].as_predicted
    assert not rows["topk"].as_predicted
    assert rows["int8"].bits == 8.25 and rows["topk"].bits == pytest.approx(0.2227, abs=1e-4)


def test_series_goes_on_where_it_was(tmp_path: Path, monkeypatch: Any) -> None:
    path, asked = tmp_path / "new" / "loss.json", []

    def train(codec: str, seed: int, flags: list[str]) -> Any:
        asked.append((codec, seed))
        if (codec, seed) == ("bf16", 1):
            raise loss_vs_bits.RunFailed("bf16, seed 1: exit code 3")
        return run(codec, seed, 1.0 + seed, flags=tuple(flags))

    monkeypatch.setattr(loss_vs_bits, "train", train)
    monkeypatch.setattr(loss_vs_bits, "machine_facts", lambda: run("fp32", 0, 1.0)["machine"])
    path.parent.mkdir()
    old = [run("fp32", 0, 1.0, flags=("--rounds", "9")), run("bf16", 0, 1.0)]
    loss_vs_bits.save_runs(path, old)
    assert loss_vs_bits.run_missing(path, ["fp32", "bf16"], 2, []) == 1
    assert asked == [("fp32", 0), ("fp32", 1), ("bf16", 1)]  # other flags are other runs
    runs = loss_vs_bits.load_runs(path)
    assert runs[:2] == old and len(runs) == 4
    asked.clear()
    assert loss_vs_bits.run_missing(path, ["fp32", "bf16"], 2, []) == 1
    assert asked == [("bf16", 1)]
    assert [p.name for p in path.parent.iterdir()] == ["loss.json"]


def test_table_and_plot_of_what_is_there(tmp_path: Path, capsys: Any) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "loss"
    loss_vs_bits.save_runs(tmp_path / "loss.json", RUNS)
    assert loss_vs_bits.main(["--plot-only", "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert "+0.450*" in text and "NO" in text and "1,000 training tokens" in text
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    arguments = ["--plot-only", "--out", str(out), "--", "--rounds", "9"]
    assert loss_vs_bits.main(arguments) == 1
    assert "has no runs with the flags: --rounds 9" in capsys.readouterr().err


def test_arguments(capsys: Any) -> None:
    given, flags = loss_vs_bits.parse(["--rounds", "4", "--codecs", "int8", "--", "--sites", "2"])
    assert given.codecs == ["int8"] and flags == ["--rounds", "4", "--sites", "2"]
    for bad, words in (
        (["--seeds", "0"], "--seeds must be >= 1, got 0"),
        (["--rounds", "0"], "--rounds must be >= 1, got 0"),
        (["--", "--seed=3"], "--seed must not be given after --"),
        (["--codecs", "int3"], "invalid choice: 'int3'"),
    ):
        with pytest.raises(SystemExit):
            loss_vs_bits.parse(bad)
        assert words in capsys.readouterr().err


def test_file_of_another_kind_is_refused(tmp_path: Path, capsys: Any) -> None:
    for text in ("[]", "{}", "no json"):
        (tmp_path / "x.json").write_text(text)
        assert loss_vs_bits.main(["--plot-only", "--out", str(tmp_path / "x")]) == 1
        assert "--out must name a file of this benchmark, got " in capsys.readouterr().err


def test_figures_of_a_report() -> None:
    sites = [{"bytes_sent": 5, "planned": {"bytes": 6}}]
    report = {
        "run": {"tokens": 1},
        "sites": sites,
        "validation": {"loss": 1.5, "bits_per_byte": 2.0, "tokens": 9, "load": [[1]]},
    }
    kept = loss_vs_bits.figures(report, "int8", 1, ["--rounds", "2"])
    assert (kept["loss"], kept["bytes_sent"], kept["bytes_predicted"]) == (1.5, [5], [6])
    assert (kept["codec"], kept["seed"], kept["flags"]) == ("int8", 1, ["--rounds", "2"])
