"""Checkpoints written in the background: their content, when they are complete, how they fail."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from sites import pool

from fomoe_ext.checkpoint import file_writer
from fomoe_ext.checkpoint import manifest as ckpt
from fomoe_ext.checkpoint import pending as pending_checkpoint
from fomoe_ext.checkpoint.pending import Outcome, PendingCheckpoint
from fomoe_ext.checkpoint.publish import clear_leftovers
from fomoe_ext.checkpoint.reader import GlobalModelReader, load_tensors
from fomoe_ext.checkpoint.whole import is_whole, newest_whole
from fomoe_ext.checkpoint.writer import CheckpointWriter

NAME = ckpt.checkpoint_name(5)


@contextmanager
def before_writing(act: Callable[[], None]) -> Iterator[None]:
    """A context in which the writing thread calls this before each file of the global model."""
    write = file_writer.write_synced

    def acting(*arguments: Any) -> Any:
        act()
        return write(*arguments)

    file_writer.write_synced = acting
    try:
        yield
    finally:
        file_writer.write_synced = write


def start(
    writer: CheckpointWriter,
    site: int = 0,
    num_sites: int = 1,
    name: str = NAME,
    copy: bool = True,
    before_last: Callable[[], object] | None = None,
) -> tuple[PendingCheckpoint, list[torch.Tensor]]:
    """Begins a checkpoint. Returns it and its tensors, which the test changes as training would.

    `before_last`: the copying thread calls it before it copies the last tensor.
    """
    model, state = torch.full((3, 4), 1.0 + site), torch.arange(4) + 10 * site

    def named() -> Iterator[tuple[str, torch.Tensor]]:
        if before_last is not None:
            before_last()
        yield f"site{site}/x", state

    pending = writer.start(
        name,
        ckpt.Process(site, num_sites),
        [(f"model.{site}", model)],
        {"site": site},
        round=2,
        meta={"job": "test"},
        named=named(),
        copy=copy,
        beside=before_last is not None,
    )
    return pending, [model, state]


def content(path: Path, site: int) -> list[float]:
    """The first element of each of a site's tensors."""
    state = torch.empty(4, dtype=torch.int64)
    load_tensors(path, {f"site{site}/x": state})
    with GlobalModelReader(path) as reader:
        return [float(reader.tensor(f"model.{site}")[0, 0]), int(state[0])]


def files_in(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def until_done(pending: PendingCheckpoint) -> Outcome:
    """Polls until the checkpoint has ended, as a training job does between its rounds."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if (outcome := pending.poll()) is not None:
            return outcome
        time.sleep(0.01)
    raise AssertionError("the checkpoint never ended")


def test_a_checkpoint_has_the_tensors_as_they_were_at_its_start(tmp_path):
    """Tensors change while it is written. The folder gets its final name when it is complete."""
    writer, go_on = CheckpointWriter(tmp_path), threading.Event()
    with before_writing(lambda: go_on.wait(30)):
        pending, tensors = start(writer)
        for tensor in tensors:
            tensor.fill_(99)
        assert pending.poll() is None and writer.pending is pending
        assert ckpt.list_checkpoints(tmp_path) == []
        with pytest.raises(RuntimeError, match="step-00000005 is still being written"):
            start(writer, name=ckpt.checkpoint_name(6))
        go_on.set()
        assert until_done(pending) == Outcome(tmp_path / NAME, 2, "")
    assert writer.pending is None and pending.poll() is None and pending.wait() is None
    assert newest_whole(tmp_path) == (tmp_path / NAME, [])
    assert content(tmp_path / NAME, 0) == [1.0, 0]
    assert [path.name for path in tmp_path.iterdir()] == [NAME]


def test_training_waits_for_the_copies_before_it_changes_tensors(tmp_path):
    """`start` does not wait for the copies; whoever changes the tensors waits for `copied`."""
    writer, go_on, freed = CheckpointWriter(tmp_path), threading.Event(), threading.Event()
    pending, (model, state) = start(writer, before_last=lambda: go_on.wait(30))

    def change() -> None:
        pending.copied.wait()
        model.fill_(99)
        state.fill_(99)
        freed.set()

    training = threading.Thread(target=change)
    training.start()
    assert not freed.wait(0.2) and pending.poll() is None
    go_on.set()
    assert freed.wait(30)
    assert until_done(pending).error == "" and content(tmp_path / NAME, 0) == [1.0, 0]
    assert pending.copied.wait(30)  # nothing is under way
    training.join()


def test_an_error_of_the_copying_thread_is_reported(tmp_path):
    """If copying fails, `copied` is set all the same: nobody waits for ever."""
    writer = CheckpointWriter(tmp_path)

    def fail() -> None:
        raise RuntimeError("no such tensor")

    pending, _ = start(writer, before_last=fail)
    pending.copied.wait()
    assert until_done(pending).error == "site 0: no such tensor"
    pending, _ = start(writer)
    assert pending.wait().error == ""
    assert [path.name for path in tmp_path.iterdir()] == [NAME]


def test_a_checkpoint_given_up_while_a_thread_copies(tmp_path):
    writer, go_on = CheckpointWriter(tmp_path), threading.Event()
    pending, _ = start(writer, before_last=lambda: go_on.wait(30))
    pending.abandon()  # does not wait
    assert pending.copied.wait(10)
    go_on.set()
    pending.wait_removed()
    assert files_in(tmp_path) == []
    pending, _ = start(writer)
    assert pending.wait().error == ""


def slow_site(site: int, num_sites: int, folder: Path) -> list[Any]:
    """Site 1 writes slowly, and the checkpoint is complete at no site before it has finished."""
    writer, go_on = CheckpointWriter(folder), threading.Event()
    with before_writing(lambda: go_on.wait(30) if site == 1 else None):
        pending, _ = start(writer, site, num_sites)
        if site == 0:
            pending._files.wait()
        early = [pending.poll() for _ in range(3)]
        go_on.set()
        return [early, pending.wait().error]


def test_a_checkpoint_is_whole_when_all_sites_have_written(tmp_path):
    assert pool().run(3, slow_site, tmp_path) == [[[None] * 3, ""]] * 3
    path, _ = newest_whole(tmp_path)
    assert [content(path, site) for site in range(3)] == [[1.0, 0], [2.0, 10], [3.0, 20]]


def full_disk(site: int, num_sites: int, folder: Path) -> list[str]:
    """Site 1 fails to write its first checkpoint; the next one, of the same name, succeeds."""
    writer = CheckpointWriter(folder)

    def refuse() -> None:
        if site == 1:
            raise OSError(28, "No space left on device")

    errors = []
    with before_writing(refuse):
        pending, _ = start(writer, site, num_sites)
        errors.append(until_done(pending).error)
    dist.barrier()
    errors.append(",".join(path.name for path in folder.iterdir()))
    dist.barrier()
    pending, _ = start(writer, site, num_sites)
    errors.append(pending.wait().error)
    return errors


def test_a_full_disk_is_reported_at_all_sites_and_leaves_nothing(tmp_path):
    answers = pool().run(2, full_disk, tmp_path)
    assert answers == [["site 1: [Errno 28] No space left on device", "", ""]] * 2
    assert newest_whole(tmp_path).path == tmp_path / NAME


def lost_site(site: int, num_sites: int, folder: Path) -> str:
    """All sites abandon the checkpoint, at different times, and begin one of the same name."""
    writer, go_on = CheckpointWriter(folder), threading.Event()
    with before_writing(lambda: go_on.wait(30)):
        pending, _ = start(writer, site, num_sites)
        if site == 0:
            dist.barrier()  # the last one to notice
        pending.abandon()
        assert writer.pending is None and pending.poll() is None
        if site != 0:
            dist.barrier()
        go_on.set()
    pending, _ = start(writer, site, num_sites)
    return pending.wait().error


def test_an_abandoned_checkpoint_does_not_disturb_the_next(tmp_path):
    assert pool().run(3, lost_site, tmp_path) == ["", "", ""]
    path, _ = newest_whole(tmp_path)
    assert [content(path, site) for site in range(3)] == [[1.0, 0], [2.0, 10], [3.0, 20]]
    assert [path.name for path in tmp_path.iterdir()] == [NAME]


def test_an_abandoned_checkpoint_leaves_nothing(tmp_path):
    writer, go_on = CheckpointWriter(tmp_path), threading.Event()
    with before_writing(lambda: go_on.wait(30)):
        pending, _ = start(writer)
        pending.abandon()  # does not wait
        go_on.set()
    pending.wait_removed()
    assert files_in(tmp_path) == []
    (tmp_path / f".{NAME}.partial/of-a-dead-site.safetensors").write_bytes(b"x")
    pending, _ = start(writer, name=ckpt.checkpoint_name(6))
    assert pending.wait().error == ""
    assert [path.name for path in tmp_path.iterdir()] == [ckpt.checkpoint_name(6)]


def test_a_checkpoint_is_dropped_when_the_number_of_processes_has_changed(tmp_path, monkeypatch):
    writer = CheckpointWriter(tmp_path)
    pending, _ = start(writer)
    monkeypatch.setattr(pending_checkpoint, "_gather_number", lambda number: [number, number])
    assert pending.poll() is None and writer.pending is None
    pending.wait_removed()
    assert files_in(tmp_path) == []


def test_leftovers_in_the_temporary_folder_are_not_reused(tmp_path):
    left = tmp_path / f".{NAME}.partial/training"
    left.mkdir(parents=True)
    (left / "shard-00007-model-00001-of-00001.safetensors").write_bytes(b"x")
    (left.parent / "model-of-00009-00001.safetensors").write_bytes(b"x")
    writer = CheckpointWriter(tmp_path)
    pending, _ = start(writer, copy=False)
    assert pending.wait().error == ""
    assert content(tmp_path / NAME, 0) == [1.0, 0]
    files = {p.relative_to(tmp_path / NAME).as_posix() for p in (tmp_path / NAME).rglob("*.*")}
    assert files == {ckpt.MANIFEST, *ckpt.read_manifest(tmp_path / NAME).files}


def test_old_checkpoints_are_removed_when_a_newer_one_is_whole(tmp_path):
    everything = CheckpointWriter(tmp_path)
    for steps in (1, 2, 3, 9):
        pending, _ = start(everything, name=ckpt.checkpoint_name(steps))
        assert pending.wait().error == ""
    (tmp_path / ckpt.checkpoint_name(3) / ckpt.MANIFEST).unlink()  # torn: it does not count
    writer = CheckpointWriter(tmp_path, keep=2)
    with before_writing(lambda: (_ for _ in ()).throw(OSError("no"))):
        pending, _ = start(writer)
        assert "no" in pending.wait().error
    names = lambda: [int(path.name[-1]) for path in ckpt.list_checkpoints(tmp_path)]
    assert names() == [1, 2, 3, 9]
    pending, _ = start(writer)
    assert pending.wait().error == ""
    assert names() == [2, 3, 5, 9]  # 9 is newer
    assert not list(tmp_path.glob(".*"))
    with pytest.raises(ValueError, match="keep must be >= 0, got -1"):
        CheckpointWriter(tmp_path, keep=-1)


def test_leftovers_of_a_killed_job_are_renamed_or_removed(tmp_path):
    """A job killed while writing, before the final rename, and between the two renames that replace
    a checkpoint."""
    writer = CheckpointWriter(tmp_path)
    for steps in (1, 2, 3):
        pending, _ = start(writer, name=ckpt.checkpoint_name(steps))
        pending.wait()
    one, two, three = ckpt.list_checkpoints(tmp_path)
    one.rename(tmp_path / f".{one.name}.partial")  # only its name is missing
    two.rename(tmp_path / f".{two.name}.old")  # the new one, not whole, is below
    shutil.copytree(three, tmp_path / f".{two.name}.partial")
    (tmp_path / f".{two.name}.partial" / ckpt.MANIFEST).unlink()
    shutil.copytree(three, tmp_path / f".{three.name}.old")
    shutil.copytree(three, tmp_path / f".{ckpt.checkpoint_name(0)}.going")
    clear_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [one.name, two.name, three.name]
    assert all(map(is_whole, (one, two, three)))
    clear_leftovers(tmp_path / "nothing")
