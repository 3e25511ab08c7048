"""A converted MoE block of transformers, forward and backward, against transformers' own eager and
grouped_mm implementations.

All three share their weights and get the same input. Lower bounds on time ("floors"): the experts'
FLOPs over the rate of a dense matmul, and the bytes of the weights (read twice) and their gradients
(written once) over the bandwidth of a copy.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import common
import machine
import pytest
import torch
from torch import nn

from fomoe_ext.ops import native

pytest.importorskip("transformers")

from fomoe_ext import hf
from fomoe_ext.hf.converted import converted_layers
from fomoe_ext.hf.restore import share_with_block

DEVICE = "cuda" if native.cuda_loaded else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
ROUNDS = 3


class Case(NamedTuple):
    """Sizes of a block: those of OLMoE (2048, 1024), or a narrower one of the same proportions."""

    name: str
    hidden_size: int
    intermediate_size: int
    experts: int
    top_k: int
    tokens: int

    def __str__(self) -> str:
        return f"{self.name}-{self.tokens}"


# Eager blocks are slow: the gradient of each expert's slice is as large as the whole weight.
CASES = (
    Case("OLMoE-half", 1024, 512, 64, 8, 512),
    Case("OLMoE-quarter", 512, 256, 64, 8, 2048),
)


def make_block(case: Case, implementation: str) -> tuple[nn.Module, Any]:
    """An OLMoE block of transformers with random weights, and its config."""
    from transformers import OlmoeConfig
    from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock

    config = OlmoeConfig(
        hidden_size=case.hidden_size,
        intermediate_size=case.intermediate_size,
        num_experts=case.experts,
        num_experts_per_tok=case.top_k,
    )
    config._experts_implementation = implementation
    block = OlmoeSparseMoeBlock(config).to(device=DEVICE, dtype=DTYPE)
    generator = torch.Generator(DEVICE).manual_seed(0)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_(std=parameter.shape[-1] ** -0.5, generator=generator)
    return block, config


@pytest.mark.parametrize("case", CASES, ids=str)
def test_hf_block(benchmark: Any, case: Case) -> None:
    """Forward and backward: ours, and both implementations of transformers."""
    block, config = make_block(case, "eager")
    model = nn.Module()
    model.config, model.mlp = config, block
    hf.convert(model)
    (_, layer), *_ = converted_layers(model)
    theirs = share_with_block(layer)
    generator = torch.Generator(DEVICE).manual_seed(1)
    shape = (1, case.tokens, case.hidden_size)
    x = torch.randn(shape, generator=generator, device=DEVICE, dtype=DTYPE, requires_grad=True)
    upstream = torch.randn(shape, generator=generator, device=DEVICE, dtype=DTYPE)

    def run(module: nn.Module, implementation: str = "") -> list[torch.Tensor]:
        config._experts_implementation = implementation
        x.grad = None
        for parameter in module.parameters():
            parameter.grad = None
        y = module(x)
        y.backward(upstream)
        return [y.detach(), x.grad, layer.experts.expand_weight.grad]

    rivals: dict[str, Callable[[], Any]] = {
        name: (lambda name=name: run(theirs, name)) for name in ("eager", "grouped_mm")
    }
    wanted = run(layer)
    for rival in rivals.values():
        common.assert_same(wanted, rival(), DTYPE)
    watch = machine.Watch(DEVICE)
    seconds = common.interleaved_seconds({"ours": lambda: run(layer), **rivals}, DEVICE, ROUNDS)
    benchmark.pedantic(lambda: run(layer), rounds=3)
    weights = 3 * case.experts * case.intermediate_size * case.hidden_size
    flops = 6 * case.tokens * case.top_k * 3 * case.intermediate_size * case.hidden_size
    rate = common.dense_rate(DTYPE)
    compute_floor = flops / rate
    memory_floor = 3 * weights * DTYPE.itemsize / common.memory_bandwidth()
    own = seconds.pop("ours")
    result = {
        "case": str(case),
        "dtype": common.dtype_name(DTYPE),
        "seconds": own,
        "compute_floor_seconds": compute_floor,
        "memory_floor_seconds": memory_floor,
        "fraction_of_floor": max(compute_floor, memory_floor) / own,
        "rivals": seconds,
    }
    benchmark.extra_info.update(result, machine=watch.facts())
    common.hf_results.append(result)
