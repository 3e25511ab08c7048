"""The layer and the model under FSDP2 and DDP: two Gloo processes compute what one does."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from layer_kinds import KINDS, language_model, layer_of
from sites import pool
from small_layer import make, normalised_error, tokens
from small_model import tokens as text
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from fomoe_ext.layer.moe import MoELayer
from fomoe_ext.model.language import LanguageModel

pytestmark = pytest.mark.usefixtures("one_thread")

PROCESSES = 2
STEPS = 2
# FSDP and DDP average gradients over processes, so every loss must be a mean over tokens.
BY_TOKEN: dict[str, Any] = {"balance": "bias", "router_z_loss_coef": 0.1}


# ---- what one process and each of many do --------------------------------------------------------


def full(value: Tensor) -> Tensor:
    """A parameter or gradient, gathered if it is sharded."""
    value = value.detach()
    return value.full_tensor() if isinstance(value, torch.distributed.tensor.DTensor) else value


def balance(model: nn.Module) -> None:
    """One step of every selection bias, by the load of all processes."""
    for layer in model.modules():
        if isinstance(layer, MoELayer):
            load = layer.load_since_update.clone()
            if dist.is_initialized():
                dist.all_reduce(load)
            layer.update_selection_bias(load)


def train(
    model: nn.Module, loss_of: Callable[[Tensor], Tensor], batches: list[Tensor]
) -> dict[str, Tensor]:
    """Some optimizer steps; the gradients of the first and the state after the last, by name."""
    found: dict[str, Tensor] = {}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step, batch in enumerate(batches):
        loss = loss_of(batch)
        loss.backward()
        if step == 0:
            for name, parameter in model.named_parameters():
                assert parameter.grad is not None, name
                found[f"{name}.grad"] = full(parameter.grad).clone()
        optimizer.step()
        optimizer.zero_grad()
        balance(model)
    return found | {name: full(value).clone() for name, value in model.state_dict().items()}


def layer_loss(run: Callable[[Tensor], Tensor], layer: MoELayer) -> Callable[[Tensor], Tensor]:
    """A mean over tokens, so that the mean over processes is that over all tokens."""
    return lambda x: run(x).square().mean() + layer.aux_loss


def share(batches: list[Tensor], site: int) -> list[Tensor]:
    """This process' half of every batch."""
    return [batch.chunk(PROCESSES)[site] for batch in batches]


def layer_batches() -> list[Tensor]:
    return [tokens(40, 24, seed=step) for step in range(STEPS)]


def text_batches() -> list[Tensor]:
    return [text(4, 14, seed=step) for step in range(STEPS)]


def trained_alone(kind: str) -> dict[str, Tensor]:
    """The result to compare with: a layer or the language model, trained in one process."""
    if kind == "model":
        model = language_model(balance="bias")
        return train(model, lambda ids: model.loss(ids).total, text_batches())
    layer = layer_of(kind, **BY_TOKEN)
    return train(layer, layer_loss(layer, layer), layer_batches())


def assert_as_alone(answers: list[dict[str, Tensor]], kind: str) -> None:
    wanted = trained_alone(kind)
    assert any("selection_bias" in name for name in wanted)
    for answer in answers:
        assert answer.keys() == wanted.keys()
        for name, value in wanted.items():
            torch.testing.assert_close(
                answer[name],
                value,
                rtol=1e-4,
                atol=1e-6 if name.endswith("grad") else 1e-5,
                msg=lambda words, name=name: f"{name}: {words}",
            )


# ---- fully_shard ---------------------------------------------------------------------------------


def sharded(site: int, num_sites: int, kind: str) -> dict[str, Tensor]:
    mesh = init_device_mesh("cpu", (num_sites,))
    if kind == "model":
        model = language_model(balance="bias")
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        return train(model, lambda ids: model.loss(ids).total, share(text_batches(), site))
    layer = layer_of(kind, **BY_TOKEN)
    # torch cannot shard a parameter without elements: the experts' where none is resident.
    fully_shard(layer, mesh=mesh, ignored_params={p for p in layer.parameters() if not p.numel()})
    assert all(p.to_local().shape[0] < p.shape[0] for p in layer.parameters() if p.numel())
    found = train(layer, layer_loss(layer, layer), share(layer_batches(), site))
    # The statistics that a user reads after a pass are this process's own.
    assert layer.stats.load.sum() == 20 * layer.top_k
    assert layer.aux_loss > 0
    return found


@pytest.mark.parametrize("kind", [*KINDS, "model"])
def test_fully_shard_trains_as_one_process(kind: str) -> None:
    assert_as_alone(pool().run(PROCESSES, sharded, kind), kind)


def sharded_in_bf16(site: int, num_sites: int) -> tuple[Tensor, Tensor, torch.dtype]:
    layer = layer_of("skipping")
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    fully_shard(layer, mesh=init_device_mesh("cpu", (num_sites,)), mp_policy=policy)
    y = layer(share(layer_batches(), site)[0])
    y.float().square().mean().backward()
    weight = layer.experts.expand_weight
    assert weight.dtype == weight.grad.dtype == torch.float32
    assert layer.router.selection_bias.dtype == torch.float32
    return y.detach().float(), full(weight.grad), y.dtype


def test_fully_shard_in_mixed_precision() -> None:
    layer = layer_of("skipping")
    y = layer(layer_batches()[0])
    y.square().mean().backward()
    answers = pool().run(PROCESSES, sharded_in_bf16)
    assert [answer[2] for answer in answers] == [torch.bfloat16] * 2
    # The router sees rounded weights, too: a token may choose another expert.
    assert normalised_error(torch.cat([answer[0] for answer in answers]), y) < 0.2
    assert normalised_error(answers[0][1], layer.experts.expand_weight.grad) < 0.2


def sharded_state(
    site: int, num_sites: int, state: dict[str, Tensor], late: bool
) -> tuple[dict[str, Tensor], Tensor]:
    """Loads a full state dict into a sharded layer. Returns it gathered, and an output."""
    if late:
        with torch.device("meta"):
            layer = make(**KINDS["skipping"])
    else:
        layer = layer_of("skipping", seed=1)
    fully_shard(layer, mesh=init_device_mesh("cpu", (num_sites,)))
    if late:
        layer.to_empty(device="cpu")
        layer.make_buffers("cpu")
    options = StateDictOptions(full_state_dict=True)
    set_model_state_dict(layer, state, options=options)
    found = get_model_state_dict(layer, options=options)
    return {name: value.clone() for name, value in found.items()}, layer(tokens(30, 24)).detach()


@pytest.mark.parametrize("late", [False, True], ids=["built", "from meta"])
def test_full_state_dicts_of_a_sharded_layer(late: bool) -> None:
    layer = layer_of("skipping")
    state, y = layer.state_dict(), layer(tokens(30, 24))
    assert not torch.equal(layer_of("skipping", seed=1)(tokens(30, 24)), y)
    for found, mine in pool().run(PROCESSES, sharded_state, state, late):
        assert found.keys() == state.keys()
        assert all(torch.equal(found[name], value) for name, value in state.items())
        assert torch.equal(mine, y)


# ---- DistributedDataParallel ---------------------------------------------------------------------


def data_parallel(site: int, num_sites: int, kind: str) -> dict[str, Tensor]:
    """Default options: no find_unused_parameters, buffers broadcast by process 0."""
    if kind == "model":
        model = language_model(balance="bias")
        wrapped = DistributedDataParallel(WithLoss(model))
        return train(model, wrapped, share(text_batches(), site))
    layer = layer_of(kind, **BY_TOKEN)
    wrapped = DistributedDataParallel(layer)
    return train(layer, layer_loss(wrapped, layer), share(layer_batches(), site))


class WithLoss(nn.Module):
    """A model whose forward pass is its loss, as DDP wants it."""

    def __init__(self, model: LanguageModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        return self.model.loss(ids).total


@pytest.mark.parametrize("kind", [*KINDS, "model"])
def test_data_parallel_trains_as_one_process(kind: str) -> None:
    assert_as_alone(pool().run(PROCESSES, data_parallel, kind), kind)


def idle_batches() -> list[Tensor]:
    """The first half repeats one token, so that most experts get none there."""
    batches = layer_batches()
    for batch in batches:
        batch[:20] = batch[0]
    return batches


def with_idle_experts(site: int, num_sites: int) -> tuple[dict[str, Tensor], int]:
    layer = layer_of("skipping", top_k=1, **BY_TOKEN)
    wrapped = DistributedDataParallel(layer)
    found = train(layer, layer_loss(wrapped, layer), share(idle_batches(), site))
    return found, int(layer.stats.load.count_nonzero())


def test_data_parallel_with_experts_without_tokens() -> None:
    """Their rows of the gradient are zeros, so no parameter is ever unused."""
    answers = pool().run(PROCESSES, with_idle_experts)
    assert answers[0][1] == 1
    layer = layer_of("skipping", top_k=1, **BY_TOKEN)
    wanted = train(layer, layer_loss(layer, layer), idle_batches())
    for found, _ in answers:
        for name, value in wanted.items():
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)


def nothing_chosen(site: int, num_sites: int) -> dict[str, Tensor]:
    """Every slot of process 0's tokens is skipped."""
    layer = layer_of(
        "skipping",
        shared_expert_intermediate_size=0,
        router_z_loss_coef=0.0,
        balance="none",
        top_k=1,
    )
    layer.router.selection_bias.fill_(0)
    layer.router.selection_bias[5 if site == 0 else 2] = 100.0
    wrapped = DistributedDataParallel(layer, broadcast_buffers=False)
    y = wrapped(tokens(20, 24, seed=site))
    assert bool(y.any()) == (site == 1)
    y.square().mean().backward()
    return {name: p.grad.clone() for name, p in layer.named_parameters()}


def test_data_parallel_where_one_process_skips_everything() -> None:
    answers = pool().run(PROCESSES, nothing_chosen)
    layer = layer_of(
        "skipping",
        shared_expert_intermediate_size=0,
        router_z_loss_coef=0.0,
        balance="none",
        top_k=1,
    )
    layer.router.selection_bias.fill_(0)
    layer.router.selection_bias[2] = 100.0
    (layer(tokens(20, 24, seed=1)).square().mean() / 2).backward()
    assert layer.experts.expand_weight.grad[1].any()
    for answer in answers:
        for name, parameter in layer.named_parameters():
            torch.testing.assert_close(answer[name], parameter.grad, rtol=1e-5, atol=1e-7)


def accumulated(site: int, num_sites: int) -> dict[str, Tensor]:
    layer = layer_of("skipping", **BY_TOKEN)
    wrapped = DistributedDataParallel(layer)
    loss_of = layer_loss(wrapped, layer)
    parts = share(layer_batches()[:1], site)[0].chunk(2)
    for at, part in enumerate(parts):
        with wrapped.no_sync() if at == 0 else nullcontext():
            (loss_of(part) / 2).backward()
    return {name: p.grad.clone() for name, p in layer.named_parameters()}


def test_data_parallel_with_accumulated_gradients() -> None:
    layer = layer_of("skipping", **BY_TOKEN)
    layer_loss(layer, layer)(layer_batches()[0]).backward()
    for answer in pool().run(PROCESSES, accumulated):
        for name, parameter in layer.named_parameters():
            torch.testing.assert_close(answer[name], parameter.grad, rtol=1e-4, atol=1e-6)
