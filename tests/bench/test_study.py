"""The study: which runs it wants, how it keeps them, its tables, its page."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from bench_command import ROOT
from small_job import finish, started
from unbuilt import run_in_clone

from bench.study import __main__ as main
from bench.study import claims, design, pool, store, tables, throughput
from bench.study import run as study_run
from bench.study.store import Run
from fomoe_ext.config.io import parse_args
from fomoe_ext.config.job import TrainConfig

SMALL = design.Size(32, (0, 1), (2, 4), (16,), ("diloco",))


def kept(run: Run, loss: float, sent: int = 1000, **changes: Any) -> dict[str, Any]:
    """A record as `store.record` makes it."""
    return {
        "sites": run.sites,
        "seed": run.seed,
        "flags": dict(run.flags),
        "loss": loss,
        "bytes_sent": [sent] * run.sites,
        "bytes_predicted": [sent] * run.sites,
        "full_replica_bytes": 4000,
        "ddp_bytes": 80000,
        "memory": [50] * run.sites,
        "full_replica_memory": 100,
        "skipped_share": 0.25,
        "job_s": 60.0,
        "parameters": {"total": 100, "sparse": 86},
        "routing": [
            {
                "round": number,
                "entropy": 1.0,
                "load_variation": 0.5,
                "dead_experts": 2,
                "between_sites": 0.75,
                "between_rounds": None if number == 1 else 0.9,
            }
            for number in (1, 2, 3)
        ],
        "machine": {"isa": "avx2", "torch": "2", "threads": 1, "commit": "abc"},
        **changes,
    }


def configured(run: Run) -> TrainConfig:
    """As the command line would, without its parser: flags are named like fields."""
    config, left = TrainConfig(), {**run.flags, "sites": run.sites, "seed": run.seed}
    for name in ("placement_by", "stale_by"):
        if left.get(name):
            left[name] = Path(left[name])
    for name in ("moment_codecs", "moment_periods"):
        if left.get(name):
            left[name] = tuple(left[name])
    sections = {}
    for section in ("model", "data", "sites", "inner", "outer", "run"):
        own = getattr(config, section)
        names = {field.name for field in dataclasses.fields(own)} & set(left)
        sections[section] = dataclasses.replace(own, **{name: left.pop(name) for name in names})
    assert not left, f"no such flags: {left}"
    return dataclasses.replace(config, **sections)


def records(*made: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {store.key_of(one): one for one in made}


# ------------------------------------------------------------------------------------ the runs


@pytest.mark.parametrize("table", tables.TABLES)
@pytest.mark.parametrize("size", [design.FULL, design.QUICK], ids=["full", "quick"])
def test_every_run_is_a_job_of_equal_tokens(table, size):
    runs = design.runs_of(table, size)
    assert {run.seed for run in runs} == set(size.seeds)
    for run in {run.key: run for run in runs if run.seed == 0}.values():
        config = configured(run)
        assert config.inner.batch_size * run.sites == design.SEQUENCES
        steps = config.run.resolved_rounds * config.run.local_steps
        if config.outer.optimizer == "ddp":
            assert steps <= size.steps
        elif steps != size.steps:
            more = [part * size.steps for part in design.LONGER]
            assert table == "bytes" and any(0 <= steps - wanted < 16 for wanted in more)


def test_flags_are_those_of_the_command_line():
    for name in design.BEST.values():
        run = design.gap_rows(design.FULL, 1)[name]
        parsed = parse_args([*run.arguments(), "--sites", str(run.sites)], "fomoe train")
        assert parsed == configured(run)


def test_the_grid_is_complete():
    grid = {run.key for run in design.quality(design.FULL)}
    # Sites 2, 4, 8 have 1, 2, 3 replications below a full replica, in two scopes; and that.
    assert len(grid) == 3 * 3 * 2 * ((1 + 2 + 3) * 2 + 3)


def test_a_run_is_known_by_what_it_is():
    run = Run(2, 1, {"codec": "int8", "rescale": True, "moment_periods": (3, 6)})
    assert run.key == Run(2, 1, dict(reversed(run.flags.items()))).key
    for other in (Run(3, 1, run.flags), Run(2, 0, run.flags), run.named(codec="int4")):
        assert other.key != run.key
    assert run.named(codec=None).flags == {"rescale": True, "moment_periods": (3, 6)}
    words = run.arguments()
    assert words == ["--seed", "1", "--codec", "int8", "--moment-periods", "3", "6", "--rescale"]


# ------------------------------------------------------------------------------------ the file


def test_a_torn_line_is_cut_and_the_rest_kept(tmp_path):
    path, (one, two, three) = tmp_path / "runs.jsonl", (Run(n, 0, {}) for n in (1, 2, 3))
    store.append(kept(one, 1.0), path)
    with path.open("a") as file:
        file.write('{"sites": 2, "se')  # killed while it wrote
    store.append(kept(two, 2.0), path)
    assert {k["sites"]: k["loss"] for k in store.load(path).values()} == {1: 1.0, 2: 2.0}
    assert store.missing([one, three, three, two], path) == [three]


def test_another_file_is_refused(tmp_path):
    path = tmp_path / "runs.jsonl"
    path.write_text('{"sites": 1}\n')
    with pytest.raises(ValueError, match="line 1, must be a run of the study"):
        store.load(path)
    assert store.load(tmp_path / "none") == {}


# ---------------------------------------------------------------------------------- the tables


def test_gaps_are_paired_by_seed():
    base = [Run(2, seed, {"a": 1}) for seed in (0, 1)]
    ours = [Run(2, seed, {"a": 2}) for seed in (0, 1)]
    there = records(kept(base[0], 1.0), kept(base[1], 2.0), kept(ours[1], 2.5))
    assert tables.gaps(there, zip(ours, base, strict=True)) == [0.5]


def test_spread():
    assert tables.spread([]) == "-"
    assert tables.spread([1.0], sign=True) == "+1.000 (1)"
    assert tables.spread([1.0, 2.0, 3.0], 1) == "2.0 ± 1.0"


def all_records(size: design.Size) -> dict[str, dict[str, Any]]:
    """Records of all runs: a full replica has loss 2, DDP 1.9, others 2.1 and less bytes."""
    made = {}
    for table in tables.TABLES:
        for run in design.runs_of(table, size):
            whole = run.flags["replication"] == run.sites
            ddp = run.flags.get("optimizer") == "ddp"
            loss = 1.9 if ddp else 2.0 if whole else 2.1
            sent = 80000 if ddp else 4000 if whole else 1000
            made[run.key] = kept(run, loss + 0.01 * run.seed, sent)
    return made


def test_the_cheapest_that_reaches_the_loss():
    made = all_records(SMALL)
    families = [design.bytes_families(SMALL, seed) for seed in SMALL.seeds]
    assert tables.bytes_seeds(made, SMALL) == [0, 1]
    found = tables.cheapest(made, families)
    assert found["FoMoE, int8"] is None and found["DDP"][1] == 80000
    for of in families:  # two get there, one of them with fewer bytes; one is a hair too bad
        for number, (loss, sent) in enumerate([(2.0, 500), (1.9, 400), (2.03, 100)]):
            run = of["FoMoE, int8"][number]
            made[run.key] = kept(run, loss, sent)
    found = tables.cheapest(made, families)
    loss, sent, job = found["FoMoE, int8"]
    assert (loss, sent) == (1.9, 400) and job.flags["local_steps"] == 8
    told = str(tables.bytes_table(made, SMALL)[0].rows)
    assert "'FoMoE, int8 *', '8', '32', '1.900', '400 B', '10.0x', '200x'" in told
    del made[families[1]["DDP"][0].key]
    assert tables.bytes_seeds(made, SMALL) == [0]


def test_the_tables_say_what_is_in_the_records():
    made = all_records(SMALL)
    quality = tables.quality_table(made, SMALL)[0]
    assert quality.rows[2][:4] == ("16", "4", "2", "2.005 ± 0.007 (2)")
    assert set(quality.rows[2][4:]) == {"+0.100 ± 0.000 (2)"}
    gap = {row[0]: row for row in tables.gap_table(made, SMALL)[0].rows}
    often = "full replica, int4, meetings 4 times as often"
    assert set(gap) == {"full replica", often, *design.METHODS}
    assert gap["int8"][2:4] == ("+0.100 ± 0.000 (2)", "100%")
    costs = {row[0]: row for row in tables.costs_table(made, SMALL)[0].rows}
    assert costs["absent experts skipped, replication 1"][-1] == "25%"
    stable = tables.stability_table(made, SMALL)[0].rows
    assert [row[1] for row in stable[:2]] == ["2", "3"] and "0.90" in stable[0][5]
    assert tables.unequal_bytes(made) == []
    some = next(iter(made))
    made[some]["bytes_predicted"] = [1]
    assert tables.unequal_bytes(made) == [some]


def test_tables_of_nothing_say_nothing():
    for maker in tables.TABLES.values():
        for table in maker({}, SMALL):
            assert all(set(row[3:]) == {"-"} for row in table.rows)
    rows = {row[0]: row for row in claims.claims_table({}, SMALL).rows}
    assert rows["45.44x less than DDP"][2:4] == ("45.44x", "no runs yet")


def test_the_page_of_claims(tmp_path):
    path = tmp_path / "runs.jsonl"
    made = all_records(SMALL)
    for one in made.values():
        store.append(one, path)
    claims.write(path, SMALL, tmp_path / "docs")
    page = (tmp_path / "docs" / "claims.md").read_text()
    assert "| 1875, 1254, 944, 789 GB per site | 50% of a replica" in page
    assert "| 1.42x | 4.00x (86% in experts)" in page and "| 45.44x | 80.0x at 16" in page
    assert "no compressed job reaches that loss" in page
    assert "90% of choices unchanged since the round before" in page
    for name in ("loss_against_bytes", "quality_against_replication"):
        picture = tmp_path / "docs" / "claims" / f"{name}.png"
        assert f"claims/{name}.png" in page and picture.stat().st_size > 10_000
    again = tmp_path / "again"
    claims.write(path, SMALL, again)
    assert (again / "claims.md").read_bytes() == page.encode()


def test_the_committed_page_is_of_the_committed_runs():
    """`python -m bench.study claims` was run after the last run was added."""
    page = (ROOT / "docs" / "claims.md").read_text()
    assert page == claims.page(store.load())


# ------------------------------------------------------------------------------------ the jobs


def of_pool(flags: list[str]) -> list[str]:
    """Flags of a job but for those that the pool sets itself."""
    words = [word for word in flags if word != "--no-tensorboard"]
    for flag in ("--run-dir", "--sites"):
        at = words.index(flag)
        del words[at : at + 2]
    return words


def test_a_clone_trains_with_the_libraries_of_the_installed_package(flags, tmp_path):
    """Also in the processes that are forked: nothing is built in the clone itself."""
    code = "import sys; from bench.study import pool; print(pool.train(sys.argv[1:], 2)['job_s'])"
    words = [*of_pool(flags), "--rounds", "1", "--replication", "1"]
    result = run_in_clone(tmp_path, "bench/study", "-c", code, *words)
    assert result.returncode == 0, result.stderr
    assert float(result.stdout) > 0


def test_a_job_of_the_pool_is_that_of_the_command_line(flags, tmp_path):
    report = finish(tmp_path / "run", started(*flags, "--threads", "1"))
    sites = report["run"]["sites"]
    pooled = pool.train(of_pool(flags), sites)
    assert pooled["run"]["model_hash"] == report["run"]["model_hash"]
    run = Run(sites, 0, {"codec": "fp32"})
    line = store.record(run, pooled, {"isa": "x"})
    assert line["bytes_sent"] == line["bytes_predicted"] and line["loss"] > 0
    assert line["curve"][-1][2] == line["bytes_sent"][0]
    json.dumps(line)
    with pytest.raises(pool.RunFailed, match="replication"):
        pool.train([*of_pool(flags), "--replication", "9"], sites)


def test_speed_is_measured_of_all_shares(tmp_path, monkeypatch):
    small = dataclasses.replace(
        throughput.MODEL, hidden_size=16, num_layers=1, intermediate_size=8, seq_len=16
    )
    monkeypatch.setattr(throughput, "MODEL", small)
    path = tmp_path / "throughput.json"
    assert throughput.throughput_table(path) == [] and throughput.speed_up(0.5, path=path) is None
    throughput.run(2, {"isa": "x", "threads": 1}, path)
    (table,) = throughput.throughput_table(path)
    assert [row[0] for row in table.rows] == ["100%", "75%", "50%", "25%", "0%"]
    assert table.rows[0][1:3] == ("1.00x", "1.00x") and table.rows[2][-1] == "1.16x"
    assert throughput.speed_up(0.5, path=path) > 0


def test_show_makes_no_runs(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(pool, "train", lambda *_: pytest.fail("a run was made"))
    path = tmp_path / "runs.jsonl"
    store.append(kept(design.full(design.QUICK, 4, 16), 2.0), path)
    assert main.main(["gap", "--quick", "--show", "--out", str(path)]) == 0
    assert "full replica" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"seeds must be in 1\.\.1, got 2"):
        main.main(["gap", "--quick", "--seeds", "2", "--out", str(path)])


def tables_given(monkeypatch, flag: str) -> list[Any]:
    """What the jobs to come are given by a flag that names a file; the jobs themselves fail."""
    given: list[Any] = []

    def fake(arguments: list[str], sites: int) -> dict[str, Any]:
        given.append(json.loads(Path(arguments[arguments.index(flag) + 1]).read_text()))
        raise pool.RunFailed("seen")

    monkeypatch.setattr(pool, "train", fake)
    return given


def test_counts_of_one_run_place_the_experts_of_another(tmp_path, monkeypatch):
    given, path = tables_given(monkeypatch, "--placement-by"), tmp_path / "runs.jsonl"
    rows = design.gap_rows(SMALL, 1)
    placed = [run for run in rows.values() if "placement_by" in run.flags]
    assert [run.flags["placement"] for run in placed] == ["together", "apart"]
    assert study_run.run_missing("gap", placed[:1], path) == 1 and not given
    store.append(kept(design.counted(SMALL, 0), 1.0, coactivation=[[[7]]]), path)
    store.append(kept(design.counted(SMALL, 1), 1.0, coactivation=[[[8]]]), path)
    assert study_run.run_missing("gap", placed, path) == 2 and given == [[[[8]]], [[[8]]]]


def test_counts_of_one_run_tell_which_copies_another_keeps(tmp_path, monkeypatch):
    """An expert's load is how often it was chosen."""
    given, path = tables_given(monkeypatch, "--stale-by"), tmp_path / "runs.jsonl"
    (run,) = [r for r in design.gap_rows(SMALL, 1).values() if "stale_by" in r.flags]
    together = [[[6, 5, 1], [5, 7, 2], [1, 2, 3]]]
    store.append(kept(design.counted(SMALL, 1), 1.0, coactivation=together), path)
    assert study_run.run_missing("gap", [run], path) == 1 and given == [[[6, 7, 3]]]


def test_more_tokens_are_told_beside_equal_ones():
    made = all_records(SMALL)
    families = [design.bytes_families(SMALL, seed) for seed in SMALL.seeds]
    for of in families:
        for name, number, sent in (("FoMoE, int4", 1, 500), ("FoMoE, int2, longer", 0, 100)):
            run = of[name][number]
            made[run.key] = kept(run, 1.95, sent)
    rows = {row[0]: row[3] for row in claims.claims_table(made, SMALL).rows}
    assert rows["at equal loss, less communication than DDP (ours)"] == (
        "160x (FoMoE, int4, 8 local steps, loss 1.950); 800x with 1.5x the tokens "
        "(FoMoE, int2, longer, 16 local steps, loss 1.950); target: 250x"
    )


def test_the_gap_is_told_for_every_number_of_sites():
    made = all_records(SMALL)
    for seed in SMALL.seeds:
        run = design.gap_sites_rows(SMALL, seed)[2, "LocalAdamW"]
        made[run.key] = kept(run, 2.04 + 0.01 * seed)
    (told,) = [row[3] for row in claims.claims_table(made, SMALL).rows if "other numbers" in row[0]]
    assert told == (
        "2 sites: +0.040 ± 0.000 (2) (LocalAdamW; 40% of +0.100); "
        "4 sites: +0.100 ± 0.000 (2) (int4; 100% of +0.100)"
    )


def test_failed_runs_are_told_and_not_kept(tmp_path, capsys, monkeypatch):
    def broken(arguments: list[str], sites: int) -> dict[str, Any]:
        raise pool.RunFailed("site 1 is ill")

    monkeypatch.setattr(pool, "train", broken)
    path = tmp_path / "runs.jsonl"
    assert main.main(["costs", "--quick", "--out", str(path)]) == 1
    assert "site 1 is ill" in capsys.readouterr().out and not path.exists()
