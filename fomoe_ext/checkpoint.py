"""Checkpoints: the global model in safetensors files and every site's own training state.

A checkpoint is a folder:

    model-00001-of-00004.safetensors ...   the global model; every tensor written by one site
    model.safetensors.index.json           which file holds which tensor
    state-00000.pt ...                     one per site: optimizer, outer state, data, counts
    manifest.json                          written last: round, sizes and SHA-256 of all files

It is written under a temporary name and renamed when all of it is there, so a folder with its final
name is whole. Sites need not share a file system: then each machine has the files of its own sites,
and all have index and manifest.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fomoe_ext.assemble import fill_model, global_names
from fomoe_ext.files import write_text
from fomoe_ext.outer.groups import gather_objects
from fomoe_ext.tensor_files import INDEX

FORMAT = 1
MANIFEST = "manifest.json"
_NAME = re.compile(r"step-(\d{8})")


class CheckpointError(RuntimeError):
    """A checkpoint that is missing, damaged, or not of this job."""


@dataclass(frozen=True)
class FileEntry:
    """A file of a checkpoint: the site that wrote it, its size in bytes and its SHA-256."""

    site: int
    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint is: finished rounds, number of sites, files, and what the job adds."""

    round: int
    num_sites: int
    files: dict[str, FileEntry]
    meta: dict[str, Any] = field(default_factory=dict)


def checkpoint_name(steps: int) -> str:
    """Folder name of a checkpoint after so many local steps."""
    return f"step-{steps:08d}"


def _state_name(site: int) -> str:
    return f"state-{site:05d}.pt"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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


def _barrier(num_sites: int) -> None:
    if num_sites > 1:
        dist.barrier()


def _write_own_files(
    folder: Path,
    site: int,
    shards: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
) -> dict[str, FileEntry]:
    """Write this site's safetensors files (by name) and its state; returns their entries."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, shard in shards.items():
        on_cpu = {key: tensor.cpu().contiguous() for key, tensor in shard.items()}
        save_file(on_cpu, folder / name, metadata={"format": "pt"})
    torch.save(dict(state), folder / _state_name(site))
    entries = {}
    for name in (*shards, _state_name(site)):
        with (folder / name).open("rb") as file:
            os.fsync(file.fileno())
        entries[name] = FileEntry(site, (folder / name).stat().st_size, _sha256(folder / name))
    return entries


def _publish(temporary: Path, final: Path, manifest: Manifest, weight_map: dict[str, str]) -> None:
    """Complete the temporary folder and give it its name, in place of an older one if there is."""
    total = sum(e.size for name, e in manifest.files.items() if name.endswith(".safetensors"))
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
    state: Mapping[str, Any],
    *,
    site: int,
    num_sites: int,
    round: int,
    meta: Mapping[str, Any] | None = None,
    shard_bytes: int = 4 << 30,
) -> Path:
    """Write a checkpoint `folder/name` together with all other sites, and return its path.

    `tensors`: this site's part of the global model (`assemble.own_global_tensors`); at most
    `shard_bytes` of them are copied at a time. `state`: what this site needs to go on, loadable by
    torch.load(weights_only=True). Every site must call it; they agree on the outcome. Raises
    CheckpointError on every site when any of them cannot write its files; then nothing is left.
    """
    temporary, final = folder / f".{name}.partial", folder / name
    leads_machine = int(os.environ.get("LOCAL_RANK", site)) == 0
    parts = _shards(tensors, shard_bytes)
    if leads_machine:
        shutil.rmtree(temporary, ignore_errors=True)
    counts = gather_objects(len(parts), num_sites)
    first, total = sum(counts[:site]) + 1, sum(counts)
    shards = {
        f"model-{i:05d}-of-{total:05d}.safetensors": part for i, part in enumerate(parts, first)
    }
    weight_map = {key: name for name, part in shards.items() for key in part}
    error, entries = None, {}
    try:
        entries = _write_own_files(temporary, site, shards, state)
    except (OSError, SafetensorError) as reason:
        error = f"site {site}: {reason}"
    gathered = gather_objects((error, entries, weight_map), num_sites)
    errors = [e for e, _, _ in gathered if e]
    if not errors:
        manifest = Manifest(
            round,
            num_sites,
            {k: v for _, files, _ in gathered for k, v in files.items()},
            dict(meta or {}),
        )
        whole_map = {k: v for _, _, part in gathered for k, v in part.items()}
        errors = _publish_everywhere(temporary, final, manifest, whole_map, site, leads_machine)
    if errors:
        if leads_machine:
            shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(f"could not write checkpoint {final}: {'; '.join(errors)}")
    return final


def _publish_everywhere(
    temporary: Path,
    final: Path,
    manifest: Manifest,
    weight_map: dict[str, str],
    site: int,
    leads_machine: bool,
) -> list[str]:
    """Site 0 publishes; then the first site of every machine that does not share its folder."""
    error = None
    for turn in (site == 0, site != 0 and leads_machine):
        if turn and temporary.exists():
            try:
                _publish(temporary, final, manifest, weight_map)
            except OSError as reason:
                error = f"site {site}: {reason}"
        _barrier(manifest.num_sites)
    return [e for e in gather_objects(error, manifest.num_sites) if e]


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
        return Manifest(raw["round"], raw["num_sites"], files, raw["meta"])
    except FileNotFoundError:
        raise CheckpointError(f"checkpoint {path} has no {MANIFEST}: it is not whole") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"checkpoint {path}: {MANIFEST} is damaged ({error})") from None


def _check_file(path: Path, name: str, entry: FileEntry, content: bool) -> None:
    file = path / name
    if not file.is_file():
        raise CheckpointError(f"checkpoint {path} lacks {name}")
    size = file.stat().st_size
    if size != entry.size:
        raise CheckpointError(f"checkpoint {path}: {name} has {size} bytes, wanted {entry.size}")
    if content and _sha256(file) != entry.sha256:
        raise CheckpointError(f"checkpoint {path}: the content of {name} is damaged")


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


def newest_common(folder: Path, site: int, num_sites: int) -> Path | None:
    """The newest checkpoint whose files every site finds whole; a collective of all sites."""
    own = [path.name for path in list_checkpoints(folder) if is_whole(path, site)]
    common = set.intersection(*map(set, gather_objects(own, num_sites)))
    return folder / max(common) if common else None


def load_state(path: Path, site: int) -> dict[str, Any]:
    """One site's training state, on the CPU; CheckpointError when it is missing or damaged."""
    manifest = read_manifest(path)
    name = _state_name(site)
    if name not in manifest.files:
        raise CheckpointError(
            f"checkpoint {path} is of {manifest.num_sites} sites and has no state of site {site}"
        )
    _check_file(path, name, manifest.files[name], content=True)
    return torch.load(path / name, map_location="cpu", weights_only=True)


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
