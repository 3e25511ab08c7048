"""Checkpoints of sites of several ranks: written by 2 x 2 processes, read by any others."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from sites import pool
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from two_by_two import NAME, SHARED, no_unpickling, on_disk, rank_mesh, save, value, whole_tensors

from fomoe_ext.checkpoint import manifest as ckpt
from fomoe_ext.checkpoint import writer as checkpoint_writer
from fomoe_ext.checkpoint.manifest import CheckpointError
from fomoe_ext.checkpoint.reader import GlobalModelReader, load_state, load_tensors
from fomoe_ext.checkpoint.reader import tensor_names as names_in_checkpoint
from fomoe_ext.checkpoint.shards import read_tensors, write_tensors
from fomoe_ext.checkpoint.whole import require_whole
from fomoe_ext.files.tensors import INDEX

# ---- resharding ----------------------------------------------------------------------------------


def test_one_process_reads_what_four_wrote(saved):
    """The same names, shapes and bits, also of tensors that share memory or are not contiguous."""
    whole = whole_tensors()
    names = names_in_checkpoint(saved)
    assert {n: s for n, s in names.items() if n in whole} == {
        name: tuple(on_disk(tensor).shape) for name, tensor in whole.items()
    }
    extra = {f"{part[:4]}/{i}{part[4:]}" for i in range(4) for part in ("tied", "part", "partb")}
    assert names.keys() - whole.keys() == extra
    wanted = {name: torch.empty_like(tensor) for name, tensor in whole.items()}
    more = {name: torch.empty(6, 4) for name in extra}
    load_tensors(saved, wanted | more)
    for name, tensor in whole.items():
        assert torch.equal(wanted[name], tensor), name
    for name, tensor in more.items():
        assert torch.equal(tensor, whole["momentum/a"] + name.endswith("b")), name
    assert [load_state(saved, i) for i in range(2)] == [
        {"site": i, "loss": math.inf} for i in range(2)
    ]
    with GlobalModelReader(saved) as reader:
        assert reader.names() == [f"model.{i}" for i in range(4)]
        for name in reader.names():
            assert torch.equal(reader.tensor(name), value(name, (3, 2)))


def test_a_plain_tensor_of_many_is_written_once(saved):
    held = [
        name
        for file in (saved / "training").iterdir()
        for name in safe_open(file, framework="pt").keys()  # noqa: SIM118
    ]
    assert [held.count(f"momentum/{name}") for name in "abc"] == [1, 1, 1]
    assert held.count("site0/exp_avg/blocks.0.attention.qkv_weight") == 2


def read_sharded(process: int, num_processes: int, path: Path, num_sites: int, dim: int) -> int:
    """Reads sharded tensors as DTensors, others plain. Returns how many were compared."""
    site = process * num_sites // num_processes
    whole = whole_tensors()
    mesh = rank_mesh(num_sites)
    wanted: dict[str, Tensor] = {}
    for name, tensor in whole.items():
        if name.partition("/")[2] in SHARED and name.startswith(f"site{site % 2}/"):
            place = Shard(dim) if tensor.dim() > dim else Replicate()
            wanted[name] = distribute_tensor(torch.full_like(tensor, -1.0), mesh, [place])
        elif f"experts.{process}." in name or name.startswith("momentum/"):
            wanted[name] = torch.full_like(tensor, -1)
        if name == "momentum/a":  # plain there, sharded here
            wanted[name] = distribute_tensor(torch.full_like(tensor, -1.0), mesh, [Shard(0)])
    if process % 2 == 0:  # nothing is sent: the others need not take part
        with no_unpickling():
            load_tensors(path, wanted)
    dist.barrier()
    if process % 2:
        with no_unpickling():
            load_tensors(path, wanted)
    for name, tensor in wanted.items():
        found = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        assert torch.equal(found, whole[name]), name
    return len(wanted)


@pytest.mark.parametrize(
    "num_processes, num_sites, dim",
    [(4, 2, 0), (4, 2, 1), (4, 1, 0), (4, 1, 1), (2, 2, 0), (2, 1, 0), (3, 1, 0), (4, 4, 0)],
)
def test_other_sites_and_ranks_read_it(saved, num_processes, num_sites, dim):
    answers = pool().run(num_processes, read_sharded, saved, num_sites, dim)
    assert min(answers) >= len(SHARED) + 4


def test_four_read_what_one_process_wrote(tmp_path):
    """Written without torch.distributed; and by a world where only some have tensors."""
    names = write_tensors(tmp_path / "one", whole_tensors())
    assert sorted(p.name for p in (tmp_path / "one").iterdir()) == names
    assert pool().run(2, write_some, tmp_path / "some") == [[], names]
    for folder in ("one", "some"):
        wanted = {name: torch.empty_like(tensor) for name, tensor in whole_tensors().items()}
        read_tensors(tmp_path / folder, wanted)
        for name, tensor in whole_tensors().items():
            assert torch.equal(wanted[name], tensor), name
        answers = pool().run(4, read_folder, tmp_path / folder)
        assert answers == [len(SHARED)] * 4


def write_some(process: int, num_processes: int, folder: Path) -> list[str]:
    tensors = whole_tensors() if process == 1 else {}
    names = write_tensors(folder, tensors, process=process, num_processes=num_processes)
    return [name.replace("shard-00002", "shard-00001") for name in names]


def read_folder(process: int, num_processes: int, folder: Path) -> int:
    mesh, site = rank_mesh(2), process // 2
    wanted = {
        f"site{site}/{name}": distribute_tensor(torch.zeros(shape), mesh, [Shard(0)])
        for name, shape in SHARED.items()
    }
    read_tensors(folder, wanted)
    for name, tensor in wanted.items():
        assert torch.equal(tensor.full_tensor(), value(name, tuple(tensor.shape))), name
    return len(wanted)


def test_nothing_at_all_is_a_checkpoint_too(tmp_path):
    assert pool().run(2, write_nothing, tmp_path) == [[], []]
    path = checkpoint_writer.save_checkpoint(
        tmp_path, NAME, [("a", torch.ones(2))], {}, site=0, num_sites=1, round=0
    )
    assert names_in_checkpoint(path) == {} and load_state(path, 0) == {}
    load_tensors(path, {})
    with pytest.raises(CheckpointError, match=r"lacks \['b'\], it has no training"):
        load_tensors(path, {"b": torch.ones(2)})


def write_nothing(process: int, num_processes: int, folder: Path) -> list[str]:
    return write_tensors(folder, {}, process=process, num_processes=num_processes)


# ---- files ---------------------------------------------------------------------------------------


def test_no_pickle_is_read_and_none_is_there(saved):
    with no_unpickling():
        require_whole(saved)
        assert load_state(saved, 1)["site"] == 1
        assert names_in_checkpoint(saved)
        load_tensors(saved, {"site0/step": torch.zeros(())})
    files = {str(p.relative_to(saved)) for p in saved.rglob("*") if p.is_file()}
    assert {Path(file).suffix for file in files} == {".json", ".safetensors"}
    assert files - {ckpt.MANIFEST} == set(ckpt.read_manifest(saved).files)


def test_the_manifest_tells_who_wrote_a_file(saved):
    manifest = ckpt.read_manifest(saved)
    assert (manifest.num_sites, manifest.ranks_per_site, manifest.round) == (2, 2, 3)
    writers = {}
    for name, entry in manifest.files.items():
        if name == INDEX:
            continue
        writers.setdefault(name.split("-")[0], set()).add((entry.site, entry.rank))
        if name.startswith("training/"):
            assert name.startswith(f"training/shard-{2 * entry.site + entry.rank + 1:05d}-")
    everyone = {(0, 0), (0, 1), (1, 0), (1, 1)}
    assert writers == {"model": everyone, "training/shard": everyone, "state": {(0, 0), (1, 0)}}


def test_files_are_small(tmp_path):
    limit = 200
    assert pool().run(4, save, tmp_path, limit) == [NAME] * 4
    sizes = []
    for file in sorted((tmp_path / NAME / "training").iterdir()):
        with safe_open(file, framework="pt") as opened:
            parts = [opened.get_tensor(name).nbytes for name in opened.keys()]  # noqa: SIM118
        assert sum(parts) <= limit or len(parts) == 1, file.name
        sizes.append(sum(parts))
    assert len(sizes) > 12
    wanted = {name: torch.empty_like(tensor) for name, tensor in whole_tensors().items()}
    load_tensors(tmp_path / NAME, wanted)
    for name, tensor in whole_tensors().items():
        assert torch.equal(wanted[name], tensor), name


def test_machines_that_share_no_folder_have_their_own_files(tmp_path):
    assert pool().run(4, save, tmp_path, 1 << 30, None, True) == [NAME] * 4
    here, there = (tmp_path / f"machine-{i}" / NAME for i in range(2))
    for site, path in enumerate((here, there)):
        assert [p.name for p in path.parent.iterdir()] == [NAME]
        require_whole(path, site)
        with pytest.raises(CheckpointError, match="lacks"):
            require_whole(path)
    assert (here / ckpt.MANIFEST).read_bytes() == (there / ckpt.MANIFEST).read_bytes()
    with pytest.raises(CheckpointError, match="lacks training/shard-0000"):
        load_tensors(here, {"site0/step": torch.zeros(())})
    shutil.copytree(there, here, dirs_exist_ok=True)
    require_whole(here)
    load_tensors(here, {"site1/step": (step := torch.zeros(()))})
    assert step == 12
