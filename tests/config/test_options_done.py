"""What is asked for is done, or it is said that it is not: options, and runs that go on."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path

import forked
import pytest
from small_run import finished_run

from fomoe_ext.config import effects as config_effects
from fomoe_ext.config.changes import changes, check_changes, told
from fomoe_ext.config.effects import without_effect
from fomoe_ext.config.io import dump_config, load_config
from fomoe_ext.config.job import TrainConfig, preset_config
from fomoe_ext.eval.command import EvalOptions
from fomoe_ext.report.metrics import read_metrics
from fomoe_ext.report.runs import find_job

# ---- options without effect ----------------------------------------------------------------------

IDLE = """
--stale-codec int8                                  stale-codec without --stale-experts
--stale-period 3                                    stale-period without --stale-experts
--reshuffle-moments reset                           reshuffle-moments without --reshuffle-rounds
--reshuffle-warmup 4                                reshuffle-warmup without --reshuffle-rounds
--overlap-alpha 0.25                                overlap-alpha without --overlap
--turn-order numbered                               turn-order without --expert-turns
--moment-periods 3 6                                moment-periods than local-adamw
--moment-codecs bf16 bf16                           moment-codecs than local-adamw
--codec fp32 --rounding nearest                     rounding with a --codec other than int8
--codec fp32 --no-error-feedback                    error-feedback loses nothing
--optimizer ddp --outer-lr 0.5                      outer-lr with --optimizer ddp
--optimizer ddp --outer-momentum=0.5                outer-momentum with --optimizer ddp
--balance switch --balance-bias-rate 0.1            balance-bias-rate without --balance bias
--balance bias --balance-coef 0.1                   balance-coef without --balance switch
--router-groups-kept 1                              router-groups-kept without --router-num-groups
--router-num-groups 4 --router-groups-kept 4        router-num-groups where all groups are kept
--router-scope resident --skipped-mass rescale      skipped-mass where no slot is skipped
--router-scope resident --router-mean all           router-mean with --router-scope resident
--replication 1 --expert-mean tokens                expert-mean where an expert is at one site
--replication 4 --placement random                  placement where every site holds all
--schedule constant --min-lr-ratio 0.5              min-lr-ratio with --schedule constant
--inner-optimizer sgd --beta2 0.5                   beta2 with --inner-optimizer sgd
--inner-optimizer sgd --adam-eps 1e-6               adam-eps with --inner-optimizer sgd
--steps 8 --rounds 2                                rounds with --steps
--rounds 4 --checkpoint-rounds 5                    checkpoint-rounds in a job of fewer
--rounds 4 --eval-rounds 5                          eval-rounds in a job of fewer
--keep-checkpoints 2                                keep-checkpoints without --checkpoint-rounds
--no-async-checkpoints                              async-checkpoints without --checkpoint-rounds
--quorum 2                                          quorum without --membership
--silent-s 2                                        silent-s without --membership
--grace 2                                           grace without --membership
--val-data x --validation-fraction 0.1              validation-fraction with --val-data
--text-field body                                   text-field without --data of
--sites 1 --replication 1 --clip-delta 3            clip-delta with a single site
--sites 1 --replication 1 --link 1gbit,1ms          link with a single site
--sites 1 --replication 1 --codec int8              codec with a single site
--sites 1 --replication 1 --uneven-steps            uneven-steps with a single site
--sites 1 --replication 1 --rescale                 rescale with a single site
--sites 1 --replication 1 --on-mismatch heal        on-mismatch with a single site
--sites 1 --replication 1 --in-flight 2             in-flight with a single site
--sites 1 --replication 1 --bucket-bytes 4096       bucket-bytes with a single site
--placement random --reshuffle-rounds 9 --rounds 9  reshuffle-rounds in a job of at most
--replication 4 --router-scope global --stale-experts -1      stale-experts where every site
--router-scope global --stale-experts 8 --stale-by x          stale-by where all absent experts
--membership torchft --replication 4 --shadow-experts         shadow-experts where every site
"""
CASES = [line.split("  ", 1) for line in IDLE.strip().splitlines()]


@pytest.mark.parametrize("flags, wanted", CASES, ids=[case[0] for case in CASES])
def test_an_option_that_does_nothing_is_named(flags, wanted, tmp_path):
    args = flags.split()
    if "--text-field" in args:
        (tmp_path / "a.txt").write_text("text")
        args += ["--data", str(tmp_path / "a.txt")]
    option, _, why = wanted.strip().partition(" ")
    config = find_job(args).config
    found = [line for line in without_effect(config, args) if line.startswith(f"--{option} ")]
    assert len(found) == 1 and f"--{option} has no effect" in found[0] and why in found[0]
    # In a file it is seen too, where it is not what the preset has anyway.
    section = config_effects._fields()[option.replace("-", "_")]
    value = getattr(getattr(config, section), option.replace("-", "_"))
    plain = getattr(getattr(preset_config("tiny"), section), option.replace("-", "_"))
    file = tmp_path / "job.toml"
    file.write_text(dump_config(config))
    said = without_effect(load_config(file), [], str(file))
    assert (found[0] in said) == (value != plain)


def test_every_option_of_the_table_is_tried_and_is_one():
    tried = {case[1].split()[0].replace("-", "_") for case in CASES}
    assert config_effects._IDLE.keys() - tried == {"placement_by"}  # as placement
    assert config_effects._IDLE.keys() <= config_effects._fields().keys()


@pytest.mark.parametrize(
    "flags",
    [
        "",
        "--stale-codec int8 --stale-period 2 --stale-experts 2 --router-scope global",
        "--overlap 2 --overlap-alpha 0.25 --fragments 2",
        "--optimizer local-adamw --moment-periods 3 6 --moment-codecs bf16 bf16",
        "--codec int4 --rounding stochastic --no-error-feedback",
        "--checkpoint-rounds 4 --keep-checkpoints 2 --no-async-checkpoints",
        "--membership torchft --quorum 2 --grace 2 --silent-s 2 --shadow-experts",
        "--placement random --reshuffle-rounds 2 --reshuffle-moments carry --reshuffle-warmup 2",
        "--resume auto --keep-checkpoints 2",
        "--data some.jsonl --text-field body",
    ],
)
def test_nothing_is_said_of_options_that_do_something(flags):
    assert without_effect(find_job(flags.split()).config, flags.split()) == []


@pytest.mark.parametrize(
    "options, message",
    [
        ({"seed": 3}, "seed must be given with skip_experts"),
        ({"data": ("a",), "val_data": ("b",)}, "data and val_data must not be given together"),
        (
            {"cache_dir": Path("c"), "val_data": ("b",)},
            "cache_dir and val_data must not be given together",
        ),
    ],
)
def test_options_of_eval_that_would_do_nothing(options, message):
    with pytest.raises(ValueError, match=message):
        EvalOptions(Path("x"), **options)


# ---- runs that go on -----------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path):
    """A copy of a finished run of 6 rounds of 4 steps, two sites."""
    copied = tmp_path / "run"
    shutil.copytree(finished_run(), copied)
    return copied


def go_on(run: Path, *flags: str):
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return forked.train("--resume", str(run), *flags, env=env)


def test_a_run_goes_on_in_its_own_folder(run, tmp_path, monkeypatch):
    other = tmp_path / "other"
    for resume in (run, run / "checkpoints/step-00000012"):
        message = f"run_dir must be .*, the folder of --resume .*, got {other}"
        with pytest.raises(ValueError, match=message):
            find_job(["--resume", str(resume), "--run-dir", str(other)])
        file = tmp_path / "job.toml"
        file.write_text(f'[run]\nrun_dir = "{other}"\n')
        with pytest.raises(ValueError, match=message):
            find_job(["--resume", str(resume), "--config", str(file)])
    assert not other.exists()
    # Another way to say the same.
    monkeypatch.chdir(tmp_path)
    for name in ("run", "./run/../run"):
        config = find_job(["--resume", str(run), "--run-dir", name]).config
        assert config.run.run_dir.resolve() == run
    # What was moved goes on where it is.
    moved = run.rename(tmp_path / "moved")
    assert find_job(["--resume", str(moved)]).config.run.run_dir == moved


def test_what_changes_is_told_and_kept(run):
    before = load_config(run / "config.toml")
    result = go_on(run, "--rounds", "7", "--batch-size", "4", "--inner-lr", "0.001")
    assert result.returncode == 0, result.stdout + result.stderr
    for line in (
        "changed: inner.batch_size from 2 to 4",
        "changed: inner.inner_lr from 0.005 to 0.001",
        "changed: run.rounds from 6 to 7",
    ):
        assert line in result.stdout
    assert result.stdout.count("changed: ") == 3
    (record,) = [r for r in read_metrics(run / "metrics.jsonl") if r["kind"] == "changed"]
    assert record["step"] == 24 and record["options"]["inner.batch_size"] == ["2", "4"]
    assert load_config(run / "config-until-step-00000024.toml") == before
    assert load_config(run / "config.toml").inner.batch_size == 4


@pytest.mark.parametrize(
    "flags, message",
    [
        (
            "--rounds 3",
            "rounds must be at least 6, the number of rounds that the checkpoint has done, got 3",
        ),
        (
            "--steps 20",
            "rounds must be at least 6, the number of rounds that the checkpoint has done, got 5",
        ),
        ("--batch-size 4", "inner.batch_size has no effect any more: all 6 rounds are done"),
        ("--rounds 8 --schedule constant --warmup-steps 3", "inner.warmup_steps has no effect any"),
        ("--rounds 8 --placement random", "sites.placement must stay cyclic"),
    ],
)
def test_what_cannot_change_is_refused_and_nothing_is_touched(run, flags, message):
    before = {path: path.read_bytes() for path in run.rglob("*.*") if path.is_file()}
    result = go_on(run, *flags.split())
    assert result.returncode not in (0, 130, 74)
    assert message in result.stderr and "validation" not in result.stdout
    for path, content in before.items():
        if "logs" not in path.parts and path.name != ".lock":
            assert path.read_bytes() == content, path


def test_changes_of_configurations():
    old = TrainConfig()
    assert changes(old, old) == {}
    run = dataclasses.replace(old.run, run_dir=Path("x"), resume="auto", rounds=50)
    new = dataclasses.replace(old, run=run, data=dataclasses.replace(old.data, data=("a", "b")))
    found = changes(old, new)
    assert found == {"run.rounds": (48, 50), "data.data": ((), ("a", "b"))}
    assert [*told(found)] == [
        "changed: data.data from none to a b",
        "changed: run.rounds from 48 to 50",
    ]
    check_changes(None, new, 50)
    # With other sites the placement is made anew, as asked for.
    sites = dataclasses.replace(old.sites, placement="random")
    with pytest.raises(ValueError, match=r"placement must stay cyclic .* got random"):
        check_changes(old, dataclasses.replace(old, sites=sites), 0)
    sites = dataclasses.replace(sites, replication=4)
    check_changes(old, dataclasses.replace(old, sites=sites), 0)


def test_a_finished_run_is_reported_again(run):
    report = json.loads((run / "report.json").read_text())
    result = go_on(run)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "changed" not in result.stdout
    again = json.loads((run / "report.json").read_text())
    assert again["validation"] == report["validation"]
    assert not list(run.glob("config-until-*"))
