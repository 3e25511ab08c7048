"""Checkpoints: the global model and the training state of all sites, in safetensors and JSON.

A checkpoint is a folder:

    model-00001-of-00004.safetensors ...   the global model; every tensor written by one process
    model.safetensors.index.json           which file holds which tensor
    state-00000.json ...                   one per site: counts, placement, where the data stands
    training/*.safetensors                 tensors of the training state (`training_state`)
    manifest.json                          written last: round, sizes and SHA-256 of all files

It is written under a temporary name and renamed when all of it is there, so a folder with its final
name is whole. Sites need not share a file system: then each machine has the files of its own sites,
and all have index and manifest; to resume, every machine needs all of them. Nothing in it is a
pickle. Process site * ranks_per_site + rank of torch.distributed's default group is a site's rank.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self, TypeVar

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fomoe_ext.assemble import fill_model, global_names
from fomoe_ext.files import write_text
from fomoe_ext.outer.groups import gather_objects
from fomoe_ext.tensor_files import INDEX
from fomoe_ext.training_state import (
    FILE_BYTES,
    CheckpointError,
    from_json,
    read_tensors,
    to_json,
    write_tensors,
)
from fomoe_ext.training_state import tensor_names as names_in_folder

FORMAT = 2
MANIFEST = "manifest.json"
TRAINING = "training"
_NAME = re.compile(r"step-(\d{8})")
_T = TypeVar("_T")
_HEADER = 100_000_000
"""No header of a safetensors file has so many bytes."""
_checked: set[tuple[str, int, int, str]] = set()
"""Files whose SHA-256 this process has found right: path, inode, time of change, SHA-256."""


@dataclass(frozen=True)
class FileEntry:
    """A file of a checkpoint: the site that wrote it, its size in bytes and its SHA-256.

    rank: which of the site's ranks wrote it. header_sha256: of the header alone, which names the
    tensors, for files of the training state.
    """

    site: int
    size: int
    sha256: str
    rank: int = 0
    header_sha256: str = ""


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint is: finished rounds, number of sites, files, and what the job adds.

    ranks_per_site: processes of each of the sites that wrote it.
    """

    round: int
    num_sites: int
    files: dict[str, FileEntry]
    meta: dict[str, Any] = field(default_factory=dict)
    ranks_per_site: int = 1


def checkpoint_name(steps: int) -> str:
    """Folder name of a checkpoint after so many local steps."""
    return f"step-{steps:08d}"


def _state_name(site: int) -> str:
    return f"state-{site:05d}.json"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _header_sha256(path: Path) -> str:
    """SHA-256 of a safetensors file's header with its length, or "" where there is none."""
    with path.open("rb") as file:
        length = file.read(8)
        count = int.from_bytes(length, "little")
        return hashlib.sha256(length + file.read(count)).hexdigest() if count < _HEADER else ""


def _write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=1) + "\n")


# ---------------------------------------------------------------------------------------- writing


def _shards(tensors: Iterable[tuple[str, Tensor]], limit: int) -> list[dict[str, Tensor]]:
    """Tensors in files of at most `limit` bytes each (a larger tensor has a file of its own)."""
    shards: list[dict[str, Tensor]] = []
    filled = limit
    for name, tensor in tensors:
        if filled and filled + tensor.nbytes > limit:
            shards.append({})
            filled = 0
        shards[-1][name] = tensor
        filled += tensor.nbytes
    return shards


@dataclass(frozen=True)
class _Process:
    """A process of the job."""

    site: int
    num_sites: int
    rank: int
    ranks_per_site: int

    def __post_init__(self) -> None:
        for name, value, end in (
            ("site", self.site, self.num_sites),
            ("rank", self.rank, self.ranks_per_site),
        ):
            if not 0 <= value < end:
                raise ValueError(f"{name} must be in [0, {end}), got {value}")

    @property
    def number(self) -> int:
        return self.site * self.ranks_per_site + self.rank

    @property
    def count(self) -> int:
        return self.num_sites * self.ranks_per_site

    def __str__(self) -> str:
        return f"site {self.site}" + (f", rank {self.rank}" if self.ranks_per_site > 1 else "")


def _together(process: _Process, step: Callable[[], _T]) -> list[_T]:
    """What the step gives on all processes; CheckpointError on all when it fails on any of them."""
    error, value = "", None
    try:
        value = step()
    except (OSError, SafetensorError, TypeError, ValueError) as reason:
        error = f"{process}: {reason}"
    gathered: list[tuple[str, Any]] = gather_objects((error, value), process.count)
    errors = [text for text, _ in gathered if text]
    if errors:
        raise CheckpointError("; ".join(errors))
    return [given for _, given in gathered]


_Entries = dict[str, dict[str, Any]]
"""Fields of a `FileEntry` by file, as processes tell each other."""


def _entries(folder: Path, names: Iterable[str], process: _Process) -> _Entries:
    """The manifest's entries of files that this process wrote; makes sure that they last."""
    entries = {}
    for name in names:
        with (folder / name).open("rb") as file:
            os.fsync(file.fileno())
        path = folder / name
        header = _header_sha256(path) if name.startswith(f"{TRAINING}/") else ""
        entry = FileEntry(process.site, path.stat().st_size, _sha256(path), process.rank, header)
        entries[name] = asdict(entry)
    return entries


def _write_own_files(
    folder: Path,
    process: _Process,
    shards: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any] | None,
) -> _Entries:
    """Write this process's part of the global model (by file) and its site's state."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, shard in shards.items():
        on_cpu = {key: tensor.cpu().contiguous() for key, tensor in shard.items()}
        save_file(on_cpu, folder / name, metadata={"format": "pt"})
    names = list(shards)
    if (state is None) != (process.rank != 0):
        raise ValueError(f"state must be given by rank 0 of a site and no other, got {state!r:.60}")
    if state is not None:
        names.append(_state_name(process.site))
        text = json.dumps(to_json(dict(state)), indent=1, allow_nan=False)
        (folder / names[-1]).write_text(text + "\n", encoding="utf-8")
    return _entries(folder, names, process)


def _publish(temporary: Path, final: Path, manifest: Manifest, weight_map: dict[str, str]) -> None:
    """Complete the temporary folder and give it its name, in place of an older one if there is."""
    total = sum(manifest.files[name].size for name in set(weight_map.values()))
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    _write_json(temporary / INDEX, index)
    _write_json(temporary / MANIFEST, {"format": FORMAT, **asdict(manifest)})
    old = final.with_name(f".{final.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        os.rename(final, old)
    os.rename(temporary, final)
    shutil.rmtree(old, ignore_errors=True)


def save_checkpoint(
    folder: Path,
    name: str,
    tensors: Iterable[tuple[str, Tensor]],
    state: Mapping[str, Any] | None,
    *,
    site: int,
    num_sites: int,
    rank: int = 0,
    ranks_per_site: int = 1,
    round: int,
    meta: Mapping[str, Any] | None = None,
    named: Mapping[str, Tensor] | None = None,
    shard_bytes: int = 4 << 30,
) -> Path:
    """Write a checkpoint `folder/name` together with all other processes, and return its path.

    `tensors`: this process's part of the global model (`assemble.own_global_tensors`); at most
    `shard_bytes` of them are copied at a time. `state`: what a site needs to go on and is no
    tensor, as `training_state.to_json` takes it, from rank 0 of the site; None from the others.
    `named`: this process's tensors of the training state, as `training_state.write_tensors` takes
    them. Every process must call it; they agree on the outcome. Raises CheckpointError on every
    process when any of them cannot write its files; then nothing is left.
    """
    process = _Process(site, num_sites, rank, ranks_per_site)
    temporary, final = folder / f".{name}.partial", folder / name
    leads_machine = int(os.environ.get("LOCAL_RANK", process.number)) == 0
    parts = _shards(tensors, shard_bytes)
    if leads_machine:
        shutil.rmtree(temporary, ignore_errors=True)
    counts = gather_objects(len(parts), process.count)
    first, total = sum(counts[: process.number]) + 1, sum(counts)
    shards = {
        f"model-{i:05d}-of-{total:05d}.safetensors": part for i, part in enumerate(parts, first)
    }
    weight_map = {key: file for file, part in shards.items() for key in part}
    try:
        model = _together(
            process, lambda: (_write_own_files(temporary, process, shards, state), weight_map)
        )
        training = _write_training(temporary, process, named or {}, min(shard_bytes, FILE_BYTES))
        manifest = Manifest(
            round,
            num_sites,
            {
                name: FileEntry(**entry)
                for files in ([f for f, _ in model] + training)
                for name, entry in files.items()
            },
            dict(meta or {}),
            ranks_per_site,
        )
        whole_map = {k: v for _, part in model for k, v in part.items()}
        # Process 0 publishes; then the first of every machine that does not share its folder.
        for turn in (process.number == 0, process.number != 0 and leads_machine):
            _together(
                process,
                lambda turn=turn: (
                    _publish(temporary, final, manifest, whole_map)
                    if turn and temporary.exists()
                    else None
                ),
            )
    except CheckpointError as error:
        if leads_machine:
            shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(f"could not write checkpoint {final}: {error}") from None
    return final


def _write_training(
    folder: Path, process: _Process, named: Mapping[str, Tensor], limit: int
) -> list[_Entries]:
    """Write the training state's tensors; returns the entries of every process's files."""
    files = write_tensors(
        folder / TRAINING, named, process=process.number, num_processes=process.count, limit=limit
    )
    names = [f"{TRAINING}/{file}" for file in files]
    return _together(process, lambda: _entries(folder, names, process))


# ---------------------------------------------------------------------------------------- reading


def read_manifest(path: Path) -> Manifest:
    """The manifest of a checkpoint. Raises CheckpointError when it is missing or damaged."""
    if not path.is_dir():
        raise CheckpointError(f"checkpoint {path} does not exist")
    try:
        raw = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        if raw["format"] != FORMAT:
            raise CheckpointError(
                f"checkpoint {path} has format {raw['format']}, this version reads {FORMAT}"
            )
        files = {name: FileEntry(**entry) for name, entry in raw["files"].items()}
        return Manifest(raw["round"], raw["num_sites"], files, raw["meta"], raw["ranks_per_site"])
    except FileNotFoundError:
        raise CheckpointError(f"checkpoint {path} has no {MANIFEST}: it is not whole") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"checkpoint {path}: {MANIFEST} is damaged ({error})") from None


def _check_file(path: Path, name: str, entry: FileEntry, content: bool) -> None:
    file = path / name
    if not file.is_file():
        raise CheckpointError(f"checkpoint {path} lacks {name}")
    found = file.stat()
    if found.st_size != entry.size:
        raise CheckpointError(
            f"checkpoint {path}: {name} has {found.st_size} bytes, wanted {entry.size}"
        )
    known = (str(file.resolve()), found.st_ino, found.st_mtime_ns, entry.sha256)
    if not content or known in _checked:
        return
    if _sha256(file) != entry.sha256:
        raise CheckpointError(f"checkpoint {path}: the content of {name} is damaged")
    _checked.add(known)


def require_whole(path: Path, site: int | None = None) -> None:
    """Raises CheckpointError unless manifest and files (all, or one site's) are there, in size."""
    for name, entry in read_manifest(path).files.items():
        if site is None or entry.site == site:
            _check_file(path, name, entry, content=False)


def is_whole(path: Path, site: int | None = None) -> bool:
    """Whether `require_whole` has nothing to say."""
    try:
        require_whole(path, site)
    except CheckpointError:
        return False
    return True


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first, whole or not, without those being written."""
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if _NAME.fullmatch(p.name) and p.is_dir())


def why_none(folder: Path) -> str:
    """What is wrong with the newest checkpoint of a folder: "" or a text in brackets."""
    found = list_checkpoints(folder)
    if not found:
        return " (it has none)"
    try:
        require_whole(found[-1])
    except CheckpointError as error:
        return f" ({error})"
    return ""


def newest_common(folder: Path, site: int | None, num_processes: int) -> Path | None:
    """The newest checkpoint whose files every process finds whole: its site's, with None all.

    A collective of all processes.
    """
    own = [path.name for path in list_checkpoints(folder) if is_whole(path, site)]
    common = set.intersection(*map(set, gather_objects(own, num_processes)))
    return folder / max(common) if common else None


def load_state(path: Path, site: int) -> dict[str, Any]:
    """The state that a site saved, without tensors; CheckpointError when missing or damaged."""
    manifest = read_manifest(path)
    name = _state_name(site)
    if name not in manifest.files:
        raise CheckpointError(
            f"checkpoint {path} is of {manifest.num_sites} sites and has no state of site {site}"
        )
    _check_file(path, name, manifest.files[name], content=True)
    try:
        return from_json(json.loads((path / name).read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"checkpoint {path}: cannot read {name} ({error})") from None


def _training_files(path: Path) -> dict[str, FileEntry]:
    """The files of the training state's tensors, all there, with their sizes and headers."""
    entries = {
        name: entry
        for name, entry in read_manifest(path).files.items()
        if name.startswith(f"{TRAINING}/")
    }
    for name, entry in entries.items():
        _check_file(path, name, entry, content=False)
        if _header_sha256(path / name) != entry.header_sha256:
            raise CheckpointError(f"checkpoint {path}: the header of {name} is damaged")
    for file in (path / TRAINING).glob("*"):
        if f"{TRAINING}/{file.name}" not in entries:
            raise CheckpointError(f"checkpoint {path}: {file.name} in {TRAINING} is not its own")
    return entries


def tensor_names(path: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the training state's tensors (no dimension: (1,)), of all sites.

    Only the files' headers are read, and their SHA-256 compared. Raises CheckpointError when files
    are missing, of another size or with a damaged header.
    """
    return names_in_folder(path / TRAINING) if _training_files(path) else {}


def load_tensors(path: Path, wanted: Mapping[str, Tensor]) -> None:
    """Fill tensors of the training state in place, as `training_state.read_tensors` does.

    Plain or DTensors, in whatever sharding and by however many processes they were written; nothing
    is sent. Raises CheckpointError when files are missing or damaged (of those that are read the
    SHA-256 is compared, once per process), for missing tensors and other shapes or dtypes.
    """
    entries = _training_files(path)
    if not entries and wanted:
        raise CheckpointError(f"checkpoint {path} lacks {sorted(wanted)[:3]}, it has no {TRAINING}")

    def check(file: Path) -> None:
        name = f"{TRAINING}/{file.name}"
        _check_file(path, name, entries[name], content=True)

    read_tensors(path / TRAINING, wanted, check)


class GlobalModelReader:
    """Reads single tensors of a checkpoint's global model; only what is asked for is read.

    Use as a context manager. Raises CheckpointError for missing or damaged files and unknown names.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self.manifest = read_manifest(self.path)
        try:
            index = json.loads((self.path / INDEX).read_text(encoding="utf-8"))
            self._file_of: dict[str, str] = dict(index["weight_map"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"checkpoint {path}: cannot read {INDEX} ({error})") from None
        self._open: dict[str, Any] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.clear()

    def names(self) -> list[str]:
        """Names of all tensors."""
        return list(self._file_of)

    def tensor(self, name: str) -> Tensor:
        """One tensor, on the CPU."""
        if name not in self._file_of:
            raise CheckpointError(f"checkpoint {self.path} has no tensor {name}")
        file = self._file_of[name]
        try:
            if file not in self._open:
                _check_file(self.path, file, self.manifest.files[file], content=False)
                self._open[file] = safe_open(self.path / file, framework="pt")
            return self._open[file].get_tensor(name)
        except (SafetensorError, OSError, KeyError) as error:
            raise CheckpointError(f"checkpoint {self.path}: cannot read {file} ({error})") from None


def load_global_model(path: Path, model: nn.Module) -> None:
    """Fill a model, which may hold any choice of experts, from a checkpoint's global model.

    Only the resident experts are read. Raises CheckpointError for a damaged checkpoint or one of
    another model (names or shapes differ).
    """
    with GlobalModelReader(path) as reader:
        differing = global_names(model) ^ set(reader.names())
        if differing:
            raise CheckpointError(
                f"checkpoint {path} is of another model: {sorted(differing)[:3]} are only in one"
            )
        try:
            fill_model(model, reader.tensor)
        except ValueError as error:
            raise CheckpointError(f"checkpoint {path}: {error}") from None
