"""`skipped_mass="rescale"`: the weight of skipped slots goes to the computed ones."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from layer_kinds import EXACT, assert_same, outcome
from sharded_layer import assert_as_alone, on_a_rank
from sites import pool
from small_layer import check_against_dense, make, normalised_error, tokens
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from fomoe_ext.checkpoint.manifest import CheckpointError
from fomoe_ext.config.io import parse_args
from fomoe_ext.config.job import TrainConfig
from fomoe_ext.config.model import ModelConfig
from fomoe_ext.eval.models import skip_experts
from fomoe_ext.layer.moe import MoELayer
from fomoe_ext.layer.skipped import rescale_skipped
from fomoe_ext.model.language import LanguageModel
from fomoe_ext.placement import Placement
from fomoe_ext.train.job import check_same_job, job_identity

pytestmark = pytest.mark.usefixtures("one_thread")

HALF = (0, 3, 4)
CASES: dict[str, dict[str, Any]] = {
    "sigmoid": {},
    "softmax": {"router_scoring": "softmax"},
    "renormalize": {"router_renormalize": True, "router_scale": 2.5},
    "softmax-renormalize": {"router_scoring": "softmax", "router_renormalize": True},
    "top-1": {"top_k": 1},
    "top-6": {"top_k": 6},
    "one-resident": {"resident_experts": (2,), "router_scoring": "softmax"},
    "groups": {"router_num_groups": 3, "router_groups_kept": 2, "resident_experts": (0, 1, 3)},
    "shared": {"shared_expert_intermediate_size": 12},
    "bf16": {"dtype": torch.bfloat16},
}


def rescaling(**changes: Any) -> MoELayer:
    return make(**({"resident_experts": HALF, "skipped_mass": "rescale"} | changes))


def by_definition(layer: MoELayer, x: Tensor, chosen: Tensor, p: dict[str, Tensor]) -> Tensor:
    """The definition, in the dtype of x, token by token, with the layer's choice of experts."""
    router, residents = layer.router, layer.experts.resident_experts
    rows = []
    for token, experts in zip(x, chosen.tolist(), strict=True):
        logits = p["router.weight"] @ token
        scores = logits.sigmoid() if router.scoring == "sigmoid" else logits.softmax(0)
        gates = {e: scores[e] for e in experts}
        if router.renormalize:
            total = sum(gates.values())
            gates = {e: gate / total for e, gate in gates.items()}
        here = [e for e in experts if e in residents]
        y = torch.zeros_like(token)
        if here:
            mass = sum(gates.values()) / sum(gates[e] for e in here)
            for e in here:
                row = residents.index(e)
                gate, up = (p["experts.expand_weight"][row] @ token).chunk(2)
                out = p["experts.contract_weight"][row] @ (F.silu(gate) * up)
                y = y + router.scale * gates[e] * mass * out
        if layer.shared_expert is not None:
            gate, up = (p["shared_expert.expand.weight"] @ token).chunk(2)
            y = y + p["shared_expert.contract.weight"] @ (F.silu(gate) * up)
        rows.append(y)
    return torch.stack(rows)


@pytest.mark.parametrize("case", CASES)
def test_forward_and_all_gradients_are_those_of_the_definition(case: str) -> None:
    layer = rescaling(**CASES[case])
    dtype = layer.experts.expand_weight.dtype
    x = tokens(61, 24, dtype=dtype).requires_grad_()
    grad_y = tokens(61, 24, seed=9, dtype=dtype)
    y = layer(x)
    y.backward(grad_y)
    chosen = layer.router(x.detach())[1]
    exact = {n: p.detach().double().requires_grad_() for n, p in layer.named_parameters()}
    exact_x = x.detach().double().requires_grad_()
    wanted = by_definition(layer, exact_x, chosen, exact)
    wanted.backward(grad_y.double())
    limit = 2e-6 if dtype == torch.float32 else 2**-7
    assert normalised_error(y, wanted) < limit
    assert normalised_error(x.grad, exact_x.grad) < limit
    for name, parameter in layer.named_parameters():
        if exact[name].grad.norm() < 1e-9:  # one expert alone, renormalized: its weight is 1
            assert parameter.grad.norm() < 1e-5, name
            continue
        assert normalised_error(parameter.grad, exact[name].grad) < limit, name
    # Router rows of absent experts get a gradient through the factor alone.
    absent = [e for e in range(6) if e not in layer.experts.resident_experts]
    if case not in ("top-1", "renormalize", "softmax-renormalize"):
        assert layer.router.weight.grad[absent].any(dim=1).all()


def test_gradient_of_the_factor_is_that_of_differences() -> None:
    """gradcheck, fp64; tokens with all, some and no computed slots, and with fewer than K."""
    chosen = torch.tensor([[0, 1, 2], [3, 4, 5], [0, 3, 5], [1, 4, -1], [2, -1, -1]])
    index = torch.tensor([0, -1, 1, -1, 2, -1], dtype=torch.int32)
    weights = tokens(5, 3, seed=4).double().abs() + 0.1
    weights[chosen < 0] = 0.0
    weights.requires_grad_()
    cot = tokens(5, 3, seed=5).double() * (index[chosen.clamp_min(0)] >= 0)

    def of(w: Tensor) -> Tensor:
        return (rescale_skipped(w, chosen.int(), index) * cot).sum()

    assert torch.autograd.gradcheck(of, (weights,))
    got = rescale_skipped(weights, chosen.int(), index).detach()
    w = weights.detach()
    assert torch.allclose(got[0, [0, 2]].sum(), w[0].sum())
    assert torch.allclose(got[1, 1], w[1].sum()) and torch.allclose(got[3, 1], w[3].sum())
    assert torch.equal(got[4], w[4])  # nothing skipped: its only expert is resident


@pytest.mark.parametrize("case", ["sigmoid", "softmax-renormalize", "groups", "top-1"])
def test_without_skipped_slots_rescale_equals_drop_bit_for_bit(case: str) -> None:
    x = tokens(57, 24)
    options = CASES[case] | {"resident_experts": range(6)}
    layers = [make(skipped_mass=mass, **options) for mass in ("drop", "rescale")]
    assert_same(outcome(layers[1], x), outcome(layers[0], x), **EXACT)
    # At a site with skipped slots, the same holds for tokens without any.
    parts = [rescaling(skipped_mass=mass, **CASES[case]) for mass in ("drop", "rescale")]
    drop, rescale = (outcome(layer, x) for layer in parts)
    skipped = ~torch.isin(parts[0].router(x)[1], torch.tensor(parts[0].site_experts))
    whole, partly = ~skipped.any(1), skipped.any(1) & ~skipped.all(1)
    assert whole.any()
    for name in ("y", "x.grad"):
        assert torch.equal(rescale[name][whole], drop[name][whole]), name
    assert case == "top-1" or not torch.equal(rescale["y"][partly], drop["y"][partly])


def test_like_experts_give_what_a_full_layer_gives() -> None:
    """If all experts compute the same, a skipped slot loses only its weight."""
    mlp = torch.nn.Sequential(torch.nn.Linear(24, 20), torch.nn.SiLU(), torch.nn.Linear(20, 24))
    x = tokens(80, 24)
    common = {"top_k": 3, "router_scoring": "sigmoid", "router_renormalize": False}
    full = MoELayer.from_dense(mlp, 6, **common)(x)
    layer = MoELayer.from_dense(mlp, 6, resident_experts=HALF, skipped_mass="rescale", **common)
    y = layer(x)
    unserved = ~torch.isin(layer.router(x)[1], torch.tensor(HALF)).any(1)
    assert unserved.any() and layer.stats.skipped_share > 0.3
    assert (y[unserved] == 0).all()
    torch.testing.assert_close(y[~unserved], full[~unserved], rtol=2e-5, atol=1e-6)


def test_weights_near_zero_stay_finite() -> None:
    layer = rescaling(top_k=2, resident_experts=(1,))
    with torch.no_grad():
        layer.router.weight.zero_()
        layer.router.weight[0, 0] = 1.0
        layer.router.weight[1, 0] = -1.0
        layer.router.selection_bias[:2] = 5.0
    x = torch.zeros(4, 24)
    x[:, 0] = torch.tensor([20.0, 60.0, 88.0, 300.0])
    x[:, 1] = 1.0
    found = outcome(layer, x)
    assert all(value.isfinite().all() for value in found.values())
    # 1 / sigmoid(-20) is exact; sigmoid(-88) is below the smallest divisor.
    expert = layer.experts(x, torch.ones(4, 1), torch.ones(4, 1, dtype=torch.int32))[0]
    torch.testing.assert_close(found["y"][:2], expert[:2])
    assert found["y"][2].abs().max() < 1e-30 and expert[2].abs().max() > 1e-3


def test_compiled_once_for_any_number_of_tokens() -> None:
    torch._dynamo.reset()
    options = {"balance": "bias", "router_z_loss_coef": 0.1, "shared_expert_intermediate_size": 8}
    eager, traced = rescaling(**options), rescaling(**options)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(traced, fullgraph=True, backend=counter)
    counts = []
    for count in (33, 20, 48, 7):
        x = tokens(count, 24, seed=count)
        assert_same(outcome(traced, x, compiled), outcome(eager, x))
        counts.append(counter.frame_count)
    assert counts[1:] == [counts[1]] * 3 and counts[1] <= 2
    torch._dynamo.reset()


@pytest.mark.parametrize("ranks", [2, 3])
def test_what_another_rank_of_the_site_holds_is_not_skipped(ranks: int) -> None:
    options = {
        "num_experts": 8,
        "top_k": 4,
        "resident_experts": (0, 2, 3, 7),
        "skipped_mass": "rescale",
    }
    sizes = (9, 14, 4)[:ranks]
    answers = pool().run(ranks, on_a_rank, sizes, options, (ranks,))
    assert_as_alone(answers, sizes, options)
    assert {len(answer["experts"]) for answer in answers} != {4}


def test_what_a_frozen_copy_computes_is_not_skipped() -> None:
    """With copies of all absent experts nothing is rescaled; with some, only the rest is."""
    x = tokens(60, 24)
    absent = [e for e in range(6) if e not in HALF]
    full = {
        mass: rescaling(skipped_mass=mass, stale_experts=absent) for mass in ("drop", "rescale")
    }
    assert torch.equal(full["rescale"](x), full["drop"](x))
    one = rescaling(stale_experts=absent[:1])
    held = rescaling(resident_experts=(*HALF, absent[0]))
    torch.testing.assert_close(one(x), held(x), rtol=1e-5, atol=1e-6)
    assert 0 < one.stats.skipped_share == held.stats.skipped_share


def test_experts_left_out_by_an_evaluation_are_skipped_slots() -> None:
    """They stay in memory: the table of computed experts decides, not the resident ones."""
    config = ModelConfig(skipped_mass="rescale")
    outputs = {}
    for mass in ("drop", "rescale"):
        model = LanguageModel(config)
        skip_experts(model, 0.5, 0)
        layer = model.moe_layers()[0]
        assert layer.skipped_mass == "rescale"
        layer.skipped_mass = mass
        outputs[mass] = layer(tokens(20, config.hidden_size))
        assert layer.stats.skipped_share > 0.2
    lengths = [outputs[mass].norm() for mass in ("drop", "rescale")]
    assert lengths[1] > 1.1 * lengths[0]


def test_the_option_is_checked_and_shown() -> None:
    with pytest.raises(ValueError, match="skipped_mass must be one of"):
        make(skipped_mass="keep")
    with pytest.raises(SystemExit):
        parse_args(["--skipped-mass", "keep"])
    assert TrainConfig().model.skipped_mass == "drop"
    assert "skipped_mass='rescale'" in repr(rescaling())
    assert make().skipped_mass == "drop" and "skipped_mass" not in repr(make())
    check_against_dense(make(resident_experts=HALF, skipped_mass="drop"), tokens(20, 24))
    everywhere = Placement.cyclic(num_sites=2, num_experts=16, num_layers=4, replication=2)
    model = LanguageModel(parse_args(["--skipped-mass=rescale"]).model, everywhere, 0)
    assert {layer.skipped_mass for layer in model.moe_layers()} == {"rescale"}


def test_a_checkpoint_from_before_the_option_is_one_that_drops() -> None:
    meta = job_identity(TrainConfig())
    meta["model"] = {k: v for k, v in meta["model"].items() if k != "skipped_mass"}
    manifest: Any = SimpleNamespace(meta=meta)
    check_same_job(manifest, TrainConfig(), Path("there"))
    with pytest.raises(CheckpointError, match="skipped_mass = 'drop', this one has 'rescale'"):
        check_same_job(
            manifest, TrainConfig(model=ModelConfig(skipped_mass="rescale")), Path("there")
        )
