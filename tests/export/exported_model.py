"""A model exported, and loaded again as a user of transformers loads it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fomoe_ext import cli
from fomoe_ext.checkpoint.reader import load_global_model
from fomoe_ext.export.source import find_source
from fomoe_ext.model.language import LanguageModel

transformers = pytest.importorskip("transformers")


def load(folder: Path, **options):
    """The exported model as a user of transformers loads it."""
    auto = transformers.AutoModelForCausalLM
    return auto.from_pretrained(folder, trust_remote_code=True, **options).eval()


def write(source: Path, out: Path, *flags: str) -> Path:
    """Runs `fomoe export`; fails unless it succeeds."""
    assert cli.main(["export", str(source), "--out", str(out), *flags]) == 0
    return out


def tokens_of(config, *shape: int) -> torch.Tensor:
    return torch.randint(config.vocab_size, shape, generator=torch.Generator().manual_seed(1))


def global_model(checkpoint: Path) -> LanguageModel:
    """The global model of a checkpoint, on fomoe_ext's kernels."""
    model = LanguageModel(find_source(checkpoint).model)
    load_global_model(checkpoint, model)
    return model.eval()


def word_tokenizer(folder: Path, size: int) -> str:
    """A tokenizer.json of whole words with `size` ids, the first of which ends a text."""
    tokenizers = pytest.importorskip("tokenizers")
    words = {"</s>": 0, "[unk]": 1, **{f"w{i}": i for i in range(2, size)}}
    model = tokenizers.models.WordLevel(words, unk_token="[unk]")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "words.json"))
    return str(folder / "words.json")
