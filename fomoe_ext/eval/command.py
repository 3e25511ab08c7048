"""`fomoe eval`: validation loss, perplexity and bits per byte of a model, and the cost of skipping.

For a run of `fomoe train` it evaluates the global model and, for each site, the model with only
that site's experts: the other experts are skipped, as in the local steps of the site. All of this
happens in one process.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from rich.console import Console
from tyro.conf import Positional

from fomoe_ext.checkpoint.manifest import CheckpointError
from fomoe_ext.data.cache import token_dtype
from fomoe_ext.data.sequences import TextData, TokenArray, open_data
from fomoe_ext.data.text import find_texts, load_tokenizer, read_texts
from fomoe_ext.eval.models import Skipping, Subject, Variant, find_subject
from fomoe_ext.files.atomic import write_text
from fomoe_ext.files.outputs import require_file
from fomoe_ext.launch.world import World, choose_device
from fomoe_ext.report.tables import ReportTable, print_tables
from fomoe_ext.report.units import human_count

_LOGIT_BYTES = 64 << 20
_MOST_WINDOWS = 64


@dataclass(frozen=True)
class EvalOptions:
    """Validation loss, perplexity and bits per byte of a model. For a run also of each site alone,
    with the experts skipped that it does not hold."""

    model: Positional[Path]
    """A run folder of `fomoe train` or one of its checkpoints, a folder of `fomoe export`, or a
    folder of a causal language model of transformers."""
    data: tuple[str, ...] = ()
    """Text, split as in training: files, folders and globs of text, .jsonl or .parquet. Default:
    that of the run, else the source of Python's standard library."""
    val_data: tuple[str, ...] = ()
    """Text that is used whole for the evaluation, instead of `data`; it is kept in memory."""
    text_field: str | None = None
    """Field of a .jsonl line, or column of a parquet file, with the text. Default: that of the run,
    else text."""
    tokenizer: Path | None = None
    """A tokenizer.json. Default: that of the model."""
    cache_dir: Path | None = None
    """Folder for token files. Default: that of the run, else the user's cache folder."""
    max_tokens: int | None = None
    """Largest number of tokens to predict. Default: as in the run's last validation, else
    524288."""
    seq_len: int | None = None
    """Tokens per window. Default: that of the model, but at most 1024 for transformers models."""
    batch_size: int | None = None
    """Windows per batch. Default: as many as keep the logits below 64 MiB."""
    site: int | None = None
    """Evaluate only this site of a run, with the experts that it holds; others are not read."""
    skip_experts: float | None = None
    """Evaluate only with this share of each layer's experts skipped, 0..1, drawn with `seed`."""
    seed: int | None = None
    """Seed of the draw of skipped experts. Default: 0."""
    checkpoint: str | None = None
    """Name of a run's checkpoint, such as step-00000640. Default: the newest complete one."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda if there is a GPU, else cpu."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """bfloat16: matrix products under autocast. Default: that of the run, else float32."""
    trust_remote_code: bool = False
    """Run the Python code in a transformers folder. Not needed for a folder of `fomoe export`."""
    json: Path | None = None
    """Also write the results to this JSON file."""

    def __post_init__(self) -> None:
        for name in ("max_tokens", "seq_len", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.site is not None and self.skip_experts is not None:
            raise ValueError("site and skip_experts must not be given together")
        if self.seed is not None and self.skip_experts is None:
            raise ValueError("seed must be given with skip_experts: it is the seed of that draw")
        for name, value in (("data", self.data), ("cache_dir", self.cache_dir)):
            if value and self.val_data:
                raise ValueError(f"{name} and val_data must not be given together")
        if self.skip_experts is not None and not 0 <= self.skip_experts <= 1:
            raise ValueError(f"skip_experts must be in [0, 1], got {self.skip_experts}")


class Score(NamedTuple):
    """Results of one variant. loss: nats per token. tokens: predicted tokens. skipped_share: of all
    slots, 0..1; None = not counted."""

    name: str
    loss: float
    bits_per_byte: float
    tokens: int
    skipped_share: float | None
    seconds: float

    @property
    def perplexity(self) -> float:
        """exp(loss) per token; infinite if a float cannot represent it."""
        return math.exp(self.loss) if self.loss < 700 else math.inf


@torch.no_grad()
def score(
    variant: Variant,
    data: TextData,
    *,
    batch_size: int,
    max_tokens: int,
    device: torch.device,
    autocast: torch.dtype | None = None,
) -> Score:
    """The results of a variant on at most `max_tokens` of the validation text.

    batch_size: in windows. autocast: dtype of matrix products; None = no autocast.
    """
    start = time.perf_counter()
    nats, count, skipped = 0.0, 0, 0.0
    for batch in data.val_batches(batch_size, max_tokens=max_tokens):
        predicted = batch[:, 1:].numel()
        with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
            nats += float(variant.loss_of(batch.to(device))) * predicted
        count += predicted
        for layer in variant.layers:
            assert layer.stats is not None
            skipped += float(layer.stats.skipped_share) * predicted / len(variant.layers)
    loss = nats / count
    return Score(
        name=variant.name,
        loss=loss,
        bits_per_byte=data.bits_per_byte(loss),
        tokens=count,
        skipped_share=skipped / count if variant.layers else None,
        seconds=time.perf_counter() - start,
    )


# --------------------------------------------------------------------------------------- the text


def validation_text(
    paths: Sequence[str], seq_len: int, tokenizer: Path | None, text_field: str
) -> TextData:
    """All text in `paths` as validation text, in memory; errors as of `open_data`."""
    coder = load_tokenizer(tokenizer)
    found = find_texts(paths, split="val")
    dtype = token_dtype(coder.vocab_size)
    pieces, num_bytes = [np.zeros(0, dtype)], 0
    for unit in found.units:
        for name, chunks in read_texts(unit, text_field):
            for chunk in chunks:
                try:
                    pieces.append(coder.encode(chunk).astype(dtype))
                except ValueError as error:
                    raise ValueError(f"{unit.path} ({name}): {error}") from None
                num_bytes += len(chunk.encode())
            pieces.append(coder.separator.astype(dtype))
    tokens = np.concatenate(pieces)
    if len(tokens) <= seq_len:
        raise ValueError(
            f"val_data must have at least seq_len + 1 = {seq_len + 1} tokens, got {len(tokens)} "
            f"({found.description})"
        )
    array = TokenArray(tokens, seq_len, num_bytes)
    return TextData(
        train=array,
        val=array,
        vocab_size=coder.vocab_size,
        content_hash=hashlib.sha256(tokens.tobytes()).hexdigest(),
        description=f"{found.description}: {len(found.units)} files, {num_bytes / 1e6:.2f} MB, "
        f"{coder.name} tokens",
        skipped_files=found.skipped,
    )


def _open_text(subject: Subject, options: EvalOptions, seq_len: int) -> TextData:
    text = subject.text
    field = options.text_field or text.text_field
    if options.val_data:
        data = validation_text(options.val_data, seq_len, subject.tokenizer, field)
    else:
        data = open_data(
            options.data or text.data,
            seq_len,
            val_paths=None if options.data else text.val_data or None,
            validation_fraction=text.validation_fraction,
            text_field=field,
            tokenizer=subject.tokenizer,
            cache_dir=options.cache_dir or text.cache_dir,
        )
    if data.vocab_size > subject.vocab_size:
        raise ValueError(
            f"tokenizer {subject.tokenizer or 'bytes'} must have at most the model's "
            f"{subject.vocab_size} ids, got {data.vocab_size}: it is of another model"
        )
    return data


# ------------------------------------------------------------------------------------ the command


def _window(subject: Subject, options: EvalOptions) -> int:
    seq_len = options.seq_len or subject.seq_len
    if subject.kind != "transformers" and seq_len > subject.seq_len:
        raise ValueError(f"seq_len must be at most the model's {subject.seq_len}, got {seq_len}")
    return seq_len


def evaluate_model(options: EvalOptions) -> dict[str, Any]:
    """All results of `fomoe eval`, as written by `--json`.

    Raises ValueError and OSError for errors that the user can correct.
    """
    subject = find_subject(
        options.model,
        Skipping(options.site, options.skip_experts, options.seed or 0),
        checkpoint=options.checkpoint,
        tokenizer=options.tokenizer,
        trust_remote_code=options.trust_remote_code,
    )
    seq_len, device = _window(subject, options), choose_device(options.device, World())
    try:
        data = _open_text(subject, options, seq_len)
    except RuntimeError as error:  # a library that is not installed
        raise ValueError(str(error)) from error
    fitting = _LOGIT_BYTES // (4 * subject.vocab_size * seq_len)
    dtype = options.dtype or subject.dtype
    scores = []
    try:
        for variant in subject.variants(device):
            scores.append(
                score(
                    variant,
                    data,
                    batch_size=options.batch_size or max(1, min(_MOST_WINDOWS, fitting)),
                    max_tokens=options.max_tokens or subject.tokens,
                    device=device,
                    autocast=torch.bfloat16 if dtype == "bfloat16" else None,
                )
            )
            del variant  # before the next one is made
    except CheckpointError as error:
        raise ValueError(str(error)) from error
    return {
        "model": str(options.model),
        "kind": subject.kind,
        **subject.facts,
        "data": data.description,
        "seq_len": seq_len,
        "dtype": dtype,
        "device": str(device),
        "results": [{**s._asdict(), "perplexity": s.perplexity} for s in scores],
    }


def eval_table(figures: dict[str, Any]) -> ReportTable:
    """The results of `evaluate_model` as a table."""
    results = figures["results"]
    first = results[0]
    rows = []
    for result in results:
        skipped = result["skipped_share"]
        row = [
            result["name"],
            f"{result['loss']:.4f}",
            f"{result['perplexity']:.4g}",
            f"{result['bits_per_byte']:.3f}",
            "-" if skipped is None else f"{skipped:.1%}",
        ]
        if len(results) > 1:
            row.append("" if result is first else f"{result['loss'] - first['loss']:+.4f}")
        rows.append(tuple(row))
    columns = ("", "loss", "perplexity", "bits/byte", "skipped slots")
    where, others = figures.get("round"), results[1:]
    note = (
        f"Loss in nats per token, over {human_count(first['tokens'])} tokens in windows of "
        f"{figures['seq_len']}. Text: {figures['data']}."
    )
    cost = "cost of skipping"
    if others and all(result["skipped_share"] == 0 for result in others):
        cost = "cost of fewer experts"
        note += " No slot is skipped, as tokens choose among the experts that are there."
    return ReportTable(
        f"{figures['model']}" + ("" if where is None else f", round {where}"),
        (*columns, cost) if others else columns,
        tuple(rows),
        note,
    )


def main(arguments: Sequence[str]) -> int:
    """`fomoe eval MODEL [flags]`; returns the exit code.

    Raises ValueError and OSError for bad values and files; SystemExit as tyro does.
    """
    import tyro

    options = tyro.cli(EvalOptions, prog="fomoe eval", args=list(arguments))
    if options.json is not None:
        require_file("--json", options.json)
    figures = evaluate_model(options)
    console = Console(highlight=False)
    if figures.get("passed_over"):
        text = f"using an older checkpoint, because {figures['passed_over']}"
        console.print(text, markup=False, soft_wrap=True)
    print_tables([eval_table(figures)], console)
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        write_text(options.json, json.dumps(figures, indent=1) + "\n")
    return 0
