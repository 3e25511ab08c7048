"""Checkpoints: the global model and the training state of all sites, in safetensors and JSON.

A checkpoint is a folder:

    model-00001-of-00004.safetensors ...   the global model; every tensor written by one process
    model.safetensors.index.json           which file holds which tensor
    state-00000.json ...                   one per site: counts, placement, where the data stands
    training/*.safetensors                 tensors of the training state (`training_state`)
    manifest.json                          written last: round, sizes and SHA-256 of all files, and
                                           its own

It is written (`checkpoint_writer`) under a temporary name and renamed when all of it is there and
synced to disk, so a folder with its final name is whole. Sites need not share a file system: then
each machine has the files of its own sites, and all have index and manifest; to resume, every
machine needs all of them. Nothing in it is a pickle. Process site * ranks_per_site + rank of
torch.distributed's default group is a site's rank.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Self

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from fomoe_ext.checkpoint.training_state import CheckpointError, read_tensors
from fomoe_ext.checkpoint.training_state import tensor_names as names_in_folder
from fomoe_ext.files.atomic import unsealed
from fomoe_ext.files.json_values import from_json, loads
from fomoe_ext.files.tensors import INDEX, read_index, require_inside
from fomoe_ext.launch.messages import gather_objects
from fomoe_ext.layer.assemble import fill_model, global_names

FORMAT = 2
MANIFEST = "manifest.json"
TRAINING = "training"
_NAME = re.compile(r"step-(\d{8})")
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

    def __post_init__(self) -> None:
        kinds = {"site": int, "size": int, "sha256": str, "rank": int, "header_sha256": str}
        for name, kind in kinds.items():
            value = getattr(self, name)
            if type(value) is not kind:
                raise TypeError(f"{name} must be of type {kind.__name__}, got {value!r:.60}")


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


@dataclass(frozen=True)
class Process:
    """A process of the job, as it was when a checkpoint began."""

    site: int
    num_sites: int
    rank: int = 0
    ranks_per_site: int = 1

    def __post_init__(self) -> None:
        for name, value, end in (
            ("site", self.site, self.num_sites),
            ("rank", self.rank, self.ranks_per_site),
        ):
            if not 0 <= value < end:
                raise ValueError(f"{name} must be in [0, {end}), got {value}")

    @property
    def number(self) -> int:
        """Its rank among all processes."""
        return self.site * self.ranks_per_site + self.rank

    @property
    def count(self) -> int:
        """All processes."""
        return self.num_sites * self.ranks_per_site

    def __str__(self) -> str:
        return f"site {self.site}" + (f", rank {self.rank}" if self.ranks_per_site > 1 else "")


def checkpoint_name(steps: int) -> str:
    """Folder name of a checkpoint after so many local steps."""
    return f"step-{steps:08d}"


def steps_of(path: Path) -> int:
    """The local steps in a checkpoint's name. Raises ValueError for another name."""
    found = _NAME.fullmatch(path.name)
    if found is None:
        raise ValueError(f"path must be of a checkpoint, step-XXXXXXXX, got {path.name}")
    return int(found[1])


def state_name(site: int) -> str:
    """File name of a site's state."""
    return f"state-{site:05d}.json"


def sha256(path: Path) -> str:
    """SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def header_sha256(path: Path) -> str:
    """SHA-256 of a safetensors file's header with its length, or "" where there is none."""
    with path.open("rb") as file:
        length = file.read(8)
        count = int.from_bytes(length, "little")
        return hashlib.sha256(length + file.read(count)).hexdigest() if count < _HEADER else ""


# ---------------------------------------------------------------------------------------- reading


def read_manifest(path: Path) -> Manifest:
    """The manifest of a checkpoint. Raises CheckpointError when it is missing or damaged."""
    if not path.is_dir():
        raise CheckpointError(f"checkpoint {path} does not exist")
    try:
        raw = unsealed(loads((path / MANIFEST).read_bytes(), nan=True), "it")
        if raw["format"] != FORMAT:
            raise CheckpointError(
                f"checkpoint {path} has format {raw['format']}, this version reads {FORMAT}"
            )
        files = {require_inside(n): FileEntry(**entry) for n, entry in raw["files"].items()}
        return Manifest(raw["round"], raw["num_sites"], files, raw["meta"], raw["ranks_per_site"])
    except FileNotFoundError:
        raise CheckpointError(f"checkpoint {path} has no {MANIFEST}: it is not whole") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"checkpoint {path}: {MANIFEST} is damaged ({error})") from None


def _check_file(path: Path, name: str, entry: FileEntry, content: bool) -> None:
    file = path / name
    try:
        there = file.is_file()
    except OSError as error:  # no file can have such a name
        raise CheckpointError(f"checkpoint {path}: {name[:80]!r}: {error.strerror}") from None
    if not there:
        raise CheckpointError(f"checkpoint {path} lacks {name}")
    found = file.stat()
    if found.st_size != entry.size:
        raise CheckpointError(
            f"checkpoint {path}: {name} has {found.st_size} bytes, wanted {entry.size}"
        )
    if not content or (known := _known(file, entry)) in _checked:
        return
    try:
        digest = sha256(file)
    except OSError as error:
        raise CheckpointError(f"checkpoint {path}: cannot read {name} ({error})") from None
    if digest != entry.sha256:
        raise CheckpointError(f"checkpoint {path}: the content of {name} is damaged")
    _checked.add(known)


def _known(file: Path, entry: FileEntry) -> tuple[str, int, int, str]:
    found = file.stat()
    return str(file.resolve()), found.st_ino, found.st_mtime_ns, entry.sha256


def require_content(path: Path, names: Iterable[str]) -> None:
    """Raises CheckpointError unless the named files are what was written; each is read once per
    process."""
    files = read_manifest(path).files
    for name in names:
        _check_file(path, name, files[name], content=True)


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


def _what_is_wrong(path: Path, content: bool, share: tuple[int, int]) -> str:
    """Why a checkpoint is not whole, or ""; with `content` every share[1]-th file is read."""
    try:
        require_whole(path)
        if content:
            for name, entry in sorted(read_manifest(path).files.items())[share[0] :: share[1]]:
                _check_file(path, name, entry, content=True)
    except (CheckpointError, OSError) as error:
        return str(error)
    return ""


class Found(NamedTuple):
    """The newest whole checkpoint of a folder, or None; and why each newer one was skipped."""

    path: Path | None
    skipped: list[str]


def require_whole_everywhere(path: Path, num_processes: int, share: tuple[int, int]) -> None:
    """Raises CheckpointError on all processes unless every one of them finds a checkpoint whole,
    with the content of all files; a collective. `share` as for `newest_whole`.
    """
    reasons = gather_objects(_what_is_wrong(path, True, share), num_processes)
    if reason := next(filter(None, reasons), ""):
        raise CheckpointError(reason)
    _trust(path)


def newest_whole(
    folder: Path, num_processes: int = 1, *, content: bool = True, share: tuple[int, int] = (0, 1)
) -> Found:
    """The newest checkpoint of which every process finds all files whole; a collective of all.

    A file is whole when it has its size and, with `content`, its SHA-256. `share`: (i, n) for the
    i-th of n processes that see the same folder; then each reads an n-th of the files.
    """
    listed = gather_objects([path.name for path in list_checkpoints(folder)], num_processes)
    skipped = []
    for name in sorted(set().union(*listed), reverse=True):
        reasons = gather_objects(_what_is_wrong(folder / name, content, share), num_processes)
        reason = next(filter(None, reasons), "")
        if not reason:
            if content:
                _trust(folder / name)
            return Found(folder / name, skipped)
        skipped.append(reason)
    return Found(None, skipped)


def _trust(path: Path) -> None:
    """All files here have been read, by this process or by others that see them too."""
    for name, entry in read_manifest(path).files.items():
        _checked.add(_known(path / name, entry))


def load_state(path: Path, site: int) -> dict[str, Any]:
    """The state that a site saved, without tensors; CheckpointError when missing or damaged."""
    manifest = read_manifest(path)
    name = state_name(site)
    if name not in manifest.files:
        raise CheckpointError(
            f"checkpoint {path} is of {manifest.num_sites} sites and has no state of site {site}"
        )
    _check_file(path, name, manifest.files[name], content=True)
    try:
        return from_json(loads((path / name).read_bytes()))
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
        if header_sha256(path / name) != entry.header_sha256:
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

    Of a file from which something is read the SHA-256 is compared, once per process. Use as a
    context manager. Raises CheckpointError for missing or damaged files and unknown names.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self.manifest = read_manifest(self.path)
        try:
            if INDEX in self.manifest.files and (self.path / INDEX).is_file():
                _check_file(self.path, INDEX, self.manifest.files[INDEX], content=True)
            self._file_of = read_index(self.path / INDEX)
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
                _check_file(self.path, file, self.manifest.files[file], content=True)
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
