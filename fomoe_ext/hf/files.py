"""Checkpoints of transformers: a site reads only what it holds; all sites together write one."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fomoe_ext.files.tensors import TensorFiles, write_tensors
from fomoe_ext.hf.beside import ignored_names, keep_in_fp32, read_generation_config, write_configs
from fomoe_ext.hf.convert import (
    ConvertedMoE,
    convert,
    converted_layers,
    shared_modules,
    why_no_place,
)
from fomoe_ext.hf.quantised import Weights, block_size
from fomoe_ext.hf.wrappers import plain_name, require_names, skeleton, tied_names, unwrapped
from fomoe_ext.launch import messages
from fomoe_ext.layer.assemble import global_router_tensors, local_tensors, responsible_site
from fomoe_ext.layer.experts import ExpertWeights
from fomoe_ext.outer.steps import unmet
from fomoe_ext.placement.placement import Placement


class Loaded(NamedTuple):
    """A converted model, and how much of its checkpoint's tensors was read for it."""

    model: Any
    bytes_read: int
    bytes_total: int


# ---- reading -------------------------------------------------------------------------------------


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
    if more := sorted(name for name in ignored if not name.endswith("inv_freq")):
        warnings.warn(
            f"{folder}: {more[0]} and {len(more) - 1} other tensors are of layers that predict "
            "further tokens, which transformers' model has not: they are left out",
            stacklevel=2,
        )
    with torch.no_grad():
        for layer_path, layer in layers:
            _read_layer(reader, layer_path, layer, device)
        _read_others(reader, model, others, device)
    if hasattr(model, "tie_weights"):
        model.tie_weights()
    read_generation_config(model, folder)
    return Loaded(model.eval(), files.bytes_read, files.bytes_total)


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


# ---- writing -------------------------------------------------------------------------------------


def save_merged(
    model: nn.Module,
    placement: Placement,
    site: int,
    folder: str | Path,
    *,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Writes the model of all sites in the original format; a collective of all sites.

    Every expert comes from one of its holders, also its router row; everything else is site 0's,
    which writes the files, one expert (gpt-oss: one layer) at a time, and needs memory for a file.
    What plain transformers loads is the model that all sites train, with its configuration and
    generation_config.json; save the tokenizer beside it. The folder is written under a temporary
    name. The model may be in wrappers, of torch.compile or data parallelism.

    Raises ValueError on all sites for a model that is not converted, is of another placement, or
    has been trained since the sites last met in an OuterSync, and for what the format has no place
    for: a selection bias where only DeepSeek-V3 has one, tensors of other names or shapes than the
    configuration stands for. FileExistsError where the folder is there and not empty, RuntimeError
    at the other sites where site 0 could not write.
    """
    target = Path(folder)
    model = unwrapped(model)
    _agree_to_write(_why_not(model, placement, site), placement.num_sites, site)
    _agree_on_folder(target, placement.num_sites, site)
    tensors = _all_tensors(model, placement, site)
    failed: Exception | None = None
    if site == 0:
        try:
            _write(model, tensors, target, max_shard_bytes)
        except Exception as error:
            failed = error
    for _ in tensors:  # the others send; after a failure site 0 lets them
        pass
    said = "" if failed is None else f"{type(failed).__name__}: {failed}"
    if placement.num_sites > 1:
        said = messages.broadcast(said, leads=site == 0, who="site 0")
    if failed is not None:
        raise failed
    if said:
        raise RuntimeError(f"site 0 could not write {folder}: {said}")


def _why_not(model: Any, placement: Placement, site: int) -> str:
    """Why this site's part of the model cannot be in the original format, or ""."""
    layers = converted_layers(model)
    if not layers:
        return f"model must have been converted by fomoe_ext.hf, got {type(model)}"
    for number, (path, layer) in enumerate(layers):
        wanted = placement.resident(number, site)
        if layer.experts.resident_experts != wanted:
            return (
                f"{path} must hold the placement's experts of site {site}, {wanted}, it holds "
                f"{layer.experts.resident_experts}"
            )
        if reason := why_no_place(path, layer, model.config):
            return reason
    if problem := unmet(model):
        return f"model is not that of all sites: {problem}"
    try:
        if wanted_names := skeleton(model, "save_merged"):
            require_names(_plain_tensors(model), wanted_names, _paths(model), "save_merged")
    except ValueError as error:
        return str(error)
    return ""


def _agree_to_write(problem: str, num_sites: int, site: int) -> None:
    """ValueError on all sites where one of them has a problem."""
    if problem and not dist.is_initialized():
        raise ValueError(problem)
    problems = messages.gather_objects(problem, num_sites, who="site")
    if problem:
        raise ValueError(problem)
    for other, said in enumerate(problems):
        if said:
            raise ValueError(f"site {other}: {said}")


def _agree_on_folder(folder: Path, num_sites: int, site: int) -> None:
    """FileExistsError on all sites where site 0 must not write."""
    taken = site == 0 and folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
    if num_sites > 1:
        taken = messages.broadcast(taken, leads=site == 0, who="site 0")
    if taken:
        raise FileExistsError(f"{folder} must be new or empty")


def _plain_tensors(model: nn.Module) -> dict[str, Tensor]:
    """A model's tensors by the names that they have without wrappers."""
    return {plain_name(name): value for name, value in local_tensors(model).items()}


def _paths(model: nn.Module) -> list[str]:
    """Where converted layers are, without wrappers."""
    return [plain_name(path) for path, _ in converted_layers(model)]


def _same_memory(one: Tensor, other: Tensor) -> bool:
    return (one.data_ptr(), one.shape, one.stride(), one.dtype) == (
        other.data_ptr(),
        other.shape,
        other.stride(),
        other.dtype,
    )


def _left_out(model: nn.Module, tensors: dict[str, Tensor]) -> set[str]:
    """Tensors that transformers ties to another that is written, as its configuration says."""
    tied = tied_names(model) if getattr(model.config, "tie_word_embeddings", False) else {}
    return {
        name
        for name, source in tied.items()
        if name in tensors and source in tensors and _same_memory(tensors[name], tensors[source])
    }


@torch.no_grad()
def _all_tensors(model: nn.Module, placement: Placement, site: int) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors as files have them, on the CPU; whole only at site 0."""
    of_routers = {
        f"{path}.router.{part}": getattr(layer.router, part).detach()
        for path, layer in converted_layers(model)
        for part in (*layer.router.parts, "selection_bias")
    }
    routers = global_router_tensors(model, placement, site, of_routers)
    for number, (path, layer) in enumerate(converted_layers(model)):
        family = layer.origin.family
        block = family.path_in_files(plain_name(path))
        for part in layer.router.parts:
            yield f"{block}.{family.router}.{part}", routers[f"{path}.router.{part}"].cpu()
        if family.selection_bias:
            name = f"{block}.{family.router}.{family.selection_bias}"
            yield name, routers[f"{path}.router.selection_bias"].cpu()
        for name, module in shared_modules(layer).items():
            for key, value in module.state_dict().items():
                yield f"{block}.{name}.{plain_name(key)}", value.cpu()
        experts = _all_experts(layer, placement, number, site)
        if site == 0:
            yield from family.layout.write(block, experts, layer.experts.parts)
        else:
            for _ in experts:
                pass
    own = _plain_tensors(model)
    paths = tuple(f"{path}." for path in _paths(model))
    left_out = _left_out(model, own)
    for key, value in own.items():
        if not key.startswith(paths) and key not in left_out:
            yield key, value.cpu()


def _all_experts(
    layer: ConvertedMoE, placement: Placement, number: int, site: int
) -> Iterator[ExpertWeights]:
    """All experts of a layer in order, at site 0; the others send theirs."""
    experts = layer.experts
    parts = [experts.part(part) for part in experts.parts]
    for expert in range(layer.num_experts):
        sender = responsible_site(placement, number, expert)
        if sender == site:
            own = tuple(part.cpu() for part in experts.expert_weights(expert))
            if site == 0:
                yield own
                continue
            for part in own:
                dist.send(part.contiguous(), 0)
        elif site == 0:
            received = tuple(torch.empty(part.shape[1:], dtype=part.dtype) for part in parts)
            for part in received:
                dist.recv(part, sender)
            yield received


def _write(
    model: Any, tensors: Iterable[tuple[str, Tensor]], target: Path, max_shard_bytes: int
) -> None:
    """The configuration, files of at most so many bytes, and their index."""
    temporary = target.with_name(f"{target.name}.tmp-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        own = _plain_tensors(model)
        apart = tied_names(model).keys() - _left_out(model, own)
        write_configs(model, temporary, untied=bool(apart))
        # Copies: parts of an expert are views of one tensor.
        copies = ((name, tensor.clone()) for name, tensor in tensors)
        write_tensors(temporary, copies, max_shard_bytes)
        if target.exists():
            target.rmdir()
        temporary.rename(target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
