"""Reads a checkpoint: the state of a site, tensors of the training state, the global model.

The SHA-256 of every file that is read is checked, once per process.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from fomoe_ext.checkpoint.manifest import (
    TRAINING,
    CheckpointError,
    FileEntry,
    header_sha256,
    read_manifest,
    state_name,
)
from fomoe_ext.checkpoint.shards import read_tensors
from fomoe_ext.checkpoint.shards import tensor_names as names_in_folder
from fomoe_ext.checkpoint.whole import require_file
from fomoe_ext.files.json_values import from_json, loads
from fomoe_ext.files.tensors import INDEX, read_index
from fomoe_ext.layer.assemble import fill_model, global_names


def load_state(path: Path, site: int) -> dict[str, Any]:
    """The state that a site saved, without tensors. Raises CheckpointError."""
    manifest = read_manifest(path)
    name = state_name(site)
    if name not in manifest.files:
        raise CheckpointError(
            f"checkpoint {path} has {manifest.num_sites} sites and no state of site {site}"
        )
    require_file(path, name, manifest.files[name], content=True)
    try:
        return from_json(loads((path / name).read_bytes()))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"checkpoint {path}: cannot read {name} ({error})") from None


def tensor_names(path: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the training state's tensors, of all sites; scalars have shape (1,).

    Reads only the files' headers and checks their SHA-256. Raises CheckpointError if files are
    missing, have another size or a damaged header.
    """
    return names_in_folder(path / TRAINING) if _training_files(path) else {}


def load_tensors(path: Path, wanted: Mapping[str, Tensor]) -> None:
    """Fills tensors of the training state in place, as `shards.read_tensors` does.

    They may be plain tensors or DTensors, written in any sharding by any number of processes;
    nothing is sent. The SHA-256 of files that are read is checked, once per process. Raises
    CheckpointError for missing or damaged files, missing tensors, and other shapes or dtypes.
    """
    entries = _training_files(path)
    if not entries and wanted:
        raise CheckpointError(f"checkpoint {path} lacks {sorted(wanted)[:3]}, it has no {TRAINING}")

    def check(file: Path) -> None:
        name = f"{TRAINING}/{file.name}"
        require_file(path, name, entries[name], content=True)

    read_tensors(path / TRAINING, wanted, check)


def _training_files(path: Path) -> dict[str, FileEntry]:
    """The files of the training state; checks that all exist, with right sizes and headers."""
    entries = {
        name: entry
        for name, entry in read_manifest(path).files.items()
        if name.startswith(f"{TRAINING}/")
    }
    for name, entry in entries.items():
        require_file(path, name, entry, content=False)
        if header_sha256(path / name) != entry.header_sha256:
            raise CheckpointError(f"checkpoint {path}: the header of {name} is damaged")
    for file in (path / TRAINING).glob("*"):
        if f"{TRAINING}/{file.name}" not in entries:
            raise CheckpointError(
                f"checkpoint {path}: {file.name} in {TRAINING} is not in its manifest"
            )
    return entries


class GlobalModelReader:
    """Reads single tensors of a checkpoint's global model. Use it as a context manager.

    The SHA-256 of every file that is read is checked, once per process. Raises CheckpointError for
    missing or damaged files and unknown names.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self.manifest = read_manifest(self.path)
        try:
            if INDEX in self.manifest.files and (self.path / INDEX).is_file():
                require_file(self.path, INDEX, self.manifest.files[INDEX], content=True)
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
                require_file(self.path, file, self.manifest.files[file], content=True)
                self._open[file] = safe_open(self.path / file, framework="pt")
            return self._open[file].get_tensor(name)
        except (SafetensorError, OSError, KeyError) as error:
            raise CheckpointError(f"checkpoint {self.path}: cannot read {file} ({error})") from None


def load_global_model(path: Path, model: nn.Module) -> None:
    """Fills a model from a checkpoint's global model; of the experts only the resident ones.

    Raises CheckpointError for a damaged checkpoint or another model (names or shapes differ).
    """
    with GlobalModelReader(path) as reader:
        differing = global_names(model) ^ set(reader.names())
        if differing:
            raise CheckpointError(
                f"checkpoint {path} is of another model: only one of the two has "
                f"{sorted(differing)[:3]}"
            )
        try:
            fill_model(model, reader.tensor)
        except ValueError as error:
            raise CheckpointError(f"checkpoint {path}: {error}") from None
