"""The other files of a transformers folder: config.json and generation_config.json."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import torch
from torch import nn


def read_generation_config(model: Any, folder: Path) -> None:
    """Sets a model's generation_config from generation_config.json (end-of-text ids, for example).

    Without that file it is derived from config.json, as transformers does. Raises ValueError for a
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
    """Writes config.json and generation_config.json for weights that are written plain.

    untied: tensors that the configuration ties are written separately. The caller saves the
    tokenizer.
    """
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__.removeprefix("FSDP")]
    config.dtype = str(model.dtype).removeprefix("torch.")
    if untied:
        config.tie_word_embeddings = False
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # weights are plain
    if type(model).__module__.startswith("transformers.") and hasattr(config, "auto_map"):
        del config.auto_map  # names code files that the folder lacks; transformers has the code
    config.save_pretrained(folder)
    generation = getattr(model, "generation_config", None)
    if generation is None:
        return
    try:
        generation.save_pretrained(folder)
    except ValueError:  # some published files are inconsistent; they are kept as they are
        generation.to_json_file(folder / "generation_config.json")


def keep_in_fp32(model: Any, dtype: torch.dtype) -> None:
    """Gives parameters on the meta device dtype fp32 if transformers would keep them in fp32."""
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
    """Names of checkpoint tensors that transformers ignores, too.

    These are rotary frequencies, which are computed, and the layers after the last one that predict
    further tokens (DeepSeek-V3).
    """
    config = model.config
    patterns = [r"rotary_emb\.inv_freq$"]
    last = config.num_hidden_layers
    for layer in range(last, last + (getattr(config, "num_nextn_predict_layers", None) or 0)):
        patterns.append(rf"^model\.layers\.{layer}\.")
    ignored = re.compile("|".join(patterns))
    return {name for name in names if ignored.search(name)}
