"""Parsers of checkpoints and of other files of tensors."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from fomoe_ext.checkpoint import manifest as ckpt
from fomoe_ext.checkpoint.reader import GlobalModelReader, load_state, load_tensors, tensor_names
from fomoe_ext.checkpoint.whole import _checked, require_whole
from fomoe_ext.checkpoint.writer import save_checkpoint
from fomoe_ext.files.states import read_state, write_state
from fomoe_ext.files.tensors import INDEX, SINGLE, TensorFiles
from fomoe_ext.placement import Placement

from . import mutate
from .parser import Parser, as_json, from_file, work_folder

_STATE = {
    "sync": {
        "round": 3,
        "placement": Placement.cyclic(
            num_sites=2, num_experts=4, num_layers=2, replication=1
        ).to_dict(),
        "warmup": [[0, 1]],
    },
    "inner": {"names": ["exp_avg"], "steps": {(0, "a"): 3.0}},
    "loss": float("inf"),
    "counts": (1.5, 2, 3),
    "local": False,
}
_TENSORS = {"a.weight": torch.arange(12.0).view(3, 4), "b": torch.ones(5)}


@lru_cache(maxsize=1)
def _checkpoint() -> Path:
    """A whole checkpoint of one site."""
    return save_checkpoint(
        work_folder(),
        ckpt.checkpoint_name(8),
        _TENSORS.items(),
        _STATE,
        site=0,
        num_sites=1,
        round=2,
        meta={"model": {"hidden_size": 8}, "replication": 1},
        named={f"site0/{name}": tensor.clone() for name, tensor in _TENSORS.items()},
    )


@lru_cache(maxsize=1)
def _training_file() -> str:
    (file,) = (_checkpoint() / ckpt.TRAINING).glob("*.safetensors")
    return f"{ckpt.TRAINING}/{file.name}"


def _original(name: str) -> bytes:
    """A file of the checkpoint as it was written; the parsers put their inputs in its place."""
    kept = work_folder() / "kept" / name
    if not kept.exists():
        kept.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(_checkpoint() / name, kept)
    return kept.read_bytes()


def _in_checkpoint(name: str, read: Callable[[Path], object], listed: bool) -> Any:
    """A parser of one of its files; `listed`: the manifest has the input's size and hashes."""
    _original(name), _original(ckpt.MANIFEST)

    def of_bytes(raw: bytes) -> object:
        _checked.clear()  # a process reads few checkpoints, this one many
        path, manifest = _checkpoint(), _original(ckpt.MANIFEST)
        (path / name).write_bytes(raw)
        if listed:
            content = _unsealed(manifest)
            header = raw[: 8 + int.from_bytes(raw[:8], "little")]
            content["files"][name] |= {
                "size": len(raw),
                "sha256": hashlib.sha256(raw).hexdigest(),
                "header_sha256": hashlib.sha256(header).hexdigest(),
            }
            (path / ckpt.MANIFEST).write_text(json.dumps(content))
        try:
            return read(path)
        finally:
            (path / name).write_bytes(_original(name))
            (path / ckpt.MANIFEST).write_bytes(manifest)

    return of_bytes


def _unsealed(manifest: bytes) -> dict[str, Any]:
    content = json.loads(manifest)
    del content["sha256"]
    return content


def _read_all(path: Path) -> object:
    """Whatever depends on the manifest."""
    require_whole(path)
    wanted = {name: torch.empty(shape) for name, shape in tensor_names(path).items()}
    load_tensors(path, wanted)
    return load_state(path, 0)


def _read_global(path: Path) -> object:
    with GlobalModelReader(path) as reader:
        return [reader.tensor(name) for name in reader.names()[:4]]


def _read_training(path: Path) -> object:
    tensor_names(path)
    wanted = {f"site0/{name}": torch.empty_like(tensor) for name, tensor in _TENSORS.items()}
    load_tensors(path, wanted)
    return wanted


def checkpoint_parsers() -> list[Parser]:
    state, training = "state-00000.json", _training_file()
    refused = (ckpt.CheckpointError,)

    def of_file(
        name: str, file: str, read: Any, how: mutate.Mutator, listed: bool, share: float
    ) -> Parser:
        parser = _in_checkpoint(file, read, listed)
        seed = _original(file)
        if file == ckpt.MANIFEST:  # else only its seal would be tested
            seed = json.dumps(_unsealed(seed)).encode()
        return Parser(name, parser, refused, [seed], how, share)

    safetensors = mutate.of_safetensors
    return [
        of_file("manifest.json", ckpt.MANIFEST, _read_all, mutate.of_json, False, 0.2),
        of_file("site's state", state, lambda p: load_state(p, 0), mutate.of_json, True, 0.5),
        of_file("index", INDEX, _read_global, mutate.of_json, True, 0.3),
        of_file("training tensors", training, _read_training, safetensors, True, 0.2),
    ]


def tensor_file_parsers() -> list[Parser]:
    folder = work_folder() / "tensors"
    (folder / "indexed").mkdir(parents=True, exist_ok=True)
    raw = save(_TENSORS)
    (folder / "indexed" / "one.safetensors").write_bytes(raw)

    def read(path: Path) -> object:
        files = TensorFiles(path.parent)
        return files.bytes_total, [files.read(name) for name in ("a.weight", "b")]

    index = {
        "metadata": {"total_size": 68},
        "weight_map": dict.fromkeys(_TENSORS, "one.safetensors"),
    }
    indexed = from_file(f"tensors/indexed/{INDEX}", read)
    single = from_file(f"tensors/{SINGLE}", read)
    return [
        Parser("model.safetensors", single, (ValueError,), [raw], mutate.of_safetensors, 0.5),
        Parser("index of a model", indexed, (ValueError,), as_json(index), share=0.5),
    ]


def state_parser() -> Parser:
    path = work_folder() / "state"
    write_state(path, {"round": 1, "anchor": {"a": torch.ones(3)}, "tokens": torch.zeros(2)})
    read = from_file("state", read_state)
    return Parser("state file", read, (ValueError,), [path.read_bytes()], mutate.of_safetensors)
