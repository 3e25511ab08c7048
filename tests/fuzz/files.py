"""Parsers of files of JSON, TOML and lines."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from fomoe_ext.config.io import dump_config, load_config
from fomoe_ext.config.job import TrainConfig
from fomoe_ext.data import cache
from fomoe_ext.data.sequences import BatchIterator, TokenArray
from fomoe_ext.data.text import TextUnit, read_texts
from fomoe_ext.eval import models as eval_models
from fomoe_ext.export.format import model_of_config, transformers_config
from fomoe_ext.files.json_values import from_json, loads, to_json
from fomoe_ext.placement import Placement
from fomoe_ext.plan.hf import read_hf_config
from fomoe_ext.plan.traffic import read_placement
from fomoe_ext.report import metrics
from fomoe_ext.report.measured import measured_coactivation, measured_load
from fomoe_ext.report.tally import Tally

from . import mutate
from .parser import Parser, as_json, from_file, work_folder


def _tokens(path: Path) -> object:
    counts = cache._read_counts(path.parent)
    kind = np.dtype(np.uint8)
    return [cache._map_tokens(path.parent, s, counts, kind, False) for s in cache.SPLITS]


def _metrics(path: Path) -> object:
    metrics.rewind_metrics(path, 3)
    return metrics.read_metrics(path)


def _batches(raw: bytes) -> object:
    return _stream().load_state_dict(from_json(loads(raw)))


@lru_cache(maxsize=1)
def _stream() -> BatchIterator:
    tokens = TokenArray(np.arange(90, dtype=np.uint8), 8, 90)
    return BatchIterator(tokens, "hash", 0, 2, 1, 0)


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


def file_parsers() -> list[Parser]:
    table = Placement.random(
        num_sites=2, num_experts=4, num_layers=2, replication=1, seed=0
    ).to_dict()
    (work_folder() / "train.bin").write_bytes(bytes(9))
    (work_folder() / "val.bin").write_bytes(bytes(4))
    cache = {s: {"tokens": n, "bytes": n, "hash": "0"} for s, n in (("train", 9), ("val", 4))}
    lines = [{"kind": "round", "step": i, "loss": 1.5, "load": [[1.0, 2.0]]} for i in range(1, 6)]
    lines.append({"kind": "validation", "step": 6, "load": [[1.0, 2.0], [3.0, 4.0]]})
    text = "".join(json.dumps(line) + "\n" for line in lines).encode()
    run = work_folder() / "run"
    run.mkdir(exist_ok=True)
    report = {"validation": {"coactivation": [[[0, 2], [2, 1]]] * 2, "tokens": 256}}
    source: Any = SimpleNamespace(run=run)
    model = TrainConfig().model
    exported = transformers_config(model, "byte", 0, "float32")
    words = [{"text": "Hello"}, {"text": "a\nb", "more": 1}]
    jsonl = "\n".join(map(json.dumps, words)).encode()
    value, wrong = (ValueError,), (ValueError, TypeError)
    counts = as_json([[[0, 2], [2, 1]]] * 2)
    return [
        Parser("placement", lambda raw: Placement.from_dict(loads(raw)), value, as_json(table)),
        Parser(
            "placement file",
            from_file("placement.json", lambda path: read_placement(path, 2)),
            value,
            as_json(table["owners"]),
        ),
        Parser(
            "config.toml",
            from_file("config.toml", load_config),
            wrong,
            [dump_config(TrainConfig()).encode()],
            mutate.of_bytes,
            0.04,
        ),
        Parser("co-activation", from_file("counts.json", measured_coactivation), value, counts),
        Parser(
            "report.json: counts",
            from_file("run/report.json", lambda path: measured_coactivation(path.parent)),
            value,
            as_json(report),
        ),
        Parser(
            "report.json: tokens",
            from_file("run/report.json", lambda path: eval_models._reported_tokens(source)),
            value,
            as_json(report),
        ),
        Parser(
            "load",
            from_file("load.json", measured_load),
            value,
            as_json([[1.5, 2], [0, 3]]),
        ),
        Parser(
            "load of metrics.jsonl",
            from_file("run/metrics.jsonl", lambda path: measured_load(path.parent)),
            value,
            [text],
            mutate.of_bytes,
        ),
        Parser("tokens' meta.json", from_file("meta.json", _tokens), value, as_json(cache)),
        Parser(
            "metrics.jsonl",
            from_file("metrics.jsonl", _metrics),
            value,
            [text],
            mutate.of_bytes,
            0.3,
        ),
        Parser(
            "transformers' config.json",
            from_file("hf.json", lambda path: read_hf_config(path, 32)),
            value,
            as_json(*({"model_type": kind, **_SIZES} for kind in _KINDS)),
        ),
        Parser(
            "exported config.json",
            from_file("fomoe.json", lambda p: model_of_config(eval_models._read_json(p))),
            value,
            as_json(exported),
        ),
        Parser(
            "texts.jsonl",
            from_file("texts.jsonl", _texts),
            value,
            [jsonl],
            mutate.of_bytes,
        ),
        Parser("data position", _batches, value, as_json(to_json(_stream().state_dict()))),
        Parser(
            "tally",
            lambda raw: Tally.from_state(from_json(loads(raw))),
            value,
            as_json(to_json(Tally().state_dict())),
        ),
    ]


def _texts(path: Path) -> object:
    unit = TextUnit(path, path.name, None)
    return [(name, "".join(chunks)) for name, chunks in read_texts(unit, "text")]
