"""Experts made from a dense MLP: same function, noise that sites agree on, layouts, bad input."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fomoe_ext import ops
from fomoe_ext.layer import upcycle
from fomoe_ext.layer.moe import MoELayer
from fomoe_ext.layer.shared import SharedExpert

pytestmark = pytest.mark.usefixtures("one_thread")

WIDTH, INNER = 24, 20


class GatedMLP(nn.Module):
    """A gated MLP, as in Llama."""

    def __init__(self, act_fn: Any, bias: bool = False, factor: float = 1.0) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(WIDTH, INNER, bias=bias)
        self.up_proj = nn.Linear(WIDTH, INNER, bias=bias)
        self.down_proj = nn.Linear(INNER, WIDTH, bias=bias)
        self.act_fn, self.factor = act_fn, factor

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class ClampedMLP(GatedMLP):
    """Like an expert of gpt-oss: its activation takes both halves and is not a module attribute."""

    def __init__(self) -> None:
        super().__init__(None, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_proj(x).clamp(max=7), self.up_proj(x).clamp(-7, 7)
        return self.down_proj((up + 1) * gate * torch.sigmoid(gate * 1.702))


class PlainMLP(nn.Module):
    """Two linear layers and an activation, under the given names."""

    def __init__(self, names: tuple[str, str], act_name: str, act: Any, bias: bool = True) -> None:
        super().__init__()
        self.names, self.act_name = names, act_name
        self.add_module(names[0], nn.Linear(WIDTH, INNER, bias=bias))
        self.add_module(names[1], nn.Linear(INNER, WIDTH, bias=bias))
        setattr(self, act_name, act)

    def forward(self, x: Tensor) -> Tensor:
        first, second = (self.get_submodule(name) for name in self.names)
        return second(getattr(self, self.act_name)(first(x)))


def relu2(x: Tensor) -> Tensor:
    return F.relu(x).square()


def sequential(act: nn.Module, *, first_bias: bool, second_bias: bool) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(WIDTH, INNER, bias=first_bias), act, nn.Linear(INNER, WIDTH, bias=second_bias)
    )


TANH = nn.GELU(approximate="tanh")
# A builder of the MLP, the activation to be recognised, and whether it has biases.
KNOWN: dict[str, tuple[Any, str, bool]] = {
    "llama": (lambda: GatedMLP(nn.SiLU()), "swiglu", False),
    "gated with biases": (lambda: GatedMLP(F.silu, bias=True), "swiglu", True),
    "gemma": (lambda: GatedMLP(TANH), "geglu", False),
    "fc1, fc2": (lambda: PlainMLP(("fc1", "fc2"), "activation_fn", TANH), "gelu", True),
    "nemotron": (lambda: PlainMLP(("up_proj", "down_proj"), "act_fn", relu2), "relu2", True),
    "no biases": (lambda: PlainMLP(("fc1", "fc2"), "act", nn.SiLU(), False), "silu", False),
    "sequential": (lambda: sequential(TANH, first_bias=True, second_bias=True), "gelu", True),
    "first bias": (lambda: sequential(nn.SiLU(), first_bias=True, second_bias=False), "silu", True),
    "second bias": (lambda: sequential(TANH, first_bias=False, second_bias=True), "gelu", True),
    "own gated": (lambda: SharedExpert(WIDTH, INNER, activation="clamped_swiglu", seed=3),
                  "clamped_swiglu", False),
    "own plain": (lambda: SharedExpert(WIDTH, INNER, activation="relu2"), "relu2", False),
}  # fmt: skip


def built(name: str) -> nn.Module:
    torch.manual_seed(0)
    return KNOWN[name][0]()


def tokens(count: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(1)).to(dtype)


def relative_error(got: Tensor, wanted: Tensor) -> float:
    return ((got.double() - wanted.double()).norm() / wanted.double().norm()).item()


# ---- the function --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KNOWN)
def test_without_noise_the_layer_computes_what_the_mlp_does(name: str) -> None:
    """A token's combine weights sum to one, so equal experts give the MLP's output."""
    mlp, (_, activation, bias) = built(name), KNOWN[name]
    layer = MoELayer.from_dense(mlp, 6, top_k=3, seed=7)
    assert layer.experts.activation == activation
    assert (layer.experts.expand_bias is not None) == bias
    x, again = tokens(50).requires_grad_(), tokens(50).requires_grad_()
    y, wanted = layer(x), mlp(again)
    assert relative_error(y, wanted) < 1e-5
    assert layer.stats.load.count_nonzero() > 3  # not all tokens went the same way
    wanted.square().sum().backward()
    y.square().sum().backward()
    assert relative_error(x.grad, again.grad) < 1e-5


@pytest.mark.parametrize(
    "options",
    [
        {"router_scoring": "sigmoid"},
        {"top_k": 1},
        {"num_experts": 1, "top_k": 1},
        {"resident_experts": [4, 1], "router_scope": "resident"},
        {"router_num_groups": 3, "router_groups_kept": 2},
        {"expert_bias": True},
    ],
    ids=str,
)
def test_options_of_the_layer_keep_the_function(options: dict[str, Any]) -> None:
    options = {"num_experts": 6, "top_k": 2} | options
    mlp, x = built("llama"), tokens(40)
    layer = MoELayer.from_dense(mlp, options.pop("num_experts"), **options)
    assert relative_error(layer(x), mlp(x)) < 1e-5


def test_without_renormalisation_the_function_differs() -> None:
    mlp, x = built("llama"), tokens(40)
    layer = MoELayer.from_dense(mlp, 6, top_k=2, router_renormalize=False)
    assert relative_error(layer(x), mlp(x)) > 0.3
    assert layer.router.scoring == "softmax"


def test_sites_that_skip_add_up_to_the_mlp() -> None:
    mlp, x = built("fc1, fc2"), tokens(40)
    sites = [
        MoELayer.from_dense(mlp, 6, top_k=3, resident_experts=ids) for ids in ([0, 5, 3], [1, 2, 4])
    ]
    assert all(0 < site(x).norm() < mlp(x).norm() for site in sites)
    assert relative_error(sum(site(x) for site in sites), mlp(x)) < 1e-5


def test_a_shared_expert_adds_its_own_output() -> None:
    mlp, x = built("llama"), tokens(40)
    layer = MoELayer.from_dense(
        mlp, 6, top_k=3, seed=7, shared_expert_intermediate_size=8, layer_index=2
    )
    shared = SharedExpert(WIDTH, 8, seed=7, layer_index=2)
    assert relative_error(layer(x), mlp(x) + shared(x)) < 1e-5


def test_router_and_shared_expert_are_those_of_a_new_layer() -> None:
    options: dict[str, Any] = {
        "seed": 7,
        "layer_index": 3,
        "resident_experts": [2, 4],
        "router_scope": "resident",
        "shared_expert_intermediate_size": 12,
        "balance": "bias",
    }
    made = MoELayer.from_dense(built("llama"), 6, top_k=2, **options)
    plain = MoELayer(
        WIDTH, INNER, 6, 2, router_scoring="softmax", router_renormalize=True, **options
    )
    assert repr(made) == repr(plain)
    for mine, wanted in zip(made.buffers(), plain.buffers(), strict=True):
        assert torch.equal(mine, wanted)
    for (name, mine), wanted in zip(made.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(mine, wanted) != name.startswith("experts."), name
        assert mine.requires_grad and mine.is_leaf


def test_nothing_is_shared_with_the_mlp() -> None:
    mlp = built("gated with biases").eval()
    before, x = copy.deepcopy(mlp.state_dict()), tokens(10)
    layer = MoELayer.from_dense(mlp, 4, top_k=2)
    assert not layer.training
    y = layer(x)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(1)
    assert all(torch.equal(value, before[name]) for name, value in mlp.state_dict().items())
    with torch.no_grad():
        mlp.up_proj.weight.zero_()
    other = MoELayer.from_dense(mlp, 4, top_k=2)
    assert not torch.equal(other(x), y)


# ---- noise ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gated with biases", "fc1, fc2", "own gated"])
def test_noise_is_normal_and_relative_to_each_matrix(name: str) -> None:
    mlp = built(name)
    with torch.no_grad():
        if isinstance(mlp, GatedMLP):
            mlp.gate_proj.weight.mul_(40)
    exact = MoELayer.from_dense(mlp, 8, top_k=2, seed=5)
    noisy = MoELayer.from_dense(mlp, 8, top_k=2, seed=5, noise=0.1)
    sides = 2 if ops.is_gated(exact.experts.activation) else 1
    drawn = []
    for part, pieces in (("expand_weight", sides), ("contract_weight", 1)):
        added = (noisy.experts.part(part) - exact.experts.part(part)).detach().chunk(pieces, dim=1)
        for noise, weight in zip(
            added, exact.experts.part(part).detach().chunk(pieces, dim=1), strict=True
        ):
            scaled = noise / weight.square().mean().sqrt()
            assert scaled.std().item() == pytest.approx(0.1, rel=0.05)
            assert abs(scaled.mean().item()) < 0.01
            drawn += list(scaled.flatten(1))
    # Every expert and every matrix has its own noise.
    same = torch.corrcoef(torch.stack(drawn)).fill_diagonal_(0).abs().max()
    assert same < 0.25
    for part in exact.experts.parts[2:]:
        assert torch.equal(exact.experts.part(part), noisy.experts.part(part))
    assert torch.equal(exact.router.weight, noisy.router.weight)


def test_sites_agree_on_the_experts_they_share() -> None:
    mlp = built("llama")
    options: dict[str, Any] = {"top_k": 2, "noise": 0.05, "seed": 9, "layer_index": 1}
    whole = MoELayer.from_dense(mlp, 6, **options)
    for ids in ([1, 4], [5, 4, 0]):
        torch.manual_seed(len(ids))  # nothing is drawn from the global generator
        site = MoELayer.from_dense(mlp, 6, resident_experts=ids, **options)
        assert site.experts.expand_weight.shape == (len(ids), 2 * INNER, WIDTH)
        for expert in ids:
            for mine, wanted in zip(
                site.experts.expert_weights(expert),
                whole.experts.expert_weights(expert),
                strict=True,
            ):
                assert torch.equal(mine, wanted)
    for change in ({"seed": 10}, {"layer_index": 2}):
        other = MoELayer.from_dense(mlp, 6, **(options | change))
        assert not torch.equal(other.experts.expand_weight, whole.experts.expand_weight)


def test_little_noise_changes_the_output_little() -> None:
    mlp, x = built("llama"), tokens(60)
    errors = [
        relative_error(MoELayer.from_dense(mlp, 6, top_k=2, noise=noise)(x), mlp(x))
        for noise in (0.001, 0.01, 0.1)
    ]
    assert 1e-4 < errors[0] < errors[1] / 5 < errors[2] / 25 < 0.05


# ---- kinds of weights ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_lower_precision(dtype: torch.dtype) -> None:
    mlp = built("gated with biases").to(dtype)
    layer = MoELayer.from_dense(mlp, 4, top_k=2)
    assert {p.dtype for p in layer.parameters()} == {dtype}
    assert layer.router.selection_bias.dtype == torch.float32
    x = tokens(30, dtype)
    assert relative_error(layer(x), mlp(x)) < 2**-6
    assert torch.equal(layer.experts.expand_weight[1, INNER:], mlp.up_proj.weight)


def test_noise_is_rounded_once() -> None:
    """A bf16 layer from an fp32 MLP has the noise of the fp32 layer."""
    mlp = built("llama")
    low = MoELayer.from_dense(mlp, 4, top_k=2, noise=0.1, dtype=torch.bfloat16)
    high = MoELayer.from_dense(mlp, 4, top_k=2, noise=0.1)
    assert torch.equal(low.experts.expand_weight, high.experts.expand_weight.bfloat16())


def test_float64_weights_into_a_float32_layer() -> None:
    mlp = built("llama").double()
    layer = MoELayer.from_dense(mlp, 4, top_k=2, dtype=torch.float32)
    assert relative_error(layer(tokens(20)), mlp(tokens(20).double())) < 1e-5
    with pytest.raises(ValueError, match=r"dtype must be float32, .* got torch.float64"):
        MoELayer.from_dense(mlp, 4, top_k=2)


def test_exact_gelu_is_taken_only_when_asked_for() -> None:
    mlp = GatedMLP(nn.GELU())
    with pytest.raises(
        ValueError, match=r"activation must be given as one of .*geglu.* got the activation .*GELU"
    ):
        MoELayer.from_dense(mlp, 4, top_k=2)
    layer = MoELayer.from_dense(mlp, 4, top_k=2, activation="geglu")
    error = relative_error(layer(tokens(50)), mlp(tokens(50)))
    assert 1e-5 < error < 5e-3


def test_an_activation_that_is_no_attribute_is_named() -> None:
    mlp = ClampedMLP()
    with pytest.raises(
        ValueError, match=r"activation must be given as one of .* mlp \(gated\), got no"
    ):
        MoELayer.from_dense(mlp, 4, top_k=2)
    layer = MoELayer.from_dense(mlp, 4, top_k=2, activation="clamped_swiglu")
    assert relative_error(layer(20 * tokens(50)), mlp(20 * tokens(50))) < 1e-5


@pytest.mark.parametrize("kind", ["llama", "gemma"])
def test_mlps_of_transformers(kind: str) -> None:
    pytest.importorskip("transformers")
    if kind == "llama":
        from transformers.models.llama.modeling_llama import LlamaConfig as Config
        from transformers.models.llama.modeling_llama import LlamaMLP as MLP
    else:
        from transformers.models.gemma.modeling_gemma import GemmaConfig as Config
        from transformers.models.gemma.modeling_gemma import GemmaMLP as MLP
    torch.manual_seed(0)
    mlp = MLP(Config(hidden_size=WIDTH, intermediate_size=INNER, num_attention_heads=4))
    layer = MoELayer.from_dense(mlp, 4, top_k=2)
    assert layer.experts.activation == {"llama": "swiglu", "gemma": "geglu"}[kind]
    assert relative_error(layer(tokens(30)), mlp(tokens(30))) < 1e-5


# ---- bad input -----------------------------------------------------------------------------------


class Named(nn.Module):
    """Modules under the given names."""

    def __init__(self, **modules: nn.Module) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)
        self.act_fn = F.silu


def linear(inner: int = INNER) -> nn.Linear:
    return nn.Linear(WIDTH, inner)


class Scores(nn.Module):
    """Returns a tuple, as MoE blocks may."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.act = linear(), nn.Linear(INNER, WIDTH), F.silu

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return self.fc2(self.act(self.fc1(x))), None


def with_dropout() -> nn.Module:
    mlp = PlainMLP(("fc1", "fc2"), "act", nn.SiLU())
    mlp.register_forward_hook(lambda _module, _inputs, y: F.dropout(y, 0.5))
    return mlp


BAD_MLPS: list[tuple[Any, type[Exception], str]] = [
    (lambda: F.silu, TypeError, "mlp must be a module with .* got function"),
    (linear, TypeError, "got Linear with no modules"),
    (lambda: Named(w1=linear(), w2=linear()), TypeError, "gate_proj.* got Named with w1, w2"),
    (lambda: Named(up_proj=linear()), TypeError, "got Named with up_proj"),
    (lambda: Named(fc1=linear(), fc2=nn.Conv1d(1, 1, 1)), TypeError,
     "mlp.fc2 must be an nn.Linear, got Conv1d"),
    (lambda: nn.Sequential(linear(), nn.SiLU()), TypeError, "got a Sequential of 2"),
    (lambda: nn.Sequential(linear(), nn.SiLU(), nn.Identity()), TypeError,
     "mlp.2 must be an nn.Linear, got Identity"),
    (lambda: Named(fc1=linear(), fc2=linear()), ValueError, "weights of the shapes"),
    (lambda: Named(fc1=linear(), fc2=nn.Linear(INNER, WIDTH).half()), ValueError,
     "one float dtype"),
    (lambda: PlainMLP(("fc1", "fc2"), "act", F.silu).to("meta"), ValueError, "in memory"),
    (lambda: PlainMLP(("fc1", "fc2"), "act", nn.ReLU()), ValueError,
     "activation must be given as one of .*ReLU"),
    (lambda: PlainMLP(("fc1", "fc2"), "act", nn.PReLU()), ValueError, "PReLU"),
    (lambda: PlainMLP(("fc1", "fc2"), "words", nn.SiLU()), ValueError, "no attribute act_fn"),
    (lambda: GatedMLP(relu2), ValueError, "must be given as one of swiglu, "),
    (lambda: GatedMLP(F.silu, factor=0.9), ValueError, "differs by 0.11 .* a factor"),
    (with_dropout, ValueError, "differs by .* dropout"),
    (Scores, ValueError, "mlp must return one tensor"),
]  # fmt: skip


@pytest.mark.parametrize("make, error, words", BAD_MLPS, ids=[b[2] for b in BAD_MLPS])
def test_bad_mlps(make: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        MoELayer.from_dense(make(), 4, top_k=2)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"noise": -0.1}, ValueError, "noise must be finite and at least 0.0, got -0.1"),
        ({"noise": float("inf")}, ValueError, "noise must be finite"),
        ({"noise": "much"}, TypeError, "noise must be a number, got 'much'"),
        ({"activation": "relu"}, ValueError, "activation must be one of swiglu, .* got 'relu'"),
        ({"activation": "silu"}, ValueError, "activation must be one with a gate, .* got 'silu'"),
        ({"activation": "geglu"}, ValueError, "activation must be mlp's own, 'swiglu'"),
        ({"expert_bias": False}, ValueError, "expert_bias must be True or left out"),
        ({"hidden_size": WIDTH}, TypeError, "hidden_size must not be given"),
        ({"top_k": 5}, ValueError, "top_k must be at most num_experts = 4"),
        ({"resident_experts": [4]}, ValueError, "resident_experts must be in 0..3"),
        ({"seed": 1.5}, TypeError, "seed must be an int"),
        ({"nois": 0.1}, TypeError, "nois"),
    ],
    ids=str,
)
def test_bad_options(options: dict[str, Any], error: type[Exception], words: str) -> None:
    mlp = GatedMLP(F.silu, bias=True)
    with pytest.raises(error, match=words):
        MoELayer.from_dense(mlp, 4, **({"top_k": 2} | options))


def test_a_shared_expert_of_another_activation() -> None:
    shared = SharedExpert(WIDTH, INNER, activation="geglu")
    assert upcycle.read_mlp(shared, "geglu").activation == "geglu"
    with pytest.raises(ValueError, match="activation must be mlp's own, 'geglu', got 'swiglu'"):
        upcycle.read_mlp(shared, "swiglu")
