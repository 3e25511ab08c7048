"""`fomoe ... | head`: a command whose reader leaves ends silently, as by SIGPIPE."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from small_job import SMALL, environment

from fomoe_ext.launch.processes import EXIT_STOPPED, _note_reader
from fomoe_ext.launch.reader import EXIT_UNREAD, ended_by_reader, has_left
from fomoe_ext.launch.signals import Interrupted


def piped(words: list[str], reader: list[str], cwd: Path) -> tuple[int, str, str]:
    """Runs `command | reader`: exit code and stderr of the command, output of the reader."""
    first = subprocess.Popen(
        [sys.executable, "-P", "-m", "fomoe_ext.cli", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        cwd=cwd,
    )
    assert first.stdout is not None
    with first.stdout as pipe:
        second = subprocess.run(reader, stdin=pipe, capture_output=True, text=True, timeout=100)
    _, said = first.communicate(timeout=100)
    return first.returncode, said, second.stdout


@pytest.mark.parametrize("words", ["plan", "info", "--help", "plan --help", "train --help"])
def test_a_command_whose_reader_leaves_ends_silently(words, tmp_path):
    code, said, _ = piped(words.split(), ["true"], tmp_path)
    assert (code, said) == (EXIT_UNREAD, "")


def test_a_command_that_is_read_to_its_end_succeeds(tmp_path):
    code, said, read = piped(["info", "--json"], ["cat"], tmp_path)
    assert (code, said) == (0, "") and read.rstrip().endswith("}")


def test_a_job_whose_reader_leaves_writes_a_checkpoint(tmp_path):
    (tmp_path / "text.txt").write_text("A text that is long enough. " * 500)
    flags = shlex.split("--sites 2 --replication 1 --rounds 3000 --data text.txt --run-dir run")
    code, said, read = piped(["train", *SMALL, *flags], ["head", "-3"], tmp_path)
    assert code == EXIT_UNREAD, said
    assert said == (
        "fomoe: nobody reads the output any more, stopping: the sites write a checkpoint "
        "(once more to stop at once)\n"
    )
    assert read.count("\n") == 3
    assert [path.name[:5] for path in (tmp_path / "run/checkpoints").iterdir()] == ["step-"]
    assert "Traceback" not in (tmp_path / "run/logs/site-1.log").read_text()


def test_a_pipe_that_is_closed_is_seen_without_writing(monkeypatch):
    reader, writer = os.pipe()
    with open(writer, "w") as stream, open(os.devnull, "w") as file:
        assert not has_left(stream) and not has_left(file) and not has_left(None)
        os.close(reader)
        assert has_left(stream)
        monkeypatch.setattr(sys, "stdout", stream)
        received, interrupted = [], [signal.SIGINT]
        for _ in range(2):
            _note_reader(received)
            _note_reader(interrupted)
        assert received == [signal.SIGPIPE] and interrupted == [signal.SIGINT]
        monkeypatch.undo()
    assert not has_left(SimpleNamespace())  # type: ignore[arg-type]
    assert EXIT_UNREAD == 141 != EXIT_STOPPED


def test_except_oserror_does_not_catch_the_end(monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as stream, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        with pytest.raises(Interrupted) as caught, ended_by_reader():
            try:
                print("x", flush=True)
            except OSError as error:
                raise AssertionError("took it") from error
        assert caught.value.exit_code == EXIT_UNREAD
        assert sys.stdout is stream
        stream.write("nowhere")
        stream.flush()
