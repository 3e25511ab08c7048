"""Copies, state dicts, casts and the meta device: which tensors are kept, which are rebuilt."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from layer_kinds import (
    EXACT,
    KINDS,
    assert_same,
    assert_same_gradients,
    every_kind,
    language_model,
    layer_of,
    outcome,
)
from small_layer import make, tokens
from small_model import small
from small_model import tokens as text
from torch import nn

from fomoe_ext.model.language import LanguageModel

pytestmark = pytest.mark.usefixtures("one_thread")

# ---- copies, state dicts, other dtypes, the meta device ------------------------------------------


def stored(layer: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda layer: pickle.loads(pickle.dumps(layer)),
    "save": stored,
}


@pytest.mark.parametrize("way", COPIES)
@every_kind
def test_copies_train_alike(kind: str, way: str) -> None:
    layer, x = layer_of(kind), tokens(30, 24)
    outcome(layer, x)  # with a graph, statistics and counts left in it
    other = COPIES[way](layer)
    assert torch.equal(other.load_since_update, layer.load_since_update)
    for each in (layer, other):
        each.update_selection_bias()
    assert_same(outcome(other, x), outcome(layer, x), **EXACT)
    assert repr(other) == repr(layer)
    assert torch.equal(other.router.selection_bias, layer.router.selection_bias)
    assert {t.data_ptr() for t in other.state_dict().values() if t.numel()}.isdisjoint(
        t.data_ptr() for t in layer.state_dict().values() if t.numel()
    )


@pytest.mark.parametrize("way", COPIES)
def test_copies_of_the_language_model(way: str) -> None:
    model = language_model(balance="switch")
    model.loss(text(2, 10)).total.backward()
    other = COPIES[way](model)
    model.zero_grad()
    other.zero_grad()
    for each in (model, other):
        each.loss(text(2, 12)).total.backward()
    assert_same_gradients(other, model, **EXACT)


@pytest.mark.parametrize("assign", [False, True])
@every_kind
def test_state_dicts_through_a_file(kind: str, assign: bool) -> None:
    layer, x = layer_of(kind), tokens(30, 24)
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    other = make(**(KINDS[kind] | {"seed": 1}))
    state = torch.load(buffer, weights_only=True)
    result = other.load_state_dict(state, assign=assign)
    assert not result.missing_keys and not result.unexpected_keys
    assert_same(outcome(other, x), outcome(layer, x), **EXACT)
    bias = "router.selection_bias"
    assert bias in state
    assert torch.equal(other.state_dict()[bias], layer.state_dict()[bias])


CASTS: dict[str, tuple[Callable[[nn.Module], nn.Module], torch.dtype]] = {
    "to": (lambda m: m.to(torch.bfloat16), torch.bfloat16),
    "to device": (lambda m: m.to("cpu", torch.float16), torch.float16),
    "bfloat16": (lambda m: m.bfloat16(), torch.bfloat16),
    "half in a parent": (lambda m: nn.Sequential(m).half()[0], torch.float16),
    "there and back": (lambda m: m.bfloat16().float(), torch.float32),
}


@pytest.mark.parametrize("way", CASTS)
@every_kind
def test_casts_leave_selection_bias_and_counts(kind: str, way: str) -> None:
    layer, x = layer_of(kind), tokens(30, 24)
    layer(x)
    before = [layer.router.selection_bias.clone(), layer.load_since_update.clone()]
    cast, dtype = CASTS[way]
    layer = cast(layer)
    assert {p.dtype for p in layer.parameters()} == {dtype}
    for mine, wanted in zip(
        (layer.router.selection_bias, layer.load_since_update), before, strict=True
    ):
        assert mine.dtype == wanted.dtype and torch.equal(mine, wanted)
    assert "selection_bias" in dict(layer.router.named_buffers())
    found = outcome(layer, x.to(dtype))
    assert found["y"].dtype == found["x.grad"].dtype == dtype


def test_a_cast_language_model_is_one_built_so() -> None:
    built = LanguageModel(small(), seed=3, dtype=torch.bfloat16)
    cast = LanguageModel(small(), seed=3).to(torch.bfloat16)
    assert torch.equal(cast(text(3, 14)), built(text(3, 14)))


@pytest.mark.parametrize("late_dtype", [False, True])
@every_kind
def test_from_the_meta_device(kind: str, late_dtype: bool) -> None:
    with torch.device("meta"):
        layer = make(**KINDS[kind])
    if late_dtype:
        layer.bfloat16()
    assert all(t.is_meta for t in [*layer.parameters(), *layer.buffers()])
    layer.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in [*layer.parameters(), *layer.buffers()]:
            tensor.fill_(1)  # whatever was in the memory
    layer.reset_parameters()
    dtype = torch.bfloat16 if late_dtype else torch.float32
    wanted = make(**KINDS[kind], dtype=dtype)
    for mine, theirs in zip(
        [*layer.named_parameters(), *layer.named_buffers()],
        [*wanted.named_parameters(), *wanted.named_buffers()],
        strict=True,
    ):
        assert mine[0] == theirs[0]
        assert mine[1].dtype == theirs[1].dtype and torch.equal(mine[1], theirs[1]), mine[0]
    x = tokens(30, 24, dtype=dtype)
    assert_same(outcome(layer, x), outcome(wanted, x), **EXACT)
