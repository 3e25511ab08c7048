"""Named tensors of all processes in one folder, written in shards, read back in any sharding.

Tensors are plain or DTensors. Every process writes its own shards to safetensors files in the form
that torch.distributed.checkpoint reads: nothing on disk is a pickle, and nothing is sent to write.
A file says in its header which part of a tensor it holds, so a reader needs to know nothing of the
processes that wrote it.
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


class TensorPart(NamedTuple):
    """A part of a tensor, of at least one dimension, and where in the whole it begins."""

    tensor: Tensor
    offsets: tuple[int, ...]


def shard_of(name: str, tensor: Tensor) -> TensorPart | None:
    """What this process is to write of a tensor; it shares the tensor's memory.

    Of a DTensor its shard, or None where another process has the same one (the first along a mesh's
    replicated dimensions writes), has all there is, or where this one is not in the mesh. Of a
    plain tensor all. Raises TypeError for what is no tensor, ValueError for a partial sum.
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
    """Shards by name in files of at most `limit` bytes each, or with a single shard."""
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
    """Writes this process's shards into a folder, as HuggingFaceStorageReader of
    torch.distributed.checkpoint reads them; gives every file's name when it is written and synced.

    A file has at most `limit` bytes of tensors, or a single one. Processes of other numbers have
    files of other names. Raises OSError, and ValueError for a dtype that cannot be stored.
    """
    files = _in_files(shards, limit)
    for number, held in enumerate(files, 1):
        offsets = {name: {"saved_offsets": list(shard.offsets)} for name, shard in held.items()}
        metadata = {"format": "pt", "DCP_SHARDING_INFO": json.dumps(offsets)}
        name = f"shard-{process + 1:05d}-model-{number:05d}-of-{len(files):05d}{_SUFFIX}"
        tensors = {key: shard.tensor for key, shard in held.items()}
        yield name, write_synced(folder / name, tensors, metadata)


def _differing(kinds: Sequence[Mapping[str, str]]) -> list[str]:
    """What processes that give a tensor of one name do not agree on: its dtype and shape."""
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
    """Of this process's tensors those that it is to write; a collective.

    A DTensor is given by all processes of its mesh, a plain tensor by one process; what several
    have alike, with the same bits, the first of them writes. Raises CheckpointError on every
    process when any has what is no tensor, or two differ in a tensor's dtype or shape.
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
    `process`; with one process torch.distributed is not needed. `tensors` as for `only_once`.
    Tensors of no dimension are stored with shape [1]. Raises what `only_once` does, and where it
    cannot write what `write_shards` does.
    """
    own = only_once(tensors, process=process, num_processes=num_processes)
    shards = {name: shard_of(name, tensor) for name, tensor in own.items()}
    folder.mkdir(parents=True, exist_ok=True)
    given = {name: shard for name, shard in shards.items() if shard is not None}
    return [name for name, _ in write_shards(folder, given, process=process, limit=limit)]


# ---------------------------------------------------------------------------------------- reading


def _read_metadata(folder: Path) -> Metadata:
    """What the headers of all files say."""
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
