"""The training state of all processes: named tensors in one folder, read back in any sharding.

Tensors are plain or DTensors. They are written and read by torch.distributed.checkpoint, every
process its own shards, to safetensors files: nothing on disk is a pickle. A file says in its header
which part of a tensor it holds, so a reader needs to know nothing of the processes that wrote it.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import LoadPlan, WriteItem
from torch.distributed.tensor import DTensor

from fomoe_ext.json_values import from_json as from_json  # also from here: what is no tensor
from fomoe_ext.json_values import to_json as to_json
from fomoe_ext.outer.groups import gather_objects

FILE_BYTES = 1 << 30
"""Bytes of tensors in a file; to write one takes up to three times its size of memory."""
_SUFFIX = ".safetensors"


class CheckpointError(RuntimeError):
    """A checkpoint that is missing, damaged, or not of this job."""


@contextmanager
def _dcp_errors(what: str) -> Iterator[None]:
    """Turns what torch.distributed.checkpoint raises on every process into CheckpointError."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            yield
    except CheckpointException as error:
        reasons = {process: reason for process, (reason, _) in error.failures.items()}
        for reason in reasons.values():
            if isinstance(reason, CheckpointError) or not isinstance(reason, Exception):
                raise reason from None
        texts = [f"process {i}: {str(e) or type(e).__name__}" for i, e in sorted(reasons.items())]
        raise CheckpointError(f"{what}: {'; '.join(texts)}") from None


def _local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor, which shares its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _stored(name: str, tensor: Tensor) -> Tensor:
    """A tensor as it is on disk, which shares its memory: of at least one dimension."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"tensor {name} must be a Tensor, got {type(tensor).__name__}")
    if isinstance(tensor, DTensor) and any(place.is_partial() for place in tensor.placements):
        raise ValueError(f"tensor {name} is a partial sum, {tensor.placements}, not a value")
    tensor = tensor.detach()
    return tensor if tensor.dim() else _local(tensor).view(1)


# ---------------------------------------------------------------------------------------- writing


class _SavePlanner(DefaultSavePlanner):
    """Makes tensors fit for safetensors, one file's at a time: contiguous, none sharing memory."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._uses = Counter(_local(t).untyped_storage().data_ptr() for t in tensors.values())

    def transform_object(self, write_item: WriteItem, object: Any) -> Tensor:
        tensor: Tensor = object.contiguous()
        return tensor.clone() if self._uses[tensor.untyped_storage().data_ptr()] > 1 else tensor


def _file_numbers(sizes: Sequence[Mapping[str, int]], limit: int) -> dict[str, int]:
    """The file, from 1, that every tensor goes to, from its bytes at each process.

    No process writes more than `limit` bytes to a file, or the file has a single tensor.
    """
    numbers: dict[str, int] = {}
    filled, number = [0] * len(sizes), 1
    for name in sorted(set().union(*sizes)):
        parts = [of.get(name, 0) for of in sizes]
        if any(old and old + new > limit for old, new in zip(filled, parts, strict=True) if new):
            filled, number = [0] * len(sizes), number + 1
        numbers[name] = number
        filled = [old + new for old, new in zip(filled, parts, strict=True)]
    return numbers


def _differing(kinds: Sequence[Mapping[str, tuple[int, str]]]) -> list[str]:
    """What processes that give a tensor of one name do not agree on: its dtype and shape."""
    first: dict[str, tuple[int, str]] = {}
    problems = []
    for process, of in enumerate(kinds):
        for name, (_, kind) in of.items():
            earlier, wanted = first.setdefault(name, (process, kind))
            if kind != wanted:
                problems.append(
                    f"process {process} has {name} as {kind}, process {earlier} as {wanted}"
                )
    return problems[:3]


@torch.no_grad()
def write_tensors(
    folder: Path,
    tensors: Mapping[str, Tensor],
    *,
    process: int = 0,
    num_processes: int = 1,
    limit: int = FILE_BYTES,
) -> list[str]:
    """Writes the tensors of all processes into a folder; returns the names of this one's files.

    A collective of the `num_processes` processes of the default group, of which this is number
    `process`; with one process torch.distributed is not needed. `tensors`: this process's; a
    DTensor is given by all processes of its mesh, a plain tensor by one, or by several with the
    same bits, of which one writes it. Tensors of no dimension are stored with shape [1]. A file has
    at most `limit` bytes of tensors, or a single one. The files are synced to disk. Raises
    CheckpointError on every process when any of them cannot write; files may be left then.
    """
    problem, stored, kinds = "", {}, {}
    try:
        stored = {name: _stored(name, tensor) for name, tensor in tensors.items()}
        kinds = {
            name: (_local(t).nbytes, f"{t.dtype} of shape {list(t.shape)}")
            for name, t in stored.items()
        }
    except (TypeError, ValueError) as error:
        problem = f"process {process}: {error}"
    gathered = gather_objects((problem, kinds), num_processes)
    problems = [text for text, _ in gathered if text] or _differing([of for _, of in gathered])
    if problems:
        raise CheckpointError("; ".join(problems))
    sizes = [{name: size for name, (size, _) in of.items()} for _, of in gathered]
    numbers = _file_numbers(sizes, limit)
    if not numbers:
        return []
    # Writes file shard-<process + 1>-model-<number>-of-<numbers>.safetensors.
    writer = HuggingFaceStorageWriter(str(folder), numbers, save_distributed=True)
    with _dcp_errors("training state"):
        dcp.save(
            stored,
            storage_writer=writer,
            planner=_SavePlanner(stored),
            no_dist=num_processes == 1,
        )
    return sorted(file.name for file in folder.glob(f"shard-{process + 1:05d}-*{_SUFFIX}"))


# ---------------------------------------------------------------------------------------- reading


def _read_metadata(folder: Path) -> Metadata:
    """What the headers of all files say."""
    try:
        return HuggingFaceStorageReader(str(folder)).read_metadata()
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        reason = error
    for file in sorted(folder.glob(f"*{_SUFFIX}")):
        try:
            safe_open(file, framework="pt")
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"cannot read {file}, it is damaged ({error})") from None
    raise CheckpointError(f"cannot read the tensors in {folder} ({reason})")


def tensor_names(folder: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors in a folder; no dimension is shape (1,).

    Raises CheckpointError for damaged files.
    """
    found = _read_metadata(folder).state_dict_metadata
    return {name: tuple(tensor.size) for name, tensor in sorted(found.items())}


def _numel_here(tensor: Tensor) -> int:
    if isinstance(tensor, DTensor) and tensor.device_mesh.get_coordinate() is None:
        return 0
    return _local(tensor).numel()


class _Reader(HuggingFaceStorageReader):
    """Reads with headers that are known, when all that is wanted is there and the files checked."""

    def __init__(
        self,
        folder: Path,
        metadata: Metadata,
        wanted: Mapping[str, Tensor],
        check_file: Callable[[Path], None],
    ) -> None:
        super().__init__(str(folder))
        self._folder, self._metadata = folder, metadata
        self._wanted, self._check_file = wanted, check_file

    def read_metadata(self) -> Metadata:
        return self._metadata

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        found: Counter[str] = Counter()
        for item in plan.items:
            found[item.dest_index.fqn] += math.prod(item.lengths)
        holes = [name for name, t in self._wanted.items() if found[name] != _numel_here(t)]
        if holes:
            raise CheckpointError(
                f"{self._folder} has not all of {len(holes)} tensors, {sorted(holes)[:3]}"
            )
        for file in sorted({self.storage_data[i.storage_index].relative_path for i in plan.items}):
            self._check_file(Path(file))
        return plan


def _check_wanted(folder: Path, metadata: Metadata, wanted: Mapping[str, Tensor]) -> None:
    found = metadata.state_dict_metadata
    missing = sorted(wanted.keys() - found.keys())
    if missing:
        raise CheckpointError(f"{folder} lacks {len(missing)} tensors, {missing[:3]}")
    for name, tensor in wanted.items():
        there = found[name].size, found[name].properties.dtype
        if there != (tensor.shape, tensor.dtype):
            raise CheckpointError(
                f"{folder}: {name} is {there[1]} of shape {list(there[0])}, wanted {tensor.dtype} "
                f"of shape {list(tensor.shape)}"
            )


@torch.no_grad()
def read_tensors(
    folder: Path,
    wanted: Mapping[str, Tensor],
    check_file: Callable[[Path], None] = lambda file: None,
) -> None:
    """Fills tensors in place from a folder that `write_tensors` wrote with any processes.

    Every process asks for what it wants, plain or as DTensors of any sharding; only those parts are
    read, and nothing is sent. `check_file` sees each file before it is read. Raises CheckpointError
    for missing tensors, other shapes or dtypes, and damaged files; tensors may be filled in part
    then.
    """
    if not wanted:
        return
    targets = {name: _stored(name, tensor) for name, tensor in wanted.items()}
    metadata = _read_metadata(folder)
    _check_wanted(folder, metadata, targets)
    with _dcp_errors(f"cannot read the tensors in {folder}"):
        dcp.load(
            dict(targets),
            storage_reader=_Reader(folder, metadata, targets, check_file),
            planner=DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
            no_dist=True,
        )
