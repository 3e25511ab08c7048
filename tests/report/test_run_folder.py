"""Folders that somebody writes into belong to one job at a time, and say whose they are."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import forked
import pytest
from small_run import finished_run

from fomoe_ext.checkpoint import manifest as ckpt
from fomoe_ext.checkpoint.publish import keep_newest, reading
from fomoe_ext.config.io import save_config
from fomoe_ext.export.command import ExportOptions, export
from fomoe_ext.export.source import find_source
from fomoe_ext.files import folder_lock
from fomoe_ext.files.atomic import replace_file, write_text
from fomoe_ext.files.folder_lock import LOCK, InUse, hold
from fomoe_ext.report import runs

HOLDER = """
import sys, time
from pathlib import Path
from fomoe_ext.files.folder_lock import hold
held = hold(Path(sys.argv[1]), "run_dir", sys.argv[2] if len(sys.argv) > 2 else None)
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def holder():
    """Starts processes that hold a folder."""
    started = []

    def start(folder: Path, *job: str) -> subprocess.Popen[str]:
        words = [sys.executable, "-P", "-c", HOLDER, str(folder), *job]
        process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_a_folder_in_use_names_who_has_it_and_a_dead_owner_is_followed(tmp_path, holder):
    owner = holder(tmp_path)
    with pytest.raises(InUse) as caught:
        hold(tmp_path, "run_dir")
    said = f"run_dir {tmp_path} is in use by process {owner.pid} on {socket.gethostname()} since 20"
    assert str(caught.value).startswith(said)
    owner.kill()
    owner.wait()
    held = hold(tmp_path, "run_dir")
    assert json.loads((tmp_path / LOCK).read_text())["process"] == os.getpid()
    held.release()
    assert (tmp_path / LOCK).read_text() == ""
    held.release()  # twice is as once


def test_processes_of_one_job_share_it_and_keep_it_for_each_other(tmp_path, holder):
    first, second = holder(tmp_path, "job"), holder(tmp_path, "job")
    first.kill()  # who came first is gone; the job is not
    first.wait()
    with pytest.raises(InUse, match="in use by process"):
        hold(tmp_path, "run_dir")
    hold(tmp_path, "run_dir", "job").release()
    second.kill()
    second.wait()
    hold(tmp_path, "run_dir").release()


@pytest.mark.skipif(folder_lock.fcntl is None, reason="needs flock")
def test_the_kernel_knows_it_where_the_file_says_nothing(tmp_path, holder):
    """As on a disk that is full from the start."""
    holder(tmp_path)
    (tmp_path / LOCK).write_text("")
    with pytest.raises(InUse, match="is in use by another process"):
        hold(tmp_path, "run_dir")


@pytest.mark.parametrize("locks", [True, False], ids=["flock", "no flock"])
def test_a_process_of_another_machine_is_watched_for_signs_of_life(
    tmp_path, monkeypatch, caplog, locks
):
    """Where flock does not reach that far."""
    monkeypatch.setattr(folder_lock, "_BEAT_S", 0.05)
    if not locks:
        monkeypatch.setattr(folder_lock, "fcntl", None)
    record = {"process": 7, "host": "far", "since": "2026-01-01 00:00:00", "job": "x"}
    (tmp_path / LOCK).write_text(json.dumps(record))
    stop = threading.Event()

    def live() -> None:
        while not stop.wait(0.02):
            os.utime(tmp_path / LOCK)

    beating = threading.Thread(target=live)
    beating.start()
    try:
        with pytest.raises(InUse, match="in use by process 7 on far since 2026-01-01 00:00:00"):
            hold(tmp_path, "run_dir")
    finally:
        stop.set()
        beating.join()
    before = (tmp_path / LOCK).stat().st_mtime_ns
    hold(tmp_path, "run_dir").release()
    assert "waiting" in caplog.text
    # Our own sign of life.
    held = hold(tmp_path, "run_dir")
    time.sleep(0.2)
    assert (tmp_path / LOCK).stat().st_mtime_ns > before
    held.release()


def test_without_flock_the_processes_number_and_start_decide(tmp_path, monkeypatch, holder):
    owner = holder(tmp_path)
    monkeypatch.setattr(folder_lock, "fcntl", None)
    with pytest.raises(InUse, match=f"process {owner.pid} on"):
        hold(tmp_path, "run_dir")
    record = json.loads((tmp_path / LOCK).read_text())
    if record["started"]:  # a later process of the same number
        (tmp_path / LOCK).write_text(json.dumps({**record, "started": "another boot 1"}))
        hold(tmp_path, "run_dir").release()


def test_a_torn_lock_file_holds_nobody_up(tmp_path):
    (tmp_path / LOCK).write_bytes(b'{"process": 1')
    hold(tmp_path, "run_dir").release()


@pytest.fixture
def seconds_stand_still(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runs.time, "strftime", lambda form: "20260101-000000")


def test_two_jobs_of_the_same_second_have_a_folder_each(seconds_stand_still):
    first, second = (runs.find_job(["--sites", "2"]) for _ in range(2))
    assert first.config.run.run_dir == second.config.run.run_dir
    with runs.claimed(first) as one, runs.claimed(second) as other:
        names = [config.run.run_dir.name for config in (one, other)]
        assert names == ["tiny-20260101-000000", "tiny-20260101-000000-2"]
        assert all(Path("runs", name).is_dir() for name in names)
    # Nothing came of them.
    assert list(Path("runs").iterdir()) == []


def test_a_named_folder_is_refused_while_another_job_has_it(tmp_path, holder):
    run = tmp_path / "run"
    job = runs.find_job(["--run-dir", str(run)])
    with runs.claimed(job):
        with pytest.raises(InUse, match=f"run_dir {run} is in use by process {os.getpid()}"):
            runs.claim(job)
        (run / "something").write_text("")
    assert run.is_dir()
    save_config(job.config, run / "config.toml")
    holder(run)
    for args in (["--resume", str(run)], ["--resume", "auto", "--run-dir", str(run)]):
        with pytest.raises(InUse), runs.claimed(runs.find_job(args)):
            pass


def test_an_empty_folder_of_the_users_stays(tmp_path):
    with runs.claimed(runs.find_job(["--run-dir", str(tmp_path)])):
        pass
    assert tmp_path.is_dir()


def test_a_job_does_not_touch_a_folder_in_use(tmp_path, holder):
    """Above all not its checkpoints."""
    run = tmp_path / "run"
    shutil.copytree(finished_run(), run)
    before = sorted(run.rglob("*"))
    holder(run)
    flags = ["--resume", "auto", "--run-dir", str(run), "--keep-checkpoints", "1"]
    result = forked.train(*flags, "--rounds", "8")
    assert result.returncode == 2 and "is in use by process" in result.stderr, result.stderr
    assert sorted(run.rglob("*")) == before


def test_a_checkpoint_that_is_being_read_is_removed_another_time(tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished_run(), run)
    oldest, newest = ckpt.list_checkpoints(run / "checkpoints")
    source = find_source(oldest)
    keep_newest(newest, 1, 0)
    assert oldest.is_dir()
    del source
    other = reading(newest)  # of another one
    keep_newest(newest, 1, 0)
    other.close()
    assert not oldest.exists() and newest.is_dir()


def test_two_exports_to_one_folder(tmp_path, monkeypatch):
    source, out = find_source(finished_run()), tmp_path / "out"
    options = ExportOptions(run=source.run, format="safetensors", out=out)
    leftover = tmp_path / ".out.partial"
    (leftover / "old").mkdir(parents=True)  # of one that was killed
    from fomoe_ext.export import command as module

    write, said = module._write_folder, []

    def at_once(*given):
        with pytest.raises(InUse) as caught:
            export(source, options)
        said.append(str(caught.value))
        return write(*given)

    monkeypatch.setattr(module, "_write_folder", at_once)
    export(source, options)
    assert f"is in use by process {os.getpid()}" in said[0]
    assert sorted(p.name for p in out.iterdir()) == [
        "checksums.json",
        "config.toml",
        "model.safetensors",
    ]
    assert not leftover.exists()


def test_temporary_names_are_of_one_write(tmp_path):
    """Processes of two machines can have the same number."""
    path = tmp_path / "file"
    with replace_file(path) as one, replace_file(path) as other:
        assert one != other
        one.write_text("one")
        other.write_text("other")
    assert path.read_text() == "one"
    write_text(path, "three")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
