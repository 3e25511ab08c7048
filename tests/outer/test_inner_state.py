"""State of inner optimizers moves with its experts, or is refused if its meaning is unknown."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from outer_model import (
    SmallModel,
    bits,
    cyclic_placement,
    give_gradients,
    noise,
    pieces,
    random_placement,
)
from sites import pool
from torch import Tensor, nn

from fomoe_ext.outer import MeetingError, OuterOptions, OuterSync
from fomoe_ext.outer.belongings import Belongings
from fomoe_ext.outer.inner_state import problem_with_rows, reset_bad_state

Make = Callable[[Any], torch.optim.Optimizer]


def hf_adafactor(parameters: Any) -> torch.optim.Optimizer:
    optimization = pytest.importorskip("transformers.optimization")
    return optimization.Adafactor(parameters, beta1=0.9, lr=None)


class Own(torch.optim.Optimizer):
    """An optimizer that keeps `make(parameter)` as its state."""

    def __init__(self, parameters: Any, make: Callable[[Tensor], dict[str, Any]]) -> None:
        super().__init__(parameters, {"lr": 0.1})
        self._make = make

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if not self.state[p]:
                    self.state[p].update(self._make(p))
                p -= 0.1 * p.grad


KNOWN: dict[str, Make] = {
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=0.1),
    "transformers' Adafactor": hf_adafactor,
    "AdamW": lambda p: torch.optim.AdamW(p, amsgrad=True),
    "fused AdamW": lambda p: torch.optim.AdamW(p, fused=True),
    "foreach AdamW": lambda p: torch.optim.AdamW(p, foreach=True),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "plain SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "Adagrad": lambda p: torch.optim.Adagrad(p, initial_accumulator_value=0.25),
    "Adamax": lambda p: torch.optim.Adamax(p),
    "NAdam": lambda p: torch.optim.NAdam(p),
    "RMSprop": lambda p: torch.optim.RMSprop(p, momentum=0.5, centered=True),
    "Rprop": lambda p: torch.optim.Rprop(p, lr=0.03),
    "of its own": lambda p: Own(
        p, lambda t: {"second": noise(t.shape, *t.shape), "of a row": noise(1, t.shape[0], 1, 1)}
    ),
}
FIRST = {"sum": 0.25, "step_size": 0.03}


def rows_of(model: SmallModel, inner: torch.optim.Optimizer) -> dict[Any, dict[str, Tensor]]:
    """State tensors with a row per expert, by (layer, expert, part)."""
    result: dict[Any, dict[str, Tensor]] = {}
    for index, layer in enumerate(model.layers):
        for part in layer.experts.parts:
            state = inner.state.get(layer.experts.part(part), {})
            for row, expert in enumerate(layer.experts.resident_experts):
                result[index, expert, part] = {
                    name: value[row].clone()
                    for name, value in state.items()
                    if isinstance(value, Tensor) and value.dim()
                }
    return result


def moved(site: int, num_sites: int, kind: str) -> Any:
    old, new = (random_placement(num_sites, 1, epoch=e) for e in (0, 1))
    model = SmallModel(old, site)
    experts = [p for layer in model.layers for p in layer.experts.parameters()]
    inner = KNOWN[kind](experts)
    sync = OuterSync(model, old, site, inner_optimizer=inner)
    for step in range(2):
        give_gradients(model, site, step)
        inner.step()
    before = rows_of(model, inner)
    sync.step()
    arrived = sync.reshuffle(new).arrived
    after = rows_of(model, inner)
    give_gradients(model, site, 3)
    inner.step()  # the optimizer continues with the moved state
    finite = all(bool(p.isfinite().all()) for p in model.parameters())
    return before, after, arrived, finite


@pytest.mark.parametrize("kind", KNOWN)
def test_state_moves_with_its_expert(kind: str) -> None:
    stayed = came = 0
    for before, after, arrived, finite in pool().run(2, moved, kind):
        assert arrived and finite
        for (layer, expert, part), state in after.items():
            if (layer, expert) in arrived:
                for name, value in state.items():
                    assert bool((value == FIRST.get(name, 0.0)).all()), (name, expert)
                    came += 1
                continue
            assert state.keys() == before[layer, expert, part].keys()
            for name, value in state.items():
                assert bits(value) == bits(before[layer, expert, part][name]), (name, expert)
                stayed += value.numel() > 0
    assert (stayed > 10 and came > 10) or kind == "plain SGD"


class Quantised(Tensor):
    """Like the 8-bit state of libraries: a tensor that claims to be fp32."""


REFUSED: list[tuple[Make, str]] = [
    (
        lambda p: Own(p, lambda t: {"state1": torch.zeros(t.shape, dtype=torch.uint8)}),
        "state1 (torch.uint8) of layers.0.experts.expand_weight in inner_optimizer Own",
    ),
    (
        lambda p: Own(p, lambda t: {"exp_avg": torch.zeros_like(t).as_subclass(Quantised)}),
        "exp_avg (torch.float32) of layers.0",
    ),
    (lambda p: Own(p, lambda t: {"absmax": torch.zeros(7)}), "absmax [7] of layers.0"),
    (lambda p: Own(p, lambda t: {"whole": torch.zeros(1, *t.shape[1:])}), "whole [1, "),
    (lambda p: Own(p, lambda t: {"flat": torch.zeros(t.numel())}), "flat ["),
    (lambda p: Own(p, lambda t: {"GG": [torch.zeros(3, 3)]}), "GG (list) of layers.0"),
    (
        lambda p: Own(p, lambda t: {"master_param": t.detach().clone()}),
        "master_param of layers.0.experts.expand_weight in inner_optimizer Own is a copy",
    ),
    (lambda p: Own(p, lambda t: {"own": 1.1 * t.detach()}), "own of layers.0.experts.expand_w"),
    (lambda p: torch.optim.LBFGS(p), "LBFGS keeps state of all parameters together"),
    (lambda p: torch.optim.ASGD(p), "ax of layers.0.experts.expand_weight"),
]


def refused(site: int, num_sites: int, which: int, at: int) -> tuple[str, str, bool]:
    old, new = (random_placement(num_sites, 1, epoch=e) for e in (0, 1))
    model = SmallModel(old, site)
    experts = [p for layer in model.layers for p in layer.experts.parameters()]
    make = REFUSED[which][0] if site == at or at < 0 else KNOWN["AdamW"]
    inner = make(experts)
    sync = OuterSync(model, old, site, inner_optimizer=inner)
    give_gradients(model, site, 0)
    inner.step(lambda: torch.tensor(0.0))
    sync.step()
    before = pieces(model)
    with pytest.raises((ValueError, MeetingError)) as caught:
        sync.reshuffle(new)
    same = all(bits(v) == bits(before[k]) for k, v in pieces(model).items())
    return type(caught.value).__name__, str(caught.value), same and sync.placement == old


@pytest.mark.parametrize("which", range(len(REFUSED)))
def test_unknown_state_is_refused_before_anything_moves(which: int) -> None:
    for kind, text, unchanged in pool().run(2, refused, which, -1):
        assert kind == "ValueError" and REFUSED[which][1] in text and unchanged, text


def test_all_sites_hear_of_state_that_one_refuses() -> None:
    (first, told, same), (second, own, same_) = pool().run(2, refused, 0, 1)
    assert (first, second) == ("MeetingError", "ValueError") and same and same_
    assert "site 1: state1 (torch.uint8) of layers.0" in told and "state1" in own


def stepped_by_another(site: int, num_sites: int, optimizer: str) -> str:
    placement = cyclic_placement(num_sites, 1)
    model = SmallModel(placement, site)
    inner = torch.optim.AdamW(model.parameters())
    sync = OuterSync(
        model, placement, site, OuterOptions(optimizer=optimizer), inner_optimizer=inner
    )
    for one in (inner, torch.optim.AdamW(model.parameters())):
        give_gradients(model, site, 0)
        one.step()
    with pytest.raises((ValueError, MeetingError)) as caught:
        sync.step()
        sync.reshuffle(random_placement(num_sites, 1, seed=1))
    return str(caught.value)


@pytest.mark.parametrize(
    ("optimizer", "name"), [("fedavg", "layers.0.experts.expand_weight"), ("local-adamw", "first")]
)
def test_state_of_another_optimizer_than_the_one_that_trains_is_refused(
    optimizer: str, name: str
) -> None:
    for text in pool().run(2, stepped_by_another, optimizer):
        assert f"{name} was trained by another optimizer than inner_optimizer" in text


def test_column_factors_belong_to_no_single_expert() -> None:
    """Adafactor factors biases [R, n] over the experts: that state belongs to no single expert,
    whether n = R or not."""
    for make, name in ((KNOWN["Adafactor"], "col_var"), (hf_adafactor, "exp_avg_sq_col")):
        for width in (3, 4):
            biases = nn.Parameter(noise("b", 4, width))
            inner = make([biases])
            biases.grad = noise("g", 4, width)
            inner.step()
            assert problem_with_rows(inner, [("biases", biases)]).startswith(f"{name} [")


def test_state_that_cannot_travel_is_refused() -> None:
    placement = cyclic_placement(1, 1)
    model = SmallModel(placement, 0)
    inner = torch.optim.Adafactor(model.parameters())
    sync = OuterSync(model, placement, 0, inner_optimizer=inner)
    Belongings.of(sync.state)
    give_gradients(model, 0, 0)
    inner.step()
    with pytest.raises(ValueError, match="but Adafactor keeps row_var of first"):
        Belongings.of(sync.state)


@pytest.mark.parametrize("kind", ["Adafactor", "transformers' Adafactor", "AdamW", "Adagrad"])
def test_state_that_is_not_finite_is_reset(kind: str) -> None:
    stack = nn.Parameter(noise("w", 3, 4, 5))
    inner = KNOWN[kind]([stack])
    for value in (1.0, float("nan")):
        stack.grad = noise("g", 3, 4, 5) * value
        inner.step()
    with torch.no_grad():
        stack.copy_(noise("w", 3, 4, 5))
    assert reset_bad_state(inner) == 1
    stack.grad = noise("g", 3, 4, 5)
    inner.step()
    assert bool(stack.isfinite().all())
    assert reset_bad_state(inner) == 0
