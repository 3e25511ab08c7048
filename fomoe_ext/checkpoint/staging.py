"""What a process copies for a checkpoint: into host memory that is kept for the next one.

Copies are made where the checkpoint begins, or by the thread that writes them then, beside the
forward and backward pass that follow; of a GPU's tensors by a stream of their own.
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
"""What may go wrong in one process, and is told to the others."""


class Content(NamedTuple):
    """What a process writes: its part of the global model, of the training state, and for JSON."""

    model: dict[str, Tensor]
    shards: dict[str, TensorPart]
    state: Any


class Source(NamedTuple):
    """Where the content comes from; `buffers` None = it is written from where it is."""

    tensors: Iterable[tuple[str, Tensor]]
    named: Iterable[tuple[str, Tensor]]
    state: Any
    buffers: Buffers | None


class Buffers:
    """Host memory for copies, kept from one checkpoint for the next: new memory is slow to fill."""

    def __init__(self) -> None:
        self._kept: dict[tuple[str, str], Tensor] = {}
        self._used: dict[tuple[str, str], Tensor] = {}

    def copy(self, key: tuple[str, str], tensor: Tensor) -> Tensor:
        """A copy in host memory; of a GPU's tensor it is whole after the next synchronisation."""
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
    """What is to be written, in buffers if there are any, and what is wrong with it, if anything.

    The iterables may be collectives, so they are gone through to their ends all the same, unless
    the checkpoint is given up.
    """
    problem = None
    content = Content({}, {}, source.state)
    devices: set[torch.device] = set()
    for part, pairs in (("model", source.tensors), ("state", source.named)):
        for name, tensor in pairs:
            if cancelled.is_set():
                return content, "given up"
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
    """A GPU, and an event after which what is to be copied is there."""

    device: int
    ready: torch.cuda.Event

    @classmethod
    def now(cls) -> Gpu | None:
        """The GPU of this thread, which a new thread does not know; None without one."""
        if not torch.cuda.is_initialized():
            return None
        ready = torch.cuda.Event()
        ready.record()
        return cls(torch.cuda.current_device(), ready)


@contextmanager
def beside(gpu: Gpu | None) -> Iterator[None]:
    """Inside, a GPU's copies go by a stream of their own, from what was there at an event."""
    if gpu is None:
        yield
        return
    stream = torch.cuda.Stream(gpu.device)
    stream.wait_event(gpu.ready)
    with torch.cuda.stream(stream):
        yield
