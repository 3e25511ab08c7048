"""A checkpoint of two sites of two ranks: its tensors, and how the four processes write it."""

from __future__ import annotations

import math
import os
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from fomoe_ext.checkpoint import manifest as ckpt
from fomoe_ext.checkpoint import shards
from fomoe_ext.checkpoint import writer as checkpoint_writer

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
    """All tensors of two sites' training state, unsharded; each rank holds one expert."""
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
    """A context in which reading a pickle raises."""

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
    """A checkpoint of two sites of two ranks. `break_it` may change arguments or patch torch."""
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
