"""Every parser of what comes from disk or wire, with valid inputs and the errors it may raise."""

from __future__ import annotations

import atexit
import hashlib
import json
import random
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from safetensors.torch import save

from fomoe_ext.checkpoint import manifest as ckpt
from fomoe_ext.checkpoint import whole
from fomoe_ext.checkpoint.reader import GlobalModelReader, load_state, load_tensors, tensor_names
from fomoe_ext.checkpoint.whole import require_whole
from fomoe_ext.checkpoint.writer import save_checkpoint
from fomoe_ext.config.io import dump_config, load_config
from fomoe_ext.config.job import TrainConfig
from fomoe_ext.data import sequences as data
from fomoe_ext.data.text import TextUnit, read_texts
from fomoe_ext.eval import models as eval_models
from fomoe_ext.export import command as export
from fomoe_ext.fault.membership import read_current
from fomoe_ext.files.json_values import from_json, loads, to_json
from fomoe_ext.files.states import read_state, write_state
from fomoe_ext.files.tensors import INDEX, SINGLE, TensorFiles
from fomoe_ext.launch import messages
from fomoe_ext.layer.mesh import SiteRanks
from fomoe_ext.outer.codec import get_codec
from fomoe_ext.outer.meeting import require_good
from fomoe_ext.outer.options import MeetingError
from fomoe_ext.outer.reduce import broken_seals, seal
from fomoe_ext.placement import Placement, wire
from fomoe_ext.placement.coactivation import measured_coactivation
from fomoe_ext.placement.spread import measured_load
from fomoe_ext.plan.hf import read_hf_config
from fomoe_ext.plan.traffic import read_placement
from fomoe_ext.report import metrics
from fomoe_ext.report.tally import Tally

from . import mutate

Errors = tuple[type[Exception], ...]


@dataclass(frozen=True)
class Parser:
    """What reads bytes.

    read: takes them, and returns or raises one of `refuses`. corpus: valid ones. mutate: damages
    them. share: how many of a run's inputs it gets, against the others' shares.
    """

    name: str
    read: Callable[[bytes], object]
    refuses: Errors
    corpus: Sequence[bytes]
    mutate: mutate.Mutator = mutate.of_json
    share: float = 1.0

    def accepts(self, raw: bytes) -> bool:
        """Whether it reads the bytes. Lets through any error that it must not raise."""
        try:
            self.read(raw)
        except self.refuses:
            return False
        return True

    def damaged(self, chance: random.Random) -> bytes:
        """A damaged input."""
        return self.mutate(chance, self.corpus)


@lru_cache(maxsize=1)
def _folder() -> Path:
    """Where this process's inputs lie; in memory where that can be, for there are many."""
    memory = Path("/dev/shm")
    folder = tempfile.mkdtemp(prefix="fomoe-fuzz-", dir=memory if memory.is_dir() else None)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def _json(*values: Any) -> list[bytes]:
    return [json.dumps(value).encode() for value in values]


def _from_file(name: str, read: Callable[[Path], object]) -> Callable[[bytes], object]:
    """A parser of a file of that name."""

    def of_bytes(raw: bytes) -> object:
        path = _folder() / name
        path.write_bytes(raw)
        return read(path)

    return of_bytes


# ------------------------------------------------------------------------------------ checkpoints


_STATE = {
    "sync": {"round": 3, "placement": Placement.cyclic(2, 4, 2, 1).to_dict(), "warmup": [[0, 1]]},
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
        _folder(),
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
    kept = _folder() / "kept" / name
    if not kept.exists():
        kept.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(_checkpoint() / name, kept)
    return kept.read_bytes()


def _in_checkpoint(name: str, read: Callable[[Path], object], listed: bool) -> Any:
    """A parser of one of its files; `listed`: the manifest has the input's size and hashes."""
    _original(name), _original(ckpt.MANIFEST)

    def of_bytes(raw: bytes) -> object:
        whole._checked.clear()  # a process reads few checkpoints, this one many
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


def _checkpoints() -> list[Parser]:
    state, training = "state-00000.json", _training_file()
    refused = (ckpt.CheckpointError,)

    def of_file(
        name: str, file: str, read: Any, how: mutate.Mutator, listed: bool, share: float
    ) -> Parser:
        parser = _in_checkpoint(file, read, listed)
        seed = _original(file)
        if file == ckpt.MANIFEST:  # else its seal is all that is tried
            seed = json.dumps(_unsealed(seed)).encode()
        return Parser(name, parser, refused, [seed], how, share)

    safetensors = mutate.of_safetensors
    return [
        of_file("manifest.json", ckpt.MANIFEST, _read_all, mutate.of_json, False, 0.2),
        of_file("site's state", state, lambda p: load_state(p, 0), mutate.of_json, True, 0.5),
        of_file("index", INDEX, _read_global, mutate.of_json, True, 0.3),
        of_file("training tensors", training, _read_training, safetensors, True, 0.2),
    ]


def _tensor_files() -> list[Parser]:
    folder = _folder() / "tensors"
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
    indexed = _from_file(f"tensors/indexed/{INDEX}", read)
    single = _from_file(f"tensors/{SINGLE}", read)
    return [
        Parser("model.safetensors", single, (ValueError,), [raw], mutate.of_safetensors, 0.5),
        Parser("index of a model", indexed, (ValueError,), _json(index), share=0.5),
    ]


# ------------------------------------------------------------------------------- JSON, TOML, lines


def _states() -> Parser:
    path = _folder() / "state"
    write_state(path, {"round": 1, "anchor": {"a": torch.ones(3)}, "tokens": torch.zeros(2)})
    read = _from_file("state", read_state)
    return Parser("state file", read, (ValueError,), [path.read_bytes()], mutate.of_safetensors)


def _tokens(path: Path) -> object:
    counts = data._read_counts(path.parent)
    kind = np.dtype(np.uint8)
    return [data._map_tokens(path.parent, s, counts, kind, False) for s in data._SPLITS]


def _metrics(path: Path) -> object:
    metrics.rewind_metrics(path, 3)
    return metrics.read_metrics(path)


def _batches(raw: bytes) -> object:
    return _stream().load_state_dict(from_json(loads(raw)))


@lru_cache(maxsize=1)
def _stream() -> data.BatchIterator:
    tokens = data.TokenArray(np.arange(90, dtype=np.uint8), 8, 90)
    return data.BatchIterator(tokens, "hash", 0, 2, 1, 0)


_SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "vocab_size": 100,
    "num_experts_per_tok": 2,
    "intermediate_size": 32,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 32,
    "num_local_experts": 8,
    "sliding_window": 8,
    "mlp_only_layers": [1],
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}
_KINDS = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v3", "gpt_oss")


def _files() -> list[Parser]:
    table = Placement.random(2, 4, 2, 1, seed=0).to_dict()
    (_folder() / "train.bin").write_bytes(bytes(9))
    (_folder() / "val.bin").write_bytes(bytes(4))
    cache = {s: {"tokens": n, "bytes": n, "hash": "0"} for s, n in (("train", 9), ("val", 4))}
    lines = [{"kind": "round", "step": i, "loss": 1.5, "load": [[1.0, 2.0]]} for i in range(1, 6)]
    lines.append({"kind": "validation", "step": 6, "load": [[1.0, 2.0], [3.0, 4.0]]})
    text = "".join(json.dumps(line) + "\n" for line in lines).encode()
    run = _folder() / "run"
    run.mkdir(exist_ok=True)
    report = {"validation": {"coactivation": [[[0, 2], [2, 1]]] * 2, "tokens": 256}}
    source: Any = SimpleNamespace(run=run)
    model = TrainConfig().model
    exported = export.transformers_config(model, "byte", 0, "float32")
    words = [{"text": "Hello"}, {"text": "a\nb", "more": 1}]
    jsonl = "\n".join(map(json.dumps, words)).encode()
    value, wrong = (ValueError,), (ValueError, TypeError)
    counts = _json([[[0, 2], [2, 1]]] * 2)
    return [
        Parser("placement", lambda raw: Placement.from_dict(loads(raw)), value, _json(table)),
        Parser(
            "placement file",
            _from_file("placement.json", lambda path: read_placement(path, 2)),
            value,
            _json(table["owners"]),
        ),
        Parser(
            "config.toml",
            _from_file("config.toml", load_config),
            wrong,
            [dump_config(TrainConfig()).encode()],
            mutate.of_bytes,
            0.04,
        ),
        Parser("co-activation", _from_file("counts.json", measured_coactivation), value, counts),
        Parser(
            "report.json: counts",
            _from_file("run/report.json", lambda path: measured_coactivation(path.parent)),
            value,
            _json(report),
        ),
        Parser(
            "report.json: tokens",
            _from_file("run/report.json", lambda path: eval_models._reported_tokens(source)),
            value,
            _json(report),
        ),
        Parser(
            "load",
            _from_file("load.json", measured_load),
            value,
            _json([[1.5, 2], [0, 3]]),
        ),
        Parser(
            "load of metrics.jsonl",
            _from_file("run/metrics.jsonl", lambda path: measured_load(path.parent)),
            value,
            [text],
            mutate.of_bytes,
        ),
        Parser("tokens' meta.json", _from_file("meta.json", _tokens), value, _json(cache)),
        Parser(
            "metrics.jsonl",
            _from_file("metrics.jsonl", _metrics),
            value,
            [text],
            mutate.of_bytes,
            0.3,
        ),
        Parser(
            "transformers' config.json",
            _from_file("hf.json", lambda path: read_hf_config(path, 32)),
            value,
            _json(*({"model_type": kind, **_SIZES} for kind in _KINDS)),
        ),
        Parser(
            "exported config.json",
            _from_file("fomoe.json", lambda p: export.model_of_config(eval_models._read_json(p))),
            value,
            _json(exported),
        ),
        Parser(
            "texts.jsonl",
            _from_file("texts.jsonl", _texts),
            value,
            [jsonl],
            mutate.of_bytes,
        ),
        Parser("data position", _batches, value, _json(to_json(_stream().state_dict()))),
        Parser(
            "tally",
            lambda raw: Tally.from_state(from_json(loads(raw))),
            value,
            _json(to_json(Tally().state_dict())),
        ),
    ]


def _texts(path: Path) -> object:
    unit = TextUnit(path, path.name, None)
    return [(name, "".join(chunks)) for name, chunks in read_texts(unit, "text")]


# ------------------------------------------------------------------------------------------- wire


def _status(raw: bytes) -> object:
    """What site 1 tells before a meeting."""
    row = torch.zeros(wire.STATUS_BYTES, dtype=torch.uint8)
    cut = raw[: wire.STATUS_BYTES]
    row[: len(cut)] = torch.frombuffer(bytearray(cut), dtype=torch.uint8) if cut else 0
    group = SimpleNamespace(size=2, gather_now=lambda own: (torch.stack([own, row]), 0))
    groups = SimpleNamespace(everyone=(0, 1), group=lambda owners: group)
    sync: Any = SimpleNamespace(groups=groups, ranks=SiteRanks(), site=0)
    return require_good(sync, _MEETING, "")


_MEETING = "3.0 0123abcd"
_GUARD = 64


def _payload_reader(name: str) -> Callable[[bytes], object]:
    """A parser of payloads: two bytes that tell the number of values and whether the payload is cut
    to its right size, then the payload."""
    codec = get_codec(name)

    def read(raw: bytes) -> object:
        raw = raw.ljust(2, b"\0")
        numel, fits = 1 + raw[0] + (4000 if raw[1] & 1 else 0), raw[1] & 6
        size = codec.wire_bytes(numel)
        body = raw[2:]
        if fits:
            body = (body * (1 + size // max(1, len(body))) + bytes(size))[:size]
        payload = (
            torch.frombuffer(bytearray(body), dtype=torch.uint8)
            if body
            else torch.empty(0, dtype=torch.uint8)
        )
        kept = torch.full((numel + 2 * _GUARD,), 7.0)
        try:
            codec.decode(payload, numel, out=kept[_GUARD:-_GUARD])
        except ValueError as error:
            if len(body) == size and "NaN or infinite" not in str(error):
                raise AssertionError(f"a payload of {size} bytes is refused: {error}") from error
            raise
        if len(body) != size:
            raise AssertionError(f"a payload of {len(body)} bytes is taken for {size}")
        guards = torch.cat([kept[:_GUARD], kept[-_GUARD:]])
        if not bool((guards == 7).all()):
            raise AssertionError("decoding wrote past its values")
        own = torch.ones(numel)
        codec.decode_sum(torch.stack([payload, payload]), numel, own=own, own_rank=1)
        codec.reduce(payload[None], numel, torch.empty_like(payload), own=own)
        return kept

    return read


def _seal(raw: bytes) -> object:
    """A payload with its hash; its size is that of the bucket, whatever was sent."""
    row = torch.frombuffer(bytearray(raw.ljust(wire.HASH_BYTES, b"\0")), dtype=torch.uint8)
    if broken_seals([row]):
        raise ValueError("damaged")
    return row


def _sealed(values: torch.Tensor) -> bytes:
    row = torch.cat([values.view(torch.uint8), torch.zeros(wire.HASH_BYTES, dtype=torch.uint8)])
    seal(row[None])
    return bytes(row.tolist())


_MESSAGES = [
    {"placement": Placement.cyclic(2, 4, 1, 1).to_dict(), "codec": "int4", "seed": 0},
    [("", {"a.weight": (48, "torch.float32 of shape [3, 4]")})],
    {(0, 1): 2**64 - 1, (1,): 3},
    [float("nan"), 0.1, None, True],
]


def _wire() -> list[Parser]:
    chance = torch.Generator().manual_seed(0)
    encoded = [messages.encode(value) for value in _MESSAGES]
    parsers = [
        Parser("JSON values", lambda raw: from_json(loads(raw)), (ValueError,), encoded, share=3.0),
        Parser(
            "messages",
            lambda raw: messages.decode(raw, "site 1"),
            (messages.MessageError,),
            encoded,
            share=3.0,
        ),
        Parser(
            "view in force",
            lambda raw: read_current(raw, 4),
            (ValueError,),
            _json({"name": "7.2.1-1-3", "members": [0, 1, 3]}, {"name": "1.1.", "members": []}),
        ),
        Parser(
            "statuses",
            _status,
            (MeetingError,),
            [f"{_MEETING} ".encode(), f"{_MEETING} the value of a is NaN".encode()],
            mutate.of_bytes,
        ),
        Parser(
            "seals",
            _seal,
            (ValueError,),
            [_sealed(torch.randn(n, generator=chance)) for n in (1, 30)],
            mutate.of_bytes,
        ),
    ]
    for name in wire.CODECS:
        codec, corpus = get_codec(name), []
        for extra, count in ((0, 70), (0, 200), (1, 96)):
            values = torch.randn(1 + count + 4000 * extra, generator=chance)
            payload = codec.encode(values)
            corpus.append(bytes((count, 2 + extra)) + bytes(payload.tolist()))
            corpus.append(bytes((count, extra)) + bytes(payload.tolist()))
        reader = _payload_reader(name)
        parsers.append(Parser(f"payload {name}", reader, (ValueError,), corpus, mutate.of_bytes))
    return parsers


@lru_cache(maxsize=1)
def parsers() -> dict[str, Parser]:
    """All parsers by name; makes the files that they need, once per process."""
    found = [*_wire(), *_files(), *_checkpoints(), *_tensor_files(), _states()]
    return {parser.name: parser for parser in found}
