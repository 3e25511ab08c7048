"""The computation of a local step, captured once as a CUDA graph and replayed.

A replay launches all kernels of a step at once, so that the host, which takes longer than a GPU for
the many small kernels of a small layer, no longer limits it. Inputs and results of a graph are at
fixed places in memory: the tokens and the learning rate are copied there. The memory of the
activations stays allocated between steps.

On the CPU the same path runs without a capture. See https://pytorch.org/docs/stable/notes/cuda.html
(CUDA Graphs) for the method.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fomoe_ext.launch.waiting import reason_of

_WARM_UP = 3
"""Steps before the capture, which are ordinary steps: libraries allocate their workspaces, and the
optimizer its moments, at the first one."""


class StepResult(NamedTuple):
    """What a step has computed, on the device of the model.

    loss: cross entropy, a scalar in nats per token. norm: that of the gradients before clipping;
    None without clipping. rows: int64 scalar, rows that the experts have computed, over all layers.
    """

    loss: Tensor
    norm: Tensor | None
    rows: Tensor


class CapturedStep:
    """Runs `compute` on tokens at a fixed place; on CUDA, after a few steps, from a graph."""

    def __init__(
        self,
        compute: Callable[[Tensor], StepResult],
        optimizer: torch.optim.Optimizer,
        device: torch.device,
    ) -> None:
        """`compute`: a whole step on int64 tokens [B, L + 1]. It takes the learning rate from the
        optimizer's groups, where it is a tensor from now on, and waits nowhere for the device."""
        self._compute, self._device = compute, device
        self._tokens: Tensor | None = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._result: StepResult | None = None
        self._done = 0
        # The fused AdamW reads fp32 on CUDA. On the CPU fp64 gives the same bits as a float.
        dtype = torch.float32 if device.type == "cuda" else torch.float64
        self._rate = torch.zeros((), dtype=dtype, device=device)
        for group in optimizer.param_groups:
            group["lr"], group["capturable"] = self._rate, device.type == "cuda"

    @property
    def captured(self) -> bool:
        """Whether steps are replayed from a graph."""
        return self._graph is not None

    def __call__(self, tokens: Tensor, lr: float) -> StepResult:
        """One step on tokens [B, L + 1], on any device. The results are overwritten by the next
        step. Raises ValueError for another shape than at the first step."""
        if self._tokens is None:
            self._tokens = torch.empty_like(tokens, device=self._device)
        if tokens.shape != self._tokens.shape:
            raise ValueError(
                f"tokens must have shape {list(self._tokens.shape)}, as in the first step "
                f"(run.cuda_graph), got {list(tokens.shape)}"
            )
        self._tokens.copy_(tokens)
        self._rate.fill_(lr)
        self._done += 1
        if self._device.type != "cuda":
            return self._compute(self._tokens)
        return self._on_gpu(self._tokens)

    def _on_gpu(self, tokens: Tensor) -> StepResult:
        if self._done <= _WARM_UP:
            stream = torch.cuda.Stream(self._device)
            stream.wait_stream(torch.cuda.current_stream(self._device))
            with torch.cuda.stream(stream):
                result = self._compute(tokens)
            torch.cuda.current_stream(self._device).wait_stream(stream)
            return result
        if self._graph is None:
            self._graph = self._capture(tokens)
        self._graph.replay()
        assert self._result is not None
        return self._result

    def _capture(self, tokens: Tensor) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        try:
            # Threads that exchange or copy meanwhile may use the device.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._result = self._compute(tokens)
        except RuntimeError as error:
            raise RuntimeError(
                "run.cuda_graph: a local step cannot be captured as a CUDA graph: "
                f"{reason_of(error)}; train without --cuda-graph"
            ) from error
        return graph


def places(model: nn.Module, optimizer: torch.optim.Optimizer) -> Hashable:
    """Changes when a graph of a step would read or write memory that is no longer the model's or
    the optimizer's: after a resume, or when experts move between sites."""

    def of(tensors: Iterable[Tensor]) -> tuple[tuple[int, int], ...]:
        return tuple((tensor.data_ptr(), tensor.numel()) for tensor in tensors)

    moments = (
        value
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, Tensor)
    )
    return id(optimizer), of(model.parameters()), of(model.buffers()), of(moments)


def is_capturing(device: torch.device) -> bool:
    """Whether a graph is being captured on the current stream of a device."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
