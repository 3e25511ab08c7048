"""The models that `fomoe eval` can evaluate: runs of `fomoe train`, folders of `fomoe export`, and
causal language models of transformers. A `Subject` describes one: sizes, text and variants.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fomoe_ext.checkpoint import manifest as ckpt
from fomoe_ext.checkpoint.reader import load_global_model, load_state
from fomoe_ext.config.data import DataConfig
from fomoe_ext.config.model import ModelConfig
from fomoe_ext.export.format import exported_name, model_of_config
from fomoe_ext.export.source import Source, find_source
from fomoe_ext.export.tokenizer import TOKENIZER
from fomoe_ext.files.atomic import unsealed
from fomoe_ext.files.json_values import loads
from fomoe_ext.files.tensors import CHECKSUMS, INDEX, SINGLE, TensorFiles, check_file
from fomoe_ext.layer.assemble import fill_model
from fomoe_ext.layer.moe import MoELayer
from fomoe_ext.model.language import LanguageModel
from fomoe_ext.placement.placement import Placement
from fomoe_ext.plan.traffic import job_placement
from fomoe_ext.report.runs import CHECKPOINTS, CONFIG, METRICS, load_run_config

TOKENS = 524_288
"""Tokens to evaluate on, unless a run has another number."""
_LONGEST = 1024
"""Tokens per window for transformers models with a longer context."""


@dataclass(frozen=True)
class Skipping:
    """Which experts to skip: all but those of one site, or a share of each layer, drawn by seed."""

    site: int | None = None
    share: float | None = None
    seed: int = 0


class Variant(NamedTuple):
    """A model with some or all of its experts.

    loss_of: int64 [B, L + 1] -> mean cross entropy of predicting tokens[:, 1:], in nats. layers:
    the MoE layers whose `stats` count skipped slots; empty = they are not counted.
    """

    name: str
    loss_of: Callable[[Tensor], Tensor]
    layers: Sequence[MoELayer]


class Subject(NamedTuple):
    """A model to evaluate.

    variants: yields variants one by one, so that only one is in memory. text: the default text.
    tokenizer: None = bytes. tokens: how many to evaluate on. dtype: float32, or bfloat16 for
    autocast. facts: further entries of the results.
    """

    kind: str
    vocab_size: int
    seq_len: int
    tokenizer: Path | None
    variants: Callable[[torch.device], Iterator[Variant]]
    text: DataConfig = DataConfig()
    tokens: int = TOKENS
    dtype: str = "float32"
    facts: dict[str, Any] = {}  # noqa: RUF012  never changed


def find_subject(
    folder: Path,
    skipping: Skipping,
    *,
    checkpoint: str | None = None,
    tokenizer: Path | None = None,
    trust_remote_code: bool = False,
) -> Subject:
    """The model in a folder. checkpoint: the name of one of a run. tokenizer: replaces the model's.

    Raises FileNotFoundError or ValueError if the folder cannot be evaluated as asked.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"model {folder} is not a folder")
    weights = any((folder / name).is_file() for name in (SINGLE, INDEX))
    if (folder / ckpt.MANIFEST).is_file() or (folder / CHECKPOINTS).is_dir():
        return _run_subject(find_source(folder, checkpoint), skipping, tokenizer)
    if checkpoint is not None:
        raise ValueError(f"checkpoint must be given for run folders only, got {folder}")
    if skipping.site is not None:
        raise ValueError(
            f"site must be given for runs of `fomoe train` only, got {folder}: it does not say "
            "which site held which expert"
        )
    if _is_transformers_export(folder) or (weights and (folder / CONFIG).is_file()):
        return _exported_subject(folder, skipping, tokenizer)
    if (folder / "config.json").is_file():
        return _transformers_subject(folder, skipping, tokenizer, trust_remote_code)
    if (folder / METRICS).is_file():
        find_source(folder, checkpoint)  # says that the run has no checkpoint
    raise ValueError(
        "model must be a run folder of `fomoe train`, a checkpoint, a folder of `fomoe export` or "
        f"of a transformers model, got {folder}"
    )


def skip_experts(model: LanguageModel, share: float, seed: int) -> None:
    """Makes the model skip a share of each layer's experts, drawn by (seed, layer).

    The number of skipped experts is rounded. They stay in memory, but slots that choose them are
    skipped; with router_scope "resident" the router chooses among the other experts. Raises
    ValueError if no expert is left to choose.
    """
    for index, layer in enumerate(model.moe_layers()):
        count = round(share * layer.num_experts)
        if layer.allowed is not None and count == layer.num_experts:
            raise ValueError(
                f"skip_experts must leave the router an expert, got {share} of "
                f"{layer.num_experts} experts"
            )
        order = np.random.default_rng((seed, index)).permutation(layer.num_experts)
        layer.experts.skip_experts(order[:count].tolist())


def _variant(model: LanguageModel, name: str, skipping: Skipping) -> Variant:
    if skipping.share is not None:
        skip_experts(model, skipping.share, skipping.seed)
        name = f"{skipping.share:.0%} of the experts skipped"
    model.eval()
    return Variant(name, lambda tokens: model.loss(tokens).cross_entropy, model.moe_layers())


# ------------------------------------------------------------------------------ runs of fomoe train


def placement_of(source: Source) -> Placement:
    """The placement at a checkpoint, from the state of a site or from the configuration.

    Raises ValueError if neither has it, CheckpointError for a damaged state.
    """
    for site in range(source.manifest.num_sites):
        if not (source.checkpoint / ckpt.state_name(site)).is_file():
            continue  # the file may be on another machine
        state = load_state(source.checkpoint, site)
        if "sync" in state:
            return Placement.from_dict(state["sync"]["placement"])
    if source.config is None or source.config.sites.reshuffle_rounds:
        raise ValueError(
            f"checkpoint {source.checkpoint} must have the state of a site, which says which site "
            "held which expert, got none"
        )
    return job_placement(source.config)


def _run_variants(source: Source, skipping: Skipping, device: torch.device) -> Iterator[Variant]:
    def load(name: str, placement: Placement | None = None, site: int | None = None) -> Variant:
        model = LanguageModel(source.model, placement, site, device=device)
        load_global_model(source.checkpoint, model)
        return _variant(model, name, skipping)

    if skipping.site is None:
        yield load("global model")
        everywhere = source.manifest.meta.get("replication") == source.manifest.num_sites
        if everywhere or skipping.share is not None:
            return
    placement = placement_of(source)
    if skipping.site is not None and not 0 <= skipping.site < placement.num_sites:
        raise ValueError(f"site must be in [0, {placement.num_sites}), got {skipping.site}")
    for site in range(placement.num_sites) if skipping.site is None else (skipping.site,):
        yield load(f"site {site} alone", placement, site)


def _reported_tokens(source: Source) -> int:
    """Tokens of the run's last validation, so that results are comparable with its report.

    Raises ValueError for a damaged report.
    """
    file = None if source.run is None else source.run / "report.json"
    if file is None or not file.is_file():  # a run that has not ended has no report
        return TOKENS
    try:
        report = unsealed(loads(file.read_bytes(), nan=True), file)
        return int(report["validation"]["tokens"])
    except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
        raise ValueError(f"cannot read {file} ({error})") from None


def _run_subject(source: Source, skipping: Skipping, tokenizer: Path | None) -> Subject:
    config = source.config
    return Subject(
        kind="run",
        vocab_size=source.model.vocab_size,
        seq_len=source.model.seq_len,
        tokenizer=source.tokenizer(tokenizer),
        variants=lambda device: _run_variants(source, skipping, device),
        text=DataConfig() if config is None else config.data,
        tokens=_reported_tokens(source),
        dtype="float32" if config is None else config.run.dtype,
        facts={
            "checkpoint": str(source.checkpoint),
            "round": source.manifest.round,
            "sites": source.manifest.num_sites,
            "passed_over": source.passed_over,
        },
    )


# -------------------------------------------------------------------------------- exported folders


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return dict(loads(path.read_bytes()))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{path.parent}: cannot read {path.name} ({error})") from None


def _is_transformers_export(folder: Path) -> bool:
    file = folder / "config.json"
    return file.is_file() and _read_json(file).get("model_type") == "fomoe"


def _exported_config(folder: Path) -> ModelConfig:
    if _is_transformers_export(folder):
        return model_of_config(_read_json(folder / "config.json"))
    return load_run_config(folder).model


def load_exported(folder: Path, device: torch.device | str = "cpu") -> LanguageModel:
    """The model in a folder of `fomoe export`, in either format, with fomoe_ext's kernels.

    Parameters are fp32, whatever the dtype of the folder. Raises ValueError or OSError for another
    or a damaged folder.
    """
    for name in ("config.json", CONFIG):
        check_file(folder, name)
    files = TensorFiles(folder)
    name_in = exported_name if _is_transformers_export(folder) else str
    model = LanguageModel(_exported_config(folder), device=device)

    def read(name: str) -> Tensor:
        value = files.read(name_in(name))
        if not value.is_floating_point() or value.element_size() < 2:
            raise ValueError(
                f"{name_in(name)} in {folder} must be floats, got {value.dtype}: quantised exports "
                "cannot be evaluated"
            )
        return value

    fill_model(model, read)
    return model


def _exported_subject(folder: Path, skipping: Skipping, tokenizer: Path | None) -> Subject:
    for name in ("config.json", CONFIG, TOKENIZER):
        check_file(folder, name)
    model, own = _exported_config(folder), folder / TOKENIZER
    by_name = _is_transformers_export(folder)
    is_bytes = by_name and _read_json(folder / "config.json").get("tokens") == "bytes"
    if tokenizer is None and own.is_file() and not is_bytes:
        tokenizer = own

    def variants(device: torch.device) -> Iterator[Variant]:
        yield _variant(load_exported(folder, device), "model", skipping)

    return Subject(
        kind="exported",
        vocab_size=model.vocab_size,
        seq_len=model.seq_len,
        tokenizer=tokenizer,
        variants=variants,
        text=DataConfig() if by_name else load_run_config(folder).data,
    )


# --------------------------------------------------------------------------- models of transformers


def _transformers_subject(
    folder: Path, skipping: Skipping, tokenizer: Path | None, trust_remote_code: bool
) -> Subject:
    if skipping.share is not None:
        raise ValueError(
            f"skip_experts must be given for runs and exported folders only, got {folder}"
        )
    try:
        from transformers import AutoConfig, AutoModelForCausalLM
    except ImportError:
        raise ValueError(
            f"{folder} is a transformers model: pip install 'transformers>=5.6' to evaluate it"
        ) from None
    own = folder / TOKENIZER
    # Checks the files of `save_merged` for damage, which transformers would not notice.
    if (folder / CHECKSUMS).is_file():
        files = TensorFiles(folder)
        for name in files.names():
            files.read(name)
    if tokenizer is None and not own.is_file():
        raise ValueError(
            f"{folder} must have a {TOKENIZER}, got none: give --tokenizer, or create it by "
            "AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
        )
    common: dict[str, Any] = {
        "trust_remote_code": trust_remote_code,
        "local_files_only": True,
    }
    config = AutoConfig.from_pretrained(folder, **common)
    sizes = config.get_text_config()

    def variants(device: torch.device) -> Iterator[Variant]:
        loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **common)
        model = loaded.to(device).eval()

        def loss_of(tokens: Tensor) -> Tensor:
            logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
            return F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())

        yield Variant(config.model_type, loss_of, ())

    return Subject(
        kind="transformers",
        vocab_size=sizes.vocab_size,
        seq_len=min(_LONGEST, getattr(sizes, "max_position_embeddings", None) or _LONGEST),
        tokenizer=tokenizer or own,
        variants=variants,
    )
