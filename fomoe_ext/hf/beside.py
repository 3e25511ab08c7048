"""What stands beside the weights in a folder of transformers: configuration, how to generate."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import torch
from torch import nn


def read_generation_config(model: Any, folder: Path) -> None:
    """Gives a model what generation_config.json says, e.g. which tokens end an answer.

    Where there is none, what config.json says of it, as transformers does. Raises ValueError for a
    file that cannot be read.
    """
    from transformers import GenerationConfig

    if getattr(model, "generation_config", None) is None:
        return
    if (folder / "generation_config.json").is_file():
        try:
            found = GenerationConfig.from_pretrained(folder)
        except OSError as error:
            raise ValueError(f"{folder}: cannot read generation_config.json ({error})") from None
    else:
        found = GenerationConfig.from_pretrained(
            folder, config_file_name="config.json", _from_model_config=True
        )
    model.generation_config = found


def write_configs(model: Any, folder: Path, untied: bool) -> None:
    """config.json and generation_config.json of a model's weights as they are written.

    untied: what the configuration ties is written apart. The tokenizer is the caller's to save.
    """
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__.removeprefix("FSDP")]
    config.dtype = str(model.dtype).removeprefix("torch.")
    if untied:
        config.tie_word_embeddings = False
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # weights are plain
    if type(model).__module__.startswith("transformers.") and hasattr(config, "auto_map"):
        del config.auto_map  # names files that are not there, of code that is transformers' own
    config.save_pretrained(folder)
    generation = getattr(model, "generation_config", None)
    if generation is None:
        return
    try:
        generation.save_pretrained(folder)
    except ValueError:  # published ones may contradict themselves, and are kept as they are
        generation.to_json_file(folder / "generation_config.json")


def keep_in_fp32(model: Any, dtype: torch.dtype) -> None:
    """Makes those parameters, on the meta device, fp32 that transformers would keep so."""
    patterns = set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    if dtype == torch.float16:
        patterns |= set(getattr(model, "_keep_in_fp32_modules", None) or ())
    if dtype not in (torch.float16, torch.bfloat16) or not patterns:
        return
    wanted = re.compile("|".join(pattern.replace("*", ".*") for pattern in sorted(patterns)))
    for name, parameter in list(model.named_parameters()):
        if wanted.search(name) and parameter.is_floating_point():
            parent, _, own = name.rpartition(".")
            kept = nn.Parameter(parameter.detach().float(), parameter.requires_grad)
            setattr(model.get_submodule(parent), own, kept)


def ignored_names(model: Any, names: tuple[str, ...]) -> set[str]:
    """Tensors of a checkpoint that transformers has no use for either, and never had.

    Rotary angles, which are computed, and the layers that predict further tokens (DeepSeek-V3's
    after the last).
    """
    config = model.config
    patterns = [r"rotary_emb\.inv_freq$"]
    last = config.num_hidden_layers
    for layer in range(last, last + (getattr(config, "num_nextn_predict_layers", None) or 0)):
        patterns.append(rf"^model\.layers\.{layer}\.")
    ignored = re.compile("|".join(patterns))
    return {name for name in names if ignored.search(name)}
