"""The note on a vocabulary with more ids than the tokenizer produces."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import forked
import pytest

from fomoe_ext.config.io import parse_args
from fomoe_ext.config.model import count_parameters
from fomoe_ext.config.vocabulary import BYTES, vocabulary_notes
from fomoe_ext.data.text import ByteTokenizer


def test_bytes_in_a_large_vocabulary_give_one_note() -> None:
    config = parse_args(["--preset", "153m"])
    model = config.model
    unused = (200_019 - 256) * model.hidden_size
    share = f"{unused / count_parameters(model).total:.0%}"
    (note,) = vocabulary_notes(config)
    assert note == vocabulary_notes(config, ByteTokenizer.vocab_size)[0]
    assert "(bytes) use 256 of the 200019 ids" in note and f"{share} of all parameters" in note
    assert f"({unused / 1e6:.1f} million)" in note and "--vocab-size 256" in note
    assert vocabulary_notes(parse_args(["--preset", "153m", "--vocab-size", "256"])) == []
    assert vocabulary_notes(parse_args([])) == []


def test_the_number_of_bytes_is_that_of_the_byte_tokenizer() -> None:
    assert ByteTokenizer.vocab_size == BYTES


@pytest.mark.parametrize(("num_ids", "notes"), [(None, 0), (200_000, 0), (50_257, 1)])
def test_a_tokenizer_that_nearly_fills_the_vocabulary_gives_no_note(
    num_ids: int | None, notes: int
) -> None:
    config = parse_args(["--preset", "153m", "--tokenizer", "some/tokenizer.json"])
    found = vocabulary_notes(config, num_ids)
    assert len(found) == notes
    assert all("(tokenizer.json) use 50257 of" in note for note in found)


def test_a_job_prints_the_note_once(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.mkdir()
    for name in ("a", "b", "c"):
        (text / f"{name}.txt").write_text(f"some words of {name}, " * 200)
    flags = [
        *("--data", str(text), "--cache-dir", str(tmp_path / "cache")),
        *("--run-dir", str(tmp_path / "run"), "--sites", "1", "--replication", "1"),
        *("--hidden-size", "16", "--num-layers", "1", "--num-heads", "2", "--num-experts", "4"),
        *("--intermediate-size", "8", "--seq-len", "16", "--batch-size", "2", "--rounds", "1"),
        *("--local-steps", "2", "--vocab-size", "4000", "--no-tensorboard", "--eval-tokens", "32"),
    ]
    result = forked.train(*flags, env=dict(os.environ))
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("(bytes) use 256 of the 4000 ids") == 1


def test_plan_prints_the_note() -> None:
    command = [sys.executable, "-m", "fomoe_ext.cli", "plan", "--preset", "153m", "--json"]
    told = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path.cwd())
    assert told.stderr.count("--vocab-size 256 leaves them out") == 1
