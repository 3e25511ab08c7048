"""Experts made from a dense MLP: sparse upcycling, to start an MoE from a dense checkpoint.

Every expert starts as a copy of the MLP and the router with its usual initial weights, after
Komatsuzaki et al. (arXiv 2212.05055). Optional noise makes the copies differ, so that they
specialise sooner.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fomoe_ext.activations import ACTIVATIONS, is_gated
from fomoe_ext.checks import one_of
from fomoe_ext.layer.experts import Experts
from fomoe_ext.layer.seeding import fill_normal_, stable_generator
from fomoe_ext.layer.shared import SharedExpert, activate

_GATED_NAMES = ("gate_proj", "up_proj", "down_proj")
_PLAIN_NAMES = (("up_proj", "down_proj"), ("fc1", "fc2"))
_ACTIVATION_NAMES = ("act_fn", "activation_fn", "act", "activation")
_GATED_OF = {"silu": "swiglu", "gelu": "geglu"}
_WANTED = (
    "a module with the linear layers gate_proj, up_proj and down_proj, or up_proj and down_proj, "
    "or fc1 and fc2, a Sequential of Linear, activation, Linear, or a SharedExpert"
)


class DenseMLP(NamedTuple):
    """A dense MLP read as one expert by `read_mlp`. Tensors share the memory of the module.

    expand: gate and up, or only up, each [N, D]. contract: [D, N]. expand_biases: [N] or None for
    each of `expand`. contract_bias: [D] or None. activation: a name of `fomoe_ext.activations`.
    """

    expand: tuple[Tensor, ...]
    contract: Tensor
    expand_biases: tuple[Tensor | None, ...]
    contract_bias: Tensor | None
    activation: str

    @property
    def sizes(self) -> tuple[int, int]:
        """D and N."""
        inner, hidden = self.expand[0].shape
        return hidden, inner

    @property
    def has_bias(self) -> bool:
        """Whether any of the linear layers has a bias."""
        return any(bias is not None for bias in (*self.expand_biases, self.contract_bias))

    def __call__(self, x: Tensor) -> Tensor:
        """The output of the expert for x [T, D], [T, D]."""
        sides = [F.linear(x, w, b) for w, b in zip(self.expand, self.expand_biases, strict=True)]
        act = activate(torch.cat(sides, dim=-1), self.activation)
        return F.linear(act, self.contract, self.contract_bias)


def read_mlp(mlp: nn.Module, activation: str | None = None) -> DenseMLP:
    """The weights and the activation of a dense MLP of a known layout.

    Args:
        mlp: gated with linear layers `gate_proj`, `up_proj` and `down_proj` (Llama, Mistral, Qwen,
            Gemma ... of transformers), plain with `up_proj` and `down_proj` or `fc1` and `fc2`, an
            `nn.Sequential` of Linear, activation, Linear, or a `SharedExpert`. Weights of any one
            float dtype, biases where it has them.
        activation: a name of `fomoe_ext.activations`; None = what the module's `act_fn`,
            `activation_fn`, `act` or `activation` computes, found by trying it on some numbers.

    Raises TypeError for a module of another layout, and ValueError for sizes that do not fit, for
    an activation that is unknown or not the module's, and if the module computes something else
    than its layers and activation, e.g. with a factor or dropout.
    """
    if activation is not None:
        one_of(tuple(ACTIVATIONS), activation=activation)
    if not isinstance(mlp, nn.Module):
        raise TypeError(f"mlp must be {_WANTED}, got {type(mlp).__name__}")
    if isinstance(mlp, SharedExpert):
        found = _of_shared_expert(mlp, activation)
    else:
        found = _of_linears(mlp, activation)
    _check_sizes(found)
    _check_function(mlp, found)
    return found


def read_for_layer(
    mlp: nn.Module, activation: str | None, layer_options: Mapping[str, Any]
) -> tuple[DenseMLP, dict[str, Any]]:
    """The MLP as read by `read_mlp`, and the options of a layer whose experts are copies of it:
    `layer_options`, and for the rest the defaults that `MoELayer.from_dense` documents.

    Raises TypeError for sizes in `layer_options`, and ValueError for expert_bias=False with an MLP
    that has biases.
    """
    if taken := {"hidden_size", "intermediate_size"} & layer_options.keys():
        raise TypeError(f"{sorted(taken)[0]} must not be given, because mlp determines it")
    dense = read_mlp(mlp, activation)
    if dense.has_bias and layer_options.get("expert_bias") is False:
        raise ValueError("expert_bias must be True or left out: mlp has biases, got False")
    first = dense.expand[0]
    options = {
        "activation": dense.activation,
        "expert_bias": dense.has_bias,
        "router_scoring": "softmax",
        "router_renormalize": True,
        "dtype": first.dtype,
    } | dict(layer_options)
    options["device"] = options.get("device") or first.device
    return dense, options


@torch.no_grad()
def fill_experts(experts: Experts, dense: DenseMLP, noise: float = 0.0) -> None:
    """Makes every resident expert a copy of `dense`, plus noise.

    noise: standard deviation of the values added to each weight matrix, relative to the root mean
    square of the matrix; biases get none. The values depend only on (seed, layer_index, expert,
    matrix), so that all holders of an expert start with the same weights.
    """
    sources = (*dense.expand, dense.contract)
    names = ("gate", "up", "down")[-len(sources) :]
    deviations = [noise * _scale(source) if noise else 0.0 for source in sources]
    for row, expert in enumerate(experts.resident_experts):
        targets = (
            *experts.expand_weight[row].chunk(len(dense.expand)),
            experts.contract_weight[row],
        )
        for target, source, std, name in zip(targets, sources, deviations, names, strict=True):
            target.copy_(source)
            if std:
                drawn = torch.empty(target.shape, dtype=torch.float32, device=target.device)
                fill_normal_(drawn, std, experts.seed, "upcycle", name, experts.layer_index, expert)
                target.copy_(drawn.add_(source.to(target.device)))
        if experts.expand_bias is not None and experts.contract_bias is not None:
            of_row = experts.expand_bias[row].chunk(len(dense.expand))
            for target, bias in zip(of_row, dense.expand_biases, strict=True):
                _copy_bias(target, bias)
            _copy_bias(experts.contract_bias[row], dense.contract_bias)


def _scale(weight: Tensor) -> float:
    """Root mean square, rounded to bf16, because sites may sum in different orders."""
    return float(weight.double().square().mean().sqrt().to(torch.bfloat16))


def _copy_bias(target: Tensor, bias: Tensor | None) -> None:
    if bias is None:
        target.zero_()
    else:
        target.copy_(bias)


# ---- reading -------------------------------------------------------------------------------------


def _of_shared_expert(mlp: SharedExpert, activation: str | None) -> DenseMLP:
    if activation not in (None, mlp.activation):
        raise ValueError(f"activation must be mlp's own, {mlp.activation!r}, got {activation!r}")
    sides = 2 if is_gated(mlp.activation) else 1
    expand = mlp.expand.weight.detach().chunk(sides)
    return DenseMLP(expand, mlp.contract.weight.detach(), (None,) * sides, None, mlp.activation)


def _of_linears(mlp: nn.Module, activation: str | None) -> DenseMLP:
    if isinstance(mlp, nn.Sequential):
        if len(mlp) != 3:
            raise TypeError(f"mlp must be {_WANTED}, got a Sequential of {len(mlp)}")
        layers, function = {"0": mlp[0], "2": mlp[2]}, mlp[1]
    else:
        names = _layout(mlp)
        layers = {name: getattr(mlp, name) for name in names}
        found = (getattr(mlp, name, None) for name in _ACTIVATION_NAMES)
        function = next((each for each in found if callable(each)), None)
    for name, layer in layers.items():
        if not isinstance(layer, nn.Linear):
            raise TypeError(f"mlp.{name} must be an nn.Linear, got {type(layer).__name__}")
    *expand, contract = layers.values()
    return DenseMLP(
        tuple(layer.weight.detach() for layer in expand),
        contract.weight.detach(),
        tuple(_bias_of(layer) for layer in expand),
        _bias_of(contract),
        _choose_activation(function, activation, gated=len(expand) == 2),
    )


def _layout(mlp: nn.Module) -> tuple[str, ...]:
    for names in (_GATED_NAMES, *_PLAIN_NAMES):
        if all(isinstance(getattr(mlp, name, None), nn.Module) for name in names):
            return names
    children = ", ".join(name for name, _ in mlp.named_children()) or "no modules"
    raise TypeError(f"mlp must be {_WANTED}, got {type(mlp).__name__} with {children}")


def _bias_of(layer: nn.Linear) -> Tensor | None:
    return None if layer.bias is None else layer.bias.detach()


def _choose_activation(
    function: Callable[[Tensor], Tensor] | None, activation: str | None, gated: bool
) -> str:
    """The name of the MLP's activation: the one that `function` computes, else `activation`."""
    name = _recognise(function)
    told = _GATED_OF.get(name, name) if gated and name is not None else name
    if activation is None:
        if told is None or is_gated(told) != gated:
            kind = "gated" if gated else "not gated"
            known = ", ".join(a for a in ACTIVATIONS if is_gated(a) == gated)
            raise ValueError(
                f"activation must be given as one of {known} for this mlp ({kind}), got "
                f"{_describe(function)}"
            )
        return told
    if is_gated(activation) != gated:
        raise ValueError(
            f"activation must be one {'with' if gated else 'without'} a gate, as mlp has "
            f"{'one' if gated else 'none'}, got {activation!r}"
        )
    if told is not None and told != activation:
        raise ValueError(f"activation must be mlp's own, {told!r}, got {activation!r}")
    return activation


def _describe(function: Callable[[Tensor], Tensor] | None) -> str:
    if function is None:
        return "no attribute " + ", ".join(_ACTIVATION_NAMES)
    name = repr(function) if isinstance(function, nn.Module) else getattr(function, "__name__", "")
    return f"the activation {name or type(function).__name__}"


def _recognise(function: Callable[[Tensor], Tensor] | None) -> str | None:
    """Which of silu, gelu (in tanh form) and relu2 a function computes, or None."""
    if function is None:
        return None
    if isinstance(function, nn.Module) and next(function.parameters(), None) is not None:
        return None  # it has parameters of its own
    numbers = torch.linspace(-8, 8, 257, device="cpu")
    try:
        with torch.no_grad():
            values = function(numbers.clone())
    except (RuntimeError, TypeError, ValueError):
        return None
    if not isinstance(values, Tensor) or values.shape != numbers.shape:
        return None
    for name in ("silu", "gelu", "relu2"):
        # The exact GELU differs from the tanh form by up to 5e-4.
        if torch.allclose(values.float(), activate(numbers, name), rtol=0, atol=2e-5):
            return name
    return None


def _check_sizes(dense: DenseMLP) -> None:
    weights = (*dense.expand, dense.contract)
    kinds = {(weight.dtype, weight.device) for weight in weights}
    first = dense.expand[0]
    if len(kinds) > 1 or not first.is_floating_point():
        raise ValueError(f"mlp must have weights of one float dtype on one device, got {kinds}")
    if first.is_meta:
        raise ValueError("mlp must have its weights in memory, got the meta device")
    inner, hidden = first.shape
    wanted = [[inner, hidden]] * len(dense.expand) + [[hidden, inner]]
    shapes = [list(weight.shape) for weight in weights]
    if shapes != wanted:
        raise ValueError(f"mlp must have weights of the shapes {wanted}, got {shapes}")


@torch.no_grad()
def _check_function(mlp: nn.Module, dense: DenseMLP) -> None:
    """Raises ValueError unless the module computes the same as `dense`, in which an additional
    factor, norm or clamp of the module would be lost."""
    weight = dense.contract
    generator = stable_generator(0, "upcycle probe")
    x = torch.randn(16, weight.shape[0], generator=generator, device="cpu").to(weight)
    with torch.autocast(weight.device.type, enabled=False):
        wanted, got = mlp(x), dense(x)
    if not isinstance(wanted, Tensor) or wanted.shape != got.shape:
        raise ValueError("mlp must return one tensor of its input's shape")
    error = (got.double() - wanted.double()).norm() / wanted.double().norm().clamp_min(1e-30)
    # Large enough for rounding and for the difference between the two forms of GELU.
    limit = 5e-3 if weight.dtype in (torch.float32, torch.float64) else 0.05
    if not error < limit:
        raise ValueError(
            f"mlp must compute what its layers and the activation {dense.activation} do, but its "
            f"output differs by {error:.2g} of its norm: is there dropout, a factor or a norm in "
            "it, or another activation?"
        )
