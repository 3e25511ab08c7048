"""Checkpoints of sites of several ranks: written by 2 x 2 processes, read by any others."""

from __future__ import annotations

import json
import math
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from sites import pool
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from fomoe_ext.checkpoint import manifest as ckpt
from fomoe_ext.checkpoint import shards
from fomoe_ext.checkpoint import writer as checkpoint_writer
from fomoe_ext.checkpoint.reader import GlobalModelReader, load_state, load_tensors
from fomoe_ext.checkpoint.reader import tensor_names as names_in_checkpoint
from fomoe_ext.checkpoint.shards import (
    CheckpointError,
    read_tensors,
    tensor_names,
    write_tensors,
)
from fomoe_ext.checkpoint.whole import newest_whole, require_whole
from fomoe_ext.files.atomic import SEAL
from fomoe_ext.files.tensors import INDEX

NAME = ckpt.checkpoint_name(7)
SHARED = {
    "exp_avg/blocks.0.attention.qkv_weight": (8, 6),
    "exp_avg/blocks.0.attention.out_weight": (7, 3),  # uneven shards
    "exp_avg/blocks.0.norm.weight": (1, 5),  # an empty shard
    "exp_avg/final_norm.weight": (9,),
}
"""Names after "site<s>/" and shapes of tensors that are sharded over a site's ranks."""


def value(name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """What a tensor of this name holds, the same in every process."""
    seed = sum((i + 1) * ord(letter) for i, letter in enumerate(name))
    numbers = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 1000
    return numbers.to(dtype)


def whole_tensors() -> dict[str, Tensor]:
    """All tensors of two sites' training state, whole; one expert is on each rank."""
    found = {}
    for site in range(2):
        for name, shape in SHARED.items():
            found[f"site{site}/{name}"] = value(f"site{site}/{name}", shape)
        for expert in range(2):
            name = f"site{site}/exp_avg/blocks.0.moe.experts.{2 * site + expert}.expand_weight"
            found[name] = value(name, (4, 6))
        found[f"site{site}/step"] = torch.tensor(float(11 + site))
        found[f"site{site}/tokens"] = value(f"site{site}/tokens", (2, 3), torch.int64)
    for name, dtype in (("a", torch.float32), ("b", torch.bfloat16), ("c", torch.bool)):
        found[f"momentum/{name}"] = value(f"momentum/{name}", (6, 4), dtype)
    found["momentum/empty"] = torch.zeros(0, 4)
    return found


def on_disk(tensor: Tensor) -> Tensor:
    return tensor if tensor.dim() else tensor.view(1)


def rank_mesh(num_sites: int) -> DeviceMesh:
    """The ranks of this process's site, a part of the world."""
    ranks = dist.get_world_size() // num_sites
    mesh = init_device_mesh("cpu", (num_sites, ranks), mesh_dim_names=("site", "rank"))
    return mesh["rank"]


def tensors_of_rank(process: int) -> dict[str, Tensor]:
    """What process site * 2 + rank of 2 x 2 gives to `write_tensors`."""
    mesh, site, whole = rank_mesh(2), process // 2, whole_tensors()
    own: dict[str, Tensor] = {}
    for name, tensor in whole.items():
        if name.partition("/")[2] in SHARED:
            if name.startswith(f"site{site}/"):
                own[name] = distribute_tensor(tensor, mesh, [Shard(0)])
        elif "experts" in name:
            if f"experts.{process}." in name:
                own[name] = tensor.t().contiguous().t()  # not contiguous
        elif name.startswith((f"site{site}/", "momentum/")):
            own[name] = tensor
    tied = whole["momentum/a"]
    own["momentum/a"], own[f"tied/{process}"] = tied, tied  # one memory under two names
    both = torch.stack([tied, tied + 1])
    own[f"part/{process}"], own[f"part/{process}b"] = both[0], both[1]  # parts of one memory
    return own


@contextmanager
def no_unpickling() -> Iterator[None]:
    """Inside, whatever reads a pickle raises."""

    def refused(*_: Any, **__: Any) -> Any:
        raise AssertionError("a pickle is read")

    kept = pickle.load, pickle.loads, pickle.Unpickler, torch.load
    pickle.load = pickle.loads = pickle.Unpickler = torch.load = refused
    try:
        yield
    finally:
        pickle.load, pickle.loads, pickle.Unpickler, torch.load = kept


def save(
    process: int,
    num_processes: int,
    folder: Path,
    shard_bytes: int = 1 << 30,
    break_it: Callable[[int], dict[str, Any]] | None = None,
    machines: bool = False,
) -> str:
    """A checkpoint of two sites of two ranks. `break_it` may change arguments, or torch."""
    site, rank = divmod(process, 2)
    if machines:
        folder = folder / f"machine-{site}"
        os.environ["LOCAL_RANK"] = str(rank)
    arguments: dict[str, Any] = {
        "state": {"site": site, "loss": math.inf} if rank == 0 else None,
        "named": tensors_of_rank(process),
        "tensors": [(f"model.{process}", value(f"model.{process}", (3, 2)))],
    }
    write = shards.write_synced
    try:
        arguments |= break_it(process) if break_it is not None else {}
        path = checkpoint_writer.save_checkpoint(
            folder,
            NAME,
            arguments["tensors"],
            arguments["state"],
            named=arguments["named"],
            site=site,
            num_sites=2,
            rank=rank,
            ranks_per_site=2,
            round=3,
            shard_bytes=shard_bytes,
        )
    except ckpt.CheckpointError as error:
        return str(error)
    finally:
        shards.write_synced = write
        os.environ.pop("LOCAL_RANK", None)
    return path.name


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A checkpoint of 2 x 2 processes. Not to be changed."""
    folder = tmp_path_factory.mktemp("saved")
    assert pool().run(4, save, folder) == [NAME] * 4
    return folder / NAME


@pytest.fixture
def copied(saved, tmp_path) -> Path:
    shutil.copytree(saved, tmp_path / NAME)
    return tmp_path / NAME


# ---- resharding ----------------------------------------------------------------------------------


def test_one_process_reads_what_four_wrote(saved):
    """Names, shapes, bits; the bits of tensors that share memory or are not contiguous too."""
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
    """Reads sharded tensors as DTensors, others plain, and compares; how many were compared."""
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
    """Written without torch.distributed; and by a world of which only some give tensors."""
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


# ---- failures ------------------------------------------------------------------------------------


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
    """The processes do not agree on a tensor that all of them give."""
    return {"named": {"a": torch.ones(3 + process)}}


@pytest.mark.parametrize(
    "break_it, message",
    [
        (full_disk, "site 1, rank 1: no space left"),
        (no_number, r"site 1, rank 0: state\['a'\]\[0\] must be of numbers"),
        (no_state, "site 1, rank 0: state must be given by rank 0"),
        (no_tensor, "process 1: tensor a must be a Tensor, got float"),
        (partial_sum, "process 2: tensor a is a partial sum"),
        (other_shape, r"process 1 has a as torch.float32 of shape \[4\], process 0 as .*\[3\]"),
    ],
)
def test_a_process_that_fails_leaves_nothing_new(copied, break_it, message):
    """All processes say the same, and the checkpoint of that name that was there stays."""
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
        (truncate, "training/shard-.* has .* bytes, wanted"),
        (flip, "the content of training/shard-.* is damaged"),
        (flip_header, "the header of training/shard-.* is damaged"),
        (long_header, "the header of training/shard-.* is damaged"),
        (add_stray, "shard-00009-model-00001-of-00001.safetensors in training is not its own"),
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
    """What is read decides, not the whole checkpoint; the list of names is in the headers."""
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
    with pytest.raises(CheckpointError, match=r"has not all of 1 tensors, \['site1/exp_avg/final"):
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
        ({"momentum/a": torch.zeros(4, 6)}, r"momentum/a is .*\[6, 4\], wanted .*\[4, 6\]"),
        ({"momentum/a": torch.zeros(6, 4).bfloat16()}, "is torch.float32 .* wanted torch.bfloat16"),
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
    with pytest.raises(CheckpointError, match="has format 1, this version reads 2"):
        load_tensors(copied, {})


def newest(process: int, num_processes: int, folder: Path, torn: str) -> list[Any]:
    """With a copy of the newer checkpoint whose file is torn on the last process's machine."""
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
        assert f"{newer.name}: training/{file.name} has" in reason
    assert newest_whole(copied.parent).path == newer
