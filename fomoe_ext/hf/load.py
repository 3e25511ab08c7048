"""`from_pretrained_resident`: a site reads only its own experts of a transformers checkpoint."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from fomoe_ext.files.tensors import TensorFiles
from fomoe_ext.hf.beside import ignored_names, keep_in_fp32, read_generation_config
from fomoe_ext.hf.convert import ConvertOptions, convert
from fomoe_ext.hf.converted import ConvertedMoE, converted_layers, shared_modules
from fomoe_ext.hf.quantised import Weights, block_size
from fomoe_ext.hf.wrappers import tied_names
from fomoe_ext.placement.placement import Placement


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Modules created inside have their parameters on the meta device, but real buffers."""
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
    folder: str | Path,
    placement: Placement,
    site: int,
    *,
    output_loading_info: bool = False,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    model_class: Any = None,
    **options: Unpack[ConvertOptions],
) -> Any:
    """A converted causal language model with one site's experts, read from a local folder.

    The other experts are neither read nor allocated. The model is in eval mode and has the folder's
    generation_config.json. Weights stored as FP8 blocks (DeepSeek-V3, Qwen3-MoE-FP8) or as MXFP4
    (gpt-oss) are dequantised in fp32 and rounded to the dtype of the parameters.

    Args:
        folder: as written by `save_pretrained`, with safetensors files, of a supported family.
        placement, site, options: as in `convert`.
        output_loading_info: whether to return a dict about the loading as well.
        dtype: of the parameters; None = as config.json says, else float32. As with plain
            transformers, some parameters stay float32 (DeepSeek-V3's router).
        device: where the parameters and buffers go.
        model_class: a class of transformers; None = AutoModelForCausalLM.

    Returns the model or, with output_loading_info, (model, info). info is a dict with
        bytes_read: bytes of the tensors that were read, as stored;
        bytes_total: bytes of all tensors in the folder;
        unexpected_keys: names of the folder's tensors that the model does not use, sorted.

    Raises ValueError for a folder that does not exist, without safetensors files, with tensors that
    the model lacks, or quantised in another way; and what `convert` raises.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = Path(folder)
    _require_folder(folder)
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
        convert(model, placement, site, **options)
    ignored = _read_all(reader, model, device)
    read_generation_config(model, folder)
    model.eval()
    sizes = {"bytes_read": files.bytes_read, "bytes_total": files.bytes_total}
    info = {**sizes, "unexpected_keys": sorted(ignored)}
    return (model, info) if output_loading_info else model


def _require_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise ValueError(
            f"folder must be a folder on this machine (huggingface_hub.snapshot_download fetches "
            f"one), got {folder}, which is none"
        )


def _read_all(reader: Weights, model: Any, device: torch.device | str) -> set[str]:
    """Reads all tensors of a converted model; returns names of tensors that it does not use."""
    files = reader.files
    layers = converted_layers(model)
    others = _names_of_others(reader, model, {path for path, _ in layers})
    of_layers = (name for layer_path, layer in layers for name in _names(reader, layer_path, layer))
    ignored = ignored_names(model, files.names())
    reader.require_only({*of_layers, *others.values()}, ignored)
    _warn_of_ignored(files.folder, ignored)
    with torch.no_grad():
        for layer_path, layer in layers:
            _read_layer(reader, layer_path, layer, device)
        _read_others(reader, model, others, device)
    if hasattr(model, "tie_weights"):
        model.tie_weights()
    return ignored


def _warn_of_ignored(folder: Path, ignored: set[str]) -> None:
    if more := sorted(name for name in ignored if not name.endswith("inv_freq")):
        warnings.warn(
            f"{folder}: {more[0]} and {len(more) - 1} other tensors are not read: they belong to "
            "layers that predict further tokens, which transformers does not implement",
            stacklevel=4,
        )


def _set(module: nn.Module, name: str, values: Tensor, device: torch.device | str) -> None:
    """Replaces a parameter or buffer by one with these values, in the dtype of the old one."""
    old: Tensor = getattr(module, name)
    if old.shape != values.shape:
        raise ValueError(
            f"{name} of {type(module).__name__} must have shape {list(old.shape)}, got "
            f"{list(values.shape)} in the file"
        )
    # A copy: a tensor of safetensors may be mapped from the file, at an unaligned address.
    new = torch.empty_like(old, device=device).copy_(values)
    is_parameter = isinstance(old, nn.Parameter)
    setattr(module, name, nn.Parameter(new, old.requires_grad) if is_parameter else new)


def _names(reader: Weights, path: str, layer: ConvertedMoE) -> Iterator[str]:
    """Names of all of a block's tensors, as files have them."""
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
                    f"{part} of expert {expert} of {block} must have shape "
                    f"{list(stack[row].shape)}, got {list(values.shape)} in the file"
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
    """Tensors outside of converted layers: their names in the model -> their names in the files.

    Tied tensors are read once, under the name that the files have. If the files have both names
    with different values, config.json is wrong and the two are untied, as transformers does.
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
                f"config.json ties {target} to {source}, but the files have different values for "
                "them: they are loaded untied",
                stacklevel=4,
            )
            _untie(model, target)
            found[target] = target
        elif reader.has(target):
            found[target] = target  # equal: source is read, target is only listed as known
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
    """Reads tensors by their names in the files, and moves buffers that no file has to the
    device."""
    for key, in_file in names.items():
        parent, _, name = key.rpartition(".")
        if key not in tied_names(model):
            _set(model.get_submodule(parent), name, reader.read(in_file), device)
    for module in model.modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            if buffer.device != torch.device(device):
                setattr(module, name, buffer.to(device))
