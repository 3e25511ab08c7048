"""Whether a tensor that autograd kept for a backward pass may be overwritten there."""

from __future__ import annotations

import sys

import torch
from torch import Tensor

_keeps_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
_storage_owners = getattr(torch._C, "_storage_Use_Count", None)


def given_up(saved: tuple[Tensor | None, ...]) -> bool:
    """Whether the last of `ctx.saved_tensors` is read for the last time and has no other owner.

    For use in a backward pass, by a caller that holds the tensor in this tuple only. True where the
    graph is freed (no `retain_graph`) and neither Python nor another tensor or graph shares the
    memory: not where hooks on saved tensors keep what they return. False where that is unknown, as
    in tracing, or in a torch without the counters.
    """
    if torch.compiler.is_compiling() or type(saved[-1]) is not Tensor:
        return False
    if _keeps_graph is None or _storage_owners is None or _keeps_graph():
        return False
    # Owned by the tuple; besides by the graph, unless a hook made the tensor just now.
    native = saved[-1]._use_count()
    if native > 2 or _references(saved) != _IN_TUPLE + (native - 1) * _OF_NATIVE:
        return False
    return bool(_storage_owners(saved[-1].untyped_storage()._cdata) == 2)  # and the call's own


def _references(tensors: tuple[Tensor | None, ...]) -> int:
    return sys.getrefcount(tensors[-1])


def _native_references() -> int:
    """Python references that a native owner of a tensor stands for: none in older versions."""
    tensors = (torch.empty(0),)
    before = _references(tensors)
    owner = torch.empty(0)
    owner.grad = tensors[-1]
    return _references(tensors) - before


_IN_TUPLE = _references((torch.empty(0),))
_OF_NATIVE = _native_references()
