"""A folder of safetensors files in the format of transformers: reads and writes tensors by name."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fomoe_ext.files.atomic import naming, sealed, unsealed, write_text
from fomoe_ext.files.json_values import loads

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
CHECKSUMS = "checksums.json"
"""Checksums of a folder: for each tensor the SHA-256 of its bytes (with three or more dimensions,
of each row), and for each other file its SHA-256. Only folders written by fomoe_ext have it."""
_DIGITS = 16
_CHUNK = 16 << 20
"""Bytes written and hashed at a time."""
_KINDS = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""Names of dtypes in safetensors files."""


def require_inside(name: str) -> str:
    """Returns the name if it is of a file in a folder or below it.

    Raises ValueError for a name that leads out of the folder.
    """
    parts = name.split("/")
    if "\0" in name or "\\" in name or not all(parts) or {".", ".."} & {*parts}:
        raise ValueError(f"a file must be named within its folder, got {name!r:.60}")
    return name


def read_index(path: Path) -> dict[str, str]:
    """Names of tensors -> names of their files, from an index file.

    Raises OSError if it cannot be read, KeyError, TypeError or ValueError for invalid content.
    """
    found = dict(loads(path.read_bytes())["weight_map"])
    for name, file in found.items():
        if not isinstance(file, str):
            raise TypeError(f"{name!r:.60} must be in a file, got {file!r:.60}")
        require_inside(file)
    return found


class TensorFiles:
    """The tensors of a folder by name, on the CPU. Opens each file once and counts bytes read.

    If the folder has CHECKSUMS, tensors are checked when they are read. Raises ValueError, naming
    the folder, if files are missing, unreadable or damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bytes_read = 0
        self._open: dict[str, Any] = {}
        self._digests: dict[str, Any] = read_checksums(folder).get("tensors", {})
        index = folder / INDEX
        if (folder / SINGLE).is_file():  # an index beside it is left over: so does transformers
            self._files = dict.fromkeys(self._file(SINGLE).keys(), SINGLE)
        elif index.is_file():
            try:
                self._files = read_index(index)
            except (OSError, ValueError, TypeError, KeyError) as error:
                raise ValueError(f"{folder}: cannot read {INDEX} ({error})") from None
        else:
            raise ValueError(f"folder must have {SINGLE} or {INDEX}, got {folder}")

    def _file(self, name: str) -> Any:
        if name not in self._open:
            try:
                self._open[name] = safe_open(self.folder / name, framework="pt")
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{self.folder}: cannot read {name} ({error})") from None
        return self._open[name]

    @property
    def bytes_total(self) -> int:
        """Bytes of the tensors in all files."""
        total = 0
        for name in set(self._files.values()):
            self._file(name)  # raises for a file in another format
            with (self.folder / name).open("rb") as file:
                header = int.from_bytes(file.read(8), "little")
                total += os.fstat(file.fileno()).st_size - 8 - header
        return total

    def has(self, name: str) -> bool:
        """Whether there is such a tensor."""
        return name in self._files

    def names(self) -> tuple[str, ...]:
        """Names of all tensors."""
        return tuple(self._files)

    def read(self, name: str, row: int | None = None) -> Tensor:
        """A tensor or, without reading the others, one row of it."""
        if name not in self._files:
            raise ValueError(f"{self.folder} has no tensor {name}")
        file = self._file(self._files[name])
        try:
            tensor = file.get_tensor(name) if row is None else file.get_slice(name)[row]
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{self.folder}: cannot read {name} ({error})") from None
        if name in self._digests:
            self._check(name, row, tensor)
        self.bytes_read += tensor.nbytes
        return tensor

    def _check(self, name: str, row: int | None, tensor: Tensor) -> None:
        wanted = self._digests[name]
        if isinstance(wanted, str):
            if row is not None:
                return  # one digest for the whole matrix: a single row cannot be checked
            found: Any = _digest(tensor)
        elif row is None:
            found = [_digest(part) for part in tensor]
        else:
            found, wanted = _digest(tensor), wanted[row] if row < len(wanted) else ""
        if found != wanted:
            raise ValueError(
                f"{self.folder}: {name} is damaged or was changed after the folder was written. If "
                f"you changed it, delete {CHECKSUMS}"
            )


def _digest(tensor: Tensor) -> str:
    flat = tensor.detach().cpu().contiguous().view(-1)
    content = flat.view(torch.uint8).numpy() if flat.numel() else b""
    return hashlib.sha256(content).hexdigest()[:_DIGITS]


def _digests(tensor: Tensor) -> str | list[str]:
    return [_digest(part) for part in tensor] if tensor.dim() > 2 else _digest(tensor)


def read_checksums(folder: Path) -> dict[str, Any]:
    """The content of a folder's CHECKSUMS; {} if it has none. Raises ValueError for a damaged
    file."""
    path = folder / CHECKSUMS
    if not path.is_file():
        return {}
    try:
        found = unsealed(loads(path.read_bytes()), path)
        if not all(isinstance(found[part], dict) for part in ("tensors", "files")):
            raise ValueError(f"{path} is damaged")
        return found
    except (OSError, KeyError) as error:
        raise ValueError(f"cannot read {path} ({error})") from None


def check_file(folder: Path, name: str) -> None:
    """Raises ValueError if a file differs from the folder's CHECKSUMS. A file that is missing or
    not listed is no error here."""
    wanted = read_checksums(folder).get("files", {}).get(name)
    path = folder / name
    if wanted is None or not path.is_file():
        return
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != wanted:
            raise ValueError(
                f"{path} is damaged or was changed after the folder was written. If you changed "
                f"it, delete {CHECKSUMS}"
            )


def write_checksums(folder: Path, tensors: Mapping[str, str | list[str]]) -> None:
    """Writes CHECKSUMS of these tensors and of all other files that are in the folder now."""
    files = {}
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.suffix != ".safetensors" and not path.name.startswith("."):
            with path.open("rb") as file:
                files[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    files.pop(CHECKSUMS, None)
    write_text(
        folder / CHECKSUMS,
        json.dumps(sealed({"files": files, "tensors": dict(tensors)})) + "\n",
    )


def write_tensors(
    folder: Path, tensors: Iterable[tuple[str, Tensor]], limit: int
) -> tuple[int, int]:
    """Writes tensors, which must not share memory, to files of at most `limit` bytes.

    A larger tensor gets its own file. Several files get an index, and the folder gets CHECKSUMS.
    Only the tensors of one file are in memory at a time. Returns the number of files and the bytes
    of all tensors. Raises OSError naming the folder.
    """
    parts: list[list[str]] = []
    digests: dict[str, str | list[str]] = {}
    shard: dict[str, Tensor] = {}
    total = filled = 0

    def flush() -> None:
        path = folder / f"part-{len(parts)}"
        try:
            save_file(shard, path, metadata={"format": "pt"})
        except SafetensorError as error:  # a full disk, for example
            raise OSError(f"could not write {path}: {error}") from error
        parts.append(list(shard))
        shard.clear()

    for name, tensor in tensors:
        if shard and filled + tensor.nbytes > limit:
            flush()
            filled = 0
        shard[name] = tensor.contiguous()
        digests[name] = _digests(shard[name])
        filled += tensor.nbytes
        total += tensor.nbytes
    flush()
    if len(parts) == 1:
        os.rename(folder / "part-0", folder / SINGLE)
        write_checksums(folder, digests)
        return 1, total
    weight_map = {}
    for i, names in enumerate(parts):
        final = f"model-{i + 1:05d}-of-{len(parts):05d}.safetensors"
        os.rename(folder / f"part-{i}", folder / final)
        weight_map.update(dict.fromkeys(names, final))
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_text(folder / INDEX, json.dumps(index, indent=2, ensure_ascii=False) + "\n")
    write_checksums(folder, digests)
    return len(parts), total


class WrittenFile(NamedTuple):
    """A file's size in bytes, its SHA-256, and the SHA-256 of its header (length included)."""

    size: int
    sha256: str
    header_sha256: str


def write_synced(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> WrittenFile:
    """Writes and hashes a safetensors file of tensors on any device, synced to disk.

    Unlike `save_file` it does not copy contiguous CPU tensors, allows tensors that share memory and
    lets other Python threads run, so it can write in the background of training. Raises ValueError
    for a dtype that safetensors does not support, and OSError.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    # The largest elements first, so that all tensors are aligned.
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    end = 0
    for name in order:
        tensor, begin = tensors[name], end
        if tensor.dtype not in _KINDS:
            raise ValueError(
                f"dtype of tensor {name} must be one that safetensors supports, got {tensor.dtype}"
            )
        end = begin + tensor.nbytes
        header[name] = {
            "dtype": _KINDS[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    start = len(text).to_bytes(8, "little") + text
    digest = hashlib.sha256(start)
    header_sha256 = digest.hexdigest()
    with naming(path), path.open("wb") as file:
        file.write(start)
        for name in order:
            flat = tensors[name].detach().cpu().contiguous().view(-1)
            content = (
                memoryview(flat.view(torch.uint8).numpy()) if flat.numel() else memoryview(b"")
            )
            for at in range(0, len(content), _CHUNK):
                file.write(content[at : at + _CHUNK])
                digest.update(content[at : at + _CHUNK])
        file.flush()
        os.fsync(file.fileno())
    return WrittenFile(len(start) + end, digest.hexdigest(), header_sha256)
