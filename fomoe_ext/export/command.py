"""`fomoe export`: the global model of a run as one folder, for transformers or as plain tensors.

A checkpoint has every tensor of the global model once, with experts as single tensors, in the files
of the sites that wrote them. The export reads tensors one by one and writes them in shards, so that
at most one shard is in memory. The folder is renamed from a temporary name when it is complete.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from safetensors import SafetensorError
from torch import Tensor
from tyro.conf import Positional

from fomoe_ext.checkpoint import manifest as ckpt
from fomoe_ext.checkpoint.reader import GlobalModelReader
from fomoe_ext.checkpoint.whole import require_content
from fomoe_ext.config.io import dump_config
from fomoe_ext.config.job import TrainConfig
from fomoe_ext.config.model import ModelConfig, count_parameters
from fomoe_ext.config.sites import SitesConfig
from fomoe_ext.export.card import model_card
from fomoe_ext.export.format import exported_name, transformers_config, write_json
from fomoe_ext.export.source import Source, find_source, model_files
from fomoe_ext.export.tokenizer import TOKENIZER, read_tokenizer, write_tokenizer
from fomoe_ext.files.atomic import write_text
from fomoe_ext.files.folder_lock import hold
from fomoe_ext.files.outputs import require_new
from fomoe_ext.files.tensors import write_tensors
from fomoe_ext.layer.assemble import global_names
from fomoe_ext.model.language import LanguageModel
from fomoe_ext.report.metrics import read_metrics
from fomoe_ext.report.runs import CONFIG, METRICS
from fomoe_ext.report.units import human_bytes, human_count

_CODE = ("configuration_fomoe.py", "modeling_fomoe.py")

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class ExportOptions:
    """Write the global model of a run, with the experts of all sites, as one model folder."""

    run: Positional[Path]
    """A run folder of `fomoe train`, or one of its checkpoints."""
    format: Literal["transformers", "safetensors"] = "transformers"
    """transformers: load it by AutoModelForCausalLM.from_pretrained(.., trust_remote_code=True), as
    the model's code is in the folder. safetensors: tensors under fomoe_ext's names, config.toml."""
    out: Path | None = None
    """Folder to write, new or empty; default: exported-<format> in the run folder."""
    checkpoint: str | None = None
    """Name of a checkpoint, such as step-00000640; default: the newest complete one."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the written tensors; selection biases are always float32."""
    tokenizer: Path | None = None
    """The run's tokenizer.json, if it is not where it was during the run."""
    shard_bytes: int = 4 << 30
    """Largest size of a file in bytes; the export needs about as much memory."""

    def __post_init__(self) -> None:
        if self.shard_bytes < 1:
            raise ValueError(f"shard_bytes must be at least 1, got {self.shard_bytes}")


def _global_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the global model's tensors, without allocating them."""
    model = LanguageModel(config, device="meta")
    held = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    shapes = {}
    for name in sorted(global_names(model)):
        stack = re.sub(r"\bexperts\.\d+\.", "experts.", name)
        shapes[name] = held[name] if stack == name else held[stack][1:]
    return shapes


# ------------------------------------------------------------------------------------------ tensors


def _tensors(source: Source, options: ExportOptions) -> Iterator[tuple[str, Tensor]]:
    """The global model's tensors under their new names, read one by one."""
    shapes = _global_shapes(source.model)
    dtype = _DTYPES[options.dtype]
    with GlobalModelReader(source.checkpoint) as reader:
        if differing := shapes.keys() ^ set(reader.names()):
            raise ValueError(
                f"checkpoint {source.checkpoint} must have the tensors of its model, got other "
                f"names: {sorted(differing)[:3]} are only in one of the two"
            )
        for name, shape in shapes.items():
            value = reader.tensor(name)
            if tuple(value.shape) != shape:
                raise ValueError(
                    f"{name} in checkpoint {source.checkpoint} must have shape {list(shape)}, got "
                    f"{list(value.shape)}"
                )
            if not name.endswith("selection_bias"):
                value = value.to(dtype)
            yield exported_name(name) if options.format == "transformers" else name, value


# ------------------------------------------------------------------------- what stands beside them


def _validation(source: Source) -> dict[str, Any] | None:
    """The run's last validation of the exported model; None if there was none."""
    metrics = None if source.run is None else source.run / METRICS
    if metrics is None or not metrics.is_file():
        return None
    records = [
        record
        for record in read_metrics(metrics)
        if record["kind"] == "validation" and record["round"] == source.manifest.round
    ]
    return records[-1] if records else None


def _portable_config(source: Source) -> TrainConfig:
    """The run's configuration without paths of its machine; for a lone checkpoint, sizes only."""
    if source.config is None:
        return TrainConfig(model=source.model, sites=SitesConfig(sites=1, replication=1))
    config = source.config
    return replace(
        config,
        model=source.model,
        data=replace(config.data, tokenizer=None, cache_dir=None),
        sites=replace(config.sites, placement_file=None),
        run=replace(config.run, run_dir=None, resume=None),
    )


def _write_folder(folder: Path, source: Source, options: ExportOptions) -> tuple[int, int]:
    tokenizer = source.tokenizer(options.tokenizer)
    require_content(source.checkpoint, model_files(source.manifest))
    if options.format == "transformers":
        end = write_tokenizer(folder, tokenizer, source.model)
        tokens = "bytes" if tokenizer is None else TOKENIZER
        config = transformers_config(source.model, tokens, end, options.dtype)
        write_json(folder / "config.json", config)
        ends = {} if end is None else {"eos_token_id": end, "pad_token_id": end}
        write_json(folder / "generation_config.json", ends)
        code = resources.files("fomoe_ext.export.exported")
        for name in _CODE:
            write_text(folder / name, (code / name).read_text(encoding="utf-8"))
        card = model_card(
            source.model,
            source.config,
            source.manifest,
            _validation(source),
            tokens=tokens,
            end=end,
            dtype=options.dtype,
        )
        write_text(folder / "README.md", card)
    else:
        if tokenizer is not None:
            read_tokenizer(tokenizer)
            shutil.copyfile(tokenizer, folder / TOKENIZER)
        write_text(folder / CONFIG, dump_config(_portable_config(source)))
    # Last, because it writes checksums of the other files.
    return write_tensors(folder, _tensors(source, options), options.shard_bytes)


def _out_folder(source: Source, options: ExportOptions) -> Path:
    if options.out is None and source.run is None:
        raise ValueError(
            f"out must be given for a checkpoint outside of a run: {source.checkpoint}"
        )
    out = options.out or source.run / f"exported-{options.format}"  # type: ignore[operator]
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"out must be a new or empty folder, got the file {out}")
    if out.is_dir() and any(out.iterdir()):
        raise FileExistsError(f"out must be a new or empty folder, got {out}, which is not empty")
    require_new("out", out)
    return out


def export(source: Source, options: ExportOptions) -> tuple[Path, int, int]:
    """Writes the global model of a source; returns the folder, the number of its tensor files and
    their bytes.

    Raises ValueError or OSError, and leaves nothing behind, if it cannot be written.
    """
    out = _out_folder(source, options)
    partial = out.with_name(f".{out.name}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    lock = hold(partial, "out")  # otherwise the next lines could delete files of another export
    try:
        for path in partial.iterdir():  # left by an export that was killed
            if path != lock.path:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        files, size = _write_folder(partial, source, options)
        _out_folder(source, options)  # fails if another process has created it meanwhile
        lock.release(remove=True)
        os.rename(partial, out)
    except ckpt.CheckpointError as error:
        raise ValueError(str(error)) from error
    except SafetensorError as error:
        raise OSError(f"could not write {out}: {error}") from error
    finally:
        if partial.exists():
            shutil.rmtree(partial, ignore_errors=True)
        lock.release()
    return out, files, size


def main(arguments: Sequence[str]) -> int:
    """`fomoe export RUN [flags]`; returns the exit code.

    Raises ValueError and OSError for bad values and files; SystemExit as tyro does.
    """
    import tyro

    options = tyro.cli(ExportOptions, prog="fomoe export", args=list(arguments))
    source = find_source(options.run, options.checkpoint)
    say = Console(highlight=False, markup=False, soft_wrap=True).print
    if source.passed_over:
        say(f"using an older checkpoint, because {source.passed_over}")
    out, files, size = export(source, options)
    counts = count_parameters(source.model)
    say(
        f"{out}: {human_count(counts.total)} parameters in {files} "
        f"file{'s' if files > 1 else ''}, {human_bytes(size)}; {source.checkpoint.name}, "
        f"round {source.manifest.round}"
    )
    if options.format == "transformers":
        say(
            "load it by AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True): the "
            "model's code is in the folder"
        )
    return 0
