"""Named tensors of all processes in one folder: written in shards, read in any other sharding.

Tensors are plain tensors or DTensors. Every process writes its own shards, without communication,
to safetensors files in the format of torch.distributed.checkpoint; no file is a pickle. A file's
header records which part of a tensor it holds, so a reader needs no knowledge of the writers.
"""

from __future__ import annotations

import json
import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import LoadPlan
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from fomoe_ext.checkpoint.manifest import CheckpointError
from fomoe_ext.files.tensors import WrittenFile, write_synced
from fomoe_ext.launch.messages import gather_objects

FILE_BYTES = 1 << 30
"""Bytes of tensors in a file."""
_SUFFIX = ".safetensors"


@contextmanager
def _dcp_errors(what: str) -> Iterator[None]:
    """Turns errors of torch.distributed.checkpoint into CheckpointError."""
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
    """The tensor as it is stored: a scalar becomes shape (1,). It shares the memory."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"tensor {name} must be a Tensor, got {type(tensor).__name__}")
    if isinstance(tensor, DTensor) and any(place.is_partial() for place in tensor.placements):
        raise ValueError(f"tensor {name} must not be a partial sum, got {tensor.placements}")
    tensor = tensor.detach()
    return tensor if tensor.dim() else _local(tensor).view(1)


# ---------------------------------------------------------------------------------------- writing


class TensorPart(NamedTuple):
    """A part of a tensor, with at least one dimension, and its offsets in the whole tensor."""

    tensor: Tensor
    offsets: tuple[int, ...]


def shard_of(name: str, tensor: Tensor) -> TensorPart | None:
    """The part of a tensor that this process writes; it shares the tensor's memory.

    Of a plain tensor all. Of a DTensor the local shard, or None if this process writes nothing: it
    is not in the mesh, its shard is empty, or another process has the same shard (the first along
    replicated mesh dimensions writes). Raises TypeError for another type, ValueError for a partial
    sum.
    """
    stored = _stored(name, tensor)
    if not isinstance(tensor, DTensor):
        return TensorPart(stored, (0,) * stored.dim())
    mesh, placements = tensor.device_mesh, tensor.placements
    places = mesh.get_coordinate()
    if places is None or any(
        at and place.is_replicate() for at, place in zip(places, placements, strict=True)
    ):
        return None
    if not tensor.dim():
        return TensorPart(stored, (0,))
    _, offsets = compute_local_shape_and_global_offset(tensor.shape, mesh, placements)
    local = _local(stored)
    if not local.numel() and (tensor.numel() or any(places)):
        return None
    return TensorPart(local, tuple(offsets))


def _in_files(shards: Mapping[str, TensorPart], limit: int) -> list[dict[str, TensorPart]]:
    """Splits shards into files of at most `limit` bytes; a larger shard has its own file."""
    files: list[dict[str, TensorPart]] = []
    filled = 0
    for name, shard in sorted(shards.items()):
        if not files or filled + shard.tensor.nbytes > limit:
            files.append({})
            filled = 0
        files[-1][name] = shard
        filled += shard.tensor.nbytes
    return files


def write_shards(
    folder: Path, shards: Mapping[str, TensorPart], *, process: int = 0, limit: int = FILE_BYTES
) -> Iterator[tuple[str, WrittenFile]]:
    """Writes this process's shards into a folder, in the format that HuggingFaceStorageReader of
    torch.distributed.checkpoint reads; yields each file's name when it is written and synced.

    A file has at most `limit` bytes of tensors, or a single tensor. File names contain the number
    `process`. Raises OSError, and ValueError for a dtype that cannot be stored.
    """
    files = _in_files(shards, limit)
    for number, held in enumerate(files, 1):
        offsets = {name: {"saved_offsets": list(shard.offsets)} for name, shard in held.items()}
        metadata = {"format": "pt", "DCP_SHARDING_INFO": json.dumps(offsets)}
        name = f"shard-{process + 1:05d}-model-{number:05d}-of-{len(files):05d}{_SUFFIX}"
        tensors = {key: shard.tensor for key, shard in held.items()}
        yield name, write_synced(folder / name, tensors, metadata)


def _differing(kinds: Sequence[Mapping[str, str]]) -> list[str]:
    """Tensors for which processes pass different dtypes or shapes, as text."""
    first: dict[str, tuple[int, str]] = {}
    problems = []
    for process, of in enumerate(kinds):
        for name, kind in of.items():
            earlier, wanted = first.setdefault(name, (process, kind))
            if kind != wanted:
                problems.append(
                    f"process {process} has {name} as {kind}, process {earlier} as {wanted}"
                )
    return problems[:3]


@torch.no_grad()
def only_once(
    tensors: Mapping[str, Tensor], *, process: int = 0, num_processes: int = 1
) -> dict[str, Tensor]:
    """The tensors that this process writes, of those that it passes; a collective.

    All processes of its mesh pass a DTensor; one process passes a plain tensor. If several pass the
    same plain tensor, with equal bits, the first of them writes it. Raises CheckpointError on every
    process if any passes something else, or if two differ in a tensor's dtype or shape.
    """
    problem, kinds, parts = "", {}, []
    try:
        for name, tensor in tensors.items():
            stored, part = _stored(name, tensor), shard_of(name, tensor)
            kinds[name] = f"{stored.dtype} of shape {list(stored.shape)}"
            if part is not None:
                parts.append((name, part.offsets))
    except (TypeError, ValueError) as error:
        problem = f"process {process}: {error}"
    gathered = gather_objects((problem, kinds, parts), num_processes)
    problems = [text for text, _, _ in gathered if text] or _differing([k for _, k, _ in gathered])
    if problems:
        raise CheckpointError("; ".join(problems))
    before = {part for _, _, of_process in gathered[:process] for part in of_process}
    return {name: tensors[name] for name, offsets in parts if (name, offsets) not in before}


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
    `process`; one process needs no torch.distributed. `tensors`: as for `only_once`. Scalars are
    stored with shape [1]. Raises the errors of `only_once` and `write_shards`.
    """
    own = only_once(tensors, process=process, num_processes=num_processes)
    shards = {name: shard_of(name, tensor) for name, tensor in own.items()}
    folder.mkdir(parents=True, exist_ok=True)
    given = {name: shard for name, shard in shards.items() if shard is not None}
    return [name for name, _ in write_shards(folder, given, process=process, limit=limit)]


# ---------------------------------------------------------------------------------------- reading


def _read_metadata(folder: Path) -> Metadata:
    """The metadata in the headers of all files."""
    try:
        return HuggingFaceStorageReader(str(folder)).read_metadata()
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        reason = error
    for file in sorted(folder.glob(f"*{_SUFFIX}")):
        try:
            safe_open(file, framework="pt")
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"cannot read {file}, it is damaged ({error})") from None
    raise CheckpointError(f"cannot read the tensors in {folder} ({reason})")


def tensor_names(folder: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors in a folder; scalars have shape (1,).

    Raises CheckpointError for damaged files.
    """
    found = _read_metadata(folder).state_dict_metadata
    return {name: tuple(tensor.size) for name, tensor in sorted(found.items())}


def _numel_here(tensor: Tensor) -> int:
    if isinstance(tensor, DTensor) and tensor.device_mesh.get_coordinate() is None:
        return 0
    return _local(tensor).numel()


class _Reader(HuggingFaceStorageReader):
    """Reads with known headers; checks first that all wanted parts exist and the files are good."""

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
                f"{self._folder} lacks parts of {len(holes)} tensors, {sorted(holes)[:3]}"
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
                f"{folder}: {name} must be {tensor.dtype} of shape {list(tensor.shape)}, got "
                f"{there[1]} of shape {list(there[0])}"
            )


@torch.no_grad()
def read_tensors(
    folder: Path,
    wanted: Mapping[str, Tensor],
    check_file: Callable[[Path], None] = lambda file: None,
) -> None:
    """Fills tensors in place from a folder that any number of processes wrote (`write_tensors`).

    Every process passes the tensors that it wants, plain or as DTensors of any sharding. Only these
    parts are read, and nothing is sent. `check_file` is called with each file before it is read.
    Raises CheckpointError for missing tensors, other shapes or dtypes, and damaged files; some
    tensors may be filled by then.
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
