"""Checkpoints of transformers: a site reads only what it holds; all sites together write one."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fomoe_ext import messages
from fomoe_ext.assemble import global_router_tensors, local_tensors, responsible_site
from fomoe_ext.experts import ExpertWeights
from fomoe_ext.hf.convert import ConvertedMoE, convert, converted_layers
from fomoe_ext.outer.steps import unmet
from fomoe_ext.placement import Placement
from fomoe_ext.tensor_files import TensorFiles, write_tensors


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

    Of every other expert nothing is read and nothing allocated. The model is in eval mode.

    Args:
        path: a folder of `save_pretrained` with safetensors files, of a family that is known.
        placement, site, options: as `convert`.
        dtype: of the parameters; None = that of the configuration, else float32.
        device: where they go.
        model_class: a class of transformers; None = AutoModelForCausalLM.

    Raises ValueError for a folder without safetensors, or with other tensors than the model has
    (quantised ones, for example), and as `convert`.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = Path(path)
    reader = TensorFiles(folder)
    config = AutoConfig.from_pretrained(folder)
    kind = dtype or getattr(config, "dtype", None) or torch.float32
    with _parameters_on_meta():
        model = (model_class or AutoModelForCausalLM).from_config(config, dtype=kind)
        convert(model, placement=placement, site=site, **options)
    layers = converted_layers(model)
    with torch.no_grad():
        for layer_path, layer in layers:
            _read_layer(reader, layer_path, layer, device)
        _read_others(reader, model, {path for path, _ in layers}, device)
    if hasattr(model, "tie_weights"):
        model.tie_weights()
    return Loaded(model.eval(), reader.bytes_read, reader.bytes_total)


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


def _read_layer(
    reader: TensorFiles, path: str, layer: ConvertedMoE, device: torch.device | str
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
    for name in family.shared:
        _read_module(reader, layer.origin.block.get_submodule(name), f"{block}.{name}", device)


def _read_module(
    reader: TensorFiles, module: nn.Module, path: str, device: torch.device | str
) -> None:
    for key in module.state_dict():
        parent, _, name = key.rpartition(".")
        _set(module.get_submodule(parent), name, reader.read(f"{path}.{key}"), device)


def _read_others(
    reader: TensorFiles, model: nn.Module, layers: set[str], device: torch.device | str
) -> None:
    """All that is not in a converted layer; what shares memory with another is read once."""
    done: set[int] = set()
    for key, value in model.state_dict(keep_vars=True).items():
        if any(key.startswith(f"{path}.") for path in layers) or id(value) in done:
            continue
        done.add(id(value))
        parent, _, name = key.rpartition(".")
        if not reader.has(key) and _is_tied(model, key):
            continue
        _set(model.get_submodule(parent), name, reader.read(key), device)
    for module in model.modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            if buffer.device != torch.device(device):
                setattr(module, name, buffer.to(device))


def _is_tied(model: nn.Module, key: str) -> bool:
    """Whether `tie_weights` will make it another tensor."""
    tied = getattr(model, "_tied_weights_keys", None) or {}
    wanted = getattr(getattr(model, "config", None), "tie_word_embeddings", False)
    return bool(wanted) and key in tied


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
    What plain transformers loads is the model that all sites train. The folder is written under a
    temporary name.

    Raises ValueError on all sites for a model that is not converted or of another placement, or
    that has been trained since the sites last met in an OuterSync, and
    FileExistsError where the folder is there and not empty.
    """
    target = Path(folder)
    layers = converted_layers(model)
    for number, (path, layer) in enumerate(layers):
        wanted = placement.resident(number, site)
        if layer.experts.resident_experts != wanted:
            raise ValueError(
                f"{path} must hold the placement's experts of site {site}, {wanted}, it holds "
                f"{layer.experts.resident_experts}"
            )
    if not layers:
        raise ValueError(f"model must have been converted by fomoe_ext.hf, got {type(model)}")
    if problem := unmet(model):
        raise ValueError(f"model is not that of all sites: {problem}")
    _agree_on_folder(target, placement.num_sites, site)
    tensors = _all_tensors(model, placement, site)
    if site != 0:
        for _ in tensors:
            pass
    else:
        _write(model, tensors, target, max_shard_bytes)
    if placement.num_sites > 1:
        dist.barrier()


def _agree_on_folder(folder: Path, num_sites: int, site: int) -> None:
    """FileExistsError on all sites where site 0 must not write."""
    taken = site == 0 and folder.exists() and any(folder.iterdir())
    if num_sites > 1:
        taken = messages.broadcast(taken, leads=site == 0, who="site 0")
    if taken:
        raise FileExistsError(f"{folder} must be new or empty")


@torch.no_grad()
def _all_tensors(model: nn.Module, placement: Placement, site: int) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors as files have them, on the CPU; whole only at site 0."""
    own = local_tensors(model)
    routers = global_router_tensors(model, placement, site, own)
    layers = converted_layers(model)
    for number, (path, layer) in enumerate(layers):
        family = layer.origin.family
        block = family.path_in_files(path)
        for part in layer.router.parts:
            yield f"{block}.{family.router}.{part}", routers[f"{path}.router.{part}"].cpu()
        if family.selection_bias:
            name = f"{block}.{family.router}.{family.selection_bias}"
            yield name, routers[f"{path}.router.selection_bias"].cpu()
        for name in family.shared:
            for key, value in layer.origin.block.get_submodule(name).state_dict().items():
                yield f"{block}.{name}.{key}", value.cpu()
        experts = _all_experts(layer, placement, number, site)
        if site == 0:
            yield from family.layout.write(block, experts, layer.experts.parts)
        else:
            for _ in experts:
                pass
    paths = tuple(f"{path}." for path, _ in layers)
    shared: set[int] = set()
    for key, value in own.items():
        if key.startswith(paths) or (value.numel() and value.data_ptr() in shared):
            continue
        shared.add(value.data_ptr())
        yield key, value.cpu()


def _all_experts(
    layer: ConvertedMoE, placement: Placement, number: int, site: int
) -> Iterator[ExpertWeights]:
    """All experts of a layer in order, at site 0; the others send theirs."""
    experts = layer.experts
    shapes = [experts.part(part).shape[1:] for part in experts.parts]
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
            dtype = experts.expand_weight.dtype
            received = tuple(torch.empty(shape, dtype=dtype) for shape in shapes)
            for part in received:
                dist.recv(part, sender)
            yield received


def _write(
    model: Any, tensors: Iterable[tuple[str, Tensor]], target: Path, max_shard_bytes: int
) -> None:
    """Files of at most so many bytes, their index, and the configuration."""
    temporary = target.with_name(f"{target.name}.tmp-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        # Copies: parts of an expert are views of one tensor.
        copies = ((name, tensor.clone()) for name, tensor in tensors)
        write_tensors(temporary, copies, max_shard_bytes)
        model.config.save_pretrained(temporary)
        if getattr(model, "generation_config", None) is not None:
            model.generation_config.save_pretrained(temporary)
        if target.exists():
            target.rmdir()
        temporary.rename(target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
