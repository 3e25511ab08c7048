"""Checkpoints of several ranks: a process fails while it writes; files are damaged afterwards."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from sites import pool
from torch.distributed.tensor import DTensor
from two_by_two import NAME, rank_mesh, save, value, whole_tensors

from fomoe_ext.checkpoint import manifest as ckpt
from fomoe_ext.checkpoint import shards
from fomoe_ext.checkpoint import writer as checkpoint_writer
from fomoe_ext.checkpoint.manifest import CheckpointError
from fomoe_ext.checkpoint.reader import load_tensors
from fomoe_ext.checkpoint.reader import tensor_names as names_in_checkpoint
from fomoe_ext.checkpoint.shards import read_tensors, tensor_names
from fomoe_ext.checkpoint.whole import newest_whole
from fomoe_ext.files.atomic import SEAL


def full_disk(process: int) -> dict[str, Any]:
    """Process 3 cannot write its tensors."""

    def refused(*_: Any) -> Any:
        raise OSError("no space left")

    if process == 3:
        shards.write_synced = refused
    return {}


def no_number(process: int) -> dict[str, Any]:
    return {"state": {"a": [{1, 2}]}} if process == 2 else {}


def no_state(process: int) -> dict[str, Any]:
    return {"state": None} if process == 2 else {}


def no_tensor(process: int) -> dict[str, Any]:
    return {"named": {"a": 1.5}} if process == 1 else {}


def partial_sum(process: int) -> dict[str, Any]:
    from torch.distributed.tensor import Partial

    mesh = rank_mesh(2)
    return {"named": {"a": DTensor.from_local(torch.ones(3), mesh, [Partial()])}}


def other_shape(process: int) -> dict[str, Any]:
    """The processes give different shapes for a tensor that all of them have."""
    return {"named": {"a": torch.ones(3 + process)}}


@pytest.mark.parametrize(
    "break_it, message",
    [
        (full_disk, "site 1, rank 1: no space left"),
        (no_number, r"site 1, rank 0: state\['a'\]\[0\] must be of numbers"),
        (no_state, "site 1, rank 0: state must be given by rank 0"),
        (no_tensor, "process 1: tensor a must be a Tensor, got float"),
        (partial_sum, "process 2: tensor a must not be a partial sum"),
        (other_shape, r"process 1 has a as torch.float32 of shape \[4\], process 0 as .*\[3\]"),
    ],
)
def test_a_process_that_fails_leaves_nothing_new(copied, break_it, message):
    """All processes report the same error, and the earlier checkpoint of that name is unchanged."""
    before = {p: p.read_bytes() for p in copied.rglob("*") if p.is_file()}
    answers = pool().run(4, save, copied.parent, 1 << 30, break_it)
    for answer in answers:
        assert answer.startswith("could not write checkpoint")
        with pytest.raises(AssertionError, match=message):
            raise AssertionError(answer)
    assert [p.name for p in copied.parent.iterdir()] == [NAME]
    assert {p: p.read_bytes() for p in copied.rglob("*") if p.is_file()} == before


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-8])


def flip(file: Path, at: int = -3) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)


def flip_header(file: Path) -> None:
    flip(file, 9)


def long_header(file: Path) -> None:
    flip(file, 6)


def add_stray(file: Path) -> None:
    shutil.copy(file, file.with_name("shard-00009-model-00001-of-00001.safetensors"))


@pytest.mark.parametrize("process", [1, 4])
@pytest.mark.parametrize(
    "damage, message",
    [
        (Path.unlink, "lacks training/shard-0000"),
        (truncate, "training/shard-.* must have .* bytes, got"),
        (flip, "the content of training/shard-.* is damaged"),
        (flip_header, "the header of training/shard-.* is damaged"),
        (long_header, "the header of training/shard-.* is damaged"),
        (
            add_stray,
            "shard-00009-model-00001-of-00001.safetensors in training is not in its manifest",
        ),
    ],
)
def test_damage_is_found_and_named(copied, damage, message, process):
    wanted = {name: torch.empty_like(tensor) for name, tensor in whole_tensors().items()}
    load_tensors(copied, wanted)
    (file,) = (copied / "training").glob(f"shard-{process:05d}*")
    damage(file)
    with pytest.raises(CheckpointError, match=message):
        load_tensors(copied, wanted)


def test_a_file_that_is_not_read_may_be_damaged(copied):
    """Only files that are read are checked. Listing the names needs the headers alone."""
    names = names_in_checkpoint(copied)
    (file,) = (copied / "training").glob("shard-00004*")
    flip(file)
    own = "site0/exp_avg/blocks.0.attention.qkv_weight"
    load_tensors(copied, {own: (found := torch.empty(8, 6))})
    assert torch.equal(found, value(own, (8, 6)))
    assert names_in_checkpoint(copied) == names
    with pytest.raises(CheckpointError, match=r"shard-00004.* is damaged"):
        load_tensors(copied, {"site1/exp_avg/final_norm.weight": torch.empty(9)})
    flip_header(file)
    with pytest.raises(CheckpointError, match=r"the header of .*shard-00004.* is damaged"):
        names_in_checkpoint(copied)


def test_without_a_manifest_holes_are_found(copied):
    folder = copied / "training"
    wanted = {"site1/exp_avg/final_norm.weight": torch.empty(9)}
    for file in folder.glob("shard-00003*"):
        file.unlink()
    with pytest.raises(CheckpointError, match=r"lacks parts of 1 tensors, \['site1/exp_avg/final"):
        read_tensors(folder, wanted)
    for file in folder.iterdir():
        truncate(file)
    with pytest.raises(CheckpointError, match=r"cannot read .*shard-00001.*it is damaged"):
        tensor_names(folder)
    with pytest.raises(CheckpointError, match="cannot read the tensors in"):
        read_tensors(folder / "nothing", wanted)


def test_other_names_shapes_and_types_are_refused(saved):
    for wanted, message in (
        ({"site2/step": torch.zeros(()), "x": torch.zeros(1)}, r"lacks 2 tensors, \['site2/step'"),
        ({"momentum/a": torch.zeros(4, 6)}, r"momentum/a must be .*\[4, 6\], got .*\[6, 4\]"),
        (
            {"momentum/a": torch.zeros(6, 4).bfloat16()},
            "must be torch.bfloat16 .* got torch.float32",
        ),
    ):
        with pytest.raises(CheckpointError, match=message):
            load_tensors(saved, wanted)
    with pytest.raises(ValueError, match=r"rank must be in \[0, 2\), got 2"):
        checkpoint_writer.save_checkpoint(
            saved.parent, NAME, [], {}, site=0, num_sites=1, rank=2, ranks_per_site=2, round=1
        )


def test_another_format_is_refused(copied):
    manifest = json.loads((copied / ckpt.MANIFEST).read_text())
    del manifest[SEAL]  # earlier versions sealed nothing
    (copied / ckpt.MANIFEST).write_text(json.dumps(manifest | {"format": 1}))
    with pytest.raises(CheckpointError, match="format must be 2, got 1"):
        load_tensors(copied, {})


def newest(process: int, num_processes: int, folder: Path, torn: str) -> list[Any]:
    """The newer of two checkpoints has a truncated file on the last process's machine."""
    if process == num_processes - 1:
        shutil.copytree(folder, other := folder.with_name("other"))
        folder = other
        truncate(folder / torn)
    dist.barrier()
    found = newest_whole(folder, num_processes)
    return [found.path.name if found.path else None, found.skipped]


def test_the_newest_is_one_that_all_processes_find_whole(copied):
    newer = copied.with_name(ckpt.checkpoint_name(9))
    shutil.copytree(copied, newer)
    (file,) = (newer / "training").glob("shard-00004*")
    answers = pool().run(4, newest, copied.parent, f"{newer.name}/training/{file.name}")
    for name, (reason,) in answers:
        assert name == NAME
        assert f"{newer.name}: training/{file.name} must have" in reason
    assert newest_whole(copied.parent).path == newer
