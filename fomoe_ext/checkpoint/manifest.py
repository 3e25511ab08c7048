"""The format of a checkpoint: the global model and the training state of all sites.

It is a folder of safetensors and JSON files:

    model-00001-of-00004.safetensors ...   the global model; each tensor is written by one process
    model.safetensors.index.json           which file holds which tensor
    state-00000.json ...                   one per site: counts, placement, position in the data
    training/*.safetensors                 tensors of the training state (`shards`)
    manifest.json                          written last: round, size and SHA-256 of every file, and
                                           a SHA-256 of itself

`writer` writes it under a temporary name and renames it when all files are complete and synced to
disk, so a folder with its final name is whole. Sites need not share a file system. Without a shared
one, each machine has the files of its own sites, and all have index and manifest; to resume, copy
all files to every machine. No file is a pickle. The rank of a process in torch.distributed's
default group is site * ranks_per_site + rank.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fomoe_ext.files.atomic import unsealed
from fomoe_ext.files.json_values import loads
from fomoe_ext.files.tensors import require_inside

FORMAT = 2
MANIFEST = "manifest.json"
TRAINING = "training"
_NAME = re.compile(r"step-(\d{8})")
_HEADER = 100_000_000
"""A longer header of a safetensors file is invalid."""


class CheckpointError(RuntimeError):
    """A checkpoint is missing, damaged, or of another job."""


@dataclass(frozen=True)
class FileEntry:
    """A file of a checkpoint: the site that wrote it, its size in bytes and its SHA-256.

    rank: the rank of the site that wrote it. header_sha256: SHA-256 of the header, which has the
    tensor names; only for files of the training state.
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
    """The manifest of a checkpoint: completed rounds, number of sites, and files.

    meta: options of the job. ranks_per_site: processes per site when it was written.
    """

    round: int
    num_sites: int
    files: dict[str, FileEntry]
    meta: dict[str, Any] = field(default_factory=dict)
    ranks_per_site: int = 1


@dataclass(frozen=True)
class Process:
    """A process of the job, when a checkpoint was started."""

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
    """Folder name of a checkpoint after `steps` local steps."""
    return f"step-{steps:08d}"


def steps_of(path: Path) -> int:
    """The local steps in a checkpoint's name. Raises ValueError for another name."""
    found = _NAME.fullmatch(path.name)
    if found is None:
        raise ValueError(f"path must be a checkpoint, step-XXXXXXXX, got {path.name}")
    return int(found[1])


def state_name(site: int) -> str:
    """File name of a site's state."""
    return f"state-{site:05d}.json"


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first, whole or damaged; not those being written."""
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if _NAME.fullmatch(p.name) and p.is_dir())


def read_manifest(path: Path) -> Manifest:
    """The manifest of a checkpoint. Raises CheckpointError when it is missing or damaged."""
    if not path.is_dir():
        raise CheckpointError(f"checkpoint {path} does not exist")
    try:
        raw = unsealed(loads((path / MANIFEST).read_bytes(), nan=True), "it")
        if raw["format"] != FORMAT:
            raise CheckpointError(
                f"checkpoint {path}: format must be {FORMAT}, got {raw['format']}"
            )
        files = {require_inside(n): FileEntry(**entry) for n, entry in raw["files"].items()}
        return Manifest(raw["round"], raw["num_sites"], files, raw["meta"], raw["ranks_per_site"])
    except FileNotFoundError:
        raise CheckpointError(f"checkpoint {path} has no {MANIFEST}: it is not whole") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"checkpoint {path}: {MANIFEST} is damaged ({error})") from None


def sha256(path: Path) -> str:
    """SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def header_sha256(path: Path) -> str:
    """SHA-256 of a safetensors file's length field and header, or "" for an invalid length."""
    with path.open("rb") as file:
        length = file.read(8)
        count = int.from_bytes(length, "little")
        return hashlib.sha256(length + file.read(count)).hexdigest() if count < _HEADER else ""
