"""`python -m bench.study gpu` and whole steps of the paper's sizes: runs, budget, tables."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from bench_command import ROOT
from test_study import configured, kept

from bench.study import pool, proxy, store, throughput
from fomoe_ext.config.job import preset_config
from fomoe_ext.report.tables import ReportTable

ROUND_S, START_S = 0.5, 3.0


class _Trainer:
    """Jobs that take as long as they have rounds, by the clock of the study; with one
    `replication`, if it is given, they fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, replication: int = 0) -> None:
        self.calls: list[list[str]] = []
        self.now, self._failing = 0.0, replication
        monkeypatch.setattr(proxy.time, "perf_counter", lambda: self.now)

    def __call__(self, words: Sequence[str], sites: int) -> dict[str, Any]:
        self.calls.append(list(words))
        assert sites == proxy.SITES
        if int(flag(words, "replication")) == self._failing:
            raise pool.RunFailed("a site has ended")
        rounds = int(flag(words, "rounds"))
        self.now += START_S + ROUND_S * rounds
        site = {"bytes_sent": 10, "planned": {"bytes": 10, "full_replica_bytes": 20}}
        site["planned"] |= {"ddp_bytes": 400}
        site |= {"memory": {"total": 5}, "skipped_share": 0.5, "local_s": 1.0, "meeting_s": 1.0}
        return {
            "sites": [site] * sites,
            "metrics": [],
            "validation": {"loss": 2.0 + len(self.calls) / 100, "bits_per_byte": 3, "tokens": 9},
            "run": {"tokens": 1000, "model_hash": "x"},
            "full_replica_memory": {"total": 8},
            "model_parameters": {"total": 100, "sparse": 90},
            "job_s": START_S + ROUND_S * rounds,
        }


def flag(words: Sequence[str], name: str) -> str:
    return words[words.index(f"--{name}") + 1]


def test_all_kinds_are_trained_on_equally_many_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, trainer = tmp_path / "gpu.jsonl", _Trainer(monkeypatch)
    assert proxy.study(10, proxy.setting("cuda"), (0, 1), {}, trainer, path) == 0
    made = list(store.load(path).values())
    for preset in ("54m", "153m"):
        of = [one for one in made if one["flags"]["preset"] == preset]
        assert sorted(proxy.name_of(one["flags"]) for one in of) == sorted(2 * [*proxy.KINDS])
        assert len({one["flags"]["rounds"] for one in of}) == 1
    # All but the two that measure are recorded, and all fit into the ten minutes.
    rounds = [int(flag(words, "rounds")) for words in trainer.calls]
    assert len(made) == len(rounds) - 4 == 20
    assert 540 < trainer.now <= 600
    tables = proxy.table(path)
    assert len(tables) == 2
    for table in tables:
        assert [row[0] for row in table.rows] == list(proxy.KINDS)
        assert {(row[4], row[5], row[7]) for row in table.rows} == {("2.00x", "40.0x", "50%")}


def test_an_interrupted_study_goes_on_with_its_rounds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, trainer = tmp_path / "gpu.jsonl", _Trainer(monkeypatch)
    given = proxy.setting("cuda")
    assert proxy.study(10, given, (0,), {}, trainer, path) == 0
    whole = store.load(path)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:7]))
    trainer.calls.clear()
    assert proxy.study(99, given, (0,), {}, trainer, path) == 0
    assert store.load(path).keys() == whole.keys()
    assert len(trainer.calls) == len(lines) - 7


def test_too_few_minutes_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, trainer = tmp_path / "gpu.jsonl", _Trainer(monkeypatch)
    assert proxy.study(0.5, proxy.setting("cuda"), (0,), {}, trainer, path) == 0
    assert store.load(path) == {}
    said = capsys.readouterr().out
    assert "54m: left out, needs" in said and "153m: left out, needs" in said


def test_a_failed_run_is_counted_and_the_others_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, trainer = tmp_path / "gpu.jsonl", _Trainer(monkeypatch, replication=1)
    assert proxy.study(5, proxy.setting("cuda"), (0,), {}, trainer, path) == 4
    assert len(store.load(path)) == 2 * (len(proxy.KINDS) - 2)
    assert "a site has ended" in capsys.readouterr().out


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_runs_are_jobs(device: str) -> None:
    given = proxy.setting(device)
    for preset in given.shapes:
        for run in proxy.runs_of(preset, given, 8, (0,)):
            flags = {k: v for k, v in run.flags.items() if k != "preset"}
            config = configured(store.Run(run.sites, run.seed, flags))
            assert config.sites.sites == proxy.SITES
            assert config.model.vocab_size == 256
            assert preset_config(preset).preset == preset


def test_rounds_within_a_budget() -> None:
    assert proxy.rounds_within(103.0, 3.0, 1.0) == 100
    assert proxy.rounds_within(1e9, 3.0, 1.0) == proxy.MOST_ROUNDS
    assert proxy.rounds_within(5.0, 3.0, 1.0) == 0


def test_text_is_collected_by_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packages, target = tmp_path / "site-packages", tmp_path / "text"
    (packages / "one" / "inner").mkdir(parents=True)
    target.mkdir()
    (packages / "one" / "a.py").write_text("a = 1\n")
    (packages / "one" / "inner" / "b.md").write_text("# b\n")
    (packages / "one" / "latin.py").write_bytes(b"\xff\xfe")
    (packages / "one" / "c.so").write_bytes(b"\0" * 100)
    (packages / "two.py").write_text("two = 2\n")
    monkeypatch.setattr(proxy.sysconfig, "get_path", lambda name: str(packages))
    size = proxy.collect_text(target)
    texts = {path.name: path.read_text() for path in target.iterdir()}
    assert texts == {"0-one.txt": "a = 1\n\n# b\n", "0-two.txt": "two = 2\n"}
    assert size == sum(map(len, texts.values()))


def _table_of_sizes(tmp_path: Path) -> ReportTable:
    step = {"preset": "13.3b", "layers": 12, "tokens": 1000, "captured": True}
    steps = [
        {**step, "resident": share, "seconds": s, "graph_seconds": g, "host_seconds": h, "flops": f}
        for share, s, g, h, f in ((1.0, 2.0, 1.0, 1.9, 8e9), (0.5, 1.5, 0.8, 1.5, 4e9))
    ]
    seconds = {kind: {"1.0": [1.0], "0.5": [0.5]} for kind in ("layer", "step")}
    kept_ = {"seconds": seconds, "tokens": 10, "device": "cuda", "machine": {}}
    kept_["sizes"] = {"steps": steps, "dense_rate": 16e9, "device": "cuda"}
    path = tmp_path / "throughput.json"
    path.write_text(json.dumps(kept_))
    return throughput.throughput_table(path)[0]


def test_whole_steps_of_the_papers_sizes(tmp_path: Path) -> None:
    table = _table_of_sizes(tmp_path)
    assert table.rows == (
        ("13.3b, 12 layers", "100%", "500", "1k", "1.00x", "50%", "95%", "-"),
        ("13.3b, 12 layers", "50%", "667", "1.25k", "1.25x", "31%", "100%", "1.16x"),
    )


def test_records_of_both_studies_have_one_form() -> None:
    run = proxy.runs_of("54m", proxy.setting("cuda"), 8, (0,))[0]
    assert store.key_of(kept(run, 1.0)) == run.key
    assert (ROOT / "bench" / "study" / "proxy.py").exists()
