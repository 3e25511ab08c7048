"""What is wrong with a job is said before its sites start, in a sentence that names the option."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from small_run import random_model, tiny_config

import fomoe_ext
from fomoe_ext import cli
from fomoe_ext.checkpoint import manifest as ckpt
from fomoe_ext.checkpoint.writer import save_checkpoint
from fomoe_ext.config.io import parse_args, save_config
from fomoe_ext.data.sequences import open_data
from fomoe_ext.files import outputs
from fomoe_ext.launch import processes as launch
from fomoe_ext.layer.assemble import local_tensors, own_global_tensors
from fomoe_ext.placement import Placement
from fomoe_ext.train.job import job_identity

HOME = str(Path(fomoe_ext.__file__).parent.parent)
FLAGS = "--sites 2 --replication 1 --seq-len 24 --hidden-size 16 --num-layers 2 --num-heads 2 "
FLAGS += "--num-experts 8 --intermediate-size 8"
proc = pytest.mark.skipif(sys.platform != "linux", reason="/proc is a folder of nobody's files")
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


@pytest.fixture
def job(tmp_path, monkeypatch, capsys):
    """Runs `fomoe train` in a folder with some files; returns exit code, what was said and how
    often sites were started."""
    monkeypatch.chdir(tmp_path)
    for name in ("FOMOE_SECRET", "FOMOE_FAULTS", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    Path("text.txt").write_text("A text that is long enough. " * 100)
    Path("other.txt").write_text("Another text that is long enough. " * 100)
    Path("short.txt").write_text("short")
    Path("bytes.txt").write_bytes(b"\xff\xfe\x00")
    Path("a.jsonl").write_text('{"text": "x"}\n')
    Path("x.parquet").write_bytes(b"PAR1")
    Path("link").symlink_to("nowhere")
    started = []
    launched = lambda *given, **_: started.append(given) or 0
    monkeypatch.setattr("fomoe_ext.train.command.launch", launched)
    usual = {"--data": "text.txt", "--cache-dir": "cache", "--run-dir": "run"}

    def run(*flags: str) -> tuple[int, str, int]:
        given = [word for f, v in usual.items() if f not in flags for word in (f, v)]
        if "--resume" in flags:
            given = []
        try:
            code = cli.main(["train", *FLAGS.split(), *given, *flags])
        except SystemExit as end:
            code = int(end.code or 0)
        said = capsys.readouterr()
        words = " ".join((said.out + said.err).replace("│", " ").split())
        return code, words, len(started)

    return run


def test_a_good_job_starts(job):
    code, said, started = job()
    assert (code, started) == (0, 1), said
    assert not Path("run").exists()  # that is the sites' business
    assert list(Path("cache").glob("*/meta.json"))
    assert sorted(Path().glob(".*")) == []


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--data", "no.txt"], "data: no.txt does not exist"),
        (["--data", "no/*.txt"], "data: no file matches 'no/*.txt'"),
        (["--val-data", "no.txt"], "no.txt does not exist"),
        (["--data", "bytes.txt"], "bytes.txt is not UTF-8 text"),
        (["--data", "a.jsonl", "--text-field", "body"], "a.jsonl, line 1: no field 'body'"),
        (["--data", "short.txt"], "data must have at least seq_len + 1"),
        (["--tokenizer", "no.json"], "tokenizer no.json does not exist"),
        (["--tokenizer", "text.txt"], "tokenizer text.txt is not a tokenizer.json"),
        pytest.param(["--device", "cuda"], "device is cuda, but", marks=no_gpu),
        (["--run-dir", "text.txt"], "run_dir text.txt must be a folder, or a new one"),
        (["--run-dir", "text.txt/x"], "run_dir text.txt/x must be a folder"),
        (["--run-dir", "link"], "link is a link to nothing"),
        (["--run-dir", "x" * 300], "File name too long"),
        pytest.param(["--run-dir", "/proc/x"], "run_dir /proc/x: nothing can be", marks=proc),
        (["--cache-dir", "short.txt"], "cache_dir short.txt must be a folder, or a new one"),
        (["--cache-dir", "short.txt/x"], "cache_dir short.txt/x must be a folder"),
        (["--placement-file", "no.json"], "placement_file no.json does not exist"),
        (["--placement", "together", "--placement-by", "no"], "no"),
        (["--membership", "torchft", "--lighthouse", "::1:80"], "lighthouse must be HOST:PORT"),
        (["--membership", "torchft", "--lighthouse", "10.0.0.1:80"], "FOMOE_SECRET"),
        (["--config", "text.txt"], "configuration file must be TOML, got text.txt"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_mistakes_are_said_before_sites_start(job, flags, said):
    code, words, started = job(*flags)
    assert (code, started) == (2, 0), words
    assert said in words, words
    assert "checkpoint" not in words and "Errno" not in words and "Traceback" not in words
    assert len(words) < 800, words
    assert not Path("run").exists()


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("FOMOE_SECRET", "short", "FOMOE_SECRET must have at least 16"),
        ("FOMOE_FAULTS", "boom", "FOMOE_FAULTS: fault 'boom'"),
        ("TORCHELASTIC_RUN_ID", "1", "with torchrun, run -m fomoe_ext.train"),
    ],
)
def test_variables_are_looked_at_too(job, monkeypatch, variable, value, said):
    monkeypatch.setenv(variable, value)
    code, words, started = job("--membership", "torchft")
    assert (code, started) == (2, 0) and said in words


@pytest.mark.parametrize(
    ("package", "flags"),
    [
        ("pyarrow", ["--data", "x.parquet"]),
        ("tokenizers", ["--tokenizer", "text.txt"]),
    ],
)
def test_a_missing_package_takes_a_sentence(job, monkeypatch, package, flags):
    monkeypatch.setitem(sys.modules, package, None)
    code, words, started = job(*flags)
    assert (code, started) == (2, 0)
    assert f"needs {package}: pip install {package}" in words and len(words) < 200


def test_a_lighthouse_that_is_not_there_is_named_soon(job, monkeypatch):
    pytest.importorskip("torchft")
    monkeypatch.setattr("fomoe_ext.fault.lighthouse._ANSWER_S", 0.3)
    start = time.monotonic()
    code, words, started = job("--membership", "torchft", "--lighthouse", "127.0.0.1:9")
    assert (code, started) == (2, 0)
    assert "(--lighthouse) 127.0.0.1:9 does not answer (Connection refused" in words
    assert time.monotonic() - start < 5


def test_needs_no_torch(tmp_path):
    (tmp_path / "text.txt").write_text("A text that is long enough. " * 100)
    code = (
        "import sys; from fomoe_ext.train import preflight; "
        "from fomoe_ext.report.runs import job_config\n"
        "preflight.check_job(job_config(sys.argv[1:])); sys.exit('torch' in sys.modules)"
    )
    flags = [*FLAGS.split(), "--data", "text.txt", "--cache-dir", "cache", "--run-dir", "run"]
    environment = {**os.environ, "PYTHONPATH": HOME}
    words = [sys.executable, "-P", "-c", code, *flags]
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ---- what is resumed -----------------------------------------------------------------------------


@pytest.fixture
def stopped(job):
    """A run folder with a checkpoint of a job on text.txt."""
    flags = [*FLAGS.split(), "--data", "text.txt", "--cache-dir", "cache", "--run-dir", "run"]
    config = parse_args(flags)
    model = random_model(dataclasses.replace(tiny_config(), router_scope="resident"))
    data = open_data(["text.txt"], 24, cache_dir="cache")
    save_config(config, Path("run/config.toml"))
    whole = Placement.cyclic(num_sites=1, num_experts=8, num_layers=2, replication=1)
    return save_checkpoint(
        Path("run/checkpoints"),
        ckpt.checkpoint_name(8),
        own_global_tensors(model, whole, 0, local_tensors(model)),
        {"data": data.train_batches(1, site=0, num_sites=1).state_dict()},
        site=0,
        num_sites=1,
        round=2,
        meta=job_identity(config),
    )


def test_what_is_whole_and_this_jobs_is_resumed(job, stopped):
    for resume in ("run", str(stopped)):
        assert job("--resume", resume)[0] == 0


@pytest.mark.parametrize("target", ["run", "run/checkpoints/step-00000008"])
@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--hidden-size", "32"], "is of a job with hidden_size = 16, this one has 32"),
        (["--seed", "1"], "is of a job with seed = 0, this one has 1"),
        (["--data", "other.txt"], "was trained on other data"),
    ],
)
def test_another_jobs_checkpoint_is_refused(job, stopped, target, flags, said):
    code, words, started = job("--resume", target, *flags)
    assert (code, started) == (2, 0)
    assert f"--resume {target}" in words and said in words and "Errno" not in words


def test_what_is_not_whole_is_refused_by_name(job, stopped):
    state = stopped / "state-00000.json"
    state.write_bytes(state.read_bytes()[:-1])
    code, words, started = job("--resume", "run")
    assert (code, started) == (2, 0)
    assert "no whole checkpoint to resume in run" in words and "state-00000.json must have" in words
    # But where it is to begin anew if need be, it does.
    code, words, started = job("--resume", "auto", "--run-dir", "run", "--data", "text.txt")
    assert (code, started) == (0, 1), words


def test_the_sentence_about_checkpoints_is_for_jobs_that_have_one(stopped):
    said = launch._Command([], checkpoints=Path("run/checkpoints")).on_failure()
    assert "--resume" in said
    assert launch._Command([], checkpoints=Path("other/checkpoints")).on_failure() == ""
    assert launch._Command([]).on_failure() == ""


# ---- what is written -----------------------------------------------------------------------------


@proc
@pytest.mark.parametrize("name", ["--json", "--out", "--plot", "--log-dir"])
def test_commands_look_first_whether_they_can_write(name, tmp_path, capsys):
    from fomoe_ext import link
    from fomoe_ext.export import command as export

    (tmp_path / "file").touch()
    for folder in ("/proc", str(tmp_path / "file")):
        path = f"{folder}/x.svg"
        if name == "--out":
            options = SimpleNamespace(out=Path(path))
            with pytest.raises(OSError, match=f"out {path}"):
                export._out_folder(SimpleNamespace(run=tmp_path), options)  # type: ignore[arg-type]
            continue
        if name == "--log-dir":
            code = link.main(["--log-dir", path, "--", "true"])
        elif name == "--plot":
            pytest.importorskip("matplotlib")
            code = cli.main(["plan", "--plot", path])
        else:
            code = cli.main(["eval", str(tmp_path), "--json", path])
        said = capsys.readouterr().err
        assert code == 2 and folder in said and name.strip("-") in said and "Errno" not in said, (
            said
        )


def test_a_systems_error_gets_the_argument_it_is_of():
    error = PermissionError(13, "Permission denied", "/a/b/c")
    named = outputs.named
    assert named(error, {"--out": "/a/b/c"}) == "--out /a/b/c: Permission denied"
    assert named(error, {"--x": "/a", "--out": "/a/b"}) == "--out /a/b: /a/b/c: Permission denied"
    assert named(error, {"--out": "/a/b/c/d"}) == "--out /a/b/c/d: /a/b/c: Permission denied"
    assert named(error, {"--out": "/d", "--rounds": "3"}) == "/a/b/c: Permission denied"
    assert named(ValueError("all of it"), {"--out": "/a"}) == "all of it"
    assert named(OSError("all of it"), {}) == "all of it"
    words = ["run", "--out=/x", "--data", "a", "b", "--flag", "--n", "1"]
    wanted = {"argument 1": "run", "--out": "/x", "--data": "a", "argument 2": "b", "--n": "1"}
    assert outputs.options_of(words) == wanted


def test_nothing_is_left_where_it_was_tried(tmp_path):
    outputs.require_folder("x", tmp_path / "a/b")
    outputs.require_file("x", tmp_path / "a/b.json")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError, match=r"--json .*folder must be a file"):
        outputs.require_file("--json", tmp_path / "folder")
