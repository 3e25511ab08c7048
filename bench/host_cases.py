"""What the host does for a small MoELayer: operators that it dispatches, and its time.

    python bench/host_cases.py          prints {case: {"forward": s, "backward": s}} as JSON

Tensors are tiny and on the CPU, so that arithmetic takes next to nothing of the time; on a GPU the
host does the same work before a kernel can start.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from fomoe_ext.layer.moe import MoELayer

HALF = {"resident_experts": range(4)}
CASES: dict[str, dict[str, Any]] = {
    "sigmoid": {},
    "softmax": {"router_scoring": "softmax", "router_renormalize": True},
    "bias": {"balance": "bias"},
    "switch": {"router_scoring": "softmax", "balance": "switch"},
    "switch sigmoid": {"balance": "switch"},
    "switch z": {
        "router_scoring": "softmax",
        "balance": "switch",
        "router_z_loss_coef": 1e-3,
    },
    "entropy": {"balance": "entropy"},
    "half": HALF,
    "half rescale": HALF | {"skipped_mass": "rescale"},
    "half resident": HALF | {"router_scope": "resident"},
    "shared": {"shared_expert_intermediate_size": 16},
}
HIDDEN = 32
REPEATS, ROUNDS = 50, 20


class Operators(NamedTuple):
    """Of a forward and a backward pass. forward, backward: operators that reach a kernel, by name.
    computing: those that are no views. recorded: all that torch's profiler records, also those
    that operators call inside."""

    forward: Counter[str]
    backward: Counter[str]
    computing: int
    recorded: int

    @property
    def dispatched(self) -> int:
        return self.forward.total() + self.backward.total()


class Pass:
    """A layer in training, tokens x [2, 8, D] and a gradient of its output."""

    def __init__(self, options: dict[str, Any], dtype: torch.dtype = torch.float32) -> None:
        self.layer = MoELayer(HIDDEN, 16, 8, 2, dtype=dtype, **options)
        draw = torch.Generator().manual_seed(0)
        self.x = torch.randn(2, 8, HIDDEN, generator=draw).to(dtype).requires_grad_()
        self.grad = torch.randn(2, 8, HIDDEN, generator=draw).to(dtype)
        self._one = torch.ones(())
        self.has_loss = options.get("balance") in ("switch", "entropy")
        self._leaves = [self.x, *self.layer.parameters()]

    def forward(self) -> Tensor:
        return self.layer(self.x)

    def backward(self, y: Tensor) -> None:
        """As in a model: y and the balancing loss, if there is one, are given gradients."""
        loss = self.layer.aux_loss if self.has_loss else None
        roots, grads = ([y], [self.grad]) if loss is None else ([y, loss], [self.grad, self._one])
        torch.autograd.backward(roots, grads)

    def clear(self) -> None:
        for leaf in self._leaves:
            leaf.grad = None


class _Dispatched(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[Any] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:  # what torch calls
        self.found.append(func)
        return func(*args, **(kwargs or {}))


def operators(one: Pass) -> Operators:
    """Of the second pass: the first one may make tables."""
    one.backward(one.forward())
    one.clear()
    forward, backward = _Dispatched(), _Dispatched()
    with forward:
        y = one.forward()
    with backward:
        one.backward(y)
    one.clear()
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        one.backward(one.forward())
    one.clear()
    names = [event.name for event in recorded.events()]
    return Operators(
        Counter(map(str, forward.found)),
        Counter(map(str, backward.found)),
        sum(not op.is_view for op in forward.found + backward.found),
        sum(name.startswith(("aten::", "fomoe::")) for name in names),
    )


def host_seconds(one: Pass) -> dict[str, float]:
    """Of one forward and one backward pass: processor time of this thread, the least of rounds."""

    def least(call: Callable[[], Any]) -> float:
        times = []
        for _ in range(ROUNDS):
            began = time.thread_time()
            for _ in range(REPEATS):
                call()
            times.append((time.thread_time() - began) / REPEATS)
        return min(times)

    def both() -> None:
        one.clear()
        one.backward(one.forward())

    both()
    forward = least(one.forward)
    return {"forward": forward, "backward": max(0.0, least(both) - forward)}


def main() -> None:
    torch.set_num_threads(1)
    print(json.dumps({name: host_seconds(Pass(options)) for name, options in CASES.items()}))


if __name__ == "__main__":
    main()
