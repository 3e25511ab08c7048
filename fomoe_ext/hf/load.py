"""A site reads of a checkpoint of transformers only what it holds."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fomoe_ext.files.tensors import TensorFiles
from fomoe_ext.hf.beside import ignored_names, keep_in_fp32, read_generation_config
from fomoe_ext.hf.convert import convert
from fomoe_ext.hf.converted import ConvertedMoE, converted_layers, shared_modules
from fomoe_ext.hf.quantised import Weights, block_size
from fomoe_ext.hf.wrappers import tied_names
from fomoe_ext.placement.placement import Placement


class Loaded(NamedTuple):
    """A converted model, and how much of its checkpoint's tensors was read for it."""

    model: Any
    bytes_read: int
    bytes_total: int


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Parameters of modules made inside have no memory; buffers do, with their values."""
    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def from_pretrained_resident(
    path: str | Path,
    placement: Placement,
    site: int,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    model_class: Any = None,
    **options: Any,
) -> Loaded:
    """A converted causal language model with one site's experts, read from a local folder.

    Of every other expert nothing is read and nothing allocated. The model is in eval mode, with the
    folder's generation_config.json. Weights in blocks of FP8 (DeepSeek-V3, Qwen3-MoE-FP8) and in
    MXFP4 (gpt-oss) are worked out, in fp32, and rounded to the parameters' dtype.

    Args:
        path: a folder of `save_pretrained` with safetensors files, of a family that is known.
        placement, site, options: as `convert`.
        dtype: of the parameters; None = that of the configuration, else float32. As with plain
            transformers, some stay float32 (DeepSeek-V3's router).
        device: where they go.
        model_class: a class of transformers; None = AutoModelForCausalLM.

    Raises ValueError for a folder without safetensors, with other tensors than the model has or
    quantised in any other way, naming what it is, and as `convert`.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = Path(path)
    files = TensorFiles(folder)
    config = AutoConfig.from_pretrained(folder)
    try:
        reader = Weights(files, block_size(config))
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # the model's weights are plain
    kind = dtype or getattr(config, "dtype", None) or torch.float32
    with _parameters_on_meta():
        model = (model_class or AutoModelForCausalLM).from_config(config, dtype=kind)
        keep_in_fp32(model, kind)
        convert(model, placement=placement, site=site, **options)
    layers = converted_layers(model)
    others = _names_of_others(reader, model, {path for path, _ in layers})
    of_layers = (name for layer_path, layer in layers for name in _names(reader, layer_path, layer))
    ignored = ignored_names(model, files.names())
    reader.require_only({*of_layers, *others.values()}, ignored)
    _warn_of_ignored(folder, ignored)
    with torch.no_grad():
        for layer_path, layer in layers:
            _read_layer(reader, layer_path, layer, device)
        _read_others(reader, model, others, device)
    if hasattr(model, "tie_weights"):
        model.tie_weights()
    read_generation_config(model, folder)
    return Loaded(model.eval(), files.bytes_read, files.bytes_total)


def _warn_of_ignored(folder: Path, ignored: set[str]) -> None:
    if more := sorted(name for name in ignored if not name.endswith("inv_freq")):
        warnings.warn(
            f"{folder}: {more[0]} and {len(more) - 1} other tensors are of layers that predict "
            "further tokens, which transformers' model has not: they are left out",
            stacklevel=3,
        )


def _set(module: nn.Module, name: str, values: Tensor, device: torch.device | str) -> None:
    """Puts values where a parameter or buffer has been, in its dtype."""
    old: Tensor = getattr(module, name)
    if old.shape != values.shape:
        raise ValueError(
            f"{name} of {type(module).__name__} must have shape {list(old.shape)}, the file has "
            f"{list(values.shape)}"
        )
    # A copy: what safetensors gives may lie in the file, at any address.
    new = torch.empty_like(old, device=device).copy_(values)
    is_parameter = isinstance(old, nn.Parameter)
    setattr(module, name, nn.Parameter(new, old.requires_grad) if is_parameter else new)


def _names(reader: Weights, path: str, layer: ConvertedMoE) -> Iterator[str]:
    """Names of all tensors of a block in files."""
    family = layer.origin.family
    block = family.path_in_files(path)
    for part in (*layer.router.parts, *filter(None, [family.selection_bias])):
        yield f"{block}.{family.router}.{part}"
    for name, module in shared_modules(layer).items():
        yield from (f"{block}.{name}.{key}" for key in module.state_dict())
    for expert in range(layer.num_experts):
        yield from family.layout.stored(reader, block, expert, layer.experts.parts)


def _read_layer(
    reader: Weights, path: str, layer: ConvertedMoE, device: torch.device | str
) -> None:
    family, experts = layer.origin.family, layer.experts
    block = family.path_in_files(path)
    stacks = {part: torch.empty_like(experts.part(part), device=device) for part in experts.parts}
    for row, expert in enumerate(experts.resident_experts):
        weights = family.layout.read(reader, block, expert, experts.parts)
        for (part, stack), values in zip(stacks.items(), weights, strict=True):
            if stack[row].shape != values.shape:
                raise ValueError(
                    f"expert {expert} of {block} must have a {part} of {list(stack[row].shape)}, "
                    f"the file has {list(values.shape)}"
                )
            stack[row].copy_(values)
    layer.make_buffers(device)
    for part, stack in stacks.items():
        setattr(experts, part, nn.Parameter(stack, experts.part(part).requires_grad))
    for part in layer.router.parts:
        _set(layer.router, part, reader.read(f"{block}.{family.router}.{part}"), device)
    if family.selection_bias:
        name = f"{block}.{family.router}.{family.selection_bias}"
        _set(layer.router, "selection_bias", reader.read(name), device)
    for name, module in shared_modules(layer).items():
        _read_module(reader, module, f"{block}.{name}", device)


def _read_module(reader: Weights, module: nn.Module, path: str, device: torch.device | str) -> None:
    for key in module.state_dict():
        parent, _, name = key.rpartition(".")
        _set(module.get_submodule(parent), name, reader.read(f"{path}.{key}"), device)


def _names_of_others(reader: Weights, model: nn.Module, layers: set[str]) -> dict[str, str]:
    """What is to be read from which name, of all that is not in a converted layer.

    What shares memory with another is read once, under the name that the file has. Where it has
    both, with different values, the configuration is wrong and they are two, as in transformers.
    """
    tied = tied_names(model)
    names = [
        key for key in model.state_dict() if not any(key.startswith(f"{path}.") for path in layers)
    ]
    found = {key: key for key in names if key not in tied}
    for target, source in tied.items():
        if reader.has(target) and not reader.has(source):
            found[source] = target
        elif reader.has(target) and not torch.equal(reader.read(target), reader.read(source)):
            warnings.warn(
                f"config.json ties {target} to {source}, but the file has two different ones: they "
                "are not tied",
                stacklevel=3,
            )
            _untie(model, target)
            found[target] = target
        elif reader.has(target):
            found[target] = target  # equal: only known, source is read
    return found


def _untie(model: Any, target: str) -> None:
    parent, _, name = target.rpartition(".")
    module = model.get_submodule(parent)
    old = module.get_parameter(name)
    setattr(module, name, nn.Parameter(torch.empty_like(old), old.requires_grad))
    model.config.tie_word_embeddings = False
    model.all_tied_weights_keys.pop(target)


def _read_others(
    reader: Weights, model: nn.Module, names: dict[str, str], device: torch.device | str
) -> None:
    """Reads tensors by their names in the files; buffers of no file go to the device."""
    for key, in_file in names.items():
        parent, _, name = key.rpartition(".")
        if key not in tied_names(model):
            _set(model.get_submodule(parent), name, reader.read(in_file), device)
    for module in model.modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            if buffer.device != torch.device(device):
                setattr(module, name, buffer.to(device))
