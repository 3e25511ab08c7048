"""Configuration: sizes against the paper, TOML round trips, the command line, and bad input."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fomoe_ext.config.data import DataConfig
from fomoe_ext.config.inner import InnerConfig
from fomoe_ext.config.io import (
    RENAMED,
    dump_config,
    load_config,
    parse_args,
    read_toml,
    save_config,
)
from fomoe_ext.config.job import SECTIONS, TrainConfig, preset_config
from fomoe_ext.config.model import ModelConfig, count_parameters
from fomoe_ext.config.outer import OuterConfig
from fomoe_ext.config.presets import PRESETS
from fomoe_ext.config.run import RunConfig
from fomoe_ext.config.sites import SitesConfig

# The model table of arXiv 2606.19025: total parameters and the share of experts and routers.
PAPER = {
    "54m": (256, 4, 8, 54e6, 0.039),
    "153m": (512, 16, 16, 153e6, 0.220),
    "1.8b": (1024, 128, 32, 1.8e9, 0.592),
    "13.3b": (2048, 256, 64, 13.3e9, 0.647),
    "104b": (4096, 512, 128, 104e9, 0.662),
}


@pytest.mark.parametrize("name", PAPER)
def test_presets_have_the_sizes_of_the_paper(name: str) -> None:
    width, layers, experts, total, share = PAPER[name]
    counts = count_parameters(PRESETS[name][0])
    norms = width * (4 * layers + 2)
    formula = 200_019 * width + layers * (
        4 * width**2 + 2 * width * 128 * experts + width * experts
    )
    assert counts.total - norms == formula
    assert counts.total == pytest.approx(total, rel=0.012)
    assert (counts.sparse + counts.router) / counts.total == pytest.approx(share, abs=6e-4)


def test_tiny_is_mostly_experts() -> None:
    assert count_parameters(PRESETS["tiny"][0]).sparse_share >= 0.5


def test_field_names_are_unique_and_described() -> None:
    sections = (ModelConfig, DataConfig, SitesConfig, InnerConfig, OuterConfig, RunConfig)
    names = [f.name for section in sections for f in dataclasses.fields(section)]
    assert len(names) == len(set(names))
    # Presets set no optional field: a saved file leaves None out, and would come back changed.
    for config in map(preset_config, PRESETS):
        base = preset_config("tiny")
        for section in ("model", "inner", "run"):
            for f in dataclasses.fields(getattr(base, section)):
                if "None" in str(f.type):
                    assert getattr(getattr(config, section), f.name) is None


@pytest.mark.parametrize("name", PRESETS)
def test_saved_preset_loads_the_same(name: str, tmp_path: Path) -> None:
    path = tmp_path / "run" / "config.toml"
    save_config(preset_config(name), path)
    assert load_config(path) == preset_config(name)
    assert [p.name for p in path.parent.iterdir()] == ["config.toml"]


# Windows line ends, quotes, DEL and other control characters must survive in paths.
texts = st.text(st.characters(codec="utf-8", exclude_categories=("Cs",)), min_size=1, max_size=20)
positive = st.floats(1e-12, 1e12)


@given(
    data=st.lists(texts, max_size=3).map(tuple),
    field=texts,
    lr=positive,
    outer_lr=st.none() | positive,
    seed=st.integers(0, 2**63 - 1),
    steps=st.none() | st.integers(1, 10**9),
    folder=st.none() | texts.map(Path),
    flag=st.booleans(),
)
def test_any_saved_configuration_loads_the_same(
    tmp_path_factory: pytest.TempPathFactory,
    data: tuple[str, ...],
    field: str,
    lr: float,
    outer_lr: float | None,
    seed: int,
    steps: int | None,
    folder: Path | None,
    flag: bool,
) -> None:
    config = dataclasses.replace(
        preset_config("153m"),
        data=DataConfig(data=data, text_field=field, cache_dir=folder),
        inner=InnerConfig(inner_lr=lr),
        outer=OuterConfig(outer_lr=outer_lr, optimizer="fedavg"),
        run=RunConfig(seed=seed, steps=steps, tensorboard=flag),
    )
    path = tmp_path_factory.mktemp("config") / "config.toml"
    save_config(config, path)
    assert load_config(path) == config


def test_precedence_preset_file_command_line(tmp_path: Path) -> None:
    path = tmp_path / "job.toml"
    path.write_text('preset = "54m"\n[model]\ntop_k = 4\nseq_len = 512\n[inner]\ninner_lr = 1\n')
    config = parse_args(["--config", str(path), "--top-k", "3"])
    assert (config.preset, config.model.hidden_size) == ("54m", 256)
    assert (config.model.top_k, config.model.seq_len, config.inner.inner_lr) == (3, 512, 1.0)
    assert isinstance(config.inner.inner_lr, float)
    config = parse_args([f"--config={path}", "--preset=153m"])
    assert (config.preset, config.model.hidden_size, config.model.top_k) == ("153m", 512, 4)


def test_flags_of_the_documented_commands() -> None:
    line = "--sites 4 --replication 1 --router-scope global --optimizer diloco"
    config = parse_args(line.split())
    assert (config.sites.sites, config.sites.replication) == (4, 1)
    assert (config.model.router_scope, config.outer.optimizer) == ("global", "diloco")
    assert (config.outer.resolved_lr, config.outer.resolved_momentum) == (1.0, 0.2)
    config = parse_args(["--optimizer", "local-adamw", "--replication", "4"])
    assert (config.outer.resolved_lr, config.outer.resolved_momentum) == (1.0, 0.0)
    line = (
        "--data a.txt b/*.py --seed 3 --local-steps 8 --steps 100 --placement random "
        "--reshuffle-rounds 2 --codec bf16 --router-mean all --inner-lr 0.01 --outer-lr 0.5 "
        "--threads 1 --run-dir r --no-tensorboard"
    )
    config = parse_args(line.split())
    assert config.data.data == ("a.txt", "b/*.py")
    assert config.run.resolved_rounds == 13
    assert (config.run.run_dir, config.run.tensorboard) == (Path("r"), False)
    assert (config.outer.resolved_lr, config.sites.reshuffle_rounds) == (0.5, 2)


@pytest.mark.parametrize(
    ("line", "resume"),
    [
        ("", None),
        ("--resume", "auto"),
        ("--resume auto --seed 1", "auto"),
        ("--resume --seed 1", "auto"),
        ("--resume runs/a", "runs/a"),
    ],
)
def test_resume_flag(line: str, resume: str | None) -> None:
    assert parse_args(line.split()).run.resume == resume


@pytest.mark.parametrize(
    ("text", "error", "words"),
    [
        ("[model]\nhiden_size = 3\n", ValueError, ["model.hiden_size", "model.hidden_size"]),
        ("[inner]\nreplication = 3\n", ValueError, ["inner.replication", "[sites]"]),
        ("top_k = 3\n", ValueError, ["top_k", "[model]"]),
        ("[modle]\ntop_k = 3\n", ValueError, ["modle", "model"]),
        ("[site]\nsites = 4\n", ValueError, ["unknown key 'site'; did you mean [sites] or run."]),
        ("sites = 4\n", TypeError, ["sites", "section"]),
        ('[sites]\nsites = "four"\n', TypeError, ["sites.sites", "whole number", "'four'"]),
        ("[sites]\nsites = 4.0\n", TypeError, ["sites.sites", "whole number"]),
        ("[sites]\nsites = true\n", TypeError, ["sites.sites", "whole number"]),
        (
            "[model]\nz_loss_coef = 0.1\n",
            ValueError,
            ["unknown key 'model.z_loss_coef'", "it is called 'model.router_z_loss_coef' now"],
        ),
        (
            "[model]\nrouter_renormalize = 1\n",
            TypeError,
            ["model.router_renormalize", "true or false"],
        ),
        (
            '[model]\nrouter_scoring = "tanh"\n',
            ValueError,
            ["model.router_scoring", "'sigmoid'", "'tanh'"],
        ),
        ("[model]\nrouter_scoring = 1\n", ValueError, ["model.router_scoring"]),
        ('[data]\ndata = "a.txt"\n', TypeError, ["data.data", "a list of"]),
        ("[data]\ndata = [1]\n", TypeError, ["data.data[0]", "a string"]),
        ("[data]\ntokenizer = 3\n", TypeError, ["data.tokenizer", "path"]),
        ("[inner]\ninner_lr = [1]\n", TypeError, ["inner.inner_lr", "a number"]),
        ("preset = 3\n", TypeError, ["preset"]),
        ('preset = "huge"\n', ValueError, ["preset", "tiny", "huge"]),
        ("[model\n", ValueError, ["TOML", "job.toml"]),
        ("[sites]\nsites = 3\n", ValueError, ["num_experts * sites.replication", "3 sites"]),
        ("[inner]\ninner_lr = nan\n", ValueError, ["inner_lr"]),
    ],
)
def test_bad_files(tmp_path: Path, text: str, error: type[Exception], words: list[str]) -> None:
    path = tmp_path / "job.toml"
    path.write_text(text)
    with pytest.raises(error) as caught:
        load_config(path)
    for word in words:
        assert word in str(caught.value)


def test_missing_and_binary_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nothing\.toml"):
        read_toml(tmp_path / "nothing.toml")
    with pytest.raises(ValueError, match="configuration file must be TOML"):
        read_toml(tmp_path)
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="configuration file must be TOML"):
        read_toml(tmp_path / "bytes.toml")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("--hiden-size 3", ["hiden-size", "--hidden-size"]),
        ("--sites four", ["four"]),
        ("--router-scoring tanh", ["tanh", "sigmoid"]),
        ("--replication 5", ["replication", "[1, 4]"]),
        ("--top-k 17", ["top_k", "num_experts"]),
        ("--sites 3", ["num_experts * sites.replication"]),
        ("--reshuffle-rounds 2", ["reshuffle_rounds", "random"]),
    ],
)
def test_bad_flags(line: str, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_args(line.split())
    assert caught.value.code == 2
    shown = " ".join(capsys.readouterr().err.replace("│", " ").split())
    for word in words:
        assert word in shown


def test_bad_preset_and_flag_without_value() -> None:
    with pytest.raises(ValueError, match="preset must be one of tiny"):
        parse_args(["--preset", "huge"])
    with pytest.raises(ValueError, match="--preset needs a value"):
        parse_args(["--seed", "1", "--preset"])


@pytest.mark.parametrize(
    ("kind", "values", "word"),
    [
        (ModelConfig, {"hidden_size": 0}, "hidden_size"),
        (ModelConfig, {"hidden_size": 130}, "num_heads"),
        (ModelConfig, {"hidden_size": 12, "num_heads": 4}, "even"),
        (ModelConfig, {"router_num_groups": 3}, "router_num_groups"),
        (ModelConfig, {"router_num_groups": 4, "router_groups_kept": 5}, "router_groups_kept"),
        (ModelConfig, {"router_num_groups": 16, "router_groups_kept": 1}, "top_k"),
        (ModelConfig, {"rope_base": 1.0}, "rope_base"),
        (ModelConfig, {"depth_multiplier": 0.0}, "depth_multiplier"),
        (ModelConfig, {"router_z_loss_coef": -1.0}, "router_z_loss_coef"),
        (DataConfig, {"validation_fraction": 1.0}, "validation_fraction"),
        (DataConfig, {"text_field": ""}, "text_field"),
        (SitesConfig, {"sites": 0}, "sites"),
        (SitesConfig, {"replication": 0}, "replication"),
        (InnerConfig, {"beta2": 1.5}, "beta2"),
        (InnerConfig, {"inner_lr": 0.0}, "inner_lr"),
        (InnerConfig, {"batch_size": 0}, "batch_size"),
        (OuterConfig, {"outer_lr": -0.1}, "outer_lr"),
        (OuterConfig, {"timeout_s": float("nan")}, "timeout_s"),
        (RunConfig, {"rounds": 0}, "rounds"),
        (RunConfig, {"steps": 0}, "steps"),
        (RunConfig, {"seed": -1}, "seed"),
        (TrainConfig, {"preset": "huge"}, "preset"),
    ],
)
def test_values_out_of_range(kind: type, values: dict, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        kind(**values)


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (ModelConfig, {"hidden_size": "a"}, "model.hidden_size must be a number, got 'a'"),
        (InnerConfig, {"batch_size": "a"}, "inner.batch_size must be a number, got 'a'"),
        (OuterConfig, {"fragments": "a"}, "outer.fragments must be an int, got 'a'"),
        (OuterConfig, {"timeout_s": "a"}, "outer.timeout_s must be a number, got 'a'"),
    ],
)
def test_values_of_other_types(kind: type, values: dict, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        kind(**values)


def test_local_adamw_needs_adamw() -> None:
    with pytest.raises(ValueError, match="local-adamw needs"):
        TrainConfig(
            outer=OuterConfig(optimizer="local-adamw"), inner=InnerConfig(inner_optimizer="sgd")
        )


def test_vocabulary_grows_to_the_tokenizers() -> None:
    config = TrainConfig()
    assert config.with_vocab(200) is config
    assert config.with_vocab(1000).model.vocab_size == 1000


def test_configuration_needs_no_torch() -> None:
    code = (
        "import sys, fomoe_ext.config.io as io\n"
        "print(io.dump_config(io.parse_args(['--top-k', '3'])))\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == dump_config(parse_args(["--top-k", "3"])).strip()


def test_renamed_keys_are_unknown_and_their_new_names_known():
    config = preset_config("tiny")
    known = {f"{name}.{key}" for name in SECTIONS for key in vars(getattr(config, name))}
    assert set(RENAMED.values()) <= known and not RENAMED.keys() & known
