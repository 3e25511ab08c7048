"""`fomoe export`: the global model of a run as one folder, for transformers or as plain tensors.

A checkpoint holds every tensor of the global model once, single experts, in the files of the sites
that wrote them. They are read one by one and written in shards, so that never more than a shard is
in memory, under a temporary name that is changed when the folder is whole.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from safetensors import SafetensorError
from torch import Tensor
from tyro.conf import Positional

from fomoe_ext.checkpoint import manifest as ckpt
from fomoe_ext.checkpoint.publish import reading
from fomoe_ext.checkpoint.reader import GlobalModelReader
from fomoe_ext.checkpoint.whole import require_content
from fomoe_ext.config.io import dump_config
from fomoe_ext.config.job import ModelConfig, SitesConfig, TrainConfig, count_parameters
from fomoe_ext.data.text import Tokenizer, load_tokenizer
from fomoe_ext.export.card import model_card
from fomoe_ext.files.atomic import write_text
from fomoe_ext.files.folder_lock import hold
from fomoe_ext.files.outputs import require_new
from fomoe_ext.files.tensors import write_tensors
from fomoe_ext.layer.assemble import global_names
from fomoe_ext.model.language import LanguageModel
from fomoe_ext.report.metrics import human_bytes, human_count, read_metrics
from fomoe_ext.report.runs import CHECKPOINTS, CONFIG, METRICS, load_run_config, run_of

TOKENIZER = "tokenizer.json"
_NUL = "\0"
_CODE = ("configuration_fomoe.py", "modeling_fomoe.py")

# Fields of ModelConfig under the names that transformers gives them; the others keep theirs.
# (`top_k` would be taken for the one of sampling.)
_RENAMED = {
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "seq_len": "max_position_embeddings",
    "top_k": "num_experts_per_tok",
    "expert_size": "moe_intermediate_size",
}
_TRAINING_ONLY = (
    "router_scope",
    "skipped_mass",
    "balance",
    "balance_coef",
    "z_loss_coef",
    "bias_update_rate",
)
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class ExportOptions:
    """Write the global model of a run, which no site holds as a whole, as one model folder."""

    run: Positional[Path]
    """A run folder of `fomoe train`, or one of its checkpoints."""
    format: Literal["transformers", "safetensors"] = "transformers"
    """transformers: loads by AutoModelForCausalLM.from_pretrained(.., trust_remote_code=True);
    safetensors: the tensors under fomoe_ext's own names, and config.toml."""
    out: Path | None = None
    """Folder to write, new or empty; none = exported-<format> in the run folder."""
    checkpoint: str | None = None
    """Name of a checkpoint, such as step-00000640; none = the newest whole one."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the written tensors, but for selection biases, which stay float32."""
    tokenizer: Path | None = None
    """The tokenizer.json that the run used, where it has been moved."""
    shard_bytes: int = 4 << 30
    """Largest size of a file; also about the memory that the export takes."""

    def __post_init__(self) -> None:
        if self.shard_bytes < 1:
            raise ValueError(f"shard_bytes must be >= 1, got {self.shard_bytes}")


@dataclass(frozen=True)
class Source:
    """A checkpoint, the run folder around it and its configuration (None for a lone checkpoint)."""

    checkpoint: Path
    manifest: ckpt.Manifest
    model: ModelConfig
    config: TrainConfig | None
    run: Path | None
    passed_over: str = ""
    """Why newer checkpoints were not taken; "" = there are none."""
    lock: Any = field(default=None, repr=False, compare=False)
    """While it is kept, a job that is running leaves the checkpoint where it is."""

    def tokenizer(self, given: Path | None) -> Path | None:
        """The tokenizer's file, `given` or the run's; None = bytes.

        Raises ValueError when it is not known, or is not what the run was trained with.
        """
        if given is not None:
            return given
        if self.config is not None:
            self._check_tokenizer(self.config.data.tokenizer)
            return self.config.data.tokenizer
        if self.model.vocab_size > 256:
            raise ValueError(
                f"{self.checkpoint} is not in a run folder, so its tokenizer is not known: "
                "give --tokenizer"
            )
        return None

    def _check_tokenizer(self, file: Path | None) -> None:
        wanted = self.manifest.meta.get("tokenizer")  # not in checkpoints of earlier versions
        if wanted is None or (file is not None and not file.is_file()):
            return
        found = "byte" if file is None else ckpt.sha256(file)
        if found != wanted:
            raise ValueError(
                f"tokenizer {file or 'bytes'} is not what the run was trained with: it has been "
                "changed, or is damaged (--tokenizer takes another all the same)"
            )


# ---------------------------------------------------------------------------------- what to export


def model_files(manifest: ckpt.Manifest) -> list[str]:
    """Names of the checkpoint files that hold the global model."""
    return [name for name in manifest.files if name.endswith(".safetensors") and "/" not in name]


def why_not_whole(path: Path) -> str:
    """Why a checkpoint's global model cannot be read here, or "". States of sites don't matter."""
    try:
        manifest = ckpt.read_manifest(path)
    except ckpt.CheckpointError as error:
        return str(error)
    missing, damaged = [], []
    for name in model_files(manifest):
        entry, file = manifest.files[name], path / name
        if not file.is_file():
            missing.append(f"{name} (written by site {entry.site})")
        elif file.stat().st_size != entry.size:
            damaged.append(f"{name} has {file.stat().st_size} bytes, wanted {entry.size}")
    if missing:
        return (
            f"checkpoint {path} lacks {', '.join(missing)}: where sites share no file system each "
            "machine has the files of its own sites; copy all of them into this folder"
        )
    return f"checkpoint {path}: {'; '.join(damaged)}" if damaged else ""


def _newest(folder: Path) -> tuple[Path, str]:
    """The newest checkpoint whose global model is whole, and why newer ones were passed over."""
    found = ckpt.list_checkpoints(folder)
    reasons: list[str] = []
    for path in reversed(found):
        reason = why_not_whole(path)
        if not reason:
            return path, "; ".join(reasons)
        reasons.append(reason)
    if not found:
        raise FileNotFoundError(f"run {folder.parent} has no checkpoint in {folder}")
    raise ValueError(reasons[0])


def find_source(path: Path, name: str | None = None) -> Source:
    """The checkpoint that a run folder or a checkpoint's own folder stands for.

    `name` is of one in the run folder; None = the newest whose global model is whole. Raises
    FileNotFoundError or ValueError when there is none.
    """
    if not path.is_dir():
        raise FileNotFoundError(f"run {path} does not exist")
    path, passed_over = path.resolve(), ""
    if (path / ckpt.MANIFEST).is_file():
        if name is not None:
            raise ValueError(f"checkpoint {name} was named, but {path} is a checkpoint itself")
        chosen = path
    elif (path / CHECKPOINTS).is_dir() or (path / CONFIG).is_file():
        if name is None:
            chosen, passed_over = _newest(path / CHECKPOINTS)
        else:
            chosen = path / CHECKPOINTS / name
    else:
        raise ValueError(
            f"run must be a run folder of `fomoe train` (it has {CONFIG} and {CHECKPOINTS}/) or a "
            f"checkpoint (it has {ckpt.MANIFEST}), {path} is neither"
        )
    if reason := why_not_whole(chosen):
        raise ValueError(reason)
    manifest = ckpt.read_manifest(chosen)
    try:
        model = ModelConfig(**manifest.meta["model"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"checkpoint {chosen} does not say what its model is ({error})") from None
    run = run_of(chosen) if (run_of(chosen) / CONFIG).is_file() else None
    config = None if run is None else load_run_config(run)
    return Source(chosen, manifest, model, config, run, passed_over, reading(chosen))


def _global_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the global model's tensors, without allocating any."""
    model = LanguageModel(config, device="meta")
    held = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    shapes = {}
    for name in sorted(global_names(model)):
        stack = re.sub(r"\bexperts\.\d+\.", "experts.", name)
        shapes[name] = held[name] if stack == name else held[stack][1:]
    return shapes


# ------------------------------------------------------------------------------------------ tensors


def exported_name(name: str) -> str:
    """What transformers' format calls a tensor of the global model.

    Its modules are torch's Linear and Embedding: `qkv_weight` is the weight of `qkv`.
    """
    if name.endswith("selection_bias"):
        return f"model.{name}"
    name = "embedding.weight" if name == "embedding" else name
    return "model." + re.sub(r"_(weight|bias)$", r".\1", name)


def _tensors(source: Source, options: ExportOptions) -> Iterator[tuple[str, Tensor]]:
    """The global model's tensors under their new names, read one by one."""
    shapes = _global_shapes(source.model)
    dtype = _DTYPES[options.dtype]
    with GlobalModelReader(source.checkpoint) as reader:
        if differing := shapes.keys() ^ set(reader.names()):
            raise ValueError(
                f"checkpoint {source.checkpoint} is not of the model that it names: "
                f"{sorted(differing)[:3]} are only in one"
            )
        for name, shape in shapes.items():
            value = reader.tensor(name)
            if tuple(value.shape) != shape:
                raise ValueError(
                    f"checkpoint {source.checkpoint}: {name} has shape {list(value.shape)}, its "
                    f"model wants {list(shape)}"
                )
            if not name.endswith("selection_bias"):
                value = value.to(dtype)
            yield exported_name(name) if options.format == "transformers" else name, value


# ------------------------------------------------------------------------- what stands beside them


def _write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def transformers_config(model: ModelConfig, tokens: str, end: int | None, dtype: str) -> dict:
    """The content of config.json. `end` is the id that ends a text; `tokens` see FomoeConfig."""
    sizes = {
        _RENAMED.get(field.name, field.name): getattr(model, field.name)
        for field in fields(ModelConfig)
        if field.name not in _TRAINING_ONLY
    }
    return {
        "architectures": ["FomoeForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_fomoe.FomoeConfig",
            "AutoModel": "modeling_fomoe.FomoeModel",
            "AutoModelForCausalLM": "modeling_fomoe.FomoeForCausalLM",
        },
        "model_type": "fomoe",
        "dtype": dtype,
        **sizes,
        "tokens": tokens,
        "tie_word_embeddings": True,
        "use_cache": True,
        **({} if end is None else {"eos_token_id": end, "pad_token_id": end}),
    }


def model_of_config(config: dict[str, Any]) -> ModelConfig:
    """The ModelConfig of a config.json. Raises ValueError when it is not of this format."""
    try:
        return ModelConfig(
            **{
                field.name: config[_RENAMED.get(field.name, field.name)]
                for field in fields(ModelConfig)
                if field.name not in _TRAINING_ONLY
            },
            balance="none",
        )
    except KeyError as error:
        raise ValueError(f"config.json has no {error}") from None
    except TypeError as error:
        raise ValueError(f"config.json has a value of another type ({error})") from None


def _byte_tokenizer() -> dict[str, Any]:
    """A tokenizer.json whose ids are UTF-8 bytes, in the `tokenizers` library's terms.

    Its byte-level step writes each byte as a printable character: bytes that are one stand for
    themselves, the others follow from U+0100 on. Without merges these are the tokens. NUL, which
    ends a text and pads, is called by its own name; whatever is not in the vocabulary, so no other
    byte, is NUL as well, wherever special tokens in a text are taken for text.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    character = {byte: chr(byte) for byte in printable}
    character |= {byte: chr(256 + i) for i, byte in enumerate(others)}
    character[0] = _NUL
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": 0,
                "content": _NUL,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
        ],
        "normalizer": None,
        "pre_tokenizer": {**level, "use_regex": False},
        "post_processor": None,
        "decoder": {**level, "use_regex": False},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": _NUL,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": {character[byte]: byte for byte in range(256)},
            "merges": [],
        },
    }


def _load_tokenizer(file: Path | None) -> Tokenizer:
    try:
        return load_tokenizer(file)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}: give --tokenizer") from None
    except RuntimeError as error:  # the library is not installed
        raise ValueError(str(error)) from None


def _text_only(file: Path) -> dict[str, Any]:
    """A tokenizer.json that gives a text the ids that training gave it.

    Without what adds special tokens around every text, cuts it or pads it: the model has not seen
    that.
    """
    content = json.loads(file.read_text(encoding="utf-8"))
    content |= {"truncation": None, "padding": None}
    steps = content.get("post_processor") or {}
    kept = [s for s in steps.get("processors", [steps]) if s.get("type") == "ByteLevel"]
    content["post_processor"] = kept[0] if kept else None
    return content


def _write_tokenizer(folder: Path, file: Path | None, model: ModelConfig) -> int | None:
    """Write tokenizer.json and tokenizer_config.json; returns the id that ends a text, if any."""
    coder = _load_tokenizer(file)
    if coder.vocab_size > model.vocab_size:
        raise ValueError(
            f"tokenizer {file} has {coder.vocab_size} ids, the model {model.vocab_size}: it is not "
            "the one that the run used"
        )
    end = int(coder.separator[0]) if len(coder.separator) else None
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": model.seq_len,
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
    }
    if file is None:
        content, name = _byte_tokenizer(), _NUL
    else:
        content, name = _text_only(file), None
        if end is not None:
            import tokenizers

            name = tokenizers.Tokenizer.from_file(str(file)).id_to_token(end)
    if name is not None:
        config |= {"eos_token": name, "pad_token": name}
    _write_json(folder / TOKENIZER, content)
    _write_json(folder / "tokenizer_config.json", config)
    return end


def _validation(source: Source) -> dict[str, Any] | None:
    """The run's last validation of the exported model, if there was one."""
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
    """The run's configuration without what is of its machine; sizes only for a lone checkpoint."""
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
        end = _write_tokenizer(folder, tokenizer, source.model)
        tokens = "bytes" if tokenizer is None else TOKENIZER
        config = transformers_config(source.model, tokens, end, options.dtype)
        _write_json(folder / "config.json", config)
        ends = {} if end is None else {"eos_token_id": end, "pad_token_id": end}
        _write_json(folder / "generation_config.json", ends)
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
            _load_tokenizer(tokenizer)
            shutil.copyfile(tokenizer, folder / TOKENIZER)
        write_text(folder / CONFIG, dump_config(_portable_config(source)))
    # Last: it lists the files that are there.
    return write_tensors(folder, _tensors(source, options), options.shard_bytes)


def _out_folder(source: Source, options: ExportOptions) -> Path:
    if options.out is None and source.run is None:
        raise ValueError(f"out must be given: {source.checkpoint} is not in a run folder")
    out = options.out or source.run / f"exported-{options.format}"  # type: ignore[operator]
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"out {out} is a file, wanted a new or empty folder")
    if out.is_dir() and any(out.iterdir()):
        raise FileExistsError(f"out {out} is not empty: name a new folder, or delete it")
    require_new("out", out)
    return out


def export(source: Source, options: ExportOptions) -> tuple[Path, int, int]:
    """Write a source's global model; returns the folder, the number of files and of bytes in them.

    Raises ValueError or OSError naming what is wrong; then nothing is left.
    """
    out = _out_folder(source, options)
    partial = out.with_name(f".{out.name}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    lock = hold(partial, "out")  # else another export would be cleared away here
    try:
        for path in partial.iterdir():  # of one that was killed
            if path != lock.path:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        files, size = _write_folder(partial, source, options)
        _out_folder(source, options)  # nobody else has made it meanwhile
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
    say = Console(highlight=False, soft_wrap=True).print
    if source.passed_over:
        say(f"an older checkpoint is taken, because {source.passed_over}")
    out, files, size = export(source, options)
    counts = count_parameters(source.model)
    say(
        f"{out}: {human_count(counts.total)} parameters in {files} "
        f"file{'s' if files > 1 else ''}, {human_bytes(size)}; {source.checkpoint.name}, "
        f"round {source.manifest.round}"
    )
    return 0
