"""A folder of safetensors files, as transformers and `fomoe export` write them: tensors by name."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


class TensorFiles:
    """The tensors of a folder by name, on the CPU; opens each file once, counts what is read.

    Raises ValueError, naming the folder, where it has no such files or they cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bytes_read = 0
        self._open: dict[str, Any] = {}
        index = folder / INDEX
        if index.is_file():
            try:
                self._files: dict[str, str] = dict(json.loads(index.read_text())["weight_map"])
            except (OSError, ValueError, TypeError, KeyError) as error:
                raise ValueError(f"{folder}: cannot read {INDEX} ({error})") from None
        elif (folder / SINGLE).is_file():
            self._files = dict.fromkeys(self._file(SINGLE).keys(), SINGLE)
        else:
            raise ValueError(f"path must be a folder with {SINGLE} or {INDEX}, got {folder}")

    def _file(self, name: str) -> Any:
        if name not in self._open:
            try:
                self._open[name] = safe_open(self.folder / name, framework="pt")
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{self.folder}: cannot read {name} ({error})") from None
        return self._open[name]

    @property
    def bytes_total(self) -> int:
        """Bytes of all files' tensors."""
        total = 0
        for name in set(self._files.values()):
            with (self.folder / name).open("rb") as file:
                header = int.from_bytes(file.read(8), "little")
                total += os.fstat(file.fileno()).st_size - 8 - header
        return total

    def has(self, name: str) -> bool:
        """Whether there is such a tensor."""
        return name in self._files

    def read(self, name: str, row: int | None = None) -> Tensor:
        """A tensor, or one row of it; no other row is read then."""
        if name not in self._files:
            raise ValueError(f"{self.folder} has no tensor {name}")
        file = self._file(self._files[name])
        tensor = file.get_tensor(name) if row is None else file.get_slice(name)[row]
        self.bytes_read += tensor.nbytes
        return tensor
