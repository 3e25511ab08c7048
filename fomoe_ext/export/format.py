"""The format for transformers: names of tensors, and config.json."""

from __future__ import annotations

import json
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

from fomoe_ext.config.io import check_renamed
from fomoe_ext.config.model import ModelConfig
from fomoe_ext.files.atomic import write_text
from fomoe_ext.layer.moe import TRAINING_OPTIONS

# Fields of ModelConfig under the names that transformers gives them; the others keep theirs.
# (`top_k` would be taken for the one of sampling.)
_RENAMED = {
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "seq_len": "max_position_embeddings",
    "top_k": "num_experts_per_tok",
    "intermediate_size": "moe_intermediate_size",
}


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file formatted as by transformers."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def exported_name(name: str) -> str:
    """The name in transformers' format of a tensor of the global model.

    The exported code uses torch's Linear and Embedding: `qkv_weight` becomes `qkv.weight`.
    """
    if name.endswith("selection_bias"):
        return f"model.{name}"
    name = "embedding.weight" if name == "embedding" else name
    return "model." + re.sub(r"_(weight|bias)$", r".\1", name)


def transformers_config(model: ModelConfig, tokens: str, end: int | None, dtype: str) -> dict:
    """The content of config.json. tokens: see `FomoeConfig`. end: the end-of-text id, if any."""
    sizes = {
        _RENAMED.get(field.name, field.name): getattr(model, field.name)
        for field in fields(ModelConfig)
        if field.name not in TRAINING_OPTIONS
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
    """The ModelConfig of a config.json. Raises ValueError if it does not have this format, and for
    an option of version 0.0, with its present name."""
    check_renamed(config, "model", "config.json", _RENAMED)
    try:
        return ModelConfig(
            **{
                field.name: config[_RENAMED.get(field.name, field.name)]
                for field in fields(ModelConfig)
                if field.name not in TRAINING_OPTIONS
            },
            balance="none",
        )
    except KeyError as error:
        raise ValueError(f"config.json must have the key {error}, got none") from None
    except TypeError as error:
        raise ValueError(f"config.json must have values of the right types: {error}") from None
