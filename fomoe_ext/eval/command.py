"""`fomoe eval`: validation loss, perplexity and bits per byte of a model, and the cost of skipping.

Of a run of `fomoe train` the global model is evaluated in this one process and, beside it, what
each site holds alone: the other experts are skipped, as the site skips them in its local steps.
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
    """Validation loss, perplexity and bits per byte of a model; for a run also of each site alone,
    where the experts that it does not hold are skipped."""

    model: Positional[Path]
    """A run folder of `fomoe train` or one of its checkpoints, a folder of `fomoe export`, or a
    folder of a causal language model of transformers."""
    data: tuple[str, ...] = ()
    """Text, split as in training: files, folders and globs of text, .jsonl or .parquet; none =
    that of the run, or Python's standard library."""
    val_data: tuple[str, ...] = ()
    """Text to evaluate on, all of it, instead of `data`; it is kept in memory."""
    text_field: str | None = None
    """Field of a .jsonl line, or column of a parquet file, that holds the text; none = the run's,
    or text."""
    tokenizer: Path | None = None
    """A tokenizer.json; none = that of the model."""
    cache_dir: Path | None = None
    """Folder for token files; none = the run's, or the user's cache folder."""
    max_tokens: int | None = None
    """Tokens to predict; none = as many as the run's last validation, or 524288."""
    seq_len: int | None = None
    """Tokens per window; none = the model's, at most 1024 for one of transformers."""
    batch_size: int | None = None
    """Windows at a time; none = so many that the logits stay below 64 MiB."""
    site: int | None = None
    """Only this site of a run, with the experts it holds; the others are not even read."""
    skip_experts: float | None = None
    """Only with this share of each layer's experts skipped, 0..1, drawn by `seed`."""
    seed: int | None = None
    """Of the draw of skipped experts; none = 0."""
    checkpoint: str | None = None
    """Name of a run's checkpoint, such as step-00000640; none = the newest whole one."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto = cuda where there is one, else cpu."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """bfloat16: matrix products under autocast; none = that of the run, or float32."""
    trust_remote_code: bool = False
    """Run code that a transformers folder brings along (not needed for one of `fomoe export`)."""
    json: Path | None = None
    """Also write the figures to this file."""

    def __post_init__(self) -> None:
        for name in ("max_tokens", "seq_len", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be >= 1, got {value}")
        if self.site is not None and self.skip_experts is not None:
            raise ValueError("site and skip_experts cannot be given together")
        if self.seed is not None and self.skip_experts is None:
            raise ValueError("seed needs skip_experts, whose draw it is of")
        for name, value in (("data", self.data), ("cache_dir", self.cache_dir)):
            if value and self.val_data:
                raise ValueError(f"{name} has no effect beside val_data, give one of them")
        if self.skip_experts is not None and not 0 <= self.skip_experts <= 1:
            raise ValueError(f"skip_experts must be in [0, 1], got {self.skip_experts}")


class Score(NamedTuple):
    """Figures of one variant. loss: nats per token; tokens: predicted; skipped_share: of all slots,
    0..1, None where it is not counted."""

    name: str
    loss: float
    bits_per_byte: float
    tokens: int
    skipped_share: float | None
    seconds: float

    @property
    def perplexity(self) -> float:
        """exp of the loss, per token; infinite where a float cannot hold it."""
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
    """The figures of a variant on the validation text, at most `max_tokens` of it.

    `batch_size` is in windows, `autocast` the dtype of matrix products.
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
    """All the text in `paths` as validation text, held in memory; errors as of `open_data`."""
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
            f"val_data is too short: {len(tokens)} tokens ({found.description}), and one window "
            f"needs seq_len + 1 = {seq_len + 1}"
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
            f"tokenizer {subject.tokenizer or 'bytes'} has {data.vocab_size} ids, the model "
            f"{subject.vocab_size}: it is another model's"
        )
    return data


# ------------------------------------------------------------------------------------ the command


def _window(subject: Subject, options: EvalOptions) -> int:
    seq_len = options.seq_len or subject.seq_len
    if subject.kind != "transformers" and seq_len > subject.seq_len:
        raise ValueError(f"seq_len must be <= the model's {subject.seq_len}, got {seq_len}")
    return seq_len


def evaluate_model(options: EvalOptions) -> dict[str, Any]:
    """Everything `fomoe eval` tells, as plain data: see `--json`.

    Raises ValueError and OSError for what the user can mend.
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
    """The table of `evaluate_model`'s figures."""
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
        text = f"an older checkpoint is taken, because {figures['passed_over']}"
        console.print(text, markup=False, soft_wrap=True)
    print_tables([eval_table(figures)], console)
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        write_text(options.json, json.dumps(figures, indent=1) + "\n")
    return 0
