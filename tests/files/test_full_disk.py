"""A full, failing or read-only disk does not end a job; what could not be written is reported."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import forked
import pytest
import torch
from small_run import FLAGS, finished_run

from fomoe_ext.data.sequences import open_data
from fomoe_ext.files import unwritten
from fomoe_ext.files.atomic import replace_file, write_text
from fomoe_ext.files.tensors import write_synced, write_tensors
from fomoe_ext.files.unwritten import EXIT_UNWRITTEN, AppendedFile, Unwritten, tolerant
from fomoe_ext.report import run_log
from fomoe_ext.report.metrics import MetricsFile, read_metrics, rewind_metrics
from fomoe_ext.report.run_log import RunLog

FULL = Path("/dev/full")
needs_full = pytest.mark.skipif(not FULL.exists(), reason="needs /dev/full")


@contextmanager
def full_disk(monkeypatch, number: int = errno.ENOSPC, after: int = 0):
    """A context in which appending to a file fails after `after` bytes."""

    def write(descriptor: int, data: bytes) -> int:
        part = bytes(data)[:after]
        if part:
            return real(descriptor, part)
        raise OSError(number, os.strerror(number))

    real = os.write
    with monkeypatch.context() as patch:
        patch.setattr(unwritten.os, "write", write)
        yield


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True
    )
    if made.returncode:
        pytest.skip("may not mount a file system here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(disk: Path) -> None:
    """Fills the disk to the last byte."""
    with (disk / "filling").open("ab", buffering=0) as file:
        for size in (1 << 16, 1 << 12, 1):
            try:
                while file.write(bytes(size)):
                    pass
            except OSError:
                pass


# ---- one file ------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EROFS])
def test_lines_wait_for_room(tmp_path, monkeypatch, caplog, number):
    lost, path = Unwritten(), tmp_path / "metrics.jsonl"
    file = MetricsFile(path, lost)
    file.write({"n": 1})
    with full_disk(monkeypatch, number):
        file.write({"n": 2})
        file.write({"n": 3})
        assert lost.entries() == [f"{path} (2 records): {os.strerror(number)}"]
        assert [record["n"] for record in read_metrics(path)] == [1]
    file.write({"n": 4})
    assert [record["n"] for record in read_metrics(path)] == [1, 2, 3, 4]
    assert lost.entries() == []
    assert caplog.text.count(f"could not write {path}, going on") == 1  # told once
    file.close()


def test_a_partly_written_line_is_removed(tmp_path, monkeypatch):
    lost, path = Unwritten(), tmp_path / "metrics.jsonl"
    file = AppendedFile(path, lost)
    file.write(b"one\n")
    with full_disk(monkeypatch, after=2), monkeypatch.context() as patch:
        real = os.write
        calls = iter([True, False])
        patch.setattr(
            unwritten.os,
            "write",
            lambda fd, data: real(fd, data) if next(calls, False) else _no_room(),
        )
        file.write(b"two\n")
    assert path.read_bytes() == b"one\n"
    file.write(b"three\n")
    file.close()
    assert path.read_bytes() == b"one\ntwo\nthree\n"


def _no_room() -> int:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_tensorboard_events_wait_for_room(tmp_path, monkeypatch):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    lost = Unwritten()
    record = {"round": 1, "step": 3, "loss": 2.5, "bits_per_byte": 1.0}
    with RunLog(tmp_path, total_rounds=2, local_steps=3, unwritten=lost, console=_silent()) as log:
        with full_disk(monkeypatch):
            log.validation(record)
            log.validation({**record, "step": 6})
        names = " ".join(lost.entries())
        assert "metrics.jsonl (2 records)" in names and "tfevents" in names and "2 events" in names
        log.flush()
        assert lost.entries() == []
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("validation/loss")] == [(3, 2.5), (6, 2.5)]


def test_tensorboard_replaces_events_of_repeated_steps(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for first_step, value in ((0, 1.0), (3, 2.0)):
        log = RunLog(
            tmp_path, total_rounds=2, local_steps=3, first_step=first_step, console=_silent()
        )
        with log:
            for step in (3, 6)[first_step // 3 :]:
                log.event("x", step=step, v=value)
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("x/v")] == [(3, 1.0), (6, 2.0)]


def _silent():
    return run_log.Console(file=io.StringIO())


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_failed_replacement_leaves_the_old_file_and_names_it(tmp_path, monkeypatch, number):
    path = tmp_path / "report.json"
    write_text(path, "old")

    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    for name in ("write_text", "fsync"):
        with monkeypatch.context() as patch:
            owner = Path if name == "write_text" else os
            patch.setattr(owner, name, fail)
            with pytest.raises(OSError, match=r"report.json") as caught:
                write_text(path, "new")
        assert caught.value.errno == number and caught.value.filename == str(path)
        assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == [path.name]


def test_errors_of_tensors_name_their_file(small_disk):
    fill(small_disk)
    tensor = torch.zeros(100_000)
    with pytest.raises(OSError, match=r"a.safetensors"):
        write_synced(small_disk / "a.safetensors", {"a": tensor}, {})
    with pytest.raises(OSError, match=str(small_disk)):
        write_tensors(small_disk, [("a", tensor)], 1 << 30)
    with pytest.raises(OSError, match=r"c"), replace_file(small_disk / "c") as temporary:
        temporary.write_bytes(b"1" * 5000)
    assert not (small_disk / "c").exists()


def test_rewinding_takes_no_room(small_disk):
    path = small_disk / "metrics.jsonl"
    file = MetricsFile(path)
    for step in range(200):
        file.write({"kind": "round", "step": step, "loss": 1.5})
    file.close()
    fill(small_disk)
    rewind_metrics(path, 99)
    assert [record["step"] for record in read_metrics(path)] == [*range(100)]


def test_tokens_are_kept_in_memory_where_there_is_no_room_for_a_cache(tmp_path, small_disk):
    (tmp_path / "a.txt").write_text("some words and more of them, " * 4000)
    wanted = open_data([str(tmp_path / "a.txt")], 16, cache_dir=tmp_path / "cache")
    fill(small_disk)
    data = open_data([str(tmp_path / "a.txt")], 16, cache_dir=small_disk / "cache")
    assert data.content_hash == wanted.content_hash and data.uncached is not None
    assert data.uncached[0].startswith(str(small_disk)) and "space" in data.uncached[1]
    for batch, other in zip(range(3), data.train_batches(4, site=0, num_sites=1), strict=False):
        assert other.shape == (4, 17), batch
    one = {"batch_size": 1, "site": 0, "num_sites": 1}
    assert torch.equal(next(data.train_batches(**one)), next(wanted.train_batches(**one)))
    assert list((small_disk / "cache").glob("*/meta.json")) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"cache_dir .*file must be a folder"):
        open_data([str(tmp_path / "a.txt")], 16, cache_dir=tmp_path / "file")


@needs_full
def test_print_to_a_full_disk_does_not_raise():
    program = """
import sys
from fomoe_ext.files.unwritten import Unwritten, tolerant_output
lost = Unwritten()
with tolerant_output(lost):
    for _ in range(3000):
        print("a line of a log", flush=True)
print(lost.entries(), file=sys.stderr)
import os
os._exit(7)
"""
    with FULL.open("w") as full:
        done = subprocess.run(
            [sys.executable, "-P", "-c", program], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert done.returncode == 7 and done.stderr == "['/dev/full: No space left on device']\n"


@needs_full
def test_a_tolerant_stream_passes_calls_through(tmp_path):
    with (tmp_path / "out").open("w") as file:
        stream = tolerant(file, Unwritten())
        assert stream.fileno() == file.fileno() and stream.write("text") == 4
        stream.flush()
    assert (tmp_path / "out").read_text() == "text"


# ---- a job ---------------------------------------------------------------------------------------


def job(run: Path, *more: str):
    text = finished_run().parent / "text"
    flags = ["--data", str(text / "*.py"), "--cache-dir", str(text / "cache")]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return forked.train(*FLAGS, *flags, "--run-dir", str(run), *more, env=env)


def test_a_disk_that_is_full_from_the_first_rounds_on(small_disk, monkeypatch):
    """With a checkpoint after every round. The files that are missing are named, and the report is
    shown on the terminal."""
    run = small_disk / "run"
    (small_disk / "filling").write_bytes(bytes((1 << 20) - (300 << 10)))
    result = job(run, "--checkpoint-rounds", "1", "--tensorboard", "--no-async-checkpoints")
    assert result.returncode == EXIT_UNWRITTEN, result.stdout + result.stderr
    assert "Traceback" not in result.stderr and "were ended" not in result.stderr
    said = result.stderr.partition("could not be written:\n")[2]
    assert f"{run}/checkpoints/step-00000024: " in said and "No space left on device" in said
    assert "round    6/6  validation" in result.stdout
    assert "validation bits per byte" in result.stdout
    # A folder with a final name is complete.
    whole = [p for p in (run / "checkpoints").iterdir() if not p.name.startswith(".")]
    for checkpoint in whole:
        assert (checkpoint / "manifest.json").stat().st_size
    (small_disk / "filling").unlink()
    for path in (run / "checkpoints").glob(".*"):
        shutil.rmtree(path)
    read_metrics(run / "metrics.jsonl")


def test_a_last_checkpoint_and_a_report_that_cannot_be_written(tmp_path):
    """The job ends with an error code, after everything else has been written."""
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "checkpoints/.step-00000024.partial").write_text("in the way")
    (run / "report.json").mkdir()
    (run / "report.md").mkdir()
    result = job(run)
    assert result.returncode == EXIT_UNWRITTEN, result.stdout + result.stderr
    assert f"could not write checkpoint {run}/checkpoints/step-00000024" in result.stderr
    said = result.stderr.partition("could not be written:\n")[2]
    for name in ("checkpoints/step-00000024", "report.json", "report.md"):
        assert f"  {run}/{name}: " in said
    assert "report in" not in result.stdout
    assert "round    6/6  validation" in result.stdout
    assert "validation bits per byte" in result.stdout
    kinds = [record["kind"] for record in read_metrics(run / "metrics.jsonl")]
    assert kinds.count("round") == 6 and kinds[-3:] == ["checkpoint_failed", "validation", "end"]


def test_an_earlier_checkpoint_that_cannot_be_written(tmp_path):
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "checkpoints/.step-00000012.partial").write_text("in the way")
    result = job(run)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "step-00000012: " in result.stderr and "(but a later one was)" in result.stderr
    assert json.loads((run / "report.json").read_text())["sites"][0]["checkpoints_failed"] == 1
