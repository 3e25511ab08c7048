"""Tables that follow from ids and sizes alone stay right whatever is done to a module's tensors.

The tables of resident experts, the counts for bias balancing, frozen copies, the rotary table: none
is in a state dict, so the module itself must rebuild them. The ids of the resident experts are in
it: they say which experts its rows are.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from layer_kinds import language_model
from small_layer import make, tokens
from small_model import small
from small_model import tokens as text
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, get_swa_multi_avg_fn

from fomoe_ext.layer.experts import Experts
from fomoe_ext.layer.moe import MoELayer
from fomoe_ext.model.language import LanguageModel

pytestmark = pytest.mark.usefixtures("one_thread")

RESIDENT: dict[str, Any] = {"resident_experts": [0, 2, 5], "balance": "bias"}
KINDS: dict[str, dict[str, Any]] = {
    "global": RESIDENT,
    "resident": RESIDENT | {"router_scope": "resident"},
    "stale": RESIDENT | {"stale_experts": [1, 4]},
    "rescale": RESIDENT | {"skipped_mass": "rescale", "shared_expert_intermediate_size": 8},
    "all": {"expert_bias": True, "balance": "bias"},
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def other_memory(module: nn.Module) -> nn.Module:
    """`to_empty`, with the new memory filled with 77, as it may hold anything."""
    module.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.state_dict(keep_vars=True).values()):
            tensor.fill_(77)
    return module


def check_alike(found: MoELayer, wanted: MoELayer) -> None:
    """Both layers give the same results in training and have the same tables."""
    outcomes = []
    for layer in (found, wanted):
        x = tokens(30, 24).requires_grad_()
        layer.zero_grad()
        y = layer(x)
        (y.square().sum() + layer.aux_loss).backward()
        layer.update_selection_bias()
        outcomes.append([y, x.grad, layer.stats.load, layer.router.selection_bias])
        outcomes[-1] += [p.grad for p in layer.parameters()]
        outcomes[-1] += [layer.experts.resident_index, layer.experts.resident_ids]
    for one, other in zip(*outcomes, strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)
    assert (found.allowed is None) == (wanted.allowed is None)
    assert found.allowed is None or torch.equal(found.allowed, wanted.allowed)


# ---- from the meta device ------------------------------------------------------------------------


def assigned(layer: MoELayer, state: dict[str, Tensor]) -> MoELayer:
    layer.load_state_dict(state, assign=True)
    return layer


def emptied(layer: MoELayer, state: dict[str, Tensor]) -> MoELayer:
    other_memory(layer).load_state_dict(state)
    return layer


def placed(layer: MoELayer, state: dict[str, Tensor]) -> MoELayer:
    """Sets tensors one by one, as checkpoint loaders do."""
    for name, value in state.items():
        path, _, last = name.rpartition(".")
        module = layer.get_submodule(path)
        if last in module._parameters:
            setattr(module, last, nn.Parameter(value))
        elif last in module._buffers:
            setattr(module, last, value)
        else:
            module.set_extra_state(value)
    return layer


@pytest.mark.parametrize("fill", [assigned, emptied, placed])
@every_kind
def test_a_layer_of_the_meta_device_gets_its_tables(
    kind: str, fill: Callable[[MoELayer, dict[str, Tensor]], MoELayer]
) -> None:
    wanted = make(**KINDS[kind])
    wanted.router.selection_bias.copy_(tokens(6) / 10)
    state = copy.deepcopy(wanted.state_dict())
    with torch.device("meta"):
        layer = make(**KINDS[kind])
    assert layer.experts.resident_index.is_meta and layer.load_since_update.is_meta
    check_alike(fill(layer, state), wanted)


def test_a_bias_update_before_the_first_pass() -> None:
    with torch.device("meta"):
        layer = make(**KINDS["resident"])
    layer.load_state_dict(make(**KINDS["resident"]).state_dict(), assign=True)
    layer.update_selection_bias()
    assert not layer.router.selection_bias.any()  # nothing was counted
    layer.update_selection_bias(torch.arange(6))
    assert layer.router.selection_bias.sign().tolist() == [1, 0, 1, 0, 0, -1]  # of loads 0, 2, 5


@pytest.mark.parametrize("place", ["cpu", "meta"])
@every_kind
def test_to_empty_loses_no_table(kind: str, place: str) -> None:
    layer, wanted = make(**KINDS[kind], device=place), make(**KINDS[kind])
    state = copy.deepcopy(wanted.state_dict())
    if place == "cpu":
        for each in (layer, wanted):
            each(tokens(9, 24))  # counts stay
    stale = None if layer.stale is None else layer.stale.state_dict()
    assert not stale
    layer.to_empty(device="cpu")
    layer.load_state_dict(state)
    if layer.stale is None or place == "meta":
        check_alike(layer, wanted)


@pytest.mark.parametrize("built", ["cpu", "meta", "context"])
def test_aux_loss_is_on_the_device_of_the_layer_from_the_start(built: str) -> None:
    with torch.device("meta" if built == "context" else "cpu"):
        layer = make(balance="switch", **({} if built == "context" else {"device": built}))

    def place() -> str:
        assert layer.aux_loss.device == layer.router.weight.device
        assert (layer.aux_loss.shape, layer.aux_loss.dtype) == ((), torch.float32)
        return layer.aux_loss.device.type

    assert place() == ("cpu" if built == "cpu" else "meta")
    if built != "cpu":
        layer.to_empty(device="cpu")
        layer.reset_parameters()
    assert place() == "cpu" and layer.aux_loss == 0
    layer(tokens(9, 24))
    loss = layer.aux_loss
    layer.bfloat16()
    assert place() == "cpu" and layer.aux_loss is loss and loss > 0  # with its graph
    layer.to("meta")
    assert place() == "meta"
    layer.to_empty(device="cpu")
    assert place() == "cpu" and layer.aux_loss == 0


def test_aux_loss_is_on_the_device_of_a_layer_that_is_filled_by_hand() -> None:
    layer = make(balance="switch", device="meta")
    layer.load_state_dict(make().state_dict(), assign=True)
    layer.make_buffers("cpu")
    assert layer.aux_loss.device.type == "cpu" and layer.aux_loss == 0


def test_skip_init() -> None:
    options = {"hidden_size": 24, "intermediate_size": 20, "num_experts": 6, "top_k": 3} | RESIDENT
    layer = nn.utils.skip_init(MoELayer, **options, device="cpu")
    wanted = MoELayer(**options)
    layer.load_state_dict(copy.deepcopy(wanted.state_dict()))
    check_alike(layer, wanted)


@pytest.mark.parametrize("way", ["assign", "to_empty"])
def test_a_language_model_of_the_meta_device(way: str) -> None:
    wanted = LanguageModel(small(), seed=3)
    state = copy.deepcopy(wanted.state_dict())
    with torch.device("meta"):
        model = LanguageModel(small(), seed=4)
    if way == "to_empty":
        other_memory(model)
    model.load_state_dict(state, assign=way == "assign")
    assert torch.equal(model(text(2, 12)), wanted(text(2, 12)))
    assert torch.equal(model.rope, wanted.rope)


def test_a_rotary_table_is_as_exact_after_a_cast() -> None:
    model = LanguageModel(small(), seed=3)
    before = model.rope.clone()
    model.bfloat16().float()
    assert torch.equal(model.rope, before)


@pytest.mark.parametrize("balance", ["switch", "bias"])
@every_kind
def test_tables_made_in_inference_mode_serve_training(kind: str, balance: str) -> None:
    with torch.device("meta"):
        layer = make(**KINDS[kind] | {"balance": balance})
    wanted = make(**KINDS[kind] | {"balance": balance})
    layer.load_state_dict(copy.deepcopy(wanted.state_dict()), assign=True)
    with torch.inference_mode():
        layer.eval()(tokens(5, 24))
    layer.train()
    check_alike(layer, wanted)


@every_kind
def test_a_cast_of_all_tensors_keeps_tables_right(kind: str) -> None:
    """`Module.type` casts integer tensors, too."""
    layer, wanted = make(**KINDS[kind]), make(**KINDS[kind])
    for each in (layer, wanted):
        each(tokens(300, 24))
    check_alike(layer.type(torch.bfloat16).type(torch.float32), wanted.bfloat16().float())


@pytest.mark.parametrize(
    "way", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))], ids=["copy", "pickle"]
)
@every_kind
def test_copies_keep_their_tables(kind: str, way: Callable[[Any], Any]) -> None:
    layer = make(**KINDS[kind])
    check_alike(way(layer), make(**KINDS[kind]))


def test_skipped_experts_stay_skipped() -> None:
    layer = make(router_scope="resident")
    layer.experts.skip_experts([1, 4])
    wanted = torch.tensor([0, -1, 2, 3, -1, 5], dtype=torch.int32)
    for each in (layer, copy.deepcopy(layer), layer.to_empty(device="meta").to_empty(device="cpu")):
        assert torch.equal(each.experts.resident_index, wanted)
        assert torch.equal(each.allowed, wanted >= 0)
    with pytest.raises(ValueError, match=r"experts must be in 0\.\.5"):
        layer.experts.skip_experts([6])


# ---- averages ------------------------------------------------------------------------------------

AVERAGES = {"ema": get_ema_multi_avg_fn(0.9), "swa": get_swa_multi_avg_fn(), "mean": None}


@pytest.mark.parametrize("use_buffers", [False, True])
@pytest.mark.parametrize("average", AVERAGES)
@every_kind
def test_averaged_layers_use_the_same_experts(kind: str, average: str, use_buffers: bool) -> None:
    """The mean of equal layers is that layer."""
    if average == "swa" and use_buffers:
        pytest.skip(
            "torch refuses to: it divides integer buffers, here the counts of bias balancing"
        )
    layer = make(**KINDS[kind])
    mean = AveragedModel(layer, multi_avg_fn=AVERAGES[average], use_buffers=use_buffers)
    for _ in range(3):
        layer(tokens(7, 24))  # counts differ from pass to pass
        mean.update_parameters(layer)
    x = tokens(30, 24)
    torch.testing.assert_close(mean(x), layer(x))
    assert torch.equal(mean.module.experts.resident_index, layer.experts.resident_index)
    make(**KINDS[kind] | {"seed": 1}).load_state_dict(mean.module.state_dict())


def test_an_averaged_language_model() -> None:
    model = language_model(router_scope="resident")
    mean = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    for _ in range(3):
        mean.update_parameters(model)
    torch.testing.assert_close(mean(text(2, 12)), model(text(2, 12)))
    assert torch.equal(mean.module.rope, model.rope)


# ---- state dicts of other experts ----------------------------------------------------------------


def through_a_file(state: dict[str, Tensor]) -> dict[str, Tensor]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


OTHERS: dict[str, Callable[[nn.Module, nn.Module], Any]] = {
    "plain": lambda to, of: to.load_state_dict(of.state_dict()),
    "lenient": lambda to, of: to.load_state_dict(of.state_dict(), strict=False),
    "assign": lambda to, of: to.load_state_dict(of.state_dict(), assign=True),
    "file": lambda to, of: to.load_state_dict(through_a_file(of.state_dict())),
    "in a model": lambda to, of: nn.Sequential(to).load_state_dict(nn.Sequential(of).state_dict()),
    "experts alone": lambda to, of: to.experts.load_state_dict(of.experts.state_dict()),
    "distributed": lambda to, of: set_model_state_dict(to, get_model_state_dict(of)),
    "averaged": lambda to, of: to.load_state_dict(AveragedModel(of).module.state_dict()),
}


@pytest.mark.parametrize("way", OTHERS)
def test_a_state_dict_of_other_experts_is_refused(way: str) -> None:
    """The error names the ids of both, and no row is changed."""
    layer, other = make(resident_experts=[0, 2, 5]), make(resident_experts=[0, 2, 4], seed=1)
    before = copy.deepcopy(layer.experts.state_dict())
    with pytest.raises(
        RuntimeError, match=r"resident_experts must be \[0, 2, 5\] .*, got \[0, 2, 4\]"
    ):
        OTHERS[way](layer, other)
    assert all(torch.equal(layer.experts.state_dict()[n], value) for n, value in before.items())
    OTHERS[way](layer, make(resident_experts=[0, 2, 5], seed=1))
    assert torch.equal(layer.experts.expand_weight[1], other.experts.expand_weight[1])


def test_extra_state_alone_is_compared_as_well() -> None:
    """transformers passes the extra state alone, without a state dict."""
    layer = make(resident_experts=[0, 2, 5])
    layer.experts.set_extra_state(make(resident_experts=[0, 2, 5]).experts.get_extra_state())
    with pytest.raises(
        ValueError, match=r"resident_experts must be \[0, 2, 5\] .*, got \[0, 2, 4\]"
    ):
        layer.experts.set_extra_state(make(resident_experts=[0, 2, 4]).experts.get_extra_state())


def test_the_mean_of_two_sites_state_dicts_is_refused() -> None:
    states = [make(resident_experts=[0, 2, e], seed=e).state_dict() for e in (4, 5)]
    mean = {name: (states[0][name] + states[1][name]) / 2 for name in states[0]}
    with pytest.raises(RuntimeError, match=r"whole numbers.*4\.5"):
        make(resident_experts=[0, 2, 4]).load_state_dict(mean)
    alike = {name: value * 0.9 + value * 0.1 for name, value in states[0].items()}
    make(resident_experts=[0, 2, 4]).load_state_dict(alike)
    with pytest.raises(RuntimeError, match="must be ids"):
        make(resident_experts=[0]).load_state_dict(states[0] | {"experts._extra_state": None})


def test_a_state_dict_without_resident_ids_is_loaded() -> None:
    old = make(**RESIDENT, seed=1).state_dict()
    del old["experts._extra_state"]
    layer = make(**RESIDENT)
    assert str(layer.load_state_dict(old)) == "<All keys matched successfully>"
    assert torch.equal(layer.experts.expand_weight, old["experts.expand_weight"])


def test_a_state_dict_after_a_reshuffle_has_the_new_resident_ids() -> None:
    layer = make(resident_experts=[0, 2, 5])
    layer.set_resident_experts([0, 2, 4], {4: make().experts.expert_weights(4)})
    assert layer.state_dict()["experts._extra_state"].tolist() == [0, 2, 4]
    other = make(resident_experts=[0, 2, 4], seed=1)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(tokens(5, 24)), layer(tokens(5, 24)))


def test_a_distributed_checkpoint_of_other_experts_is_refused(tmp_path: Any) -> None:
    layer, other = make(resident_experts=[0, 2, 5]), make(resident_experts=[0, 2, 4], seed=1)
    alike = make(resident_experts=[0, 2, 4], seed=2)
    dcp.save({"model": other.state_dict()}, checkpoint_id=tmp_path, no_dist=True)
    for target in (alike, layer):
        state = {"model": target.state_dict()}
        dcp.load(state, checkpoint_id=tmp_path, no_dist=True)
        if target is layer:
            with pytest.raises(
                RuntimeError, match=r"resident_experts must be \[0, 2, 5\] .*, got \[0, 2, 4\]"
            ):
                target.load_state_dict(state["model"])
        else:
            target.load_state_dict(state["model"])
    assert torch.equal(alike(tokens(5, 24)), other(tokens(5, 24)))


def test_copies_of_absent_experts_are_in_no_state_dict() -> None:
    layer = make(resident_experts=[0, 2, 5], stale_experts=[1, 3])
    assert isinstance(layer.stale, Experts) and not layer.stale.state_dict()
    without = make(resident_experts=[0, 2, 5])
    assert layer.state_dict().keys() == without.state_dict().keys()
    without.load_state_dict(layer.state_dict())
