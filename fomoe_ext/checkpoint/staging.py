"""Copies a process's part of a checkpoint into host memory, which the next checkpoint reuses.

The copies are made when the checkpoint starts, or later by the writing thread, concurrently with
the next forward and backward pass. Tensors on a GPU are then copied on a stream of their own.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fomoe_ext.checkpoint.shards import TensorPart, shard_of

PROBLEMS = (OSError, TypeError, ValueError, RuntimeError)
"""Errors of one process that are reported to the others."""


class Content(NamedTuple):
    """What a process writes: its part of the global model, of the training state, and JSON."""

    model: dict[str, Tensor]
    shards: dict[str, TensorPart]
    state: Any


class Source(NamedTuple):
    """Where the content comes from; `buffers` None = it is written without a copy."""

    tensors: Iterable[tuple[str, Tensor]]
    named: Iterable[tuple[str, Tensor]]
    state: Any
    buffers: Buffers | None


class Buffers:
    """Host memory for copies, reused by every checkpoint: fresh memory is slow to fill."""

    def __init__(self) -> None:
        self._kept: dict[tuple[str, str], Tensor] = {}
        self._used: dict[tuple[str, str], Tensor] = {}

    def copy(self, key: tuple[str, str], tensor: Tensor) -> Tensor:
        """A copy in host memory; for a GPU's tensor it is complete after a synchronization."""
        copy = self._kept.get(key)
        if copy is None or (copy.shape, copy.dtype) != (tensor.shape, tensor.dtype):
            on_gpu = tensor.device.type == "cuda"
            copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=on_gpu)
        self._used[key] = copy
        if tensor.device.type == "cuda":
            tensor.record_stream(torch.cuda.current_stream(tensor.device))
        return copy.copy_(tensor, non_blocking=True)

    def next(self) -> None:
        """The memory is free for another checkpoint; what the last one did not use is given up."""
        self._kept, self._used = self._used, {}


@torch.no_grad()
def stage(source: Source, cancelled: threading.Event) -> tuple[Content, str | None]:
    """The content to write, copied to buffers if there are any, and the error, if any.

    The iterables may be collectives, so they are consumed to the end even after an error, unless
    the checkpoint is abandoned.
    """
    problem = None
    content = Content({}, {}, source.state)
    devices: set[torch.device] = set()
    for part, pairs in (("model", source.tensors), ("state", source.named)):
        for name, tensor in pairs:
            if cancelled.is_set():
                return content, "abandoned"
            if problem is not None:
                continue
            try:
                shard = shard_of(name, tensor)
                if shard is None:
                    continue
                if source.buffers is not None:
                    copied = source.buffers.copy((part, name), shard.tensor)
                    shard = TensorPart(copied, shard.offsets)
                    if tensor.device.type == "cuda":
                        devices.add(tensor.device)
                if part == "model":
                    content.model[name] = shard.tensor.view(tensor.shape)
                else:
                    content.shards[name] = shard
            except PROBLEMS as error:
                problem = str(error)
    for device in devices:
        torch.cuda.current_stream(device).synchronize()
    return content, problem


class Gpu(NamedTuple):
    """A GPU, and an event after which the tensors are ready to be copied."""

    device: int
    ready: torch.cuda.Event

    @classmethod
    def now(cls) -> Gpu | None:
        """The current GPU of this thread, for use in another thread; None without one."""
        if not torch.cuda.is_initialized():
            return None
        ready = torch.cuda.Event()
        ready.record()
        return cls(torch.cuda.current_device(), ready)


@contextmanager
def beside(gpu: Gpu | None) -> Iterator[None]:
    """Inside, copies of a GPU's tensors use a stream of their own, which waits for the event."""
    if gpu is None:
        yield
        return
    stream = torch.cuda.Stream(gpu.device)
    stream.wait_event(gpu.ready)
    with torch.cuda.stream(stream):
        yield
