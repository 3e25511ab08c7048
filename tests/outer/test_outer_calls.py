"""Forgotten calls: a meeting works without them, or refuses before anything is averaged."""

from __future__ import annotations

import copy
import gc
import io
import re
import sys
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from outer_model import (
    HIDDEN,
    LAYERS,
    SmallModel,
    bits,
    cyclic_placement,
    give_gradients,
    noise,
    pieces,
)
from sites import pool
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fomoe_ext.outer import MeetingError, OuterOptions, OuterSync
from fomoe_ext.outer.flight import warn_of_lost
from fomoe_ext.outer.steps import unmet
from fomoe_ext.placement import Placement

STEPS, ROUNDS = 4, 2
HOOKS = sys.modules["torch.optim.optimizer"]._global_optimizer_post_hooks


def place(num_sites: int, replication: int = 2) -> Placement:
    return cyclic_placement(num_sites, min(replication, num_sites))


def made(site: int, num_sites: int, **options: Any) -> tuple[SmallModel, Any, OuterSync]:
    placement = place(num_sites)
    model = SmallModel(placement, site, balance="bias", balance_bias_rate=0.01)
    inner = torch.optim.AdamW(model.parameters(), lr=0.01)
    sync = OuterSync(model, placement, site, OuterOptions(**options), inner_optimizer=inner)
    return model, inner, sync


def passes(model: nn.Module, site: int, step: int, chunks: int = 1) -> None:
    """Forward and backward passes of a site's batch."""
    for x in noise(("x", site, step), 8, HIDDEN).chunk(chunks):
        model(x).square().mean().div(chunks).backward()


# ------------------------------------------------------------------------------ calls made by hooks


def trained(site: int, num_sites: int, options: dict[str, Any], by_hand: bool) -> Any:
    """The results of a loop that calls `after_step`, or of one that does not."""
    model, inner, sync = made(site, num_sites, **options)
    for step in range(STEPS * ROUNDS):
        passes(model, site, step)
        inner.step()
        for layer in model.layers:
            layer.update_selection_bias()
        if by_hand:
            sync.after_step()
        inner.zero_grad()
        if (step + 1) % STEPS == 0:
            sync.step()
    sync.finish()
    sync.verify()
    anchors = [bits(anchor) for anchor in sync.state.anchors]
    return pieces(model), anchors, sync.bytes_sent, sync.steps, sync.counts.tokens.tolist()


@pytest.mark.parametrize(
    "options",
    [
        {"fragments": 2, "local_steps": STEPS},
        {"fragments": 2, "local_steps": STEPS, "overlap": 1, "codec": "int8"},
        {"fragments": 2, "local_steps": STEPS, "expert_mean": "tokens"},
        {"expert_mean": "tokens"},
        {"expert_turns": 2},
        {"expert_mean": "tokens", "staged": True},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_after_step_need_not_be_called(options: dict[str, Any]) -> None:
    """The same bits, bytes, steps and counts of tokens with it and without."""
    with_it = pool().run(2, trained, options, True)
    for (one, anchors, *counts), (other, anchors_, *counts_) in zip(
        with_it, pool().run(2, trained, options, False), strict=True
    ):
        assert counts == counts_ and anchors == anchors_
        assert counts[1] == STEPS * ROUNDS
        assert all(bits(value) == bits(other[key]) for key, value in one.items())


def several_optimizers(site: int, num_sites: int) -> int:
    """Two optimizers share a model: one step together. One of another model does not count."""
    model = SmallModel(place(num_sites), site)
    experts = [p for layer in model.layers for p in layer.experts.parameters()]
    others = [p for p in model.parameters() if not any(p is e for e in experts)]
    inner = [torch.optim.SGD(experts, lr=0.1), torch.optim.AdamW(others, lr=0.01)]
    sync = OuterSync(model, place(num_sites), site, OuterOptions(fragments=2, local_steps=2))
    stranger = nn.Linear(2, 2)
    for step in range(4):
        give_gradients(model, site, step)
        for optimizer in inner:
            optimizer.step()
        stranger(torch.ones(2)).sum().backward()
        torch.optim.SGD(stranger.parameters(), lr=0.1).step()
        if step % 2:
            sync.step()
    sync.verify()
    return sync.steps


def test_a_step_may_be_that_of_several_optimizers() -> None:
    assert pool().run(2, several_optimizers) == [4, 4]


def ddp(site: int, num_sites: int, how: str) -> tuple[dict[Any, Tensor], int]:
    """Steps with gradients averaged over sites, accumulated or clipped in several ways."""
    model, inner, sync = made(site, num_sites, optimizer="ddp")
    if how == "made after":
        inner = torch.optim.AdamW(model.parameters(), lr=0.01)
    for step in range(3):
        chunks = 2 if how == "accumulated" else 1
        for part, x in enumerate(noise(("x", site, step), 8, HIDDEN).chunk(chunks)):
            model(x).square().mean().div(chunks).backward()
            if how not in ("never", "made after") and not part:
                sync.reduce_gradients()  # too early, where there is another pass
        if how == "clipped":
            nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        inner.step()
        inner.zero_grad(set_to_none=how != "accumulated")
    different = pieces(model)
    sync.step()
    return different, sync.step_count.reductions


@pytest.mark.parametrize("how", ["never", "made after", "once", "accumulated", "clipped"])
def test_gradients_are_averaged_before_every_step(how: str) -> None:
    """All sites are equal before the meeting, even if gradients were reduced too early."""
    (one, count), (other, _) = pool().run(2, ddp, how)
    assert count == (3 if how in ("never", "once", "made after") else 6)
    for key in one.keys() & other.keys():
        assert bits(one[key]) == bits(other[key]), key
    if how == "accumulated":
        (right, _), _ = pool().run(2, ddp, "once")
        assert all(torch.allclose(right[k], one[k], atol=3e-3) for k in right)


# --------------------------------------------------------------------------- calls that were missed


class Plain:
    """An optimizer that is not a torch.optim.Optimizer."""

    def __init__(self, parameters: Any) -> None:
        self._parameters = list(parameters)

    @torch.no_grad()
    def step(self) -> None:
        for parameter in self._parameters:
            parameter -= 0.1 * parameter.grad


def missed(site: int, num_sites: int, what: str) -> tuple[str, bool]:
    """The error of a loop that omits a call, and whether the model is unchanged."""
    options = {
        "fragments": {"fragments": 2, "local_steps": 2},
        "step": {"fragments": 2, "local_steps": 2},
        "ddp": {"optimizer": "ddp"},
        "eval": {"expert_mean": "tokens"},
        "no_grad": {"expert_mean": "tokens"},
        "verify": {"overlap": 1, "local_steps": 2},
    }[what]
    model, _, sync = made(site, num_sites, **options)
    model.train(what != "eval")
    plain = what != "step"
    inner = Plain(model.parameters()) if plain else torch.optim.SGD(model.parameters(), 0.01)
    before = pieces(model)
    try:
        for step in range(4):
            if what == "no_grad":
                with torch.no_grad():
                    model(noise("x", 8, HIDDEN))
                give_gradients(model, site, step)
            else:
                passes(model, site, step)
            inner.step()
            before = pieces(model)
            if what in ("ddp", "verify"):
                sync.after_step()
            if step % 2 and what != "step":
                sync.step()
                if what == "verify":
                    sync.verify()
    except MeetingError as error:
        return str(error), all(bits(v) == bits(before[k]) for k, v in pieces(model).items())
    return "", False


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("fragments", "step is due every local_steps = 2 steps, after_step was called .* 0 times"),
        ("step", "step was not called after local_steps = 2 steps"),
        ("ddp", "reduce_gradients is due before every step, was called 0 times in 2"),
        ("eval", r"was trained, but no tokens were counted: train in mode train\(\)"),
        ("no_grad", "was trained, but no tokens were counted"),
    ],
)
def test_what_was_missed_is_named_before_anything_is_averaged(what: str, words: str) -> None:
    for text, unchanged in pool().run(2, missed, what):
        assert re.search(words, text), text
        assert unchanged


def test_finish_is_named_where_it_was_missed() -> None:
    for text, _ in pool().run(2, missed, "verify"):
        assert "call finish before verify" in text


def saved_early(site: int, num_sites: int, options: dict[str, Any]) -> list[str]:
    """Why the model is not yet that of all sites, at several points of a round."""
    model, inner, sync = made(site, num_sites, **options)
    told = [unmet(model)]
    for _ in range(2):
        passes(model, site, 0)
        inner.step()
    told.append(unmet(model))
    sync.step()
    told.append(unmet(model))
    sync.finish()
    told.append(unmet(model))
    sync.copy_anchor_to_model()
    return [*told, unmet(model)]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, ["", "2 local steps have not met", "", "", ""]),
        ({"optimizer": "ddp"}, [""] * 5),
        (
            {"expert_turns": 2},
            ["", "2 local steps", "is this site's own", "is this site's own", ""],
        ),
        (
            {"overlap": 1, "local_steps": 2},
            ["", "call OuterSync.finish", "call OuterSync.finish", "this site's own", ""],
        ),
    ],
)
def test_a_model_that_has_not_met_is_not_that_of_all_sites(
    options: dict[str, Any], words: list[str]
) -> None:
    for told in pool().run(2, saved_early, options):
        for text, word in zip(told, words, strict=True):
            assert word in text and bool(text) == bool(word)


def test_a_bias_that_is_never_updated_is_warned_of_once() -> None:
    model, inner, sync = made(0, 1)
    for step in range(3):
        passes(model, 0, step)
        inner.step()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            sync.step()
        told = [str(w.message) for w in caught if "update_selection_bias" in str(w.message)]
        assert len(told) == (step == 0), told


def test_fragments_that_are_never_applied_are_warned_of() -> None:
    sync = made(0, 1, overlap=1, local_steps=2)[2]
    for step in range(2):
        give_gradients(sync.model, 0, step)
        sync.after_step()
    sync.step()
    with pytest.warns(UserWarning, match="finish was not called"):
        warn_of_lost(sync._driver.flights)
    sync.finish()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_lost(sync._driver.flights)


# ---------------------------------------------------------------------------------- what tokens are


Pass = Callable[[nn.Module, Tensor], None]


def whole(model: nn.Module, x: Tensor) -> None:
    model(x).square().sum().backward()


def micro_batches(model: nn.Module, x: Tensor) -> None:
    for part in x.chunk(8):
        model(part).square().sum().backward()


def checkpointed(model: nn.Module, x: Tensor) -> None:
    checkpoint(model, x, use_reentrant=False).square().sum().backward()


def reentrant(model: nn.Module, x: Tensor) -> None:
    x = x.clone().requires_grad_()
    checkpoint(model, x, use_reentrant=True).square().sum().backward()


def looked_at(model: nn.Module, x: Tensor) -> None:
    """With passes that do not train: evaluation, sampling, one without a backward pass."""
    micro_batches(model, x)
    with torch.no_grad():
        model(x)
    model.eval()
    model(x)
    model.train()
    model(x)


def gone_through_twice(model: nn.Module, x: Tensor) -> None:
    y = model(x)
    y.square().sum().backward(retain_graph=True)
    y.sum().backward()


def only_forward(model: nn.Module, x: Tensor) -> None:
    model(x)
    give_gradients(model, 0, 0)


@pytest.mark.parametrize(
    ("one_pass", "told"),
    [
        (whole, False),
        (micro_batches, False),
        (micro_batches, True),
        (checkpointed, False),
        (reentrant, True),
        (looked_at, False),
        (gone_through_twice, False),
        (only_forward, True),
    ],
)
def test_every_token_that_trains_is_counted_once(one_pass: Pass, told: bool) -> None:
    placement = place(1)
    model = SmallModel(placement, 0)
    sync = OuterSync(model, placement, 0, OuterOptions(expert_mean="tokens"))
    inner = torch.optim.SGD(model.parameters(), lr=1e-6)
    x = noise("tokens", 40, HIDDEN)
    model(x)
    wanted = 2 * torch.stack([layer.stats.load for layer in model.layers]).double()
    sync.watch._routed.take()
    for _ in range(2):
        one_pass(model, x)
        inner.step()
        inner.zero_grad()
        if told:
            sync.after_step()
    sync.watch.catch_up()
    assert sync.counts.tokens.sum() == wanted.sum() == 2 * 40 * 2 * LAYERS
    # Steps of 1e-6 are too small to change the routing of any token.
    assert torch.equal(sync.counts.tokens, wanted)


def weighed(site: int, num_sites: int, chunks: int) -> float:
    """How far the mean moves an expert that moved by 1 at site 0 (8 tokens) and by 0 at site 1 (1
    token)."""
    model, inner, sync = made(site, num_sites, expert_mean="tokens", optimizer="fedavg")
    x = noise("one", 1, HIDDEN).expand(8 if site == 0 else 1, HIDDEN)
    starts = [layer.experts.expand_weight.detach().clone() for layer in model.layers]
    for part in x.chunk(chunks):
        model(part).square().sum().backward()
    inner.step()
    chosen = int(model.layers[0].stats.load.argmax())
    with torch.no_grad():
        for layer, start in zip(model.layers, starts, strict=True):
            layer.experts.expand_weight.copy_(start + 1 - site)
    sync.step()
    moved = model.layers[0].experts.expand_weight.detach()[chosen] - starts[0][chosen]
    return float(moved.mean())


@pytest.mark.parametrize("chunks", [1, 8])
def test_a_mean_by_tokens_is_one_of_all_micro_batches(chunks: int) -> None:
    assert pool().run(2, weighed, chunks) == pytest.approx([8 / 9, 8 / 9], abs=1e-5)


# ------------------------------------------------------------------------------------ what hooks do


def test_a_model_can_be_copied_stored_compiled_and_met_anew() -> None:
    placement = place(1)
    options = {"fragments": 2, "local_steps": 2, "expert_mean": "tokens"}
    model = SmallModel(placement, 0)
    sync = OuterSync(model, placement, 0, OuterOptions(**options))
    x = noise("x", 8, HIDDEN)
    twin = copy.deepcopy(model)
    file = io.BytesIO()
    torch.save(model, file)
    for other in (twin, torch.load(io.BytesIO(file.getvalue()), weights_only=False)):
        whole(other, x)
        torch.optim.SGD(other.parameters(), lr=0.1).step()
    assert sync.steps == 0 and not sync.watch.waiting and not sync.watch._routed.take().any()
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    later = OuterSync(model, placement, 0, OuterOptions(**options))
    whole(model, x)
    inner.step()
    assert later.watch.waiting and not sync.watch.waiting
    later.close()
    whole(model, x)
    assert later.steps == 0
    names = len(HOOKS)
    third = OuterSync(model, placement, 0, OuterOptions(**options))
    assert len(HOOKS) == names + 1
    assert len(model.layers[0]._forward_hooks) == 1
    del third
    gc.collect()
    assert len(HOOKS) == names
    assert not model.layers[0]._forward_hooks and not model._forward_pre_hooks


def test_counts_of_a_compiled_model_are_the_same() -> None:
    placement = place(1)
    model = SmallModel(placement, 0)
    sync = OuterSync(
        model, placement, 0, OuterOptions(fragments=2, local_steps=2, expert_mean="tokens")
    )
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    inner = torch.optim.SGD(model.parameters(), lr=1e-6)
    for _ in range(2):
        compiled(noise("x", 8, HIDDEN)).square().sum().backward()
        inner.step()
    sync.watch.catch_up()
    assert sync.steps == 2
    assert sync.counts.tokens.sum(1).tolist() == [8 * 2, 2 * 8 * 2]  # the first fragment has met
