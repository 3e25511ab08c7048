"""Output on a terminal that cannot show every character."""

from __future__ import annotations

import io
import subprocess
import sys

import pytest
import small_job

from fomoe_ext.launch import console


def ascii_stream(monkeypatch: pytest.MonkeyPatch, name: str) -> io.BytesIO:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, name, io.TextIOWrapper(raw, encoding="ascii", errors="strict"))
    return raw


def test_a_character_becomes_a_similar_one(monkeypatch):
    out, err = (ascii_stream(monkeypatch, name) for name in ("stdout", "stderr"))
    console.write_any_character()
    print("a…b × ─┼ ▁█ “c” \N{SNOWMAN} \udcff", flush=True)
    print("→", file=sys.stderr, flush=True)
    assert out.getvalue() == b'a...b x -+ _# "c" ? \xff\n' and err.getvalue() == b"->\n"


def test_what_can_be_encoded_stays(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="utf-8"))
    console.outlive_terminal()
    print("…×─▁", flush=True)
    assert raw.getvalue().decode() == "…×─▁\n"


def run_ascii(*words: str) -> str:
    """The output of a command on an ASCII stream; fails unless it succeeds."""
    environment = {**small_job.environment(), "PYTHONIOENCODING": "ascii", "LC_ALL": "C"}
    done = subprocess.run(
        [sys.executable, "-P", "-m", "fomoe_ext.cli", *words],
        capture_output=True,
        env=environment,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    return done.stdout.decode("ascii")


def test_all_commands_on_an_ascii_terminal(tmp_path):
    text, run = tmp_path / "text-…-×.txt", str(tmp_path / "run")
    text.write_text("".join(f"line {number} of a text × …\n" for number in range(3000)))
    flags = ["--data", str(text), "--cache-dir", str(tmp_path / "cache"), "--run-dir", run]
    said = run_ascii("train", *small_job.SMALL, *flags, "--sites", "2", "--replication", "1")
    assert "text-...-x.txt" in said and "validation bits per byte" in said
    assert "report in" in said
    for words in (["report", run], ["report", run, run], ["plan"], ["info"], ["eval", run]):
        assert "---" in run_ascii(*words) or words == ["info"], words
    for command in ("train", "report"):  # tyro's help has boxes, argparse's has none
        assert "usage" in run_ascii(command, "--help")
