"""`save_merged`: all sites together write one checkpoint that transformers loads."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fomoe_ext.files.tensors import write_tensors
from fomoe_ext.hf.beside import write_configs
from fomoe_ext.hf.converted import ConvertedMoE, converted_layers, shared_modules
from fomoe_ext.hf.restore import why_no_place
from fomoe_ext.hf.wrappers import plain_name, require_names, skeleton, tied_names, unwrapped
from fomoe_ext.launch import messages
from fomoe_ext.layer.assemble import global_router_tensors, local_tensors, responsible_site
from fomoe_ext.layer.experts import ExpertWeights
from fomoe_ext.outer.steps import unmet
from fomoe_ext.placement.placement import Placement


def save_merged(
    model: nn.Module,
    folder: str | Path,
    placement: Placement,
    site: int,
    *,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Writes the model of all sites in the original format. All sites must call it together.

    Each expert and its router row come from one of the expert's holders, all other tensors from
    site 0. Site 0 receives and writes one expert (gpt-oss: one layer) at a time; it needs memory
    for one file of at most max_shard_bytes.
    Plain transformers can load the folder: it has the global model, config.json and
    generation_config.json. Save the tokenizer into it yourself. The folder appears under its name
    once it is complete. The model may be wrapped by torch.compile or data parallelism.

    Raises on all sites: ValueError for a model that is not converted, does not fit the placement or
    has taken steps since the last meeting of its OuterSync, and for what the format cannot store (a
    selection bias in another family than DeepSeek-V3, tensors whose names or shapes differ from
    those that config.json implies); FileExistsError if the folder exists and is not empty;
    RuntimeError if torch.distributed has another number of processes than there are sites. If
    site 0 cannot write, it raises that error and the other sites raise RuntimeError.
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
    for _ in tensors:  # the other sites send; after an error site 0 receives what is left
        pass
    said = "" if failed is None else f"{type(failed).__name__}: {failed}"
    if placement.num_sites > 1:
        said = messages.broadcast(said, leads=site == 0, who="site 0")
    if failed is not None:
        raise failed
    if said:
        raise RuntimeError(f"site 0 could not write {folder}: {said}")


def _why_not(model: Any, placement: Placement, site: int) -> str:
    """Why this site's part of the model cannot be written in the original format, or ""."""
    layers = converted_layers(model)
    if not layers:
        return f"model must have been converted by fomoe_ext.hf, got {type(model).__name__}"
    for number, (path, layer) in enumerate(layers):
        wanted = placement.resident(number, site)
        if layer.experts.resident_experts != wanted:
            return (
                f"{path} must hold the experts that the placement gives site {site}, {wanted}, got "
                f"{layer.experts.resident_experts}"
            )
        if reason := why_no_place(path, layer, model.config):
            return reason
    if problem := unmet(model):
        return f"model is not the one that all sites agreed on: {problem}"
    try:
        if wanted_names := skeleton(model, "save_merged"):
            require_names(_plain_tensors(model), wanted_names, _paths(model), "save_merged")
    except ValueError as error:
        return str(error)
    return ""


def _agree_to_write(problem: str, num_sites: int, site: int) -> None:
    """ValueError on all sites if one of them has a problem."""
    count = dist.get_world_size() if dist.is_initialized() else 1
    if problem and not dist.is_initialized():
        raise ValueError(problem)
    if num_sites not in (1, count):
        raise RuntimeError(
            f"torch.distributed must have {num_sites} processes, one per site of the placement, "
            f"got {count}"
        )
    problems = messages.gather_objects(problem, num_sites, who="site")
    if problem:
        raise ValueError(problem)
    for other, said in enumerate(problems):
        if said:
            raise ValueError(f"site {other}: {said}")


def _agree_on_folder(folder: Path, num_sites: int, site: int) -> None:
    """FileExistsError on all sites if site 0 must not write into the folder."""
    taken = site == 0 and folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
    if num_sites > 1:
        taken = messages.broadcast(taken, leads=site == 0, who="site 0")
    if taken:
        raise FileExistsError(f"folder must be new or empty, got {folder}")


def _plain_tensors(model: nn.Module) -> dict[str, Tensor]:
    """A model's tensors, by their names without wrappers."""
    return {plain_name(name): value for name, value in local_tensors(model).items()}


def _paths(model: nn.Module) -> list[str]:
    """Paths of the converted layers, without wrappers."""
    return [plain_name(path) for path, _ in converted_layers(model)]


def _same_memory(one: Tensor, other: Tensor) -> bool:
    return (one.data_ptr(), one.shape, one.stride(), one.dtype) == (
        other.data_ptr(),
        other.shape,
        other.stride(),
        other.dtype,
    )


def _left_out(model: nn.Module, tensors: dict[str, Tensor]) -> set[str]:
    """Tensors that are not written because the configuration ties them to one that is."""
    tied = tied_names(model) if getattr(model.config, "tie_word_embeddings", False) else {}
    return {
        name
        for name, source in tied.items()
        if name in tensors and source in tensors and _same_memory(tensors[name], tensors[source])
    }


@torch.no_grad()
def _all_tensors(model: nn.Module, placement: Placement, site: int) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors as files have them, on the CPU. Only site 0 gets all of them."""
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
    """All experts of a layer in ascending order, at site 0. The other sites send theirs."""
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
    """Writes the configuration, files of at most max_shard_bytes, and their index."""
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
