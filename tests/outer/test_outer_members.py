"""The parameters that take part in meetings may not change after OuterSync was made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from outer_model import (
    EXPERTS,
    HIDDEN,
    SIZE,
    SmallModel,
    bits,
    cyclic_placement,
    give_gradients,
    pieces,
    random_placement,
)
from sites import pool
from torch import nn

from fomoe_ext import MoELayer
from fomoe_ext.outer import MeetingError, OuterOptions, OuterSync
from fomoe_ext.placement import Placement


class Model(SmallModel):
    """With a frozen layer, a tied one, and a trained one."""

    def __init__(self, placement: Placement, site: int) -> None:
        super().__init__(placement, site, balance="bias")
        torch.manual_seed(0)
        self.frozen, self.dense, self.tied = (nn.Linear(3, 3, bias=False) for _ in range(3))
        self.frozen.requires_grad_(False)
        self.tied.weight = self.dense.weight


def placement_of(num_sites: int) -> Placement:
    return cyclic_placement(num_sites, min(2, num_sites))


def thaw(model: Model) -> None:
    model.frozen.weight.requires_grad_(True)


def freeze(model: Model) -> None:
    model.first.requires_grad_(False)


def replace(model: Model) -> None:
    model.dense.weight = model.tied.weight = nn.Parameter(model.dense.weight.detach().clone())


def untie(model: Model) -> None:
    model.tied.weight = nn.Parameter(model.dense.weight.detach().clone())


def parametrize(model: Model) -> None:
    nn.utils.parametrize.register_parametrization(model.dense, "weight", nn.Identity())


def assign(model: Model) -> None:
    model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)


def add(model: Model) -> None:
    model.adapter = nn.Linear(3, 3)


def remove(model: Model) -> None:
    del model.first


def cast(model: Model) -> None:
    model.dense.bfloat16()


def widen(model: Model) -> None:
    model.dense.weight.data = torch.zeros(3, 4)


def transpose(model: Model) -> None:
    model.dense.weight.data = model.dense.weight.data.t()


def another_bias(model: Model) -> None:
    router = model.layers[1].router
    router.selection_bias = router.selection_bias.clone()


def move_experts(model: Model) -> None:
    layer = model.layers[0]
    ids = [e for e in range(EXPERTS) if e not in layer.site_experts]
    ids = [*layer.site_experts[1:], ids[0]]
    weights = tuple(torch.zeros_like(t) for t in layer.experts.expert_weights(ids[0]))
    layer.set_resident_experts(ids, {ids[-1]: weights})


def another_layer(model: Model) -> None:
    old = model.layers[0]
    new = MoELayer(HIDDEN, SIZE, EXPERTS, 2, resident_experts=old.site_experts, balance="bias")
    for module in (new.experts, new.router):
        for name, _ in list(module.named_parameters()):
            setattr(module, name, getattr(getattr(old, _where(module)), name))
    new.router.selection_bias = old.router.selection_bias
    model.layers[0] = new


def _where(module: nn.Module) -> str:
    return "router" if hasattr(module, "selection_bias") else "experts"


def balance_otherwise(model: Model) -> None:
    model.layers[0].router_scope = "resident"


Change = Callable[[Model], None]
CHANGES: list[tuple[Change, str]] = [
    (thaw, "frozen.weight is trained, and was frozen; after such a change make a new OuterSync"),
    (freeze, "first is frozen, and was trained"),
    (replace, "dense.weight is another tensor"),
    (untie, "tied.weight is another tensor"),
    (parametrize, "dense.weight is gone"),
    (assign, "is another tensor"),
    (add, "adapter.weight is new"),
    (remove, "first is gone"),
    (cast, "dense.weight has dtype torch.bfloat16, not torch.float32"),
    (widen, "dense.weight has shape [3, 4], not [3, 3]"),
    (transpose, "dense.weight is not contiguous"),
    (another_bias, "layers.1.router.selection_bias is another tensor"),
    (another_layer, "other MoE layers are there"),
    (balance_otherwise, "layers.0.router_scope was 'global' and is 'resident'"),
]


def changed(site: int, num_sites: int, at: int, change: Change, how: str) -> tuple[str, bool]:
    """The error of a meeting after a change at site `at` alone, and if nothing changed."""
    placement = placement_of(num_sites)
    model = Model(placement, site)
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    options = {"ddp": {"optimizer": "ddp"}, "staged": {"staged": True}}.get(how, {})
    sync = OuterSync(model, placement, site, OuterOptions(**options), inner_optimizer=inner)
    sync.step()
    sync.verify()
    give_gradients(model, site, 0)
    if site == at:
        change(model)
    before = pieces(model)
    try:
        if how == "verify":
            sync.verify()
        elif how == "ddp":
            sync.reduce_gradients()
        elif how == "reshuffle":
            new = random_placement(num_sites, 2, seed=1)
            sync.reshuffle(new)
        else:
            sync.step()
    except (MeetingError, ValueError) as error:
        unchanged = all(bits(v) == bits(before[k]) for k, v in pieces(model).items())
        return str(error), unchanged and sync.placement == placement
    return "", False


@pytest.mark.parametrize(("change", "words"), CHANGES, ids=lambda x: getattr(x, "__name__", ""))
def test_a_change_is_refused_by_name(change: Change, words: str) -> None:
    text, unchanged = changed(0, 1, 0, change, "step")
    assert text.startswith("nothing was sent or changed: site 0: ") and words in text
    assert unchanged


@pytest.mark.parametrize("how", ["step", "verify", "ddp", "reshuffle", "staged"])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (thaw, "site 1: frozen.weight is trained, and was frozen"),
        (move_experts, "site 1: layers.0 holds other experts than placed"),
    ],
)
def test_all_sites_hear_of_a_change_at_one(change: Change, words: str, how: str) -> None:
    for text, unchanged in pool().run(3, changed, 1, change, how):
        assert words.removeprefix("site 1: ") in text and unchanged, text


def other_frozen_weights(site: int, num_sites: int, options: dict[str, Any]) -> str:
    placement = placement_of(num_sites)
    model = Model(placement, site)
    with torch.no_grad():
        model.frozen.weight += 1e-3 * site
    with pytest.raises(MeetingError) as caught:
        OuterSync(model, placement, site, OuterOptions(**options))
    return str(caught.value)


def test_frozen_weights_that_differ_from_the_start_are_refused() -> None:
    for text in pool().run(2, other_frozen_weights, {}):
        assert "all sites must have the same frozen parameters" in text


def test_an_optimizer_of_other_parameters_is_refused() -> None:
    model = Model(placement_of(1), 0)
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    replace(model)
    with pytest.raises(ValueError, match=r"it lacks dense\.weight, and 1 of its 10 are not"):
        OuterSync(model, placement_of(1), 0, inner_optimizer=inner)


def thawed_properly(site: int, num_sites: int) -> bytes:
    placement = placement_of(num_sites)
    model = Model(placement, site)
    OuterSync(model, placement, site, OuterOptions(optimizer="fedavg")).step()
    model.frozen.weight.requires_grad_(True)
    sync = OuterSync(model, placement, site, OuterOptions(optimizer="fedavg"))
    give_gradients(model, site, 0)
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    sync.step()
    sync.verify()
    return bits(model.frozen.weight.detach())


def test_a_new_outer_sync_takes_in_what_has_changed() -> None:
    one, other = pool().run(2, thawed_properly)
    assert one == other != bits(Model(placement_of(1), 0).frozen.weight.detach())
